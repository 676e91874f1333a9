"""Measures a whole job: compares the results of its contenders, counts their FLOPs and times them in turn.

Each contender first runs once under the counter; if results differ, nothing is timed. It runs a second time for its
peak memory and the time of each operator. Then the contenders run in turn, round by round, ours last, for their time.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness import MEASUREMENTS, OURS, Measurement, peak_and_times, synchronize
from prismer.costs.counting import CostCounter

# products that the counter does not see by these names: convolutions dispatch to some of them, and our ops call the
# others directly when no dispatch mode is active
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "mm",
        "addmm",
        "addmm_",
        "bmm",
        "baddbmm",
        "baddbmm_",
        "_addmm_activation",
        "mkldnn_convolution",
        "_slow_conv2d_forward",
        "_slow_conv2d_backward",
        "cudnn_convolution",
    )
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job and the contenders that do it.

    Attributes:
        room, shape, part: as in `Measurement`; part is "inference", "step" (forward and backward) or "labels".
        dtype: of the weights of ours.
        calls: the contenders by name, "ours" among them.
        check: takes the outcomes by name of the contender and raises AssertionError if they differ.
        reset: called before each call that is timed or compared.
        outcome: maps the result of a call to what `check` compares; called before the next contender runs.
    """

    room: str
    shape: str
    part: str = "inference"
    dtype: torch.dtype = torch.float32
    calls: dict[str, Callable[[], object]]
    check: Callable[[dict[str, object]], None]
    reset: Callable[[], None] = lambda: None
    outcome: Callable[[object], object] = lambda result: result


def run_in_turn(ours: Callable, others: Callable, rounds: int) -> list[float]:
    """Seconds of `ours` in each round; `others` runs before it, untimed."""
    seconds = []
    for _ in range(rounds):
        others()
        start = time.perf_counter()
        ours()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(job: Job, rounds: int = 1, in_turn: Callable = run_in_turn) -> dict[str, Measurement]:
    """Compare, count and time the contenders of a job, and record a measurement of each in `harness.MEASUREMENTS`.

    Args:
        rounds: number of timed rounds.
        in_turn: `run_in_turn`, or the same with pytest-benchmark.

    Raises:
        AssertionError: if results differ.
    """
    outcomes, counters = {}, {}
    for name, call in job.calls.items():
        job.reset()
        with CostCounter() as counter:
            result = call()
        counters[name], outcomes[name] = counter, job.outcome(result)
        del result
    job.check(outcomes)
    outcomes.clear()

    peaks, shares = {}, {}
    job.reset()
    if job.part == "step":
        # allocate the gradients first: the peak of a step then counts neither parameters nor gradients
        job.calls[OURS]()
    for name, call in job.calls.items():
        peaks[name], times = peak_and_times(call)
        matrix = {operator for operator, _, flops, _ in counters[name].rows() if flops}
        shares[name] = _share(times, matrix)

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            job.calls[name]()
            synchronize()

        return run

    seconds = {name: [] for name in job.calls if name != OURS}
    order = list(seconds)

    def others() -> None:
        order.append(order.pop(0))
        for name in order:
            job.reset()
            seconds[name] += run_in_turn(timed(name), lambda: None, 1)
        job.reset()

    seconds[OURS] = in_turn(timed(OURS), others, rounds)
    job.reset()
    rows = {
        name: _row(job, name, values, seconds[OURS], peaks[name], counters[name], shares[name])
        for name, values in seconds.items()
    }
    MEASUREMENTS.extend(rows.values())
    return rows


def _row(
    job: Job, name: str, values: list[float], ours: list[float], peak: int, counter: CostCounter, share: float
) -> Measurement:
    ratios = [a / b for a, b in zip(values, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(values)
    return Measurement(
        room=job.room,
        shape=job.shape,
        dtype=str(job.dtype).removeprefix("torch."),
        part=job.part,
        contender=name,
        milliseconds=1e3 * median,
        ratio=middle,
        low=low,
        high=high,
        peak_mb=peak / 1e6,
        host_ms=1e3 * median,
        gb_per_s=0.0,
        tflop_per_s=counter.flops / median / 1e12,
        rounds=len(values),
        spread_ms=1e3 * (max(values) - min(values)),
        flops=counter.flops,
        ops=counter.calls,
        matrix_share=share,
    )


def _share(times: dict[str, float], matrix: set[str]) -> float:
    """Fraction of the operators' own time spent in products; `matrix` are those that the counter gave FLOPs."""
    return sum(t for name, t in times.items() if name in matrix | _PRODUCTS) / max(sum(times.values()), 1e-9)
