"""Proves that the baseline loader is exact, that ours gives the model the same values, and counts the bytes of both.

python -m pytest tests/data/test_published_loader.py
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.published_loader import LABEL_SIZE, MEAN, STD, PublishedDataset, _rand_augment, _warp, expand
from prismer.config import prismer_base
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.store.shards import ShardDataset
from prismer.kernels.label_map import label_map
from prismer.stems import normalise_low_level, normalise_rgb

CLASSES = {"seg": ["sky", "ground", "wall"], "obj_detection": ["ball", "cube", "cone", "dog"]}
BACKGROUND_ROW = np.linspace(-1, 1, 64, dtype=np.float32)
# of the images, px
SIDE = 64


def row_of(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode())).normal(size=64).astype(np.float32)


SEMANTICS = Semantics(row_of, BACKGROUND_ROW)


def rows(names: list[str]) -> torch.Tensor:
    return torch.from_numpy(SEMANTICS.rows(names))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images a and b; b has no words. Their regions are halves and quarters, whose place is known at any size."""
    folder = tmp_path_factory.mktemp("published")
    height, width = 120, 160
    for name in "ab":
        rng = np.random.default_rng(ord(name))
        pixels = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((20, 20, 1))).astype(np.uint8)
        ramp = np.linspace(10, 200, width).astype(np.uint8)
        seg, boxes, words = np.full((3, height, width), 255, np.uint8)
        seg[: height // 2], seg[height // 2 :] = 1, 2
        boxes[: height // 2, : width // 2], boxes[height // 2 :, width // 2 :] = 0, 1
        words[: height // 4] = 5
        normals = rng.integers((30, 60, 90), (120, 180, 220), (height, width, 3), dtype=np.uint8)
        files = {
            f"images/set/{name}.jpg": pixels,
            f"labels/depth/set/{name}.png": np.broadcast_to(ramp, (height, width)),
            f"labels/normal/set/{name}.png": normals,
            f"labels/edge/set/{name}.png": np.zeros((height, width), np.uint8),
            f"labels/seg_coco/set/{name}.png": seg,
            f"labels/obj_detection/set/{name}.png": boxes,
            f"labels/ocr_detection/set/{name}.png": words,
        }
        if name == "b":
            del files["labels/ocr_detection/set/b.png"]
        for path, array in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(array)).save(folder / path)
        (folder / f"labels/obj_detection/set/{name}.json").write_text('{"0": 3, "1": 1}')
    torch.save({5: dict(features=rows(["stop"])[0], text="stop")}, folder / "labels/ocr_detection/set/a.pt")
    (folder / "list.json").write_text(json.dumps([{"image": f"{n}.jpg"} for n in "ab"]))
    records = caption_records(folder / "list.json", folder / "images", labels=folder / "labels", dataset="set")
    import_records(records, folder / "shards", source="test", class_tables=CLASSES, workers=1, progress=False)
    return folder


def published(folder, **options) -> PublishedDataset:
    tables = dict(
        seg=rows(CLASSES["seg"]), objects=rows(CLASSES["obj_detection"]), background=torch.from_numpy(BACKGROUND_ROW)
    )
    options = dict(image_size=SIDE, augment=False) | options
    return PublishedDataset(folder / "images", folder / "labels", ["set/a", "set/b"], **tables, **options)


def our_batch(folder, **sizes):
    config = prismer_base(**(dict(image_size=SIDE, label_size=LABEL_SIZE) | sizes))
    loader = Loader(
        ShardDataset(folder / "shards"), config=config, batch_size=2, semantics=SEMANTICS, training=False, threads=1
    )
    return next(loader.epoch(0)).images


def test_baseline_values(folder):
    sample = published(folder)[0]
    assert {name: (tuple(t.shape), t.dtype) for name, t in sample.items() if name != "obj_detection"} == {
        "rgb": ((3, SIDE, SIDE), torch.float32),
        "depth": ((1, 224, 224), torch.float32),
        "normal": ((3, 224, 224), torch.float32),
        "edge": ((1, 224, 224), torch.float32),
        "seg_coco": ((64, 224, 224), torch.float32),
        "ocr_detection": ((64, 224, 224), torch.float32),
    }
    # the mean colour of the file, through mean and deviation
    with Image.open(folder / "images/set/a.jpg") as file:
        colour = torch.from_numpy(np.asarray(file).reshape(-1, 3).mean(0) / 255)
    torch.testing.assert_close(
        sample["rgb"].mean((1, 2)).double(), (colour - torch.tensor(MEAN)) / torch.tensor(STD), atol=0.02, rtol=0
    )
    depth = sample["depth"][0]
    assert depth[:, 0].eq(-1).all() and depth[:, -1].sub(1).abs().max() < 1e-5
    assert (depth.diff(dim=1) >= 0).all()
    # all three channels share one minimum and one maximum
    low, high = sample["normal"].amin((1, 2)), sample["normal"].amax((1, 2))
    assert low[0] == -1 and abs(high[2] - 1) < 1e-5
    assert low[1] > -0.75 and high[0] < 0
    assert sample["edge"].eq(-1).all()
    background = torch.from_numpy(BACKGROUND_ROW)
    ball, stop = rows(["dog", "stop"])
    objects = sample["obj_detection"]
    assert objects["label"].dtype == torch.float32 and objects["instance"].dtype == torch.int64
    assert objects["instance"].shape == (1, 224, 224)
    for map_, place, row in (
        (sample["seg_coco"], (0, 0), rows(["ground"])[0]),
        (sample["seg_coco"], (111, 223), rows(["ground"])[0]),
        (sample["seg_coco"], (112, 0), rows(["wall"])[0]),
        (objects["label"], (111, 111), ball),
        (objects["label"], (111, 112), background),
        (objects["label"], (112, 112), rows(["cube"])[0]),
        (sample["ocr_detection"], (55, 223), stop),
        (sample["ocr_detection"], (56, 0), background),
    ):
        assert map_[(slice(None), *place)].equal(row), place
    assert objects["instance"][0, 0, 0] == 0 and objects["instance"][0, 0, -1] == 255


def test_an_image_without_words_is_background(folder):
    words = published(folder)[1]["ocr_detection"]
    assert words.equal(torch.from_numpy(BACKGROUND_ROW)[:, None, None].expand(64, 224, 224))


def test_ids_expand_to_their_features():
    ids = torch.tensor([[0, 7], [255, 7]], dtype=torch.uint8)
    table = {0: torch.full((64,), 2.0), 7: torch.arange(64.0)}
    expanded = expand(ids, table, torch.full((64,), -1.0))
    assert expanded[5].tolist() == [[2.0, 5.0], [-1.0, 5.0]]


def test_baseline_augments_image_and_labels_alike():
    """A white square and its label stay aligned under every operation; outside is background."""
    size = 96
    square = np.zeros((size, size), np.uint8)
    square[30:60, 20:50] = 255
    changed = 0
    for _ in range(60):
        image = Image.fromarray(np.stack([square] * 3, -1))
        maps = {"seg_coco": Image.fromarray(255 - square), "edge": Image.fromarray(square)}
        image, maps = _rand_augment(image, maps)
        seen, ids, edge = (np.asarray(x).astype(int) for x in (image, maps["seg_coco"], maps["edge"]))
        assert set(np.unique(ids)) <= {0, 255} and set(np.unique(edge)) <= {0, 255}
        assert np.mean((seen[..., 0] > 127) != (ids == 0)) < 0.02
        assert np.mean((ids == 0) != (edge == 255)) == 0
        changed += not np.array_equal(edge, square)
    assert 30 < changed < 60


def test_crop_and_flip_keep_image_and_labels_together(folder):
    square = np.zeros((120, 160), np.uint8)
    square[20:60, 20:90] = 255
    samples = published(folder, augment=True, image_size=224)
    sides = set()
    for _ in range(20):
        image = Image.fromarray(np.stack([square] * 3, -1))
        image, maps = samples._resize(image, {"edge": Image.fromarray(square)})
        seen, edge = np.asarray(image)[..., 0] > 127, np.asarray(maps["edge"]) > 127
        assert np.mean(seen != edge) < 0.02
        sides.add(int(edge[:, :112].sum() > edge[:, 112:].sum()))
    assert sides == {0, 1}


@pytest.mark.parametrize(
    "op, shift_x, shift_y",
    [
        ("shear_x", lambda x, y: 0.15 * y, None),
        ("shear_y", None, lambda x, y: 0.15 * x),
        ("shift_x", lambda x, y: 0.165 * 100, None),
        ("shift_y", None, lambda x, y: 0.165 * 100),
    ],
)
def test_warps_move_pixels_by_the_published_amounts(op, shift_x, shift_y):
    """A ramp shows the source of each pixel."""
    y, x = np.mgrid[:100, :100]
    for ramp, shift in ((x, shift_x), (y, shift_y)):
        warped = _warp(Image.fromarray(ramp.astype(np.uint8)), op, 1, Image.Resampling.NEAREST, 255)
        expected = ramp + (shift(x, y) if shift else 0)
        inside = np.asarray(warped) != 255
        assert 0.8 < inside.mean() <= 1
        assert np.abs(np.asarray(warped) - expected)[inside].max() <= 1


def test_augmented_samples_collate(folder):
    batch = next(iter(DataLoader(published(folder, augment=True), batch_size=2)))
    assert batch["rgb"].shape == (2, 3, SIDE, SIDE)
    assert batch["obj_detection"]["label"].shape == (2, 64, 224, 224)
    assert batch["obj_detection"]["label"].is_contiguous()
    assert all(torch.isfinite(batch[name]).all() for name in ("rgb", "depth", "normal", "edge"))


def test_our_batch_expands_to_the_baseline(folder):
    theirs = next(iter(DataLoader(published(folder), batch_size=2)))
    images = our_batch(folder)
    # both resize the same decoded pixels; one grey level is 0.015 after normalising
    difference = (normalise_rgb(images.rgb, torch.float32) - theirs["rgb"]).abs()
    assert difference.max() < 0.05 and difference.mean() < 0.005
    for name in ("depth", "normal", "edge"):
        ours = normalise_low_level(images.labels[name], torch.float32)
        torch.testing.assert_close(ours, theirs[name], atol=2e-3, rtol=0, msg=name)
    for name, expected in (
        ("seg", theirs["seg_coco"]),
        ("obj_detection", theirs["obj_detection"]["label"]),
        ("ocr_detection", theirs["ocr_detection"]),
    ):
        ours = label_map(images.labels[name][:, 0], images.rows[name], images.features, LABEL_SIZE)
        assert ours.equal(expected), name
    assert images.labels["obj_detection"].equal(theirs["obj_detection"]["instance"].byte())


def test_upload_bytes(folder):
    """Bytes counted by hand equal those of the tensors; the benchmark asserts the ratios on its images."""
    sample = published(folder)[0]
    theirs = sum(t.nbytes for name, t in sample.items() if name != "obj_detection")
    theirs += sum(t.nbytes for t in sample["obj_detection"].values())
    assert theirs == 4 * (3 * SIDE**2 + (5 + 3 * 64) * 224**2) + 8 * 224**2
    images = our_batch(folder)
    assert images.rgb.nbytes == 2 * 3 * SIDE**2
    assert sum(t.nbytes for t in images.labels.values()) == 2 * 8 * 224**2
    assert sum(t.nbytes for t in images.rows.values()) == 2 * 3 * 256 * 8
    # background, classes, one word
    assert images.features.nbytes == (1 + 3 + 4 + 1) * 64 * 4
