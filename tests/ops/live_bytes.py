"""Measures the peak memory of a call on the CPU, without the scratch memory of libraries.

Every allocation of torch's allocator counts, also in our C++, inside our operators and in compiled code. One exception:
memory that one torch operator (`aten::`) allocates and frees before it returns is scratch of its library, such as a
copy of a matrix in another order or in fp32. It depends on the processor and not on our code, so it does not count.
Operators that torch composes of others (`aten::cross_entropy_loss`) are no exception: tensors that pass between their
parts count. Allocations that do not use torch's allocator are not seen.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """Peak of the bytes that `fn` allocates; memory from before the call does not count.

    Tensors that `fn` returns, or leaves in `.grad`, count while they live.
    """
    return max(_course(fn))


def kept_bytes(fn: Callable[[], object]) -> int:
    """Bytes that `fn` allocated and that its result keeps alive, for example through the graph of an output."""
    return _course(fn)[-1]


def _course(fn: Callable[[], object]) -> list[int]:
    """Bytes alive after each allocation and release, beginning with 0 and ending when `fn` has returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
    del result
    events = _allocations(profiler.profiler.kineto_results.experimental_event_tree(), None)
    events = sorted(events, key=lambda event: event[0].start_time_ns)
    born, scratch = {}, set()
    for i, (event, operator) in enumerate(events):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            born[fields.ptr] = i, operator
        elif fields.ptr in born:
            start, maker = born.pop(fields.ptr)
            if operator is not None and operator == maker:
                scratch |= {start, i}
    course = [0]
    for i, (event, _) in enumerate(events):
        if i not in scratch:
            course.append(course[-1] + event.extra_fields.alloc_size)
    return course


def _allocations(events: list[_ProfilerEvent], operator: int | None) -> Iterator[tuple[_ProfilerEvent, int | None]]:
    """Each allocation and release, with the outermost torch operator around it, or None."""
    for event in events:
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            if fields.device.type == "cpu":
                yield event, operator
            continue
        within = operator
        if within is None and kind == _EventType.TorchOp and event.name.startswith("aten::"):
            within = None if _composed(event.name) else event.id
        yield from _allocations(event.children, within)


@functools.cache
def _composed(name: str) -> bool:
    """Whether torch composes this operator of others."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    names = [name if overload == "default" else f"{name}.{overload}" for overload in packet.overloads()]
    # some overloads exist in TorchScript only
    names = [n for n in names if torch._C._dispatch_has_kernel(n)]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CompositeImplicitAutograd") for n in names)
