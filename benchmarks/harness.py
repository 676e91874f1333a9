"""Measure an op against the alternatives of a user: check correctness, time in interleaved rounds, measure memory.

Each test is one comparison. A round runs every contender once, ours last: the two times of a ratio are then measured
close together, and the drift of a shared machine cancels. The report gives the median ratio and its quartiles.
pytest-benchmark times our own call on the host. On a GPU the host time is that of the launches alone: the wait for the
device is not part of it. The device time comes from the replay of a CUDA graph of the same calls, between two events.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from scripts.gpu_stages.device import timer

OURS = "ours"
# the peer that tables and plots compare ours with, the first that was measured: the same op in plain PyTorch, the
# released way to do a whole job, or ours in plain fp32
PEERS = ("eager", "baseline", "fp32")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# rounds of device times: each measures many calls already
DEVICE_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One contender at one shape: a line of the CSV.

    Attributes:
        room: the op or the whole job.
        shape, dtype: of the inputs.
        part: "forward" or "forward+backward"; for whole jobs "inference", "step" or "labels".
        contender: "ours", "eager", "compile", ...
        milliseconds: median time of the rounds; on a GPU, device time by graph replay, or between events where the
            call cannot be captured.
        ratio, low, high: median, first and third quartile of contender / ours in the same round; 1 for ours.
        peak_mb: peak memory beyond the inputs, in units of 1e6 bytes.
        host_ms: on a GPU, median time until the call returned; otherwise the same as `milliseconds`.
        gb_per_s, tflop_per_s: rates for the bytes and FLOPs that the op cannot avoid; 0 if none were given.
        rounds: number of rounds.
        spread_ms: slowest minus fastest round. This field and those below are set for whole jobs only.
        flops: counted, not estimated (prismer.costs.counting).
        ops: operators called; a fused operator counts once.
        matrix_share: fraction of the operators' own time spent in matrix products, convolutions and attention.
    """

    room: str
    shape: str
    dtype: str
    part: str
    contender: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    peak_mb: float
    host_ms: float
    gb_per_s: float
    tflop_per_s: float
    rounds: int
    spread_ms: float = 0.0
    flops: int = 0
    ops: int = 0
    matrix_share: float = 0.0


# all measurements of this session; conftest.py writes them out at the end
MEASUREMENTS: list[Measurement] = []


@dataclass(kw_only=True)
class Contender:
    """One way to compute the result: a function and its inputs.

    Attributes:
        run: takes `inputs` and returns a tensor or a tuple of tensors.
        inputs: passed unchanged; the backward part differentiates with respect to those that require a gradient.
    """

    run: Callable
    inputs: list = field(default_factory=list)

    def forward(self):
        """The outputs, computed without a graph."""
        with torch.no_grad():
            return self.run(*self.inputs)

    def forward_backward(self):
        """The gradients of the inputs that require one, after a forward pass."""
        outputs = self.run(*self.inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        leaves = [t for t in self.inputs if isinstance(t, Tensor) and t.requires_grad]
        # not `.sum().backward()`: its dy is one expanded number, which a layer inside a model never gets
        return torch.autograd.grad(first, leaves, self.upstream(first))

    def upstream(self, y: Tensor) -> Tensor:
        """A random gradient in the shape of the output, the same at every call."""
        if not hasattr(self, "_upstream"):
            generator = torch.Generator(device=y.device).manual_seed(1)
            dy = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32)
            self._upstream = (dy if y.dim() else torch.ones_like(dy)).to(y.dtype)
        return self._upstream

    def __getitem__(self, part: str) -> Callable:
        return {"forward": self.forward, "forward+backward": self.forward_backward}[part]


def synchronize() -> None:
    """Wait for the GPU; on a CPU there is nothing to wait for."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Callable) -> int:
    """Peak of the bytes that `call` allocates, its results included."""
    call()
    gc.collect()
    if DEVICE.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    return peak_and_times(call)[0]


def peak_and_times(call: Callable) -> tuple[int, dict[str, float]]:
    """`peak_bytes`, without its warm-up call on a CPU; and each operator's own seconds (on a GPU, device time)."""
    if DEVICE.type == "cuda":
        peak = peak_bytes(call)
        with torch.profiler.profile() as profiler:
            call()
            synchronize()
        return peak, {e.key: e.self_device_time_total / 1e6 for e in profiler.key_averages()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, {e.key: e.self_cpu_time_total / 1e6 for e in profiler.key_averages()}


def _tensors(value) -> list[Tensor]:
    return [t for t in (value if isinstance(value, (tuple, list)) else [value]) if t is not None]


def contenders_on(
    draws: list, functions: dict[str, Callable], frozen: tuple[int, ...] = ()
) -> Callable[[torch.dtype], dict[str, Contender]]:
    """Return a function dtype -> contenders by name; all of them share the same inputs.

    Args:
        draws: arguments in order. Floating-point tensors are cast to the dtype and require a gradient; everything else
            is passed unchanged.
        functions: by name of the contender.
        frozen: indices in `draws` of floating-point tensors that need no gradient.
    """

    def make(dtype: torch.dtype) -> dict[str, Contender]:
        inputs = []
        for i, draw in enumerate(draws):
            if isinstance(draw, Tensor):
                draw = draw.to(DEVICE, dtype if draw.is_floating_point() else None)
                draw = draw.detach().requires_grad_(draw.is_floating_point() and i not in frozen)
            inputs.append(draw)
        return {name: Contender(run=function, inputs=inputs) for name, function in functions.items()}

    return make


def refuse_if_worse(make: Callable[[torch.dtype], dict[str, Contender]], dtype: torch.dtype, part: str) -> None:
    """Fail the test if our error in `dtype` is more than twice eager's (three times for gradients).

    Errors are measured against eager in float64.

    Args:
        make: dtype -> contenders by name, with the same numbers for every dtype.
    """
    calls = make(dtype)
    ours, eager = (_tensors(calls[name][part]()) for name in (OURS, "eager"))
    exact = _tensors(make(torch.float64)["eager"][part]())
    assert len(ours) == len(eager) == len(exact), "contenders return different numbers of tensors"
    factor, rounding = (2 if part == "forward" else 3), torch.finfo(dtype).eps / 2
    for i, (a, b, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        errors = [(t.double() - truth).square().mean().sqrt().item() for t in (a, b)]
        allowed = factor * errors[1] + rounding * truth.square().mean().sqrt().item()
        if not errors[0] <= allowed:
            pytest.fail(f"tensor {i} of ours is off by {errors[0]:.3g}, allowed are {allowed:.3g}: not timed")


def time_on_host(benchmark, functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round until a call returns, by name. Ours runs last in a round, under pytest-benchmark.

    No time includes a wait for the GPU, which has finished before each call.
    """
    times: dict[str, list[float]] = {name: [] for name in functions if name != OURS}
    order = list(times)

    def run_others() -> None:
        order.append(order.pop(0))
        for name in order:
            function = functions[name]
            synchronize()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        synchronize()

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(functions[OURS], setup=run_others, rounds=rounds, iterations=1, warmup_rounds=1)
    finally:
        gc.enable()
        synchronize()
    # the warm-up round timed the others too: drop it
    found = {name: values[-rounds:] for name, values in times.items()}
    return found | {OURS: list(benchmark.stats.stats.data)}


def time_on_device(functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Device seconds of a call in each round, by name; ours runs last in a round."""
    timers = {name: timer(function, DEVICE.type)[0] for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = [name for name in functions if name != OURS]
    for _ in range(rounds):
        order.append(order.pop(0))
        for name in (*order, OURS):
            times[name].append(timers[name]())
    return times


def time_contenders(
    benchmark,
    calls: dict[str, Contender],
    *,
    room: str,
    shape: str,
    dtype: torch.dtype,
    part: str,
    bytes_moved: int = 0,
    flops: int = 0,
    seconds: float = 0.5,
) -> dict[str, Measurement]:
    """Time the contenders in turn and record a measurement of each.

    Args:
        benchmark: pytest-benchmark's fixture.
        calls: contenders by name, among them "ours" and "eager", which passed `refuse_if_worse`.
        bytes_moved, flops: what the op cannot avoid in this part.
        seconds: to spend on all contenders together.

    Returns:
        The measurements by name of the contender.
    """
    functions = {name: call[part] for name, call in calls.items()}
    peaks = {name: peak_bytes(function) for name, function in functions.items()}
    spent = 0.0
    for function in functions.values():
        start = time.perf_counter()
        function()
        synchronize()
        spent += time.perf_counter() - start
    # slow ops such as the loss take seconds a round: three rounds must do
    rounds = min(max(int(seconds / max(spent, 1e-6)), 3 if spent > 0.4 else 5), 100)
    host = time_on_host(benchmark, functions, rounds)
    device = host if DEVICE.type == "cpu" else time_on_device(functions, min(rounds, DEVICE_ROUNDS))
    rows = {}
    for name, values in device.items():
        ratios = [a / b for a, b in zip(values, device[OURS], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(values)
        rows[name] = Measurement(
            room=room,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            part=part,
            contender=name,
            milliseconds=1e3 * median,
            ratio=middle,
            low=low,
            high=high,
            peak_mb=peaks[name] / 1e6,
            host_ms=1e3 * statistics.median(host[name]),
            gb_per_s=bytes_moved / median / 1e9,
            tflop_per_s=flops / median / 1e12,
            rounds=rounds,
        )
    MEASUREMENTS.extend(rows.values())
    benchmark.group = f"{room} {shape} {rows[OURS].dtype} {part}"
    benchmark.extra_info.update(
        {f"{name} / ours": round(row.ratio, 3) for name, row in rows.items() if name != OURS},
        peak_mb={name: round(row.peak_mb, 2) for name, row in rows.items()},
    )
    return rows
