"""Checks that the public functions of several ops make of their arguments; a failed one raises ValueError."""

from collections.abc import Sequence

import torch
from torch import Tensor


def described(tensor: Tensor) -> str:
    """Dtype and shape, for a message."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def check_floats(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    """Check that `tensor` is None, or floats of any dtype in this shape."""
    if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
        raise ValueError(f"{name} is {described(tensor)}; pass floats of shape {tuple(shape)}")


def check_like(name: str, tensor: Tensor | None, shape: Sequence[int], like: str, dtype: torch.dtype) -> None:
    """Check that `tensor` is None, or has this shape and the dtype of the argument called `like`."""
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
        raise ValueError(f"{name} is {described(tensor)}; pass {dtype} of shape {tuple(shape)}, like {like}")


def check_linear(
    name: str, weight: Tensor, bias: Tensor | None, inputs: int, like: Tensor, outputs: int | None = None
) -> None:
    """Check that `weight` (outputs, inputs) and `bias` (outputs,) make a layer for x, which is `like`."""
    if (
        weight.dtype != like.dtype
        or weight.dim() != 2
        or not weight.numel()
        or weight.shape[1] != inputs
        or weight.shape[0] != (outputs or weight.shape[0])
    ):
        raise ValueError(
            f"{name}_weight is {described(weight)}; "
            f"pass {like.dtype}, like x, of shape ({outputs or 'outputs'}, {inputs})"
        )
    check_floats(f"{name}_bias", bias, weight.shape[:1])
