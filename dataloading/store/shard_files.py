"""Where the files of a dataset lie: the only place through which a `ShardDataset` reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from prismer.dataloading.store.remote_files import RemoteFiles
from prismer.reading import open_regular, read_bytes
from prismer.storage.places import as_place


class ShardFiles(Protocol):
    """The files of one dataset. An entry is what `index.json` says about a shard (name, count, size, sha256, ...).

    Attributes:
        place: where they lie, as the user gave it.
    """

    place: str

    def read(self, name: str) -> bytes:
        """The bytes of a small file: `index.json`, or the index file of a shard.

        Raises:
            OSError: if it cannot be read; FileNotFoundError if it is absent.
        """
        ...

    def local(self, name: str) -> Path:
        """A file of the local disk with the content of `name`, to be mapped into memory.

        Raises:
            OSError: if there is none; FileNotFoundError if it is absent.
        """
        ...

    def open_shard(self, entry: dict) -> BinaryIO:
        """Open a whole tar on the local disk, for `os.pread`.

        Raises:
            OSError: if it cannot be opened.
        """
        ...

    def prefetch(self, entries: Sequence[dict]) -> None:
        """Begin to fetch the tars that are needed next, in the background; nothing for local files."""
        ...


class LocalFiles:
    """The files of a dataset in a folder of this machine.

    Args:
        folder: the dataset.
    """

    def __init__(self, folder: str | Path):
        self.place = str(folder)
        self._folder = Path(folder)

    def read(self, name: str) -> bytes:
        """See `ShardFiles`."""
        return read_bytes(self._folder / name)

    def local(self, name: str) -> Path:
        """See `ShardFiles`; the file itself, which may be absent."""
        return self._folder / name

    def open_shard(self, entry: dict) -> BinaryIO:
        """See `ShardFiles`; a file of another size is opened too, because its first samples may be whole."""
        return open_regular(self._folder / entry["name"])

    def prefetch(self, entries: Sequence[dict]) -> None:
        """See `ShardFiles`."""


def open_files(place: str | Path) -> ShardFiles:
    """The files of the dataset at `place`, a folder or a URL."""
    place = as_place(place)
    return LocalFiles(place) if isinstance(place, Path) else RemoteFiles(place)
