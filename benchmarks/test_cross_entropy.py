"""LM head and smoothed loss: pytest benchmarks/test_cross_entropy.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import LOSS_ROWS, VOCABULARY
from prismer.kernels.cross_entropy import linear_cross_entropy


def eager(x, weight, bias, labels):
    logits = F.linear(x, weight, bias)
    logits = logits if x.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")


def ours(x, weight, bias, labels):
    return linear_cross_entropy(x, weight, bias, labels, reduction="sum")


def liger():
    """Liger-Kernel's fused loss where it is installed and runs: on a GPU."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    return lambda x, weight, bias, labels: loss(weight, x, labels, bias)


def calls(R, D, V):
    labels = torch.randint(0, V, (R,))
    labels[::7] = -100
    functions = dict(ours=ours, eager=eager)
    peer = liger() if DEVICE.type == "cuda" else None
    if peer is not None:
        functions["liger"] = peer
    draws = [torch.randn(R, D), torch.randn(V, D) / D**0.5, torch.randn(V), labels]
    return contenders_on(draws, functions)


@pytest.mark.parametrize("D", (768, 1024), ids=("BASE", "LARGE"))
def test_cross_entropy(benchmark, D, dtype, part, everything, compiled):
    if D == 1024 and not everything:
        pytest.skip("minutes on a CPU; --full runs it")
    refuse_if_worse(calls(32, 64, 1023), dtype, part)
    contenders = compiled(calls(LOSS_ROWS, D, VOCABULARY)(dtype), False)
    name = "BASE" if D == 768 else "LARGE"
    time_contenders(
        benchmark,
        contenders,
        room="cross_entropy",
        shape=f"{name} {LOSS_ROWS} rows",
        dtype=dtype,
        part=part,
        flops=2 * LOSS_ROWS * D * VOCABULARY * (1 if part == "forward" else 3),
        seconds=3,
    )
