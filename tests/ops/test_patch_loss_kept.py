"""Proves that a causal language model is kept, with a reason, if its logits, head or loss do not fit the fused loss,
and that a head which changes after patching has the loss of the unpatched model.

Run: pytest tests/ops/test_patch_loss_kept.py
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to
from prismer.kernels.patch.loss import only_passes_logits_to_loss
from tests.ops.causal_lms import BERT, CHANGE_LOGITS, D, V, build_causal_lm, build_pair, labelled_inputs, transformers
from tests.ops.layer_changes import change_layer
from tests.ops.patching import fallback_warnings


@pytest.mark.parametrize("name", CHANGE_LOGITS)
def test_models_that_change_their_logits_are_kept(name):
    plain = build_causal_lm(name)
    patched = copy.deepcopy(plain)
    report = apply_to(patched, "loss")
    assert not report.replaced and "more with the logits" in report.rows[0].reason
    inputs = labelled_inputs()
    torch.testing.assert_close(patched(**inputs).loss, plain(**inputs).loss)
    assert type(patched) is type(plain)


def test_models_with_a_loss_of_their_own_are_kept():
    config = transformers.BlipTextConfig(**BERT, encoder_hidden_size=D, projection_dim=D)
    model = transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(config)
    with pytest.raises(ValueError, match="cannot be replaced"):
        apply_to(model, "loss", strict=True)
    model = build_causal_lm("gpt2")
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    with pytest.raises(ValueError, match="its loss is not transformers' ForCausalLMLoss"):
        apply_to(model, "loss", strict=True)


# how the source of a forward is read


class Fits:
    def forward(self, x, labels=None):
        logits = self.lm_head(self.model(x)).contiguous()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=3)
        return dict(loss=loss, logits=logits)


class NoLoss:
    def forward(self, x, labels=None):
        logits = self.lm_head(x)
        return dict(logits=logits)


class Twice(Fits):
    def forward(self, x, labels=None):
        logits = self.lm_head(x)
        logits = self.lm_head(x)
        return dict(loss=self.loss_function(logits, labels), logits=logits)


class Scales(Fits):
    def forward(self, x, labels=None):
        logits = self.lm_head(x) * 0.5
        return dict(loss=self.loss_function(logits, labels), logits=logits)


class ScalesInPlace(Fits):
    def forward(self, x, labels=None):
        logits = self.lm_head(x)
        logits /= 2
        return dict(loss=self.loss_function(logits, labels), logits=logits)


class ShiftsLabels(Fits):
    def forward(self, x, labels=None):
        logits = self.lm_head(x)
        labels = labels[:, 1:]
        return dict(loss=self.loss_function(logits, labels), logits=logits)


class Looks(Fits):
    def forward(self, x, labels=None):
        logits = self.lm_head(x)
        self.seen = logits.shape
        return dict(loss=self.loss_function(logits, labels), logits=logits)


def test_a_forward_fits_if_its_logits_go_to_the_loss_alone():
    assert only_passes_logits_to_loss(Fits, "lm_head") and not only_passes_logits_to_loss(Fits, "head")
    for kind in (NoLoss, Twice, Scales, ScalesInPlace, ShiftsLabels, Looks):
        assert not only_passes_logits_to_loss(kind, "lm_head"), kind


# heads


class Listening(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (lambda m: m.set_output_embeddings(Listening(D, V, bias=False)), "its head is a Listening"),
        (lambda m: m.lm_head.register_forward_hook(lambda *a: None), "its head has hooks"),
        (lambda m: m.lm_head.weight.__setattr__("data", m.lm_head.weight.to(torch.float8_e4m3fn)), "float8"),
    ),
    ids=("another-class", "hook", "float8"),
)
def test_a_model_is_kept_for_its_head(change, reason):
    model = build_causal_lm("llama")
    change(model)
    with pytest.raises(ValueError, match=reason):
        apply_to(model, "loss", strict=True)
    assert type(model) is transformers.LlamaForCausalLM


def test_a_model_is_kept_for_hooks_around_its_head():
    model = build_causal_lm("roberta")
    model.lm_head.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="its lm_head has hooks, which would see the loss"):
        apply_to(model, "loss", strict=True)


HEADS = {"llama": "lm_head", "gpt2": "lm_head", "roberta": "lm_head.decoder"}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("how", ("adapted", "quantised", "parametrised", "overridden", "hook", "offloaded"))
@pytest.mark.parametrize("when", ("before", "after"))
def test_a_changed_head_gives_the_loss_of_the_unpatched_model(name, how, when):
    plain = build_causal_lm(name).requires_grad_(how != "offloaded")
    patched = copy.deepcopy(plain)
    if when == "after":
        apply_to(patched, "loss")
    for model in (plain, patched):
        change_layer(model, HEADS[name], how)
    if when == "before":
        assert not apply_to(patched, "loss").replaced
    inputs = labelled_inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, again = patched(**inputs), patched(**inputs)
    expected = plain(**inputs)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(again.loss, expected.loss)
    assert len(fallback_warnings(caught)) == (when == "after")


def test_hooks_around_a_head_after_patching_see_logits():
    plain, patched = build_pair("roberta")
    for model in (plain, patched):
        model.lm_head.register_forward_hook(lambda m, a, y: 2 * y)
    inputs = labelled_inputs()
    with pytest.warns(UserWarning, match="its lm_head has hooks, which would see the loss"):
        got = patched(**inputs)
    torch.testing.assert_close(got.loss, plain(**inputs).loss)


def test_hooks_that_gather_weights_keep_the_fused_loss():
    """DeepSpeed registers them on every module after patching; they leave inputs and outputs as they are."""
    _, model = build_pair("llama")

    def gather(module, args):
        return None

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model.lm_head.register_forward_pre_hook(gather)
    assert model(**labelled_inputs()).logits is None
