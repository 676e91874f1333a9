"""Proves that calls which the fused ops do not serve have the results of the unpatched model: active dropout, attention
weights, a key-value cache, autocast, and arguments that the original ignores.

Run: pytest tests/ops/test_patch_fallbacks.py
"""

import copy

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to
from tests.ops.patching import assert_same, randomise, step
from tests.ops.tower_families import (
    BERT,
    FAMILIES,
    SPECIAL,
    B,
    D,
    T,
    blip,
    build_pair,
    context,
    context_mask,
    random_ids,
    transformers,
    transformers_model,
    two_towers,
)


@pytest.mark.parametrize("name", ("roberta-decoder-padded", "bert-padded", "blip", "clip", "vit", "qformer-padded"))
def test_dropout_drops_the_same_elements_for_the_same_seed(name):
    """Active attention dropout is left to torch."""
    build, inputs, _ = FAMILIES[name]
    plain = randomise(build())
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.3)
    patched = copy.deepcopy(plain)
    apply_to(patched, ("layer_norm", "mlp", "attention"))
    inputs = inputs()

    def run(model):
        def forward(**kwargs):
            torch.manual_seed(3)
            return model(**kwargs)

        return forward

    patched.train(), plain.train()
    trained = step(plain, inputs, run(plain))
    assert_same(step(patched, inputs, run(patched)), trained)
    patched.eval(), plain.eval()
    evaluated = step(plain, inputs, run(plain))
    assert_same(step(patched, inputs, run(patched)), evaluated)
    name = next(iter(trained))
    assert not torch.allclose(evaluated[name], trained[name])


@pytest.mark.parametrize("name", ("clip", "vit", "roberta-decoder-padded", "blip", "qformer", "blip2-vision"))
def test_attention_weights_are_returned_if_the_caller_asks_for_them(name):
    plain, patched, inputs = build_pair(name)
    for model in (plain, patched):
        # BLIP has no other implementation
        if name != "blip":
            model.set_attn_implementation("eager")
        model.eval()
    outputs = [model(**inputs, output_attentions=True) for model in (patched, plain)]
    if name == "clip":
        outputs = [out.vision_model_output for out in outputs]
    for key in [k for k in outputs[1] if "attentions" in k]:
        got, expected = outputs[0][key], outputs[1][key]
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_same(step(patched, inputs), step(plain, inputs))


def test_a_blip_attention_with_hooks_is_kept():
    """It always returns its weights, which a hook may read."""
    model = blip()
    text = model.text_decoder.bert.encoder.layer[1]
    for layer in (model.vision_model.encoder.layers[0].self_attn, text.attention.self):
        layer.register_forward_hook(lambda *a: None)
    report = apply_to(model, "attention")
    kept = [row for row in report.rows if row.reason]
    assert len(kept) == 2 and all("may read the attention weights" in row.reason for row in kept)
    assert len(report.replaced) == len(report.rows) - 2 == 4


def test_siglip_ignores_is_causal():
    """The argument of the caller has no effect on the original's forward."""
    plain = randomise(two_towers("Siglip", "gelu")().text_model.encoder.layers[0].self_attn)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = dict(hidden_states=torch.randn(B, T, D), is_causal=True)
    assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize("cached", (True, False))
def test_generation_gives_the_same_tokens_and_scores(cached):
    build = transformers_model(
        "RobertaForCausalLM", "RobertaConfig", **BERT, **SPECIAL, is_decoder=True, add_cross_attention=True
    )
    plain = randomise(build()).eval()
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = context(encoder_attention_mask=context_mask())

    def run(model):
        cache = {}
        if cached:
            empty = [transformers.DynamicCache(config=model.config) for _ in range(2)]
            cache["past_key_values"] = transformers.EncoderDecoderCache(*empty)
        torch.manual_seed(0)
        return model.generate(
            random_ids(),
            **inputs,
            **cache,
            use_cache=cached,
            max_new_tokens=6,
            output_scores=True,
            do_sample=False,
            return_dict_in_generate=True,
        )

    got, expected = run(patched), run(plain)
    assert torch.equal(got.sequences, expected.sequences)
    if cached:
        assert got.past_key_values.is_updated == expected.past_key_values.is_updated == {0: True, 1: True}
    for a, b in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("clip", "open_clip-gelu", "qformer"))
def test_autocast_runs_the_original_forward(name, count_calls):
    plain, patched, inputs = build_pair(name)

    def run(model):
        def forward(**kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return model(**kwargs)

        return forward

    with count_calls() as calls:
        got = step(patched, inputs, run(patched))
    assert not any(key.startswith("prismer::") for key in calls)
    assert_same(got, step(plain, inputs, run(plain)))
