"""Attention of queries over one or two segments of keys: self, causal, padded, cross, with dropout on probabilities.

    s_ij = scale q_i . k_j, or -inf where query i may not see key j        lse_i = log sum_j exp(s_ij)
    p_ij = exp(s_ij - lse_i)      m_ij = 1 / (1 - dropout) if kept, else 0      out_i = sum_j m_ij p_ij v_j
    dv_j = sum_i m_ij p_ij dout_i      delta_i = dout_i . out_i
    ds_ij = p_ij (m_ij dout_i . v_j - delta_i)      dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i

A query that sees no key gives zeros and has no gradient. The second segment (the latents of the resampler beside its
inputs) joins the same softmax without a concatenation. Kept is a matter of the seed and of (sample, head, i, j) alone:
Philox 4x32-10 decides, in the forward and again in the backward pass, whatever the blocks or the backend.
q, k, v, out and lse (in base 2) are saved; no N x L tensor is. dq, dk and dv are summed by one owner in a fixed order.
Source: Dao, arXiv:2307.08691; Milakov and Gimelshein, arXiv:1805.02867; Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011. On GPUs: `attention_triton.py`, with traffic and FLOPs; on CPUs: `attention_native.py`; on any
device: `attention_torch.py`; other libraries: `attention_peers.py`.
"""

import functools
import operator
import os

import torch
from torch import Tensor

from prismer.kernels import dispatch
from prismer.kernels.attention import native_backend as attention_native
from prismer.kernels.attention import peers
from prismer.kernels.attention import torch_backend as attention_torch
from prismer.kernels.attention import triton_backend as attention_triton
from prismer.kernels.attention.triton_backend import kernel_cases as kernel_cases
from prismer.kernels.philox import survivors

_OURS = dict(native=attention_native, triton=attention_triton, torch=attention_torch)
BACKENDS = ("flash-attn", "native", "sdpa", "triton", "xformers", "torch", "reference")


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Arguments as in `attention`."""
    compute = torch.promote_types(q.dtype, torch.float32)
    (B, H, N, K), L = q.shape, k.shape[2]
    seen = torch.ones(B, 1, N, L, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    kept = [survivors(seed, B, H, 0, N, L, 0, dropout)] if dropout else []
    if extra_k is not None:
        L2 = extra_k.shape[2]
        seen = torch.cat([seen, seen.new_ones(B, 1, N, L2)], 3)
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
        kept += [survivors(seed, B, H, 0, N, L2, 1, dropout)] if dropout else []
    scores = q.to(compute) @ k.to(compute).mT * (K**-0.5 if scale is None else scale)
    some = seen.any(3, keepdim=True)
    weights = scores.masked_fill(~seen & some, float("-inf")).softmax(3) * some
    if dropout:
        weights = weights * torch.cat(kept, 3) / (1 - dropout)
    out = (weights @ v.to(compute)).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# the registered ops


def supports(backend: str, call: peers.Call) -> str | None:
    """None if `backend` serves the call, else the reason why not."""
    if backend == "native":
        return attention_native.serves(call)
    if backend == "triton":
        if call.dtype == torch.float64:
            return "triton attention computes in fp32, and q is float64"
        if call.head_dim not in attention_triton.HEAD_DIMS:
            dims = ", ".join(map(str, attention_triton.HEAD_DIMS))
            return f"triton attention serves head dims {dims}, not {call.head_dim}"
        return None
    return None if backend in ("torch", "reference") else peers.supports(backend, call)


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _empty(out: Tensor, needed: bool, x: Tensor | None) -> Tensor:
    """Of a gradient of x (B, H, tokens, K): (B, tokens, H, K), or (0,) if it is not needed."""
    if not needed or x is None:
        return out.new_empty(0)
    B, H, N, K = x.shape
    return out.new_empty(B, N, H, K)


def _forward(q, k, v, extra_k, extra_v, key_mask, seed, causal, dropout, scale, backend):
    out, lse = _forward_fake(q, k, v, extra_k, extra_v, key_mask, seed, causal, dropout, scale, backend)
    key_mask = None if key_mask is None else key_mask.contiguous()
    if out.numel():
        tensors = map(_rows, (q, k, v, extra_k, extra_v))
        _OURS[backend].forward(*tensors, key_mask, seed, causal, dropout, scale, out, lse)
    return out, lse


def _forward_fake(q, k, v, extra_k, extra_v, key_mask, seed, causal, dropout, scale, backend):
    B, H, N, K = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B, N, H, K), q.new_empty(B, H, N, dtype=compute)


def _backward(
    dout,
    q,
    k,
    v,
    extra_k,
    extra_v,
    key_mask,
    seed,
    out,
    lse,
    causal,
    dropout,
    scale,
    backend,
    need_q,
    need_keys,
    need_extra,
):
    outputs = _backward_fake(
        dout,
        q,
        k,
        v,
        extra_k,
        extra_v,
        key_mask,
        seed,
        out,
        lse,
        causal,
        dropout,
        scale,
        backend,
        need_q,
        need_keys,
        need_extra,
    )
    # a gradient without elements needs no program, and one without queries is zero
    grads = [g if g.numel() else None for g in outputs]
    if not out.numel():
        for g in outputs:
            g.zero_()
    elif any(g is not None for g in grads):
        tensors = [_rows(t) for t in (q, k, v, extra_k, extra_v)]
        key_mask = None if key_mask is None else key_mask.contiguous()
        saved = (dout.contiguous(), *tensors, key_mask, seed, out, lse, causal, dropout, scale)
        _OURS[backend].backward(*saved, grads)
    return tuple(outputs)


def _backward_fake(
    dout,
    q,
    k,
    v,
    extra_k,
    extra_v,
    key_mask,
    seed,
    out,
    lse,
    causal,
    dropout,
    scale,
    backend,
    need_q,
    need_keys,
    need_extra,
):
    wanted = ((need_q, q), (need_keys, k), (need_keys, v), (need_extra, extra_k), (need_extra, extra_v))
    return tuple(_empty(out, needed, x) for needed, x in wanted)


_attention = dispatch.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v, Tensor? key_mask, Tensor? seed,"
    " bool causal, float dropout, float scale, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_attention_backward = dispatch.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v, Tensor? key_mask,"
    " Tensor? seed, Tensor out, Tensor lse, bool causal, float dropout, float scale, str backend,"
    " bool need_q, bool need_keys, bool need_extra) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.dropout, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*tensors, out, lse)


def _autograd(ctx, dout, _):
    needs = ctx.needs_input_grad
    if dout is None:
        return (None,) * len(needs)
    q_to_extra = needs[0], needs[1] or needs[2], needs[3] or needs[4]
    options = ctx.causal, ctx.dropout, ctx.scale, ctx.backend
    grads = _attention_backward(dout, *ctx.saved_tensors, *options, *q_to_extra)
    grads = [g.transpose(1, 2) if need else None for g, need in zip(grads, needs, strict=False)]
    return *grads, *(None,) * (len(needs) - len(grads))


dispatch.register_backward("attention", _setup_context, _autograd)


# the public function


@torch.compiler.assume_constant_result
def _choose(asked, device, dtype, head_dim, causal, masked, dropout, seeded, extra, empty, compiling) -> str:
    """The backend; a function of constants, so that torch.compile takes its result for one."""
    call = _call(device, dtype, head_dim, causal, masked, dropout, seeded, extra, empty, compiling)

    def serves(name: str) -> str | None:
        reason = supports(name, call)
        if reason is None and name == "native" and asked != "native":
            reason = attention_native.slower_than_torch(dtype)
        return reason

    with dispatch.use_backend(asked):
        return dispatch.choose("attention", device, serves)


@functools.lru_cache(maxsize=256)
def _choose_on_host(dtype: torch.dtype, head_dim: int, dropout: bool, instruction_set: str | None) -> str:
    """What `_choose` comes to for ordinary tensors of a CPU, whose calls are too short to ask each time.

    `instruction_set` is PRISMER_CPU_ISA, which the choice depends on.
    """
    cpu = torch.device("cpu")
    return _choose(None, cpu, dtype, head_dim, False, False, dropout, False, False, False, False)


def _call(device, dtype, head_dim, causal, masked, dropout, seeded, extra, empty, compiling=False) -> peers.Call:
    return peers.Call(
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        causal=causal,
        masked=masked,
        dropout=dropout,
        seeded=seeded,
        extra=extra,
        empty=empty,
        compiling=compiling,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    )


def _check(q, k, v, causal, key_mask, dropout, seed, extra_k, extra_v, backend) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.dtype in dispatch.NARROW:
        raise ValueError(
            f"q is {q.dtype} of shape {tuple(q.shape)}; pass floats of shape (B, H, N, K), of 16 bits or more"
        )
    B, H, N, K = q.shape
    if (extra_k is None) != (extra_v is None):
        raise ValueError("one of extra_k and extra_v is missing; pass both or neither")
    for names, pair in ((("k", "v"), (k, v)), (("extra_k", "extra_v"), (extra_k, extra_v))):
        for name, x in zip(names, pair, strict=True):
            like = x is None or (x.dim() == 4 and (*x.shape[:2], x.shape[3]) == (B, H, K) and x.shape == pair[0].shape)
            if not like or (x is not None and (x.dtype != q.dtype or x.device != q.device)):
                raise ValueError(
                    f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; pass {q.dtype} of shape "
                    f"({B}, {H}, keys, {K}) on {q.device}, with as many values as keys"
                )
    L = k.shape[2]
    if causal and N != L:
        raise ValueError(f"causal attention of {N} queries over {L} keys; pass as many keys as queries")
    if key_mask is not None and (key_mask.shape != (B, L) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask is {key_mask.dtype} of shape {tuple(key_mask.shape)}; "
            f"pass torch.bool of shape {(B, L)}, True where seen"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; pass a probability from 0 to below 1")
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != q.device):
        raise ValueError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; pass one torch.int64 on {q.device}"
        )
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose {', '.join(BACKENDS)}, or leave it unset")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, without a tensor of scores where the backend can.

    Args:
        q: (B, H, N, K), fp32, bf16, fp16 or float64; any strides, such as those of a view of a packed projection.
        k, v: (B, H, L, K), like q.
        causal: query i sees keys 0..i; N must equal L. The extra keys are seen by all.
        key_mask: (B, L) bool, True where a key of `k` is seen. A query that sees no key at all gives zeros.
        dropout: probability that a weight is dropped; the rest are scaled by 1 / (1 - dropout).
        seed: int64, one element on the device of q: the same seed drops the same weights in `triton`, `torch` and
            `reference`. None draws one from torch's generator; vendors' backends then draw as they do.
        extra_k, extra_v: (B, H, L2, K): a second segment of keys under the same softmax, never masked.
        scale: of the scores; K ** -0.5 if None.
        backend: one of BACKENDS, before `use_backend` and PRISMER_BACKEND; None takes theirs, or the fastest.

    Returns:
        (B, H, N, K) in the dtype of q, whose memory is (B, N, H, K): heads can be merged by a view.

    Raises:
        ValueError: if a shape, dtype or setting does not fit.
        RuntimeError: if the backend asked for cannot run this call.
    """
    _check(q, k, v, causal, key_mask, dropout, seed, extra_k, extra_v, backend)
    K = operator.index(q.shape[3])
    scale = K**-0.5 if scale is None else float(scale)
    # torch.compile is to take these for constants, where it leaves the other sizes open
    empty = True if q.numel() == 0 or k.numel() == 0 else False
    drops = True if dropout > 0 else False
    facts = (q.device, q.dtype, K, causal, key_mask is not None, drops, seed is not None, extra_k is not None, empty)
    plain = backend is None and seed is None and extra_k is None and not empty
    if plain and dispatch.on_host(q):
        backend = _choose_on_host(q.dtype, K, drops, os.environ.get("PRISMER_CPU_ISA"))
    else:
        backend = _choose(backend or dispatch.asked(), *facts, torch.compiler.is_compiling())
    if backend == "sdpa":
        return peers.sdpa(q, k, v, causal, key_mask, dropout, scale)
    if backend == "flash-attn":
        return peers.flash_attn(q, k, v, causal, dropout, scale, _call(*facts))
    if backend == "xformers":
        return peers.xformers(q, k, v, causal, dropout, scale)
    if not drops:
        seed = None
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
    if backend == "reference":
        return attention_reference(
            q,
            k,
            v,
            causal=causal,
            key_mask=key_mask,
            dropout=dropout,
            seed=seed,
            extra_k=extra_k,
            extra_v=extra_v,
            scale=scale,
        )
    out, _ = _attention(q, k, v, extra_k, extra_v, key_mask, seed, causal, float(dropout), scale, backend)
    return out.transpose(1, 2)
