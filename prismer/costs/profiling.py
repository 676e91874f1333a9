"""Where the time of a step goes: a trace for chrome://tracing or ui.perfetto.dev, and one screen of figures.

Steps are timed by torch.profiler; the one after them is not timed, but counted (counting.py), which would disturb the
clock. Each operator then has time, FLOPs and bytes, and is compared with what this machine was measured to do: the
roofline (Williams et al., 2009) says whether its FLOPs or its bytes would take longer, hence which peak limits it.
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

from prismer.costs.counting import Counter
from prismer.kernels import matmul
from prismer.kernels.dispatch import as_if_watched

_STEP = "prismer: step"
_SHOWN = 18
# operators; with the sums around them one screen
_SIDE = 2048
_COPIED = 2**28
# bytes, more than caches hold
_PATIENCE = 0.3
# seconds for each peak
_Out = TypeVar("_Out")


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What the machine was measured to do.

    Attributes:
        matrix: dtype -> FLOP/s of a product of matrices, fp32 and bf16, on the library that the model takes.
        memory: bytes/s read and written by a copy.
    """

    matrix: dict[torch.dtype, float]
    memory: float


@functools.cache
def measure_peaks(device: torch.device) -> Peaks:
    """The best of a few products of 2048-cubed matrices and of copies of 256 MB: about a second, once per process."""
    matrix = {dtype: _matrix_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Peaks(matrix=matrix, memory=2 * _COPIED / _best_seconds(lambda: target.copy_(source), device))


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    rate = 0.0
    # without bf16 instructions the large product may take half a minute: then the small one must do
    for side in (_SIDE // 8, _SIDE):
        if side == _SIDE and 2 * side**3 / rate > 4 * _PATIENCE:
            return rate
        a, b = torch.ones(side, side, device=device, dtype=dtype), torch.ones(side, side, device=device, dtype=dtype)
        rate = 2 * side**3 / _best_seconds(lambda a=a, b=b: matmul.mm(a, b), device)
    return rate


def _best_seconds(run: Callable, device: torch.device) -> float:
    best, end = float("inf"), time.perf_counter() + _PATIENCE
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
    """Find out now, and not after the work, whether a trace can be written.

    Raises:
        ValueError: if the name does not end in .json or .json.gz, or its folder does not take files.
    """
    if not path.name.endswith((".json", ".json.gz")):
        raise ValueError(f"a trace is JSON, and {path} does not say so; end its name in .json.gz")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        _aside(path).touch()
        _aside(path).unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"the trace {path} cannot be written ({reason}); name a file in a folder that exists"
        ) from None


def _aside(path: Path) -> Path:
    # the profiler compresses by the end of the name
    return path.with_name(f".partial-{path.name}")


@dataclass(kw_only=True)
class Row:
    """One operator in one step; `seconds` includes what it calls. An operator without a count has FLOPs and bytes 0."""

    name: str
    calls: float = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0


class StepProfile:
    """Profiles steps of whoever runs them: `with profile.step(): ...`, until `finished`, then `report()`.

    Two steps warm up, `steps` are timed, one is counted; later ones are left alone.

    Args:
        trace: the file to write, .json.gz or .json.
        device: where the steps compute; a GPU's time is that of its kernels.
        dtype: what they multiply in, to be compared with that peak: fp32 or bf16.
        steps: how many to time.
        warmup: steps before those.
    """

    def __init__(self, trace: Path, *, device: torch.device, dtype: torch.dtype, steps: int, warmup: int = 2):
        check_trace(trace)
        self.trace, self.device, self.dtype, self.steps, self.warmup = trace, device, dtype, steps, warmup
        self.counter, self._done = Counter(), 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    @property
    def needed(self) -> int:
        """Steps until `finished`."""
        return self.warmup + self.steps + 1

    @property
    def finished(self) -> bool:
        """Whether `report` has something to report."""
        return self._done >= self.needed

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        timed = self._done - self.warmup
        if 0 <= timed < self.steps:
            if timed == 0:
                self._profile.start()
            # a GPU's ops of Triton are seen by the names they are counted under only through torch's dispatcher
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

    def rows(self) -> tuple[list[Row], float, float]:
        """(operators, seconds in what only surrounds them, seconds of a step), the longest first; of one mean step."""
        rows = {name: Row(name=name, flops=flops, bytes=traffic) for name, _, flops, traffic in self.counter.rows()}
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
        """Write the trace at once under its name, measure the machine, and return the table.

        Raises:
            OSError: with the name of the trace, if it cannot be written; nothing is left of it.
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
    """Run `run` three times, to warm up, to time and to count it; returns what it returned, and the table."""
    steps = StepProfile(trace, device=device, dtype=dtype, steps=1, warmup=1)
    while not steps.finished:
        with steps.step():
            out = run()
    return out, steps.report()


def format_table(rows: list[Row], around: float, seconds: float, peaks: Peaks, dtype: torch.dtype) -> str:
    """One screen of at most 100 columns.

    Args:
        rows, around, seconds: of `StepProfile.rows`.
        peaks: what the fractions are of.
        dtype: what the step multiplied in, for the matrix peak.
    """
    # processors multiply both kinds of 16 bits alike
    dtype = torch.bfloat16 if dtype.itemsize == 2 else torch.float32
    matrix = peaks.matrix[dtype]

    def line(name, calls, spent, flops=0, traffic=0) -> str:
        if len(name) > 36:
            # backward passes differ from the others by their end
            name = f"{name[:22]}..{name[-12:]}"
        text = f"{name:36} {calls:>7} {spent * 1e3:9.2f} {spent / seconds:7.1%}"
        if not traffic:
            return text
        text += f" {flops / 1e9:9.3f} {traffic / 1e6:9.2f}"
        if not spent:
            return text
        limit = "matrix" if flops / matrix >= traffic / peaks.memory else "memory"
        return f"{text} {flops / spent / matrix:7.1%} {traffic / spent / peaks.memory:7.1%} {limit}"

    def together(name: str, some: list[Row]) -> str:
        sums = (sum(getattr(row, field) for row in some) for field in ("seconds", "flops", "bytes"))
        return line(name, f"{sum(row.calls for row in some):.0f}", *sums)

    shown, others = rows[:_SHOWN], rows[_SHOWN:]
    lines = [
        f"{'one step':36} {'calls':>7} {'ms':>9} {'time':>7} {'GFLOP':>9} {'MB':>9} {'matrix':>7} {'memory':>7} limit",
        *(together(row.name, [row]) for row in shown),
    ]
    if others:
        lines.append(together(f"{len(others)} other operators", others))
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
