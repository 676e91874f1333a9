"""Proves that the labels of rendered scenes agree with each other, with the image and with the description.

python -m pytest tests/data/test_exact_labels.py
"""

import json
from collections import Counter

import numpy as np
import pytest

from prismer.dataloading.scenes import dataset as scenes
from prismer.dataloading.scenes import exact_labels, layout
from prismer.dataloading.store.sample_json import meta_problems

SIGN, GROUND, SKY = (scenes.SEG_CLASSES.index(name) for name in ("sign", "ground", "sky"))


@pytest.fixture(scope="module")
def rendered() -> list[scenes.RenderedScene]:
    return [scenes.render_scene(scenes.scene_seed(7, "train", i)) for i in range(40)]


def test_planes_are_well_formed(rendered):
    experts = {"depth", "normal", "seg", "edge", "obj_detection", "ocr_detection"}
    for scene in rendered:
        assert scene.rgb.dtype == np.uint8 and scene.rgb.shape == (128, 128, 3)
        assert set(scene.planes) == experts
        for name, plane in scene.planes.items():
            shape = (128, 128, 3) if name == "normal" else (128, 128)
            assert plane.dtype == np.uint8 and plane.shape == shape and plane.flags.c_contiguous, name
        meta, planes = scene.meta, scene.planes
        assert planes["seg"].max() < len(scenes.SEG_CLASSES)
        ids = {str(i) for i in np.unique(planes["obj_detection"])} - {"255"}
        assert ids <= set(meta["instances"])
        assert all(0 <= c < len(scenes.OBJECT_CLASSES) for c in meta["instances"].values())
        assert {str(i) for i in np.unique(planes["ocr_detection"])} - {"255"} == set(meta["words"])
        assert list(meta["words"].values()) == [sign["word"] for sign in meta["scene"]["signs"]]
        assert meta["size"] == [128, 128] and meta["source"] == "rendered scenes" and meta["licence"] == "Apache-2.0"
        assert planes["depth"].min() == 0 and planes["depth"].max() == 255
        json.dumps(meta, allow_nan=False)


def test_labels_agree_with_each_other(rendered):
    for scene in rendered:
        seg, depth, edge = (scene.planes[name] for name in ("seg", "depth", "edge"))
        normal = scene.planes["normal"].astype(float) / 127.5 - 1
        assert (scene.planes["normal"][seg == SKY] == (127, 127, 255)).all()
        assert (depth[seg == SKY] == 0).all()
        # unit normals that never point away from the viewer by more than perspective allows
        assert np.abs(np.linalg.norm(normal, axis=2) - 1).max() < 0.03
        assert normal[..., 2].min() > -0.45
        # the ground faces up, and is nearer further down in the image
        assert (normal[seg == GROUND] @ [0, 1, 0]).min() > 0.85
        for column in range(0, 128, 16):
            assert (np.diff(depth[seg[:, column] == GROUND, column].astype(int)) >= 0).all()
        # dark exactly where classes meet, and nowhere on the open ground or in the sky
        jump = seg[:, 1:] != seg[:, :-1]
        assert edge[:, 1:][jump].max() < 255 and edge[:, :-1][jump].max() < 255
        plain = np.lib.stride_tricks.sliding_window_view(np.pad(seg, 2, mode="edge"), (5, 5))
        plain = (plain.min((2, 3)) == plain.max((2, 3))) & ((seg == GROUND) | (seg == SKY))
        assert (edge[plain] == 255).all()


def test_description_matches_the_labels(rendered):
    for scene in rendered:
        seg = scene.planes["seg"]
        objects, signs = scene.meta["scene"]["objects"], scene.meta["scene"]["signs"]
        assert 1 <= len(objects) <= 5 and len(signs) <= 2
        pixels = Counter()
        for thing in objects:
            pixels[thing["shape"]] += thing["pixels"]
            assert thing["pixels"] >= 40
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            assert (seg[top:bottom, left:right] == scenes.SEG_CLASSES.index(thing["shape"])).any()
        for shape, count in pixels.items():
            seen = (seg == scenes.SEG_CLASSES.index(shape)).sum()
            assert abs(seen - count) <= 0.1 * count + 8
        names = sorted(scenes.OBJECT_CLASSES[c] for c in scene.meta["instances"].values())
        # a box that nearly equals another one is dropped
        assert Counter(names) <= Counter(thing["shape"] for thing in objects + signs)
        assert len(names) >= len(objects) + len(signs) - 1


def test_boxes_surround_what_the_maps_show(rendered):
    for scene in rendered:
        meta = scene.meta
        assert meta_problems(meta, {"obj_detection": scenes.OBJECT_CLASSES}) == []
        boxes = meta["boxes"]
        assert set(boxes["obj_detection"]) == set(meta["instances"])
        assert set(boxes["ocr_detection"]) == set(meta["words"])
        seg = scene.planes["seg"]
        for i, class_id in meta["instances"].items():
            left, top, right, bottom, score = boxes["obj_detection"][i]
            assert score == 1.0
            edges = [round(edge * 128) for edge in (left, top, right, bottom)]
            # the object's own colour reaches every side of its box
            inside = seg[edges[1] : edges[3], edges[0] : edges[2]] == scenes.SEG_CLASSES.index(
                scenes.OBJECT_CLASSES[class_id]
            )
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        for i, box in boxes["ocr_detection"].items():
            pixels = exact_labels.bounding_box(scene.planes["ocr_detection"] == int(i))
            assert box == [*(round(edge / 128, 4) for edge in pixels), 1.0]


def test_colours_are_where_the_description_says(rendered):
    """The median colour of an object's pixels has the hue of its paint."""
    paints = {name: np.array(paint) / np.linalg.norm(paint) for name, paint in layout.PAINT.items()}
    right = total = 0
    for scene in rendered:
        linear = (scene.rgb / 255) ** 2.2
        for thing in scene.meta["scene"]["objects"]:
            left, top, right_edge, bottom = thing["box"]
            mask = np.zeros((128, 128), bool)
            mask[top:bottom, left:right_edge] = True
            mask &= scene.planes["seg"] == scenes.SEG_CLASSES.index(thing["shape"])
            # the median ignores glints and shadows
            colour = np.median(linear[mask], axis=0)
            nearest = max(paints, key=lambda name: paints[name] @ colour)
            right += nearest == thing["colour"]
            total += 1
    assert right / total > 0.93


def test_words_can_be_read(rendered):
    signs = 0
    for scene in rendered:
        for index, sign in enumerate(scene.meta["scene"]["signs"]):
            signs += 1
            assert sign["word"] in layout.WORDS and 3 <= len(sign["word"]) <= 5
            mask = scene.planes["ocr_detection"] == index
            assert (scene.planes["seg"][mask] == SIGN).all()
            left, top, right, bottom = exact_labels.bounding_box(mask)
            assert bottom - top >= 12 and right - left >= 6 * len(sign["word"])
            # dark and bright strokes alternate
            grey = scene.rgb.mean(2)[mask]
            assert np.percentile(grey, 95) - np.percentile(grey, 5) > 60
    assert signs > 15


def test_nearer_and_inner_boxes_lie_in_front():
    depth = np.zeros((8, 8), np.uint8)
    depth[:, 4:] = 200
    far, near, inner = [0, 0, 5, 5], [3, 0, 8, 5], [1, 1, 3, 3]
    painted = exact_labels.paint_boxes([near, far], depth)
    assert (painted[0, 3:5] == 0).all(), "the nearer box keeps the overlap whatever the order"
    painted = exact_labels.paint_boxes([inner, far], depth)
    assert (painted[1:3, 1:3] == 0).all() and painted[0, 0] == 1, "an inner box lies in front"
    painted = exact_labels.paint_boxes([[0, 6, 3, 8], [1, 6, 4, 8]], depth)
    assert painted[6].tolist()[:4] == [0, 1, 1, 1], "equal depth: later paints over earlier"
    assert (painted[:6] == 255).all()
