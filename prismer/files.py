"""Files that are whole or absent: atomic writes, folders that replace one another, JSON, checksums and locks.

Imports nothing of this library, so that every part of it may write and read through here.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import socket
import stat
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

CHECKSUMS = "checksums.json"
"""File name -> size and crc32, in every folder whose files belong together."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
_RESTORE = "restore it from a copy"


# errors of the machine


def is_disk_failure(error: BaseException) -> bool:
    """Whether a disk is full, over quota or broken: the machine's fault and not that of an argument."""
    return isinstance(error, OSError) and error.errno in _FULL


def sentence(error: OSError) -> str:
    """One sentence for an error of the operating system."""
    what = f"{error.filename} cannot be used" if error.filename else "a file cannot be used"
    remedy = "free some space and give the command again" if is_disk_failure(error) else "check the path"
    return f"{what}: {error.strerror or error}; {remedy}"


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
    """
    folder = Path(folder)
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


# reading JSON


def parse_json(data: bytes | str, source: str | Path, remedy: str = _RESTORE):
    """The value of strict JSON in UTF-8: no number that is not finite, no name twice in an object.

    A byte-order mark, which some editors write, means nothing.

    Raises:
        ValueError: if it is something else; the sentence names `source` and gives `remedy`.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_number
        )
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not text; {remedy}") from None
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}); {remedy}") from None


def read_json(path: str | Path, kind: type | None = None, remedy: str = _RESTORE):
    """Read a JSON file, as `parse_json` does.

    Args:
        kind: dict, list, ...: what the value must be; None takes any.
        remedy: what the sentence of an error advises.

    Raises:
        ValueError: if the file is absent, is no file, or holds something else.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            # reading a pipe may wait for ever
            raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no ordinary file'}; {remedy}")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    value = parse_json(data, path, remedy)
    if kind is not None and type(value) is not kind:
        found = _KINDS.get(type(value), "null")
        raise ValueError(f"{path} holds {found}, not {_KINDS[kind]}; {remedy}")
    return value


def is_text(value: str) -> bool:
    """Whether `value` can be written as UTF-8; JSON may smuggle in half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin!r} stands twice in an object")
    return found


def _constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


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
