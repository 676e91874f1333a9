"""The order in which an epoch visits the samples of a dataset.

An order is a function of (seed, epoch, position). It keeps no state, so that a run resumes at any position, and it does
not know the number of processes, so that a run may resume with another number.

A random order reads from every shard all the time, which a bucket cannot serve and a disk serves slowly. A block order
puts the shards in random order and shuffles the samples within each window of a few shards. It follows several lanes
through these windows: equal stretches, each of which fills its own places in every global batch. Processes fill
different places, so that they read different shards.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from prismer.dataloading.feed.augment import Draw, keyed_rng
from prismer.dataloading.feed.samples import Samples
from prismer.errors import InputError, check_count, shown

ORDERS = ("auto", "random", "blocks")

# how far ahead the orders without windows look
_SHARDS_IN_ORDER = 4
_POSITIONS_AHEAD = 1024
# a permutation of two million samples takes 16 MB
_MAX_RANDOM = 2_000_000
# as many shards as a dataset keeps open; 16 lanes keep the processes of up to 16 machines apart
SHARDS = 64
_LANES = 16


class Visit(NamedTuple):
    """What an epoch reads at one position.

    Attributes:
        index: of the sample in the dataset.
        visit: key of the random draws for this reading of the sample, in the place of the epoch.
    """

    index: int
    visit: int


class EpochOrder(Protocol):
    """The order of one epoch. Several threads may ask it at the same time."""

    def __len__(self) -> int:
        """The number of positions in the epoch."""

    def __getitem__(self, position: int) -> Visit:
        """The visit at a position, 0 .. len - 1."""

    def shards_ahead(self, positions: range, count: int) -> list[int]:
        """The shards that a process reads at `positions` and soon after them, those that it needs first in front.

        Args:
            positions: of the next batch of the process.
            count: largest number of shards to name.
        """


class Order(Protocol):
    """The orders of all epochs."""

    def __len__(self) -> int:
        """The number of positions in an epoch."""

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch."""


class InOrder:
    """Every epoch is the dataset from its first sample to its last, with equal draws: the order of evaluation.

    Args:
        starts: `ShardDataset.starts`.
    """

    def __init__(self, starts: list[int]) -> None:
        self.starts = starts

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, position: int) -> Visit:
        return Visit(range(len(self))[position], 0)

    def epoch(self, epoch: int) -> EpochOrder:
        """The same order for every epoch."""
        return self

    def shards_ahead(self, positions: range, count: int) -> list[int]:
        """The shard of the first position and those that follow it."""
        first = bisect_right(self.starts, positions.start) - 1
        return list(range(first, len(self.starts) - 1))[: min(count, _SHARDS_IN_ORDER)]


class RandomOrder:
    """Every epoch is another permutation of the whole dataset.

    An epoch takes 8 bytes of memory for each sample, and soon reads from every shard.

    Args:
        starts: `ShardDataset.starts`.
        seed: of the permutations.
    """

    def __init__(self, starts: list[int], seed: int) -> None:
        self.starts, self.seed = starts, seed

    def __len__(self) -> int:
        return self.starts[-1]

    def epoch(self, epoch: int) -> EpochOrder:
        """A permutation that depends on (seed, epoch); draws are keyed by the epoch."""
        return _Permutation(self.starts, _permutation(len(self), self.seed, epoch), epoch)


class _Permutation:
    """The epoch of a `RandomOrder`."""

    def __init__(self, starts: list[int], indices: np.ndarray, epoch: int) -> None:
        self.starts, self.indices, self.epoch = starts, indices, epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Visit:
        return Visit(int(self.indices[position]), self.epoch)

    def shards_ahead(self, positions: range, count: int) -> list[int]:
        indices = self.indices[positions.start : positions.stop + _POSITIONS_AHEAD]
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        return list(dict.fromkeys(shards.tolist()))[:count]


class BlockOrder:
    """Every epoch is another order of the shards, shuffled within windows of a few shards.

    An epoch reads from a fixed number of shards at a time, and its memory does not grow with the dataset.

    Args:
        starts: `ShardDataset.starts`.
        seed: of the order.
        global_batch: samples of an optimizer step, over all processes and micro-batches.
        shards: that the order reads from at a time; each lane has its part of them as its window.
        lanes: largest number of lanes. There are fewer if `global_batch` is not a multiple of this number, or if the
            dataset has fewer shards than `shards`.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(
        self, starts: list[int], seed: int, *, global_batch: int, shards: int = SHARDS, lanes: int = _LANES
    ) -> None:
        for name, value in dict(global_batch=global_batch, shards=shards, lanes=lanes).items():
            check_count(name, value)
        self.starts, self.seed, self.global_batch = np.array(starts), seed, global_batch
        most = min(lanes, shards, global_batch, (len(starts) - 1) * lanes // shards, len(self))
        self.lanes = next((count for count in range(most, 1, -1) if global_batch % count == 0), 1)
        self.window = shards // self.lanes

    def __len__(self) -> int:
        return int(self.starts[-1])

    def epoch(self, epoch: int) -> EpochOrder:
        """An order that depends on (seed, epoch) and the global batch; draws are keyed by the epoch."""
        return _Blocks(self, epoch)


class _Blocks:
    """The epoch of a `BlockOrder`.

    The shards in their order, one behind another, are a sequence of places. Lane k is the places k x size ..
    (k + 1) x size - 1, and fills the places k x share .. (k + 1) x share - 1 of every global batch.

    Attributes:
        shards: all shards in their order.
        begins: shards[i] holds the places begins[i] .. begins[i + 1] - 1.
        bounds: window w holds the places bounds[w] .. bounds[w + 1] - 1, in a random order; no window crosses the end
            of a lane.
        size: places of a lane.
        share: places of a lane in a global batch.
    """

    def __init__(self, order: BlockOrder, epoch: int) -> None:
        self.order, self.epoch = order, epoch
        self.size, self.share = len(order) // order.lanes, order.global_batch // order.lanes
        # part 0 of the draws; part w + 1 shuffles window w
        self.shards = _permutation(len(order.starts) - 1, order.seed, epoch)
        self.begins = np.concatenate([[0], np.cumsum(np.diff(order.starts)[self.shards])])
        self.bounds: list[int] = []
        for lane in range(order.lanes):
            begin = lane * self.size
            # a part of the first shard may lie in the lane before
            second, end = np.searchsorted(self.begins, [begin + 1, begin + self.size])
            # the first windows of the lanes differ in length, so that the lanes do not all go on to new shards at once
            whole = order.window - 1 - lane * order.window // order.lanes
            self.bounds += [begin, *self.begins[second + whole : end : order.window].tolist()]
        self.bounds.append(len(order))
        # between two windows a lane needs both: threads work ahead
        self._shuffled = lru_cache(2 * order.lanes)(self._shuffle)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Visit:
        place = self._place(position)
        window = self._window(place)
        return Visit(int(self._shuffled(window)[place - self.bounds[window]]), self.epoch)

    def shards_ahead(self, positions: range, count: int) -> list[int]:
        """Of each lane in the batch, the shards of the window that it reads, then those of the next window."""
        first: dict[int, int] = {}
        for place in map(self._place, positions):
            first.setdefault(self._window(place), place)
        following = [
            (self.bounds[window + 1] - place, window + 1)
            for window, place in first.items()
            # the last window of a lane has no next one
            if self.bounds[window + 1] % self.size and self.bounds[window + 1] < len(self)
        ]
        windows = [*first, *(window for _, window in sorted(following))]
        return list(dict.fromkeys(chain.from_iterable(map(self._shards_of, windows))))[:count]

    def _place(self, position: int) -> int:
        """The place of a position."""
        order = self.order
        step, i = divmod(position, order.global_batch)
        steps, rest = divmod(len(order), order.global_batch)
        if step < steps:
            lane, offset = divmod(i, self.share)
            return lane * self.size + step * self.share + offset
        # the incomplete last global batch takes what the lanes have left, then the places after the last lane
        left = self.size - steps * self.share
        if i < order.lanes * left:
            lane, offset = divmod(i, left)
            return lane * self.size + steps * self.share + offset
        return len(order) - rest + i

    def _window(self, place: int) -> int:
        return bisect_right(self.bounds, place) - 1

    def _shards_of(self, window: int) -> list[int]:
        begin, end = self.bounds[window : window + 2]
        first, last = np.searchsorted(self.begins, [begin + 1, end])
        return self.shards[first - 1 : last].tolist()

    def _shuffle(self, window: int) -> np.ndarray:
        """The samples of a window, in their order."""
        places = np.arange(*self.bounds[window : window + 2])
        places = places[_permutation(len(places), self.order.seed, self.epoch, window + 1)]
        shards = np.searchsorted(self.begins, places, side="right") - 1
        return self.order.starts[self.shards[shards]] + places - self.begins[shards]


def choose_order(dataset: Samples, *, seed: int, kind: str = "auto", global_batch: int, shards: int = SHARDS) -> Order:
    """The order of training for a dataset.

    Args:
        dataset: the samples.
        seed: of the order.
        kind: "random", "blocks", or "auto": blocks for a dataset that is remote or has over two million samples,
            except for local images with classes. These often lie in the order of their classes, so that the shards
            of a block order would hold few of them.
        global_batch: samples of an optimizer step, over all processes and micro-batches. A run that resumes with the
            same number goes on in the same order.
        shards: that a block order reads from at a time.

    Raises:
        ValueError: if `kind` is none of these.
    """
    if kind not in ORDERS:
        raise InputError(f"order is {shown(kind)}; choose from {', '.join(ORDERS)}")
    large = len(dataset) > _MAX_RANDOM and "class" not in dataset.classes
    if kind == "random" or (kind == "auto" and not large and not dataset.is_remote):
        return RandomOrder(dataset.starts, seed)
    return BlockOrder(dataset.starts, seed, global_batch=global_batch, shards=shards)


def _permutation(count: int, seed: int, epoch: int, part: int = 0) -> np.ndarray:
    # raw draws are the same in every numpy, which Generator.permutation does not promise
    draws = keyed_rng(Draw.ORDER, seed, epoch, part).bit_generator.random_raw(count)
    return np.argsort(draws, kind="stable")
