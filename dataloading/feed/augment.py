"""Draw the augmentation of one sample as plain numbers, from a generator keyed by the sample and not by the run.

The recipe is that of Prismer's published code (arXiv:2303.02506): a random resized crop, a horizontal flip, and
RandAugment with n = 2 and m = 5 of ten operations, of which identity, brightness and sharpness change nothing at that
magnitude. Two differences are on purpose. Shifts are a share of the side, for images and labels alike: the published
code moves a label of 224 px by as many pixels as an image of 480. The image is sheared and rotated about its centre.

Coordinates are centred and relative: x to the right and y down, both in -0.5..0.5 over the side of the square output.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from prismer.errors import InputError

SHEAR = 0.15
SHIFT = 0.165
ROTATION = math.radians(15)
RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10

# left, top, right, bottom as shares of the sides of an image
Box = tuple[float, float, float, float]


class Draw(IntEnum):
    """The use of a generator; part of its key, so that no two uses share random numbers."""

    ORDER = 0
    AUGMENT = 1
    TEXTS = 2
    LABELS = 3
    NAMES = 4


def keyed_rng(draw: Draw, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """The generator of one purpose for one sample in one epoch: the same in every process and after every resume."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((draw, seed, epoch, index))))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How strongly training samples are augmented.

    Attributes:
        min_area: smallest share of the image that the random crop keeps; 1 keeps the whole image.
        flip: probability of a mirror image; 0 where left and right matter to the texts.
        num_ops: operations of RandAugment, drawn with replacement; 0 for crop and flip alone.

    Raises:
        ValueError: if a field is out of range.
    """

    min_area: float = 0.5
    flip: float = 0.5
    num_ops: int = 2

    def __post_init__(self):
        if not 0 < self.min_area <= 1:
            raise InputError(f"min_area is {self.min_area}; it must lie in (0, 1]")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip is {self.flip}; it is a probability, give 0 to 1")
        if self.num_ops < 0:
            raise InputError(f"num_ops is {self.num_ops}; it must be at least 0")


@dataclass
class AugmentParams:
    """The draws for one sample, applied as crop, resize, flip, autocontrast, equalize, affine map.

    The defaults leave the sample as it is.

    Attributes:
        window: x0, y0, x1, y1 of the crop as shares of the width and height.
        flip: whether left and right are swapped.
        autocontrast, equalize: whether the histogram of the image (never of a label) is stretched or equalized.
        affine: (2, 3) float64: output point (x, y, 1) -> the source point that it shows.
    """

    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False
    autocontrast: bool = False
    equalize: bool = False
    affine: np.ndarray = field(default_factory=lambda: np.eye(2, 3))

    @property
    def warps(self) -> bool:
        """Whether the affine map moves anything."""
        return not np.array_equal(self.affine, np.eye(2, 3))

    def pixel_matrix(self, side: int) -> np.ndarray:
        """(2, 3) fp32: `affine` in pixels of a `side` x `side` map, whose first pixel has its centre at 0.5."""
        linear = self.affine[:, :2]
        centre = np.full(2, 0.5)
        shift = side * (self.affine[:, 2] + centre - linear @ centre)
        return np.column_stack([linear, shift]).astype(np.float32)

    def normal_matrix(self) -> np.ndarray:
        """(2, 2) float64 for the x and y (up) components of surface normals; z stays, then the vector is rescaled.

        Normals follow the inverse transpose of the map that moves points, which is the transpose of the map from
        output to source. The crop is left out: it changes the proportions of the camera, not of the surface.
        """
        up = np.diag([1.0, -1.0])
        mirror = np.diag([-1.0 if self.flip else 1.0, 1.0])
        return up @ self.affine[:, :2].T @ up @ mirror

    def move_box(self, box: Box) -> tuple[Box, float]:
        """The part of a box of the sample that the output shows, and its share of the area of the box.

        A part that is sheared or rotated becomes the smallest upright box around its corners.
        """
        x0, y0, x1, y1 = self.window
        left, right = ((x - x0) / (x1 - x0) for x in (box[0], box[2]))
        top, bottom = ((y - y0) / (y1 - y0) for y in (box[1], box[3]))
        if self.flip:
            left, right = 1 - right, 1 - left
        # the affine map sees the crop alone
        (left, top, right, bottom), share = _clip_box(left, top, right, bottom)
        if not self.warps:
            return (left, top, right, bottom), share
        (a, b, dx), (c, d, dy) = self.affine.tolist()
        # `affine` leads from the output to the source, and a box moves the other way
        determinant = a * d - b * c
        corners = [(x - 0.5 - dx, y - 0.5 - dy) for x in (left, right) for y in (top, bottom)]
        across = [(d * x - b * y) / determinant + 0.5 for x, y in corners]
        down = [(a * y - c * x) / determinant + 0.5 for x, y in corners]
        part, rest = _clip_box(min(across), min(down), max(across), max(down))
        return part, share * rest


def draw_params(config: AugmentConfig, rng: np.random.Generator, aspect: float = 1.0) -> AugmentParams:
    """Draw the augmentation of one sample.

    Args:
        config: the strengths.
        rng: the sample's own generator.
        aspect: width / height of the image; the crop's ratio in pixels lies in 3/4 to 4/3.
    """
    flip = bool(rng.random() < config.flip)
    affine, photometric = np.eye(3), set()
    for _ in range(config.num_ops):
        op = OPS[rng.integers(len(OPS))]
        sign = -1.0 if rng.random() < 0.5 else 1.0
        if op in _GEOMETRIC:
            # an output point passes through the last operation first
            affine = affine @ np.vstack([_GEOMETRIC[op](sign), [0.0, 0.0, 1.0]])
        else:
            photometric.add(op)
    return AugmentParams(
        window=_draw_window(config.min_area, rng, aspect),
        flip=flip,
        autocontrast="autocontrast" in photometric,
        equalize="equalize" in photometric,
        affine=affine[:2],
    )


def _rotation(sign: float) -> np.ndarray:
    cos, sin = math.cos(ROTATION), sign * math.sin(ROTATION)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0]])


_GEOMETRIC = {
    "shear_x": lambda sign: np.array([[1.0, sign * SHEAR, 0.0], [0.0, 1.0, 0.0]]),
    "shear_y": lambda sign: np.array([[1.0, 0.0, 0.0], [sign * SHEAR, 1.0, 0.0]]),
    "shift_x": lambda sign: np.array([[1.0, 0.0, sign * SHIFT], [0.0, 1.0, 0.0]]),
    "shift_y": lambda sign: np.array([[1.0, 0.0, 0.0], [0.0, 1.0, sign * SHIFT]]),
    "rotate": _rotation,
}
OPS = (*_GEOMETRIC, "autocontrast", "equalize", "identity", "brightness", "sharpness")


def _draw_window(min_area: float, rng: np.random.Generator, aspect: float) -> tuple[float, float, float, float]:
    if min_area == 1:
        return 0.0, 0.0, 1.0, 1.0
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(_CROP_ATTEMPTS):
        area = min_area + (1 - min_area) * rng.random()
        ratio = math.exp(low + (high - low) * rng.random())
        width, height = math.sqrt(area * ratio / aspect), math.sqrt(area * aspect / ratio)
        if width <= 1 and height <= 1:
            x, y = (1 - width) * rng.random(), (1 - height) * rng.random()
            return x, y, x + width, y + height
    # the image is too long for any such crop: take its middle, with the nearest allowed ratio
    width = min(1.0, RATIO[1] / aspect)
    height = min(1.0, aspect / RATIO[0])
    return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2


def _clip_box(left: float, top: float, right: float, bottom: float) -> tuple[Box, float]:
    """The part of a box in the image, and its share of the area of the box."""
    share = _share_inside(left, right) * _share_inside(top, bottom)
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom))
    return (left, top, right, bottom), share


def _share_inside(low: float, high: float) -> float:
    """The share of low..high that lies in 0..1; a thin box may have no extent, because stored edges are rounded."""
    if high > low:
        return max(0.0, min(high, 1.0) - max(low, 0.0)) / (high - low)
    return float(0 <= low <= 1)
