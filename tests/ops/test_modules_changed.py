"""Proves that the drop-in modules call a layer which is no longer the plain one that was built, and compute what a
composition of called layers does: adapted, quantised, pruned, normalised, parametrised, hooked, wrapped, offloaded.

Run: pytest tests/ops/test_modules_changed.py
"""

import pytest
import torch
from torch import nn

from prismer.kernels.modules import LayerNorm
from tests.ops.test_modules import PAIRS, PlainPacked, inputs, pair, step
from tests.ops.test_patch_changes import CHANGES

LAYERS = {
    "quick_gelu": ("c_fc", "c_proj"),
    "gelu": ("c_fc",),
    "squared_relu": ("c_proj",),
    "adaptor": ("norm", "down", "up"),
    "late_adaptor": ("norm", "down"),
    "separate": ("query", "key", "output"),
    "resampler": ("blocks.0.ln_1", "blocks.1.ln_2", "blocks.0.ln_ff", "blocks.1.mlp.c_fc"),
}
HOWS = (
    "adapted",
    "wrapped",
    "quantised",
    "pruned",
    "weight norm, old",
    "spectral norm",
    "parametrised",
    "offloaded",
    "overridden",
    "hook",
    "pre-hook",
    "backward hook",
)
OF_NORMS = ("wrapped", "parametrised", "overridden", "hook", "backward hook", "rms norm")
ROWS = [
    (name, layer, how)
    for name, layers in LAYERS.items()
    for layer in layers
    for how in (
        OF_NORMS
        if "norm" in layer or "ln_" in layer
        else HOWS
        if name in ("quick_gelu", "separate")
        else ("adapted", "hook")
    )
]


def change(module, name, how):
    torch.manual_seed(3)
    parent, _, child = name.rpartition(".")
    parent = module.get_submodule(parent)
    new = CHANGES[how](getattr(parent, child))
    if new is not None:
        setattr(parent, child, new.double())


@pytest.mark.parametrize(("name", "layer", "how"), ROWS)
def test_equals_what_calls_its_layers(name, layer, how):
    ours, plain = pair(name)
    arguments, options = inputs(name)
    for module in (ours, plain):
        change(module, layer, how)
    got, expected = step(ours, arguments, options), step(plain, arguments, options)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ("self", "cross"))
@pytest.mark.parametrize("how", ("adapted", "hook"))
def test_output_projection(name, how):
    """`nn.MultiheadAttention` itself reads this one: held against the projection applied by hand."""
    ours, plain = pair(name)
    arguments, options = inputs(name)
    with torch.no_grad():
        plain.out_proj.weight.copy_(torch.eye(32))
        plain.out_proj.bias.zero_()
        attended = plain(*arguments, **options)
        change(ours, "out_proj", how)
        torch.testing.assert_close(ours(*arguments, **options), ours.out_proj(attended))


def test_hooked_attention_of_a_resampler():
    """The block reads the attention's own parameters in place of calling it."""
    ours, plain = pair("resampler")
    arguments, options = inputs("resampler")
    for module in (ours, plain):
        module.blocks[0].attn.register_forward_hook(lambda m, a, y: 2 * y)
    got, expected = step(ours, arguments, options), step(plain, arguments, options)
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_another_attention_in_a_resampler():
    ours, plain = pair("resampler")
    arguments, options = inputs("resampler")
    ours.blocks[1].attn = PlainPacked().double()
    ours.blocks[1].attn.load_state_dict(plain.blocks[1].attn.state_dict())
    torch.testing.assert_close(ours(*arguments, **options), plain(*arguments, **options), rtol=1e-9, atol=1e-9)


def test_the_sum_of_a_hooked_norm():
    norm, seen = LayerNorm(32), []
    norm.register_forward_hook(lambda m, a, y: seen.append(y))
    x, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    y, total = norm.add(x, residual)
    assert seen[0] is y
    torch.testing.assert_close(y, nn.functional.layer_norm(total, (32,)))
    torch.testing.assert_close(total, x + residual)


@pytest.mark.parametrize("name", ("gelu", "adaptor", "separate", "resampler"))
def test_unchanged_modules_stay_fused(name, count_calls):
    ours = PAIRS[name][0]().double()
    arguments, options = inputs(name)
    with count_calls() as calls:
        ours(*arguments, **options)
    fused = {"gelu": "mlp", "adaptor": "adaptor", "separate": "linears", "resampler": "resampler_attention"}[name]
    assert f"prismer::{fused}" in calls
