"""Files of folders here and in buckets.

    folder = stage(place)                   # write files here ...
    publish(place, "a.tar", "a.json")       # ... and they are at `place`, in this order, each of them whole

A local folder is written in place, one in a bucket through a local folder that is emptied again.
"""

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from prismer.files import write_together
from prismer.reading import read_bytes
from prismer.storage.objects import describe_object, list_objects, read_object, remove_object, upload_file, write_object
from prismer.storage.places import as_place, inside, kept_folder

# requests of small objects at a time: each waits some 20 ms for its answer
_READERS = 16


def stage(place: str | Path) -> Path:
    """The local folder to write files of `place` in, made if absent; `place` itself if it is local."""
    place = as_place(place)
    folder = place if isinstance(place, Path) else kept_folder("outgoing", place)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(place: str | Path, *names: str) -> None:
    """Upload files of `stage(place)` in this order, and remove them here; nothing for a local place.

    Raises:
        StorageError: if the bucket cannot be written.
    """
    place = as_place(place)
    if isinstance(place, Path):
        return
    folder = stage(place)
    for name in names:
        upload_file(folder / name, inside(place, name))
        (folder / name).unlink()


def list_files(place: str | Path) -> dict[str, int]:
    """The sizes of the files in a folder by their names; {} if there is no such folder."""
    place = as_place(place)
    if isinstance(place, Path):
        found = {}
        for name in sorted(os.listdir(place)) if place.is_dir() else ():
            # another process may rename or remove it
            with suppress(FileNotFoundError):
                status = os.stat(place / name)
                if stat.S_ISREG(status.st_mode):
                    found[name] = status.st_size
        return found
    return {name: size for name, (size, _) in sorted(list_objects(place).items()) if "/" not in name}


def read_file(place: str | Path, name: str) -> bytes:
    """The content of a file of a folder.

    Raises:
        OSError: if it cannot be read; FileNotFoundError if it is absent.
    """
    file = inside(place, name)
    return read_bytes(file) if isinstance(file, Path) else read_object(file)


def read_files(place: str | Path, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """The contents of many small files in the order of `names`; None for one that is absent."""

    def read(name: str) -> tuple[str, bytes | None]:
        try:
            return name, read_file(place, name)
        except FileNotFoundError:
            return name, None

    if isinstance(as_place(place), Path):
        yield from map(read, names)
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        for name in names:
            waiting.append(pool.submit(read, name))
            if len(waiting) > 2 * _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def size_of(place: str | Path, name: str) -> int:
    """The size of a file of a folder.

    Raises:
        FileNotFoundError: if it is absent.
    """
    file = inside(place, name)
    return file.stat().st_size if isinstance(file, Path) else describe_object(file)[0]


def has_file(place: str | Path, name: str) -> bool:
    """Whether a folder holds a small file."""
    try:
        # a bucket that does not exist is told from a file that does not by reading alone
        read_file(place, name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_file(place: str | Path, name: str, data: bytes) -> None:
    """Write a small file of a folder, whole or not at all; several processes may write the same bytes."""
    file = inside(place, name)
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_together(file, data)
    else:
        write_object(file, data)


def remove_file(place: str | Path, name: str) -> None:
    """Remove a file of a folder; one that is absent is no error."""
    file = inside(place, name)
    if isinstance(file, Path):
        file.unlink(missing_ok=True)
    else:
        remove_object(file)
