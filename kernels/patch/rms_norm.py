"""RMS norm over the last dimension, alone or of a residual sum, with fp32 statistics.

    y = x_hat * weight,   x_hat = x * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)
    g = dy * weight,   dx = rstd * (g - x_hat * mean(g * x_hat)),   dweight = sum over rows of dy * x_hat

With a residual, `x` above is `total = x + residual`, rounded to its dtype. Autograd saves the input and one number a
row, where plain operators save three tensors of the size of the input. To autograd this is one op, made of torch's
operators. Source: Zhang and Sennrich, arXiv:1910.07467; the norms of Idefics2's resampler, arXiv:2405.02246.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prismer.kernels.checks import check_floats, check_like, described
from prismer.kernels.dispatch import TORCH, Op, runs_directly


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `rms_norm`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y if weight is None else y * weight.to(compute)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The definition of `add_rms_norm`."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


OP = Op(name="rms_norm", reference=rms_norm_reference, backends=(TORCH,))


# the registered ops


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, the sum (empty without a residual), and rstd."""
    compute = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if residual is None else x + residual
    x32 = (x if residual is None else total).to(compute)
    rstd = torch.linalg.vector_norm(x32, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x32 * rstd[:, None]
    if weight is not None:
        y *= weight
    return y.to(x.dtype), total, rstd


def _forward_fake(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=compute)


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, weight_trains: bool
) -> tuple[Tensor, Tensor]:
    compute = rstd.dtype
    x_hat, dy = x.to(compute) * rstd[:, None], dy.to(compute)
    dweight = (dy * x_hat).sum(0) if weight_trains else rstd.new_empty(0)
    g = dy if weight is None else dy * weight
    means = torch.linalg.vecdot(g, x_hat)[:, None] / x.shape[1]
    dx = torch.addcmul(g, x_hat, means, value=-1).mul_(rstd[:, None])
    if dtotal is not None:
        dx += dtotal
    return dx.to(x.dtype), dweight.to(x.dtype if weight is None else weight.dtype)


def _backward_fake(x: Tensor, weight: Tensor | None, rstd: Tensor, weight_trains: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape), rstd.new_empty(x.shape[1] if weight_trains else 0, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(*((total, rstd) if residual is None else (rstd,)))
    ctx.save_for_backward(x if residual is None else total, weight, rstd)


def _autograd(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    # only the sum was used, and its gradient passes through
    if dy is None:
        return dtotal, dtotal
    dx, dweight = _rms_norm_backward(dy, dtotal, *ctx.saved_tensors, ctx.needs_input_grad[2])
    return dx, dx, dweight


_rms_norm = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_rms_norm_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public functions


def _plan_norm(x: Tensor, weight: Tensor | None, eps: float) -> Callable:
    """What runs `rms_norm` on x and weight."""
    return _plan(x, None, weight, eps)


def _plan(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> Callable:
    """What runs `add_rms_norm` on x, residual and weight, or without a residual `rms_norm` on x and weight."""
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x is {described(x)}; pass floats of shape (..., D)")
    check_floats("weight", weight, x.shape[-1:])
    check_like("residual", residual, x.shape, "x", x.dtype)
    if OP.route(x) == "reference":
        return functools.partial(rms_norm_reference if residual is None else add_rms_norm_reference, eps=eps)
    direct = runs_directly(x, residual, weight)
    if direct and residual is None and x.is_contiguous() and (weight is None or weight.dtype == x.dtype):
        # torch's own operator costs the host least; where a gradient is needed, it keeps more
        width = x.shape[-1:]
        return lambda x, weight: torch.rms_norm(x, width, weight, eps)
    forward = _forward if direct else _rms_norm
    rows, shape = (-1, x.shape[-1]), x.shape
    if residual is None:
        return lambda x, weight: forward(x.reshape(rows), None, weight, eps)[0].view(shape)

    def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        y, total, _ = forward(x.reshape(rows), residual.reshape(rows), weight, eps)
        return y.view(shape), total.view(shape)

    return add_and_norm


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Divide the last dimension of `x` by its root mean square, with fp32 statistics.

    Args:
        x: (..., D), any floating dtype.
        weight: (D,), any floating dtype, or None for 1.
        eps: added to the mean of the squares, not to its root.

    Returns:
        (..., D) in the dtype of `x`.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    return OP.resolve(_plan_norm, (x, weight), eps)(x, weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add, then normalise: a residual sum and the norm that follows it.

    Args:
        x, residual: (..., D), of one dtype.
        weight, eps: as in `rms_norm`.

    Returns:
        The normalised sum and the sum itself, both (..., D).

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    return OP.resolve(_plan, (x, residual, weight), eps)(x, residual, weight)
