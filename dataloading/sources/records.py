"""Records: where each image of a dataset, its labels and its texts lie; nothing is opened yet."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prismer.dataloading.store.index import MAX_KEY
from prismer.errors import InputError
from prismer.experts import EXPERTS
from prismer.reading import read_bytes

# a sparse file with the name of an image can promise more than any memory holds
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class FilePart:
    """A file, or a part of one (a member of a tar).

    Attributes:
        path: the file.
        offset: first byte.
        size: number of bytes; -1 for all.
    """

    path: Path
    offset: int = 0
    size: int = -1

    def read(self, limit: int = _MAX_BYTES) -> bytes:
        """The bytes, at most `limit`.

        Raises:
            OSError: if the file cannot be read, is a pipe or the like, or holds more than `limit`.
            EOFError: if it ends too early.
        """
        return read_bytes(self.path, self.offset, self.size, limit)


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image that a source holds in memory.

    Attributes:
        path: its name in reports.
        data: the encoded image.
    """

    path: Path
    data: bytes

    def read(self, limit: int = _MAX_BYTES) -> bytes:
        """The bytes.

        Raises:
            OSError: if they are more than `limit`.
        """
        if len(self.data) > limit:
            raise OSError(f"{len(self.data)} bytes are more than {limit} can be")
        return self.data


@dataclass(frozen=True)
class ImageRecord:
    """One image to import.

    Attributes:
        key: its key in the shards.
        image: its encoded bytes; None if `fault` says why there is no image.
        meta: captions, questions or class of the image, as in a sample's JSON.
        label_files: expert -> PNG in the published layout, for experts that have a folder; files may be absent.
        packed: the `KEY.labels` member of a tar that this library wrote.
        fault: why the image cannot be imported, if that is known before it is opened.
        name: of the image in reports, if the path of `image` does not tell it.
    """

    key: str
    image: FilePart | ImageBytes | None
    meta: dict = field(default_factory=dict)
    label_files: dict[str, Path] = field(default_factory=dict)
    packed: FilePart | None = None
    fault: str = ""
    name: str = ""


@dataclass(frozen=True)
class IgnoredFile:
    """Something in a source that is not an image to import.

    Attributes:
        file: its path; it may be a folder, or stand for several files.
        reason: why it is ignored.
    """

    file: str
    reason: str


@dataclass(frozen=True)
class ImageRecords:
    """All records of a source; they can be iterated again and again.

    Attributes:
        count: number of records; None if only the end of a stream tells it.
        iterate: starts a pass over the records.
        class_names: all classes of a dataset for classification, those without an image included.
        others: what else the source holds: every file is part of a record or named here.
        part: the records at the positions of a range, without a pass over those before it; the second range is read
            next. None if there is no such way.
        outlines: starts a pass over the records without their texts, if that takes less than a whole one; else None.
    """

    count: int | None
    iterate: Callable[[], Iterator[ImageRecord]]
    class_names: list[str] = field(default_factory=list)
    others: list[IgnoredFile] = field(default_factory=list)
    part: Callable[[range, range], Iterator[ImageRecord]] | None = None
    outlines: Callable[[], Iterator[ImageRecord]] | None = None

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the number of records is not known before their end")
        return self.count

    def __iter__(self) -> Iterator[ImageRecord]:
        return self.iterate()


def safe_key(name: str) -> str:
    """A shard key from a path without its suffix: "/" becomes "--"; names with other characters get a short hash.

    Different names give different keys, and a name gives the same key on every run. A name may hold lone surrogates,
    which stand for the bytes of a file name that is not UTF-8.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name.replace("/", "--"))
    if re.fullmatch(r"[A-Za-z0-9_]+([-/][A-Za-z0-9_]+)*", name) and len(key) <= MAX_KEY:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{key[: MAX_KEY - 11]}-{digest[:10]}"


class DatasetPaths:
    """The folders of one dataset's images and label maps.

    Args:
        images: the folder that holds `<dataset>/<image>` or `<image>`.
        labels: the folder that holds `<expert>/<dataset>/<image>.png`; None if there are no labels.
        dataset: name of the dataset folder.

    Attributes:
        images: the folder that holds `<image>`.
        labels: expert -> folder that holds `<image>.png`.

    Raises:
        ValueError: if `images` is not a folder, or `labels` has no folder of an expert.
    """

    def __init__(self, images: str | Path, labels: str | Path | None, dataset: str):
        inside = Path(images) / dataset
        self.images = inside if inside.is_dir() else Path(images)
        if not self.images.is_dir():
            raise InputError(f"{images} is not a folder; name the one that holds the images")
        self.labels: dict[str, Path] = {}
        if labels is not None:
            for name, expert in EXPERTS.items():
                for folder in expert.folders or (name,):
                    if (Path(labels) / folder).is_dir():
                        self.labels.setdefault(name, Path(labels) / folder / dataset)
            if not self.labels:
                raise InputError(f"{labels} has no folder of any expert; name the one that holds depth, normal, ...")

    def record(self, image: str, meta: dict, fault: str = "", file: Path | None = None) -> ImageRecord:
        """The record of one image.

        Args:
            image: its path inside the dataset folder, which gives its key and its labels.
            meta, fault: as in ImageRecord.
            file: where it lies, if not there.
        """
        stem = str(Path(image).with_suffix(""))
        return ImageRecord(
            key=safe_key(stem),
            image=FilePart(file or self.images / image),
            meta=meta,
            label_files={expert: root / f"{stem}.png" for expert, root in self.labels.items()},
            fault=fault,
        )
