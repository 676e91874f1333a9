"""What the stages need of a device: waiting, timing, a side stream, capture, and a ban on host syncs.

On a CPU each of them has a stand-in, so that every line of a stage runs on a machine without a GPU.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# calls in one graph at most: the launch of a graph then costs each of them little
_CALLS = 10
# of a measurement
_REPEATS = 5


def wait_for(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Run the block on another stream, which waits for the current one and which the current one waits for."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(call: Callable[[], Any], device: str, calls: int = 1) -> tuple[Callable[[], None], Any]:
    """`call`, recorded `calls` times as one CUDA graph: a function that replays it, and the result it writes.

    The stand-in calls again, and copies into the first result.
    """
    if device != "cuda":
        result = call()

        def again() -> None:
            for _ in range(calls):
                _copy(call(), result)

        return again, result
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # libraries allocate their workspaces and choose their kernels in the first calls
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()
    return graph.replay, result


def _copy(source: Any, target: Any) -> None:
    if isinstance(source, torch.Tensor):
        # results of inference mode can be written nowhere else
        with torch.inference_mode():
            target.copy_(source)
    elif isinstance(source, dict):
        _copy(list(source.values()), list(target.values()))
    elif isinstance(source, tuple | list):
        for a, b in zip(source, target, strict=True):
            _copy(a, b)


def measure(call: Callable[[], Any], device: str, quick: bool = False) -> dict[str, float | str]:
    """Median microseconds of a call: `device_us` by graph replay, `host_us` until the call returns, and how.

    Where a call cannot be captured, events on both sides of a row of calls give the device time. On a CPU both are the
    time of this thread. A slow call is repeated less often.
    """
    spent = _warm(call, device, 1 if quick else 3)
    rows, length = (1, 1) if quick else (_REPEATS, max(1, min(5, round(5e-3 / spent))))
    host = statistics.median(_host_seconds(call, device, length) for _ in range(rows if spent < 0.02 else 1))
    if device != "cuda":
        return dict(device_us=1e6 * host, host_us=1e6 * host, timed="thread time")
    device_timer, timed = timer(call, device)
    times = [device_timer() for _ in range(_REPEATS if spent < 0.02 else 2)]
    return dict(device_us=1e6 * statistics.median(times), host_us=1e6 * host, timed=timed)


def timer(call: Callable[[], Any], device: str) -> tuple[Callable[[], float], str]:
    """A function that measures the device seconds of a call once, and how it does so.

    A graph of up to ten calls is replayed between two events for about 5 ms. Where the call cannot be captured, it is
    launched as often, and gaps of the host count.
    """
    calls = max(1, min(_CALLS, round(5e-3 / _warm(call, device, 1))))
    try:
        replay, _ = captured(call, device, calls=calls)
        timed = "graph replay" if device == "cuda" else "thread time"
    # a vendor's kernel that syncs or allocates
    except RuntimeError as error:
        wait_for(device)
        timed = f"events, not captured: {str(error).splitlines()[0][:80]}"

        def replay() -> None:
            for _ in range(calls):
                call()

    replay()
    replays = max(1, min(50, round(5e-3 / max(_seconds(replay, device, 1), 1e-5)))) if device == "cuda" else 1
    return lambda: _seconds(replay, device, replays) / calls, timed


def _warm(call: Callable[[], Any], device: str, times: int) -> float:
    """Call so often, and once more; seconds of the last call with its wait, at least a microsecond."""
    for _ in range(times):
        call()
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return max(time.perf_counter() - start, 1e-6)


def _seconds(call: Callable[[], Any], device: str, times: int) -> float:
    """Of one call: between two events around `times` calls; the stand-in takes the time of this thread."""
    if device != "cuda":
        begun = time.thread_time()
        for _ in range(times):
            call()
        return (time.thread_time() - begun) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def _host_seconds(call: Callable[[], Any], device: str, times: int) -> float:
    """Of one call until it returns, in a short row that begins with an empty queue: a full one blocks the host."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    wait_for(device)
    start = clock()
    for _ in range(times):
        call()
    spent = clock() - start
    wait_for(device)
    return spent / times


class _ForbidsSyncs(TorchDispatchMode):
    """Raises at operators whose result the host waits for."""

    names = frozenset(
        ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in self.names:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_syncs(device: str) -> Iterator[None]:
    """Raise inside the block where the host would wait for the device.

    The stand-in sees operators with a result for the host, and no copies of pageable memory.
    """
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with nullcontext() if device == "cuda" else _ForbidsSyncs():
            yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
