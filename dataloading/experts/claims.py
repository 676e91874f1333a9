"""Which shards of a labelling job a living process writes, as record locks on one file of the job's folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prismer.errors import InputError

CLAIMS_FILE = ".labelling.lock"
# the byte of `turn`, behind those of all shards
_TURN = 1 << 40


class ShardClaims:
    """The claims of one process: a context manager. Byte k of the file stands for shard k.

    The system releases a claim when its process ends, however that happens. A stopped process keeps its claim, and
    child processes do not inherit it. Claims hold among processes that see the same file: those of one machine, or
    those that share a file system with record locks.

    Args:
        folder: the folder of the file, which is made if absent.
    """

    def __init__(self, folder: Path):
        self._path = folder / CLAIMS_FILE

    def __enter__(self) -> "ShardClaims":
        # kept open to the end: closing any descriptor of the file would release every claim of this process
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Hold the claim on a shard during the block; False if another process holds it.

        Raises:
            ValueError: if the file system has no record locks.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be locked ({error.strerror}); choose a folder on a file system with record locks"
            ) from None
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def is_free(self, shard: int) -> bool:
        """Whether no other process holds the claim on a shard.

        The answer is True for at least one of several processes that ask about a free shard at the same time.
        """
        with self.claim(shard) as free:
            return free

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process is in this block, and enter it."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _TURN)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _TURN)

    def remove_file(self) -> None:
        """Remove the file, once every shard is whole and no claim matters any more."""
        with suppress(FileNotFoundError):
            self._path.unlink()
