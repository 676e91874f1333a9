"""Attention of a few queries over many tokens of another stream, with the projections to keys and values.

    k_h = W_k,h c + b_k,h,   v_h = W_v,h c + b_v,h,   p = softmax over the tokens of q_h . k_h / sqrt(K)
    m = 1 / (1 - dropout) for a weight that survives, else 0;   out_h = sum over tokens of m p v_h

The same value is computed in one of two orders. "ordinary" projects keys and values (2 L D E products an image) and
attends. "absorbed" moves the projections to the side with few rows (`absorbed_projection.py`):

    a_h = W_k,h^T q_h / sqrt(K)  (E numbers),   s = a_h . c,   t_h = sum m p c,   out_h = W_v,h t_h + b_v,h sum(m p)

b_k adds the same number to all scores of a query: it cancels, and its gradient is zero. Gradients, absorbed:

    dt_h = W_v,h^T dout_h,   dp = m (dt_h . c + dout_h . b_v,h),   ds = p (dp - sum p dp),   da_h = sum ds c
    dc = sum over queries and heads of ds a_h + m p dt_h,   dq_h = W_k,h da_h / sqrt(K)
    dW_k,h = q_h da_h^T / sqrt(K),   dW_v,h = dout_h t_h^T,   db_v,h = sum over rows of dout_h sum(m p)

FLOPs for B images, N queries, L tokens, widths D of queries and E of tokens (`flops` has the gradients):
    absorbed  2 B (2 N D E + 2 H N L E),      ordinary  2 B (2 L D E + 2 N L D)
With the 20 tokens of a caption a forward and backward pass takes 0.38 of the ordinary FLOPs at 480 px (BASE), and 0.43
at 224 px; from about 55 queries an image the ordinary order is cheaper.
Saved, in numbers, beside c and the parameters: absorbed B N D (q) + B H N L (p); t and m are formed again. The ordinary
order saves B L D for keys and for values, in every layer, and attention's own.
Source of the layer: Prismer, arXiv:2303.02506, section 3; Vaswani et al., arXiv:1706.03762, section 3.2.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import dispatch, tuning
from prismer.kernels.absorbed_projection import (
    bmm,
    context_to_heads,
    heads_to_context,
    image_slices,
    put_images,
    take_images,
    weight_gradient,
)
from prismer.kernels.attention import attention, attention_reference
from prismer.kernels.checks import check_linear, described
from prismer.kernels.dispatch import TORCH, Example, Op, in_its_dtype, runs_directly
from prismer.kernels.linear import linears
from prismer.kernels.philox import draw_seed, survivors
from prismer.kernels.tuning import class_with_tokens

_ARGUMENTS = ("q", "context", "k_weight", "k_bias", "v_weight", "v_bias")


def _heads(x: Tensor, H: int) -> Tensor:
    """(B, N, D) -> (B, H, N, K)"""
    B, N, D = x.shape
    return x.view(B, N, H, D // H).transpose(1, 2)


def cross_attention_reference(
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Arguments as in `cross_attention`."""
    compute = torch.promote_types(q.dtype, torch.float32)
    tensors = q, context, k_weight, k_bias, v_weight, v_bias
    q32, c, w_k, b_k, w_v, b_v = (None if t is None else t.to(compute) for t in tensors)
    q32, k, v = (_heads(t, num_heads) for t in (q32, F.linear(c, w_k, b_k), F.linear(c, w_v, b_v)))
    out = attention_reference(q32, k, v, dropout=dropout, seed=seed)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def _classify(q: Tensor, context: Tensor, num_heads: int) -> tuple[int, ...]:
    """Classes of images, queries and tokens; both widths; heads."""
    (B, N, D), (L, E) = q.shape, context.shape[1:]
    return class_with_tokens("cross_attention", B, (N, L), (D, E, num_heads))


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    B, N, L, D, E, H = shape
    q, context = (torch.randn(*s, device=device).to(dtype).requires_grad_() for s in ((B, N, D), (B, L, E)))
    weights = [torch.randn(D, E, device=device).mul_(E**-0.5).to(dtype).requires_grad_() for _ in range(2)]
    return cross_attention, [q, context, weights[0], None, weights[1], None, H]


ORDERS = ("absorbed", "ordinary")
# the absorbed order alone: the ordinary one consists of other ops
OP = Op(
    name="cross_attention",
    reference=cross_attention_reference,
    backends=(TORCH,),
    classify=_classify,
    paths=ORDERS,
    example=_example,
)


def flops(order: str, B: int, N: int, L: int, D: int, E: int, H: int, grads: Collection[str] = ()) -> int:
    """Floating-point operations of the matrix products of one call, forward and backward, counted exactly.

    Args:
        order: "absorbed" or "ordinary".
        B, N, L, D, E, H: images, queries, tokens, widths of queries and tokens, heads.
        grads: the arguments of `cross_attention` that need a gradient, by name; none is the forward pass alone.

    Returns:
        Twice the multiply-adds. Sums, scalings and the softmax are not counted.
    """
    q, context, k_weight, v_weight = (name in grads for name in ("q", "context", "k_weight", "v_weight"))
    if order == "absorbed":
        small, large = N * D * E, H * N * L * E
        total = 2 * small + 2 * large
        scores = q or context or k_weight
        if scores:
            total += small + large  # dt, dp
            total += (q or k_weight) * large + (q + k_weight) * small  # da; dq, dW_k
            total += context * (small + 2 * large)  # a again; dc of both its uses
        if v_weight:
            total += large + small  # t again, dW_v
    else:
        small, large = N * L * D, L * D * E
        total = 2 * large + 2 * small
        keys = any(name in grads for name in _ARGUMENTS[1:])
        if q or keys:
            total += small * (2 + q + 2 * keys)  # scores again, dp
            total += large * (2 * context + k_weight + v_weight)
    return 2 * B * total


def cheaper_order(B: int, N: int, L: int, D: int, E: int, H: int, grads: Collection[str] = ()) -> str:
    """The order that `order=None` takes on a CPU; arguments as in `flops`."""
    absorbed, ordinary = (flops(order, B, N, L, D, E, H, grads) for order in ("absorbed", "ordinary"))
    # the absorbed order loses the rest in its many small products
    return "absorbed" if absorbed < 0.8 * ordinary else "ordinary"


# the absorbed order: the registered ops


def _apply_dropout(p: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    """m p of some images, or m dp; `kept` says which of their weights survive, None that all do."""
    return p if kept is None else (p * kept).mul_(1 / (1 - dropout))


def _survivors(q: Tensor, L: int, seed: Tensor | None, num_heads: int, dropout: float) -> Tensor | None:
    """(B, H * N, L) bool, or None without dropout."""
    B, N, _ = q.shape
    return survivors(seed, B, num_heads, 0, N, L, dropout).flatten(1, 2) if dropout else None


def _per_head(sums: Tensor, num_heads: int) -> Tensor:
    """(B, H * N) -> (B, N, H, 1), to scale the heads of (B, N, H, K)."""
    return sums.unflatten(1, (num_heads, -1)).transpose(1, 2)[..., None]


def _forward(
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """out (B, N, D), and p (B, H * N, L) for the backward pass if `keep`."""
    q, context, H = q.contiguous(), context.contiguous(), num_heads
    (B, N, D), L = q.shape, context.shape[1]
    _, probs = _forward_fake(q, context, H, keep)
    compute = torch.promote_types(q.dtype, torch.float32)
    a = heads_to_context(q.view(-1, D), k_weight, H, (D // H) ** -0.5)
    survive, t = _survivors(q, L, seed, H, dropout), torch.empty_like(a)
    sums = q.new_empty(B, H * N if dropout else 0, dtype=compute)
    for images in image_slices(context, H * N * max(L, context.shape[2])):
        c = context[images]
        scores = bmm(take_images(a, B, images), c.mT)
        p = torch.softmax(scores, -1, out=probs[images] if keep else None)
        if dropout:
            p = _apply_dropout(p, survive[images], dropout)
            sums[images] = p.sum(-1, dtype=compute)
        put_images(bmm(p, c), t, B, images)
    out = context_to_heads(t, v_weight, 1.0).view(B, N, D)
    if v_bias is not None and dropout:
        out.unflatten(2, (H, -1)).add_(_per_head(sums, H) * v_bias.view(H, -1))
    elif v_bias is not None:
        out += v_bias
    return out, probs


def _forward_fake(q: Tensor, context: Tensor, num_heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    B, N, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B if keep else 0, num_heads * N, context.shape[1])


def _backward(
    dout: Tensor,
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    seed: Tensor | None,
    probs: Tensor,
    num_heads: int,
    dropout: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `_ARGUMENTS`; those that `needs` does not ask for are (0,)."""
    results = _backward_fake(q, context, k_weight, v_weight, needs)
    dq, dcontext, dk_weight, dk_bias, dv_weight, dv_bias = results
    need = dict(zip(_ARGUMENTS, needs, strict=True))
    dk_bias.zero_()
    q, context, H = q.contiguous(), context.contiguous(), num_heads
    (B, N, D), (L, E) = q.shape, context.shape[1:]
    scale, compute = (D // H) ** -0.5, torch.promote_types(q.dtype, torch.float32)
    rows, drows = q.view(-1, D), dout.reshape(-1, D)
    need_scores = need["q"] or need["context"] or need["k_weight"]
    if need_scores:
        dt = heads_to_context(drows, v_weight, H, 1.0)
        offset = None
        if v_bias is not None and dropout:
            # without dropout the weights of a query sum to one, and the softmax ignores what all its keys share
            heads = drows.view(B, N, H, -1).to(compute) * v_bias.view(H, -1)
            offset = heads.sum(-1).transpose(1, 2).flatten(1)[..., None].to(q.dtype)
    if need["context"]:
        a = heads_to_context(rows, k_weight, H, scale)
    da = q.new_empty(H, B * N, E) if need["q"] or need["k_weight"] else None
    t = q.new_empty(H, B * N, E) if need["v_weight"] else None
    sums = q.new_ones(B, H * N, dtype=compute)
    survive = _survivors(q, L, seed, H, dropout)
    for images in image_slices(context, 2 * H * N * max(L, E)):
        c, p = context[images], probs[images]
        kept = None if survive is None else survive[images]
        dropped = _apply_dropout(p, kept, dropout)
        if need["v_bias"] and dropout:
            sums[images] = dropped.sum(-1, dtype=compute)
        if t is not None:
            put_images(bmm(dropped, c), t, B, images)
        if not need_scores:
            continue
        dt_here = take_images(dt, B, images)
        dp = bmm(dt_here, c.mT)
        if offset is not None:
            dp += offset[images]
        ds = torch._softmax_backward_data(_apply_dropout(dp, kept, dropout), p, -1, p.dtype)
        if da is not None:
            put_images(bmm(ds, c), da, B, images)
        if need["context"]:
            # one product for both uses of the context, as keys and as values
            both = torch.cat([ds, dropped], 1).mT
            dcontext[images] = bmm(both, torch.cat([take_images(a, B, images), dt_here], 1))
    if need["q"]:
        dq.view(-1, D).copy_(context_to_heads(da, k_weight, scale))
    if need["k_weight"]:
        weight_gradient(rows, da, scale, dk_weight)
    if need["v_weight"]:
        weight_gradient(drows, t, 1.0, dv_weight)
    if need["v_bias"]:
        heads = drows.view(B, N, H, -1) * _per_head(sums, H)
        dv_bias.copy_(heads.flatten(2).sum((0, 1)))
    return results


def _backward_fake(
    q: Tensor, context: Tensor, k_weight: Tensor, v_weight: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    D = q.shape[2]
    shapes = q.shape, context.shape, k_weight.shape, (D,), v_weight.shape, (D,)
    return tuple(q.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, context, k_weight, _, v_weight, v_bias, seed, ctx.num_heads, ctx.dropout, _ = inputs
    probs = output[1]
    ctx.mark_non_differentiable(probs)
    ctx.save_for_backward(q, context, k_weight, v_weight, v_bias, seed, probs)


def _autograd(ctx: torch.autograd.function.FunctionCtx, dout: Tensor, _: None) -> tuple[Tensor, ...]:
    needs = list(ctx.needs_input_grad[:6])
    return _cross_attention_backward(dout, *ctx.saved_tensors, ctx.num_heads, ctx.dropout, needs)


_cross_attention = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_cross_attention_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _ordinary(
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout: float,
) -> Tensor:
    projected = linears(context, [(k_weight, k_bias), (v_weight, v_bias)])
    q, k, v = (_heads(t, num_heads) for t in (q, *projected))
    return attention(q, k, v, dropout=dropout, seed=seed).transpose(1, 2).flatten(2)


def _check(
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    dropout: float,
    order: str | None,
) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q is {described(q)}; pass floats of shape (B, N, D)")
    B, _, D = q.shape
    if context.dim() != 3 or context.shape[0] != B or context.dtype != q.dtype:
        raise ValueError(f"context is {described(context)}; pass {q.dtype} of shape ({B}, L, E), like q")
    for name, weight, bias in (("key", k_weight, k_bias), ("value", v_weight, v_bias)):
        check_linear(name, weight, bias, context.shape[2], q, outputs=D)
    if num_heads < 1 or D % num_heads:
        raise ValueError(f"num_heads is {num_heads}; pass a divisor of the width {D}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; pass a probability from 0 to below 1")
    if order not in (None, *ORDERS):
        raise ValueError(f"order is {order!r}; pass 'absorbed', 'ordinary', or None for the cheaper")


def _plan(
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout: float,
    order: str | None,
) -> Callable:
    """What runs a call on the six arguments of `_ARGUMENTS` and the seed."""
    tensors = q, context, k_weight, k_bias, v_weight, v_bias
    _check(*tensors, num_heads, dropout, order)
    device, share = q.device, float(dropout)
    if OP.route(q) == "reference":

        def define(*given: Any) -> Tensor:
            seed = draw_seed(share, given[6], device)
            return cross_attention_reference(*given[:6], num_heads, dropout=share, seed=seed)

        return define
    grads = []
    if torch.is_grad_enabled():
        grads = [name for name, t in zip(_ARGUMENTS, tensors, strict=True) if t is not None and t.requires_grad]
    if order is None:
        (B, N, D), (L, E) = q.shape, context.shape[1:]
        # an attention that is asked for by name runs in the ordinary order
        ours = q.device.type == "cpu" and dispatch.asked("attention") in (None, "native", "torch")
        order = cheaper_order(B, N, L, D, E, num_heads, grads) if ours else "ordinary"
        if dispatch.asked() is None and not torch.compiler.is_compiling():
            key = OP.name, q.dtype, bool(grads), _classify(q, context, num_heads)
            order = tuning.choice(q.device.type, key) or order
            tuning.record(q.device.type, key, order)
    if order == "ordinary" or not q.numel() or not context.numel():
        return functools.partial(_ordinary, num_heads=num_heads, dropout=dropout)
    forward: Callable = _forward if runs_directly(*tensors, seed) else _cross_attention
    keep = bool(grads)

    def attend(*given: Any) -> Tensor:
        return forward(*given[:6], draw_seed(share, given[6], device), num_heads, share, keep)[0]

    return in_its_dtype(attend, device)


def cross_attention(
    q: Tensor,
    context: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    order: str | None = None,
) -> Tensor:
    """Multi-head attention of projected queries over the keys and values that two linear layers make of `context`.

    Args:
        q: (B, N, D), the heads side by side, fp32, bf16, fp16 or float64.
        context: (B, L, E) of the same dtype.
        k_weight, v_weight: (D, E), like `q` in dtype.
        k_bias, v_bias: (D,) or None.
        num_heads: H, a divisor of D.
        dropout: probability that a weight is dropped; the rest are scaled by 1 / (1 - dropout).
        seed: int64, one element on the device of q: the same seed drops the same weights in both orders and in
            `attention`. None draws one from torch's generator.
        order: "absorbed" or "ordinary", equal but for rounding. None takes the cheaper one by `flops` on a CPU, and the
            ordinary one elsewhere, because it ends in a vendor's attention.

    Returns:
        (B, N, D), the heads side by side, before the output projection.

    Raises:
        ValueError: if a shape, a dtype or a setting does not fit.
    """
    tensors = q, context, k_weight, k_bias, v_weight, v_bias, seed
    return OP.resolve(_plan, tensors, num_heads, dropout, order)(*tensors)
