"""Attention from other libraries behind our signature: torch's own, flash-attn 2, 3 and 4, and xFormers.

Each function takes a `Call` of (B, H, N, K) tensors and returns (B, H, N, K) whose memory is (B, N, H, K), under plain
autograd. The functions `..._refuses` say what each library does not do. The calls follow flash-attn 2.8.3, flash-attn 3
in the same source, flash-attn-4 4.0.0 and xFormers 0.0.35; `tests/ops/test_attention_peers.py` keeps their signatures.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import machine
from prismer.kernels.attention.call import Call, Facts


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One of the packages that are called flash-attn.

    Attributes:
        number: the generation, 2, 3 or 4.
        module: where its `flash_attn_func` is.
        majors: of the compute capabilities for which it is published.
        dropout: does it drop weights?
    """

    number: int
    module: str
    majors: tuple[int, ...]
    dropout: bool = False


# the best first
GENERATIONS = (
    Generation(number=3, module="flash_attn_interface", majors=(9,)),
    Generation(number=4, module="flash_attn.cute", majors=(9, 10, 11)),
    Generation(number=2, module="flash_attn", majors=(8, 9, 10, 11, 12), dropout=True),
)


def _generation_missing(generation: Generation, facts: Facts) -> str | None:
    """None if this generation of flash-attn serves the call here, else the reason why not."""
    name = f"flash-attn {generation.number}"
    if facts.capability is None or facts.capability[0] not in generation.majors:
        found = "none" if facts.capability is None else "{}.{}".format(*facts.capability)
        wanted = ", ".join(f"{major}.x" for major in generation.majors)
        return f"{name} serves compute capability {wanted}, and this device has {found}"
    # generation 4 serves larger heads on Hopper, but not on Blackwell
    largest = 128 if generation.number == 4 and facts.capability[0] > 9 else 256
    if facts.head_dim > largest or facts.head_dim % 8:
        return f"{name} serves head dims up to {largest} that are multiples of 8, not {facts.head_dim}"
    if facts.dropout and not generation.dropout:
        return f"{name} has no dropout"
    return machine.module_missing(generation.module, "flash_attn_func")


def _generation(facts: Facts) -> Generation | None:
    """The best generation of flash-attn that serves the call."""
    return next((g for g in GENERATIONS if _generation_missing(g, facts) is None), None)


def _all_refuse(backend: str, facts: Facts) -> str | None:
    """What no other library does."""
    if facts.empty:
        return f"{backend} does not take tensors without elements"
    if facts.dropout and facts.seeded:
        return f"{backend} draws dropout from torch's generator, and a seed was given"
    return None


def _packages_refuse(backend: str, facts: Facts, *dtypes: torch.dtype) -> str | None:
    """What neither flash-attn nor xFormers does."""
    if facts.dtype not in dtypes:
        return f"{backend} serves {' and '.join(map(str, dtypes))}, not {facts.dtype}"
    if facts.masked:
        return f"{backend} takes no key mask without packing the keys"
    if facts.compiling:
        return f"torch.compile does not see through {backend}"
    return None


def sdpa_refuses(facts: Facts) -> str | None:
    """None if torch's own attention serves the call, else the reason why not."""
    reason = _all_refuse("sdpa", facts)
    if reason is None and facts.masked and facts.device.type != "cpu":
        return f"sdpa does not promise zeros on {facts.device.type} for a query whose keys are all masked"
    return reason


def flash_attn_refuses(facts: Facts) -> str | None:
    """None if a generation of flash-attn serves the call, else the reason why not."""
    name = "flash-attn"
    reason = _all_refuse(name, facts) or _packages_refuse(name, facts, torch.float16, torch.bfloat16)
    if reason is not None:
        return reason
    reasons = [_generation_missing(generation, facts) for generation in GENERATIONS]
    return None if None in reasons else "; ".join(reasons)


def flash_attn_slower(facts: Facts) -> str | None:
    """None if flash-attn is the prior on this GPU, else the reason why torch's own attention precedes it."""
    found = _generation(facts)
    if found is not None and found.number == 2 and facts.capability is not None and facts.capability[0] >= 9:
        # generation 2 was built for Ampere, and does not use the asynchronous products of later GPUs
        return "cuDNN, which torch's own attention calls, precedes flash-attn 2 on compute capability 9 and later"
    return None


def xformers_refuses(facts: Facts) -> str | None:
    """None if xFormers serves the call, else the reason why not."""
    dtypes = torch.float16, torch.bfloat16, torch.float32
    reason = _all_refuse("xformers", facts) or _packages_refuse("xformers", facts, *dtypes)
    if reason is None and facts.head_dim % 8:
        return f"xformers serves head dims that are multiples of 8, not {facts.head_dim}"
    if reason is None and facts.deterministic:
        return "xformers has no deterministic backward, and torch.use_deterministic_algorithms asks for one"
    return reason


def _tokens_first(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H, K) with the last dimension contiguous."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def sdpa(call: Call) -> Tensor:
    """torch's `scaled_dot_product_attention`."""
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    if mask is not None and call.causal:
        N = call.q.shape[2]
        mask = mask & torch.ones(N, N, dtype=torch.bool, device=call.q.device).tril()
    out = F.scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=call.causal and mask is None,
        scale=call.scale,
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def prepare_sdpa(call: Call) -> Callable[..., Tensor]:
    """`sdpa` as a function of q, k, v, key_mask and seed, for eager calls like this one that are not causal and masked.

    Each view and each option costs the host a good part of what a short attention costs.
    """
    (B, H, N, K), L = call.q.shape, call.k.shape[2]
    wanted, mask_shape = (N * H * K, K, H * K, 1), (B, 1, 1, L)
    options: dict[str, Any] = {}
    if call.dropout:
        options["dropout_p"] = call.dropout
    if call.causal:
        options["is_causal"] = True
    if call.scale != K**-0.5:
        options["scale"] = call.scale

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seed: Tensor | None) -> Tensor:
        mask = None if key_mask is None else key_mask.view(mask_shape)
        out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return out if out.stride() == wanted else out.transpose(1, 2).contiguous().transpose(1, 2)

    return attend


def flash_attn(call: Call) -> Tensor:
    """The best generation of flash-attn that serves the call; `flash_attn_refuses` has found that there is one."""
    facts = Facts.on_this_machine(**call.constants())
    generation = _generation(facts)
    function = importlib.import_module(generation.module).flash_attn_func
    options = dict(softmax_scale=call.scale, causal=call.causal, deterministic=facts.deterministic)
    if generation.dropout:
        options["dropout_p"] = call.dropout
    out = function(_tokens_first(call.q), _tokens_first(call.k), _tokens_first(call.v), **options)
    # generation 4 returns the log-sum-exp, or None, beside the output
    out = out if isinstance(out, Tensor) else out[0]
    return out.contiguous().transpose(1, 2)


def xformers(call: Call) -> Tensor:
    """xFormers' `memory_efficient_attention`."""
    ops = importlib.import_module("xformers.ops")
    out = ops.memory_efficient_attention(
        _tokens_first(call.q),
        _tokens_first(call.k),
        _tokens_first(call.v),
        attn_bias=ops.LowerTriangularMask() if call.causal else None,
        p=call.dropout,
        scale=call.scale,
    )
    return out.contiguous().transpose(1, 2)
