"""The resampler: absorbed against ordinary order, and the whole module.

Run: pytest benchmarks/test_resampler_attention.py --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import DEVICE, Contender, contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import MODELS, NUM_LATENTS, RESAMPLER_HEADS
from prismer.kernels.modules import PerceiverResampler
from prismer.kernels.resampler_attention import resampler_attention

SIZES = {m.name.split("-")[0]: m for m in (MODELS[0], MODELS[2])}
MODES = {"6 experts": 1.0, "1 expert": 1 / 6}


def plain(query, x_hat, gamma, beta, weight, bias):
    """Inputs' norm, concatenated keys, projections, SDPA: the ordinary order in torch operators."""
    D = query.shape[-1]
    keys = torch.cat((query, x_hat * gamma + beta), 1)
    q = F.linear(query, weight[:D], bias[:D])
    k, v = F.linear(keys, weight[D:], bias[D:]).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (RESAMPLER_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def order(name):
    return lambda *t: resampler_attention(*t, RESAMPLER_HEADS, order=name)


def calls(B, L, D):
    draws = [
        torch.randn(B, NUM_LATENTS, D),
        torch.randn(B, L, D),
        1 + 0.1 * torch.randn(D),
        torch.randn(D),
        torch.randn(3 * D, D) / D**0.5,
        torch.randn(3 * D),
    ]
    return contenders_on(
        draws, dict(ours=order(None), eager=plain, ordinary=order("ordinary"), absorbed=order("absorbed"))
    )


@pytest.mark.parametrize("experts", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_resampler_attention(benchmark, size, experts, dtype, part, compiled):
    model = SIZES[size]
    L = round(model.expert_tokens * MODES[experts])
    refuse_if_worse(calls(1, 60, 96), dtype, part)
    contenders = compiled(calls(1, L, model.width)(dtype), False)
    time_contenders(
        benchmark,
        contenders,
        room="resampler_attention",
        shape=f"{size} {experts}",
        dtype=dtype,
        part=part,
        seconds=0.8,
    )


class PlainBlock(nn.Module):
    """A block as a user would write it."""

    def __init__(self, D):
        super().__init__()
        self.ln_1, self.ln_2, self.ln_ff = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, RESAMPLER_HEADS, batch_first=True)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(D, 4 * D), c_proj=nn.Linear(4 * D, D)))

    def forward(self, z, x):
        query = self.ln_1(z)
        keys = torch.cat((query, self.ln_2(x)), 1)
        z = z + self.attn(query, keys, keys, need_weights=False)[0]
        return z + self.mlp.c_proj(self.mlp.c_fc(self.ln_ff(z)).relu().square())


class PlainResampler(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(NUM_LATENTS, D))
        self.blocks = nn.ModuleList(PlainBlock(D) for _ in range(4))

    def forward(self, x):
        z = self.latents.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            z = block(z, x)
        return z


def module_calls(L, D):
    ours, plain_module = PerceiverResampler(D, 4, RESAMPLER_HEADS, NUM_LATENTS), PlainResampler(D)
    plain_module.load_state_dict(ours.state_dict())
    x = torch.randn(1, L, D, device=DEVICE)

    def make(dtype):
        found = {}
        for name, module in (("ours", ours), ("eager", plain_module)):
            module = module.to(x.device, dtype)
            leaf = x.to(dtype).requires_grad_()
            parameters = dict(module.named_parameters())
            # in the order of names, so that gradients of both modules are compared one by one
            names = sorted(parameters)

            def run(leaf, *_, module=module):
                return module(leaf)

            found[name] = Contender(run=run, inputs=[leaf, *(parameters[n] for n in names)])
        return found

    return make


@pytest.mark.parametrize("size", SIZES)
def test_resampler(benchmark, size, dtype, part, compiled):
    model = SIZES[size]
    contenders = compiled(module_calls(model.expert_tokens, model.width)(dtype), False)
    time_contenders(
        benchmark, contenders, room="PerceiverResampler", shape=f"{size} 6 experts", dtype=dtype, part=part, seconds=1.5
    )
