"""Arithmetic of boxes, once for all experts: overlap, suppression, and the painting of boxes into an id map by depth.

Boxes are (left, top, right, bottom), right and bottom outside, in pixels or as fractions of the image. Painting works
on the rectangles between neighbouring box edges, not on pixels, and takes the mean depths of boxes from one integral
image: fifty boxes cost about as much as one pass over the map.
"""

import numpy as np
import torch
from torch import Tensor

from prismer.dataloading.experts.network import Found
from prismer.experts import BACKGROUND

MAX_IDS = BACKGROUND - 1
"""Ids 0..253 of a map: as many boxes are painted at most."""

SAME_BOX = 0.95
"""A box that overlaps one before it by more than this says the same thing again."""


def iou_matrix(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of each box of (n, 4) with each of (m, 4): (n, m) float64; 0 between empty boxes."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    both = _overlap(boxes, others)
    union = _area(boxes)[:, None] + _area(others) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, most: float, limit: int) -> Tensor:
    """Class-wise non-maximum suppression.

    Args:
        boxes: (n, 4) floating point.
        scores, classes: (n,).
        most: overlap up to which two boxes of a class may stay.
        limit: of boxes.

    Returns:
        Indices of the boxes that stay, highest score first, at most `limit`.
    """
    from torchvision.ops import batched_nms

    return batched_nms(boxes.float(), scores.float(), classes, most)[:limit]


def rasterise(boxes: np.ndarray, size: int) -> np.ndarray:
    """Boxes in fractions of the image -> int64 pixels of a (size, size) map, each at least one pixel large."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    edges = np.rint(boxes.clip(0, 1) * size).astype(np.int64)
    start = np.minimum(edges[:, :2], size - 1)
    return np.concatenate([start, np.maximum(edges[:, 2:], start + 1)], axis=1)


def distinct(boxes: np.ndarray) -> np.ndarray:
    """Indices of at most `MAX_IDS` boxes of (n, 4), none overlapping one taken before it by over `SAME_BOX`."""
    same = iou_matrix(boxes, boxes) > SAME_BOX
    kept: list[int] = []
    for i in range(len(boxes)):
        if len(kept) < MAX_IDS and not same[i, kept].any():
            kept.append(i)
    return np.array(kept, np.int64)


def paint(boxes: np.ndarray, size: int, depth: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Paint boxes into a map of ids, nearer ones in front.

    The order that holds (spec: Prismer, label generation). Boxes come in detection order and become pixels first. One
    whose overlap with a box that was kept before it exceeds 0.95 is dropped; id = place among those kept. Then every
    pair i < j that intersects, in the order (0, 1), (0, 2), ..., (1, 2), ...:

    * if one lies wholly inside the other, the outer one loses what the inner one still has at this moment;
    * otherwise the one with the smaller mean of `depth` over its whole box (the farther one: bright is near) loses the
      whole overlap, even where the nearer one has lost it to a third; equal means take nothing from either.

    At last each box paints what it still has, in the order of ids, later over earlier. A pixel may so belong to no
    box although some cover it. Without `depth` only the first rule and the painting order are at work.

    Args:
        boxes: (n, 4) fractions of the image, highest score first.
        size: side of the map.
        depth: uint8 (size, size), larger is nearer.

    Returns:
        The uint8 map, 255 where nothing is, and (k,) int64: which box each id is.

    Raises:
        ValueError: if `depth` has another shape or dtype.
    """
    if depth is not None and (depth.shape != (size, size) or depth.dtype != np.uint8):
        raise ValueError(f"the depth map is {depth.dtype} {depth.shape}; boxes are painted on uint8 {(size, size)}")
    pixels = rasterise(boxes, size)
    kept = distinct(pixels)
    pixels = pixels[kept]
    columns = np.unique(np.concatenate([[0, size], pixels[:, 0], pixels[:, 2]]))
    rows = np.unique(np.concatenate([[0, size], pixels[:, 1], pixels[:, 3]]))
    # from here on boxes are counted in cells between edges: few, whatever the size of the map
    left, right = (np.searchsorted(columns, pixels[:, i]) for i in (0, 2))
    top, bottom = (np.searchsorted(rows, pixels[:, i]) for i in (1, 3))
    owns = np.zeros((len(kept), len(rows) - 1, len(columns) - 1), bool)
    for i in range(len(kept)):
        owns[i, top[i] : bottom[i], left[i] : right[i]] = True

    overlap, area = _overlap(pixels, pixels), _area(pixels)
    within = overlap == area[:, None]  # i lies inside j
    farther = np.zeros_like(within)
    if depth is not None:
        sums = _sums(depth, pixels)
        # means compared without division: whole numbers, exact
        farther = sums[:, None] * area < sums * area[:, None]
    for i, j in zip(*np.nonzero(np.triu(overlap, 1)), strict=True):
        part = (
            slice(max(top[i], top[j]), min(bottom[i], bottom[j])),
            slice(max(left[i], left[j]), min(right[i], right[j])),
        )
        if within[i, j] or within[j, i]:
            inner, outer = (i, j) if within[i, j] else (j, i)
            owns[outer][part] &= ~owns[inner][part]
        elif farther[i, j] or farther[j, i]:
            owns[i if farther[i, j] else j][part] = False

    cells = np.full(owns.shape[1:], BACKGROUND, np.uint8)
    for i, mine in enumerate(owns):
        cells[mine] = i
    return cells.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1), kept


def highest(scores: Tensor, threshold: float, limit: int) -> Tensor:
    """Indices of the scores above `threshold`, highest first (ties: the earlier one), at most `limit`."""
    order = torch.argsort(scores, descending=True, stable=True)[:limit]
    return order[scores[order] > threshold]


def as_found(boxes: Tensor, scores: Tensor, classes: Tensor, label_size: int, depth: Found | None) -> Found:
    """What a detector says about one image.

    Args:
        boxes: (n, 4) fractions of the image, clipped to it, highest score first.
        scores, classes: (n,).
        label_size: side of the map.
        depth: the depth expert's map of the same size, where there is one.
    """
    boxes = boxes.double().cpu().numpy()
    plane, kept = paint(boxes, label_size, None if depth is None else depth.plane)
    scores, classes = scores.float().cpu().numpy()[kept], classes.cpu().numpy()[kept]
    return Found(
        plane,
        instances={i: int(class_id) for i, class_id in enumerate(classes)},
        boxes={
            i: (*(float(edge) for edge in box), float(score))
            for i, (box, score) in enumerate(zip(boxes[kept], scores, strict=True))
        },
    )


def corners(centres: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> left, top, right, bottom, clipped to [0, 1]."""
    middle, half = centres[..., :2], centres[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1).clamp(0, 1)


def on_image(boxes: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) in pixels of a padded square -> those that the image has a part of, as its fractions, and which."""
    boxes = (boxes / part).clamp(0, 1)
    shown = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return boxes[shown], shown


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    start = np.maximum(boxes[:, None, :2], others[:, :2])
    end = np.minimum(boxes[:, None, 2:], others[:, 2:])
    return (end - start).clip(0).prod(axis=-1)


def _sums(depth: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    integral = np.zeros((depth.shape[0] + 1, depth.shape[1] + 1), np.int64)
    depth.cumsum(axis=0, dtype=np.int64).cumsum(axis=1, out=integral[1:, 1:])
    left, top, right, bottom = pixels.T
    return integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
