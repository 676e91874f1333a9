"""Proves that the loss without logits equals transformers' own, for heads of every kind: the loss and all gradients,
ignored labels, num_items_in_batch, shift_labels, tied and biased heads; and that everything else is the model's own.

Run: pytest tests/ops/test_patch_loss.py
"""

import copy
import logging

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to, restore
from prismer.kernels.patch.loss import only_passes_logits_to_loss
from tests.ops.patched import assert_no_worse, assert_same, enlarge, losses, step

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

B, T, V, D = 2, 7, 61, 32
SPECIAL = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
SIZES = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24)
WIDE = dict(**SIZES, intermediate_size=48, **SPECIAL)
BERT = dict(**WIDE, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GPT2 = dict(
    vocab_size=V,
    n_embd=D,
    n_layer=2,
    n_head=4,
    n_positions=24,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=2,
)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", WIDE),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", dict(**WIDE, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(**WIDE, num_key_value_heads=2)),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(**WIDE, num_key_value_heads=2)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", WIDE),
    "phi": ("PhiForCausalLM", "PhiConfig", WIDE),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        dict(**WIDE, num_key_value_heads=2, num_local_experts=3, output_router_logits=True),
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(**SIZES, **SPECIAL, ffn_dim=48, word_embed_proj_dim=D, dropout=0.0)),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", BERT),
    "xlmr": ("XLMRobertaForCausalLM", "XLMRobertaConfig", BERT),
    "bert": ("BertLMHeadModel", "BertConfig", BERT),
    "electra": ("ElectraForCausalLM", "ElectraConfig", dict(**BERT, embedding_size=24)),
}
KEPT = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(**WIDE, num_key_value_heads=2, head_dim=8)),
    "cohere": ("CohereForCausalLM", "CohereConfig", dict(**WIDE, num_key_value_heads=2)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", dict(**WIDE, num_key_value_heads=2, logits_scaling=3.0)),
}


def build(name):
    kind, config, options = {**MODELS, **KEPT}[name]
    torch.manual_seed(0)
    return enlarge(getattr(transformers, kind)(getattr(transformers, config)(**options)))


def pair(name):
    plain = build(name)
    patched = copy.deepcopy(plain)
    report = apply_to(patched, "loss", strict=True)
    assert [row.part for row in report.rows] == ["loss"]
    return plain, patched


def ids():
    return torch.randint(3, V, (B, T))


def labelled():
    """Some labels ignored, the last of a sample among them."""
    words = ids()
    labels = words.clone()
    labels[0, :3] = -100
    labels[1, -1] = -100
    return dict(input_ids=words, labels=labels)


def only_loss(model):
    """The model, of whose outputs the loss is looked at, since the unpatched one has logits too."""
    return lambda **kwargs: {"loss": model(**kwargs).loss}


EXTRA = {
    "mean": {},
    "num_items": dict(num_items_in_batch=5),
    "num_items_tensor": dict(num_items_in_batch=torch.tensor(7)),
    "ignore_index": dict(ignore_index=9),
    "shift_labels": dict(shift_labels=torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_unpatched_loss(name):
    plain, patched = pair(name)
    inputs = labelled()
    for mode in (True, False):
        plain.train(mode), patched.train(mode)
        assert_same(step(patched, inputs, only_loss(patched)), step(plain, inputs, only_loss(plain)))


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("name", ("gpt2", "llama-tied", "roberta"))
def test_rules_of_the_loss(name, extra):
    plain, patched = pair(name)
    inputs = dict(**labelled(), **EXTRA[extra])
    if extra == "ignore_index":
        inputs["labels"][inputs["labels"] == -100] = 9
    assert_same(step(patched, inputs, only_loss(patched)), step(plain, inputs, only_loss(plain)))


@pytest.mark.parametrize("name", ("gpt2", "llama", "roberta"))
def test_frozen_backbone_and_frozen_head(name):
    plain, patched = pair(name)
    inputs = labelled()
    for head in (True, False):
        for model in (plain, patched):
            model.requires_grad_(not head)
            model.get_output_embeddings().requires_grad_(head)
        assert_same(step(patched, inputs, only_loss(patched)), step(plain, inputs, only_loss(plain)))


@pytest.mark.parametrize("name", ("gpt2", "llama-tied", "roberta", "bert"))
def test_low_precision(name):
    plain, patched = pair(name)
    assert_no_worse(plain, patched, labelled(), only_loss)


@pytest.mark.parametrize("name", MODELS)
def test_three_training_steps(name):
    plain, patched = pair(name)
    inputs = labelled()
    assert losses(patched, inputs, call=only_loss) == pytest.approx(losses(plain, inputs, call=only_loss), rel=1e-4)


@pytest.mark.parametrize("name", ("gpt2", "roberta"))
def test_no_logits(name, count_calls):
    plain, patched = pair(name)
    inputs = labelled()
    output = patched(**inputs)
    assert output.logits is None and "logits" not in output
    expected = plain(**inputs)
    assert output.keys() == expected.keys() - {"logits"}
    with count_calls() as calls:
        patched(**inputs)
    assert len(calls["prismer::linear_cross_entropy"]) == 1
    # as a tuple: the loss first, and no logits
    got, expected = (model(**inputs, return_dict=False) for model in (patched, plain))
    assert type(got) is tuple and len(got) == len(expected) - 1
    torch.testing.assert_close(got[0], expected[0])
    # labels by position
    position = dict(gpt2=8, roberta=7)[name]
    arguments = [inputs["input_ids"], *[None] * (position - 1), inputs["labels"]]
    torch.testing.assert_close(patched(*arguments).loss, expected[0])
    assert not hasattr(patched.get_output_embeddings(), "prismer_loss_arguments")


@pytest.mark.parametrize("name", ("gpt2", "roberta", "llama"))
def test_without_labels_the_model_is_its_own(name):
    plain, patched = pair(name)
    words = ids()
    torch.testing.assert_close(patched(words).logits, plain(words).logits, rtol=0, atol=0)
    torch.testing.assert_close(patched(words, logits_to_keep=2).logits, plain(words, logits_to_keep=2).logits)
    patched.eval(), plain.eval()
    kept = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(patched.generate(words, **kept), plain.generate(words, **kept))
    with torch.autocast("cpu", torch.bfloat16):
        output = patched(words, labels=words)
        torch.testing.assert_close(output.loss, plain(words, labels=words).loss, rtol=0, atol=0)
    assert output.logits is not None


def test_a_loss_of_ones_own_stays():
    plain, patched = pair("gpt2")
    for model in (plain, patched):
        model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    inputs = labelled()
    got = patched(**inputs)
    assert got.logits is not None
    torch.testing.assert_close(got.loss, plain(**inputs).loss)
    with pytest.raises(ValueError, match="its loss is not transformers' ForCausalLMLoss"):
        apply_to(plain, "loss", strict=True)


@pytest.mark.parametrize("name", KEPT)
def test_models_that_change_their_logits_are_kept(name):
    plain = build(name)
    patched = copy.deepcopy(plain)
    report = apply_to(patched, "loss")
    assert not report.replaced and "more with the logits" in report.rows[0].reason
    inputs = labelled()
    torch.testing.assert_close(patched(**inputs).loss, plain(**inputs).loss)
    assert type(patched) is type(plain)


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


def test_how_a_forward_is_read():
    assert only_passes_logits_to_loss(Fits, "lm_head") and not only_passes_logits_to_loss(Fits, "head")
    for kind in (NoLoss, Twice, Scales, ScalesInPlace, ShiftsLabels, Looks):
        assert not only_passes_logits_to_loss(kind, "lm_head"), kind


def test_blip_has_a_loss_of_its_own():
    config = transformers.BlipTextConfig(**BERT, encoder_hidden_size=D, projection_dim=D)
    model = transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(config)
    with pytest.raises(ValueError, match="cannot be replaced"):
        apply_to(model, "loss", strict=True)


class Listening(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (lambda m: m.set_output_embeddings(Listening(D, V, bias=False)), "its head is a Listening"),
        (lambda m: m.lm_head.register_forward_hook(lambda *a: None), "its head has hooks"),
        (lambda m: m.lm_head.weight.__setattr__("data", m.lm_head.weight.to(torch.float8_e4m3fn)), "float8"),
    ),
)
def test_heads_that_are_kept(change, reason):
    model = build("llama")
    change(model)
    with pytest.raises(ValueError, match=reason):
        apply_to(model, "loss", strict=True)
    assert type(model) is transformers.LlamaForCausalLM


def test_hooks_on_a_nested_head():
    model = build("roberta")
    model.lm_head.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="its lm_head has hooks, which would see the loss"):
        apply_to(model, "loss", strict=True)


def test_errors_leave_no_trace():
    _, patched = pair("gpt2")
    inputs = labelled()
    with pytest.raises(ValueError, match="do not fit hidden states .* leave logits_to_keep at 0"):
        patched(**inputs, logits_to_keep=2)
    assert patched(inputs["input_ids"]).logits.shape == (B, T, V)
    patched.config.vocab_size = V + 1
    with pytest.raises(ValueError, match="config says a vocabulary of 62, the head has 61 rows"):
        patched(**inputs)


def test_every_label_ignored():
    plain, patched = pair("gpt2")
    inputs = labelled()
    inputs["labels"][:] = -100
    assert plain(**inputs).loss.isnan() and patched(**inputs).loss == 0


def test_resized_and_saved(tmp_path):
    plain, patched = pair("gpt2")
    for model in (plain, patched):
        torch.manual_seed(1)
        model.resize_token_embeddings(V + 3)
    inputs = labelled()
    torch.testing.assert_close(patched(**inputs).loss, plain(**inputs).loss)
    assert patched(**inputs).logits is None
    patched.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.GPT2LMHeadModel
    torch.testing.assert_close(again(**inputs).loss, plain(**inputs).loss)
    assert patched.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ("gpt2", "roberta"))
def test_a_new_head_is_the_users_own(name):
    plain, patched = pair(name)
    head = enlarge(nn.Linear(D, V))
    plain.set_output_embeddings(head), patched.set_output_embeddings(head)
    inputs = labelled()
    got = patched(**inputs)
    assert got.logits is not None
    torch.testing.assert_close(got.loss, plain(**inputs).loss)


@pytest.mark.parametrize("name", ("gpt2", "roberta"))
def test_undo(name):
    plain, patched = pair(name)
    twin = copy.deepcopy(patched)
    inputs = labelled()
    torch.testing.assert_close(twin(**inputs).loss, plain(**inputs).loss)
    assert twin(**inputs).logits is None and restore(twin) == 2
    assert twin(**inputs).logits is not None
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ("llama", "roberta"))
def test_compiles(name):
    plain, patched = pair(name)
    inputs = dict(**labelled(), use_cache=False)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert compiled(**inputs).logits is None
    assert_same(step(patched, inputs, only_loss(compiled)), step(plain, inputs, only_loss(plain)))


# outside training


@pytest.mark.parametrize("name", MODELS)
def test_logits_outside_training(name):
    """What Trainer.evaluate reads: after eval() the output is the original's, as a dictionary and as a tuple."""
    plain, patched = pair(name)
    plain.eval(), patched.eval()
    for extra in EXTRA.values():
        inputs = dict(labelled(), **extra)
        inputs["labels"][inputs["labels"] == -100] = extra.get("ignore_index", -100)
        got, expected = patched(**inputs), plain(**inputs)
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
    inputs = labelled()
    got, expected = (model(**inputs, return_dict=False) for model in (patched, plain))
    assert type(got) is tuple and len(got) == len(expected)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    patched.train()
    assert patched(**inputs).logits is None
    patched.eval()
    assert patched(**inputs).logits is not None


def test_logits_without_gradients():
    """A model that was left in training mode and is evaluated under no_grad trains as little."""
    plain, patched = pair("gpt2")
    with torch.no_grad():
        torch.testing.assert_close(patched(**labelled()).logits.shape, plain(**labelled()).logits.shape)
