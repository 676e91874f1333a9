"""Small datasets in other people's layouts, and an import that checks what holds for every import."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.importer import ImportReport, import_records
from prismer.dataloading.sources.records import ImageRecords
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.shards import Sample, ShardDataset

# JSON that is nested too deeply
DEEP = "[" * 3000


TABLES = {"seg": ["person", "sky", "tree"], "obj_detection": ["cup", "dog"]}


def gradient(i: int = 0, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Image.Image:
    """A smooth image whose corners all differ, so that turning and re-encoding show; `i` changes its blue."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    channels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40 * (i % 6))], -1)
    return Image.fromarray(channels.astype(np.uint8)).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def write(path: Path, data: object) -> Path:
    """Write bytes, text or JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif isinstance(data, str):
        path.write_text(data)
    else:
        path.write_text(json.dumps(data))
    return path


def load(folder: Path) -> dict[str, Sample]:
    """Key -> sample of a dataset."""
    dataset = ShardDataset(folder)
    return {dataset.key(i): dataset[i] for i in range(len(dataset))}


def run(records: ImageRecords, out: Path, **settings: Any) -> tuple[dict[str, Sample], ImportReport]:
    """Import; every record is imported or skipped, and the dataset has no problems."""
    settings = {"source": "test", "progress": False, "label_size": 8, "workers": 2, **settings}
    report = import_records(records, out, **settings)
    assert report.records == report.imported + len(report.skipped) == len(records)
    assert json.loads((out / "import-report.json").read_text())["skipped"] == report.skipped
    problems = check_dataset(out, progress=False).lines()
    assert problems[-1] == "no problems", problems
    return load(out), report


def captions_of(samples: dict[str, Sample]) -> dict[str, list[str]]:
    return {key: sample.meta["captions"] for key, sample in samples.items()}


def others_of(report: ImportReport, root: Path) -> dict[str, str]:
    """Path inside `root` -> reason."""
    return {os.path.relpath(o["file"], root): o["reason"] for o in report.others}


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add_member(tar, name, data)


def make_folder(root: Path, count: int, corrupt: tuple[int, ...] = ()) -> ImageRecords:
    """Images with captions, ten in each folder."""
    for i in range(count):
        data = b"\xff\xd8broken" if i in corrupt else encode(gradient(i))
        write(root / f"{i // 10:05d}/{i:03d}.jpg", data)
        write(root / f"{i // 10:05d}/{i:03d}.txt", f"caption {i}")
    return folder_records(root)


def write_labels(
    root: Path, dataset: str = "vqav2", stem: str = "train2014/1", seg_folder: str = "seg_coco"
) -> dict[str, np.ndarray]:
    """All six label maps of one 20 x 12 image, in the layout of the published code."""
    y, x = np.mgrid[:12, :20]
    maps = {
        "depth": (x * 12).astype(np.uint8),
        "normal": np.stack([x * 12, y * 20, 0 * x + 200], -1).astype(np.uint8),
        "edge": (y * 20).astype(np.uint8),
        seg_folder: (x // 7).astype(np.uint8),
        "obj_detection": np.where(x < 5, 0, np.where(x < 10, 1, 255)).astype(np.uint8),
        "ocr_detection": np.where(y < 6, 0, 255).astype(np.uint8),
    }
    for expert, plane in maps.items():
        write(root / expert / dataset / f"{stem}.png", encode(Image.fromarray(plane), "PNG"))
    write(root / f"obj_detection/{dataset}/{stem}.json", {"0": 1, "1": 0})
    words = {0: {"features": torch.zeros(64), "text": "Stop"}}
    torch.save(words, root / f"ocr_detection/{dataset}/{stem}.pt")
    return maps
