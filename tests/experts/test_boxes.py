"""Boxes: overlap and suppression, and painting by depth order against masks drawn pixel by pixel from the words of the
specification. Run: pytest tests/experts/test_boxes.py"""

import numpy as np
import pytest
import torch

from prismer.dataloading.experts.boxes import (
    MAX_IDS,
    as_found,
    corners,
    distinct,
    highest,
    iou_matrix,
    on_image,
    paint,
    rasterise,
    suppress,
)
from prismer.dataloading.experts.network import Found


def painted_by_masks(pixels, size, depth):
    """The specification, word by word, on whole masks."""
    kept, masks = [], []
    for number, (left, top, right, bottom) in enumerate(pixels):
        mask = np.zeros((size, size), bool)
        mask[top:bottom, left:right] = True
        if all((mask & other).sum() / (mask | other).sum() <= 0.95 for other in masks):
            kept.append(number)
            masks.append(mask)
    current = [mask.copy() for mask in masks]
    for i in range(len(masks)):
        for j in range(i + 1, len(masks)):
            overlap = masks[i] & masks[j]
            if not overlap.any():
                continue
            if (overlap == masks[i]).all():
                current[j] = current[j] & ~current[i]
            elif (overlap == masks[j]).all():
                current[i] = current[i] & ~current[j]
            elif depth is not None:
                mean_i, mean_j = depth[masks[i]].mean(), depth[masks[j]].mean()
                if mean_i > mean_j:
                    current[j] = current[j] & ~overlap
                elif mean_j > mean_i:
                    current[i] = current[i] & ~overlap
    plane = np.full((size, size), 255, np.uint8)
    for number, mask in enumerate(current):
        plane[mask] = number
    return plane, kept


def random_pixels(rng, count, size, step):
    """Boxes on a grid of `step` pixels: the coarser, the more of them touch, nest and coincide."""
    cells = size // step
    start = rng.integers(0, cells, (count, 2))
    end = start + 1 + rng.integers(0, cells - start)
    return np.concatenate([start, end], axis=1) * step


@pytest.mark.parametrize("step", [1, 4, 8])
@pytest.mark.parametrize("depths", ["none", "noise", "two values", "constant"])
def test_paint_equals_masks(step, depths):
    rng = np.random.default_rng(step)
    size = 40
    for count in (1, 2, 3, 5, 9, 20, 40) * 6:
        pixels = random_pixels(rng, count, size, step)
        depth = {
            "none": None,
            "noise": rng.integers(0, 256, (size, size)).astype(np.uint8),
            "two values": np.where(rng.random((size, size)) < 0.5, 20, 200).astype(np.uint8),
            "constant": np.full((size, size), 7, np.uint8),
        }[depths]
        expected, kept = painted_by_masks(pixels, size, depth)
        plane, which = paint(pixels / size, size, depth)
        assert which.tolist() == kept
        np.testing.assert_array_equal(plane, expected)


def test_paint_the_nearer_in_front_though_first():
    depth = np.full((10, 10), 50, np.uint8)
    depth[:, :3] = 200
    boxes = np.array([[0, 0, 0.6, 1], [0.4, 0, 1, 1]])  # the first one is nearer, the second is painted later
    plane, _ = paint(boxes, 10, depth)
    assert (plane[:, :6] == 0).all() and (plane[:, 6:] == 1).all()
    plane, _ = paint(boxes, 10)
    assert (plane[:, :4] == 0).all() and (plane[:, 4:] == 1).all()
    plane, _ = paint(boxes, 10, np.full((10, 10), 9, np.uint8))
    assert (plane[:, 4:] == 1).all()


def test_paint_inner_in_front_though_farther():
    depth = np.full((20, 20), 250, np.uint8)
    depth[5:10, 5:10] = 0
    outer, inner = [0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]
    for boxes in ([outer, inner], [inner, outer]):
        plane, _ = paint(np.array(boxes), 20, depth)
        assert (plane[5:10, 5:10] == boxes.index(inner)).all()
        assert plane[0, 0] == boxes.index(outer)


def test_paint_axes():
    plane, _ = paint(np.array([[0.5, 0, 1, 0.25]]), 8)  # left, top, right, bottom
    assert (plane[:2, 4:] == 0).all() and (plane != 255).sum() == 8


def test_paint_nothing():
    plane, kept = paint(np.zeros((0, 4)), 12, np.zeros((12, 12), np.uint8))
    assert (plane == 255).all() and plane.shape == (12, 12) and plane.dtype == np.uint8
    assert kept.shape == (0,)


def test_paint_refuses_another_size_of_depth():
    with pytest.raises(ValueError, match=r"float64 \(4, 8\)"):
        paint(np.array([[0, 0, 1, 1]]), 8, np.zeros((4, 8)))


def test_paint_many():
    rng = np.random.default_rng(0)
    start = rng.random((400, 2)) * 0.9
    boxes = np.concatenate([start, start + 0.02 + rng.random((400, 2)) * 0.08], axis=1)
    plane, kept = paint(boxes, 224, rng.integers(0, 256, (224, 224)).astype(np.uint8))
    assert len(kept) == MAX_IDS == 254
    assert plane[plane != 255].max() <= 253


def test_distinct_takes_the_first():
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 96], [0, 0, 100, 95], [0, 0, 100, 91]])
    # 0.96 is the same box, 0.95 and 0.91 are not; nor does it matter that 2 lies close to 1, which went
    assert distinct(boxes).tolist() == [0, 2]
    assert distinct(boxes[1:]).tolist() == [0, 2]


def test_rasterise():
    boxes = np.array([[0.1, 0.2, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [-1, -0.1, 2, 1.2]])
    expected = [[1, 2, 3, 9], [5, 5, 6, 6], [9, 9, 10, 10], [0, 0, 10, 10]]
    assert rasterise(boxes, 10).tolist() == expected


def test_iou_matrix():
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 9]])
    expected = [[1, 1 / 7, 0], [1 / 7, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(iou_matrix(boxes, boxes), expected)


def test_suppress_within_a_class():
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 0.8], [0, 0, 0.3, 1]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.3])
    assert suppress(boxes, scores, torch.tensor([1, 1, 2, 1]), 0.5, 9).tolist() == [1, 2, 3]
    assert suppress(boxes, scores, torch.tensor([1, 1, 1, 1]), 0.5, 9).tolist() == [1, 3]
    assert suppress(boxes, scores, torch.tensor([1, 1, 2, 1]), 0.5, 2).tolist() == [1, 2]


def test_highest():
    scores = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.7])
    assert highest(scores, 0.5, 10).tolist() == [1, 3, 4]
    assert highest(scores, 0.1, 2).tolist() == [1, 3]
    ties = torch.arange(500) % 2 + 1.0
    assert highest(ties, 1.5, 500).tolist() == list(range(1, 500, 2))


def test_corners_and_on_image():
    boxes = corners(torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4]]))
    torch.testing.assert_close(boxes, torch.tensor([[0.4, 0.3, 0.6, 0.7], [0, 0.7, 0.3, 1]]))
    pixels = torch.tensor([[10.0, 5, 30, 60], [40, 0, 60, 10], [0, 51, 10, 70]])
    shown, which = on_image(pixels, torch.tensor([40, 50, 40, 50]))
    assert which.tolist() == [True, False, False]
    torch.testing.assert_close(shown, torch.tensor([[0.25, 0.1, 0.75, 1.0]]))


def test_as_found_numbers_what_is_kept():
    boxes = torch.tensor([[0, 0, 0.5, 1], [0, 0, 0.5, 0.99], [0.25, 0, 1, 1]])
    depth = np.zeros((8, 8), np.uint8)
    depth[:, :2] = 255
    found = as_found(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([5, 6, 7]), 8, Found(depth))
    assert found.instances == {0: 5, 1: 7}
    assert found.boxes[1] == pytest.approx((0.25, 0, 1, 1, 0.7))
    assert (found.plane[:, :4] == 0).all() and (found.plane[:, 4:] == 1).all()
