"""The gated perceptron of a transformer block, SwiGLU, as one op.

    g = x W_g^T + b_g,  u = x W_u^T + b_u,  y = (silu(g) * u) W_d^T + b_d
    da = dy W_d,  du = da silu(g),  dg = da u silu'(g),  dx = dg W_g + du W_u

For R rows and hidden width E, autograd saves g and u, 2 R E numbers, and x if a weight of the first layers trains.
Separate operators save g, u, silu(g), and the product if the last layer trains. The platform's library multiplies.
Source: Shazeer, arXiv:2002.05202; the vision tower of Qwen2.5-VL, arXiv:2502.13923, and DINOv3, arXiv:2508.10104.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.checks import check_like, check_linear, described
from prismer.kernels.dispatch import TORCH, Op, runs_directly


def gated_mlp_reference(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `gated_mlp`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    tensors = x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    x32, w_g, b_g, w_u, b_u, w_d, b_d = (None if t is None else t.to(compute) for t in tensors)
    gate = F.linear(x32, w_g, b_g)
    return F.linear(gate * torch.sigmoid(gate) * F.linear(x32, w_u, b_u), w_d, b_d).to(x.dtype)


OP = Op(
    name="gated_mlp",
    reference=gated_mlp_reference,
    backends=(TORCH,),
    # whether torch multiplies
    depends=torch._C._get_mkldnn_enabled,
)


# the registered ops


def _forward(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, g and u."""
    gate, up = matmul.linear(x, gate_weight, gate_bias), matmul.linear(x, up_weight, up_bias)
    return matmul.linear(F.silu(gate).mul_(up), down_weight, down_bias), gate, up


def _forward_fake(x: Tensor, gate_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = x.shape[0], gate_weight.shape[0]
    return x.new_empty(rows, down_weight.shape[0]), x.new_empty(rows, hidden), x.new_empty(rows, hidden)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    down_weight: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, of the inputs in their order."""
    dx, dgate_weight, dgate_bias, dup_weight, dup_bias, ddown_weight, ddown_bias = (dy.new_empty(0) for _ in range(7))
    if needs[5]:
        ddown_weight = matmul.mm(dy.mT, F.silu(gate).mul_(up))
    if needs[6]:
        ddown_bias = dy.sum(0)
    if any(needs[:5]):
        da = matmul.mm(dy, down_weight)
        dgate = torch.ops.aten.silu_backward(da * up, gate) if any(needs[:3]) else None
        dup = F.silu(gate).mul_(da) if needs[0] or any(needs[3:5]) else None
        if needs[0]:
            dx = matmul.add_mm(matmul.mm(dgate, gate_weight), dup, up_weight)
        if needs[1]:
            dgate_weight = matmul.mm(dgate.mT, x)
        if needs[2]:
            dgate_bias = dgate.sum(0)
        if needs[3]:
            dup_weight = matmul.mm(dup.mT, x)
        if needs[4]:
            dup_bias = dup.sum(0)
    return [dx, dgate_weight, dgate_bias, dup_weight, dup_bias, ddown_weight, ddown_bias]


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    gate_weight: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    hidden = () if gate is None else (gate.shape[1],)
    width = x.shape[1] if x is not None else 0 if gate_weight is None else gate_weight.shape[1]
    first, outputs = (*hidden, width), dy.shape[1]
    shapes: list[Any] = [(dy.shape[0], width), first, hidden, first, hidden, (outputs, *hidden), (outputs,)]
    return [dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, gate_weight, _, up_weight, _, down_weight, _ = inputs
    _, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    needs = ctx.needs_input_grad
    before, hidden = any(needs[:5]), any(needs[:6])
    ctx.save_for_backward(
        x if needs[1] or needs[3] else None,
        gate if hidden else None,
        up if hidden else None,
        gate_weight if needs[0] else None,
        up_weight if needs[0] else None,
        down_weight if before else None,
    )


def _autograd(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    grads = _gated_mlp_backward(dy.contiguous(), *ctx.saved_tensors, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_gated_mlp = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_gated_mlp_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _plan(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Callable:
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x is {described(x)}; pass floats of shape (..., D)")
    check_linear("gate", gate_weight, None, x.shape[-1], x)
    check_linear("up", up_weight, None, x.shape[-1], x, outputs=gate_weight.shape[0])
    check_linear("down", down_weight, None, gate_weight.shape[0], x)
    for name, weight, bias in (
        ("gate", gate_weight, gate_bias),
        ("up", up_weight, up_bias),
        ("down", down_weight, down_bias),
    ):
        check_like(f"{name}_bias", bias, weight.shape[:1], "x", x.dtype)
    if OP.route(x) == "reference":
        return gated_mlp_reference
    tensors = x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    forward = _forward if runs_directly(*tensors) else _gated_mlp
    rows, shape = (-1, x.shape[-1]), (*x.shape[:-1], down_weight.shape[0])
    return lambda x, *parameters: forward(x.reshape(rows), *parameters)[0].view(shape)


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)), which saves the two products of the first layers alone.

    Args:
        x: (..., D), any floating dtype.
        gate_weight, up_weight: (E, D), as in `nn.Linear`, of the dtype of `x`.
        down_weight: (O, E), likewise.
        gate_bias, up_bias, down_bias: (E,), (E,) and (O,), of the dtype of `x`, or None.

    Returns:
        (..., O) in the dtype of `x`.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    tensors = x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    return OP.resolve(_plan, tensors)(*tensors)
