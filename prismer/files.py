"""Files that are whole or absent: atomic writes, folders that replace one another, checksums and locks.

Imports only `reading.py` of this library, so that every part of it may write through here.
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

from prismer.reading import read_json

CHECKSUMS = "checksums.json"
"""File name -> size and crc32, in every folder whose files belong together."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# errors of the machine


def is_disk_failure(error: BaseException) -> bool:
    """Whether a disk is full, over quota or broken: the machine's fault and not that of an argument."""
    return _number_of(error) in _FULL


def sentence(error: BaseException) -> str:
    """One sentence for an error of the operating system, or of a library that met one."""
    name = getattr(error, "filename", None)
    if is_disk_failure(error):
        what = os.strerror(_number_of(error))
        return f"{name or 'output'} cannot be written: {what}; free some space and give the command again"
    return f"{name or 'a file'} cannot be used: {getattr(error, 'strerror', None) or error}; check the path"


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors has it in words
    said = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(said[1]) if said else None


def add_name(error: BaseException, path: Path) -> None:
    """Note in `error` which file it is about; a failed write or fsync does not know."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


# writing


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; after the block it is on the disk, in the place of `path`.

    A reader sees the old file or the new one, even after a power cut. If the block fails, the old one stays and
    nothing is left beside it.
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
        # the first error is the one to tell
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, even after a power cut."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | Path, value) -> None:
    """Replace `path` by `value` as indented JSON, as `write_atomically` does.

    Raises:
        ValueError: if a number in it is not finite.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        raise ValueError(f"{path} would hold a number that is not finite; it is left as it was") from None
    write_atomically(path, (text + "\n").encode())


def sync(path: str | Path) -> None:
    """Make the content of a file, or the renames in a folder, last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to fill; after the block it stands in the place of `folder`.

    If the block fails, the old folder stays as it was and nothing is left beside it.

    Raises:
        ValueError: if something else than a folder has that name: a file, a device, a link to nowhere.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is there and is no folder; give another name")
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
    """Put the finished folder `aside` in the place of `folder`; the old one goes only after the new one is there.

    A crash between the two renames leaves the old one as `earlier_folder` finds it.
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
    """Where an interrupted `replace_folder` left the only copy of `folder`; None if it was not interrupted."""
    old = _set_aside(folder)
    return old if folder.name and old.is_dir() and not folder.exists() else None


def _set_aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}-old"


# checksums


def crc32_of(path: str | Path) -> int:
    """The crc32 of a file's content."""
    crc, room = 0, memoryview(bytearray(1 << 22))
    with open(path, "rb") as file:
        while count := file.readinto(room):
            crc = zlib.crc32(room[:count], crc)
    return crc


def write_checksums(folder: str | Path, known: Mapping[str, int] | None = None) -> None:
    """Note size and crc32 of every file of `folder`, and make them all last.

    Args:
        known: file name -> crc32, of files whose content need not be read again.
    """
    known, sums = known or {}, {}
    for path in sorted(Path(folder).iterdir()):
        if path.name != CHECKSUMS:
            sync(path)
            crc = known[path.name] if path.name in known else crc32_of(path)
            sums[path.name] = dict(size=path.stat().st_size, crc32=f"{crc:08x}")
    write_json(Path(folder) / CHECKSUMS, sums)


def find_damage(folder: str | Path, names: Iterable[str] | None = None) -> str | None:
    """The first file of `folder` that is not what was written; None if all are, or if no checksums are there.

    Args:
        names: the files to look at; None takes all that have a checksum, and misses those that are gone.

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
            raise ValueError(
                f"{folder / CHECKSUMS} is damaged (entry {name!r}); restore it, or delete it to go on without checksums"
            )
        if not path.is_file():
            return name
        if path.stat().st_size != entry["size"] or f"{crc32_of(path):08x}" != entry["crc32"]:
            return name
    return None


# locks


def take_lock(path: str | Path) -> IO[str]:
    """Lock `path`, which is made if needed, until this process ends or the returned file is closed.

    A lock of POSIX: the system frees it however the process ends, and children do not inherit it. Where the file
    system knows no locks, a warning says so.

    Raises:
        ValueError: if another process holds it; the sentence says which.
    """
    path = Path(path)
    # opened for appending: the note of the holder must survive a failed attempt
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
        raise ValueError(f"{path.parent} is in use by {holder}; wait for it, or end it first") from None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        add_name(error, path)
        raise
    return file
