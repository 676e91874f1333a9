"""A folder of whole files with a limit in bytes, shared by the processes of a machine.

    cache = FileCache(folder, limit=50_000_000_000)
    with cache.open(name, size, fill) as file:      # fill(partial) completes what is here of the file
        os.pread(file.fileno(), ...)

The sizes of the files, those on their way included, never exceed the limit: room is made before a byte arrives, by
removing what was not used for the longest time. A file that is open stays. A file gets its name when it is whole; what
a killed process left of one is completed by the next that needs it, or removed when room is needed.

The locks are those of `flock`: they belong to an open file, so that they hold between threads too, and end with the
process.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from prismer.errors import InputError, shown
from prismer.files import add_name
from prismer.storage.objects import PATIENCE, StorageError

DEFAULT_LIMIT = "50 GB"
_LOCK = ".lock"
# the name of a file on its way ends with its size, which is what the limit counts
_PARTIAL = re.compile(r".*\.(\d+)\.partial")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# seconds between two looks at a file that another process is fetching
_PAUSE = 0.05


def parse_bytes(text: str) -> int:
    """A number of bytes, such as "50 GB", "500M" or "1000".

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"PRISMER_CACHE_LIMIT is {shown(text)}; give a number of bytes such as 50GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class FileCache:
    """Whole files under names that stand for their content.

    Args:
        folder: made if absent.
        limit: the most bytes that it may hold.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def holds(self, name: str) -> bool:
        """Whether the whole file is here."""
        return (self.folder / name).exists()

    def open(self, name: str, size: int, fill: Callable[[BinaryIO], None]) -> BinaryIO:
        """Open a file for reading, after `fill` has fetched it if it is not here; it stays until it is closed.

        Args:
            name: of the file in this folder.
            size: of the file in bytes.
            fill: completes the open file that it is given, which may hold the first bytes of an earlier try.

        Raises:
            StorageError: if the file is larger than the limit, or files in use leave no room for it.
            Exception: what `fill` raises; what it wrote stays for the next try.
        """
        while True:
            if (file := self._open_whole(name)) is not None:
                return file
            self._fetch(name, size, fill)

    def _open_whole(self, name: str) -> BinaryIO | None:
        try:
            file = open(self.folder / name, "rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if not status.st_nlink:
            # it was removed before the lock was ours
            file.close()
            return None
        if time.time() - status.st_mtime > 1:
            # the time of the last use decides what is removed first
            os.utime(file.fileno())
        return file

    def _fetch(self, name: str, size: int, fill: Callable[[BinaryIO], None]) -> None:
        partial = self.folder / f"{name}.{size}.partial"
        file = self._claim(name, partial, size)
        if file is None:
            # another process has fetched it
            return
        with file:
            try:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                add_name(error, partial)
                raise
            with self._bookkeeping():
                os.replace(partial, self.folder / name)

    def _claim(self, name: str, partial: Path, size: int) -> BinaryIO | None:
        """Open and lock a file on its way, with room for all of it; None if the whole file is here by then."""
        if size > self.limit:
            raise StorageError(
                f"a file of {size:,} bytes does not fit into the cache {self.folder} of {self.limit:,}; set "
                f"PRISMER_CACHE_LIMIT to several times its size"
            )
        deadline = time.monotonic() + PATIENCE
        while not self.holds(name):
            with self._bookkeeping():
                blocked = not partial.exists() and not self._make_room(size)
                file = None if blocked else _open_locked(partial, "a+b")
            if file is not None:
                return file
            if not blocked:
                # another process is fetching it, which may take any time
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                raise StorageError(
                    f"files in use fill the cache {self.folder} of {self.limit:,} bytes; raise PRISMER_CACHE_LIMIT"
                )
            time.sleep(_PAUSE)
        return None

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        """Let one process at a time count, add, rename and remove files."""
        with open(self.folder / _LOCK, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for the longest time until `size` bytes fit; whether they do."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == _LOCK:
                    continue
                status = entry.stat()
                partial = _PARTIAL.fullmatch(entry.name)
                found.append((status.st_mtime_ns, entry.path, int(partial[1]) if partial else status.st_size))
        used = sum(one for _, _, one in found)
        for _, path, one in sorted(found):
            if used + size <= self.limit:
                break
            if (file := _open_locked(Path(path), "r+b")) is not None:
                with file:
                    os.unlink(path)
                used -= one
        return used + size <= self.limit


def _open_locked(path: Path, mode: str) -> BinaryIO | None:
    """Open a file that nobody else has open; None if somebody has."""
    try:
        file = open(path, mode)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # it may have been renamed or removed between our open and our lock
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None
