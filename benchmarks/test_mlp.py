"""mlp and adaptor, a frozen tower's and a trained one's: pytest benchmarks/test_mlp.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import MODELS
from prismer.kernels.adaptor import adaptor
from prismer.kernels.mlp import mlp


def eager_mlp(x, w1, b1, w2, b2):
    h = F.linear(x, w1, b1)
    return F.linear(h * torch.sigmoid(1.702 * h), w2, b2)


def eager_adaptor(x, weight, bias, down, down_bias, up, up_bias):
    h = F.linear(F.layer_norm(x, x.shape[-1:], weight, bias), down, down_bias)
    return x + F.linear(F.relu(h).square(), up, up_bias)


def weights(D_in, D_out):
    return [torch.randn(D_out, D_in) / D_in**0.5, torch.randn(D_out)]


def mlp_calls(R, D):
    def ours(x, *w):
        return mlp(x, *w, activation="quick_gelu")

    draws = [torch.randn(R, D), *weights(D, 4 * D), *weights(4 * D, D)]
    return contenders_on(draws, dict(ours=ours, eager=eager_mlp), frozen=(1, 2, 3, 4))


def adaptor_calls(R, D):
    def ours(x, *w):
        return adaptor(x, *w, late=False)

    draws = [torch.randn(R, D), 1 + torch.randn(D), torch.randn(D), *weights(D, D), *weights(D, D)]
    return contenders_on(draws, dict(ours=ours, eager=eager_adaptor))


ROOMS = {
    # the CLIP tower is frozen, the adaptors train; GEMMs of D x 4D and of D x D, and a layer norm
    "mlp": (mlp_calls, lambda R, D, part: 16 * R * D * D * (1 if part == "forward" else 2)),
    "adaptor": (adaptor_calls, lambda R, D, part: 4 * R * D * D * (1 if part == "forward" else 3)),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("room", ROOMS)
def test_mlp(benchmark, room, model, dtype, part, compiled):
    calls, flops = ROOMS[room]
    R, D = model.tokens, model.width
    refuse_if_worse(calls(32, D), dtype, part)
    contenders = compiled(calls(R, D)(dtype), model.name == "BASE-480")
    time_contenders(
        benchmark, contenders, room=room, shape=model.name, dtype=dtype, part=part, flops=flops(R, D, part), seconds=0.6
    )
