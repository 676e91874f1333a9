"""Decoded images and label maps -> the model's inputs, sample by sample on a CPU, with native ops.

They are several times faster than DALI's CPU operators, which serve where the extension `prismer._C` was not built.
Both agree within the tolerances of `tests/data/test_native_pixels.py`. Every op runs in the thread that calls it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.feed.augment import AugmentParams
from prismer.dataloading.store.native_ops import as_tensor
from prismer.experts import EXPERTS


def whole_pixels(window: tuple[float, float, float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the crop in pixels: the edges of `window` moved to the nearest pixel edges; never empty."""
    edges = []
    for low, high, size in ((window[0], window[2], width), (window[1], window[3], height)):
        first, last = round(low * size), round(high * size)
        if first == last:
            first = min(int(low * size), size - 1)
            last = first + 1
        edges += [first, last]
    x0, x1, y0, y1 = edges
    return x0, y0, x1, y1


def augment_photo(pixels: Tensor, box: tuple[int, ...], params: AugmentParams, out: Tensor) -> None:
    """Crop, resize (cubic with antialias, as Pillow does), flip, autocontrast, equalize and warp one image.

    Args:
        pixels: (h, w, 3) uint8 on the CPU.
        box: x0, y0, x1, y1 of the crop in pixels, in place of `params.window`.
        params: the rest.
        out: (3, R, R) uint8, overwritten.
    """
    side = out.shape[1]
    x0, y0, x1, y1 = box
    # this view is "channels last", which torch resizes three times as fast as planes
    image = pixels[y0:y1, x0:x1][None].permute(0, 3, 1, 2)
    image = F.interpolate(image, (side, side), mode="bicubic", antialias=True)
    torch.ops.prismer_native.augment_photo(
        image[0].permute(1, 2, 0).contiguous(),
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
    """Crop, resize, flip and warp the maps of one sample by nearest neighbour, and turn its normals.

    Args:
        maps: expert -> uint8 (h, w) or (h, w, 3) of any size.
        window: x0, y0, x1, y1 of the crop as shares, in place of `params.window`.
        params: the rest.
        out: expert -> (planes, L, L) uint8, overwritten; missing maps become the expert's `fill`.
    """
    for name in out.keys() - maps.keys():
        out[name].fill_(EXPERTS[name].fill)
    # sorted by size: the op computes places once for neighbours of one size
    names = sorted(out.keys() & maps.keys(), key=lambda name: (maps[name].shape[:2], name))
    if not names:
        return
    turn = params.normal_matrix()
    torch.ops.prismer_native.augment_maps(
        [as_tensor(maps[name]) for name in names],
        [EXPERTS[name].fill for name in names],
        torch.tensor(window, dtype=torch.float64),
        torch.from_numpy(params.pixel_matrix(out[names[0]].shape[1])) if params.warps else None,
        params.flip,
        None if np.array_equal(turn, np.eye(2)) else torch.from_numpy(turn).float(),
        [out[name] for name in names],
    )
