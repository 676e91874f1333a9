"""Where the time of a step goes: a trace for chrome://tracing or ui.perfetto.dev, and a table of one screen.

torch.profiler times some steps. One more step is counted (counting.py) and not timed, because counting takes time. Each
operator then has seconds, FLOPs and bytes, which are compared with the measured peaks of this machine. By the roofline
model (Williams et al., 2009) the peak at which its FLOPs or its bytes take longer is the one that limits it.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from prismer.costs.counting import CostCounter
from prismer.errors import InputError
from prismer.kernels import matmul
from prismer.kernels.dispatch import as_if_watched

_STEP = "prismer: step"
# operators in the table; with the sums below them they fill one screen
_MAX_ROWS = 18
# side of the matrices whose product measures the matrix peak
_SIDE = 2048
# bytes of the copy that measures the memory peak, more than caches hold
_COPY_BYTES = 2**28
# seconds to measure each peak
_PEAK_SECONDS = 0.3
_Out = TypeVar("_Out")


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Measured peaks of a machine.

    Attributes:
        matrix: dtype -> FLOP/s of a matrix product in fp32 and bf16, with the library that the model uses.
        memory: bytes/s that a copy reads and writes.
    """

    matrix: dict[torch.dtype, float]
    memory: float


@functools.cache
def measure_peaks(device: torch.device) -> Peaks:
    """Time products of 2048 x 2048 matrices and copies of 256 MB; takes about a second, once per process."""
    matrix = {dtype: _matrix_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Peaks(matrix=matrix, memory=2 * _COPY_BYTES / _best_seconds(lambda: target.copy_(source), device))


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    rate = 0.0
    # without bf16 instructions the large product may take half a minute, so the small one has to do
    for side in (_SIDE // 8, _SIDE):
        if side == _SIDE and 2 * side**3 / rate > 4 * _PEAK_SECONDS:
            return rate
        a, b = torch.ones(side, side, device=device, dtype=dtype), torch.ones(side, side, device=device, dtype=dtype)
        rate = 2 * side**3 / _best_seconds(lambda a=a, b=b: matmul.mm(a, b), device)
    return rate


def _best_seconds(run: Callable, device: torch.device) -> float:
    best, end = float("inf"), time.perf_counter() + _PEAK_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_trace(path: Path) -> None:
    """Check before the work that a trace can be written.

    Raises:
        ValueError: if the name does not end in .json or .json.gz, or no file can be written there.
    """
    if not path.name.endswith((".json", ".json.gz")):
        raise InputError(f"a trace is JSON, but its name is {path}; end the name in .json.gz")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        _aside(path).touch()
        _aside(path).unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"the trace {path} cannot be written ({reason}); name a file in a folder that exists"
        ) from None


def _aside(path: Path) -> Path:
    # the profiler compresses a file whose name ends in .gz
    return path.with_name(f".partial-{path.name}")


@dataclass(kw_only=True)
class OperatorCost:
    """The cost of one operator in one step.

    Attributes:
        name: as torch registers it, e.g. "aten::mm".
        calls: in a mean step.
        seconds: of all calls, with the operators that they call.
        flops, bytes: of all calls; 0 if the operator was not counted.
    """

    name: str
    calls: float = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0


class StepProfile:
    """Profiles the steps of its caller: `with profile.step(): ...` until `finished`, then `report()`.

    The first `warmup` steps are not measured, the next `steps` are timed, and one more is counted. Later steps run as
    usual.

    Args:
        trace: the file to write, .json.gz or .json.
        device: the device of the steps; on a GPU an operator's time is that of its kernels.
        dtype: the dtype of the steps' matrix products, which selects the peak: fp32 or bf16.
        steps: number of timed steps.
        warmup: number of steps before them.
    """

    def __init__(self, trace: Path, *, device: torch.device, dtype: torch.dtype, steps: int, warmup: int = 2):
        check_trace(trace)
        self.trace, self.device, self.dtype, self.steps, self.warmup = trace, device, dtype, steps, warmup
        self.counter, self._done = CostCounter(), 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    @property
    def needed(self) -> int:
        """The number of steps until `finished`."""
        return self.warmup + self.steps + 1

    @property
    def finished(self) -> bool:
        """Whether all steps have run, so that `report` can be called."""
        return self._done >= self.needed

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step inside the block."""
        timed = self._done - self.warmup
        if 0 <= timed < self.steps:
            if timed == 0:
                self._profile.start()
            # only torch's dispatcher gives a GPU's Triton ops the names under which they are counted
            with as_if_watched(self.device.type == "cuda"), record_function(_STEP):
                yield
                _wait(self.device)
            if timed == self.steps - 1:
                self._profile.stop()
        elif timed == self.steps:
            with as_if_watched(self.device.type == "cuda"), self.counter:
                yield
        else:
            yield
        self._done += 1

    def rows(self) -> tuple[list[OperatorCost], float, float]:
        """(operators, the slowest first; seconds of views, allocation and autograd; seconds of all) of a mean step."""
        rows = {
            name: OperatorCost(name=name, flops=flops, bytes=traffic) for name, _, flops, traffic in self.counter.rows()
        }
        on_gpu, events = self.device.type == "cuda", self._profile.events()
        steps = [event for event in events if event.name == _STEP and event.device_type == DeviceType.CPU]
        seconds = sum(event.cpu_time_total for event in steps) * 1e-6 / self.steps
        around, waiting = 0.0, [(event, False) for event in events if event.cpu_parent is None]
        while waiting:
            event, inside = waiting.pop()
            inside = inside or event.name == _STEP or (on_gpu and event.device_type == DeviceType.CPU)
            row = rows.get(event.name)
            if row is None or not inside:
                if inside and event.name != _STEP and not on_gpu:
                    around += event.self_cpu_time_total * 1e-6 / self.steps
                waiting += [(child, inside) for child in event.cpu_children]
                continue
            row.calls += 1 / self.steps
            row.seconds += (event.device_time_total if on_gpu else event.cpu_time_total) * 1e-6 / self.steps
        return sorted(rows.values(), key=lambda row: -row.seconds), around, seconds

    def report(self) -> str:
        """Write the trace, measure the machine's peaks, and return the table.

        Raises:
            OSError: with the name of the trace, if it cannot be written; no part of it remains.
        """
        try:
            self._profile.export_chrome_trace(str(_aside(self.trace)))
            os.replace(_aside(self.trace), self.trace)
        except OSError as error:
            error.filename = str(self.trace)
            _aside(self.trace).unlink(missing_ok=True)
            raise
        rows, around, seconds = self.rows()
        table = format_table(rows, around, seconds, measure_peaks(self.device), self.dtype)
        return f"{table}\ntrace of the timed steps ({self.steps}): {self.trace} (open it in ui.perfetto.dev)"


def profile_call(run: Callable[[], _Out], trace: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[_Out, str]:
    """Call `run` three times, to warm up, to time and to count; return its result and the table."""
    steps = StepProfile(trace, device=device, dtype=dtype, steps=1, warmup=1)
    while not steps.finished:
        with steps.step():
            out = run()
    return out, steps.report()


def format_table(rows: list[OperatorCost], around: float, seconds: float, peaks: Peaks, dtype: torch.dtype) -> str:
    """The table of a profile, at most 120 columns wide.

    Args:
        rows, around, seconds: from `StepProfile.rows`.
        peaks: the machine's, of which the table shows fractions.
        dtype: of the step's matrix products.
    """
    # processors multiply bf16 and fp16 equally fast
    dtype = torch.bfloat16 if dtype.itemsize == 2 else torch.float32
    matrix = peaks.matrix[dtype]

    def line(name: str, calls: str, spent: float, flops: int = 0, traffic: int = 0) -> str:
        if len(name) > 36:
            # the end of a long name tells whether it is a backward pass
            name = f"{name[:22]}..{name[-12:]}"
        text = f"{name:36} {calls:>7} {spent * 1e3:9.2f} {spent / seconds:7.1%}"
        if not traffic:
            return text
        text += f" {flops / 1e9:9.3f} {traffic / 1e6:9.2f}"
        if not spent:
            return text
        limit = "matrix" if flops / matrix >= traffic / peaks.memory else "memory"
        return f"{text} {flops / spent / matrix:7.1%} {traffic / spent / peaks.memory:7.1%} {limit}"

    def total(name: str, some: list[OperatorCost]) -> str:
        sums = (sum(getattr(row, field) for row in some) for field in ("seconds", "flops", "bytes"))
        return line(name, f"{sum(row.calls for row in some):.0f}", *sums)

    shown, others = rows[:_MAX_ROWS], rows[_MAX_ROWS:]
    lines = [
        f"{'one step':36} {'calls':>7} {'ms':>9} {'time':>7} {'GFLOP':>9} {'MB':>9} {'matrix':>7} {'memory':>7} limit",
        *(total(row.name, [row]) for row in shown),
    ]
    if others:
        lines.append(total(f"{len(others)} other operators", others))
    gap = seconds - around - sum(row.seconds for row in rows)
    if around:
        lines.append(line("views, allocation, autograd", "", around))
    lines.append(line("host gap, in no operator", "", gap))
    calls, flops, traffic = (sum(getattr(row, field) for row in rows) for field in ("calls", "flops", "bytes"))
    lines.append(line("total", f"{calls:.0f}", seconds, flops, traffic))
    products = sum(row.seconds for row in rows if row.flops)
    name = str(dtype).removeprefix("torch.")
    lines.append(
        f"matrix products, convolutions and attention take {products / seconds:.1%} of the time; measured peaks: "
        f"{matrix / 1e9:.0f} GFLOP/s in {name}, {peaks.memory / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)
