"""The order in which an epoch visits the samples of a dataset.

An order is a function of (seed, epoch, position). It keeps no state, so that a run resumes at any position, and it does
not know the number of processes, so that a run may resume with another number.
"""

from bisect import bisect_right
from typing import NamedTuple, Protocol

import numpy as np

from prismer.dataloading.feed.augment import Draw, keyed_rng

# a random order has no end of shards to name: it looks at this many of the next positions
_POSITIONS_AHEAD = 1024


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
        return list(range(first, len(self.starts) - 1))[:count]


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


def _permutation(count: int, seed: int, epoch: int, part: int = 0) -> np.ndarray:
    # raw draws are the same in every numpy, which Generator.permutation does not promise
    draws = keyed_rng(Draw.ORDER, seed, epoch, part).bit_generator.random_raw(count)
    return np.argsort(draws, kind="stable")
