"""Proves that boxes overlap, are suppressed and are painted by depth as the published rules say.

python -m pytest tests/experts/test_boxes.py
"""

import numpy as np
import pytest
import torch

from prismer.dataloading.experts.boxes import (
    MAX_IDS,
    clip_to_image,
    detections_output,
    drop_duplicates,
    iou_matrix,
    non_max_suppression,
    paint,
    to_corners,
    to_pixels,
    top_scores,
)
from prismer.dataloading.experts.network import ExpertOutput, Images


def painted_by_masks(pixels, size, depth):
    """The rules of `paint`, one after another, on masks of the whole map."""
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
def test_painting_equals_the_rules_on_masks(step, depths):
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


def test_the_nearer_box_lies_in_front_even_if_it_comes_first():
    depth = np.full((10, 10), 50, np.uint8)
    depth[:, :3] = 200
    # the first box is nearer, the second one is painted later
    boxes = np.array([[0, 0, 0.6, 1], [0.4, 0, 1, 1]])
    plane, _ = paint(boxes, 10, depth)
    assert (plane[:, :6] == 0).all() and (plane[:, 6:] == 1).all()
    plane, _ = paint(boxes, 10)
    assert (plane[:, :4] == 0).all() and (plane[:, 4:] == 1).all()
    plane, _ = paint(boxes, 10, np.full((10, 10), 9, np.uint8))
    assert (plane[:, 4:] == 1).all()


def test_an_inner_box_lies_in_front_even_if_it_is_farther():
    depth = np.full((20, 20), 250, np.uint8)
    depth[5:10, 5:10] = 0
    outer, inner = [0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]
    for boxes in ([outer, inner], [inner, outer]):
        plane, _ = paint(np.array(boxes), 20, depth)
        assert (plane[5:10, 5:10] == boxes.index(inner)).all()
        assert plane[0, 0] == boxes.index(outer)


def test_a_box_is_left_top_right_bottom():
    plane, _ = paint(np.array([[0.5, 0, 1, 0.25]]), 8)
    assert (plane[:2, 4:] == 0).all() and (plane != 255).sum() == 8


def test_no_boxes_give_a_background_map():
    plane, kept = paint(np.zeros((0, 4)), 12, np.zeros((12, 12), np.uint8))
    assert (plane == 255).all() and plane.shape == (12, 12) and plane.dtype == np.uint8
    assert kept.shape == (0,)


def test_a_depth_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"float64 \(4, 8\)"):
        paint(np.array([[0, 0, 1, 1]]), 8, np.zeros((4, 8)))


def test_at_most_254_boxes_are_painted():
    rng = np.random.default_rng(0)
    start = rng.random((400, 2)) * 0.9
    boxes = np.concatenate([start, start + 0.02 + rng.random((400, 2)) * 0.08], axis=1)
    plane, kept = paint(boxes, 224, rng.integers(0, 256, (224, 224)).astype(np.uint8))
    assert len(kept) == MAX_IDS == 254
    assert plane[plane != 255].max() <= 253


def test_the_first_of_duplicate_boxes_stays():
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 96], [0, 0, 100, 95], [0, 0, 100, 91]])
    # an overlap of 0.96 makes a duplicate, 0.95 and 0.91 do not; box 2 is close to box 1, but box 1 was dropped
    assert drop_duplicates(boxes).tolist() == [0, 2]
    assert drop_duplicates(boxes[1:]).tolist() == [0, 2]


def test_boxes_are_rounded_to_at_least_one_pixel():
    boxes = np.array([[0.1, 0.2, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [-1, -0.1, 2, 1.2]])
    expected = [[1, 2, 3, 9], [5, 5, 6, 6], [9, 9, 10, 10], [0, 0, 10, 10]]
    assert to_pixels(boxes, 10).tolist() == expected


def test_overlap_of_empty_boxes_is_zero():
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 9]])
    expected = [[1, 1 / 7, 0], [1 / 7, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(iou_matrix(boxes, boxes), expected)


def test_boxes_are_suppressed_within_their_class():
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 0.8], [0, 0, 0.3, 1]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.3])
    assert non_max_suppression(boxes, scores, torch.tensor([1, 1, 2, 1]), 0.5, 9).tolist() == [1, 2, 3]
    assert non_max_suppression(boxes, scores, torch.tensor([1, 1, 1, 1]), 0.5, 9).tolist() == [1, 3]
    assert non_max_suppression(boxes, scores, torch.tensor([1, 1, 2, 1]), 0.5, 2).tolist() == [1, 2]


def test_top_scores_are_sorted_and_ties_keep_their_order():
    scores = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.7])
    assert top_scores(scores, 0.5, 10).tolist() == [1, 3, 4]
    assert top_scores(scores, 0.1, 2).tolist() == [1, 3]
    ties = torch.arange(500) % 2 + 1.0
    assert top_scores(ties, 1.5, 500).tolist() == list(range(1, 500, 2))


def test_boxes_that_miss_the_image_are_dropped():
    boxes = to_corners(torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4]]))
    torch.testing.assert_close(boxes, torch.tensor([[0.4, 0.3, 0.6, 0.7], [0, 0.7, 0.3, 1]]))
    pixels = torch.tensor([[10.0, 5, 30, 60], [40, 0, 60, 10], [0, 51, 10, 70]])
    shown, which = clip_to_image(pixels, torch.tensor([40, 50, 40, 50]))
    assert which.tolist() == [True, False, False]
    torch.testing.assert_close(shown, torch.tensor([[0.25, 0.1, 0.75, 1.0]]))


def test_ids_number_the_boxes_that_are_kept():
    boxes = torch.tensor([[0, 0, 0.5, 1], [0, 0, 0.5, 0.99], [0.25, 0, 1, 1]])
    depth = np.zeros((8, 8), np.uint8)
    depth[:, :2] = 255
    images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [(8, 8)] * 2, 8)
    earlier = {"depth": [ExpertOutput(255 - depth), ExpertOutput(depth)]}
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([5, 6, 7])
    output = detections_output(boxes, scores, classes, images, earlier, 1)
    assert output.table == {0: 5, 1: 7}
    assert output.boxes[1] == pytest.approx((0.25, 0, 1, 1, 0.7))
    assert (output.plane[:, :4] == 0).all() and (output.plane[:, 4:] == 1).all()
    # by the other image's depth the second box lies in front
    output = detections_output(boxes, scores, classes, images, earlier, 0)
    assert (output.plane[:, 2:] == 1).all()
