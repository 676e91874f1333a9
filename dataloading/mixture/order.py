"""The order of a mixture: which dataset each position reads, and which sample of that dataset's own order.

Every dataset has an endless order of its own: pass after pass, each a permutation. The mixture takes the next element
of one of them at each position, so that a sample comes again only after all others of its dataset. Which dataset comes
next is a fixed pattern, in which the positions of each dataset are spread as evenly as they can be.

With weights the pattern has 1,000 slots and repeats, so any 1,000 samples in a row, also across two epochs, hold the
same number from each dataset. Without weights the pattern is as long as all datasets together, and an epoch is one pass
through each of them.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, zip_longest

from prismer.dataloading.feed.order import SHARDS, EpochOrder, Visit, choose_order
from prismer.dataloading.mixture.dataset import MixedDataset
from prismer.dataloading.mixture.parts import SLOTS
from prismer.errors import InputError


class EvenPattern:
    """An endless sequence of kinds, in which kind k fills counts[k] of every sum(counts) slots, evenly spread.

    Element j of kind k stands at (j + 1/2) / counts[k] of the pattern; at equal places the first kind comes first. At
    any slot each kind has had its share of the slots so far, give or take one or two.

    Args:
        counts: of each kind, at least 1.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts, self.length = list(counts), sum(counts)

    def at(self, slot: int) -> tuple[int, int]:
        """The kind in a slot, and the number of earlier slots of this kind."""
        turn, slot = divmod(slot, self.length)
        passed = self._passed(slot)
        kind = self._next(passed)
        return kind, turn * self.counts[kind] + passed[kind]

    def before(self, slot: int) -> list[int]:
        """The number of slots of each kind before a slot."""
        turn, slot = divmod(slot, self.length)
        return [turn * count + n for count, n in zip(self.counts, self._passed(slot), strict=True)]

    def _passed(self, slot: int) -> list[int]:
        """`before` within the pattern."""
        kinds = len(self.counts)
        # for a place a little in front of the slot there is a formula: elements that stand before (slot - kinds / 2)
        passed = [max(0, -((self.length - (2 * slot - kinds) * count) // (2 * self.length))) for count in self.counts]
        for _ in range(slot - sum(passed)):
            passed[self._next(passed)] += 1
        return passed

    def _next(self, passed: list[int]) -> int:
        """The kind whose next element stands first."""
        first = 0
        for kind in range(1, len(passed)):
            # (2 a + 1) / m < (2 b + 1) / n in whole numbers, which are exact at any size
            if (2 * passed[kind] + 1) * self.counts[first] < (2 * passed[first] + 1) * self.counts[kind]:
                first = kind
        return first


class MixedOrder:
    """The order of training on a mixture.

    The slots of the datasets without a weight form one kind of the pattern, and a second pattern divides them by the
    sizes of these datasets. An epoch is

    * without weights: every sample once;
    * with some weights: as many samples as it takes to pass once through the datasets without a weight;
    * with all weights: as many samples as there are.

    With weights, an epoch is rounded up to whole global batches. Then no sample between two epochs is left out, and
    each dataset's own order runs on.

    Args:
        dataset: the mixture.
        slots: of 1,000, for each dataset; None for those that share the rest by their sizes.
        seed: of the order. Each dataset's own order has a seed of its own, seed + its position.
        kind: of the orders of the datasets, as `choose_order` takes it.
        global_batch: samples of an optimizer step, over all processes and micro-batches.

    Raises:
        ValueError: if a dataset is empty, or `kind` is none of the known ones.
    """

    def __init__(
        self,
        dataset: MixedDataset,
        slots: Sequence[int | None],
        *,
        seed: int,
        kind: str = "auto",
        global_batch: int,
    ):
        for part in dataset.parts:
            if not len(part):
                raise InputError(f"{part.place} holds no samples; leave it out of the mixture")
        self.dataset, self.slots = dataset, list(slots)
        self._sizes = [len(part) for part in dataset.parts]
        # a global batch takes a changing number of samples from a dataset, so that no part of its shards could stay
        # with one process: one lane. All datasets together read from as many shards at a time as one alone
        own = dict(kind=kind, global_batch=1, shards=max(1, SHARDS // len(dataset.parts)))
        orders = [choose_order(part.dataset, seed=seed + k, **own) for k, part in enumerate(dataset.parts)]
        # the batches on both sides of the end of a pass are prepared at the same time
        self._passes = [lru_cache(2)(order.epoch) for order in orders]
        self._shared = [k for k, count in enumerate(slots) if count is None]
        self._own = [k for k, count in enumerate(slots) if count is not None]
        given = [slots[k] for k in self._own]
        rest = SLOTS - sum(given)
        self._outer = EvenPattern([*given, rest] if self._shared else given)
        self._inner = EvenPattern([self._sizes[k] for k in self._shared])
        self.length = sum(self._sizes)
        if self._own:
            if self._shared:
                self.length = self._inner.length * SLOTS // rest
                while self._outer.before(self.length)[-1] < self._inner.length:
                    self.length += 1
            self.length += -self.length % global_batch

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch, which goes on where the epoch before it ends."""
        return _MixedEpoch(self, epoch * self.length)

    def shares(self) -> list[float]:
        """The share of the samples that each dataset gives."""
        rest = SLOTS - sum(count for count in self.slots if count is not None)
        return [
            (rest * size / self._inner.length if count is None else count) / SLOTS
            for count, size in zip(self.slots, self._sizes, strict=True)
        ]

    def line(self) -> str:
        """One line that says what an epoch is."""
        parts = [
            f"{part.name} {share:.1%} ({share * self.length / len(part):.2f} passes)"
            for part, share in zip(self.dataset.parts, self.shares(), strict=True)
        ]
        return f"an epoch is {self.length:,} samples: {', '.join(parts)}"

    def visit(self, number: int) -> Visit:
        """What the run reads at position `number`, counted over all epochs."""
        kind, number = self._outer.at(number)
        if kind < len(self._own):
            k = self._own[kind]
        else:
            kind, number = self._inner.at(number)
            k = self._shared[kind]
        turn, place = divmod(number, self._sizes[k])
        visit = self._passes[k](turn)[place]
        return Visit(self.dataset.begins[k] + visit.index, visit.visit)

    def shards_ahead(self, numbers: range, count: int) -> list[int]:
        """The shards of the next visits of every dataset, in turns, so that those that are needed first stand first."""
        found = []
        for k, (begin, end) in enumerate(zip(self._before(numbers.start), self._before(numbers.stop), strict=True)):
            first, size = self.dataset.first_shard(k), self._sizes[k]
            own: list[int] = []
            # a batch without a sample of this dataset still looks at its next one
            while begin < end or not own:
                turn, place = divmod(begin, size)
                stop = min(size, place + max(1, end - begin))
                own += self._passes[k](turn).shards_ahead(range(place, stop), count)
                begin += stop - place
            found.append([first + shard for shard in own])
        return [shard for shard in dict.fromkeys(chain(*zip_longest(*found))) if shard is not None][:count]

    def _before(self, number: int) -> list[int]:
        """How many samples of each dataset come before a position."""
        outer = self._outer.before(number)
        before = dict(zip(self._own, outer, strict=False))
        if self._shared:
            before |= zip(self._shared, self._inner.before(outer[-1]), strict=True)
        return [before[k] for k in range(len(self._sizes))]


class _MixedEpoch:
    """The epoch of a `MixedOrder` that begins at a position of the run."""

    def __init__(self, order: MixedOrder, begin: int):
        self.order, self.begin = order, begin

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, position: int) -> Visit:
        return self.order.visit(self.begin + position)

    def shards_ahead(self, positions: range, count: int) -> list[int]:
        return self.order.shards_ahead(range(self.begin + positions.start, self.begin + positions.stop), count)
