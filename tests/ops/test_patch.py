"""Proves what `apply_to` chooses, reports, keeps and refuses; that a refusal leaves the model as it was; and that
patched models can be undone, copied, pickled, cast, compiled and trained.

Run: pytest tests/ops/test_patch.py
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from prismer.kernels.patch import Rule, apply_to, core, is_patched, restore
from tests.ops.patching import assert_same, randomise, step

B, T, D = 2, 7, 32
open_clip = pytest.importorskip("open_clip")


def make_block(act=nn.GELU):
    return open_clip.transformer.ResidualAttentionBlock(D, 4, act_layer=act)


class Tower(nn.Module):
    """Two blocks and a norm, which are supported, and a linear and containers, which are not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.blocks = nn.Sequential(make_block(), make_block(open_clip.transformer.QuickGELU))
        self.norm = nn.LayerNorm(D, eps=0.3)

    def forward(self, x):
        return self.norm(self.blocks(self.stem(x)))


def build_tower():
    return randomise(Tower())


def kinds(model):
    return [type(module) for module in model.modules()]


def test_a_report_lists_what_was_replaced_and_undoes_it():
    model = build_tower()
    before, keys = kinds(model), list(model.state_dict())
    x = torch.randn(B, T, D)
    expected = step(model, dict(x=x))
    report = apply_to(model)
    assert report.replaced == [
        "blocks.0",
        "blocks.0.ln_1",
        "blocks.0.attn",
        "blocks.1",
        "blocks.1.ln_1",
        "blocks.1.attn",
        "norm",
    ]
    text = str(report)
    assert text.startswith("7 of 7 modules run on fused ops\n")
    for line in ("2 x ResidualAttentionBlock", "2 x MultiheadAttention", "3 x LayerNorm"):
        assert line in text
    assert list(model.state_dict()) == keys and isinstance(model.blocks[0], before[3])
    assert all(is_patched(model.get_submodule(name)) for name in report.replaced)
    assert_same(step(model, dict(x=x)), expected)
    report.undo()
    assert kinds(model) == before
    report.undo()
    assert kinds(model) == before
    again = step(model, dict(x=x))
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


@pytest.mark.parametrize(
    ("which", "names"),
    (
        ("layer_norm", ["blocks.0.ln_1", "blocks.0.ln_2", "blocks.1.ln_1", "blocks.1.ln_2", "norm"]),
        ("attention", ["blocks.0.attn", "blocks.1.attn"]),
        (("mlp", "attention"), ["blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn"]),
    ),
)
def test_only_the_parts_asked_for_are_replaced(which, names):
    model, x = build_tower(), torch.randn(B, T, D)
    expected = step(model, dict(x=x))
    assert apply_to(model, which).replaced == names
    assert_same(step(model, dict(x=x)), expected)


def test_a_single_layer_can_be_patched():
    norm = randomise(nn.LayerNorm(D))
    report = apply_to(norm)
    assert report.replaced == [""] and "1 of 1" in str(report)


# what is refused, and what is kept


def assert_refused(model, match, error=ValueError, **options):
    before = kinds(model)
    with pytest.raises(error, match=match):
        apply_to(model, **options)
    assert kinds(model) == before


def test_unknown_parts_and_models_without_supported_modules_are_refused():
    assert_refused(build_tower(), "unknown part 'norms'; choose from layer_norm, mlp", which="norms")
    assert_refused(nn.Sequential(nn.Linear(D, D)), "Sequential holds no supported module .* call the ops directly")
    assert_refused(build_tower(), "holds no supported module for resampler", which="resampler")
    with pytest.raises(TypeError, match="model is a dict; pass the nn.Module itself"):
        apply_to({})


def test_a_patched_model_is_refused():
    model = build_tower()
    report = apply_to(model, "mlp")
    assert_refused(model, r"blocks.0 is patched already; call undo\(\) of its report first, or restore\(model\)")
    assert_refused(nn.ModuleList([nn.LayerNorm(D), model]), "1.blocks.0 is patched already")
    report.undo()
    assert len(apply_to(model).replaced) == 7


class Quantised(nn.Linear):
    """Stands for the linears of quantisers, adapters and wrappers, which compute otherwise."""


def swap(name, new):
    def change(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)

    return change


def hook(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda *a: None)


def backward_hook(name):
    return lambda model: model.get_submodule(name).register_full_backward_hook(lambda *a: None)


def parametrise(name):
    return lambda model: nn.utils.parametrizations.weight_norm(model.get_submodule(name))


def in_float8(name):
    def change(model):
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False).data = parameter.data.to(torch.float8_e4m3fn)

    return change


KEPT = {
    "quantised": (swap("blocks.0.mlp.c_fc", Quantised(D, 4 * D)), "its mlp.c_fc is a Quantised"),
    "adapted": (swap("blocks.0.attn.out_proj", nn.Sequential(nn.Linear(D, D))), "its out_proj is a Sequential"),
    "parametrised": (parametrise("blocks.0.mlp.c_proj"), "its mlp.c_proj is a ParametrizedLinear"),
    "hook": (hook("blocks.0.mlp.c_fc"), "its mlp.c_fc has hooks, which a fused forward would not call"),
    "backward hook": (backward_hook("blocks.0.ln_2"), "its ln_2 has hooks"),
    "hook on the activation": (hook("blocks.0.mlp.gelu"), "its mlp.gelu has hooks"),
    "hook on the container": (hook("blocks.0.mlp"), "its mlp has hooks"),
    "float8": (in_float8("blocks.0.attn.in_proj_weight"), "its .*in_proj_weight is torch.float8_e4m3fn, and the fused"),
    "no norm": (swap("blocks.0.ln_2", nn.Identity()), "its ln_2 is a Identity"),
    "silu": (swap("blocks.0.mlp.gelu", nn.SiLU()), r"its activation SiLU\(\) has no fused op"),
    "relu": (swap("blocks.0.mlp.gelu", nn.ReLU()), r"its activation ReLU\(\) has no fused op"),
    "wide norm": (swap("norm", nn.LayerNorm((T, D))), "it normalises 2 dimensions, and the fused norm only the last"),
    "long norm": (swap("norm", nn.LayerNorm(65537)), "it normalises 65537 numbers, and the fused norm at most 65536"),
    "bias_k": (swap("blocks.0.attn", nn.MultiheadAttention(D, 4, batch_first=True, add_bias_kv=True)), "it has bias_k"),
    "longer mlp": (lambda m: m.blocks[0].mlp.add_module("drop", nn.Dropout()), "its mlp is not c_fc, gelu, c_proj"),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_module_that_does_not_fit_is_kept_with_a_reason(name):
    """The others are replaced; `strict` refuses instead."""
    model = build_tower()
    change, reason = KEPT[name]
    change(model)
    # a module of another dtype keeps all that contain it
    count = "2" if name == "float8" else "1"
    match = f"cannot be replaced: {reason}.*; {count} of .* modules have to be kept; leave strict out"
    assert_refused(model, match, strict=True)
    report = apply_to(model)
    (kept, *_) = [row for row in report.rows if row.reason]
    assert not is_patched(model.get_submodule(kept.name)) and "kept: " in str(report)
    assert len(report.replaced) >= 5
    # these do not run unpatched either
    if name not in ("quantised", "float8", "adapted", "long norm"):
        plain = copy.deepcopy(model)
        restore(plain)
        x = torch.randn(B, T, D)
        model.eval(), plain.eval()
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_hooks_on_modules_that_are_called_keep_working():
    model, seen = build_tower(), []
    for name in ("blocks.0", "blocks.0.attn", "blocks.0.ln_1", "blocks.0.ls_1", "norm"):
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.append(name))
    apply_to(model, strict=True)
    model(torch.randn(B, T, D))
    assert sorted(seen) == ["blocks.0", "blocks.0.attn", "blocks.0.ln_1", "blocks.0.ls_1", "norm"]


class Guarded(nn.LayerNorm):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise TypeError("no")
        super().__setattr__(name, value)


def test_a_failure_halfway_leaves_the_model_as_it_was(monkeypatch):
    rules = (*core.RULES, Rule("layer_norm", f"{__name__}.Guarded", {"forward": lambda self, x: x}))
    monkeypatch.setattr(core, "RULES", rules)
    assert_refused(nn.Sequential(build_tower(), Guarded(D), nn.LayerNorm(D)), "no", error=TypeError)


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_is_not_replaced():
    model = nn.Sequential(Scaled(D), nn.LayerNorm(D))
    assert apply_to(model).replaced == ["1"] and type(model[0]) is Scaled


# what may happen to a patched model


def test_shared_modules_and_weights_stay_shared():
    block, norm = make_block(), nn.LayerNorm(D)
    model = randomise(nn.Sequential(block, norm, block, norm, nn.LayerNorm(D)))
    model[4].weight = norm.weight
    plain, x = copy.deepcopy(model), torch.randn(B, T, D)
    report = apply_to(model)
    assert report.replaced == ["0", "0.ln_1", "0.attn", "1", "4"]
    named = dict(model.named_parameters())
    assert len(named) == len(dict(plain.named_parameters()))
    run = [lambda input, m=m: m(input) for m in (model, plain)]
    assert_same(step(model, dict(input=x), run[0]), step(plain, dict(input=x), run[1]))


def test_a_norm_shared_with_a_fused_block_can_be_called_elsewhere():
    model = build_tower()
    model.norm = model.blocks[0].ln_2
    plain, x = copy.deepcopy(model), torch.randn(B, T, D)
    apply_to(model)
    assert_same(step(model, dict(x=x)), step(plain, dict(x=x)))


@pytest.mark.parametrize("how", ("deepcopy", "pickle", "save"))
def test_copies_and_pickles_are_patched_and_independent(how):
    model, x = build_tower(), torch.randn(B, T, D)
    expected = step(model, dict(x=x))
    apply_to(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [is_patched(m) for m in twin.modules()] == [is_patched(m) for m in model.modules()]
    assert kinds(twin) == kinds(model)
    assert_same(step(twin, dict(x=x)), expected)
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert_same(step(model, dict(x=x)), expected)
    assert restore(twin) == 7 and restore(twin) == 0 and not any(is_patched(m) for m in twin.modules())
    assert is_patched(model.norm)


def test_training_continues_through_patching_and_undoing():
    """The optimizer keeps its parameters, and the state dict its keys."""
    model, plain = build_tower(), build_tower()
    x = torch.randn(B, T, D)
    losses = []
    for m in (model, plain):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        ours = []
        for i in range(6):
            if m is model and i == 2:
                report = apply_to(m)
            if m is model and i == 4:
                report.undo()
            loss = m(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ours.append(loss.item())
        losses.append(ours)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain.load_state_dict(model.state_dict(), strict=True)


def test_a_patched_model_can_be_cast_and_moved():
    model = build_tower()
    apply_to(model)
    model.bfloat16()
    assert model(torch.randn(B, T, D).bfloat16()).dtype == torch.bfloat16
    model.to("meta")
    assert model(torch.empty(B, T, D, dtype=torch.bfloat16, device="meta")).shape == (B, T, D)


@pytest.mark.parametrize("order", ("before", "after"))
def test_a_model_may_be_compiled_before_or_after_patching(order):
    """Patching and undoing compile it again."""
    model, x = build_tower().eval(), torch.randn(B, T, D)
    ops = []

    def record(graph, inputs):
        names = {str(node.target) for node in graph.graph.nodes}

        def run(*arguments):
            ops.append(names)
            return graph(*arguments)

        return run

    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=record)
        if order == "before":
            torch.testing.assert_close(compiled(x), expected)
        report = apply_to(compiled if order == "before" else model)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        assert "prismer.mlp" in ops[-1] and "prismer.linears" in ops[-1]
        report.undo()
        torch.testing.assert_close(compiled(x), expected)
        assert not any("prismer" in name for name in ops[-1])


def test_weights_may_be_frozen_and_thawed_between_steps():
    model, plain = build_tower(), build_tower()
    apply_to(model)
    x = torch.randn(B, T, D)
    for trains in (False, True, False):
        for m in (model, plain):
            m.requires_grad_(trains)
            m.zero_grad(set_to_none=True)
        assert_same(step(model, dict(x=x)), step(plain, dict(x=x)))


def test_functional_call_uses_the_given_parameters():
    model, plain = build_tower(), build_tower()
    apply_to(model)
    other = {name: torch.randn_like(p) * 0.2 for name, p in plain.named_parameters()}
    x = torch.randn(B, T, D)
    got, expected = (torch.func.functional_call(m, other, (x,)) for m in (model, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_zero_gathers_modules_that_read_their_children():
    """DeepSpeed's mark, on the classes whose forward does not call the layers that it reads; others need none."""
    model = build_tower()
    apply_to(model)
    marked = [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]
    assert marked == ["blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn"]


def test_every_rule_names_a_class_and_methods_that_exist():
    missing = []
    for rule in core.RULES:
        package, _, kind = rule.target.rpartition(".")
        if "*" in rule.target:
            continue
        try:
            module = __import__(package, fromlist=[kind])
        # a package that is not installed
        except ModuleNotFoundError:
            continue
        missing += [f"{rule.target}.{name}" for name in rule.methods if not hasattr(getattr(module, kind, None), name)]
    assert not missing
