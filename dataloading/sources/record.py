"""Records: where an image of somebody's dataset lies, its labels and its text, before anything is opened."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prismer.dataloading.store.index import MAX_KEY
from prismer.experts import EXPERTS
from prismer.reading import read_bytes

_MAX_SOURCE = 2**30
# a sparse file named like an image can promise more than any memory holds


@dataclass(frozen=True)
class Source:
    """A file, or `size` bytes of one from `offset` (a member of a tar)."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self, limit: int = _MAX_SOURCE) -> bytes:
        """The bytes, `limit` at most.

        Raises:
            OSError: if the file cannot be read, is a pipe or the like, or holds more than `limit`.
            EOFError: if it ends too early.
        """
        return read_bytes(self.path, self.offset, self.size, limit)


@dataclass(frozen=True)
class Record:
    """One image to import.

    Attributes:
        key: its key in the shards.
        image: where its encoded bytes are; None if `fault` says why there is no image.
        meta: captions, questions or class of the image, as the shards keep them.
        label_files: expert -> PNG of the official layout, for the experts that have a folder; files may be absent.
        packed: the `KEY.labels` member of one of our own tars.
        fault: why it cannot be imported, where that is known before the image is opened.
        name: what reports call it, where the path of `image` does not say it.
    """

    key: str
    image: Source | None
    meta: dict = field(default_factory=dict)
    label_files: dict[str, Path] = field(default_factory=dict)
    packed: Source | None = None
    fault: str = ""
    name: str = ""


@dataclass(frozen=True)
class Other:
    """A file (or folder, or a number of files) that was found and is no record, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Records:
    """A number of records and a way to go through them, as often as needed.

    Attributes:
        count: how many `iterate` gives.
        class_names: all classes of a set for classification, those without an image included.
        others: what was found beside them, so that every file is either a record or named here.
    """

    count: int
    iterate: Callable[[], Iterator[Record]]
    class_names: list[str] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Record]:
        return self.iterate()


def safe_key(name: str) -> str:
    """A shard key from a path without its suffix: "/" becomes "--"; names with other characters get a short hash.

    Different names give different keys, and equal names the same one on every run. A name may hold lone
    surrogates: the bytes of a file name that are no UTF-8.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name.replace("/", "--"))
    if re.fullmatch(r"[A-Za-z0-9_]+([-/][A-Za-z0-9_]+)*", name) and len(key) <= MAX_KEY:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{key[: MAX_KEY - 11]}-{digest[:10]}"


class Place:
    """Where the images and labels of one dataset folder lie.

    Args:
        images: the folder that holds `<dataset>/<image>` or `<image>`.
        labels: the folder that holds `<expert>/<dataset>/<image>.png`; None if there are no labels.
        dataset: name of the dataset folder.

    Raises:
        ValueError: if `images` is no folder, or `labels` holds no expert's.
    """

    def __init__(self, images: str | Path, labels: str | Path | None, dataset: str):
        inside = Path(images) / dataset
        self.images = inside if inside.is_dir() else Path(images)
        if not self.images.is_dir():
            raise ValueError(f"{images} is not a folder; name the one that holds the images")
        self.labels: dict[str, Path] = {}
        if labels is not None:
            for name, expert in EXPERTS.items():
                for folder in expert.folders or (name,):
                    if (Path(labels) / folder).is_dir():
                        self.labels.setdefault(name, Path(labels) / folder / dataset)
            if not self.labels:
                raise ValueError(f"{labels} has no folder of any expert; name the one that holds depth, normal, ...")

    def record(self, image: str, meta: dict, fault: str = "") -> Record:
        """The record of one image, by its path inside the dataset folder."""
        stem = str(Path(image).with_suffix(""))
        return Record(
            key=safe_key(stem),
            image=Source(self.images / image),
            meta=meta,
            label_files={expert: root / f"{stem}.png" for expert, root in self.labels.items()},
            fault=fault,
        )
