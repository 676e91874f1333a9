"""Proves that towers of torch, open_clip and transformers compute the same when patched: outputs and the gradient of
every parameter and input, in training and evaluation, with masks, in bf16, over training steps, checkpointed, compiled.

Run: pytest tests/ops/test_patch_towers.py
"""

import copy

import pytest
import torch

from prismer.kernels.patch import apply_to
from tests.ops.patching import assert_bf16_no_worse, assert_same, randomise, step, train_losses
from tests.ops.tower_families import (
    BERT,
    FAMILIES,
    VISION,
    B,
    D,
    T,
    build_pair,
    context,
    open_clip,
    open_clip_inputs,
    open_clip_model,
    padding,
    transformers,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patched_model_equals_the_unpatched_one(name):
    plain, patched, inputs = build_pair(name)
    for mode in (True, False):
        plain.train(mode), patched.train(mode)
        assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patched_model_rounds_no_worse_in_bf16(name, assert_no_worse):
    plain, patched, inputs = build_pair(name)
    if name == "open_clip-fp32_norms":
        pytest.skip("open_clip casts its weights by itself there")
    assert_bf16_no_worse(assert_no_worse, plain, patched, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_three_training_steps_have_the_same_losses(name):
    plain, patched, inputs = build_pair(name)
    assert train_losses(patched, inputs) == pytest.approx(train_losses(plain, inputs), rel=1e-4)


def test_open_clip_keeps_fp32_norms_between_bf16_linears():
    """As open_clip's own precision="bf16" has them."""
    plain = randomise(open_clip_model(cast_dtype=torch.bfloat16))
    open_clip.model.convert_weights_to_lp(plain, torch.bfloat16)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = open_clip_inputs()
    inputs["image"] = inputs["image"].bfloat16()
    assert {p.dtype for p in plain.parameters()} == {torch.float32, torch.bfloat16}
    got, expected = step(patched, inputs), step(plain, inputs)
    for name in ("output.0", "output.1", "dvisual.ln_post.weight", "dvisual.transformer.resblocks.0.ln_2.weight"):
        assert got[name].dtype == expected[name].dtype
        size = expected[name].abs().max().item()
        torch.testing.assert_close(got[name].float(), expected[name].float(), rtol=0.1, atol=0.1 * size)


def test_hidden_states_are_recorded_as_before():
    plain, patched, inputs = build_pair("clip")
    got, expected = (model(**inputs, output_hidden_states=True).vision_model_output for model in (patched, plain))
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("clip", "open_clip-gelu", "roberta-decoder-padded"))
def test_gradient_checkpointing_changes_nothing(name):
    plain, patched, inputs = build_pair(name)
    expected = step(plain, inputs)
    if name == "open_clip-gelu":
        patched.set_grad_checkpointing()
    else:
        patched.gradient_checkpointing_enable()
    assert_same(step(patched.train(), inputs), expected)


def build_layer(name):
    """A layer, and inputs for it."""
    x = torch.randn(B, T, D)
    causal = torch.full((T, T), float("-inf")).triu(1)
    padded = (padding() == 1)[:, None, None, :].expand(-1, 1, T, -1)
    if name.startswith("open_clip"):
        block = open_clip.transformer.ResidualAttentionBlock(D, 4, act_layer=open_clip.transformer.QuickGELU)
        return block, dict(q_x=x, **({"attn_mask": causal} if name == "open_clip-causal" else {}))
    models, options = transformers.models, dict(attn_implementation="sdpa")
    if name == "blip":
        layer = models.blip.modeling_blip.BlipEncoderLayer(transformers.BlipVisionConfig(**VISION))
        return layer, dict(hidden_states=x)
    if name.startswith("clip"):
        layer = models.clip.modeling_clip.CLIPEncoderLayer(transformers.CLIPVisionConfig(**VISION, **options))
        masks = {"clip-padded": padded, "clip-dense": padded & (causal == 0)}
        return layer, dict(hidden_states=x, attention_mask=masks.get(name))
    config = transformers.RobertaConfig(**BERT, **options, is_decoder=True, add_cross_attention=True)
    layer = models.roberta.modeling_roberta.RobertaLayer(config)
    return layer, dict(hidden_states=x, **context())


LAYERS = ("open_clip", "open_clip-causal", "clip", "clip-padded", "clip-dense", "blip", "roberta")


@pytest.mark.parametrize("name", LAYERS)
def test_a_patched_layer_compiles_in_one_graph(name):
    layer, inputs = build_layer(name)
    plain = randomise(layer)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert_same(step(patched, inputs, compiled), step(plain, inputs))
    assert_same(step(patched, inputs), step(plain, inputs))
