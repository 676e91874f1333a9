"""A dataset on disk: tar shards that any WebDataset reader opens, with an index for random access and checksums.

A folder holds `shard-000000.tar`, ... with members KEY.jpg (RGB), KEY.json (sample_json.py) and KEY.labels
(label_maps.py), and beside each tar its `shard-000000.index.json` (offset, size and crc32 of each member). One
`index.json` (shards, counts, checksums, class tables) is written last. A writer killed at any moment therefore leaves
a whole dataset, or a folder without `index.json` whose finished shards the next `ShardWriter(..., resume=True)` keeps.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from prismer.dataloading.store.index import MEMBERS, CorruptSample, Sample, Sidecar, parse_index
from prismer.dataloading.store.label_maps import unpack_labels
from prismer.dataloading.store.shard_files import LocalFiles, open_files
from prismer.dataloading.store.writer import ShardWriter
from prismer.errors import InputError

__all__ = ["CorruptSample", "Sample", "ShardDataset", "ShardWriter", "read_index"]


class ShardDataset:
    """Random access to a dataset; safe to share between threads and to inherit or send to worker processes.

    Only `index.json` is read at first; a shard is opened when one of its samples is asked for. A sample costs one
    `pread`. Its bytes are checked against their crc32 before any decoder sees them.

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

    Raises:
        ValueError: if the place has no `index.json`, or that is damaged or of an unknown version.
    """

    def __init__(self, place: str | Path):
        self._files = open_files(place)
        self.place, self.folder = self._files.place, Path(place)
        self.is_remote = not isinstance(self._files, LocalFiles)
        index = read_index(place)
        self.classes: dict[str, list[str]] = index["classes"]
        self.experts: dict[str, int] = index["experts"]
        self.source: str = index["source"]
        self.about: dict = index["about"]
        self.entries: list[dict] = index["shards"]
        self.shards: list[str] = [entry["name"] for entry in self.entries]
        self.starts: list[int] = [0, *accumulate(entry["count"] for entry in self.entries)]
        # bounded: ten million samples are ten thousand shards, more than a process may open
        self._sidecar = lru_cache(256)(self._load_sidecar)
        self._file = lru_cache(64)(self._open_shard)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Sample:
        """Read and check sample `i`.

        Raises:
            CorruptSample: if the shard is missing or cut short, or a member is damaged.
            IndexError: if there is no sample `i`.
        """
        shard, row = self._locate(i)
        sidecar = self._sidecar(shard)
        jpeg, text, packed = self._read(shard, sidecar, row, slice(None))
        try:
            labels = unpack_labels(packed)
        except ValueError as error:
            raise CorruptSample(sidecar.shard, sidecar.keys[row], str(error)) from None
        return Sample(sidecar.keys[row], jpeg, labels, _parse_meta(text, sidecar, row))

    def key(self, i: int) -> str:
        """The key of sample `i`, without touching the tar."""
        shard, row = self._locate(i)
        return self._sidecar(shard).keys[row]

    def shard_of(self, i: int) -> int:
        """The position in `shards` of the tar that holds sample `i`."""
        return self._locate(i)[0]

    def meta(self, i: int) -> dict:
        """The JSON of sample `i` alone: a read of a few hundred bytes, which the page cache keeps.

        Raises:
            CorruptSample: as for `self[i]`.
        """
        shard, row = self._locate(i)
        sidecar = self._sidecar(shard)
        (text,) = self._read(shard, sidecar, row, slice(1, 2))
        return _parse_meta(text, sidecar, row)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards that will be read next (positions in `shards`); nothing for a local dataset."""
        if self.is_remote:
            self._files.prefetch([self.entries[shard] for shard in shards])

    def __reduce__(self) -> tuple:
        return ShardDataset, (self.place,)

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of a dataset of {len(self)}")
        i %= len(self)
        shard = bisect_right(self.starts, i) - 1
        return shard, i - self.starts[shard]

    def _read(self, shard: int, sidecar: Sidecar, row: int, which: slice) -> list[bytes]:
        key = sidecar.keys[row]
        members = sidecar.members[row, which].tolist()
        begin, end = members[0][0], members[-1][0] + members[-1][1]
        # this reference keeps the descriptor open even if another thread makes the cache drop it
        file = self._file(shard)
        try:
            data = os.pread(file.fileno(), end - begin, begin)
        except OSError as error:
            raise CorruptSample(sidecar.shard, key, f"reading fails ({error.strerror}); check the disk") from None
        if len(data) != end - begin:
            missing = end - begin - len(data)
            raise CorruptSample(sidecar.shard, key, f"the tar ends {missing} bytes too early; copy it again")
        parts = []
        for extension, (offset, size, checksum) in zip(MEMBERS[which], members, strict=True):
            part = data[offset - begin : offset - begin + size]
            if zlib.crc32(part) != checksum:
                raise CorruptSample(sidecar.shard, key, f"its {extension} fails the checksum; copy the shard again")
            parts.append(part)
        return parts

    def _load_sidecar(self, shard: int) -> Sidecar:
        entry = self.entries[shard]
        name = entry["name"].replace(".tar", ".index.json")
        try:
            data = self._files.read(name)
        except OSError as error:
            reason = f"{name} cannot be read ({error.strerror}); copy it again"
            raise CorruptSample(entry["name"], "", reason) from None
        if hashlib.sha256(data).hexdigest() != entry["index_sha256"]:
            raise CorruptSample(entry["name"], "", f"{name} fails its checksum; copy it again")
        sidecar = Sidecar(data, name)
        if len(sidecar.keys) != entry["count"]:
            reason = f"{name} lists {len(sidecar.keys)} samples, index.json {entry['count']}; copy both again"
            raise CorruptSample(entry["name"], "", reason)
        return sidecar

    def _open_shard(self, shard: int) -> BinaryIO:
        try:
            return self._files.open_shard(self.entries[shard])  # closed when the cache drops it
        except OSError as error:
            raise CorruptSample(
                self.shards[shard], "", f"the file cannot be opened ({error.strerror}); copy it again"
            ) from None


def read_index(place: str | Path) -> dict:
    """The parsed and checked `index.json` of the dataset at `place`.

    Raises:
        ValueError: if it is absent, is damaged or has an unknown version.
    """
    try:
        data = open_files(place).read("index.json")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{place} is not a finished dataset (no index.json); run the job that writes it again, which resumes it"
        ) from None
    return parse_index(data, f"{str(place).rstrip('/')}/index.json")


def _parse_meta(text: bytes, sidecar: Sidecar, row: int) -> dict:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptSample(sidecar.shard, sidecar.keys[row], f"its json does not parse ({error})") from None
    if not isinstance(meta, dict):
        raise CorruptSample(sidecar.shard, sidecar.keys[row], f"its json is a {type(meta).__name__}, not an object")
    return meta
