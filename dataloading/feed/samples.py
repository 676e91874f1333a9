"""What the loader asks of a dataset."""

from collections.abc import Iterable
from typing import Protocol

from prismer.dataloading.store.index import Sample


class Samples(Protocol):
    """A `ShardDataset`, or several that read like one.

    Attributes:
        place: where the dataset lies, for messages.
        is_remote, classes, shards, starts: as of a `ShardDataset`.
    """

    place: str
    is_remote: bool
    classes: dict[str, list[str]]
    shards: list[str]
    starts: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def key(self, i: int) -> str:
        """The key of sample `i`."""

    def shard_of(self, i: int) -> int:
        """The position in `shards` of the tar that holds sample `i`."""

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch these shards, by their positions in `shards`, in the background."""
