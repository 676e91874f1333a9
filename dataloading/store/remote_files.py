"""The files of a dataset in a bucket or on a server: its shards are kept whole in a cache on this machine.

A shard is downloaded when one of its samples is needed or announced, compared with its sha256 in `index.json`, and only
then read. A server that is away is waited for (`prismer.storage.objects`), so that no sample is lost; a shard whose
content is wrong is refused like a damaged local one.
"""

import errno
import hashlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from prismer.files import sentence
from prismer.shipped import cache_folder
from prismer.storage.cache import DEFAULT_LIMIT, FileCache, parse_bytes
from prismer.storage.objects import StorageError, describe_object, download_object, read_object
from prismer.storage.places import inside

# a download of a shard is early if less than this part of its samples was read since the last one; with many processes
# on a machine, each reads only a part
_FEW = 64
_TOO_MANY_EARLY = 10
# downloads in the background at a time, for each dataset and process
_FETCHERS = 4


class RemoteFiles:
    """See `ShardFiles`; safe to share between threads and to inherit by a forked process.

    Args:
        place: a URL, such as s3://bucket/dataset.
    """

    def __init__(self, place: str):
        self.place = place
        limit = parse_bytes(os.environ.get("PRISMER_CACHE_LIMIT") or DEFAULT_LIMIT)
        self._cache = FileCache(cache_folder("storage") / "shards", limit)
        # name of a shard -> why its content is wrong: it is not downloaded again for each of its samples
        self._wrong: dict[str, OSError] = {}
        # name of a shard -> reads since its last download, and the downloads that came after too few of them
        self._reads: Counter = Counter()
        self._early_downloads = 0
        # held open, so that the cache does not remove them
        self._mapped: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()
        self._wanted: list[dict] = []
        self._fetching: set[str] = set()
        self._fetchers, self._process = 0, os.getpid()

    def read(self, name: str) -> bytes:
        """See `ShardFiles`."""
        return read_object(inside(self.place, name))

    def local(self, name: str) -> Path:
        """See `ShardFiles`; the copy stays as long as this object."""
        url = inside(self.place, name)
        size, version = describe_object(url)
        kept = hashlib.sha256(f"{url} {version}".encode()).hexdigest()

        def fill(file: BinaryIO) -> None:
            file.truncate(0)
            for _ in download_object(url, file, size):
                pass

        with self._lock:
            if kept not in self._mapped:
                self._mapped[kept] = self._cache.open(kept, size, fill)
        return self._cache.folder / kept

    def open_shard(self, entry: dict) -> BinaryIO:
        """See `ShardFiles`; the cache keeps the file until it is closed, so close it after each read."""
        if (error := self._wrong.get(entry["name"])) is not None:
            raise OSError(error.errno, error.strerror, error.filename)
        self._reads[entry["name"]] += 1
        try:
            return self._cache.open(entry["sha256"], entry["size"], self._filler(entry))
        except OSError as error:
            if error.errno not in (errno.EBADMSG, errno.ENOENT):
                # a full disk damages no shard: no sample may be skipped
                raise StorageError(sentence(error)) from None
            self._wrong[entry["name"]] = error
            raise

    def prefetch(self, entries: Sequence[dict]) -> None:
        """See `ShardFiles`; the entries of the last call replace those of earlier calls."""
        wanted, room = [], self._cache.limit // 2
        for entry in entries:
            # beyond that, a shard would push out one that is needed sooner
            room -= entry["size"]
            if room < 0:
                break
            if entry["name"] not in self._wrong and not self._cache.holds(entry["sha256"]):
                wanted.append(entry)
        with self._lock:
            if self._process != os.getpid():
                # threads do not survive a fork
                self._fetching, self._fetchers, self._process = set(), 0, os.getpid()
            self._wanted = [entry for entry in wanted if entry["name"] not in self._fetching]
            while self._fetchers < min(_FETCHERS, len(self._fetching) + len(self._wanted)):
                self._fetchers += 1
                # daemon: the end of the program does not wait for a download
                threading.Thread(target=self._work, name="prismer-prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._fetchers -= 1
                    return
                entry = self._wanted.pop(0)
                self._fetching.add(entry["name"])
            try:
                self.open_shard(entry).close()
            except Exception:  # whoever reads the shard meets the error again, and reports it
                pass
            with self._lock:
                self._fetching.discard(entry["name"])

    def _filler(self, entry: dict) -> Callable[[BinaryIO], None]:
        url = inside(self.place, entry["name"])

        def fill(file: BinaryIO) -> None:
            self._note_download(entry)
            # what an earlier try has left may be of another version of the shard, and a network may change a byte
            for _ in range(2):
                digest = hashlib.sha256()
                file.seek(0)
                while block := file.read(1 << 22):
                    digest.update(block)
                for block in download_object(url, file, entry["size"]):
                    digest.update(block)
                if digest.hexdigest() == entry["sha256"]:
                    return
                file.truncate(0)
            raise OSError(errno.EBADMSG, "it fails its checksum", url)

        return fill

    def _note_download(self, entry: dict) -> None:
        """Warn once if shards leave the cache long before their samples were read."""
        # of the reads since the last download, one is what caused this one
        early = 1 < self._reads[entry["name"]] <= entry["count"] // _FEW
        self._reads[entry["name"]] = 1
        self._early_downloads += early
        if early and self._early_downloads == _TOO_MANY_EARLY:
            warnings.warn(
                f"shards of {self.place} are downloaded again and again: the cache of {self._cache.limit:,} bytes is "
                f"smaller than what is read at a time; raise PRISMER_CACHE_LIMIT, or choose the order of blocks",
                stacklevel=2,
            )
