"""Proves that a patched module which is itself changed, copied, compiled or transformed computes what the unpatched one
does: changes of its own weights, a forward on the instance, torch.func and torch.jit.

Run: pytest tests/ops/test_patch_changed_modules.py
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn.utils import parametrize, prune

from prismer.kernels.patch import apply_to, is_patched
from tests.ops.changeable_layers import build_with_layer, full_name
from tests.ops.layer_changes import Int8, Shifted, change_layer
from tests.ops.patching import assert_same, fallback_warnings, step


@pytest.mark.parametrize("layer", ("open_clip mlp", "clip mlp", "idefics"))
def test_a_module_with_a_forward_on_the_instance_is_kept(layer):
    """It hides the forward of the class, so that the fused one would never run."""
    model, inputs, holder, _ = build_with_layer(layer)
    module = model.get_submodule(holder)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    expected = step(model, inputs)
    report = apply_to(model)
    (row,) = [row for row in report.rows if row.name == holder]
    assert "a forward on the instance" in row.reason
    assert_same(step(model, inputs), expected)


NORM, PACKED = ("ln_final", "weight"), ("transformer.resblocks.0.attn", "in_proj_weight")


@pytest.mark.parametrize(
    ("name", "weight", "how"),
    ((*NORM, "parametrised"), (*NORM, "pruned"), (*NORM, "quantised"), (*PACKED, "parametrised"), (*PACKED, "pruned")),
)
def test_its_own_weights_may_be_changed(name, weight, how):
    plain, inputs, *_ = build_with_layer("open_clip mlp")
    patched = copy.deepcopy(plain)
    report = apply_to(patched)
    for model in (plain, patched):
        torch.manual_seed(3)
        module = model.get_submodule(name)
        if how == "parametrised":
            parametrize.register_parametrization(module, weight, Shifted())
        elif how == "pruned":
            prune.random_unstructured(module, weight, 0.5)
        else:
            module._parameters[weight] = Int8(getattr(module, weight).detach())
    expected = step(plain, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(step(patched, inputs), expected)
    assert len(fallback_warnings(caught)) == (how == "quantised")
    report.undo()
    assert not any(is_patched(module) for module in patched.modules())
    assert_same(step(patched, inputs), step(plain, inputs))
    if how == "parametrised":
        module = patched.get_submodule(name)
        parametrize.remove_parametrizations(module, weight)
        assert type(module) is type(plain.get_submodule(name)).__bases__[0]


@pytest.mark.parametrize("how", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
def test_a_copy_of_a_changed_module_runs_the_original_forward(how):
    plain, inputs, holder, name = build_with_layer("clip mlp")
    patched = copy.deepcopy(plain)
    apply_to(patched)
    for model in (plain, patched):
        change_layer(model, full_name(holder, name), "adapted")
    with pytest.warns(UserWarning, match="its fc2 is a Lora"):
        got = step(how(patched), inputs)
    assert_same(got, step(plain, inputs))


@pytest.mark.parametrize("how", ("hook", "adapted", "quantised"))
def test_a_change_after_compiling_compiles_again(how):
    plain, _, holder, name = build_with_layer("clip mlp")
    torch._dynamo.reset()
    plain, x = plain.get_submodule(holder).eval(), torch.randn(2, 32)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    with torch.no_grad():
        run = torch.compile(patched, backend="eager")
        torch.testing.assert_close(run(x), plain(x), rtol=1e-5, atol=1e-5)
        for model in (plain, patched):
            change_layer(model, name, how)
        torch.testing.assert_close(run(x), plain(x), rtol=1e-5, atol=1e-5)


TRANSFORMS = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "grad of weights": lambda model, x: torch.func.grad(
        lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum()
    )(dict(model.named_parameters())),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False)(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor to a Python boolean")
@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("layer", ("clip mlp", "bert mlp"))
def test_transforms_see_torchs_own_operators(layer, how):
    plain, _, holder, _ = build_with_layer(layer)
    plain = plain.get_submodule(holder).eval()
    patched = copy.deepcopy(plain)
    apply_to(patched)
    x = torch.randn(2, 3, 32)
    # torch's flash attention has no forward-mode derivative
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(TRANSFORMS[how](patched, x), TRANSFORMS[how](plain, x))
