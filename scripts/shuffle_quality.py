"""Measure how well the orders of training shuffle, and what they read: a table, and docs/shuffle.png.

    python scripts/shuffle_quality.py

All numbers are counts over a synthetic dataset of 10,000 shards with 1,000 samples each, whose 1,000 classes lie one
behind another: the worst case for an order that reads a few shards at a time. The script takes a minute.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prismer.dataloading.feed.order import BlockOrder, EpochOrder, Order, RandomOrder

PLOT = Path(__file__).resolve().parent.parent / "docs" / "shuffle.png"
SHARDS, PER_SHARD, CLASSES = 10_000, 1_000, 1_000
GLOBAL_BATCH, STEPS = 512, 2_000
SHARDS_AT_A_TIME = (16, 64, 256, 1_024)
# shards that a dataset keeps open, and shards in a small and in a large cache of a machine
OPEN = 64
CACHES = (128, 1_024)
MACHINES = 16


@dataclass
class Quality:
    """What an order does to a dataset.

    Attributes:
        distances: between the indices of two samples that follow each other in the order.
        same_shard: share of these pairs that come from one shard.
        classes: distinct classes in a global batch, on average.
        correlation: of the classes of two samples of a global batch.
        effective_batch: size of a batch of independent samples whose class frequencies vary as much.
        opened: files that one process opens for 1,000 samples.
        fetched: shards that one machine fetches for 1,000 samples, with each of `CACHES`.
        fetched_by_all: the sum over `MACHINES` machines with small caches, for 1,000 samples of all.
    """

    distances: np.ndarray
    same_shard: float
    classes: float
    correlation: float
    effective_batch: float
    opened: float
    fetched: list[float]
    fetched_by_all: float


def count_misses(accesses: Iterable[int], size: int) -> int:
    """The accesses that a cache of `size` entries, which drops the least recently used one, does not hold."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for key in accesses:
        if key in cache:
            cache.move_to_end(key)
            continue
        misses += 1
        cache[key] = None
        if len(cache) > size:
            cache.popitem(last=False)
    return misses


def correlate(labels: np.ndarray) -> float:
    """The correlation of the classes of two samples of a batch; all classes are equally frequent.

    It is (p - p0) / (1 - p0), where p is the probability that two samples of a batch have the same class, and p0 this
    probability for independent samples.

    Args:
        labels: (batches, size) classes 0 .. CLASSES - 1.
    """
    batches, size = labels.shape
    counts = np.zeros((batches, CLASSES))
    np.add.at(counts, (np.arange(batches)[:, None], labels), 1)
    same = ((counts**2).sum(1) - size).mean() / (size * (size - 1))
    return float((same - 1 / CLASSES) / (1 - 1 / CLASSES))


def effective_size(size: int, correlation: float) -> float:
    """The independent samples whose class frequencies vary from batch to batch as those of a correlated batch."""
    return size / (1 + (size - 1) * correlation)


def measure(epoch: EpochOrder, global_batch: int, steps: int, shards: int) -> Quality:
    """Measure the first steps of an epoch over a dataset of `shards` equal shards in the order of their classes."""
    indices = np.array([epoch[position].index for position in range(steps * global_batch)])
    shard = indices * shards // len(epoch)
    labels = (indices * CLASSES // len(epoch)).reshape(steps, global_batch)
    # each machine takes its part of every global batch
    parts = shard.reshape(steps, MACHINES, -1).transpose(1, 0, 2).reshape(MACHINES, -1)
    correlation = correlate(labels)
    per_thousand = 1000 / len(indices)
    return Quality(
        distances=np.abs(np.diff(indices)),
        same_shard=float((np.diff(shard) == 0).mean()),
        classes=float(np.mean([len(np.unique(row)) for row in labels])),
        correlation=correlation,
        effective_batch=effective_size(global_batch, correlation),
        opened=count_misses(shard.tolist(), OPEN) * per_thousand,
        fetched=[count_misses(shard.tolist(), size) * per_thousand for size in CACHES],
        fetched_by_all=sum(count_misses(part.tolist(), CACHES[0]) for part in parts) * per_thousand,
    )


def draw_plot(results: dict[str, Quality]) -> None:
    """Draw the distributions of distances, and the effective batch beside the fetched shards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, quality in results.items():
        values = np.sort(quality.distances)[:: len(quality.distances) // 2000]
        left.plot(values, np.linspace(0, 1, len(values)), label=name)
    left.set(
        xscale="log",
        xlabel="distance in the dataset, samples",
        ylabel="share of the pairs",
        title="two samples that follow each other",
    )
    left.legend(fontsize=8)
    at_a_time = [*SHARDS_AT_A_TIME, SHARDS]
    batches = [quality.effective_batch for quality in [*list(results.values())[1:], results["random"]]]
    right.plot(at_a_time, batches, "o-")
    right.annotate("random", (at_a_time[-1], batches[-1]), (-12, -16), textcoords="offset points", fontsize=8)
    right.set(
        xscale="log",
        ylim=(0, None),
        xlabel="shards at a time",
        ylabel=f"effective size of a global batch of {GLOBAL_BATCH}",
        title="shards in the order of their classes",
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=80)


def main() -> None:
    starts = list(range(0, SHARDS * PER_SHARD + 1, PER_SHARD))
    orders: dict[str, Order] = {"random": RandomOrder(starts, 0)}
    for count in SHARDS_AT_A_TIME:
        orders[f"{count:,} shards at a time"] = BlockOrder(starts, 0, global_batch=GLOBAL_BATCH, shards=count)
    results = {name: measure(order.epoch(0), GLOBAL_BATCH, STEPS, SHARDS) for name, order in orders.items()}
    columns = [
        "order",
        "neighbours from one shard",
        "median distance",
        "classes in a batch",
        "correlation",
        "effective batch",
        "files opened",
        *(f"shards fetched, cache of {size:,}" for size in CACHES),
        f"by {MACHINES} machines",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, quality in results.items():
        print(
            f"| {name} | {quality.same_shard:.1%} | {int(np.median(quality.distances)):,} | {quality.classes:.0f} "
            f"| {quality.correlation:.4f} | {quality.effective_batch:.0f} | {quality.opened:.1f} "
            f"| {' | '.join(f'{count:.1f}' for count in quality.fetched)} | {quality.fetched_by_all:.1f} |"
        )
    draw_plot(results)


if __name__ == "__main__":
    main()
