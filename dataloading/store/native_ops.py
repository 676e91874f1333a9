"""Native ops on stored label maps (csrc/cpu/pixels.cpp), with numpy where the extension `prismer._C` was not built."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from prismer.kernels.machine import native_missing

_OPS = ("augment_photo", "augment_maps", "undifference", "values_in_use")


@cache
def is_built() -> bool:
    """Whether the pixel ops are there; an extension built from older sources lacks them."""
    return native_missing() is None and all(hasattr(torch.ops.prismer_native, op) for op in _OPS)


def undifference(plane: np.ndarray) -> None:
    """Add to each row of a writable, contiguous uint8 map the row above it, from top to bottom, mod 256."""
    if is_built():
        torch.ops.prismer_native.undifference(torch.from_numpy(plane.reshape(len(plane), -1)))
    else:
        np.add.accumulate(plane, axis=0, dtype=np.uint8, out=plane)


def values_in_use(plane: np.ndarray) -> list[int]:
    """The values that occur in a uint8 map, in ascending order."""
    if is_built():
        uses = torch.ops.prismer_native.values_in_use(as_tensor(plane)).numpy()
    else:
        uses = np.bincount(plane.ravel(), minlength=256)
    return np.flatnonzero(uses).tolist()


def as_tensor(plane: np.ndarray) -> Tensor:
    """A map as a contiguous tensor for an op that only reads it; torch refuses arrays that are read-only."""
    return torch.from_numpy(np.require(plane, requirements="CW"))
