"""Folders of images, with captions beside them or without -> records.

Every file found becomes part of a record or is named in `ImageRecords.others`. Only one folder's names are in memory
at a time.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prismer.dataloading.sources.records import DatasetPaths, FilePart, IgnoredFile, ImageRecord, ImageRecords
from prismer.dataloading.store.index import SHARD_FILE
from prismer.errors import InputError
from prismer.reading import RepeatedKeys, decode_text, lines_of, parse_json, printable

# names of images; whether one decodes shows when it is opened
IMAGE_SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .pjpeg .png .apng .webp .bmp .dib .gif .tif .tiff .avif .heic .heif .jxl .jp2 .j2k "
    ".jpx .ppm .pgm .pbm .pnm .tga .ico .mpo".split()
)
# most bytes of a text or JSON beside an image
MAX_TEXT = 2**24
_TOOL_FOLDERS = ("@eaDir", "__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN")
_KEPT = ("url", "licence", "license")


@dataclass
class ImageFolder:
    """The files of one folder that belong to images.

    Attributes:
        path: the folder.
        images: names of the images, in alphabetic order.
        texts: stem of an image -> name of the .txt beside it.
        notes: stem of an image -> name of the .json beside it.
    """

    path: Path
    images: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def folder_records(folder: str | Path, *, labels: str | Path | None = None) -> ImageRecords:
    """A folder of images with all its folders, as img2dataset writes it.

    The caption of `x.jpg` is the first line of `x.txt`, or "caption" of `x.json`; without either the image has none.
    Fields "url" and "licence" of `x.json` are kept. Labels lie in `<labels>/<expert>/<name of folder>/.../x.png`.

    Raises:
        ValueError: if `folder` is not a folder, or `labels` has no folder of an expert.
        OSError: if `folder` may not be read.
    """
    root = Path(folder).absolute()
    paths = DatasetPaths(root.parent, labels, root.name)
    others: list[IgnoredFile] = []
    count = sum(len(found.images) for found in walk_image_folders(root, others))

    def iterate() -> Iterator[ImageRecord]:
        for found in walk_image_folders(root, []):
            inside = found.path.relative_to(root)
            for name in found.images:
                try:
                    meta, fault = _meta_beside(found, _stem(name)), ""
                except (ValueError, OSError, EOFError) as error:
                    meta, fault = {}, str(error)
                yield paths.record((inside / name).as_posix(), meta, fault)

    return ImageRecords(count, iterate, others=others)


def walk_image_folders(root: Path, others: list[IgnoredFile]) -> Iterator[ImageFolder]:
    """The folders with images from `root` downwards, in alphabetic order, a folder before the folders inside it.

    Args:
        root: where to start.
        others: receives everything else: hidden files and folders, folders of tools, datasets that this library wrote,
            folders that cannot be read or lead back to themselves, and files of other kinds.

    Raises:
        ValueError: if `root` is not a folder.
        OSError: if it may not be read.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; name the one that holds the images")

    def ignore(path: Path, reason: str) -> None:
        others.append(IgnoredFile(printable(str(path)), reason))

    # an explicit stack: folders can be nested deeper than Python's
    waiting: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(root, ())]
    while waiting:
        path, above = waiting.pop()
        try:
            status = os.stat(path)
            entries = _list(path)
        except OSError as error:
            if path == root:
                raise
            ignore(path, f"the folder cannot be read ({error.strerror})")
            continue
        place = status.st_dev, status.st_ino
        if place in above:
            ignore(path, "a link to a folder that it lies in")
            continue
        if path != root and _is_dataset(entries):
            ignore(path, "a dataset that this library wrote, not a folder of images; import it by itself")
            continue
        found, folders = ImageFolder(path), []
        for name, is_folder in entries:
            suffix = os.path.splitext(name)[1].lower()
            if _is_hidden(name):
                ignore(path / name, "hidden, or of a tool")
            elif is_folder:
                folders.append((path / name, (*above, place)))
            elif suffix in IMAGE_SUFFIXES:
                found.images.append(name)
            elif suffix in (".txt", ".json"):
                texts = found.texts if suffix == ".txt" else found.notes
                # of x.TXT and x.txt the common spelling counts, which comes later in the order
                if (before := texts.get(_stem(name))) is not None:
                    ignore(path / before, f"{name} is the text of the same image")
                texts[_stem(name)] = name
            else:
                ignore(path / name, "not an image or a text by its name")
        stems = set(map(_stem, found.images))
        for texts in (found.texts, found.notes):
            for stem in sorted(texts.keys() - stems):
                ignore(path / texts.pop(stem), "a text without an image")
        waiting += reversed(folders)
        yield found


def subfolders(root: Path) -> list[str]:
    """The folders in `root` that are searched for images, in alphabetic order.

    Raises:
        OSError: if `root` may not be read.
    """
    folders = [name for name, is_folder in _list(root) if is_folder and not _is_hidden(name)]
    return [name for name in folders if not os.access(root / name, os.R_OK) or not _is_dataset(_list(root / name))]


def count_unnamed(root: Path, named: set[str]) -> list[IgnoredFile]:
    """The images in a folder that a list does not name, as one entry with their number; [] if there are none.

    Args:
        root: the folder.
        named: paths inside `root`.
    """
    count, first = 0, ""
    try:
        for found in walk_image_folders(root, []):
            for name in found.images:
                path = (found.path / name).relative_to(root).as_posix()
                if path not in named:
                    count, first = count + 1, first or path
    except PermissionError:
        # its images may be readable all the same
        reason = "the folder cannot be listed, so images that the list does not name are not counted"
        return [IgnoredFile(printable(str(root)), reason)]
    if not count:
        return []
    reason = f"{count} images that no list names, the first {printable(first)}"
    return [IgnoredFile(printable(str(root)), reason)]


def read_meta(text: bytes | None, notes: bytes | None) -> dict:
    """The meta of an image from the bytes of the .txt and the .json file beside it; None where a file is absent.

    Raises:
        ValueError: if a file is damaged or has another form.
    """
    fields = {} if notes is None else parse_json(notes, "its json", lenient=True)
    if not isinstance(fields, dict) or isinstance(fields, RepeatedKeys):
        raise InputError("its json is not an object, or gives a key twice")
    if text is not None:
        captions = lines_of(decode_text(text, "its caption").strip())[:1]
    else:
        captions = fields.get("caption", fields.get("captions"))
        captions = captions if isinstance(captions, list) else [captions]
        # downloaders write null or "" where a page had no text
        captions = [caption for caption in captions if caption not in (None, "")]
        if not all(isinstance(caption, str) for caption in captions):
            raise InputError("the caption in its json is not a text")
    captions = [caption.strip() for caption in captions if caption.strip()]
    kept = {name: fields[name] for name in _KEPT if fields.get(name) not in (None, "")}
    for name, value in kept.items():
        if not isinstance(value, str | int):
            raise InputError(f"{name!r} in its json is a {type(value).__name__}, not a text")
    return {"captions": captions, **kept}


def _meta_beside(folder: ImageFolder, stem: str) -> dict:
    names = (table.get(stem) for table in (folder.texts, folder.notes))
    return read_meta(*(name and FilePart(folder.path / name).read(MAX_TEXT) for name in names))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _list(path: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of everything in a folder, in alphabetic order."""
    entries = []
    with os.scandir(path) as found:
        for entry in found:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself; opening it names it
                is_folder = False
            entries.append((entry.name, is_folder))
    return sorted(entries)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _TOOL_FOLDERS


def _is_dataset(entries: list[tuple[str, bool]]) -> bool:
    """Whether a folder is a dataset that this library wrote, perhaps the output of this very job."""
    return any(SHARD_FILE.fullmatch(name) for name, _ in entries)
