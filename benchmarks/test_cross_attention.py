"""Cross-attention of text over image tokens, with its key and value layers, against two linear layers and SDPA.

Run: pytest benchmarks/test_cross_attention.py --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import MODELS, TEXT_TOKENS
from prismer.kernels.cross_attention import cross_attention, flops

SIZES = {m.name: m for m in MODELS}
TEXTS = {"1 text": 1, "5 texts": 5}


def plain(q, context, k_weight, k_bias, v_weight, v_bias, H):
    """Two linear layers and SDPA."""
    q, k, v = (
        t.unflatten(-1, (H, -1)).transpose(1, 2)
        for t in (q, F.linear(context, k_weight, k_bias), F.linear(context, v_weight, v_bias))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def calls(B, N, L, D, E, H):
    draws = [
        torch.randn(B, N, D),
        torch.randn(B, L, E),
        torch.randn(D, E) / E**0.5,
        torch.randn(D),
        torch.randn(D, E) / E**0.5,
        torch.randn(D),
        H,
    ]
    return contenders_on(draws, dict(ours=cross_attention, eager=plain))


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("size", SIZES)
def test_cross_attention(benchmark, size, texts, dtype, part, compiled, everything):
    model = SIZES[size]
    if size not in ("BASE-224", "BASE-480") and not everything:
        pytest.skip("on a CPU BASE, to keep the run short: --full has LARGE")
    refuse_if_worse(calls(2, 4, 40, 48, 40, 4), dtype, part)
    sizes = (2, TEXT_TOKENS * TEXTS[texts], model.tokens, model.text_width, model.width, model.text_heads)
    contenders = compiled(calls(*sizes)(dtype), False)
    trained = ("q", "context", "k_weight", "v_weight") if part == "forward+backward" else ()
    least = min(flops(order, *sizes, trained) for order in ("absorbed", "ordinary"))
    time_contenders(
        benchmark,
        contenders,
        room="cross_attention",
        shape=f"{size} {texts}",
        dtype=dtype,
        part=part,
        flops=least,
        seconds=0.4,
    )
