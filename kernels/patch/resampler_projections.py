"""Queries, keys and values of a resampler layer, whose inputs are normalised once for all layers, in one op.

    x = x_hat * gamma + beta,   q = z W_q^T,   k = [x ; z] W_k^T,   v = [x ; z] W_v^T

Autograd saves x_hat, which all layers share, and never x. If the inputs are larger than the weights, neither x nor
[x ; z] is computed: gamma is multiplied into the weights, and beta adds one row.

    k_x = x_hat (W_k gamma)^T + W_k beta,   G = dk_x^T x_hat (the gradient of W_k gamma),   s = column sums of dk_x
    dW_k = G gamma + s beta^T + dk_z^T z,   dgamma = column sums of G * W_k,   dbeta = W_k^T s,   and likewise for v
    dx_hat = (dk_x W_k + dv_x W_v) gamma,   dz = dq W_q + dk_z W_k + dv_z W_v

A norm that trains on frozen inputs then needs no product for dx; a separate norm would compute dx for dgamma alone.
Smaller inputs are multiplied in the plain order: it passes over the weights less often and needs one product, of the
same width, in place of two.

For B images, M latents, L inputs, width D, and I and J columns of q and of k: 2 B D (M I + 2 (M + L) J) FLOPs
forward; as many again for dW_q, dW_k and dW_v, and again for dz and dx_hat. Saved are z if a weight trains, and x_hat
if gamma, W_k or W_v trains.
Source: the resampler of Flamingo, arXiv:2204.14198, section 3.1.1, whose layers share their inputs; associativity.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.checks import check_like, check_linear, described
from prismer.kernels.dispatch import TORCH, Op, runs_directly


def resampler_projections_reference(
    z: Tensor, x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None, w_q: Tensor, w_k: Tensor, w_v: Tensor | None
) -> list[Tensor]:
    """The definition, fp32 inside (float64 for float64). Shapes as in `resampler_projections`."""
    compute = torch.promote_types(z.dtype, torch.float32)
    rows, x = z.to(compute), x_hat.to(compute)
    if gamma is not None:
        x = x * gamma.to(compute)
    if beta is not None:
        x = x + beta.to(compute)
    w_k, w_v = w_k.chunk(2) if w_v is None else (w_k, w_v)
    keys = torch.cat([x, rows], 1)
    pairs = (rows, w_q), (keys, w_k), (keys, w_v)
    return [F.linear(t, weight.to(compute)).to(z.dtype) for t, weight in pairs]


OP = Op(name="resampler_projections", reference=resampler_projections_reference, backends=(TORCH,))


# the registered ops

# the arguments of the op, for their gradients
_NAMES = ("z", "x_hat", "gamma", "beta", "q", "k", "v")


def _has_small_inputs(x_hat_numel: int, weight: Tensor) -> bool:
    """Whether the inputs are smaller than the weights of keys and values together; `weight` is one of the two."""
    return x_hat_numel <= 2 * weight.numel()


def _keys_input(z: Tensor, x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """[x ; z], (B, L + M, D)."""
    (B, M, D), L = z.shape, x_hat.shape[1]
    keys = z.new_empty(B, L + M, D)
    x = keys[:, :L]
    if gamma is None:
        x.copy_(x_hat)
    else:
        torch.mul(x_hat, gamma, out=x)
    if beta is not None:
        x += beta
    keys[:, L:] = z
    return keys


def _forward(
    z: Tensor, x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None, w_q: Tensor, w_k: Tensor, w_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    z, x_hat = z.contiguous(), x_hat.contiguous()
    w_k, w_v = w_k.chunk(2) if w_v is None else (w_k, w_v)
    if _has_small_inputs(x_hat.numel(), w_k):
        keys = _keys_input(z, x_hat, gamma, beta)
        return matmul.linear(z, w_q), matmul.linear(keys, w_k), matmul.linear(keys, w_v)
    scaled = (w_k, w_v) if gamma is None else (w_k * gamma, w_v * gamma)
    offsets = (None, None) if beta is None else (torch.mv(w_k, beta), torch.mv(w_v, beta))
    k, v = (
        torch.cat([matmul.linear(x_hat, folded, offset), matmul.linear(z, weight)], 1)
        for folded, offset, weight in zip(scaled, offsets, (w_k, w_v), strict=True)
    )
    return matmul.linear(z, w_q), k, v


def _forward_fake(
    z: Tensor, x_hat: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, M, _), N = z.shape, z.shape[1] + x_hat.shape[1]
    J = w_k.shape[0] // 2 if w_v is None else w_k.shape[0]
    return z.new_empty(B, M, w_q.shape[0]), z.new_empty(B, N, J), z.new_empty(B, N, J)


def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    z: Tensor | None,
    x_hat: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor | None,
    M: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`needs`: which arguments of `_forward` need a gradient. z and x_hat are given if such a gradient reads them."""
    results: Any = _backward_fake(dq, dk, w_q, w_k, w_v, M, needs)
    need, grads = dict(zip(_NAMES, needs, strict=True)), dict(zip(_NAMES, results, strict=True))
    B, L, D = len(dq), dk.shape[1] - M, w_q.shape[1]
    dq = dq.reshape(B * M, -1)
    if need["q"]:
        assert z is not None
        grads["q"].copy_(matmul.mm(dq.T, z.reshape(-1, D)))
    if need["z"]:
        grads["z"].view(-1, D).copy_(matmul.mm(dq, w_q))
    if w_v is None:
        weights, dweights, trains = w_k.chunk(2), grads["k"].chunk(2), (need["k"], need["k"])
    else:
        weights, dweights, trains = (w_k, w_v), (grads["k"], grads["v"]), (need["k"], need["v"])
    layers = list(zip((dk, dv), weights, dweights, trains, strict=True))
    if need["x_hat"] and _has_small_inputs(B * L * D, weights[0]):
        _backward_plain(layers, (z, x_hat, gamma, beta), M, need, grads)
    else:
        _backward_folded(layers, (z, x_hat, gamma, beta), M, need, grads)
    return results


# of keys and of values: gradient of the output, weight, gradient of the weight, whether the weight trains
_Layers = list[tuple[Tensor, Tensor, Tensor, bool]]
# z, x_hat, gamma and beta, of which each may be None
_Saved = tuple[Any, Any, Any, Any]


def _backward_plain(layers: _Layers, saved: _Saved, M: int, need: dict[str, bool], grads: dict[str, Tensor]) -> None:
    """Fill `grads` through [x ; z]; for small inputs whose gradient is needed."""
    z, x_hat, gamma, beta = saved
    (B, N, _), D = layers[0][0].shape, layers[0][1].shape[1]
    L = N - M
    if any(trains for *_, trains in layers):
        keys = _keys_input(z, x_hat, gamma, beta).view(-1, D)
    dkeys: Any = None
    for d, weight, dweight, trains in layers:
        d = d.reshape(B * N, -1)
        dkeys = matmul.mm(d, weight) if dkeys is None else dkeys.add_(matmul.mm(d, weight))
        if trains:
            dweight.copy_(matmul.mm(d.T, keys))
    dkeys = dkeys.view(B, N, D)
    if need["z"]:
        grads["z"] += dkeys[:, L:]
    # copied first, since torch sums scattered rows twenty times slower
    dx = grads["x_hat"].copy_(dkeys[:, :L]).view(-1, D)
    if need["gamma"]:
        torch.sum(dx * x_hat.reshape(-1, D), 0, out=grads["gamma"])
    if need["beta"]:
        torch.sum(dx, 0, out=grads["beta"])
    if gamma is not None:
        dx *= gamma


def _backward_folded(layers: _Layers, saved: _Saved, M: int, need: dict[str, bool], grads: dict[str, Tensor]) -> None:
    """Fill `grads` without x, by the formulas above."""
    z, x_hat, gamma, beta = saved
    (B, N, _), D = layers[0][0].shape, layers[0][1].shape[1]
    L = N - M
    rows: Any = None if z is None else z.reshape(B * M, D)
    inputs: Any = None if x_hat is None else x_hat.reshape(B * L, D)
    for i, (d, weight, dweight, trains) in enumerate(layers):
        d_x, d_z = d[:, :L].reshape(B * L, -1), d[:, L:].reshape(B * M, -1)
        if need["z"]:
            grads["z"].view(-1, D).addmm_(d_z, weight)
        if need["x_hat"]:
            dx = grads["x_hat"].view(-1, D)
            torch.addmm(dx, d_x, weight, beta=float(i > 0), out=dx)
        if (trains or need["beta"]) and beta is not None:
            sums = d_x.sum(0)
        if trains or need["gamma"]:
            folded = torch.mm(d_x.T, inputs, out=dweight if trains else None)
        if need["gamma"]:
            grads["gamma"] += (folded * weight).sum(0, dtype=gamma.dtype)
        if need["beta"]:
            grads["beta"] += torch.mv(weight.T, sums)
        if trains:
            if gamma is not None:
                folded *= gamma
            if beta is not None:
                folded.addr_(sums, beta)
            folded.addmm_(d_z.T, rows)
    if need["x_hat"] and gamma is not None:
        grads["x_hat"] *= gamma


def _backward_fake(
    dq: Tensor, dk: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor | None, M: int, needs: list[bool]
) -> tuple[Tensor, ...]:
    (B, N, _), D = dk.shape, w_q.shape[1]
    shapes: list[Any] = [(B, M, D), (B, N - M, D), (D,), (D,), w_q.shape, w_k.shape, w_v if w_v is None else w_v.shape]
    empty = [dq.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]
    # gamma's and beta's are summed over keys and values
    for i in (2, 3):
        empty[i].zero_()
    return tuple(empty)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, x_hat, gamma, beta, w_q, w_k, w_v = inputs
    needs = ctx.needs_input_grad
    # an output that nothing used has a gradient of zeros
    ctx.set_materialize_grads(True)
    ctx.num_latents = z.shape[1]
    kept_z = z if any(needs[4:]) else None
    kept_x = x_hat if needs[2] or needs[5] or needs[6] else None
    ctx.save_for_backward(kept_z, kept_x, gamma, beta, w_q, w_k, w_v)


def _autograd(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    return _projections_backward(dq, dk, dv, *ctx.saved_tensors, ctx.num_latents, list(ctx.needs_input_grad))


_projections = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_projections_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _plan(
    z: Tensor, x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None, w_q: Tensor, w_k: Tensor, w_v: Tensor | None
) -> Callable:
    if z.dim() != 3 or not z.is_floating_point():
        raise ValueError(f"z is {described(z)}; pass floats of shape (B, M, D)")
    B, _, D = z.shape
    if x_hat.dim() != 3 or x_hat.shape[::2] != (B, D) or x_hat.dtype != z.dtype:
        raise ValueError(f"x_hat is {described(x_hat)}; pass {z.dtype} of shape ({B}, L, {D}), like z")
    check_like("gamma", gamma, (D,), "z", z.dtype)
    check_like("beta", beta, (D,), "z", z.dtype)
    check_linear("q", w_q, None, D, z)
    check_linear("k", w_k, None, D, z)
    if w_v is not None:
        check_linear("v", w_v, None, D, z, outputs=w_k.shape[0])
    elif w_k.shape[0] % 2:
        raise ValueError(f"w_k has {w_k.shape[0]} rows and w_v is None; pass as many rows for values as for keys")
    if OP.route(z) == "reference":
        return resampler_projections_reference
    return _forward if runs_directly(z, x_hat, gamma, beta, w_q, w_k, w_v) else _projections


def resampler_projections(
    z: Tensor, x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None, w_q: Tensor, w_k: Tensor, w_v: Tensor | None
) -> list[Tensor]:
    """Project the latents to q, and the inputs and then the latents to k and v.

    Args:
        z: (B, M, D), the normalised latents, any floating dtype.
        x_hat: (B, L, D), the inputs after a norm without weight and bias. All layers share it.
        gamma, beta: (D,), the weight and bias of that norm, or None for 1 and 0.
        w_q: (I, D).
        w_k, w_v: (J, D) each. If `w_v` is None, `w_k` holds both, (2 J, D).

    Returns:
        (B, M, I), (B, L + M, J) and (B, L + M, J).

    Raises:
        ValueError: if a shape does not fit, or a dtype is not that of `z`.
    """
    tensors = z, x_hat, gamma, beta, w_q, w_k, w_v
    return list(OP.resolve(_plan, tensors)(*tensors))
