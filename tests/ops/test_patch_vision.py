"""Proves that the vision towers of Qwen-VL, DINOv3, InternViT, SAM and Idefics, and projectors, compute the same when
patched: outputs and every gradient, rounding in bf16, training steps, saved bytes, undoing, and modules that are kept.

Run: pytest tests/ops/test_patch_vision.py
"""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to, is_patched, qwen_vl, vision
from tests.ops.patching import (
    assert_bf16_no_worse,
    assert_same,
    fallback_warnings,
    floating_tensors,
    saved_bytes,
    step,
    train_losses,
)
from tests.ops.vision_families import COPIES, FAMILIES, GRID, build_pair


@pytest.mark.parametrize("name", FAMILIES | COPIES)
def test_a_patched_model_equals_the_unpatched_one(name, recwarn):
    plain, patched, inputs = build_pair(name)
    for mode in (True, False):
        plain.train(mode), patched.train(mode)
        assert_same(step(patched, inputs), step(plain, inputs))
    assert not fallback_warnings(recwarn.list)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patched_model_rounds_no_worse_in_bf16(name, assert_no_worse):
    plain, patched, inputs = build_pair(name)
    assert_bf16_no_worse(assert_no_worse, plain, patched, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_three_training_steps_have_the_same_losses(name):
    plain, patched, inputs = build_pair(name)
    assert train_losses(patched, inputs) == pytest.approx(train_losses(plain, inputs), rel=1e-4)


# where more than three quarters are kept: layer scale keeps the outputs of attention and MLP, and without rotary
# positions, gates and QuickGELU the hidden activation alone is saved
MOST = {"dinov3": 0.8, "internvl": 0.85, "sam-absolute": 0.8, "idefics3-vision": 0.8}


@pytest.mark.parametrize("name", [name for name in FAMILIES if "llava" not in name and "projector" not in name])
def test_a_patched_model_saves_fewer_bytes(name):
    plain, patched, inputs = build_pair(name)

    def run(model):
        return next(y for y in floating_tensors(model(**inputs)).values() if y.requires_grad)

    before, after = (saved_bytes(model, functools.partial(run, model)) for model in (plain, patched))
    print(f"\n{name}: {before} bytes unpatched, {after} patched, {after / before:.0%}")
    assert after <= MOST.get(name, 0.75) * before


@pytest.mark.parametrize("name", FAMILIES | COPIES)
def test_undo_restores_every_byte(name):
    plain, _, _ = build_pair(name)
    before = pickle.dumps(plain)
    apply_to(plain).undo()
    assert pickle.dumps(plain) == before and not any(map(is_patched, plain.modules()))


# attention


@pytest.mark.parametrize("lengths", ([4, 4, 4], [4, 4, 6, 4], [7], [3, 0, 3, 2]), ids=str)
def test_segments_of_one_length_are_one_call(lengths, monkeypatch):
    calls = []

    def counted(q, k, v, **options):
        calls.append(tuple(q.shape))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(qwen_vl, "attention", counted)
    qkv = torch.randn(sum(lengths), 3, 2, 8)
    got = qwen_vl._attend_segments(qkv, lengths, 0.5)
    runs = {"[4, 4, 4]": 1, "[4, 4, 6, 4]": 3, "[7]": 1, "[3, 0, 3, 2]": 2}[str(lengths)]
    assert len(calls) == runs
    parts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths)]
    expected = [torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5) for q, k, v in parts]
    torch.testing.assert_close(got, torch.cat([y.transpose(0, 1).flatten(1) for y in expected]))


def test_images_of_a_batch_do_not_see_each_other():
    _, patched, inputs = build_pair("qwen2.5-vl")
    alone = patched(inputs["hidden_states"][:24], GRID[:1]).last_hidden_state
    torch.testing.assert_close(patched(**inputs).last_hidden_state[:24], alone, rtol=1e-4, atol=1e-5)


def test_sam_makes_no_tensor_of_scores_for_a_large_grid(monkeypatch):
    """With as many keys as in SAM, the biases are in queries and keys; in windows they are a mask."""
    sizes = []
    plain_attention = vision.attention

    def seen(q, k, v, **options):
        sizes.append(q.shape[2:])
        return plain_attention(q, k, v, **options)

    monkeypatch.setattr(vision, "attention", seen)
    _, patched, inputs = build_pair("sam")
    patched(**inputs)
    # 8 numbers of the head, 20 rows and 20 columns
    assert sizes == [(400, 48)]


@pytest.mark.parametrize("name", ("qwen2-vl", "dinov3", "internvl"))
def test_another_attention_implementation_runs_the_original(name, monkeypatch):
    plain, patched, inputs = build_pair(name)
    for model in (plain, patched):
        model.set_attn_implementation("eager")
    for module in (qwen_vl, vision):
        monkeypatch.setattr(module, "apply_linears", None)
    assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize("name", ("qwen2.5-vl", "dinov3-gated", "sam"))
def test_gradient_checkpointing_changes_nothing(name):
    plain, patched, inputs = build_pair(name)
    expected = step(plain.train(), inputs)
    patched.gradient_checkpointing_enable()
    assert_same(step(patched.train(), inputs), expected)


# adapted and quantised models

WRAPPED = {"qwen2.5-vl": ("qkv", "up_proj"), "dinov3": ("q_proj", "up_proj"), "sam": ("qkv", "lin1")}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_lora_model_keeps_adapted_layers_and_says_so(name):
    peft = pytest.importorskip("peft")
    plain, _, inputs = build_pair(name)
    config = peft.LoraConfig(r=2, target_modules=list(WRAPPED[name]), init_lora_weights=False)
    torch.manual_seed(1)
    plain = peft.get_peft_model(plain, config)
    patched = copy.deepcopy(plain)
    report = apply_to(patched)
    kept = {row.part: row.reason for row in report.rows if row.reason is not None}
    assert "attention" in kept and "mlp" in kept and "layer_norm" not in kept
    assert all("is a Linear (quantised, adapted or wrapped)" in reason for reason in kept.values()), kept
    assert_same(step(patched.base_model.model, inputs), step(plain.base_model.model, inputs))
    merged = patched.merge_and_unload()
    assert len(apply_to(copy.deepcopy(plain).merge_and_unload()).replaced) > len(report.replaced)
    assert_same(step(merged, inputs), step(plain.merge_and_unload(), inputs))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_quantised_model_keeps_its_linears_and_says_so(name):
    plain, _, inputs = build_pair(name)
    quantised = torch.ao.quantization.quantize_dynamic(plain.eval(), {nn.Linear})
    patched = copy.deepcopy(quantised)
    report = apply_to(patched)
    parts = {row.part for row in report.rows if row.reason is not None}
    assert parts == {"attention", "mlp"} and "quantised" in str(report)
    with torch.no_grad():
        for got, expected in zip(*(floating_tensors(m(**inputs)).values() for m in (patched, quantised)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
