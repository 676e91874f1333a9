"""Proves what patching saves: bytes that autograd saves for the backward pass, and operators that are issued.

Run: pytest tests/ops/test_patch_savings.py -s   (-s shows the counts)
"""

import copy

import pytest
import torch
from torch import nn

from prismer.costs.counting import CostCounter
from prismer.kernels.patch import apply_to
from tests.ops import resampler_families, tower_families
from tests.ops.patching import assert_same, randomise, saved_bytes, step
from tests.ops.tower_families import open_clip, transformers

B, D = 2, 64


def build_tower(family, act):
    if family == "open_clip":
        layer = open_clip.transformer.QuickGELU if act == "quick_gelu" else nn.GELU
        return open_clip.transformer.Transformer(D, 3, 4, act_layer=layer)
    config = transformers.CLIPVisionConfig(
        hidden_size=D,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=act,
        attn_implementation="sdpa",
    )
    return transformers.models.clip.modeling_clip.CLIPEncoder(config)


class AdaptedTower(nn.Module):
    """A frozen tower behind trainable prompts, with a trainable adaptor after it."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(1, 4, D))
        self.adaptor = nn.Linear(D, D)

    def forward(self, x):
        x = torch.cat((self.prompt.expand(x.shape[0], -1, -1), x), 1)
        if type(self.tower).__name__ == "CLIPEncoder":
            return self.adaptor(self.tower(x, attention_mask=None).last_hidden_state)
        return self.adaptor(self.tower(x))


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen", "trained"))
@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
@pytest.mark.parametrize("family", ("open_clip", "transformers"))
def test_towers_save_fewer_bytes(family, act, frozen):
    """Torch saves two tensors for QuickGELU, and one for GELU in a frozen MLP: there nothing is gained."""
    plain = randomise(AdaptedTower(build_tower(family, act)))
    plain.tower.requires_grad_(not frozen)
    patched = copy.deepcopy(plain)
    report = apply_to(patched)
    assert len(report.replaced) == 3 * (3 if family == "open_clip" else 4)
    x = torch.randn(B, 49, D)
    expected, got = (saved_bytes(m, lambda m=m: m(x)) for m in (plain, patched))
    print(f"\n{family} {act} frozen={frozen}: {expected} bytes unpatched, {got} patched, {1 - got / expected:.0%} less")
    least = {("quick_gelu", True): 0.25, ("quick_gelu", False): 0.35, ("gelu", True): 0.0, ("gelu", False): 0.2}
    assert got <= (1 - least[act, frozen]) * expected
    assert_same(step(patched, dict(x=x)), step(plain, dict(x=x)))


def launches_nothing(name: str) -> bool:
    """Whether an operator only makes a view or allocates."""
    op = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    is_view = op is not None and all(getattr(op, overload).is_view for overload in op.overloads())
    return is_view or "empty" in name or name.endswith(("::detach", "::_unsafe_view"))


@pytest.mark.parametrize("name", tower_families.FAMILIES)
def test_towers_issue_fewer_operators(name, count_calls):
    plain, patched, inputs = tower_families.build_pair(name)
    counts = []
    for model in (plain, patched):
        with count_calls() as calls:
            step(model, inputs)
        counts.append(sum(len(found) for key, found in calls.items() if not launches_nothing(key)))
    print(f"\n{name}: {counts[0]} operators a step, {counts[1]} patched")
    assert counts[1] < 0.9 * counts[0]
    # the projections are fused whatever the mask is
    assert "prismer::linears" in calls and "prismer::layer_norm" in calls


def count_resampler_step(module, inputs):
    """Operators of forward and backward, and bytes that autograd saves between them."""
    module.zero_grad()
    with CostCounter() as counter:
        output = module(*inputs)
        output.backward(torch.ones_like(output))
    return counter.issued.total(), saved_bytes(module, lambda: module(*inputs))


SIZES = {
    # name: the builder's options, shape of the inputs without the width; a quarter of real widths and depths
    "flamingo-pytorch": (dict(depth=2, width=256, heads=8, dim_head=64, latents=64), (1, 1, 256)),
    "open-flamingo": (dict(depth=2, width=256, heads=8, dim_head=64, latents=64), (1, 1, 1, 256)),
    "idefics": (dict(depth=2, width=320, heads=16, dim_head=96, latents=64), (1, 257)),
    "idefics-qk-norms": (dict(depth=2, width=320, heads=16, dim_head=96, latents=64, qk=True), (1, 257)),
    "idefics2": (dict(depth=2, width=512, heads=16, dim_head=96, latents=64, keys=4), (1, 1225)),
    "idefics2-masked": (dict(depth=2, width=512, heads=16, dim_head=96, latents=64, keys=4), (2, 1225)),
}


@pytest.mark.parametrize("trained", (False, True), ids=("frozen-inputs", "trained-inputs"))
@pytest.mark.parametrize("name", SIZES)
def test_resamplers_issue_half_the_operators_and_save_three_quarters_of_the_bytes(name, trained):
    build, options, _, mask = resampler_families.FAMILIES[name]
    sizes, shape = SIZES[name]
    module = build(**(options | sizes))
    inputs = [torch.randn(*shape, module.latents.shape[1], requires_grad=trained), *mask(shape).values()]
    plain, plain_bytes = count_resampler_step(module, inputs)
    apply_to(module, "resampler", strict=True)
    fused, fused_bytes = count_resampler_step(module, inputs)
    print(
        f"\n{name}: {fused} operators of {plain}, "
        f"{fused_bytes / 1e6:.2f} MB saved of {plain_bytes / 1e6:.2f}, {1 - fused_bytes / plain_bytes:.0%} less"
    )
    assert fused <= plain / 2
    assert fused_bytes <= 0.75 * plain_bytes
