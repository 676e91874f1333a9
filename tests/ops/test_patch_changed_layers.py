"""Proves that a patched module whose layers are changed computes what the unpatched one does with the same change:
quantised, pruned, normalised, parametrised, hooked, wrapped, adapted, offloaded, of another class. It warns once, and
returns to the fused op when the change is undone. A module that was changed before patching is kept.

Run: pytest tests/ops/test_patch_changed_layers.py
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to
from tests.ops.changeable_layers import LAYERS, NORMS, build_with_layer, full_name
from tests.ops.layer_changes import CHANGES, Lora, change_layer
from tests.ops.patching import assert_same, fallback_warnings, step

SOME_CHANGES = ("adapted", "quantised", "parametrised", "overridden")
CHANGES_OF_NORMS = ("rms norm", "hook", "overridden", "parametrised")
CASES = [("clip mlp", change) for change in CHANGES if change != "rms norm"]
CASES += [(layer, change) for layer in LAYERS if layer != "clip mlp" for change in SOME_CHANGES]
CASES += [(layer, change) for layer in NORMS for change in CHANGES_OF_NORMS]


def warned_step(model, inputs):
    """A step, and its warnings that a module runs its original forward."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = step(model, inputs)
    return results, fallback_warnings(caught)


@pytest.mark.parametrize(("layer", "how"), CASES)
def test_a_layer_changed_after_patching_is_called_with_one_warning(layer, how):
    plain, inputs, holder, name = build_with_layer(layer)
    patched = copy.deepcopy(plain)
    report = apply_to(patched)
    assert holder in report.replaced
    step(patched, inputs)
    for model in (plain, patched):
        change_layer(model, full_name(holder, name), how)
    got, (message,) = warned_step(patched, inputs)
    assert_same(got, step(plain, inputs))
    assert f"its {name}" in message and message.startswith(type(plain.get_submodule(holder)).__name__)
    got, messages = warned_step(patched, inputs)
    assert_same(got, step(plain, inputs))
    assert not messages
    report.undo()
    assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize(("layer", "how"), CASES)
def test_a_layer_changed_before_patching_keeps_its_module(layer, how):
    """The reason names the layer, and the numbers are those of the model as it was."""
    plain, inputs, holder, name = build_with_layer(layer)
    patched = copy.deepcopy(plain)
    for model in (plain, patched):
        change_layer(model, full_name(holder, name), how)
    report = apply_to(patched)
    (row,) = [row for row in report.rows if row.name == holder]
    assert row.reason is not None and f"its {name}" in row.reason
    got, messages = warned_step(patched, inputs)
    assert not messages
    assert_same(got, step(plain, inputs))


@pytest.mark.parametrize("layer", ("clip mlp", "open_clip mlp", "bert mlp", "idefics"))
def test_a_change_that_is_undone_brings_the_fused_op_back(layer, count_calls):
    """A hook is removed, and an adapter taken off."""
    model, inputs, holder, name = build_with_layer(layer)
    apply_to(model)
    parent, _, child = full_name(holder, name).rpartition(".")
    parent = model.get_submodule(parent)
    hook = getattr(parent, child).register_forward_hook(lambda *a: None)
    counts = []
    for when in ("hook", "adapter", "neither"):
        with warnings.catch_warnings(), count_calls() as calls:
            warnings.simplefilter("ignore")
            model(**inputs)
        counts.append(sum(len(found) for key, found in calls.items() if key.startswith("prismer::")))
        if when == "hook":
            hook.remove()
            setattr(parent, child, Lora(getattr(parent, child)))
        elif when == "adapter":
            setattr(parent, child, getattr(parent, child).base_layer)
    assert counts[0] == counts[1] < counts[2]


def test_a_change_that_comes_and_goes_is_warned_about_once():
    model, inputs, holder, name = build_with_layer("clip mlp")
    apply_to(model)
    messages = []
    for _ in range(3):
        hook = model.get_submodule(full_name(holder, name)).register_forward_hook(lambda *a: None)
        messages += warned_step(model, inputs)[1]
        hook.remove()
        messages += warned_step(model, inputs)[1]
    assert len(messages) == 1


ACTIVATIONS = {"open_clip mlp": "mlp.gelu", "clip mlp": "activation_fn", "bert mlp": "intermediate.intermediate_act_fn"}


@pytest.mark.parametrize("layer", ACTIVATIONS)
@pytest.mark.parametrize("how", ("swapped", "hook"))
def test_a_changed_activation_is_called(layer, how):
    plain, inputs, holder, _ = build_with_layer(layer)
    parent, _, name = f"{holder}.{ACTIVATIONS[layer]}".rpartition(".")
    setattr(plain.get_submodule(parent), name, nn.GELU())
    patched = copy.deepcopy(plain)
    assert holder in apply_to(patched).replaced
    for model in (plain, patched):
        activation = getattr(model.get_submodule(parent), name)
        if how == "swapped":
            setattr(model.get_submodule(parent), name, nn.SiLU())
        else:
            activation.register_forward_hook(lambda m, a, y: 2 * y)
    with pytest.warns(UserWarning, match="is patched but runs its original forward"):
        got = step(patched, inputs)
    assert_same(got, step(plain, inputs))


@pytest.mark.parametrize("layer", ACTIVATIONS)
def test_a_gelu_that_becomes_its_approximation_is_followed(layer, recwarn):
    plain, inputs, holder, _ = build_with_layer(layer)
    parent, _, name = f"{holder}.{ACTIVATIONS[layer]}".rpartition(".")
    setattr(plain.get_submodule(parent), name, nn.GELU())
    patched = copy.deepcopy(plain)
    apply_to(patched)
    before = step(patched, inputs)
    for model in (plain, patched):
        getattr(model.get_submodule(parent), name).approximate = "tanh"
    got = step(patched, inputs)
    assert_same(got, step(plain, inputs))
    assert any(not torch.equal(got[key], before[key]) for key in before)
    assert not fallback_warnings(recwarn.list)


class QuickGELU(nn.Module):
    """The name of a supported activation, and another function."""

    def forward(self, x):
        return x.tanh()


def test_an_activation_is_known_by_its_full_name():
    plain, inputs, holder, _ = build_with_layer("clip mlp")
    plain.get_submodule(holder).activation_fn = QuickGELU()
    patched = copy.deepcopy(plain)
    assert holder not in apply_to(patched).replaced
    assert_same(step(patched, inputs), step(plain, inputs))


class OtherOutput(nn.Module):
    """In place of BertOutput, with the same layers in another order."""

    def __init__(self, output):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = output.dense, output.LayerNorm, output.dropout

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states)) + input_tensor


@pytest.mark.parametrize("when", ("before", "after"))
def test_a_container_of_another_class_is_called(when):
    plain, inputs, holder, _ = build_with_layer("bert mlp")
    patched = copy.deepcopy(plain)
    if when == "after":
        apply_to(patched)
    for model in (plain, patched):
        layer = model.get_submodule(holder)
        layer.output = OtherOutput(layer.output)
    if when == "before":
        assert holder not in apply_to(patched).replaced
        got = step(patched, inputs)
    else:
        with pytest.warns(UserWarning, match="its output is a OtherOutput"):
            got = step(patched, inputs)
    assert_same(got, step(plain, inputs))


@pytest.mark.parametrize("layer", ("blip attention", "blip text attention"))
def test_a_dropout_that_trains_in_an_evaluated_model_drops(layer):
    """Monte-Carlo dropout."""
    plain, inputs, holder, _ = build_with_layer(layer)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    outputs = []
    for model in (plain, patched):
        model.eval()
        dropout = model.get_submodule(holder).dropout.train()
        dropout.p = 0.5
        torch.manual_seed(5)
        outputs.append(step(model, inputs))
    assert_same(*outputs)


def test_global_module_hooks_are_called():
    plain, inputs, *_ = build_with_layer("open_clip mlp")
    patched = copy.deepcopy(plain)
    apply_to(patched)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, a, y: 2 * y if isinstance(m, nn.Linear) else None
    )
    try:
        with pytest.warns(UserWarning, match="global module hooks are registered"):
            got = step(patched, inputs)
        assert_same(got, step(plain, inputs))
    finally:
        hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(patched, inputs)


def test_a_layer_of_another_dtype_raises_torchs_own_error():
    plain, inputs, holder, name = build_with_layer("clip mlp")
    patched = copy.deepcopy(plain)
    apply_to(patched)
    for model in (plain, patched):
        model.get_submodule(f"{holder}.{name}").bfloat16()
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="dtype"):
            warnings.simplefilter("ignore")
            model(**inputs)


@pytest.mark.parametrize("layer", ("idefics", "flamingo"))
def test_norms_of_another_dtype_run_the_original_resampler(layer):
    """A fused resampler takes one dtype; torch raises its own error."""
    model, inputs, *_ = build_with_layer(layer)
    apply_to(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.double()
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="is torch.float64, and the input torch.float32"):
        model(**inputs)
