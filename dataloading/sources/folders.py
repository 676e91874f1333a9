"""Folders of images -> Records: with captions beside them, or one folder per class.

Every file that is found becomes a record or is named in `Records.others`. One folder's names are in memory at a time.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prismer.dataloading.sources.record import Other, Place, Record, Records, Source
from prismer.dataloading.store.index import SHARD_FILE
from prismer.reading import RepeatedKeys, decode_text, lines_of, parse_json, printable, read_json

IMAGE_SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .pjpeg .png .apng .webp .bmp .dib .gif .tif .tiff .avif .heic .heif .jxl .jp2 .j2k "
    ".jpx .ppm .pgm .pbm .pnm .tga .ico .mpo".split()
)
"""What an image is called; whether it can be decoded shows when it is opened."""
MAX_TEXT = 2**24
"""Most bytes of a text or JSON beside an image."""
_TOOL_FOLDERS = ("@eaDir", "__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN")
_KEPT = ("url", "licence", "license")


@dataclass
class Folder:
    """One folder: names of its images in order, and of the texts beside them, by what stands before the suffix."""

    path: Path
    images: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def folder_records(folder: str | Path, *, labels: str | Path | None = None) -> Records:
    """A folder of images and all folders in it, as img2dataset writes it.

    The caption of `x.jpg` is the first line of `x.txt`, or "caption" of `x.json`; without either the image has none.
    Fields "url" and "licence" of `x.json` are kept. Labels lie in `<labels>/<expert>/<name of folder>/.../x.png`.

    Raises:
        ValueError: if `folder` is none, or `labels` holds no expert's.
        OSError: if it may not be read.
    """
    root = Path(folder).absolute()
    place = Place(root.parent, labels, root.name)
    others: list[Other] = []
    count = sum(len(found.images) for found in walk(root, others))

    def iterate() -> Iterator[Record]:
        for found in walk(root, []):
            for name in found.images:
                try:
                    meta, fault = _text_beside(found, _stem(name)), ""
                except (ValueError, OSError, EOFError) as error:
                    meta, fault = {}, str(error)
                yield place.record((found.path / name).relative_to(root).as_posix(), meta, fault)

    return Records(count, iterate, others=others)


def class_records(
    folder: str | Path,
    *,
    classes: str | Path | None = None,
    names: str | Path | None = None,
    labels: str | Path | None = None,
) -> Records:
    """A folder with one sub-folder of images per class, as ImageNet has it; `meta["class"]` is the class name.

    Images in deeper folders are of the class of the outermost. Hidden folders and those of tools are no classes.

    Args:
        classes: JSON of {sub-folder: name}, {sub-folder: index in `names`}, or a list of names in the alphabetic order
            of the sub-folders; without it the sub-folders are the names, "_" read as a blank.
        names: JSON list of class names, where `classes` gives indices.
        labels: the folder that holds `<expert>/<name of folder>/<sub-folder>/<image>.png`.

    Raises:
        ValueError: if a list is of another form, or does not name every sub-folder.
        OSError: if `folder` may not be read.
    """
    root = Path(folder).absolute()
    others: list[Other] = []
    count, folders = 0, _class_folders(root)
    for found in walk(root, others):
        if found.path == root:
            # what lies here is of no class
            loose = [*found.images, *found.texts.values(), *found.notes.values()]
            others += [Other(printable(str(root / x)), "it lies in no class folder") for x in loose]
            continue
        count += len(found.images)
        beside = [*found.texts.values(), *found.notes.values()]
        if beside:
            reason = f"the first of {len(beside)} texts beside images, which an import of classes does not read"
            others.append(Other(printable(str(found.path / beside[0])), reason))
    table = _class_names(folders, classes, names)
    place = Place(root.parent, labels, root.name)
    uses = Counter(table.values())
    shared = [f"{name} ({of_class})" for name, of_class in table.items() if uses[of_class] > 1]
    if shared:
        warnings.warn(
            f"{len(shared)} folders of {root} share their class names and become one class where they do: "
            f"{printable(', '.join(shared[:6]))}",
            stacklevel=2,
        )

    def iterate() -> Iterator[Record]:
        for found in walk(root, []):
            for name in found.images if found.path != root else ():
                path = (found.path / name).relative_to(root)
                of_class = table[path.parts[0]]
                fault = "" if printable(of_class) == of_class else "its class has no name in UTF-8"
                meta = {} if fault else {"class": of_class}
                yield place.record(path.as_posix(), meta, fault)

    known = [name for name in dict.fromkeys(table.values()) if printable(name) == name]
    return Records(count, iterate, known, others)


def walk(root: Path, others: list[Other]) -> Iterator[Folder]:
    """The folders with images from `root` downwards, in alphabetic order, the images of a folder before its folders.

    Args:
        others: gets what is no image and no text beside one: hidden files and folders, folders of tools, datasets of
            ours, folders that cannot be read or lead back to themselves, and files of other kinds.

    Raises:
        ValueError: if `root` is no folder.
        OSError: if it may not be read.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the one that holds the images")

    def leave(path: Path, reason: str) -> None:
        others.append(Other(printable(str(path)), reason))

    # a stack of our own: folders can be nested deeper than Python's
    waiting: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(root, ())]
    while waiting:
        path, above = waiting.pop()
        try:
            status = os.stat(path)
            entries = _list(path)
        except OSError as error:
            if path == root:
                raise
            leave(path, f"the folder cannot be read ({error.strerror})")
            continue
        place = status.st_dev, status.st_ino
        if place in above:
            leave(path, "a link to a folder that it lies in")
            continue
        if path != root and _is_ours(entries):
            leave(path, "a dataset of ours, not a folder of images; import it by itself")
            continue
        found, folders = Folder(path), []
        for name, is_folder in entries:
            suffix = os.path.splitext(name)[1].lower()
            if _is_left_alone(name):
                leave(path / name, "hidden, or of a tool")
            elif is_folder:
                folders.append((path / name, (*above, place)))
            elif suffix in IMAGE_SUFFIXES:
                found.images.append(name)
            elif suffix in (".txt", ".json"):
                texts = found.texts if suffix == ".txt" else found.notes
                # of x.TXT and x.txt, which comes later, the common spelling counts
                if (before := texts.get(_stem(name))) is not None:
                    leave(path / before, f"{name} is the text of the same image")
                texts[_stem(name)] = name
            else:
                leave(path / name, "not an image or a text by its name")
        stems = set(map(_stem, found.images))
        for texts in (found.texts, found.notes):
            for stem in sorted(texts.keys() - stems):
                leave(path / texts.pop(stem), "a text without an image")
        waiting += reversed(folders)
        yield found


def count_unnamed(root: Path, named: set[str]) -> list[Other]:
    """The images in a folder that a list does not name, as one `Other` with their number; [] if there are none.

    Args:
        named: paths inside `root`.
    """
    count, first = 0, ""
    try:
        for found in walk(root, []):
            for name in found.images:
                path = (found.path / name).relative_to(root).as_posix()
                if path not in named:
                    count, first = count + 1, first or path
    except PermissionError:
        # its images may be readable all the same
        reason = "the folder cannot be listed, so nobody knows what the list does not name"
        return [Other(printable(str(root)), reason)]
    if not count:
        return []
    reason = f"{count} images that no list names, the first {printable(first)}"
    return [Other(printable(str(root)), reason)]


def texts_of(text: bytes | None, notes: bytes | None) -> dict:
    """The meta of an image from the bytes of the .txt and the .json file beside it.

    Raises:
        ValueError: if one is damaged or of another form.
    """
    fields = {} if notes is None else parse_json(notes, "its json", lenient=True)
    if not isinstance(fields, dict) or isinstance(fields, RepeatedKeys):
        raise ValueError("its json is not an object, or gives a key twice")
    if text is not None:
        captions = lines_of(decode_text(text, "its caption").strip())[:1]
    else:
        captions = fields.get("caption", fields.get("captions"))
        captions = captions if isinstance(captions, list) else [captions]
        # downloaders write null or "" where a page had no text
        captions = [caption for caption in captions if caption not in (None, "")]
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError("the caption in its json is not a text")
    captions = [caption.strip() for caption in captions if caption.strip()]
    kept = {name: fields[name] for name in _KEPT if fields.get(name) not in (None, "")}
    for name, value in kept.items():
        if not isinstance(value, str | int):
            raise ValueError(f"{name!r} in its json is a {type(value).__name__}, not a text")
    return {"captions": captions, **kept}


def _text_beside(folder: Folder, stem: str) -> dict:
    found = (table.get(stem) for table in (folder.texts, folder.notes))
    return texts_of(*(name and Source(folder.path / name).read(MAX_TEXT) for name in found))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _list(path: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies in a folder, in alphabetic order."""
    entries = []
    with os.scandir(path) as found:
        for entry in found:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself; whoever opens it says so
                is_folder = False
            entries.append((entry.name, is_folder))
    return sorted(entries)


def _is_left_alone(name: str) -> bool:
    return name.startswith(".") or name in _TOOL_FOLDERS


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the one that holds one folder per class")
    folders = [name for name, is_folder in _list(root) if is_folder and not _is_left_alone(name)]
    return [name for name in folders if not os.access(root / name, os.R_OK) or not _is_ours(_list(root / name))]


def _is_ours(entries: list[tuple[str, bool]]) -> bool:
    """Whether a folder is a dataset that this library writes, perhaps the very one of this job."""
    return any(SHARD_FILE.fullmatch(name) for name, _ in entries)


def _class_names(folders: list[str], classes: str | Path | None, names: str | Path | None) -> dict[str, str]:
    """Folder -> class name.

    Raises:
        ValueError: if a list is of another form or lacks a name.
    """
    # a folder called "_" keeps its name
    table = {name: name.replace("_", " ") if name.strip("_ ") else name for name in folders}
    if classes:
        table = read_json(classes)
    if isinstance(table, list):
        if len(table) != len(folders):
            raise ValueError(f"{classes} has {len(table)} names for {len(folders)} folders; name each")
        table = dict(zip(folders, table, strict=True))
    if not isinstance(table, dict):
        raise ValueError(
            f"{classes} holds one {type(table).__name__}; expected "
            f"{{folder: name or index}} or a list of names in the order of the folders"
        )
    if names:
        by_index = read_json(names)
        if not isinstance(by_index, list) or not all(map(_is_name, by_index)):
            raise ValueError(f'{names} is not a list of class names; expected ["tench", "goldfish", ...]')
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
            raise ValueError(f"the folder {some} gives no class name; rename it")
        number = isinstance(table.get(missing[0]), int) and not names
        need = "give their names with --names" if number else "name each folder"
        raise ValueError(f"{classes} gives no name for {some}; {need}")
    return {name: table[name] for name in folders}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
