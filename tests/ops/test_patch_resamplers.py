"""Proves that patched resamplers of transformers, flamingo-pytorch and open_flamingo, their attentions, and the
cross-attention to them compute the same: outputs and every gradient, in bf16, over training steps, frozen, compiled.

Run: pytest tests/ops/test_patch_resamplers.py
"""

import copy

import pytest
import torch

from prismer.kernels.patch import apply_to, is_patched
from tests.ops.patching import assert_same, randomise
from tests.ops.resampler_families import FAMILIES, LATENTS, D, build_resampler, flamingo_module, positional_step


def assert_equal(got, expected):
    """Each gradient is held to its own size, and none is so small that an error would not show."""
    got, expected = dict(got), dict(expected)
    size = expected["output"].abs().max()
    for name in list(expected):
        # it adds the same to all scores of a query: the true gradient is zero
        if name.endswith("k_layer_norm.bias"):
            assert max(found.pop(name).abs().max() for found in (got, expected)) < 1e-4 * size
        elif name != "output":
            assert expected[name].abs().max() > 1e-3, f"{name} hardly has a gradient: the test is blind to it"
    assert_same(got, expected, floor=0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patched_resampler_equals_the_unpatched_one(name):
    module, inputs = build_resampler(name)
    plain = positional_step(module, inputs)
    report = apply_to(module, "resampler", strict=True)
    assert report.replaced == [""]
    assert_equal(positional_step(module, inputs), plain)
    report.undo()
    again = positional_step(module, inputs)
    assert all(torch.equal(again[name], t) for name, t in plain.items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if "3d" not in name and "all" not in name])
def test_a_patched_resampler_rounds_no_worse_in_bf16(name, assert_no_worse):
    # a sharp softmax makes the error of one draw a matter of luck, the original's too: eight are judged together
    runs = []
    for _ in range(8):
        module, inputs = build_resampler(name)
        low = copy.deepcopy(module).bfloat16()
        patched = copy.deepcopy(low)
        apply_to(patched, "resampler", strict=True)
        # transformers' RMS norm computes in fp32 at most, which is exact enough here
        runs.append((patched, low, copy.deepcopy(low).double(), inputs))

    def stacked_step(which, dtype):
        steps = []
        for run in runs:
            inputs = {k: t.bfloat16().to(dtype) if t.is_floating_point() else t for k, t in run[3].items()}
            steps.append(positional_step(run[which], inputs))
        return {key: torch.stack([found[key] for found in steps]) for key in steps[0]}

    ours, plain = (stacked_step(which, torch.bfloat16) for which in (0, 1))
    assert_no_worse("", ours, plain, lambda: stacked_step(2, torch.float64))


@pytest.mark.parametrize("name", ("flamingo-pytorch", "open-flamingo-times", "idefics-qk-norms", "idefics2-masked"))
def test_three_training_steps_have_the_same_losses(name):
    module, inputs = build_resampler(name)
    losses = {}
    for kind, model in (("plain", copy.deepcopy(module)), ("fused", module)):
        if kind == "fused":
            apply_to(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses[kind] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(*inputs.values()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
    assert losses["plain"][-1] < losses["plain"][0]
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-5)


@pytest.mark.parametrize("name", ("flamingo-pytorch", "open-flamingo", "idefics", "idefics2"))
def test_frozen_weights_and_inference(name):
    module, inputs = build_resampler(name)
    for key, p in module.named_parameters():
        trained = "latents", "to_q", "context_layer_norm", "norm_media", "k_proj"
        p.requires_grad_(any(part in key for part in trained))
    results = []
    for is_fused in (False, True):
        if is_fused:
            apply_to(module, "resampler", strict=True)
        module.zero_grad()
        module(*inputs.values()).square().mean().backward()
        with torch.no_grad():
            y = module(*inputs.values())
        grads = {f"d{key}": p.grad for key, p in module.named_parameters() if p.grad is not None}
        results.append({"output": y} | grads)
    assert_equal(results[1], results[0])


def test_a_patched_resampler_compiles_in_one_graph():
    module, inputs = build_resampler("open-flamingo-times")
    plain = positional_step(module, inputs)
    apply_to(module, "resampler", strict=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_equal(positional_step(module, inputs, compiled), plain)


def test_state_dict_keys_and_copies():
    module, inputs = build_resampler("idefics-qk-norms")
    keys = list(module.state_dict())
    report = apply_to(module, "resampler")
    assert list(module.state_dict()) == keys
    twin = copy.deepcopy(module)
    assert torch.equal(twin(**inputs), module(**inputs))
    report.undo()
    assert is_patched(twin) and not is_patched(module)


# calls that the fused forward does not serve


@pytest.mark.parametrize("name", ("flamingo-pytorch", "idefics", "idefics2"))
@pytest.mark.filterwarnings("ignore:.*is patched but runs its original forward")
def test_autocast_and_other_dtypes_run_the_original_forward(name):
    module, inputs = build_resampler(name)
    x, *mask = inputs.values()
    # Idefics2 itself does not take a batch of none
    others = (x.bfloat16(), x[:0])[: 1 if name == "idefics2" else 2]

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            yield module(x, *mask)
        for other in others:
            yield module(other, *[m[: len(other)] for m in mask])

    plain = list(results())
    apply_to(module, "resampler", strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results(), plain, strict=True))


def test_idefics2_takes_keywords_and_leaves_dropout_to_torch():
    module, inputs = build_resampler("idefics2-masked")
    x, mask = inputs.values()
    plain = module(context=x, attention_mask=mask)
    apply_to(module, "resampler", strict=True)
    fused = module(context=x, attention_mask=mask.bool())
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    for layer in module.layers:
        layer.self_attn.attention_dropout = 0.5
    module.train()
    torch.manual_seed(3)
    dropped = module(x, mask)
    torch.manual_seed(3)
    assert torch.equal(dropped, module.unpatched_class.forward(module, x, mask))
    module.eval()
    torch.testing.assert_close(module(x, mask), plain, rtol=1e-4, atol=1e-5)


# attention alone


@pytest.mark.parametrize("name", ("flamingo-pytorch", "open-flamingo", "idefics", "idefics-qk-norms"))
def test_a_patched_attention_equals_the_unpatched_one(name):
    module, inputs = build_resampler(name)
    attn = module.layers[0][0] if "flamingo" in name else module.blocks[0][0]
    (x,) = inputs.values()
    x = x.flatten(2, 3) if x.dim() == 5 else x
    inputs = dict(x=x, latents=torch.randn(*x.shape[:-2], LATENTS, x.shape[-1]))
    plain = positional_step(attn, inputs)
    apply_to(attn, "attention", strict=True)
    assert_equal(positional_step(attn, inputs), plain)


@pytest.mark.parametrize("name", ("flamingo-pytorch", "open-flamingo", "idefics"))
def test_attentions_are_patched_if_resamplers_are_not(name):
    module, inputs = build_resampler(name)
    plain = positional_step(module, inputs)
    report = apply_to(module, ("attention", "layer_norm"))
    # attentions with their norms; norms of the feed-forwards, and the last
    assert len(report.replaced) == 2 + 3
    assert_equal(positional_step(module, inputs), plain)


def media_locations():
    """Media tokens: one sample begins with text, one has more media tokens than media."""
    at = torch.zeros(2, 10, dtype=torch.bool)
    at[0, 3] = at[0, 6] = True
    at[1, 0] = at[1, 4] = at[1, 5] = at[1, 8] = True
    return at


@pytest.mark.parametrize("located", (True, False, "cached"))
@pytest.mark.parametrize("immediate", (True, False), ids=("immediate", "all-before"))
@pytest.mark.parametrize("package", ("flamingo_pytorch", "open_flamingo"))
def test_a_patched_cross_attention_equals_the_unpatched_one(package, immediate, located):
    options = {"dim_visual": 40} if package == "open_flamingo" else {}
    if located == "cached" and not options:
        pytest.skip("flamingo-pytorch has no cached media")
    if not located and options:
        pytest.skip("open_flamingo always has media locations")
    module = randomise(
        flamingo_module(package).MaskedCrossAttention(
            dim=D, dim_head=8, heads=4, only_attend_immediate_media=immediate, **options
        ),
        seed=1,
    )
    inputs = dict(
        x=torch.randn(2, 10 if located != "cached" else 3, D),
        media=torch.randn(2, 3, 5, options.get("dim_visual", D)),
        media_locations=media_locations() if located else None,
    )
    if located == "cached":
        inputs["use_cached_media"] = True
    plain = positional_step(module, inputs)
    apply_to(module, "attention", strict=True)
    assert_equal(positional_step(module, inputs), plain)
