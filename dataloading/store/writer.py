"""Write a dataset folder: tar shards that are whole or absent, their indices, and the end of a job that was killed."""

import fcntl
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

from prismer.dataloading.store.index import (
    FORMAT,
    MEMBERS,
    SHARD_FILE,
    VERSION,
    CorruptSample,
    Sample,
    Sidecar,
    check_classes,
    check_key,
    to_json,
)
from prismer.dataloading.store.labels import pack_labels
from prismer.experts import EXPERTS
from prismer.files import sync, write_atomically
from prismer.reading import read_bytes

_BLOCK = 512


class ShardWriter:
    """Writes a dataset folder; use as a context manager: leaving it without an error finishes the dataset.

    Args:
        folder: made if absent.
        classes: "seg" and "obj_detection" -> list of class names, which the ids in the maps refer to; "class" -> those
            of a set for classification.
        source: where the images come from, in a few words.
        samples_per_shard: samples after which a new tar is begun.
        about: anything else worth keeping in `index.json` (versions of the experts, settings); JSON values.
        resume: keep the finished shards of an earlier writer; `written_keys` tells which samples they hold. A job that
            writes the others in the order of the first attempt ends with the same bytes as one that was never stopped.

    Raises:
        ValueError: if the folder holds shards and `resume` is False, or was begun with other `classes`, `source` or
            `about`; if another process writes it; if the arguments are malformed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: dict[str, list[str]],
        source: str,
        samples_per_shard: int = 1000,
        about: dict | None = None,
        resume: bool = False,
    ):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        check_classes(classes)
        self.folder = Path(folder)
        self.classes, self.source, self.about = classes, source, dict(about or {})
        self.samples_per_shard = samples_per_shard
        self.written_keys: set[str] = set()
        # what must not change between two attempts, so that every shard was made the same way; now, because a value
        # that is not JSON had better fail before hours of writing
        notes = to_json([classes, source, self.about])
        self._fingerprint = hashlib.sha256(notes).hexdigest()[:16]
        self._shards: dict[int, dict] = {}
        self._open: OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            if resume:
                self._keep_finished_shards()
            elif self._own_files() or (self.folder / "index.json").exists():
                raise ValueError(f"{self.folder} already holds shards; resume the job or choose another folder")
        except BaseException:
            self._release()
            raise

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            ValueError: if the key is malformed or taken, the image is not a JPEG, or labels or meta are malformed.
        """
        check_key(sample.key)
        if sample.key in self.written_keys:
            raise ValueError(f"key {sample.key} is written twice; give each sample its own key")
        if not sample.jpeg.startswith(b"\xff\xd8"):
            raise ValueError(f"the image of {sample.key} is not a JPEG; encode it first")
        if not isinstance(sample.meta, dict):
            raise ValueError(f"the meta of {sample.key} is a {type(sample.meta).__name__}; expected a dict")
        try:
            members = sample.jpeg, to_json(sample.meta), pack_labels(sample.labels)
        except ValueError as error:
            raise ValueError(f"sample {sample.key} cannot be written: {error}") from error
        if self._open is None:
            number = next(n for n in range(len(self._shards) + 1) if n not in self._shards)
            self._open = OpenShard(self.folder, number)
        self._open.append(sample.key, members, sample.labels)
        self.written_keys.add(sample.key)
        if len(self._open.keys) == self.samples_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard and write `index.json`; afterwards the folder is a whole dataset."""
        try:
            if self._open is not None:
                self._finish_shard()
            shards = [self._shards[number] for number in sorted(self._shards)]
            write_index(self.folder, shards, self.classes, self.source, self.about)
        except BaseException:
            self._abandon()
            raise
        self._release()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        # the unfinished shard goes, the finished ones stay for the next attempt
        if self._open is not None:
            self._open.abandon()
            self._open = None
        self._release()

    def _finish_shard(self) -> None:
        self._shards[self._open.number] = self._open.finish(self._fingerprint)
        self._open = None

    def _take_lock(self) -> io.FileIO:
        # a record lock: it dies with this process and is not inherited by worker processes that outlive it
        path = self.folder / ".writer.lock"
        lock = open(path, "wb", buffering=0)  # held until close
        alone = _lock(lock, path)
        if not alone:
            lock.close()
            raise ValueError(f"another process is writing {self.folder}; wait for it or choose another folder")
        return lock

    def _release(self) -> None:
        (self.folder / ".writer.lock").unlink(missing_ok=True)
        self._lock.close()

    def _own_files(self) -> list[tuple[Path, int]]:
        matches = ((path, SHARD_FILE.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return [(path, int(match[1])) for path, match in matches if match]

    def _keep_finished_shards(self) -> None:
        for path, number in self._own_files():
            if not path.name.endswith(".index.json"):
                continue
            try:
                data = read_bytes(path)
                sidecar = Sidecar(data, path.name)
                whole = (self.folder / sidecar.shard).stat().st_size == sidecar.size
            except (CorruptSample, FileNotFoundError):
                continue
            if sidecar.fingerprint != self._fingerprint:
                raise ValueError(
                    f"{self.folder} was begun with other class tables, source or notes; choose another folder"
                )
            if whole and self.written_keys.isdisjoint(sidecar.keys):
                self.written_keys.update(sidecar.keys)
                self._shards[number] = sidecar.entry(data)
        torn = [
            path for path, number in self._own_files() if path.name.endswith(".partial") or number not in self._shards
        ]
        if not all(path.name.endswith(".partial") for path in torn):
            # the index that promises a shard goes before the shard
            (self.folder / "index.json").unlink(missing_ok=True)
        for path in torn:
            path.unlink()


def write_index(folder: Path, shards: list[dict], classes: dict[str, list[str]], source: str, about: dict) -> None:
    """Write `index.json`, which makes a dataset of finished shards.

    Args:
        shards: their entries (see `Sidecar.entry`) in order.
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
    write_together(folder / "index.json", json.dumps(index, indent=1, ensure_ascii=False).encode())


def write_together(path: Path, data: bytes) -> None:
    """As `write_atomically`, where several processes may write the same bytes at the same time."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            moved = not os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
        except FileNotFoundError:
            moved = True
        if moved and path.exists():
            # while we waited another process has put its bytes in place, which are ours too
            return
        if moved:
            # it failed and has taken its file away
            return write_together(path, data)
        try:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            # while the lock is ours, so that it is our own file
            partial.unlink(missing_ok=True)
            raise
    sync(path.parent)


def finished_shard(folder: Path, number: int, fingerprint: str) -> tuple[dict, list[dict[str, str]]] | None:
    """The entry of a shard that is whole and was written under `fingerprint`, and what was skipped; else None."""
    path = folder / f"shard-{number:06d}.index.json"
    try:
        data = read_bytes(path)
        sidecar = Sidecar(data, path.name)
        whole = (folder / sidecar.shard).stat().st_size == sidecar.size
    except (CorruptSample, FileNotFoundError):
        return None
    if not whole or sidecar.fingerprint != fingerprint:
        return None
    return sidecar.entry(data), sidecar.skipped


class OpenShard:
    """A tar being written, under a temporary name that no other process can take meanwhile.

    Raises:
        ValueError: if another process writes it.
    """

    def __init__(self, folder: Path, number: int):
        self.number = number
        self.path = folder / f"shard-{number:06d}.tar"
        self._sidecar = folder / f"shard-{number:06d}.index.json"
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.keys: list[str] = []
        self.members: list[list[int]] = []
        self.experts: Counter = Counter()
        self.sha256 = hashlib.sha256()
        self.size = 0
        # emptied only once it is ours; closed by finish or abandon
        self.file = open(self.partial, "ab")
        if not _lock(self.file, self.partial):
            self.file.close()
            raise ValueError(f"another process is writing {self.path}; wait for it or choose another folder")
        self.file.truncate(0)

    def append(self, key: str, members: tuple[bytes, ...], labels: dict) -> None:
        """Add a sample: its encoded members, and the experts that it has maps of."""
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
        """Tar first, then its sidecar: a tar without one counts as torn.

        Args:
            fingerprint: of the settings that the samples were made with.
            skipped: what a job left out, to be kept with the shard.

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
            return self._write_sidecar(fingerprint, skipped)
        except BaseException:
            # torn without its sidecar; nobody else writes a shard of this number now
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
        return Sidecar(data, self._sidecar.name).entry(data)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        # closing writes what is buffered, which a full disk refuses again: the first error is the one to tell
        with suppress(OSError):
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def _lock(file: io.IOBase, path: Path) -> bool:
    """Take a record lock on an open file; False if another process holds it or has moved the file meanwhile."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the holder before us may have renamed or removed the file between our open and our lock
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
