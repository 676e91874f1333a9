"""Folders that are moved as a whole between a bucket and this machine: models and runs."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prismer.files import CHECKSUMS, check_free_space, new_folder, replacing, waiting_lock, write_json
from prismer.reading import read_json
from prismer.storage.objects import describe_object, download_object, list_objects, remove_object, upload_file
from prismer.storage.places import as_place, inside, kept_folder

# name of a file -> [size, time of change, version in the bucket] when both places held the same
_RECORD = ".mirrored.json"
_LOCK = ".mirror.lock"


@contextmanager
def new_place(place: str | Path, last: str) -> Iterator[Path]:
    """`files.new_folder` for a folder anywhere: after the block, the files of the yielded folder replace those there.

    Args:
        place: a folder or a URL.
        last: the file that is uploaded after all others, so that a reader can tell that they belong together.
    """
    place = as_place(place)
    if isinstance(place, Path):
        with new_folder(place) as aside:
            yield aside
        return
    folder = kept_folder("outgoing", place)
    try:
        with new_folder(folder) as aside:
            yield aside
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == last, name))
        for name in names:
            upload_file(folder / name, inside(place, name))
        for name in set(list_objects(place)) - set(names):
            remove_object(inside(place, name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch_folder(url: str, names: Iterable[str]) -> Path:
    """A folder of this machine with those of the files `names` that the folder `url` holds.

    A file that is here and has not changed there is not fetched again.
    """
    folder = kept_folder("models", url)
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder / _LOCK):
        record = _read_record(folder)
        for name in names:
            try:
                size, version = describe_object(inside(url, name))
            except FileNotFoundError:
                (folder / name).unlink(missing_ok=True)
                record.pop(name, None)
                continue
            if record.get(name) != [*_state(folder / name), version]:
                _fetch_file(inside(url, name), folder / name, size)
                record[name] = [*_state(folder / name), version]
                write_json(folder / _RECORD, record)
    return folder


class Mirror:
    """A folder of this machine whose content is copied to a bucket, and back on another machine.

    Args:
        url: the folder in the bucket.
        kind: what it holds, see `kept_folder`.
        last: the file that is copied after all others; it says which of them belong together.

    Attributes:
        folder: here.
    """

    def __init__(self, url: str, *, kind: str, last: str):
        self.url, self.last = url, last
        self.folder = kept_folder(kind, url)

    def names(self) -> set[str]:
        """What the bucket holds: files and folders, without what is in the folders."""
        return {name.partition("/")[0] for name in list_objects(self.url)}

    def reconcile(self) -> None:
        """Make both places equal: the bucket has the later state, unless nobody wrote it since this machine did."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = list_objects(self.url).get(self.last, (0, None))[1]
        here = _read_record(self.folder).get(self.last, [0, 0, None])[2]
        if there == here:
            self.push()
        else:
            self.pull(exact=True)

    def push(self) -> None:
        """Upload what has changed here, then remove from the bucket what is not here."""
        with waiting_lock(self.folder / _LOCK):
            record, there = _read_record(self.folder), list_objects(self.url)
            here = {name: _state(self.folder / name) for name in self._files()}
            changed = [
                name
                for name, state in here.items()
                if name not in there or record.get(name) != [*state, there[name][1]]
            ]
            # nothing but what was copied from here is removed
            gone = [name for name in record if name in there and name not in here]
            if not changed and not gone:
                return
            for name in self._in_order(changed):
                upload_file(self.folder / name, inside(self.url, name))
            for name in gone:
                remove_object(inside(self.url, name))
            there = list_objects(self.url)
            record = {name: [*state, there[name][1]] for name, state in here.items() if name in there}
            write_json(self.folder / _RECORD, record)

    def pull(self, exact: bool = False) -> None:
        """Fetch what has changed in the bucket.

        Args:
            exact: also remove what is not there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with waiting_lock(self.folder / _LOCK):
            record, there = _read_record(self.folder), list_objects(self.url)
            for name in self._in_order(there):
                size, version = there[name]
                target = self.folder / name
                if record.get(name) != [*_state(target), version]:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _fetch_file(inside(self.url, name), target, size)
                    record[name] = [*_state(target), version]
                    write_json(self.folder / _RECORD, record)
            if exact:
                for name in set(self._files()) - set(there):
                    (self.folder / name).unlink()
                    # a checkpoint that lost its files is none
                    with suppress(OSError):
                        (self.folder / name).parent.rmdir()

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """The checksums of a folder come after its files, which are incomplete without them."""
        return sorted(names, key=lambda name: (name == self.last, Path(name).name == CHECKSUMS, name))

    def _files(self) -> list[str]:
        """The names of the files here, but for hidden ones and those that are being written."""
        found = []
        for root, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".partial")]
            kept = (name for name in files if not name.startswith(".") and not name.endswith(".partial"))
            found += [str((Path(root) / name).relative_to(self.folder)) for name in kept]
        return sorted(found)


def _fetch_file(url: str, target: Path, size: int) -> None:
    check_free_space(target.parent, size)
    with replacing(target) as partial, open(partial, "wb") as file:
        for _ in download_object(url, file, size):
            pass


def _state(path: Path) -> list[int]:
    """The size of a file and the time of its last change; [] if it is absent."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _read_record(folder: Path) -> dict[str, list]:
    file = folder / _RECORD
    return read_json(file, dict, "delete it") if file.exists() else {}
