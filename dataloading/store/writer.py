"""Write a dataset folder: tar shards that are whole or absent, their index files, and what a killed job left undone."""

import fcntl
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prismer.dataloading.store.index import (
    FORMAT,
    MAX_KEY,
    MEMBERS,
    SHARD_FILE,
    VERSION,
    CorruptSample,
    Sample,
    Sidecar,
    check_classes,
    is_key,
    to_json,
)
from prismer.dataloading.store.label_maps import pack_labels
from prismer.dataloading.store.sample_table import TABLE_FILE, write_table
from prismer.dataloading.store.shard_files import open_files
from prismer.errors import InputError
from prismer.experts import EXPERTS
from prismer.files import sync, write_atomically, write_together
from prismer.storage.output import list_files, publish, read_file, read_files, remove_file, size_of, stage
from prismer.storage.places import as_place, is_url

_BLOCK = 512


class ShardWriter:
    """Writes a dataset folder; a context manager that finishes the dataset when it is left without an error.

    A shard of a dataset in a bucket is made in a folder of this machine, uploaded, and removed here.

    Args:
        place: a folder, made if absent, or a URL such as s3://bucket/dataset.
        classes: "seg" and "obj_detection" -> list of class names, to which the ids in the maps refer; "class" -> class
            names of a dataset for classification.
        source: where the images come from, in a few words.
        samples_per_shard: size of a full tar.
        about: other notes for `index.json` (versions of the experts, settings); JSON values.
        resume: keep the finished shards of an earlier writer. A job that writes the other samples in the order of its
            first attempt ends with the same bytes as an uninterrupted one.

    Attributes:
        place: as it was given.
        folder: the folder of this machine in which shards are made; the dataset itself if that is local.
        written_keys: keys of the samples in the dataset, those of an earlier writer included.

    Raises:
        ValueError: if the place holds shards and `resume` is False, or was begun with other `classes`, `source` or
            `about`; if another process of this machine writes it; if an argument is malformed.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        classes: dict[str, list[str]],
        source: str,
        samples_per_shard: int = 1000,
        about: dict | None = None,
        resume: bool = False,
    ):
        if samples_per_shard < 1:
            raise InputError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        check_classes(classes)
        self.place = as_place(place)
        self.classes, self.source, self.about = classes, source, dict(about or {})
        self.samples_per_shard = samples_per_shard
        self.written_keys: set[str] = set()
        # of what must not change between two attempts, so that all shards are made the same way; computed first, so
        # that a value that is not JSON fails before hours of writing
        notes = to_json([classes, source, self.about])
        self._fingerprint = hashlib.sha256(notes).hexdigest()[:16]
        self._shards: dict[int, dict] = {}
        self._open: OpenShard | None = None
        self.folder = stage(self.place)
        self._lock = self._take_lock()
        try:
            held = list_files(self.place)
            if resume:
                self._keep_finished_shards(held)
            elif _shard_numbers(held) or "index.json" in held:
                raise InputError(f"{self.place} already holds shards; resume the job or choose another folder")
        except BaseException:
            self._release()
            raise

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            ValueError: if the key is malformed or taken, the image is not a JPEG, or labels or meta are malformed.
        """
        if not is_key(sample.key):
            allowed = f"1 to {MAX_KEY} of the characters A-Z a-z 0-9 _ -"
            raise InputError(f"key {sample.key!r} is malformed; rename the sample with {allowed}")
        if sample.key in self.written_keys:
            raise InputError(f"key {sample.key} is written twice; give each sample its own key")
        if not sample.jpeg.startswith(b"\xff\xd8"):
            raise InputError(f"the image of {sample.key} is not a JPEG; encode it first")
        if not isinstance(sample.meta, dict):
            raise InputError(f"the meta of {sample.key} is a {type(sample.meta).__name__}; expected a dict")
        try:
            members = sample.jpeg, to_json(sample.meta), pack_labels(sample.labels)
        except ValueError as error:
            raise InputError(f"sample {sample.key} cannot be written: {error}") from error
        if self._open is None:
            number = next(n for n in range(len(self._shards) + 1) if n not in self._shards)
            self._open = OpenShard(self.place, number)
        self._open.append(sample.key, members, sample.labels)
        self.written_keys.add(sample.key)
        if len(self._open.keys) == self.samples_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard and write `index.json`: the folder is then a whole dataset."""
        try:
            if self._open is not None:
                self._finish_shard()
            shards = [self._shards[number] for number in sorted(self._shards)]
            write_index(self.place, shards, self.classes, self.source, self.about)
        except BaseException:
            self._abandon()
            raise
        self._release()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        # the finished shards stay for the next attempt
        if self._open is not None:
            self._open.abandon()
            self._open = None
        self._release()

    def _finish_shard(self) -> None:
        self._shards[self._open.number] = self._open.finish(self._fingerprint)
        self._open = None

    def _take_lock(self) -> io.FileIO:
        # a record lock: it dies with this process, and worker processes that outlive it do not inherit it
        path = self.folder / ".writer.lock"
        lock = open(path, "wb", buffering=0)  # held until close
        if not _lock(lock, path):
            lock.close()
            raise InputError(f"another process is writing {self.place}; wait for it or choose another folder")
        return lock

    def _release(self) -> None:
        (self.folder / ".writer.lock").unlink(missing_ok=True)
        self._lock.close()
        if is_url(self.place):
            # kept while it holds anything, such as another process's shard
            with suppress(OSError):
                self.folder.rmdir()

    def _keep_finished_shards(self, held: dict[str, int]) -> None:
        names = [name for name in _shard_numbers(held) if name.endswith(".index.json")]
        for name, data in read_files(self.place, names):
            found = _parse_sidecar(name, data, held)
            if found is None:
                continue
            sidecar, whole = found
            if sidecar.fingerprint != self._fingerprint:
                raise InputError(
                    f"{self.place} was begun with other class tables, source or notes; choose another folder"
                )
            if whole and self.written_keys.isdisjoint(sidecar.keys):
                self.written_keys.update(sidecar.keys)
                self._shards[_shard_numbers([name])[name]] = sidecar.entry
        torn = [
            name
            for name, number in _shard_numbers(held).items()
            if name.endswith(".partial") or number not in self._shards
        ]
        if not all(name.endswith(".partial") for name in torn):
            # before a shard that it promises
            remove_file(self.place, "index.json")
        for name in torn:
            remove_file(self.place, name)
        if is_url(self.place):
            # what a killed job did not upload
            for name in _shard_numbers(list_files(self.folder)):
                remove_file(self.folder, name)


def _shard_numbers(names: Iterable[str]) -> dict[str, int]:
    """The files of shards among `names`, finished or not -> the number of their shard."""
    matches = ((name, SHARD_FILE.fullmatch(name)) for name in names)
    return {name: int(match[1]) for name, match in matches if match}


def write_index(place: str | Path, shards: list[dict], classes: dict[str, list[str]], source: str, about: dict) -> None:
    """Write `index.bin`, then `index.json`, which turns finished shards into a dataset.

    Args:
        shards: their entries (see `Sidecar`) in order.
        classes, source, about: see `ShardWriter`.
    """
    experts = sum((Counter(shard["experts"]) for shard in shards), Counter())
    index = {
        "format": FORMAT,
        "version": VERSION,
        "count": sum(shard["count"] for shard in shards),
        "source": source,
        "classes": classes,
        "experts": {name: experts[name] for name in EXPERTS if experts[name]},
        "about": about,
        "shards": shards,
    }
    data, folder = json.dumps(index, indent=1, ensure_ascii=False).encode(), stage(place)
    table = folder / TABLE_FILE
    write_table(open_files(place), table, shards, hashlib.sha256(data).hexdigest(), progress=False)
    write_together(folder / "index.json", data)
    publish(place, TABLE_FILE, "index.json")


def finished_shard(place: str | Path, number: int, fingerprint: str) -> tuple[dict, list[dict[str, str]]] | None:
    """The `index.json` entry of a shard and its skipped records; None unless it is whole and has this fingerprint."""
    name = f"shard-{number:06d}.index.json"
    try:
        tar = f"shard-{number:06d}.tar"
        found = _parse_sidecar(name, read_file(place, name), {tar: size_of(place, tar)})
    except FileNotFoundError:
        return None
    return (found[0].entry, found[0].skipped) if found and found[1] and found[0].fingerprint == fingerprint else None


def finished_shards(
    place: str | Path, numbers: Iterable[int], fingerprint: str
) -> dict[int, tuple[dict, list[dict[str, str]]]]:
    """The shards among `numbers` that are whole and have this fingerprint.

    Returns:
        The number of a shard -> its `index.json` entry, and its skipped records.
    """
    held = list_files(place)
    names = {name: n for n in numbers if (name := f"shard-{n:06d}.index.json") in held}
    done = {}
    for name, data in read_files(place, names):
        found = _parse_sidecar(name, data, held)
        if found is not None and found[1] and found[0].fingerprint == fingerprint:
            done[names[name]] = found[0].entry, found[0].skipped
    return done


def _parse_sidecar(name: str, data: bytes | None, held: dict[str, int]) -> tuple[Sidecar, bool] | None:
    """A sidecar, and whether its tar has the right size; None if it is damaged or either file is absent."""
    try:
        sidecar = Sidecar(data, name) if data is not None else None
    except CorruptSample:
        return None
    if sidecar is None or sidecar.shard not in held:
        return None
    return sidecar, held[sidecar.shard] == sidecar.size


class OpenShard:
    """A tar being written, under a temporary name that only one process of a machine at a time can hold.

    Args:
        place: the dataset.
        number: of the shard.

    Raises:
        ValueError: if another process writes it.
    """

    def __init__(self, place: str | Path, number: int):
        self.number = number
        self._place, folder = place, stage(place)
        self.path = folder / f"shard-{number:06d}.tar"
        self._sidecar = folder / f"shard-{number:06d}.index.json"
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.keys: list[str] = []
        self.members: list[list[int]] = []
        self.experts: Counter = Counter()
        self.sha256 = hashlib.sha256()
        self.size = 0
        # emptied only under the lock; closed by finish or abandon
        self.file = open(self.partial, "ab")
        if not _lock(self.file, self.partial):
            self.file.close()
            raise InputError(f"another process is writing {self.path}; wait for it or choose another folder")
        self.file.truncate(0)

    def append(self, key: str, members: tuple[bytes, ...], labels: dict) -> None:
        """Add a sample: its encoded members; `labels` gives the experts to count."""
        row = []
        for extension, data in zip(MEMBERS, members, strict=True):
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(data)
            self._put(header.tobuf(tarfile.USTAR_FORMAT))
            row += [self.size, len(data), zlib.crc32(data)]
            self._put(data)
            self._put(bytes(-len(data) % _BLOCK))
        self.keys.append(key)
        self.members.append(row)
        self.experts.update(labels.keys())

    def finish(self, fingerprint: str, skipped: list[dict[str, str]] | None = None) -> dict:
        """Put the tar in place, then its sidecar: a tar without one counts as torn. In a bucket, upload both.

        Args:
            fingerprint: of the settings that the samples were made with.
            skipped: what a job left out; stored in the sidecar.

        Returns:
            The shard's entry for `index.json`.
        """
        self._put(bytes(2 * _BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)
        try:
            sync(self.path.parent)
            entry = self._write_sidecar(fingerprint, skipped)
            publish(self._place, self.path.name, self._sidecar.name)
            return entry
        except BaseException:
            # a tar without a sidecar is torn; no other process writes this shard now
            for path in (self._sidecar, self.path):
                path.unlink(missing_ok=True)
            raise

    def _write_sidecar(self, fingerprint: str, skipped: list[dict[str, str]] | None) -> dict:
        data = to_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "shard": self.path.name,
                "size": self.size,
                "sha256": self.sha256.hexdigest(),
                "fingerprint": fingerprint,
                "experts": {name: self.experts[name] for name in EXPERTS if self.experts[name]},
                "keys": self.keys,
                # per sample (offset, size, crc32) of each member, in the order of MEMBERS
                "members": self.members,
                **({"skipped": skipped} if skipped else {}),
            }
        )
        write_atomically(self._sidecar, data)
        return Sidecar(data, self._sidecar.name).entry

    def abandon(self) -> None:
        """Remove the unfinished file."""
        # closing writes the buffer, which a full disk refuses again: the first error is the one to report
        with suppress(OSError):
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def _lock(file: io.IOBase, path: Path) -> bool:
    """Take a record lock on an open file; False if another process holds it, or has moved the file meanwhile."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the previous holder may have renamed or removed the file between our open and our lock
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
