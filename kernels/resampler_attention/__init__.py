"""Attention of a resampler's latents over themselves and over the inputs, without keys and values of the inputs.

    x = x_hat * gamma + beta,   keys = [query ; x],   x_hat = the inputs, standardised once for all layers
    q_h = W_q,h query + b_q,h,   P_h = softmax over n of q_h . (W_k,h keys_n + b_k,h) / sqrt(K)
    out_h = P_h (W_v,h keys + b_v,h)

b_k adds the same number to all scores of a query, so it cancels, and its gradient is zero. The same value is computed
in one of two orders. "ordinary" projects keys and values (2 N D^2 products an image) and then attends. "absorbed" moves
the projections to the other side of the products with the keys, where there are few rows:

    a_h = W_k,h^T q_h / sqrt(K)  (D numbers),  scores = (a_h * gamma) . x_hat_n + a_h . beta  and  a_h . query_m
    t_h = gamma * (P_x x_hat) + beta * sum(P_x) + P_z query,                   out_h = W_v,h t_h + b_v,h

Then x_hat itself is key and value of every head and layer, and keys and values of the inputs never exist.
Sources: the resampler of Prismer, arXiv:2303.02506, and of Flamingo, arXiv:2204.14198; associativity.

Matrix products for B images, M queries, L inputs, N = M + L keys, Q = H M absorbed queries (`flops` has the gradients):
    absorbed  2 B (3 M D^2 + 2 Q N D),      ordinary  2 B (M D^2 + 2 N D^2 + 2 M N D)
`order=None` takes the absorbed order if it needs less than 0.8 of the FLOPs of the ordinary one, for the forward pass
and the gradients that this call needs. It loses the rest in many small products: measured on a CPU, it takes 1.0 to 1.1
of the time at 0.86 of the FLOPs, 0.70 at 0.67, and 0.52 at 0.52. Without the projection of the queries, which both
orders share, the absorbed order needs 0.66 (BASE), 0.51 (LARGE), 0.42 (HUGE) of the ordinary one with six experts, and
0.84 with one. All gradients together keep that ratio. Frozen weights save products in the ordinary order alone, so that
BASE with frozen weights takes the ordinary order.

Saved for the backward pass, in bytes, for numbers of s bytes, beside the inputs and parameters themselves:
    absorbed  B M D s (q) + B Q N s (probabilities); and B Q D s + 4 B Q where the norm or in_proj_weight trains.
              Triton pads N to W = 64 (ceil(M / 64) + ceil(L / 64)), and saves 4 B Q W / 64 more
    ordinary  B M D s (q) + B Q N s (probabilities) + 2 B N D s (keys and values)
"""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from prismer.kernels import dispatch, matmul, tuning
from prismer.kernels.absorbed_projection import context_to_heads, heads_to_context, weight_gradient
from prismer.kernels.attention import attention
from prismer.kernels.checks import check_floats, check_like, described
from prismer.kernels.dispatch import TORCH, TRITON, Example, Op, in_its_dtype, runs_directly
from prismer.kernels.layer_norm import layer_norm
from prismer.kernels.linear import linears
from prismer.kernels.resampler_attention import torch_backend, triton_backend
from prismer.kernels.tuning import class_with_tokens

# their gradients need P_x x_hat again
_MIXED = {"norm_weight", "norm_bias", "in_proj_weight"}
_ARGUMENTS = ("query", "x_hat", "norm_weight", "norm_bias", "in_proj_weight", "in_proj_bias")


def standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance in the last dimension: `x_hat` of `resampler_attention`, one call for all layers."""
    return layer_norm(x, None, None, eps)


def resampler_attention_reference(
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `resampler_attention`."""
    compute = torch.promote_types(query.dtype, torch.float32)
    query32, x = query.to(compute), x_hat.to(compute) * norm_weight.to(compute)
    keys = torch.cat([query32, x + norm_bias.to(compute)], dim=1)
    weights, biases = in_proj_weight.to(compute).chunk(3), in_proj_bias.to(compute).chunk(3)
    q, k, v = (
        torch.nn.functional.linear(t, weight, bias).unflatten(2, (num_heads, -1)).transpose(1, 2)
        for t, weight, bias in zip((query32, keys, keys), weights, biases, strict=True)
    )
    probs = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    return (probs @ v).transpose(1, 2).flatten(2).to(query.dtype)


def _classify(query: Tensor, x_hat: Tensor, num_heads: int) -> tuple[int, ...]:
    """Classes of images, queries and inputs; width; heads."""
    B, M, D = query.shape
    return class_with_tokens("resampler_attention", B, (M, x_hat.shape[1]), (D, num_heads))


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    B, M, L, D, H = shape
    sizes = (B, M, D), (B, L, D), (D,), (D,), (3 * D, D), (3 * D,)
    tensors = [torch.randn(*size, device=device) for size in sizes]
    tensors[4] *= D**-0.5
    return resampler_attention, [*(t.to(dtype).requires_grad_() for t in tensors), H]


# the two orders of this op, and the same from torch's operators and the fastest attention
PATHS = ("absorbed", "ordinary", "composed")
OP = Op(
    name="resampler_attention",
    reference=resampler_attention_reference,
    backends=(TRITON, TORCH),
    paths=PATHS,
    classify=_classify,
    example=_example,
)


def flops(order: str, B: int, M: int, L: int, D: int, H: int, grads: Collection[str] = ()) -> int:
    """Floating-point operations of the matrix products of one call, forward and backward, counted exactly.

    Args:
        order: "absorbed" or "ordinary".
        B, M, L, D, H: images, queries, inputs, width, heads.
        grads: the arguments of `resampler_attention` that need a gradient, by name; none is the forward pass alone.

    Returns:
        Twice the multiply-adds. Sums, scalings and the softmax are not counted.
    """
    N, Q = M + L, H * M
    query, x_hat, weight = (name in grads for name in ("query", "x_hat", "in_proj_weight"))
    norm = "norm_weight" in grads or "norm_bias" in grads
    dq = query or weight or "in_proj_bias" in grads
    small = M * D * D  # one projection of the queries, or of their absorbed form
    if order == "absorbed":
        total = 3 * small + 2 * Q * N * D
        if grads:
            total += 2 * small + Q * N * D  # a again, dt, dprobs
            total += (dq or norm) * Q * N * D + dq * small  # da, dq
            total += x_hat * 2 * Q * L * D
            total += query * (2 * Q * M * D + small)
            total += weight * (3 * small + Q * M * D)  # three projections; t again
    else:
        total = small + 2 * N * D * D + 2 * M * N * D
        if grads:
            keys = query or x_hat or norm or weight
            total += (1 + dq + 2 * keys) * M * N * D  # dprobs, dq, dk and dv
            total += (x_hat or norm) * 2 * L * D * D + query * 3 * small
            total += weight * (2 * L * D * D + 3 * small)
    return 2 * B * total


def cheaper_order(B: int, M: int, L: int, D: int, H: int, grads: Collection[str] = ()) -> str:
    """The order that `order=None` takes; arguments as in `flops`."""
    absorbed, ordinary = (flops(order, B, M, L, D, H, grads) for order in ("absorbed", "ordinary"))
    return "absorbed" if absorbed < 0.8 * ordinary else "ordinary"


# both backends of the absorbed order


def _absorbed_forward(
    query: Tensor,
    x_hat: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    H: int,
    triton: bool,
    keep: bool,
    keep_mixed: bool,
) -> tuple[Tensor | None, ...]:
    (B, M, D), scale = query.shape, (query.shape[2] // H) ** -0.5
    w_q, w_k, w_v = weight.view(3, D, D)
    q = matmul.linear(query.view(-1, D), w_q, bias[:D])
    a, factor = heads_to_context(q, w_k, H, scale), None
    if triton:
        t, probs, factor, share, mixed = triton_backend.attend(a, query, x_hat, gamma, beta, keep_mixed)
    else:
        t, probs, share, mixed = torch_backend.attend(a, query, x_hat, gamma, beta, keep, keep_mixed)
    # the probabilities of a query sum to one, so b_v passes through
    out = context_to_heads(t, w_v, 1.0).add_(bias[2 * D :])
    return out.view(B, M, D), q.view(B, M, D), probs, factor, share, mixed


def _absorbed_backward(
    dy: Tensor,
    query: Tensor,
    x_hat: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    q: Tensor,
    probs: Tensor,
    factor: Tensor,
    share: Tensor,
    mixed: Tensor,
    H: int,
    needs: dict[str, bool],
    results: tuple[Tensor, ...],
) -> None:
    D, scale = query.shape[2], (query.shape[2] // H) ** -0.5
    w_q, w_k, w_v = weight.view(3, D, D)
    rows, q, dy = query.view(-1, D), q.view(-1, D), dy.view(-1, D)
    dquery, _, _, _, dweight, dbias = results
    a, dt = heads_to_context(q, w_k, H, scale), heads_to_context(dy, w_v, H, 1.0)
    if factor.numel():
        da, t = triton_backend.attend_backward(
            a, dt, query, x_hat, gamma, beta, probs, factor, share, mixed, needs, results
        )
    else:
        da, t = torch_backend.attend_backward(a, dt, query, x_hat, gamma, beta, probs, share, mixed, needs, results)
    if needs["query"] or needs["in_proj_weight"] or needs["in_proj_bias"]:
        dq = context_to_heads(da, w_k, scale)
    if needs["query"]:
        dquery = dquery.view(-1, D)
        dquery += matmul.mm(dq, w_q)
    if needs["in_proj_weight"]:
        dweight[:D] = matmul.mm(dq.T, rows)
        weight_gradient(q, da, scale, dweight[D : 2 * D])
        weight_gradient(dy, t, 1.0, dweight[2 * D :])
    if needs["in_proj_bias"]:
        torch_backend.bias_gradient(dq, dy, dbias)


# the registered ops


def _is_triton(query: Tensor, absorbed: bool) -> bool:
    """The ordinary order consists of torch products alone, whatever is asked for; an empty batch needs no kernel."""
    return absorbed and query.numel() > 0 and OP.choose(query) == "triton"


def _forward(
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    absorbed: bool,
    keep: bool,
    keep_mixed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, x_hat, weight = (t.contiguous() for t in (query, x_hat, in_proj_weight))
    arguments = query, x_hat, norm_weight, norm_bias, weight, in_proj_bias, num_heads
    if absorbed:
        triton = _is_triton(query, absorbed)
        out, *state = _absorbed_forward(*arguments, triton, keep, keep_mixed)
        kept = (keep, keep, keep and triton, keep_mixed, keep_mixed, False)
        state = *state, None
    else:
        out, q, probs, kv = torch_backend.ordinary_forward(*arguments, keep)
        kept, state = (keep, keep, False, False, False, keep), (q, probs, *[None] * 3, kv)
    empty = _forward_fake(query, x_hat, num_heads, absorbed, False, False)[1:]
    return out, *(t if k else e for t, k, e in zip(state, kept, empty, strict=True))


def _forward_fake(
    query: Tensor, x_hat: Tensor, num_heads: int, absorbed: bool, keep: bool, keep_mixed: bool
) -> tuple[Tensor, ...]:
    (B, M, D), L = query.shape, x_hat.shape[1]
    Q, compute = num_heads * M, torch.promote_types(query.dtype, torch.float32)
    triton = keep and _is_triton(query, absorbed)
    blocks = sum(triton_backend.blocks_of(M, L))
    width = blocks * triton_backend.BLOCK if triton else M + L

    def state(wanted: bool, *shape: int, dtype: torch.dtype = query.dtype) -> Tensor:
        return query.new_empty(shape if wanted else 0, dtype=dtype)

    return (
        query.new_empty(B, M, D),
        state(keep, B, M, D),
        state(keep, B, Q, width),
        state(triton, B, Q, blocks, dtype=torch.float32),
        state(keep_mixed, B, Q, dtype=compute),
        state(keep_mixed, B, Q, D),
        state(keep and not absorbed, B * (M + L), 2 * D),
    )


def _backward(
    dy: Tensor,
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    q: Tensor,
    probs: Tensor,
    factor: Tensor,
    share: Tensor,
    mixed: Tensor,
    kv: Tensor,
    num_heads: int,
    need_query: bool,
    need_x_hat: bool,
    need_norm: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, query, x_hat, weight = (t.contiguous() for t in (dy, query, x_hat, in_proj_weight))
    results = _backward_fake(query, x_hat, need_query, need_x_hat, need_norm, need_weight, need_bias)
    needs = dict(query=need_query, x_hat=need_x_hat, norm=need_norm, in_proj_weight=need_weight, in_proj_bias=need_bias)
    inputs = dy, query, x_hat, norm_weight, norm_bias, weight, q.contiguous(), probs.contiguous()
    if not query.numel():
        for t in results:
            t.zero_()
        return results
    for t in results[2:4]:
        t.zero_()
    # the saved tensors tell the order and the backend of the forward pass, which the backward pass takes too
    if kv.numel():
        torch_backend.ordinary_backward(*inputs, kv, num_heads, needs, results)
    else:
        _absorbed_backward(*inputs, factor, share, mixed, num_heads, needs, results)
    return results


def _backward_fake(
    query: Tensor,
    x_hat: Tensor,
    need_query: bool,
    need_x_hat: bool,
    need_norm: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    compute = torch.promote_types(query.dtype, torch.float32)
    D = query.shape[2]
    return (
        query.new_empty(query.shape if need_query else 0),
        query.new_empty(x_hat.shape if need_x_hat else 0),
        query.new_empty(D if need_norm else 0, dtype=compute),
        query.new_empty(D if need_norm else 0, dtype=compute),
        query.new_empty((3 * D, D) if need_weight else 0),
        query.new_empty(3 * D if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _, num_heads, _, keep, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    if not keep:
        raise ValueError("keep is False, and an input needs a gradient; pass keep=True")
    ctx.num_heads, ctx.dtypes = num_heads, [t.dtype for t in tensors[2:4]]
    ctx.save_for_backward(*tensors[:5], *output[1:])


def _autograd(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor, ...]:
    needs = ctx.needs_input_grad[:6]
    dquery, dx_hat, dgamma, dbeta, dweight, dbias = _resampler_attention_backward(
        dy, *ctx.saved_tensors, ctx.num_heads, *needs[:2], needs[2] or needs[3], *needs[4:]
    )
    return dquery, dx_hat, dgamma.to(ctx.dtypes[0]), dbeta.to(ctx.dtypes[1]), dweight, dbias


_resampler_attention = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_resampler_attention_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _check(
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    order: str | None,
) -> None:
    if query.dim() != 3 or not query.is_floating_point() or 0 in query.shape[1:]:
        raise ValueError(f"query is {described(query)}; pass floats of shape (B, M, D)")
    B, _, D = query.shape
    if x_hat.dim() != 3 or x_hat.shape[::2] != (B, D) or x_hat.dtype != query.dtype:
        raise ValueError(f"x_hat is {described(x_hat)}; pass {query.dtype} of shape ({B}, L, {D}), like query")
    check_like("in_proj_weight", in_proj_weight, (3 * D, D), "query", query.dtype)
    check_like("in_proj_bias", in_proj_bias, (3 * D,), "query", query.dtype)
    check_floats("norm_weight", norm_weight, (D,))
    check_floats("norm_bias", norm_bias, (D,))
    if num_heads < 1 or D % num_heads:
        raise ValueError(f"num_heads is {num_heads}; pass a divisor of the width {D}")
    if order not in (None, *PATHS):
        raise ValueError(f"order is {order!r}; pass 'absorbed', 'ordinary', 'composed', or None for the fastest")


def _composed(
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
) -> Tensor:
    """Projections of the joined keys, and the fastest attention: under plain autograd, which keeps all of them."""
    B, _, D = query.shape
    keys = torch.cat([query, torch.addcmul(norm_bias, x_hat, norm_weight).to(query.dtype)], 1)
    (w_q, w_kv), (b_q, b_kv) = (t.split([D, 2 * D]) for t in (in_proj_weight, in_proj_bias))
    (q,), (kv,) = linears(query, [(w_q, b_q)]), linears(keys, [(w_kv, b_kv)])
    q, k, v = (t.view(B, t.shape[1], num_heads, D // num_heads).transpose(1, 2) for t in (q, *kv.chunk(2, 2)))
    return attention(q, k, v).transpose(1, 2).flatten(2)


def _fastest_order(query: Tensor, x_hat: Tensor, num_heads: int, grads: list[str]) -> str:
    """The measured order, else the prior: fused attention on a GPU, and elsewhere where it is the cheaper order."""
    (B, M, D), L = query.shape, x_hat.shape[1]
    order = cheaper_order(B, M, L, D, num_heads, grads)
    if dispatch.asked(OP.name) is not None or torch.compiler.is_compiling():
        return order
    # without a gradient, fused attention needs no probabilities, which the ordinary order makes for the backward pass
    if query.device.type == "cuda" or (order == "ordinary" and not grads):
        order = "composed"
    key = OP.name, query.dtype, bool(grads), _classify(query, x_hat, num_heads)
    order = tuning.choice(query.device.type, key) or order
    tuning.record(query.device.type, key, order)
    return order


def _plan(
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    order: str | None,
) -> Callable:
    tensors = query, x_hat, norm_weight, norm_bias, in_proj_weight, in_proj_bias
    _check(*tensors, num_heads, order)
    if OP.route(query) == "reference":
        return functools.partial(resampler_attention_reference, num_heads=num_heads)
    grads = []
    if torch.is_grad_enabled():
        grads = [name for name, t in zip(_ARGUMENTS, tensors, strict=True) if t.requires_grad]
    if order is None:
        order = _fastest_order(query, x_hat, num_heads, grads)
    if order == "composed":
        return functools.partial(_composed, num_heads=num_heads)
    keep, absorbed = bool(grads), order == "absorbed"
    keep_mixed = absorbed and not _MIXED.isdisjoint(grads)
    forward: Callable = _forward if runs_directly(*tensors) else _resampler_attention
    return in_its_dtype(lambda *tensors: forward(*tensors, num_heads, absorbed, keep, keep_mixed)[0], query.device)


def resampler_attention(
    query: Tensor,
    x_hat: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    *,
    order: str | None = None,
) -> Tensor:
    """Multi-head attention of `query` over the keys [query ; x_hat * norm_weight + norm_bias].

    Args:
        query: (B, M, D), the normalised latents, fp32, bf16, fp16 or float64.
        x_hat: (B, L, D) of the same dtype, the inputs after `standardise`; layers share it.
        norm_weight, norm_bias: (D,), the affine of the inputs' layer norm, any floating dtype.
        in_proj_weight, in_proj_bias: (3 D, D) and (3 D,), packed as in `nn.MultiheadAttention`, like `query` in dtype.
        num_heads: H, a divisor of D.
        order: "absorbed", "ordinary" or "composed", equal but for rounding. None takes what was measured as the
            fastest, else the one of the first two with fewer `flops`, and "composed" on a GPU.

    Returns:
        (B, M, D), the heads side by side, before the output projection.

    Raises:
        ValueError: if a shape, a dtype or `order` does not fit.
    """
    tensors = query, x_hat, norm_weight, norm_bias, in_proj_weight, in_proj_bias
    return OP.resolve(_plan, tensors, num_heads, order)(*tensors)
