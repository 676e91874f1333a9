"""Rotary positions of queries and keys that lie packed beside the values, or of one of them alone.

    [a ; b] of a head becomes [a cos_1 - b sin_1 ; b cos_2 + a sin_2],   cos = [cos_1 ; cos_2], sin = [sin_1 ; sin_2]

The gradient is the same function with sin replaced by -[sin_2 ; sin_1]. Tokens in front of those that have positions
(a class token, registers) and groups after the rotated ones (the values) are copied. Computed in fp32 and rounded once.
The copy of the values is what lets autograd drop the packed projection: it keeps the result alone, 3 D numbers a token
with the values, where separate operators keep the projection and the two rotated tensors, 5 D.

Source: Su et al., arXiv:2104.09864; in two dimensions Qwen2-VL, arXiv:2409.12191, and DINOv3, arXiv:2508.10104.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prismer.kernels.checks import described
from prismer.kernels.dispatch import TORCH, Op, runs_directly


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `rotary`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    prefix = x.shape[1] - cos.shape[0]
    turned = x[:, prefix:, :rotated].to(compute)
    a, b = turned.chunk(2, dim=-1)
    cos, sin = (t.to(compute)[:, None, None] for t in (cos, sin))
    turned = (turned * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)
    return torch.cat((x[:, :prefix], torch.cat((turned, x[:, prefix:, rotated:]), 2)), 1)


OP = Op(name="rotary", reference=rotary_reference, backends=(TORCH,))


# the registered ops


def _forward(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    prefix, half = x.shape[1] - cos.shape[0], x.shape[-1] // 2
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y[:, :prefix] = x[:, :prefix]
    y[:, prefix:, rotated:] = x[:, prefix:, rotated:]
    given, turned = x[:, prefix:, :rotated], y[:, prefix:, :rotated]
    cos, sin = cos.to(compute)[:, None, None], sin.to(compute)[:, None, None]
    if x.dtype == compute:
        torch.mul(given, cos, out=turned)
        _add_crossed(turned, given, sin, half)
    else:
        given = given.to(compute)
        turned.copy_(_add_crossed(given * cos, given, sin, half))
    return y


def _add_crossed(out: Tensor, x: Tensor, sin: Tensor, half: int) -> Tensor:
    """out + [-b ; a] sin, in place, for x = [a ; b]."""
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _backward(dy: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    return _forward(dy, cos, -sin.roll(sin.shape[-1] // 2, -1), rotated)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.rotated = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary_backward(dy, *ctx.saved_tensors, ctx.rotated), None, None, None


_rotary = OP.register(_forward, fake=lambda x: x.new_empty(x.shape), setup_context=_setup_context, backward=_autograd)
_rotary_backward = OP.register(_backward, fake=lambda dy: dy.new_empty(dy.shape), suffix="_backward")


# the public function


def _plan(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Callable:
    if not x.is_floating_point() or x.dim() != 5 or x.shape[-1] % 2:
        raise ValueError(f"x is {described(x)}; pass floats of shape (B, N, G, H, K) with an even K")
    for name, t in (("cos", cos), ("sin", sin)):
        if not t.is_floating_point() or t.dim() != 2 or t.shape[0] > x.shape[1] or t.shape[1] != x.shape[-1]:
            raise ValueError(
                f"{name} is {described(t)}; pass floats of shape (P, {x.shape[-1]}), P at most {x.shape[1]}"
            )
        if t.requires_grad:
            raise ValueError(f"{name} needs a gradient, which this op does not compute; detach it")
    if cos.shape != sin.shape:
        raise ValueError(f"cos is {described(cos)} and sin {described(sin)}; pass one shape")
    if not 0 <= rotated <= x.shape[2]:
        raise ValueError(f"rotated is {rotated}; pass 0 to {x.shape[2]}, the groups of x")
    if OP.route(x) == "reference":
        return rotary_reference
    return _forward if runs_directly(x, cos, sin) else _rotary


def rotary(x: Tensor, cos: Tensor, sin: Tensor, rotated: int = 1) -> Tensor:
    """Rotate the first groups of the last tokens by their positions.

    Args:
        x: (B, N, G, H, K), G groups of H heads: 3 for packed queries, keys and values. Any strides.
        cos, sin: (P, K), of the last P of the N tokens; any floating dtype.
        rotated: how many groups are rotated.

    Returns:
        (B, N, G, H, K), contiguous, in the dtype of `x`.

    Raises:
        ValueError: if a shape, dtype or number does not fit.
    """
    return OP.resolve(_plan, (x, cos, sin), rotated)(x, cos, sin, rotated)
