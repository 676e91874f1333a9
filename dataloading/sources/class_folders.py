"""A folder with one sub-folder of images per class, as ImageNet has it -> records."""

import hashlib
import heapq
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from prismer.dataloading.sources.image_folders import subfolders, walk_image_folders
from prismer.dataloading.sources.records import DatasetPaths, IgnoredFile, ImageRecord, ImageRecords
from prismer.errors import InputError, check_count
from prismer.reading import printable, read_json


def class_records(
    folder: str | Path,
    *,
    classes: str | Path | dict[str, str] | None = None,
    names: str | Path | None = None,
    labels: str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> ImageRecords:
    """A folder with one sub-folder of images per class; `meta["class"]` is the class name.

    Images in deeper folders belong to the class of the outermost sub-folder. Hidden folders and folders of tools are
    not classes.

    Args:
        folder: the images.
        classes: JSON of {sub-folder: name}, {sub-folder: index in `names`}, or a list of names in the alphabetic order
            of the sub-folders, or a dict of names; without it the sub-folders are the names, with "_" read as a blank.
        names: JSON list of class names, if `classes` gives indices.
        labels: the folder that holds `<expert>/<name of folder>/<sub-folder>/<image>.png`.
        shots: images to draw of each class; None takes all. The draw depends on `seed` and on the paths of the images
            inside `folder`, not on their order or content.
        seed: of the draw.

    Raises:
        ValueError: if a list has another form, or does not name every sub-folder, or `shots` is not positive.
        OSError: if `folder` may not be read.
    """
    root = Path(folder).absolute()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; name the one that holds one folder per class")
    others: list[IgnoredFile] = []
    if shots is not None:
        check_count("shots", shots)
    count, folders = 0, subfolders(root)
    table = _class_names(folders, classes, names)
    draw = Draw(shots, seed) if shots is not None else None
    for found in walk_image_folders(root, others):
        beside = [*found.texts.values(), *found.notes.values()]
        if found.path == root:
            loose = [*found.images, *beside]
            others += [IgnoredFile(printable(str(root / name)), "it lies in no class folder") for name in loose]
            continue
        count += len(found.images)
        if draw:
            for name in found.images:
                path = (found.path / name).relative_to(root)
                draw.add(table[path.parts[0]], path.as_posix())
        if beside:
            reason = f"the first of {len(beside)} texts beside images, which an import of classes does not read"
            others.append(IgnoredFile(printable(str(found.path / beside[0])), reason))
    if draw:
        others += draw.others(root, count)
        count = len(draw.chosen)
    paths = DatasetPaths(root.parent, labels, root.name)
    uses = Counter(table.values())
    shared = [f"{name} ({class_name})" for name, class_name in table.items() if uses[class_name] > 1]
    if shared:
        warnings.warn(
            f"{len(shared)} folders of {root} share their class names; folders of one name become one class: "
            f"{printable(', '.join(shared[:6]))}",
            stacklevel=2,
        )

    def iterate() -> Iterator[ImageRecord]:
        for found in walk_image_folders(root, []):
            for name in found.images if found.path != root else ():
                path = (found.path / name).relative_to(root)
                if draw and path.as_posix() not in draw.chosen:
                    continue
                class_name = table[path.parts[0]]
                fault = "" if printable(class_name) == class_name else "its class has no name in UTF-8"
                meta = {} if fault else {"class": class_name}
                yield paths.record(path.as_posix(), meta, fault)

    known = [name for name in dict.fromkeys(table.values()) if printable(name) == name]
    return ImageRecords(count, iterate, known, others)


class Draw:
    """The images of each class whose hashes with a seed are the lowest.

    Args:
        shots: images of each class.
        seed: hashed with the path of each image.
    """

    def __init__(self, shots: int, seed: int):
        self.shots, self.seed = shots, seed
        self._best: dict[str, list[tuple[int, str]]] = {}

    def add(self, class_name: str, path: str) -> None:
        """Let an image take part."""
        digest = hashlib.blake2b(f"{self.seed}/{path}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        # a heap gives its least first: the negative makes that the highest hash
        entry, best = (-int.from_bytes(digest, "big"), path), self._best.setdefault(class_name, [])
        if len(best) < self.shots:
            heapq.heappush(best, entry)
        else:
            heapq.heappushpop(best, entry)

    @cached_property
    def chosen(self) -> set[str]:
        """The paths that are drawn, when all have been added."""
        return {path for best in self._best.values() for _, path in best}

    def others(self, root: Path, count: int) -> list[IgnoredFile]:
        """What the draw left out of `count` images, and the classes that had too few."""
        reason = f"{self.shots} images of each class were drawn with seed {self.seed}"
        found = [IgnoredFile(printable(str(root)), f"{reason}; {count - len(self.chosen)} images are left out")]
        few = [(name, len(best)) for name, best in self._best.items() if len(best) < self.shots]
        if few:
            reason = f"{len(few)} classes have fewer than {self.shots} images, the first {few[0][0]} with {few[0][1]}"
            found.append(IgnoredFile(printable(str(root)), printable(reason)))
        return found


def _class_names(
    folders: list[str], classes: str | Path | dict[str, str] | None, names: str | Path | None
) -> dict[str, str]:
    """Folder -> class name.

    Raises:
        ValueError: if a list has another form or lacks a name.
    """
    # a folder called "_" keeps its name
    table = {name: name.replace("_", " ") if name.strip("_ ") else name for name in folders}
    if classes:
        table = classes if isinstance(classes, dict) else read_json(classes)
    if isinstance(table, list):
        if len(table) != len(folders):
            raise InputError(f"{classes} has {len(table)} names for {len(folders)} folders; name each")
        table = dict(zip(folders, table, strict=True))
    if not isinstance(table, dict):
        raise InputError(
            f"{classes} holds one {type(table).__name__}; expected "
            f"{{folder: name or index}} or a list of names in the order of the folders"
        )
    if names:
        by_index = read_json(names)
        if not isinstance(by_index, list) or not all(map(_is_name, by_index)):
            raise InputError(f'{names} is not a list of class names; expected ["tench", "goldfish", ...]')
        table = {
            name: by_index[index]
            if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(by_index)
            else None
            for name, index in table.items()
        }
    missing = [name for name in folders if not _is_name(table.get(name))]
    if missing:
        some = printable(", ".join(missing[:3]))
        if not classes:
            raise InputError(f"the folder {some} gives no class name; rename it")
        number = isinstance(table.get(missing[0]), int) and not names
        need = "give their names with --names" if number else "name each folder"
        given = "the mapping of ImageNet" if isinstance(classes, dict) else classes
        raise InputError(f"{given} gives no name for {some}; {need}")
    return {name: table[name] for name in folders}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
