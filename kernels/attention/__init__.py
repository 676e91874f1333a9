"""Attention of queries over keys: self, causal, padded, cross, with dropout on the probabilities.

    s_ij = scale q_i . k_j, or -inf where query i may not see key j        lse_i = log sum_j exp(s_ij)
    p_ij = exp(s_ij - lse_i)      m_ij = 1 / (1 - dropout) if kept, else 0      out_i = sum_j m_ij p_ij v_j
    dv_j = sum_i m_ij p_ij dout_i      delta_i = dout_i . out_i
    ds_ij = p_ij (m_ij dout_i . v_j - delta_i)      dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i

A query that sees no key gives zeros and has no gradient. Philox 4x32-10 decides what is kept from the seed and from
(sample, head, i, j) alone, in the forward and again in the backward pass, whatever the blocks or the backend. q, k, v,
out and lse (in base 2) are saved; no N x L tensor is, but by `eager.py` where it is small. dq, dk and dv are each
summed by one owner in a fixed order. Source: Dao, arXiv:2307.08691; Milakov and Gimelshein, arXiv:1805.02867; Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011. On GPUs: `triton_backend.py`, with traffic and FLOPs; on CPUs:
`native_backend.py`; on any device: `torch_backend.py` and `eager.py`; from other libraries: `peers.py`.
"""

import functools
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prismer.kernels import dispatch
from prismer.kernels.attention import eager, native_backend, peers, torch_backend, triton_backend
from prismer.kernels.attention.call import Call, Facts
from prismer.kernels.checks import described
from prismer.kernels.dispatch import TORCH, Backend, Example, Op, runs_directly
from prismer.kernels.launch import fp32_precision
from prismer.kernels.philox import draw_seed, survivors


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
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
    scores = q.to(compute) @ k.to(compute).mT * (K**-0.5 if scale is None else scale)
    some = seen.any(3, keepdim=True)
    weights = scores.masked_fill(~seen & some, float("-inf")).softmax(3) * some
    if dropout:
        weights = weights * survivors(seed, B, H, 0, N, L, dropout) / (1 - dropout)
    out = (weights @ v.to(compute)).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    BH, N, L, K, options = shape
    # heads side by side in each row, as projections return them
    rows = (torch.randn(1, n, BH, K, device=device).to(dtype).transpose(1, 2) for n in (N, L, L))
    q, k, v = (x.requires_grad_() for x in rows)
    # the last eighth of the keys is padding
    mask = (torch.arange(L, device=device) < max(1, L - L // 8))[None] if options & 2 else None
    call = functools.partial(attention, causal=bool(options & 1), key_mask=mask, dropout=0.1 if options & 4 else 0.0)
    return call, [q, k, v]


# the bytes behind os.environ on POSIX: os.environ.get encodes the name and decodes the value at each call, in twenty
# times the time
_environment: Mapping[bytes, bytes] = getattr(os.environ, "_data", {})


def _settings() -> tuple[bytes | None, bool, str]:
    """What a plan depends on: instruction set, whether algorithms are deterministic, how fp32 is multiplied."""
    return _environment.get(b"PRISMER_CPU_ISA"), torch._C._get_deterministic_algorithms(), fp32_precision()


OP = Op(
    name="attention",
    reference=attention_reference,
    # on a GPU the attention of another library where it serves the call, and ours where it does not
    backends=(
        Backend(name="eager", refuses=eager.refuses, slower=eager.slower),
        Backend(
            name="flash-attn",
            devices=("cuda",),
            refuses=peers.flash_attn_refuses,
            slower=peers.flash_attn_slower,
        ),
        Backend(
            name="native",
            devices=("cpu",),
            float64=False,
            refuses=native_backend.refuses,
            slower=native_backend.slower_than_torch,
        ),
        Backend(name="sdpa", refuses=peers.sdpa_refuses),
        Backend(name="triton", devices=("cuda",), float64=False, refuses=triton_backend.refuses),
        Backend(name="xformers", devices=("cuda",), refuses=peers.xformers_refuses),
        TORCH,
    ),
    classify=lambda facts: facts.shape,
    example=_example,
    depends=_settings,
)
BACKENDS = (*(backend.name for backend in OP.backends), "reference")


def _reference(call: Call) -> Tensor:
    seed = draw_seed(call.dropout, call.seed, call.q.device)
    options = dict(causal=call.causal, key_mask=call.key_mask, dropout=call.dropout, seed=seed, scale=call.scale)
    return attention_reference(call.q, call.k, call.v, **options)


# backends that autograd differentiates by itself, and those of the registered op
_DIFFERENTIABLE = {
    "eager": eager.forward,
    "flash-attn": peers.flash_attn,
    "sdpa": peers.sdpa,
    "xformers": peers.xformers,
    "reference": _reference,
}
_REGISTERED = {"native": native_backend, "triton": triton_backend, "torch": torch_backend}


# which backend


def _choose(asked: str | None, **constants: Any) -> str:
    """The backend of a call with these `Call.constants`; torch.compile takes the result for a constant too."""
    if asked == "reference":
        return asked
    return OP.choose(Facts.on_this_machine(**constants), gradient=constants["gradient"], asked_for=asked)


# what torch.compiler.assume_constant_result does, which would import the compiler, half the time of each start
_choose._dynamo_marked_constant = True


# the registered ops


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_dense(call: Call) -> bool:
    """Are the last dimensions and the mask dense?"""
    rows = call.q.stride(-1) == call.k.stride(-1) == call.v.stride(-1) == 1
    return rows and (call.key_mask is None or call.key_mask.is_contiguous())


def _dense_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
) -> Call:
    """The call of an op on a backend that wants the last dimensions and the mask dense."""
    key_mask = None if key_mask is None else key_mask.contiguous()
    return Call(_dense_rows(q), _dense_rows(k), _dense_rows(v), key_mask, seed, causal, dropout, scale)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, K) and lse (B, H, N)."""
    out, lse = _forward_fake(q)
    if out.numel():
        _REGISTERED[backend].forward(_dense_call(q, k, v, key_mask, seed, causal, dropout, scale), out, lse)
    return out, lse


def _forward_fake(q: Tensor) -> tuple[Tensor, Tensor]:
    B, H, N, K = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B, N, H, K), q.new_empty(B, H, N, dtype=compute)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    dropout: float,
    scale: float,
    backend: str,
    need_q: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv (B, tokens, H, K); those that are not needed are (0,)."""
    outputs = _backward_fake(dout, q, k, v, need_q, need_keys)
    # a gradient without elements needs no program, and one without queries is zero
    grads = [g if g.numel() else None for g in outputs]
    if not out.numel():
        for g in outputs:
            g.zero_()
    elif any(g is not None for g in grads):
        call = _dense_call(q, k, v, key_mask, seed, causal, dropout, scale)
        _REGISTERED[backend].backward(call, dout.contiguous(), out, lse, grads)
    return outputs


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, need_q: bool, need_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(needed: bool, x: Tensor) -> Tensor:
        B, H, N, K = x.shape
        return dout.new_empty(B, N, H, K) if needed else dout.new_empty(0)

    return empty(need_q, q), empty(need_keys, k), empty(need_keys, v)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.dropout, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _autograd(ctx: torch.autograd.function.FunctionCtx, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    options = ctx.causal, ctx.dropout, ctx.scale, ctx.backend
    grads = _attention_backward(dout, *ctx.saved_tensors, *options, needs[0], needs[1] or needs[2])
    return tuple(g.transpose(1, 2) if need else None for g, need in zip(grads, needs, strict=True))


_attention = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_attention_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str | None,
) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.dtype in dispatch.NARROW:
        raise ValueError(f"q is {described(q)}; pass floats of shape (B, H, N, K), of 16 bits or more")
    B, H, N, K = q.shape
    for name, x in (("k", k), ("v", v)):
        like = x.dim() == 4 and (*x.shape[:2], x.shape[3]) == (B, H, K) and x.shape == k.shape
        if not like or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {described(x)} on {x.device}; pass {q.dtype} of shape "
                f"({B}, {H}, keys, {K}) on {q.device}, with as many values as keys"
            )
    L = k.shape[2]
    if causal and N != L:
        raise ValueError(f"causal attention of {N} queries over {L} keys; pass as many keys as queries")
    if key_mask is not None and (key_mask.shape != (B, L) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask is {described(key_mask)}; pass torch.bool of shape {(B, L)}, True where seen")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; pass a probability from 0 to below 1")
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != q.device):
        raise ValueError(f"seed is {described(seed)} on {seed.device}; pass one torch.int64 on {q.device}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose {', '.join(BACKENDS)}, or leave it unset")


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float | None,
    backend: str | None,
) -> Callable:
    """What runs a call on q, k, v, key_mask and seed."""
    _check(q, k, v, causal, key_mask, dropout, seed, backend)
    # a constant for torch.compile, as are all head dims
    factor = operator.index(q.shape[3]) ** -0.5 if scale is None else float(scale)
    share = float(dropout)
    call = Call(q, k, v, key_mask, seed, causal, share, factor)
    chosen = _choose(backend or dispatch.asked(OP.name), **call.constants())
    if chosen == "sdpa" and dispatch.is_untraced() and not (causal and key_mask is not None):
        return peers.prepare_sdpa(call)
    if chosen in _DIFFERENTIABLE:
        run = _DIFFERENTIABLE[chosen]
        return lambda q, k, v, key_mask, seed: run(Call(q, k, v, key_mask, seed, causal, share, factor))
    forward: Callable = _attention
    if runs_directly(q, k, v, key_mask, seed):
        if chosen == "triton" and not call.is_empty() and not share and _is_dense(call):
            return triton_backend.prepare(call)
        forward = _forward

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seed: Tensor | None) -> Tensor:
        seed = draw_seed(share, seed, q.device)
        return forward(q, k, v, key_mask, seed, causal, share, factor, chosen)[0].transpose(1, 2)

    return attend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, without a tensor of scores where the backend can.

    Args:
        q: (B, H, N, K), fp32, bf16, fp16 or float64; any strides, such as those of a view of a packed projection.
        k, v: (B, H, L, K), like q.
        causal: query i sees keys 0..i; N must equal L.
        key_mask: (B, L) bool, True where a key of `k` is seen. A query that sees no key at all gives zeros.
        dropout: probability that a weight is dropped; the rest are scaled by 1 / (1 - dropout).
        seed: int64, one element on the device of q: the same seed drops the same weights in `triton`, `torch` and
            `reference`. None draws one from torch's generator; other libraries then draw in their own way.
        scale: of the scores; K ** -0.5 if None.
        backend: one of BACKENDS, before `use_backend` and PRISMER_BACKEND; None takes theirs, or the fastest.

    Returns:
        (B, H, N, K) in the dtype of q, whose memory is (B, N, H, K): heads can be merged by a view.

    Raises:
        ValueError: if a shape, dtype or setting does not fit.
        RuntimeError: if the backend asked for cannot run this call.
    """
    tensors = q, k, v, key_mask, seed
    return OP.resolve(_plan, tensors, causal, dropout, scale, backend)(*tensors)
