"""layer_norm and add_layer_norm: pytest benchmarks/test_layer_norm.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import MODELS
from prismer.kernels.layer_norm import add_layer_norm, layer_norm

SHAPES = {
    **{f"{m.name} B2": (2 * m.tokens, m.width) for m in MODELS},
    "BASE text 8x20": (160, 768),
    "BASE 3 beams": (3, 768),
}


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def eager_add(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def calls(R, D, add):
    affine = [1 + torch.randn(D), torch.randn(D)]
    if add:
        return contenders_on(
            [torch.randn(R, D), torch.randn(R, D), *affine], dict(ours=add_layer_norm, eager=eager_add)
        )
    return contenders_on([torch.randn(R, D) + 0.5, *affine], dict(ours=layer_norm, eager=eager))


@pytest.mark.parametrize("add", (False, True), ids=("alone", "add"))
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(benchmark, shape, add, dtype, part, compiled):
    R, D = SHAPES[shape]
    refuse_if_worse(calls(min(R, 64), D, add), dtype, part)
    streams = (2 + 2 * add) + (3 if part == "forward+backward" else 0)
    time_contenders(
        benchmark,
        compiled(calls(R, D, add)(dtype), shape == "BASE-480 B2"),
        room="add_layer_norm" if add else "layer_norm",
        shape=shape,
        dtype=dtype,
        part=part,
        bytes_moved=streams * R * D * dtype.itemsize,
        seconds=0.2,
    )
