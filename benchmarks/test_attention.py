"""Attention of encoder and decoder, against SDPA, xFormers and flash-attn.

Run: pytest benchmarks/test_attention.py --benchmark-only

Every contender takes views of packed projections and returns merged heads, (B, N, H K), as a layer needs them.
"""

import pytest
import torch

from benchmarks.harness import DEVICE, contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import MODELS, TEXT_TOKENS
from prismer.kernels import machine
from prismer.kernels.attention import attention

SHAPES = {
    **{f"{m.name} self": (1, m.heads, m.tokens, m.tokens, False) for m in MODELS},
    **{f"{m.name} cross": (2, m.text_heads, TEXT_TOKENS, m.tokens, False) for m in MODELS[1::2]},
    "BASE text causal": (8, 12, TEXT_TOKENS, TEXT_TOKENS, True),
}


def plain(q, k, v, causal):
    """Scores, softmax and product, as three operators."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return merged(scores.softmax(-1) @ v)


def merged(out):
    """(B, H, N, K) -> (B, N, H K): a view where the memory is in that order, else a copy."""
    return out.transpose(1, 2).flatten(2)


def with_backend(name):
    return lambda q, k, v, causal: merged(attention(q, k, v, causal=causal, backend=name))


def calls(B, H, N, L, causal):
    # views into packed projections, as a layer has them
    q, k, v = (torch.randn(B, n, H, 64).transpose(1, 2) for n in (N, L, L))
    functions = dict(ours=with_backend(None), eager=plain, sdpa=with_backend("sdpa"))
    if DEVICE.type == "cuda":
        functions["triton"] = with_backend("triton")
        peers = (name for name in ("flash-attn", "xformers") if machine.package_missing(name) is None)
        functions.update((name, with_backend(name)) for name in peers)
    return contenders_on([q, k, v, causal], functions)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark, shape, dtype, part, compiled, everything):
    if shape == "LARGE-480 self" and not everything:
        pytest.skip("on a CPU BASE, to keep the run short: --full has it")
    B, H, N, L, causal = SHAPES[shape]
    refuse_if_worse(calls(1, 2, min(N, 40), min(L, 50) if not causal else min(N, 40), causal), dtype, part)
    contenders = compiled(calls(B, H, N, L, causal)(dtype), shape == "BASE-480 self")
    if dtype == torch.float32:
        contenders = {name: call for name, call in contenders.items() if name not in ("flash-attn", "xformers")}
    flops = 4 * B * H * N * L * 64 * (1 if part == "forward" else 3.5)
    time_contenders(
        benchmark, contenders, room="attention", shape=shape, dtype=dtype, part=part, flops=int(flops), seconds=0.5
    )
