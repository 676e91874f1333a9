"""Proves that an epoch visits every sample once, and that processes read few shards at a time, each its own.

python -m pytest tests/data/test_order.py
"""

import tracemalloc
from collections.abc import Iterable
from unittest.mock import MagicMock

import numpy as np
import pytest

from prismer.dataloading.feed.order import BlockOrder, EpochOrder, InOrder, RandomOrder, choose_order
from prismer.dataloading.store.shards import ShardDataset
from scripts.shuffle_quality import correlate, count_misses, effective_size

RANDOM = [7, 21, 30, 16, 33, 6, 9, 13, 20, 11]
BLOCKS = [1085, 3008, 1928, 2149, 1863, 2399, 3075, 1563, 1349, 195, 2789, 100, 214, 1278, 747, 2998]
STARTS = [0, 10, 20, 30, 37]
EVEN = list(range(0, 3201, 50))
# ten million samples in ten thousand shards
LARGE = list(range(0, 10_000_001, 1_000))


def indices(order: EpochOrder) -> list[int]:
    return [order[position].index for position in range(len(order))]


def shards_of(starts: list[int], samples: list[int]) -> list[int]:
    return (np.searchsorted(starts, samples, side="right") - 1).tolist()


def positions_of(rank: int, world: int, global_batch: int, micro_batches: int, steps: int) -> list[range]:
    """The batches of a rank, as the loader asks for them."""
    size = global_batch // world // micro_batches
    begins = ((step * world + rank) * size for step in range(steps * micro_batches))
    return [range(begin, begin + size) for begin in begins]


def test_the_orders_of_earlier_runs_stay_as_they_were():
    """A run that resumes with a new version of the library must go on in its old order."""
    assert indices(RandomOrder(STARTS, 7).epoch(3))[:10] == RANDOM
    assert indices(BlockOrder(EVEN, 7, global_batch=16).epoch(3))[:16] == BLOCKS


def test_draws_are_keyed_by_the_epoch_in_training_and_by_nothing_in_evaluation():
    for order in (RandomOrder(STARTS, 7), BlockOrder(STARTS, 7, global_batch=4)):
        assert {order.epoch(epoch)[0].visit for epoch in (3, 5)} == {3, 5}
    assert [InOrder(STARTS).epoch(epoch)[9] for epoch in (3, 5)] == [(9, 0), (9, 0)]


@pytest.mark.parametrize("kind", [RandomOrder, BlockOrder])
def test_seeds_and_epochs_differ(kind):
    extra = dict(global_batch=16) if kind is BlockOrder else {}
    orders = [indices(kind(EVEN, seed, **extra).epoch(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    for other in orders[1:3]:
        assert np.mean(np.array(orders[0]) == other) < 0.05


def draw_block_order(rng: np.random.Generator) -> tuple[list[int], BlockOrder]:
    starts = [0, *np.cumsum(rng.integers(0, 30, rng.integers(1, 60))).tolist()]
    starts[-1] += 1
    sizes = dict(global_batch=rng.integers(1, 40), shards=rng.integers(1, 30), lanes=rng.integers(1, 10))
    return starts, BlockOrder(starts, 5, **{name: int(size) for name, size in sizes.items()})


@pytest.mark.parametrize("seed", range(60))
def test_a_block_order_visits_every_sample_once(seed):
    starts, order = draw_block_order(np.random.default_rng(seed))
    assert sorted(indices(order.epoch(seed))) == list(range(starts[-1])) == list(range(len(order)))


@pytest.mark.parametrize("seed", range(20))
def test_a_lane_goes_from_window_to_window(seed):
    """A lane fills its own places of each global batch; it reads the shards of one window to their end."""
    starts, order = draw_block_order(np.random.default_rng(seed))
    seen = indices(order.epoch(0))
    steps, share = len(order) // order.global_batch, order.global_batch // order.lanes
    assert order.global_batch % order.lanes == 0
    for lane in range(order.lanes):
        begins = (step * order.global_batch + lane * share for step in range(steps))
        shards = shards_of(starts, [seen[begin + i] for begin in begins for i in range(share)])
        first, last = {}, {}
        for time, shard in enumerate(shards):
            first.setdefault(shard, time)
            last[shard] = time
        at_a_time = [sum(first[s] <= time <= last[s] for s in first) for time in range(len(shards))]
        # one shard may lie across the bounds of two windows
        assert max(at_a_time, default=0) <= order.window + 2


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_read_their_own_shards(world, micro_batches):
    starts = list(range(0, 20_001, 50))
    order = BlockOrder(starts, 3, global_batch=64)
    assert order.lanes == 16 and order.window == 4
    seen = indices(order.epoch(1))
    read = [
        {
            shard
            for positions in positions_of(rank, world, 64, micro_batches, len(order) // 64)
            for shard in shards_of(starts, seen[positions.start : positions.stop])
        }
        for rank in range(world)
    ]
    shared = sum(map(len, read)) - len(set().union(*read))
    # only a shard that lies across the bound of two lanes has two readers
    assert shared < order.lanes
    assert len(set().union(*read)) >= 399


def test_samples_are_shuffled_within_a_window():
    order = BlockOrder(EVEN, 0, global_batch=1, shards=8).epoch(0)
    first = [index % 50 for index in indices(order)[:400]]
    steps = np.diff(first)
    assert 0.4 < np.mean(steps > 0) < 0.6 and abs(np.mean(steps == 1)) < 0.08


@pytest.mark.parametrize(
    "global_batch, shards, lanes, window",
    [
        (16, 64, 16, 4),
        (48, 64, 16, 4),
        (20, 64, 10, 6),
        (17, 64, 1, 64),
        (8, 64, 8, 8),
        (16, 20, 4, 16),
        (1, 99, 1, 64),
    ],
)
def test_the_lanes_divide_the_global_batch_and_the_shards_that_are_read(global_batch, shards, lanes, window):
    order = BlockOrder(list(range(0, 10 * shards + 1, 10)), 0, global_batch=global_batch)
    assert (order.lanes, order.window) == (lanes, window)


def test_an_epoch_of_ten_million_samples_is_computed_window_by_window():
    order = BlockOrder(LARGE, 0, global_batch=512)
    tracemalloc.start()
    epoch = order.epoch(0)
    for position in range(0, len(order), 10_001):
        epoch[position]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a permutation of the samples takes 80 MB
    assert peak < 4e6


@pytest.mark.parametrize("seed", range(20))
def test_the_shards_of_a_batch_are_named_once_each(seed):
    starts, order = draw_block_order(np.random.default_rng(seed))
    epoch = order.epoch(0)
    for positions in positions_of(0, 1, order.global_batch, 1, len(order) // order.global_batch):
        named = epoch.shards_ahead(positions, 1_000)
        assert set(shards_of(starts, [epoch[position].index for position in positions])) <= set(named)
        assert len(set(named)) == len(named) and epoch.shards_ahead(positions, 3) == named[:3]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_are_named_in_the_order_in_which_they_are_needed(world):
    """Those that are read now come first; those of the next window are named before its first sample is read."""
    epoch = BlockOrder(EVEN, 0, global_batch=16, shards=16, lanes=4).epoch(0)
    named: list[int] = []
    for positions in positions_of(0, world, 16, 1, len(epoch) // 16):
        read = set(shards_of(EVEN, [epoch[position].index for position in positions]))
        assert not named or read <= set(named)
        named = epoch.shards_ahead(positions, 1_000)
        # a lane or a window may begin within a shard, and a window may end within a batch
        lanes = 4 // world
        assert read <= set(named[: lanes * 5 + 5]) and len(named) <= lanes * 10 + 5


def test_the_end_of_a_lane_names_no_shard_of_the_next_lane():
    order = BlockOrder(EVEN, 0, global_batch=4, shards=8, lanes=4)
    epoch = order.epoch(0)
    last = range(len(order) - 4, len(order) - 3)
    lane = {shard for step in range(0, len(order), 4) for shard in shards_of(EVEN, [epoch[step].index])}
    assert set(epoch.shards_ahead(last, 100)) <= lane


def test_the_other_orders_name_the_shards_of_the_next_positions():
    order = RandomOrder(EVEN, 0).epoch(0)
    following = list(dict.fromkeys(shards_of(EVEN, indices(order)[4:])))
    assert order.shards_ahead(range(4, 8), 100) == following and len(following) == 64
    assert order.shards_ahead(range(4, 8), 6) == following[:6]
    order = InOrder(list(range(0, 101, 10))).epoch(0)
    assert order.shards_ahead(range(15, 17), 10) == [1, 2, 3, 4]
    assert order.shards_ahead(range(15, 17), 2) == [1, 2]
    assert order.shards_ahead(range(95, 97), 10) == [9]


def make_dataset(starts: list[int], remote: bool = False, tables: Iterable[str] = ()) -> MagicMock:
    dataset = MagicMock(ShardDataset, starts=starts, is_remote=remote, classes={table: ["cube"] for table in tables})
    dataset.__len__.return_value = starts[-1]
    return dataset


@pytest.mark.parametrize(
    "kind, count, remote, tables, expected",
    [
        ("auto", 2_000_000, False, ["seg"], RandomOrder),
        ("auto", 2_001_000, False, ["seg"], BlockOrder),
        ("auto", 2_001_000, False, ["seg", "class"], RandomOrder),
        ("auto", 37_000, True, ["class"], BlockOrder),
        ("random", 2_001_000, True, [], RandomOrder),
        ("blocks", 37_000, False, ["class"], BlockOrder),
    ],
)
def test_large_and_remote_datasets_are_read_in_blocks(kind, count, remote, tables, expected):
    dataset = make_dataset(list(range(0, count + 1, 1_000)), remote, tables)
    order = choose_order(dataset, seed=3, kind=kind, global_batch=32)
    assert type(order) is expected and order.seed == 3 and len(order) == count
    if expected is BlockOrder:
        assert order.global_batch == 32


def test_an_unknown_order_is_named():
    dataset = make_dataset(STARTS)
    with pytest.raises(ValueError, match="order is 'shuffled'; choose from auto, random, blocks"):
        choose_order(dataset, seed=0, kind="shuffled", global_batch=8)
    with pytest.raises(ValueError, match="global_batch is 0; it must be at least 1"):
        choose_order(dataset, seed=0, kind="blocks", global_batch=0)


def test_the_measures_of_a_shuffle():
    rng = np.random.default_rng(0)
    assert abs(correlate(rng.integers(0, 1000, (400, 512)))) < 1e-4
    # each of 256 independent samples twice: a sample has one partner among 511
    correlation = correlate(rng.integers(0, 1000, (400, 256)).repeat(2, 1))
    assert correlation == pytest.approx(1 / 511, rel=0.05)
    assert effective_size(512, 1 / 511) == pytest.approx(256)
    assert correlate(np.zeros((1, 512), int)) == pytest.approx(1) and effective_size(512, 1) == 1
    assert count_misses([1, 2, 1, 3, 1, 2, 2], 2) == 4
