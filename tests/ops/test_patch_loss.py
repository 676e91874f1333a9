"""Proves that the loss without logits equals transformers' own, for heads of every kind: the loss and all gradients,
ignored labels, num_items_in_batch, shift_labels, tied and biased heads; and that calls without training have logits.

Run: pytest tests/ops/test_patch_loss.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prismer.kernels.patch import restore
from tests.ops.causal_lms import MODELS, B, D, T, V, build_pair, labelled_inputs, only_loss, random_ids, transformers
from tests.ops.patching import assert_bf16_no_worse, assert_same, randomise, step, train_losses

OPTIONS = {
    "mean": {},
    "num_items": dict(num_items_in_batch=5),
    "num_items_tensor": dict(num_items_in_batch=torch.tensor(7)),
    "ignore_index": dict(ignore_index=9),
    "shift_labels": dict(shift_labels=torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))),
}


# the loss


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_loss_equals_the_models_own(name):
    plain, patched = build_pair(name)
    inputs = labelled_inputs()
    for mode in (True, False):
        plain.train(mode), patched.train(mode)
        assert_same(step(patched, inputs, only_loss(patched)), step(plain, inputs, only_loss(plain)))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ("gpt2", "llama-tied", "roberta"))
def test_the_fused_loss_takes_the_options_of_transformers(name, option):
    plain, patched = build_pair(name)
    inputs = dict(**labelled_inputs(), **OPTIONS[option])
    if option == "ignore_index":
        inputs["labels"][inputs["labels"] == -100] = 9
    assert_same(step(patched, inputs, only_loss(patched)), step(plain, inputs, only_loss(plain)))


@pytest.mark.parametrize("name", ("gpt2", "llama", "roberta"))
def test_a_frozen_backbone_or_head_leaves_the_other_gradients(name):
    plain, patched = build_pair(name)
    inputs = labelled_inputs()
    for head_trains in (True, False):
        for model in (plain, patched):
            model.requires_grad_(not head_trains)
            model.get_output_embeddings().requires_grad_(head_trains)
        assert_same(step(patched, inputs, only_loss(patched)), step(plain, inputs, only_loss(plain)))


def exact_loss(model):
    """The definition, since transformers' own loss rounds logits to fp32."""

    def call(input_ids, labels):
        logits = model(input_ids, use_cache=False).logits[:, :-1]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}

    return call


@pytest.mark.parametrize("name", ("gpt2", "llama-tied", "roberta", "bert"))
def test_the_fused_loss_rounds_no_worse_in_bf16(name, assert_no_worse):
    plain, patched = build_pair(name)
    assert_bf16_no_worse(assert_no_worse, plain, patched, labelled_inputs(), only_loss, exact_loss)


@pytest.mark.parametrize("name", MODELS)
def test_three_training_steps_have_the_same_losses(name):
    plain, patched = build_pair(name)
    inputs = labelled_inputs()
    expected = train_losses(plain, inputs, call=only_loss)
    assert train_losses(patched, inputs, call=only_loss) == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_zero_if_every_label_is_ignored():
    plain, patched = build_pair("gpt2")
    inputs = labelled_inputs()
    inputs["labels"][:] = -100
    assert plain(**inputs).loss.isnan() and patched(**inputs).loss == 0


@pytest.mark.parametrize("name", ("llama", "roberta"))
def test_a_model_with_the_fused_loss_compiles_in_one_graph(name):
    plain, patched = build_pair(name)
    inputs = dict(**labelled_inputs(), use_cache=False)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert compiled(**inputs).logits is None
    assert_same(step(patched, inputs, only_loss(compiled)), step(plain, inputs, only_loss(plain)))


# the output


@pytest.mark.parametrize("name", ("gpt2", "roberta"))
def test_training_outputs_have_no_logits(name, count_calls):
    plain, patched = build_pair(name)
    inputs = labelled_inputs()
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
def test_calls_without_labels_and_autocast_run_the_original_forward(name):
    plain, patched = build_pair(name)
    words = random_ids()
    torch.testing.assert_close(patched(words).logits, plain(words).logits, rtol=0, atol=0)
    torch.testing.assert_close(patched(words, logits_to_keep=2).logits, plain(words, logits_to_keep=2).logits)
    patched.eval(), plain.eval()
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(patched.generate(words, **options), plain.generate(words, **options))
    with torch.autocast("cpu", torch.bfloat16):
        output = patched(words, labels=words)
        torch.testing.assert_close(output.loss, plain(words, labels=words).loss, rtol=0, atol=0)
    assert output.logits is not None


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_outputs_have_logits(name):
    """What Trainer.evaluate reads: after eval() the output is the original's, as a dictionary and as a tuple."""
    plain, patched = build_pair(name)
    plain.eval(), patched.eval()
    for options in OPTIONS.values():
        inputs = dict(labelled_inputs(), **options)
        inputs["labels"][inputs["labels"] == -100] = options.get("ignore_index", -100)
        got, expected = patched(**inputs), plain(**inputs)
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
    inputs = labelled_inputs()
    got, expected = (model(**inputs, return_dict=False) for model in (patched, plain))
    assert type(got) is tuple and len(got) == len(expected)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    patched.train()
    assert patched(**inputs).logits is None
    patched.eval()
    assert patched(**inputs).logits is not None


def test_outputs_under_no_grad_have_logits():
    """Even if the model was left in training mode."""
    plain, patched = build_pair("gpt2")
    with torch.no_grad():
        torch.testing.assert_close(patched(**labelled_inputs()).logits.shape, plain(**labelled_inputs()).logits.shape)


def test_a_loss_function_of_the_user_is_called():
    plain, patched = build_pair("gpt2")
    for model in (plain, patched):
        model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    inputs = labelled_inputs()
    got = patched(**inputs)
    assert got.logits is not None
    torch.testing.assert_close(got.loss, plain(**inputs).loss)


def test_a_refused_call_leaves_no_trace():
    _, patched = build_pair("gpt2")
    inputs = labelled_inputs()
    with pytest.raises(ValueError, match="do not fit hidden states .* leave logits_to_keep at 0"):
        patched(**inputs, logits_to_keep=2)
    assert patched(inputs["input_ids"]).logits.shape == (B, T, V)
    patched.config.vocab_size = V + 1
    with pytest.raises(ValueError, match="config says a vocabulary of 62, the head has 61 rows"):
        patched(**inputs)


# the model


def test_a_patched_model_can_be_resized_and_saved(tmp_path):
    plain, patched = build_pair("gpt2")
    for model in (plain, patched):
        torch.manual_seed(1)
        model.resize_token_embeddings(V + 3)
    inputs = labelled_inputs()
    torch.testing.assert_close(patched(**inputs).loss, plain(**inputs).loss)
    assert patched(**inputs).logits is None
    patched.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.GPT2LMHeadModel
    torch.testing.assert_close(again(**inputs).loss, plain(**inputs).loss)
    assert patched.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ("gpt2", "roberta"))
def test_a_head_set_after_patching_is_not_fused(name):
    plain, patched = build_pair(name)
    head = randomise(nn.Linear(D, V))
    plain.set_output_embeddings(head), patched.set_output_embeddings(head)
    inputs = labelled_inputs()
    with pytest.warns(UserWarning, match="its head was replaced after it was patched"):
        got = patched(**inputs)
    assert got.logits is not None
    torch.testing.assert_close(got.loss, plain(**inputs).loss)


@pytest.mark.parametrize("name", ("gpt2", "roberta"))
def test_a_copy_has_the_fused_loss_until_it_is_restored(name):
    plain, patched = build_pair(name)
    twin = copy.deepcopy(patched)
    inputs = labelled_inputs()
    torch.testing.assert_close(twin(**inputs).loss, plain(**inputs).loss)
    assert twin(**inputs).logits is None and restore(twin) == 2
    assert twin(**inputs).logits is not None
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
