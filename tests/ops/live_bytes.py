"""How much memory something takes at its worst moment, on the CPU: every allocation of torch's allocator is seen, also
those inside operators and compiled code."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most bytes alive at one time among those that `fn` allocates; what was there before does not count.

    What `fn` returns, or leaves in `.grad`, counts while it lives. oneDNN's own scratch memory is not seen.
    """
    return max(_course(fn))


def kept_bytes(fn: Callable[[], object]) -> int:
    """Bytes that `fn` allocated and that live on in what it returned, such as an output's graph."""
    return _course(fn)[-1]


def _course(fn: Callable[[], object]) -> list[int]:
    """Bytes alive after each allocation and release, from 0 to when `fn` has returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    course = [0]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            course.append(course[-1] + event.nbytes())
    return course
