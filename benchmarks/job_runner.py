"""Measures a whole job: contenders compared with each other, counted, and timed in turn; a `Row` of each.

Each contender runs once under the counter, and where results differ nothing is timed; then once for its memory and for
the time of each operator; then in turn with the others, round by round, ours last, for its seconds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import OURS, ROWS, Row, peak_and_times, synchronize
from prismer.costs.counting import CostCounter

# what a convolution hands over to, and what ours uses in place of a registered op where nothing watches
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
    """Several ways to do one thing.

    Attributes:
        room, shape, part: as in `Row`; part is "inference", "step" (forward and backward) or "labels".
        calls: by contender, "ours" among them.
        check: takes what they returned, by contender, and raises AssertionError where results differ.
        reset: called before a call that is timed or compared.
        outcome: what is compared of what a call returned; taken before the next call.
    """

    room: str
    shape: str
    part: str = "inference"
    calls: dict[str, Callable[[], object]]
    check: Callable[[dict[str, object]], None]
    reset: Callable[[], None] = lambda: None
    outcome: Callable[[object], object] = lambda result: result


def run_in_turn(ours: Callable, others: Callable, rounds: int) -> list[float]:
    """Seconds of `ours` in each round, `others` run before it."""
    seconds = []
    for _ in range(rounds):
        others()
        start = time.perf_counter()
        ours()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(job: Job, rounds: int = 1, in_turn: Callable = run_in_turn) -> dict[str, Row]:
    """Compare, count and time the contenders of a job, and record a row of each in `harness.ROWS`.

    Args:
        rounds: of timing, contenders in turn.
        in_turn: `run_in_turn`, or the same by pytest-benchmark.

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
        # gradients are there before a step is looked at: its peak is above parameters and gradients
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
    ROWS.extend(rows.values())
    return rows


def _row(
    job: Job, name: str, values: list[float], ours: list[float], peak: int, counter: CostCounter, share: float
) -> Row:
    ratios = [a / b for a, b in zip(values, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(values)
    return Row(
        room=job.room,
        shape=job.shape,
        dtype="float32",
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
    """Of the operators' own time, that of those which multiply: `matrix` was seen to, under the counter."""
    return sum(t for name, t in times.items() if name in matrix | _PRODUCTS) / max(sum(times.values()), 1e-9)
