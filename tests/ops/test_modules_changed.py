"""Proves that the drop-in modules call a layer that is no longer plain (adapted, quantised, pruned, parametrised,
hooked, wrapped, offloaded), and compute what a composition of called layers does.

Run: pytest tests/ops/test_modules_changed.py
"""

import pytest
import torch
from torch import nn

from prismer.kernels.modules import LayerNorm
from tests.ops.layer_changes import change_layer
from tests.ops.test_modules import PAIRS, PlainPacked, build_pair, draw_inputs, step

LAYERS = {
    "quick_gelu": ("c_fc", "c_proj"),
    "gelu": ("c_fc",),
    "squared_relu": ("c_proj",),
    "adaptor": ("norm", "down", "up"),
    "late_adaptor": ("norm", "down"),
    "separate": ("query", "key", "output"),
    "resampler": ("blocks.0.ln_1", "blocks.1.ln_2", "blocks.0.ln_ff", "blocks.1.mlp.c_fc"),
}
CHANGES_OF_LINEARS = (
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
CHANGES_OF_NORMS = ("wrapped", "parametrised", "overridden", "hook", "backward hook", "rms norm")
CASES = [
    (name, layer, how)
    for name, layers in LAYERS.items()
    for layer in layers
    for how in (
        CHANGES_OF_NORMS
        if "norm" in layer or "ln_" in layer
        else CHANGES_OF_LINEARS
        if name in ("quick_gelu", "separate")
        else ("adapted", "hook")
    )
]


@pytest.mark.parametrize(("name", "layer", "how"), CASES)
def test_a_changed_layer_is_called(name, layer, how):
    ours, plain = build_pair(name)
    arguments, options = draw_inputs(name)
    for module in (ours, plain):
        change_layer(module, layer, how)
    got, expected = step(ours, arguments, options), step(plain, arguments, options)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ("self", "cross"))
@pytest.mark.parametrize("how", ("adapted", "hook"))
def test_a_changed_output_projection_is_called(name, how):
    """Compared with the projection applied by hand, since `nn.MultiheadAttention` itself reads its weights."""
    ours, plain = build_pair(name)
    arguments, options = draw_inputs(name)
    with torch.no_grad():
        plain.out_proj.weight.copy_(torch.eye(32))
        plain.out_proj.bias.zero_()
        attended = plain(*arguments, **options)
        change_layer(ours, "out_proj", how)
        torch.testing.assert_close(ours(*arguments, **options), ours.out_proj(attended))


def test_a_hooked_attention_of_a_resampler_is_called():
    """Without hooks, the block reads the attention's weights in place of calling it."""
    ours, plain = build_pair("resampler")
    arguments, options = draw_inputs("resampler")
    for module in (ours, plain):
        module.blocks[0].attn.register_forward_hook(lambda m, a, y: 2 * y)
    got, expected = step(ours, arguments, options), step(plain, arguments, options)
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_an_attention_of_another_class_in_a_resampler_is_called():
    ours, plain = build_pair("resampler")
    arguments, options = draw_inputs("resampler")
    ours.blocks[1].attn = PlainPacked().double()
    ours.blocks[1].attn.load_state_dict(plain.blocks[1].attn.state_dict())
    torch.testing.assert_close(ours(*arguments, **options), plain(*arguments, **options), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hooked", (False, True), ids=("plain", "hooked"))
def test_a_norm_that_adds_is_called_if_it_has_hooks(hooked):
    norm, seen = LayerNorm(32, eps=0.3), []
    if hooked:
        norm.register_forward_hook(lambda m, a, y: seen.append(y))
    x, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    y, total = norm.add(x, residual)
    assert len(seen) == hooked and all(t is y for t in seen)
    torch.testing.assert_close(y, nn.functional.layer_norm(total, (32,), eps=0.3))
    torch.testing.assert_close(total, x + residual)


@pytest.mark.parametrize("name", ("gelu", "adaptor", "separate", "resampler"))
def test_unchanged_modules_are_fused(name, count_calls):
    ours = PAIRS[name][0]().double()
    arguments, options = draw_inputs(name)
    with count_calls() as calls:
        ours(*arguments, **options)
    fused = {"gelu": "mlp", "adaptor": "adaptor", "separate": "linears", "resampler": "resampler_attention"}[name]
    assert f"prismer::{fused}" in calls
