"""Decoded pictures and label maps -> what the model takes, sample by sample on a CPU, with native ops.

Several times faster than DALI's CPU operators, which stay where the extension `prismer._C` was not built; both do the
same (`tests/data/test_native_pixels.py` holds the tolerances). Every op works in the thread that calls it.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.feed.augment import AugmentParams
from prismer.experts import EXPERTS
from prismer.kernels.dispatch import native_missing

_OPS = ("augment_photo", "augment_maps", "undifference", "values_in_use")


@cache
def is_built() -> bool:
    """Whether the ops of this file are there; an extension built from older sources lacks them."""
    return native_missing() is None and all(hasattr(torch.ops.prismer_native, op) for op in _OPS)


def whole_pixels(window: tuple[float, float, float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the crop whose edges are the pixel edges nearest to those of `window`; at least one pixel."""
    (x0, x1), (y0, y1) = (_whole(window[axis], window[axis + 2], size) for axis, size in ((0, width), (1, height)))
    return x0, y0, x1, y1


def augment_photo(pixels: Tensor, box: tuple[int, ...], params: AugmentParams, out: Tensor) -> None:
    """Crop, resize (cubic with antialias, as Pillow does), flip, autocontrast, equalize and warp one picture.

    Args:
        pixels: (h, w, 3) uint8 on the CPU.
        box: x0, y0, x1, y1 of the crop in pixels, in place of `params.window`.
        params: the rest.
        out: (3, R, R) uint8, overwritten.
    """
    side = out.shape[1]
    x0, y0, x1, y1 = box
    # this view is "channels last", which torch resizes three times as fast as planes
    picture = pixels[y0:y1, x0:x1][None].permute(0, 3, 1, 2)
    picture = F.interpolate(picture, (side, side), mode="bicubic", antialias=True)
    torch.ops.prismer_native.augment_photo(
        picture[0].permute(1, 2, 0).contiguous(),
        torch.from_numpy(params.pixel_matrix(side)) if params.warps else None,
        params.flip,
        params.autocontrast,
        params.equalize,
        out,
    )


def augment_maps(
    maps: dict[str, np.ndarray],
    window: tuple[float, float, float, float],
    params: AugmentParams,
    out: dict[str, Tensor],
) -> None:
    """Crop, resize, flip and warp the maps of one sample to the nearest value, and turn its normals.

    Args:
        maps: expert -> uint8 (h, w) or (h, w, 3) of any size.
        window: x0, y0, x1, y1 of the crop as shares, in place of `params.window`.
        params: the rest.
        out: expert -> (planes, L, L) uint8, overwritten; with the expert's `fill` where it says nothing.
    """
    for name in out.keys() - maps.keys():
        out[name].fill_(EXPERTS[name].fill)
    # of one size beside each other: the op looks up places once for them
    names = sorted(out.keys() & maps.keys(), key=lambda name: (maps[name].shape[:2], name))
    if not names:
        return
    turn = params.normal_matrix()
    torch.ops.prismer_native.augment_maps(
        [_tensor(maps[name]) for name in names],
        [EXPERTS[name].fill for name in names],
        torch.tensor(window, dtype=torch.float64),
        torch.from_numpy(params.pixel_matrix(out[names[0]].shape[1])) if params.warps else None,
        params.flip,
        None if np.array_equal(turn, np.eye(2)) else torch.from_numpy(turn).float(),
        [out[name] for name in names],
    )


def undifference(plane: np.ndarray) -> None:
    """Add to each row of a writable uint8 map the one above it, from top to bottom, mod 256."""
    torch.ops.prismer_native.undifference(torch.from_numpy(plane.reshape(len(plane), -1)))


def values_in_use(plane: np.ndarray) -> list[int]:
    """The values that occur in a uint8 map, in ascending order."""
    if is_built():
        found = torch.ops.prismer_native.values_in_use(_tensor(plane))
        return np.flatnonzero(found.numpy()).tolist()
    return np.flatnonzero(np.bincount(plane.ravel(), minlength=256)).tolist()


def _tensor(plane: np.ndarray) -> Tensor:
    # torch takes no array that is read-only, though nothing here writes to it
    return torch.from_numpy(np.require(plane, requirements="CW"))


def _whole(low: float, high: float, size: int) -> tuple[int, int]:
    first, last = round(low * size), round(high * size)
    if first == last:
        first = min(int(low * size), size - 1)
        last = first + 1
    return first, last
