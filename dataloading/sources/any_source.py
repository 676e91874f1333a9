"""The records of any source of images: a folder, tars, a dataset, a list or one image."""

import os
from collections.abc import Iterator
from pathlib import Path

from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.records import FilePart, ImageRecord, ImageRecords, safe_key
from prismer.dataloading.sources.webdataset_tars import tar_records
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError
from prismer.reading import read_bytes


def source_records(source: str | Path, images: str | Path | None = None) -> tuple[ImageRecords, dict[str, list[str]]]:
    """The records of any supported source of images.

    Args:
        source: a folder of images (with captions beside them or without), a WebDataset tar or a folder of them
            (img2dataset writes such tars), a dataset of ours, a .txt with one path a line (`path_records`), a JSON list
            of images and captions (COCO), or one image.
        images: the folder of the images of a JSON list.

    Returns:
        The records, and the class tables of the maps that they already have.

    Raises:
        ValueError: if `source` is none of these.
    """
    path = Path(source)
    if path.is_file():
        suffix = path.suffix.lower()
        # a compressed tar is refused there
        if ".tar" in path.name.lower()[-8:]:
            return tar_records(path), {}
        if suffix == ".txt":
            return path_records(path), {}
        if images is not None:
            return caption_records(path, images), {}
        if suffix == ".json":
            raise InputError(f"{path} is a list; name the folder of its images with --images")
        record = ImageRecord(safe_key(path.stem), FilePart(path))
        return ImageRecords(1, lambda: iter([record])), {}
    if not path.is_dir():
        raise InputError(
            f"there is no file or folder {path}; give a folder of images or shards, a tar, or a list of images"
        )
    if (path / "index.json").is_file():
        return tar_records(path), ShardDataset(path).classes
    if any(name.lower().endswith(".tar") for name in os.listdir(path)):
        return tar_records(path), {}
    return folder_records(path), {}


def path_records(file: str | Path) -> ImageRecords:
    """The images that a text file names, one path a line, relative to the folder of the file.

    A path may hold any bytes but line ends. Every line becomes a record; one without a path has a fault.

    Raises:
        OSError: if the file cannot be read.
    """
    file = Path(file)
    # bytes, because names of files need not be UTF-8
    lines = [line.removesuffix(b"\r") for line in read_bytes(file).removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    if not lines[-1]:
        lines.pop()

    def iterate() -> Iterator[ImageRecord]:
        for line in lines:
            name = os.fsdecode(line)
            fault = "" if line.strip() else "the line is empty"
            key = safe_key(os.path.splitext(name)[0])
            yield ImageRecord(key, None if fault else FilePart(file.parent / name), fault=fault, name=name)

    return ImageRecords(len(lines), iterate)
