"""A dataset on disk: tar shards that any WebDataset reader opens, with an index for random access and checksums.

A folder holds `shard-000000.tar`, ... with members KEY.jpg (RGB), KEY.json (sample_json.py) and KEY.labels
(label_maps.py), and beside each tar its `shard-000000.index.json` (offset, size and crc32 of each member). `index.bin`
(sample_table.py) holds the same for all shards, so that a sample is found without parsing. One `index.json` (shards,
counts, checksums, class tables) is written last. A writer killed at any moment therefore leaves a whole dataset, or a
folder without `index.json` whose finished shards the next `ShardWriter(..., resume=True)` keeps.
"""

import hashlib
import json
import os
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from prismer.dataloading.store.index import MEMBERS, CorruptSample, Sample, is_key, parse_index
from prismer.dataloading.store.label_maps import unpack_labels
from prismer.dataloading.store.sample_table import TABLE_FILE, Row, open_table, table_of_shard, write_table
from prismer.dataloading.store.shard_files import LocalFiles, ShardFiles, open_files
from prismer.dataloading.store.writer import ShardWriter
from prismer.errors import InputError

__all__ = ["CorruptSample", "Sample", "ShardDataset", "ShardWriter", "make_table", "read_index"]


class ShardDataset:
    """Random access to a dataset; safe to share between threads and to inherit or send to worker processes.

    Only `index.json` is read at first, and `index.bin` is mapped into memory, whose pages all processes of a machine
    share. A shard is opened when one of its samples is asked for; at most 64 are open. A sample costs one `pread`. Its
    bytes are checked against their crc32 before any decoder sees them.

    Args:
        place: a dataset folder, or another place that `open_files` knows.

    Attributes:
        place: as it was given.
        folder: the same as a path; of use for a local dataset alone.
        is_remote: whether its shards have to be fetched before they can be read.
        classes: "seg", "obj_detection" and, for classification, "class" -> list of class names.
        experts: expert -> number of samples that have its map.
        source, about: the writer's notes.
        shards: names of the tars; shard s holds samples starts[s] .. starts[s + 1] - 1.
        entries: the entry of each shard in `index.json` (name, count, size, sha256, ...).
        index_sha256: of the bytes of `index.json`, which change with any byte of the dataset.
        files: through which it reads.
        table: where the samples lie.

    Raises:
        ValueError: if the place has no `index.json`, or that is damaged or of an unknown version.
    """

    def __init__(self, place: str | Path):
        self.files = open_files(place)
        self.place, self.folder = self.files.place, Path(self.files.place)
        self.is_remote = not isinstance(self.files, LocalFiles)
        data = _index_bytes(self.files)
        self.index_sha256 = hashlib.sha256(data).hexdigest()
        index = parse_index(data, _index_name(place))
        self.classes: dict[str, list[str]] = index["classes"]
        self.experts: dict[str, int] = index["experts"]
        self.source: str = index["source"]
        self.about: dict = index["about"]
        self.entries: list[dict] = index["shards"]
        self.shards: list[str] = [entry["name"] for entry in self.entries]
        self.starts: list[int] = [0, *accumulate(entry["count"] for entry in self.entries)]
        self.table = open_table(self.files, self.entries, self.index_sha256)
        # of shards whose part of the table is absent or damaged
        self._table_of_shard = lru_cache(8)(lambda shard: table_of_shard(self.files, self.entries[shard]))
        # bounded: ten million samples are ten thousand shards, more than a process may open. A remote shard is open
        # while it is read only: its cache cannot make room by removing a file that is open
        self._keeps_open = not self.is_remote
        self._file = lru_cache(64)(self._open_shard) if self._keeps_open else self._open_shard

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Sample:
        """Read and check sample `i`.

        Raises:
            CorruptSample: if the shard is missing or cut short, or a member is damaged.
            IndexError: if there is no sample `i`.
        """
        shard, row = self._find_row(i)
        jpeg, text, packed = self._read(shard, row, slice(None))
        try:
            labels = unpack_labels(packed)
        except ValueError as error:
            raise CorruptSample(self.shards[shard], row.key, str(error)) from None
        return Sample(row.key, jpeg, labels, self._parse_meta(text, shard, row.key))

    def key(self, i: int) -> str:
        """The key of sample `i`, without touching the tar."""
        return self._find_row(i)[1].key

    def find(self, key: str) -> int | None:
        """The position of the sample with this key, None if there is none; ten million keys take less than a second.

        Raises:
            CorruptSample: if the key was not found and a shard could not be searched.
        """
        # others cannot be in the table, and a line end would match two neighbours
        if not is_key(key):
            return None
        fault = None
        for shard, start in enumerate(self.starts[:-1]):
            try:
                has_block = self.table.has_block(shard)
                row = self.table.find(shard, key) if has_block else self._table_of_shard(shard).find(0, key)
                if row is not None and self.key(start + row) == key:
                    return start + row
            except CorruptSample as error:
                fault = error
        if fault is not None:
            raise fault
        return None

    def shard_of(self, i: int) -> int:
        """The position in `shards` of the tar that holds sample `i`."""
        return self._locate(i)[0]

    def meta(self, i: int) -> dict:
        """The JSON of sample `i` alone: a read of a few hundred bytes, which the page cache keeps.

        Raises:
            CorruptSample: as for `self[i]`.
        """
        shard, row = self._find_row(i)
        (text,) = self._read(shard, row, slice(1, 2))
        return self._parse_meta(text, shard, row.key)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards that will be read next (positions in `shards`); nothing for a local dataset."""
        self.files.prefetch([self.entries[shard] for shard in shards])

    def __reduce__(self) -> tuple:
        return ShardDataset, (self.place,)

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of a dataset of {len(self)}")
        i %= len(self)
        shard = bisect_right(self.starts, i) - 1
        return shard, i - self.starts[shard]

    def _find_row(self, i: int) -> tuple[int, Row]:
        shard, number = self._locate(i)
        row = self.table.row(shard, number)
        if row is None:
            if self.table.has_block(shard):
                warnings.warn(
                    f"index.bin of {self.place} is damaged; give the command: prismer data index {self.place}",
                    # one place for all callers, so that the line is shown once
                    stacklevel=1,
                )
            row = self._table_of_shard(shard).row(0, number)
            assert row is not None
        return shard, row

    def _read(self, shard: int, row: Row, which: slice) -> list[bytes]:
        name, key, members = self.shards[shard], row.key, row.members[which]
        begin, end = members[0][0], members[-1][0] + members[-1][1]
        # this reference keeps the descriptor open even if another thread makes the cache drop it
        file = self._file(shard)
        try:
            data = os.pread(file.fileno(), end - begin, begin)
        except OSError as error:
            raise CorruptSample(name, key, f"reading fails ({error.strerror}); check the disk") from None
        finally:
            if not self._keeps_open:
                file.close()
        if len(data) != end - begin:
            missing = end - begin - len(data)
            raise CorruptSample(name, key, f"the tar ends {missing} bytes too early; copy it again")
        parts = []
        for extension, (offset, size, checksum) in zip(MEMBERS[which], members, strict=True):
            part = data[offset - begin : offset - begin + size]
            if zlib.crc32(part) != checksum:
                raise CorruptSample(name, key, f"its {extension} fails the checksum; copy the shard again")
            parts.append(part)
        return parts

    def _open_shard(self, shard: int) -> BinaryIO:
        try:
            # a local one is closed when the cache drops it
            return self.files.open_shard(self.entries[shard])
        except OSError as error:
            raise CorruptSample(
                self.shards[shard], "", f"the file cannot be opened ({error.strerror}); copy it again"
            ) from None

    def _parse_meta(self, text: bytes, shard: int, key: str) -> dict:
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptSample(self.shards[shard], key, f"its json does not parse ({error})") from None
        if not isinstance(meta, dict):
            raise CorruptSample(self.shards[shard], key, f"its json is a {type(meta).__name__}, not an object")
        return meta


def read_index(place: str | Path) -> dict:
    """The parsed and checked `index.json` of the dataset at `place`.

    Raises:
        ValueError: if it is absent, is damaged or has an unknown version.
    """
    return parse_index(_index_bytes(open_files(place)), _index_name(place))


def make_table(folder: str | Path, progress: bool = False) -> dict:
    """Make the `index.bin` of a dataset folder again, from the index files of its shards.

    Args:
        folder: the dataset.
        progress: show a bar with the time left.

    Returns:
        Its parsed `index.json`.

    Raises:
        ValueError: if an index file is absent or damaged, or the dataset does not lie in a folder.
    """
    files = open_files(folder)
    if not isinstance(files, LocalFiles):
        raise InputError(f"{folder} is no folder of this machine; make {TABLE_FILE} in a local copy and upload it")
    data = _index_bytes(files)
    index = parse_index(data, _index_name(folder))
    write_table(files, files.local(TABLE_FILE), index["shards"], hashlib.sha256(data).hexdigest(), progress)
    return index


def _index_bytes(files: ShardFiles) -> bytes:
    try:
        return files.read("index.json")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{files.place} is not a finished dataset (no index.json); run the job that writes it again, which "
            f"resumes it"
        ) from None


def _index_name(place: str | Path) -> str:
    return f"{str(place).rstrip('/')}/index.json"
