"""Boxes of all experts: overlap, suppression, and painting into a map of ids by depth.

A box is (left, top, right, bottom), in pixels or as fractions of the image; right and bottom lie just outside. Painting
works on the rectangles between box edges rather than on pixels, and takes the mean depth of each box from one integral
image. Fifty boxes cost about as much as one pass over the map.
"""

import numpy as np
import torch
from torch import Tensor

from prismer.dataloading.experts.network import ExpertOutput, Images
from prismer.errors import InputError
from prismer.experts import BACKGROUND

# a map has the ids 0..253 for boxes
MAX_IDS = BACKGROUND - 1

# a box is dropped as a duplicate if its overlap with an earlier box is larger
DUPLICATE_IOU = 0.95

# boxes of one image that compete in suppression, and boxes that it keeps
MAX_CANDIDATES, MAX_BOXES = 1000, 300


def iou_matrix(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of each box of (n, 4) with each of (m, 4): (n, m) float64; 0 between empty boxes."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    both = _overlap(boxes, others)
    union = _area(boxes)[:, None] + _area(others) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def non_max_suppression(
    boxes: Tensor, scores: Tensor, classes: Tensor, max_iou: float = 0.5, limit: int = MAX_BOXES
) -> Tensor:
    """Drop each box that overlaps a better box of its class.

    Args:
        boxes: (n, 4) floating point.
        scores, classes: (n,).
        max_iou: the largest overlap of two boxes of a class that both stay.
        limit: the largest number of boxes that stay.

    Returns:
        Indices of the boxes that stay, highest score first.
    """
    from torchvision.ops import batched_nms

    return batched_nms(boxes.float(), scores.float(), classes, max_iou)[:limit]


def to_pixels(boxes: np.ndarray, size: int) -> np.ndarray:
    """Convert boxes in fractions of the image to int64 pixels of a (size, size) map, each at least one pixel large."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    edges = np.rint(boxes.clip(0, 1) * size).astype(np.int64)
    start = np.minimum(edges[:, :2], size - 1)
    return np.concatenate([start, np.maximum(edges[:, 2:], start + 1)], axis=1)


def drop_duplicates(boxes: np.ndarray) -> np.ndarray:
    """Indices of the first `MAX_IDS` boxes of (n, 4) that do not duplicate an earlier kept box."""
    same = iou_matrix(boxes, boxes) > DUPLICATE_IOU
    kept: list[int] = []
    for i in range(len(boxes)):
        if len(kept) < MAX_IDS and not same[i, kept].any():
            kept.append(i)
    return np.array(kept, np.int64)


def paint(boxes: np.ndarray, size: int, depth: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Paint boxes into a map of ids, the nearer of two overlapping boxes in front.

    These are the rules of Prismer's label generation (arXiv:2303.02506, section 3.2, and its released code). Boxes are
    rounded to pixels. A box whose overlap with an earlier kept box exceeds 0.95 is dropped; the id of a box is its
    place among the kept ones. Then each pair i < j that intersects is settled, in the order (0, 1), (0, 2), ...,
    (1, 2), ...:

    * If one box lies inside the other, the outer box loses the pixels that the inner box owns at this moment.
    * Otherwise the farther box loses the whole overlap, even the pixels that the nearer box has lost to a third box.
      The farther box has the smaller mean of `depth` over its whole area. With equal means neither box loses anything.

    Finally each box paints the pixels that it still owns, in the order of ids, later boxes over earlier ones. A pixel
    may belong to no box although boxes cover it. Without `depth` only the first rule applies.

    Args:
        boxes: (n, 4) fractions of the image, highest score first.
        size: side of the map.
        depth: uint8 (size, size), larger is nearer.

    Returns:
        The uint8 map, 255 where no box is; and (k,) int64, the index in `boxes` of each id.

    Raises:
        ValueError: if `depth` has another shape or dtype.
    """
    if depth is not None and (depth.shape != (size, size) or depth.dtype != np.uint8):
        raise InputError(f"the depth map is {depth.dtype} {depth.shape}; boxes are painted on uint8 {(size, size)}")
    pixels = to_pixels(boxes, size)
    kept = drop_duplicates(pixels)
    pixels = pixels[kept]
    columns = np.unique(np.concatenate([[0, size], pixels[:, 0], pixels[:, 2]]))
    rows = np.unique(np.concatenate([[0, size], pixels[:, 1], pixels[:, 3]]))
    # from here on a box is a range of cells between edges: there are few, whatever the size of the map
    left, right = (np.searchsorted(columns, pixels[:, i]) for i in (0, 2))
    top, bottom = (np.searchsorted(rows, pixels[:, i]) for i in (1, 3))
    owns = np.zeros((len(kept), len(rows) - 1, len(columns) - 1), bool)
    for i in range(len(kept)):
        owns[i, top[i] : bottom[i], left[i] : right[i]] = True

    overlap, area = _overlap(pixels, pixels), _area(pixels)
    # [i, j]: box i lies inside box j
    inside = overlap == area[:, None]
    farther = np.zeros_like(inside)
    if depth is not None:
        sums = _depth_sums(depth, pixels)
        # compares the means without a division, so that the result is exact
        farther = sums[:, None] * area < sums * area[:, None]
    for i, j in zip(*np.nonzero(np.triu(overlap, 1)), strict=True):
        part = (
            slice(max(top[i], top[j]), min(bottom[i], bottom[j])),
            slice(max(left[i], left[j]), min(right[i], right[j])),
        )
        if inside[i, j] or inside[j, i]:
            inner, outer = (i, j) if inside[i, j] else (j, i)
            owns[outer][part] &= ~owns[inner][part]
        elif farther[i, j] or farther[j, i]:
            owns[i if farther[i, j] else j][part] = False

    cells = np.full(owns.shape[1:], BACKGROUND, np.uint8)
    for i, mine in enumerate(owns):
        cells[mine] = i
    return cells.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1), kept


def top_scores(scores: Tensor, threshold: float, limit: int = MAX_CANDIDATES) -> Tensor:
    """Indices of the scores above `threshold`, highest first (of equal scores the earlier first), at most `limit`."""
    order = torch.argsort(scores, descending=True, stable=True)[:limit]
    return order[scores[order] > threshold]


def detections_output(
    boxes: Tensor, scores: Tensor, classes: Tensor, images: Images, earlier: dict[str, list[ExpertOutput]], index: int
) -> ExpertOutput:
    """The output of a detector for one image of a batch.

    Args:
        boxes: (n, 4) fractions of the image, clipped to it, highest score first.
        scores, classes: (n,).
        images: the batch.
        earlier: the outputs of the experts that ran before; boxes are painted by depth if the depth expert did.
        index: which image of the batch it is.
    """
    boxes = boxes.double().cpu().numpy()
    plane, kept = paint(boxes, images.label_size, earlier["depth"][index].plane if "depth" in earlier else None)
    scores, classes = scores.float().cpu().numpy()[kept], classes.cpu().numpy()[kept]
    return ExpertOutput(
        plane,
        table={i: int(class_id) for i, class_id in enumerate(classes)},
        boxes={
            i: (*(float(edge) for edge in box), float(score))
            for i, (box, score) in enumerate(zip(boxes[kept], scores, strict=True))
        },
    )


def to_corners(boxes: Tensor) -> Tensor:
    """Convert (..., 4) centre x, centre y, width, height to left, top, right, bottom, clipped to [0, 1]."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1).clamp(0, 1)


def clip_to_image(boxes: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Convert boxes in pixels of a padded square to fractions of the image, without those that miss the image.

    Args:
        boxes: (n, 4) in pixels of the square.
        size: (4,) width, height, width, height of the image in it.

    Returns:
        (k, 4) fractions of the image, and (n,) bool: which boxes these are.
    """
    boxes = (boxes / size).clamp(0, 1)
    shown = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return boxes[shown], shown


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    start = np.maximum(boxes[:, None, :2], others[:, :2])
    end = np.minimum(boxes[:, None, 2:], others[:, 2:])
    return (end - start).clip(0).prod(axis=-1)


def _depth_sums(depth: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(n,) int64: the sum of `depth` over each box of (n, 4)."""
    integral = np.zeros((depth.shape[0] + 1, depth.shape[1] + 1), np.int64)
    depth.cumsum(axis=0, dtype=np.int64).cumsum(axis=1, out=integral[1:, 1:])
    left, top, right, bottom = pixels.T
    return integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
