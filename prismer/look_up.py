"""Rows of tensors by index, whose gradient is a look-up as well.

torch's own gradient of `index_select` adds rows into zeros one by one, since an index may come twice. Where the decoder
moves tokens between its layouts (`Packing`), only pads come twice, and their gradients are zero.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LookUp(torch.autograd.Function):
    """Rows of several tensors by index; the gradient is a look-up by the index of the way back."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, back: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(back)
        return tuple(x.index_select(0, index) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return None, None, *(dy.index_select(0, back) for dy in grads)


def look_up(index: Tensor, back: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows `index` of tensors (n, D), where `back` are the rows of the result that the rows of the tensors became.

    Rows that `back` leaves out, and those that `index` takes several times, must get gradients of zero.
    """
    if torch.compiler.is_compiling():
        return tuple(x.index_select(0, index) for x in tensors)
    return _LookUp.apply(index, back, *tensors)
