"""The element-wise epilogues, bias and activation: pytest benchmarks/test_activation.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import MODELS
from prismer.kernels.activation import bias_activation

SHAPES = {
    **{f"{m.name} MLP": ("quick_gelu", m.tokens, 4 * m.width) for m in MODELS},
    **{f"{m.name} adaptor": ("squared_relu", m.tokens, m.width) for m in MODELS},
    "BASE text MLP 8x20": ("gelu", 160, 3072),
    "LARGE text MLP 8x20": ("gelu", 160, 4096),
}
EAGER = {
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "gelu": F.gelu,
    "squared_relu": lambda h: F.relu(h).square(),
}


def calls(activation, R, D):
    functions = dict(
        ours=lambda h, bias: bias_activation(h, bias, activation), eager=lambda h, bias: EAGER[activation](h + bias)
    )
    # the bias is frozen in the towers, whose epilogues these are
    return contenders_on([2 * torch.randn(R, D), torch.randn(D)], functions, frozen=(1,))


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_activation(benchmark, shape, dtype, part, compiled):
    activation, R, D = SHAPES[shape]
    refuse_if_worse(calls(activation, 64, D), dtype, part)
    contenders = compiled(calls(activation, R, D)(dtype), shape.startswith("BASE-480"))
    streams = 2 if part == "forward" else 5
    time_contenders(
        benchmark,
        contenders,
        room=f"bias_{activation}",
        shape=shape,
        dtype=dtype,
        part=part,
        bytes_moved=streams * R * D * dtype.itemsize,
        seconds=0.2,
    )
