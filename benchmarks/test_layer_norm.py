"""layer_norm and add_layer_norm: pytest benchmarks/test_layer_norm.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Call, compare, gate
from shapes import MODELS

from prismer.kernels.layer_norm import add_layer_norm, layer_norm

SHAPES = {
    **{f"{m.name} B2": (2 * m.tokens, m.width) for m in MODELS},
    "BASE text 8x20": (160, 768),
    "BASE 3 beams": (3, 768),
}


def calls(R, D, add):
    """dtype -> contenders on the same numbers."""
    draws = [torch.randn(R, D) + 0.5, torch.randn(R, D), 1 + torch.randn(D), torch.randn(D)]

    def make(dtype):
        x, residual, weight, bias = (t.to(DEVICE, dtype).requires_grad_() for t in draws)
        inputs = [x, residual, weight, bias] if add else [x, weight, bias]

        def eager(*t):
            total = t[0] + t[1] if add else t[0]
            return F.layer_norm(total, (D,), *t[-2:])

        def ours(*t):
            return add_layer_norm(*t)[0] if add else layer_norm(*t)

        return {"ours": Call(run=ours, inputs=inputs), "eager": Call(run=eager, inputs=inputs)}

    return make


@pytest.mark.parametrize("add", (False, True), ids=("alone", "add"))
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(benchmark, shape, add, dtype, part, everything):
    R, D = SHAPES[shape]
    make = calls(R, D, add)
    gate(calls(min(R, 64), D, add), dtype, part)
    contenders = make(dtype)
    if everything or shape == "BASE-480 B2":
        eager = contenders["eager"]
        contenders["compile"] = Call(run=torch.compile(eager.run), inputs=eager.inputs)
    room = "add_layer_norm" if add else "layer_norm"
    streams = (2 + add) * (2 if part == "forward+backward" else 1) + add
    compare(
        benchmark, contenders, room=room, shape=shape, dtype=dtype, part=part,
        bytes_moved=streams * R * D * dtype.itemsize, seconds=0.5,
    )  # fmt: skip
