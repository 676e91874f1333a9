"""Up to three linear layers of one input as one op: the projections of attention.

    y_i = x W_i^T + b_i
    dx = sum over i of dy_i W_i,   dW_i = dy_i^T x,   db_i = sum over rows of dy_i

The gradient of the input is accumulated inside the matrix products; separate layers would write three tensors and add
them. Frozen layers compute and save nothing. The products themselves are the platform's library.
Source: query, key and value of Vaswani et al., arXiv:1706.03762, section 3.2.

FLOPs: 2 R D N forward for N outputs in all, as many again for dx, and as many again for the weights that train.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.dispatch import TORCH, Example, Op, is_partitioned, rows_and_width, runs_directly

_MOST = 3


def linears_reference(x: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """The definition. Arguments as in `linears`."""
    return [F.linear(x, weight, bias) for weight, bias in layers]


def _host(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own layers serve the call as well: the op saves no product. `weight` is the first one."""
    return not is_partitioned(weight)


def _host_first(x: Tensor, weight: Tensor) -> bool:
    return matmul.torch_multiplies(x, weight.shape[0])


def _classify(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return *rows_and_width(x), weight.shape[0]


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    R, D, N = shape
    x, weight = (torch.randn(*s, device=device) for s in ((R, D), (N, D)))
    return _first_of_linears, [x.to(dtype).requires_grad_(), (weight * D**-0.5).to(dtype).requires_grad_()]


OP = Op(
    name="linears",
    reference=linears_reference,
    backends=(TORCH,),
    host=_host,
    host_first=_host_first,
    classify=_classify,
    example=_example,
    # whether torch multiplies
    depends=torch._C._get_mkldnn_enabled,
)


# the registered ops


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, w3: Tensor | None, b3: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    layers = (w1, b1), (w2, b2), (w3, b3)
    return tuple(x.new_empty(0) if weight is None else matmul.linear(x, weight, bias) for weight, bias in layers)


def _forward_fake(x: Tensor, w1: Tensor, w2: Tensor | None, w3: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0 if weight is None else (x.shape[0], weight.shape[0])) for weight in (w1, w2, w3))


def _backward(
    x: Tensor | None,
    dys: list[Tensor],
    weights: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for: dx, then weight and bias of each layer.

    `x` is given if a weight trains, and `weights` if dx is needed.
    """
    grads = []
    if needs[0]:
        dx = matmul.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx = matmul.add_mm(dx, dy, weight)
        grads.append(dx)
    for i, dy in enumerate(dys):
        if needs[1 + 2 * i]:
            grads.append(matmul.mm(dy.mT, x))
        if needs[2 + 2 * i]:
            grads.append(dy.sum(0))
    return grads


def _backward_fake(x: Tensor | None, dys: list[Tensor], weights: list[Tensor], needs: list[bool]) -> list[Tensor]:
    grads = [dys[0].new_empty(dys[0].shape[0], weights[0].shape[1])] if needs[0] else []
    for i, dy in enumerate(dys):
        if needs[1 + 2 * i]:
            grads.append(dy.new_empty(dy.shape[1], x.shape[1]))
        if needs[2 + 2 * i]:
            grads.append(dy.new_empty(dy.shape[1]))
    return grads


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, *tensors = inputs
    ctx.mark_non_differentiable(*(y for y, w in zip(output, tensors[::2], strict=True) if w is None))
    needs = ctx.needs_input_grad
    weights = [w if needs[0] else None for w in tensors[::2]]
    ctx.save_for_backward(x if any(needs[1::2]) else None, *weights)


def _autograd(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    # layers whose output was used
    used = [i for i, dy in enumerate(dys) if dy is not None]
    needs = [bool(need) and (i == 0 or (i - 1) // 2 in used) for i, need in enumerate(ctx.needs_input_grad)]
    asked = needs[:1] + [needs[j] for i in used for j in (1 + 2 * i, 2 + 2 * i)]
    grads = iter(_linears_backward(x, [dys[i] for i in used], [weights[i] for i in used] if needs[0] else [], asked))
    return tuple(next(grads) if need else None for need in needs)


_linears = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_linears_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _plan(x: Tensor, *more: Any) -> Callable:
    """`more`: weight and bias of each layer; last, whether the first weight is partitioned, which decides the route."""
    flat = more[:-1]
    layers = list(zip(flat[::2], flat[1::2], strict=True))
    if not 1 <= len(layers) <= _MOST:
        raise ValueError(f"{len(layers)} layers were given; pass one to {_MOST}")
    for weight, bias in layers:
        fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.dtype == x.dtype
        if not fits or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype)):
            raise ValueError(
                f"weight {tuple(weight.shape)} {weight.dtype} and bias {None if bias is None else tuple(bias.shape)} "
                f"do not fit x {tuple(x.shape)} {x.dtype}; pass (N, {x.shape[-1]}) and (N,) of {x.dtype}"
            )
    route = OP.route(x, layers[0][0])
    if route == "reference":
        return linears_reference
    # the op's implementation consists of the same products
    if route == "host" or runs_directly(x, *flat):
        products = [matmul.plan(x, weight, bias) for weight, bias in layers]
        if len(products) == 1:
            multiply = products[0]
            return lambda x, layers: [multiply(x, *layers[0])]
        return lambda x, layers: [product(x, *layer) for product, layer in zip(products, layers, strict=True)]
    return _through_the_op


def _through_the_op(x: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    flat = [t for layer in layers for t in layer] + [None, None] * (_MOST - len(layers))
    outputs = _linears(x.reshape(-1, x.shape[-1]), *flat)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(layers)]]


def linears(x: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """One to three linear layers of the same input.

    Args:
        x: (..., D), any floating dtype.
        layers: weight (N, D) and bias (N,) or None of each, in the dtype of `x`.

    Returns:
        A (..., N) tensor for each layer.

    Raises:
        ValueError: if there are none or more than three layers, or a shape or dtype does not fit.
    """
    tensors = (x, *itertools.chain.from_iterable(layers))
    return OP.resolve(_plan, tensors, bool(layers) and is_partitioned(layers[0][0]))(x, layers)


def _first_of_linears(x: Tensor, weight: Tensor) -> Tensor:
    return linears(x, [(weight, None)])[0]
