"""The images of test_dataloading.py and their labels, in two layouts: single files as published, and shards.

Everything is made here and the same on every machine: enlarged renderings with camera noise, label maps of the same
size, and the tables of objects and words.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.published_loader import HIGH_LEVEL, LABEL_SIZE, LOW_LEVEL
from prismer.dataloading.scenes.dataset import render_scene
from prismer.dataloading.scenes.layout import WORDS
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.importer import import_records
from prismer.experts import BACKGROUND

COUNT = 32
WIDTH, HEIGHT = 640, 480
CLASSES = {"seg": [f"stuff {i}" for i in range(133)], "obj_detection": [f"thing {i}" for i in range(722)]}
NAMES = [f"set/image-{i:03d}" for i in range(COUNT)]


def write_corpus(folder: Path, labels_per_map: tuple[int, ...]) -> dict[str, int]:
    """Write `images`, and `labels-n` and `shards-n` for each n of `labels_per_map`, the number of ids in a map.

    Returns:
        Mean bytes per image of the JPEG and of each low-level PNG.
    """
    sizes = dict.fromkeys(("jpeg", *LOW_LEVEL), 0)
    for i, name in enumerate(NAMES):
        rng = np.random.default_rng(i)
        if i % 4 == 0:
            # four images show the same scene with different noise
            scene = render_scene(i, 240, LABEL_SIZE)
        sizes["jpeg"] += _save(_photograph(scene.rgb, rng), folder / f"images/{name}.jpg", quality=90)
        for expert in LOW_LEVEL:
            first, *others = [folder / f"labels-{n}/{expert}/{name}.png" for n in labels_per_map]
            sizes[expert] += _save(_intensities(scene.planes[expert], rng), first)
            for other in others:
                other.parent.mkdir(parents=True, exist_ok=True)
                os.link(first, other)
        for n in labels_per_map:
            _write_ids(folder / f"labels-{n}", name, n, rng)
    entries = [{"image": f"{Path(name).name}.jpg"} for name in NAMES]
    (folder / "list.json").write_text(json.dumps(entries))
    for n in labels_per_map:
        records = caption_records(folder / "list.json", folder / "images", labels=folder / f"labels-{n}", dataset="set")
        import_records(
            records, folder / f"shards-{n}", source="benchmark", class_tables=CLASSES, workers=1, progress=False
        )
    return {part: total // COUNT for part, total in sizes.items()}


def _photograph(rgb: np.ndarray, rng: np.random.Generator) -> Image.Image:
    enlarged = np.asarray(Image.fromarray(rgb).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    noise = rng.normal(0, 6, (HEIGHT, WIDTH, 1)) + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    return Image.fromarray((enlarged + noise).clip(0, 255).astype(np.uint8))


def _intensities(plane: np.ndarray, rng: np.random.Generator) -> Image.Image:
    # the maps of a network are not as flat as those of a renderer
    texture = Image.fromarray(rng.integers(-9, 10, (HEIGHT // 8, WIDTH // 8)).astype(np.float32))
    texture = np.asarray(texture.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    enlarged = np.asarray(Image.fromarray(plane).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    texture = texture.reshape(HEIGHT, WIDTH, *[1] * (plane.ndim - 2))
    return Image.fromarray((enlarged + texture).clip(0, 255).astype(np.uint8))


def _write_ids(folder: Path, name: str, n: int, rng: np.random.Generator) -> None:
    """Write regions of n classes, n boxes and n words, with the tables of objects and words."""
    y, x = np.mgrid[:HEIGHT:4, :WIDTH:4]
    centres = rng.random((n, 2)) * (HEIGHT, WIDTH)
    nearest = np.argmin([(y - cy) ** 2 + (x - cx) ** 2 for cy, cx in centres], axis=0)
    nearest = nearest.repeat(4, axis=0).repeat(4, axis=1)
    seg = rng.choice(len(CLASSES["seg"]), n, replace=False).astype(np.uint8)[nearest]
    boxes, words = (np.full((HEIGHT, WIDTH), BACKGROUND, np.uint8) for _ in range(2))
    # each in its own cell of 5 x 4, so that all are visible
    for i, cell in enumerate(rng.choice(20, n, replace=False)):
        top, left = cell // 5 * 120 + rng.integers(0, 20), cell % 5 * 128 + rng.integers(0, 20)
        boxes[top : top + rng.integers(60, 100), left : left + rng.integers(60, 108)] = i
        words[top : top + 24, left : left + rng.integers(40, 108)] = i
    for expert, ids in zip(HIGH_LEVEL, (seg, boxes, words), strict=True):
        _save(Image.fromarray(ids), folder / f"{expert}/{name}.png")
    classes = {str(i): int(rng.integers(len(CLASSES["obj_detection"]))) for i in range(n)}
    (folder / f"obj_detection/{name}.json").write_text(json.dumps(classes))
    texts = rng.choice(WORDS, n, replace=False).tolist()
    rows = torch.from_numpy(Semantics.spelling().rows(texts))
    # cloned: saving a view would save the whole storage
    table = {i: dict(features=rows[i].clone(), text=text) for i, text in enumerate(texts)}
    torch.save(table, folder / f"ocr_detection/{name}.pt")


def _save(image: Image.Image, path: Path, **options: Any) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path.stat().st_size
