"""Decode attention: few queries per row against one long shared prefix and a few slots of a growing suffix.

    out[r, h, i] = attention of q[r, h, i] over the S shared keys where shared_mask and the slots ancestors[r, i]

Beams of one prompt, or answers to one question, share their prefix: its keys and values exist once per row, and all
queries read them. A list of slot numbers, its own included, says what a query sees of the suffix. So reordering beams
moves a small table of integers and not the cache, and a tree of candidates is packed as one row.
Source: shared-prefix decoding as in Prismer's generation and ranking (arXiv:2303.02506, section 4.1), computed once;
softmax over parts as in FlashAttention (Dao et al., arXiv:2205.14135) and Flash-Decoding.

For inference only: the op has no gradient. Legend: R rows, H heads, Q queries, K head size, S shared keys, M suffix
slots, A ancestors.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from prismer.kernels.checks import check_like, described
from prismer.kernels.decode_attention import triton_backend
from prismer.kernels.decode_attention.triton_backend import Pair
from prismer.kernels.dispatch import TORCH, Backend, Op, runs_directly
from prismer.kernels.launch import fp32_precision

# numbers of scores and gathered keys at a time: 64 MB in fp32
_MAX_FLOATS = 2**24
# up to this many slots per listed one, multiplying by all slots is faster than gathering the listed ones: measured on
# one CPU core, 12 heads of 64, 54 slots of which 18 are listed: 1.0 against 1.7 ms; 2,000 of which 6: 700 against 95 ms
_DENSE = 16


def decode_attention_reference(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    shared_mask: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    ancestors: Tensor,
) -> Tensor:
    """The definition: all keys side by side under one mask. Arguments as in `decode_attention`; exact in float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    slots = torch.arange(suffix_k.shape[2], device=q.device)
    suffix_mask = (ancestors[..., None] == slots).any(-2)  # (R, Q, M)
    mask = torch.cat((_per_query(shared_mask).expand(-1, q.shape[2], -1), suffix_mask), -1)[:, None]
    k = torch.cat((shared_k, suffix_k), 2).to(dtype)
    v = torch.cat((shared_v, suffix_v), 2).to(dtype)
    scores = (q.to(dtype) @ k.mT) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights.masked_fill(~mask, 0.0) @ v).to(q.dtype)


def _native_refuses(q: Tensor) -> str | None:
    K = q.shape[3]
    if q.device.type == "cuda" and (K % 8 or K > 256):
        return f"native decode_attention on cuda serves head sizes that are multiples of 8 up to 256, not {K}"
    return None


def _triton_refuses(q: Tensor) -> str | None:
    K = q.shape[3]
    return f"triton decode_attention serves head sizes up to 256, not {K}" if K > 256 else None


OP = Op(
    name="decode_attention",
    reference=decode_attention_reference,
    backends=(
        Backend(name="native", devices=("cpu", "cuda"), float64=False, refuses=_native_refuses),
        Backend(name="triton", devices=("cuda",), float64=False, refuses=_triton_refuses),
        TORCH,
    ),
    depends=fp32_precision,
)


# torch


def _forward_torch(q: Tensor, shared: Pair, shared_mask: Tensor, suffix: Pair, ancestors: Tensor) -> Tensor:
    """Queries in chunks, so that memory is bounded; gathers the listed slots where there are far more others."""
    R, H, Q, K = q.shape
    S, M, A = shared[0].shape[2], suffix[0].shape[2], ancestors.shape[2]
    dense = M <= _DENSE * A
    floats = S + M if dense else S + A * (2 * K + 1)
    chunk = max(1, _MAX_FLOATS // max(1, R * H * floats))
    attend = _attend_all_slots if dense else _attend_listed_slots
    out = _forward_fake(q)
    for start in range(0, Q, chunk):
        part = slice(start, start + chunk)
        mask = shared_mask if shared_mask.shape[1] == 1 else shared_mask[:, part]
        out[:, part] = attend(q[:, :, part], shared, mask, suffix, ancestors[:, part]).transpose(1, 2)
    return out


def _attend_all_slots(q: Tensor, shared: Pair, shared_mask: Tensor, suffix: Pair, ancestors: Tensor) -> Tensor:
    """Scores against every slot, those not listed masked: one matrix product where slots are few."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (shared_k, shared_v), (suffix_k, suffix_v) = shared, suffix
    S, M = shared_k.shape[2], suffix_k.shape[2]
    listed = torch.zeros(*ancestors.shape[:2], M + 1, dtype=torch.bool, device=q.device)
    listed = listed.scatter_(2, ancestors.where(ancestors >= 0, M), True)[..., :M]
    queries = q.to(dtype) * q.shape[-1] ** -0.5
    scores = torch.cat((queries @ shared_k.to(dtype).mT, queries @ suffix_k.to(dtype).mT), -1)
    weights = _softmax(scores, shared_mask, listed)
    out = weights[..., :S] @ shared_v.to(dtype) + weights[..., S:] @ suffix_v.to(dtype)
    return out.to(q.dtype)


def _attend_listed_slots(q: Tensor, shared: Pair, shared_mask: Tensor, suffix: Pair, ancestors: Tensor) -> Tensor:
    """Scores against gathered slots only: A products per query where slots are many."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    shared_k, shared_v = shared
    S = shared_k.shape[2]
    queries = q.to(dtype) * q.shape[-1] ** -0.5
    k, v = (_gather_slots(t, ancestors).to(dtype) for t in suffix)  # (R, H, Q, A, K)
    scores = torch.cat((queries @ shared_k.to(dtype).mT, (k @ queries[..., None])[..., 0]), -1)
    weights = _softmax(scores, shared_mask, ancestors >= 0)
    out = weights[..., :S] @ shared_v.to(dtype) + (weights[..., None, S:] @ v)[..., 0, :]
    return out.to(q.dtype)


def _softmax(scores: Tensor, shared_mask: Tensor, suffix_mask: Tensor) -> Tensor:
    """One softmax over both parts; overwrites `scores`."""
    mask = torch.cat((shared_mask.expand(-1, suffix_mask.shape[1], -1), suffix_mask), -1)[:, None]
    # the softmax of a query that sees nothing is NaN, hence the second fill
    return scores.masked_fill_(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0)


def _gather_slots(suffix: Tensor, ancestors: Tensor) -> Tensor:
    """(R, H, M, K) and (R, Q, A) -> (R, H, Q, A, K); any slot stands in for -1."""
    R, H, _, K = suffix.shape
    Q, A = ancestors.shape[1:]
    rows = torch.arange(R, device=suffix.device)[:, None]
    picked = suffix.transpose(1, 2)[rows, ancestors.reshape(R, Q * A).clamp_min(0)]  # (R, Q * A, H, K)
    return picked.view(R, Q, A, H, K).permute(0, 3, 1, 2, 4)


def _per_query(shared_mask: Tensor) -> Tensor:
    return shared_mask[:, None] if shared_mask.dim() == 2 else shared_mask


# the registered op


def _with_rows_together(a: Tensor, b: Tensor) -> Pair:
    """Keys and values with equal strides and contiguous vectors; copies those that have other strides."""
    if a.stride() != b.stride() or a.stride(-1) != 1:
        return a.contiguous(), b.contiguous()
    return a, b


def _forward(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    shared_mask: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    ancestors: Tensor,
) -> Tensor:
    """(R, Q, H, K)."""
    return _forward_on(OP.choose(q), q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors)


def _forward_on(
    backend: str,
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    shared_mask: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    ancestors: Tensor,
) -> Tensor:
    if backend == "torch":
        return _forward_torch(q, (shared_k, shared_v), shared_mask, (suffix_k, suffix_v), ancestors)
    mask, ancestors = shared_mask.contiguous(), ancestors.contiguous()
    if backend == "native":
        q, shared_k, shared_v, suffix_k, suffix_v = (
            t.contiguous() for t in (q, shared_k, shared_v, suffix_k, suffix_v)
        )
        return torch.ops.prismer_native.decode_attention(q, shared_k, shared_v, mask, suffix_k, suffix_v, ancestors)
    out = _forward_fake(q)
    if out.numel():
        q = q if q.stride(-1) == 1 else q.contiguous()
        shared = _with_rows_together(shared_k, shared_v)
        suffix = _with_rows_together(suffix_k, suffix_v)
        triton_backend.forward(q, shared, mask, suffix, ancestors, out)
    return out


def _forward_fake(q: Tensor) -> Tensor:
    R, H, Q, K = q.shape
    return q.new_empty(R, Q, H, K)


_decode_attention = OP.register(_forward, fake=_forward_fake)


# the public function


def _plan(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    shared_mask: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    ancestors: Tensor,
) -> Callable:
    _check(q, (shared_k, shared_v), shared_mask, (suffix_k, suffix_v), ancestors)
    inputs = (q, shared_k, shared_v, suffix_k, suffix_v)
    if OP.route(q) == "reference":
        return lambda q, k, v, mask, *others: decode_attention_reference(q, k, v, _per_query(mask), *others)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError(
            "decode_attention has no gradient, and an input requires one; "
            "call it under torch.inference_mode(), or train with prismer.kernels.attention"
        )
    forward: Callable = _decode_attention
    if runs_directly(*inputs, shared_mask, ancestors):
        backend = OP.choose(q)
        # a mask (R, S) has the memory of (R, 1, S)
        tensors = q, shared_k, shared_v, _per_query(shared_mask), suffix_k, suffix_v, ancestors
        if backend == "triton" and (run := triton_backend.prepare(*tensors)) is not None:
            return run
        forward = functools.partial(_forward_on, backend)
    return lambda q, k, v, mask, *others: forward(q, k, v, _per_query(mask), *others).transpose(1, 2)


def decode_attention(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    shared_mask: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    ancestors: Tensor,
) -> Tensor:
    """Attend to a shared prefix and to listed suffix slots, with fp32 scores and softmax; scale 1 / sqrt(K).

    The host does not wait for the device, so slot numbers are not checked: one outside -1..M-1 is the caller's bug.
    Keys and values may have any strides (`native` copies those that are not contiguous).

    Args:
        q: (R, H, Q, K), fp32, bf16, fp16 or float64.
        shared_k, shared_v: (R, H, S, K), in the dtype of `q`.
        shared_mask: (R, S), or (R, Q, S) to differ by query; bool, True where a key is seen. Keys that are
            not seen must be finite all the same.
        suffix_k, suffix_v: (R, H, M, K), in the dtype of `q`.
        ancestors: (R, Q, A) int64 slot numbers, each at most once per query, -1 for none.

    Returns:
        (R, H, Q, K) in the dtype of `q`, whose memory is (R, Q, H, K): heads can be merged by a view. Zeros for a query
        that sees nothing.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or an input requires a gradient that is recorded
            (the reference has one).
    """
    tensors = q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors
    return OP.resolve(_plan, tensors)(*tensors)


def _check(q: Tensor, shared: Pair, shared_mask: Tensor, suffix: Pair, ancestors: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (rows, heads, queries, head size)")
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}; pass floats")
    R, H, Q, K = q.shape
    (shared_k, shared_v), (suffix_k, suffix_v) = shared, suffix
    S, M = shared_k.shape[-2], suffix_k.shape[-2]
    check_like("shared_k", shared_k, (R, H, S, K), "q", q.dtype)
    check_like("shared_v", shared_v, (R, H, S, K), "q", q.dtype)
    check_like("suffix_k", suffix_k, (R, H, M, K), "q", q.dtype)
    check_like("suffix_v", suffix_v, (R, H, M, K), "q", q.dtype)
    if shared_mask.shape not in ((R, S), (R, Q, S)) or shared_mask.dtype != torch.bool:
        raise ValueError(f"shared_mask is {described(shared_mask)}; pass torch.bool of shape {(R, S)} or {(R, Q, S)}")
    if ancestors.dim() != 3 or ancestors.shape[:2] != (R, Q) or ancestors.dtype != torch.int64:
        raise ValueError(f"ancestors is {described(ancestors)}; pass torch.int64 of shape ({R}, {Q}, any)")
    others = (shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors)
    if any(tensor.device != q.device for tensor in others):
        raise ValueError(
            f"q is on {q.device}, the others on {', '.join(str(t.device) for t in others)}; move them to one device"
        )
