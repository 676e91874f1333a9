"""Files that are whole or absent: atomic writes, folders that replace one another, checksums and locks.

This file imports only the ground floor, so that every part of the library may use it.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from prismer.errors import InputError
from prismer.reading import read_json

# file name -> size and crc32, in every folder whose files belong together
CHECKSUMS = "checksums.json"
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# errors of the operating system


def is_disk_failure(error: BaseException) -> bool:
    """Whether `error` means that a disk is full, over quota or broken."""
    return _number_of(error) in _DISK_FAILURES


def sentence(error: BaseException) -> str:
    """One sentence for the user about an error of the operating system."""
    name = getattr(error, "filename", None)
    if is_disk_failure(error):
        what = os.strerror(_number_of(error))
        return f"{name or 'output'} cannot be written: {what}; free some space and give the command again"
    return f"{name or 'a file'} cannot be used: {getattr(error, 'strerror', None) or error}; check the path"


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors has the number in its message
    said = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(said[1]) if said else None


def check_free_space(folder: Path, size: int) -> None:
    """Raise the error of a full disk, with the name of `folder`, unless the disk has `size` bytes left."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def add_name(error: BaseException, path: Path) -> None:
    """Set the file name of `error`, which a failed write or fsync does not have."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


# writing


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; after the block the new file replaces `path`.

    A reader sees the old file or the new one, even after a power cut. If the block fails, the old file stays and the
    temporary one is removed.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException as error:
        add_name(error, path)
        # the first error is the one to report
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`; a reader sees the old file or the new one, even after a power cut."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_together(path: Path, data: bytes | Iterable[bytes]) -> None:
    """`write_atomically` for a file that several processes may write at the same time, with the same bytes.

    Args:
        path: the file.
        data: its content, or the pieces of it, for content that need not fit into memory.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            moved = not os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
        except FileNotFoundError:
            moved = True
        if moved and path.exists():
            # another process has put the same bytes in place
            return
        if moved:
            # the other process failed and removed its file
            return write_together(path, data)
        try:
            file.truncate(0)
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            # under the lock, so that the file is ours
            partial.unlink(missing_ok=True)
            raise
    sync(path.parent)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path` as indented JSON, as `write_atomically` does.

    Raises:
        ValueError: if a number in `value` is not finite.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        raise InputError(f"{path} would hold a number that is not finite; the file was not changed") from None
    write_atomically(path, (text + "\n").encode())


def sync(path: str | Path) -> None:
    """Write the content of a file, or the renames in a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; after the block it replaces `folder`.

    If the block fails, the old folder stays and the temporary one is removed.

    Raises:
        ValueError: if `folder` exists and is not a folder: a file, a device or a broken link.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder} exists and is not a folder; give another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
        os.chmod(aside, 0o755)
        replace_folder(aside, folder)
    except BaseException as error:
        add_name(error, folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, folder: Path) -> None:
    """Rename the finished folder `aside` to `folder`, then remove the old `folder`.

    After a crash between the two renames `earlier_folder` finds the old one.
    """
    old = _set_aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        aside.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def earlier_folder(folder: Path) -> Path | None:
    """The only copy of `folder` after an interrupted `replace_folder`; None if it was not interrupted."""
    old = _set_aside(folder)
    return old if folder.name and old.is_dir() and not folder.exists() else None


def _set_aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}-old"


# checksums


def _crc32_of(path: str | Path) -> int:
    """The crc32 of a file's content."""
    crc, buffer = 0, memoryview(bytearray(1 << 22))
    with open(path, "rb") as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return crc


def write_checksums(folder: str | Path, known: Mapping[str, int] | None = None) -> None:
    """Write checksums.json with the size and crc32 of every file in `folder`, after syncing each file.

    Args:
        known: file name -> crc32, for files whose content need not be read again.
    """
    known, sums = known or {}, {}
    for path in sorted(Path(folder).iterdir()):
        if path.name != CHECKSUMS:
            sync(path)
            crc = known[path.name] if path.name in known else _crc32_of(path)
            sums[path.name] = dict(size=path.stat().st_size, crc32=f"{crc:08x}")
    write_json(Path(folder) / CHECKSUMS, sums)


def find_damage(folder: str | Path, names: Iterable[str] | None = None) -> str | None:
    """The first file of `folder` that differs from its checksum; None if none does, or if there are no checksums.

    Args:
        names: the files to check; None checks every file that has a checksum, missing ones too.

    Raises:
        ValueError: if the checksums themselves are damaged.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).exists():
        return None
    sums = read_json(folder / CHECKSUMS, dict, "restore it, or delete it to go on without checksums")
    for name in sums if names is None else names:
        if name not in sums:
            continue
        entry, path = sums[name], folder / name
        if not isinstance(entry, dict) or set(entry) != {"size", "crc32"}:
            raise InputError(
                f"{folder / CHECKSUMS} is damaged (entry {name!r}); restore it, or delete it to go on without checksums"
            )
        if not path.is_file():
            return name
        if path.stat().st_size != entry["size"] or f"{_crc32_of(path):08x}" != entry["crc32"]:
            return name
    return None


# locks


@contextmanager
def waiting_lock(path: str | Path) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if absent; wait while another process holds it."""
    with open(path, "a") as file:
        # where the file system has no locks, two processes may do the same work, each to its end
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def take_lock(path: str | Path) -> IO[str]:
    """Create `path` if needed, and lock it until this process ends or the returned file is closed.

    It is a POSIX lock: the system releases it however the process ends, and child processes do not inherit it. If the
    file system has no locks, a warning says so.

    Raises:
        ValueError: if another process holds the lock; the sentence names that process.
    """
    path = Path(path)
    # append mode: a failed attempt must not erase the name of the process that holds the lock
    file = open(path, "a+", encoding="utf-8", errors="replace")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}); take care that nobody else uses {path.parent}",
                stacklevel=2,
            )
            return file
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "another process"
        file.close()
        raise InputError(f"{path.parent} is in use by {holder}; wait for it, or end it first") from None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        add_name(error, path)
        raise
    return file
