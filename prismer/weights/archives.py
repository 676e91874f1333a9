"""Unpack a model that a hub repository holds as one archive: its known files, by names of our own.

A member's path decides nothing but which model it belongs to: it is written under its bare file name, and only if
that is a file that a model folder has. Links, devices and paths that leave the archive are refused.
"""

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from prismer.errors import InputError, listed, shown
from prismer.files import check_free_space, replacing, sync, waiting_lock

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
# what damage makes the readers of archives raise; a zip that needs a password raises RuntimeError
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, RuntimeError),
)


@dataclass(frozen=True)
class _Member:
    """A file in an archive.

    Attributes:
        path: inside the archive.
        size: unpacked, in bytes.
        is_file: False for links, devices and the like.
        open: opens it for reading.
    """

    path: PurePosixPath
    size: int
    is_file: bool
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, name: str, wanted: Iterable[str], weights: Iterable[str]) -> None:
    """Unpack the files of one model into `folder`, which appears whole or not at all.

    An interrupted unpacking goes on where it stopped when it is repeated.

    Args:
        archive: a zip or tar file.
        folder: nothing is done if it exists.
        name: of the model; it chooses the folder in an archive that holds several models.
        wanted: names of the files to unpack.
        weights: those names of which the model must have one.

    Raises:
        ValueError: if the archive is damaged or unsafe, or holds no model or several.
        OSError: if the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(exist_ok=True)
        try:
            with _opened(archive) as members:
                chosen = _choose(members, archive, name, set(wanted), set(weights))
                # `replacing` leaves whole files only
                left = [member for member in chosen if not (partial / member.path.name).is_file()]
                check_free_space(partial, sum(member.size for member in left))
                for member in left:
                    _write(member, partial / member.path.name)
        except _DAMAGE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise InputError(
                f"the archive {archive.resolve()} is damaged ({reason}); delete it and fetch the model again"
            ) from None
        os.replace(partial, folder)
        sync(folder.parent)


def _write(member: _Member, path: Path) -> None:
    with replacing(path) as new, member.open() as source, open(new, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


@contextmanager
def _opened(archive: Path) -> Iterator[list[_Member]]:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            yield [
                _Member(
                    PurePosixPath(info.filename),
                    info.file_size,
                    # archives of other systems store no mode
                    stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG),
                    lambda info=info: file.open(info),
                )
                for info in file.infolist()
                if not info.is_dir()
            ]
        return
    with tarfile.open(archive) as file:
        members = [
            _Member(PurePosixPath(info.name), info.size, info.isreg(), lambda info=info: file.extractfile(info))
            for info in file.getmembers()
            if not info.isdir()
        ]
        # gzip compares its checksum at the end, which tarfile does not read
        while file.fileobj.read(1 << 20):
            pass
        yield members


def _choose(members: list[_Member], archive: Path, name: str, wanted: set[str], weights: set[str]) -> list[_Member]:
    """The members to unpack: the known files in the one folder of the archive that holds the model's weights."""
    for member in members:
        if member.path.is_absolute() or ".." in member.path.parts:
            raise InputError(
                f"the archive {archive} holds {shown(str(member.path))}, a path outside it; do not trust it, and get "
                f"the model elsewhere"
            )
    folders = {member.path.parent for member in members if member.path.name in weights}
    if len(folders) > 1:
        folders = {folder for folder in folders if folder.name == name}
    if len(folders) != 1:
        held = listed(member.path.name for member in members) or "nothing"
        raise InputError(f"the archive {archive} holds no single model {name} ({held}); give the folder of a model")
    (folder,) = folders
    chosen = [member for member in members if member.path.parent == folder and member.path.name in wanted]
    for member in chosen:
        if not member.is_file:
            raise InputError(
                f"the archive {archive} holds {member.path} as a link or a device; get one that holds the file itself"
            )
    return chosen
