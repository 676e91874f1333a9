"""Proves that a resampler which the fused forward does not fit is kept, with the reason, and stays as it was.

Run: pytest tests/ops/test_patch_resamplers_kept.py
"""

import pytest
from torch import nn

from prismer.kernels.patch import apply_to
from tests.ops.resampler_families import D, build_resampler


class Quantised(nn.Linear):
    """Stands for a layer of bitsandbytes or peft."""


def biased(module):
    module.layers[1][0].to_q = nn.Linear(D, 32)


def quantised(module):
    module.layers[0][0].to_kv = Quantised(D, 64, bias=False)


def tanh_gelu(module):
    module.layers[0][1][2] = nn.GELU("tanh")


def longer(module):
    module.layers[0][1].append(nn.Dropout(0.1))


def other_eps(module):
    module.layers[1][0].norm_media.eps = 1e-3


def hooked(module):
    module.layers[1][0].to_out.register_forward_hook(lambda *a: None)


def mixed(module):
    module.layers[1][0].to_out.bfloat16()


def no_layers(module):
    module.layers = nn.ModuleList()


REASONS = {
    biased: "layers.1.0.to_q has a bias",
    quantised: "layers.0.0.to_kv is a Quantised",
    tanh_gelu: "layers.0.1.2 is the tanh approximation",
    longer: "layers.0.1 has 5 parts",
    other_eps: "different eps",
    hooked: "layers.1.0.to_out has hooks",
    mixed: "2 dtypes",
    no_layers: "no layers",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda f: f.__name__)
def test_a_changed_open_flamingo_resampler_is_kept_with_a_reason(change):
    module, _ = build_resampler("open-flamingo")
    change(module)
    before = {name: type(m) for name, m in module.named_modules()}
    with pytest.raises(ValueError, match=REASONS[change]):
        apply_to(module, "resampler", strict=True)
    assert {name: type(m) for name, m in module.named_modules()} == before
    report = apply_to(module, "resampler")
    assert report.replaced == [] and REASONS[change] in str(report)


def test_changed_resamplers_of_transformers_are_kept_with_a_reason():
    module, _ = build_resampler("idefics")
    module.blocks[0][1].act = nn.GELU()
    assert "blocks.0.1.act is a GELU" in str(apply_to(module, "resampler"))
    module, _ = build_resampler("idefics2")
    module.layers[0].mlp.up_proj = Quantised(D, 4 * D, bias=False)
    assert "layers.0.mlp.up_proj is a Quantised" in str(apply_to(module, "resampler"))
    module, _ = build_resampler("idefics2")
    module.layers[1].input_context_norm.variance_epsilon = 1e-3
    assert "different eps" in str(apply_to(module, "resampler"))
