"""Attention that others have written, behind our signature: torch's own, flash-attn 2, 3 and 4, xFormers.

Each takes (B, H, N, K) and gives (B, H, N, K) whose memory is (B, N, H, K), under plain autograd. `supports` says what
each does not do. The calls are those of flash-attn 2.8.3, flash-attn 3 as in the same source, flash-attn-4 4.0.0 and
xFormers 0.0.35; `tests/ops/test_attention_peers.py` keeps their signatures.
"""

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import dispatch


@dataclass(frozen=True, kw_only=True)
class Call:
    """What decides whether a backend serves a call of `attention`."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None = None  # of the GPU, such as (9, 0)
    causal: bool = False
    masked: bool = False
    dropout: bool = False
    seeded: bool = False
    extra: bool = False  # a second segment of keys
    empty: bool = False  # no sample, no query or no key
    deterministic: bool = False  # torch.use_deterministic_algorithms
    compiling: bool = False


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One of the packages that are called flash-attn."""

    number: int
    module: str
    majors: tuple[int, ...]  # of the compute capabilities that it is published for
    dropout: bool = False


GENERATIONS = (  # the best first
    Generation(number=3, module="flash_attn_interface", majors=(9,)),
    Generation(number=4, module="flash_attn.cute", majors=(9, 10, 11)),
    Generation(number=2, module="flash_attn", majors=(8, 9, 10, 11, 12), dropout=True),
)


def _generation_missing(generation: Generation, call: Call) -> str | None:
    """None if this generation of flash-attn serves the call here, else the reason why not."""
    name = f"flash-attn {generation.number}"
    if call.capability is None or call.capability[0] not in generation.majors:
        major = "none" if call.capability is None else "{}.{}".format(*call.capability)
        wanted = ", ".join(f"{major}.x" for major in generation.majors)
        return f"{name} serves compute capability {wanted}, and this device has {major}"
    # generation 4 computes larger heads on Hopper, not on Blackwell
    largest = 128 if generation.number == 4 and call.capability[0] > 9 else 256
    if call.head_dim > largest or call.head_dim % 8:
        return f"{name} serves head dims up to {largest} that are multiples of 8, not {call.head_dim}"
    if call.dropout and not generation.dropout:
        return f"{name} has no dropout"
    return dispatch.module_missing(generation.module, "flash_attn_func")


def _generation(call: Call) -> Generation | None:
    return next((g for g in GENERATIONS if _generation_missing(g, call) is None), None)


def supports(backend: str, call: Call) -> str | None:
    """None if `sdpa`, `flash-attn` or `xformers` serves the call, else the reason why not."""
    if call.extra:
        return f"{backend} takes one segment of keys, and extra_k was given"
    if call.empty:
        return f"{backend} is not asked about tensors without elements"
    if call.dropout and call.seeded:
        return f"{backend} draws dropout from torch's generator, and a seed was given"
    if backend == "sdpa":
        if call.masked and call.device.type != "cpu":
            return f"sdpa does not promise zeros on {call.device.type} for a query whose keys are all masked"
        return None
    dtypes = [torch.float16, torch.bfloat16] + [torch.float32] * (backend == "xformers")
    if call.dtype not in dtypes:
        return f"{backend} serves {' and '.join(map(str, dtypes))}, not {call.dtype}"
    if call.masked:
        return f"{backend} takes no key mask without packing the keys"
    if call.compiling:
        return f"torch.compile does not see through {backend}"
    if backend == "flash-attn":
        reasons = [_generation_missing(generation, call) for generation in GENERATIONS]
        return None if None in reasons else "; ".join(reasons)
    if call.head_dim % 8:
        return f"xformers serves head dims that are multiples of 8, not {call.head_dim}"
    if call.deterministic:
        return "xformers has no deterministic backward, and torch.use_deterministic_algorithms asks for one"
    return None


def _tokens_first(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H, K) with the last dimension contiguous."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """torch's `scaled_dot_product_attention`; arguments as in `attention`."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if mask is not None and causal:
        N = q.shape[2]
        mask = mask & torch.ones(N, N, dtype=torch.bool, device=q.device).tril()
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: float, call: Call) -> Tensor:
    """The best generation of flash-attn that serves `call`, as `supports` found."""
    generation = _generation(call)
    function = importlib.import_module(generation.module).flash_attn_func
    options = dict(softmax_scale=scale, causal=causal, deterministic=call.deterministic)
    if generation.dropout:
        options["dropout_p"] = dropout
    out = function(_tokens_first(q), _tokens_first(k), _tokens_first(v), **options)
    # generation 4 returns the log-sum-exp, or None, beside the output
    out = out if isinstance(out, Tensor) else out[0]
    return out.contiguous().transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: float) -> Tensor:
    """xFormers' `memory_efficient_attention`; arguments as in `attention`."""
    ops = importlib.import_module("xformers.ops")
    out = ops.memory_efficient_attention(
        _tokens_first(q),
        _tokens_first(k),
        _tokens_first(v),
        attn_bias=ops.LowerTriangularMask() if causal else None,
        p=dropout,
        scale=scale,
    )
    return out.contiguous().transpose(1, 2)
