"""Proves that a patched module whose layers are changed computes what the unpatched one does with the same change:
quantised, pruned, normalised, parametrised, hooked, wrapped, adapted, offloaded, of another class; that it says so once
and goes back to the fused op when the change is taken back; and that what is changed before is kept.

Run: pytest tests/ops/test_patch_changes.py
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from prismer.kernels.patch import apply_to, is_patched
from tests.ops.patched import assert_same, enlarge, step
from tests.ops.test_patch_loss import build as causal_lm
from tests.ops.test_patch_loss import labelled
from tests.ops.test_patch_resamplers import CASES, large_parameters
from tests.ops.test_patch_towers import FAMILIES

# what may happen to a layer


class Lora(nn.Module):
    """As peft's: the layer is inside, and its weight is offered too."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Int8(torch.Tensor):
    """As torchao's: a weight of a class of its own, whose numbers only its own operators know."""

    @staticmethod
    def __new__(cls, weight):
        self = torch.Tensor._make_subclass(cls, torch.zeros_like(weight))
        self.scale = weight.abs().amax() / 127
        self.steps = (weight / self.scale).round().to(torch.int8)
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.steps * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 0.5


def quantised(layer):
    layer._parameters["weight"] = Int8(layer.weight.detach())


def quantised_dynamically(layer):
    engines = torch.backends.quantized.supported_engines
    if not {"fbgemm", "x86", "onednn"} & set(engines):
        pytest.skip("no engine for dynamic quantisation")
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return torch.ao.nn.quantized.dynamic.Linear.from_float(layer)


def on_the_instance(layer):
    """As accelerate's hooks: a forward on the instance, over weights that are elsewhere."""
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for name, p in list(layer.named_parameters()):
        layer._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    layer.forward = lambda x: F.linear(x, weights["weight"], weights.get("bias"))


def overridden(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)  # so that the weight at hand is out of date


def nothing(_):
    """What a change in place gives back."""


CHANGES = {
    "adapted": Lora,
    "wrapped": nn.Sequential,
    "wrapped twice": lambda layer: nn.Sequential(layer, nn.LayerNorm(layer.out_features)),
    "quantised": quantised,
    "quantised dynamically": quantised_dynamically,
    "pruned": lambda layer: nothing(prune.random_unstructured(layer, "weight", 0.5)),
    "weight norm, old": old_weight_norm,
    "weight norm": lambda layer: nothing(parametrizations.weight_norm(layer)),
    "spectral norm, old": lambda layer: nothing(nn.utils.spectral_norm(layer)),
    "spectral norm": lambda layer: nothing(parametrizations.spectral_norm(layer)),
    "parametrised": lambda layer: nothing(parametrize.register_parametrization(layer, "weight", Shifted())),
    "offloaded": on_the_instance,
    "overridden": overridden,
    "hook": lambda layer: nothing(layer.register_forward_hook(lambda m, a, y: y * 2)),
    "pre-hook": lambda layer: nothing(layer.register_forward_pre_hook(lambda m, a: (a[0] * 2,))),
    "backward hook": lambda layer: nothing(layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,))),
    "backward pre-hook": lambda layer: nothing(layer.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 2,))),
    "subclass": lambda layer: setattr(layer, "__class__", Halved),
    "rms norm": lambda layer: nn.RMSNorm(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else Lora(layer),
}


def tower(name):
    build, inputs, _ = FAMILIES[name]
    return build, inputs


def resampler(name):
    build, options, shape, extra = CASES[name]
    # by position: the forwards call their input by different names
    module = build(**options)
    names = ("x",) if "flamingo" in name else ("context", "attention_mask")
    return lambda: module, lambda: dict(zip(names, (torch.randn(*shape, 48), *extra(shape)), strict=False))


# a layer in each kind of module that is patched: the family, the name of the module that holds it, and its name there
BLOCK, CLIP, BERT = "transformer.resblocks.0", "text_model.encoder.layers.0", "encoder.layer.0"
LAYERS = {
    "open_clip mlp": ("open_clip-gelu", BLOCK, "mlp.c_fc"),
    "clip mlp": ("clip", f"{CLIP}.mlp", "fc2"),
    "clip attention": ("clip", f"{CLIP}.self_attn", "k_proj"),
    "dinov2 mlp": ("dinov2", "encoder.layer.0.mlp", "fc1"),
    "vit attention": ("vit", "layers.0.attention", "q_proj"),
    "blip attention": ("blip", "vision_model.encoder.layers.0.self_attn", "qkv"),
    "blip2 attention": ("blip2-vision", "encoder.layers.0.self_attn", "qkv"),
    "bert mlp": ("bert-padded", BERT, "intermediate.dense"),
    "bert attention": ("bert-padded", f"{BERT}.attention.self", "value"),
    "blip text attention": ("blip-text", f"{BERT}.crossattention.self", "query"),
    "qformer attention": ("qformer", f"{BERT}.attention.attention", "query"),
    "qformer mlp": ("qformer", BERT, "output_query.dense"),
    "idefics": ("idefics", "", "blocks.1.0.k_proj"),
    "idefics mlp": ("idefics", "", "blocks.0.1.fc"),
    "idefics2": ("idefics2-masked", "", "layers.1.mlp.up_proj"),
    "flamingo": ("flamingo-pytorch", "", "layers.0.0.to_q"),
}
NORMS = {
    "open_clip norm": ("open_clip-gelu", BLOCK, "ln_2"),
    "clip norm": ("clip", CLIP, "layer_norm2"),
    "bert norm": ("bert-padded", f"{BERT}.attention.output", "LayerNorm"),
    "bert mlp's norm": ("bert-padded", BERT, "output.LayerNorm"),
    "idefics norm": ("idefics", "", "blocks.1.0.context_layer_norm"),
    "flamingo norm": ("flamingo-pytorch", "", "layers.1.1.0"),
}
SOME = ("adapted", "quantised", "parametrised", "overridden")
OF_NORMS = ("rms norm", "hook", "overridden", "parametrised")
ROWS = [("clip mlp", change) for change in CHANGES if change != "rms norm"]
ROWS += [(layer, change) for layer in LAYERS if layer != "clip mlp" for change in SOME]
ROWS += [(layer, change) for layer in NORMS for change in OF_NORMS]


def case(layer):
    """A model, its inputs, the name of the module that is patched, and of the layer inside."""
    family, holder, name = {**LAYERS, **NORMS}[layer]
    torch.manual_seed(0)
    if family in CASES:
        build, inputs = resampler(family)
        return large_parameters(build()), inputs(), holder, name
    build, inputs = tower(family)
    return enlarge(build()), inputs(), holder, name


def change(model, holder, name, how):
    torch.manual_seed(3)
    parent, _, child = f"{holder}.{name}".strip(".").rpartition(".")
    parent = model.get_submodule(parent)
    new = CHANGES[how](getattr(parent, child))
    if new is not None:
        setattr(parent, child, new)


def said(caught):
    return [str(w.message) for w in caught if "is patched but runs its original forward" in str(w.message)]


@pytest.mark.parametrize(("layer", "how"), ROWS)
def test_changed_after(layer, how):
    plain, inputs, holder, name = case(layer)
    patched = copy.deepcopy(plain)
    report = apply_to(patched)
    assert holder in report.replaced
    step(patched, inputs)
    for model in (plain, patched):
        change(model, holder, name, how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(patched, inputs)
    assert_same(got, step(plain, inputs))
    (message,) = said(caught)
    assert f"its {name}" in message and message.startswith(type(plain.get_submodule(holder)).__name__)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(step(patched, inputs), step(plain, inputs))
    assert not said(caught)
    report.undo()
    assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize(("layer", "how"), ROWS)
def test_changed_before(layer, how):
    """Kept, with a reason that names the layer; the numbers are those of the model as it was."""
    plain, inputs, holder, name = case(layer)
    patched = copy.deepcopy(plain)
    for model in (plain, patched):
        change(model, holder, name, how)
    report = apply_to(patched)
    (row,) = [row for row in report.rows if row.name == holder]
    assert row.reason is not None and f"its {name}" in row.reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(patched, inputs)
    assert not said(caught)
    assert_same(got, step(plain, inputs))


@pytest.mark.parametrize("layer", ("clip mlp", "open_clip mlp", "bert mlp", "idefics"))
def test_taken_back(layer, count_calls):
    """A hook that is removed, and a merged adapter, leave the fused op as it was."""
    model, inputs, holder, name = case(layer)
    apply_to(model)
    parent, _, child = f"{holder}.{name}".strip(".").rpartition(".")
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


ACTIVATIONS = {"open_clip mlp": "mlp.gelu", "clip mlp": "activation_fn", "bert mlp": "intermediate.intermediate_act_fn"}


@pytest.mark.parametrize("layer", ACTIVATIONS)
@pytest.mark.parametrize("how", ("swapped", "hook", "in place"))
def test_activation(layer, how):
    plain, inputs, holder, _ = case(layer)
    parent, _, name = f"{holder}.{ACTIVATIONS[layer]}".rpartition(".")
    setattr(plain.get_submodule(parent), name, nn.GELU())
    patched = copy.deepcopy(plain)
    assert holder in apply_to(patched).replaced
    for model in (plain, patched):
        act = getattr(model.get_submodule(parent), name)
        if how == "swapped":
            setattr(model.get_submodule(parent), name, nn.SiLU())
        elif how == "hook":
            act.register_forward_hook(lambda m, a, y: 2 * y)
        else:
            act.approximate = "tanh"
    with pytest.warns(UserWarning, match="is patched but runs its original forward"):
        got = step(patched, inputs)
    assert_same(got, step(plain, inputs))


class QuickGELU(nn.Module):
    """The name of a known activation, and another function."""

    def forward(self, x):
        return x.tanh()


def test_an_activation_is_known_by_its_full_name():
    plain, inputs, holder, _ = case("clip mlp")
    plain.get_submodule(holder).activation_fn = QuickGELU()
    patched = copy.deepcopy(plain)
    assert holder not in apply_to(patched).replaced
    assert_same(step(patched, inputs), step(plain, inputs))


class OtherOutput(nn.Module):
    """In place of BertOutput, with the same layers, and another order."""

    def __init__(self, output):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = output.dense, output.LayerNorm, output.dropout

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states)) + input_tensor


@pytest.mark.parametrize("when", ("before", "after"))
def test_a_container_of_another_class(when):
    plain, inputs, holder, _ = case("bert mlp")
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
def test_a_dropout_with_a_mode_of_its_own(layer):
    """Monte-Carlo dropout: the model evaluates, its dropout does not."""
    plain, inputs, holder, _ = case(layer)
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


def test_hooks_on_every_module():
    plain, inputs, holder, _ = case("open_clip mlp")
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


# the patched module itself


@pytest.mark.parametrize("layer", ("open_clip mlp", "clip mlp", "idefics"))
def test_a_forward_on_the_instance_is_kept(layer):
    """It hides the class's, so that nothing would be replaced by what the report says is."""
    model, inputs, holder, _ = case(layer)
    overridden_forward(model.get_submodule(holder))
    expected = step(model, inputs)
    report = apply_to(model)
    (row,) = [row for row in report.rows if row.name == holder]
    assert "a forward on the instance" in row.reason
    assert_same(step(model, inputs), expected)


def overridden_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


NORM, PACKED = ("ln_final", "weight"), (f"{BLOCK}.attn", "in_proj_weight")


@pytest.mark.parametrize(
    ("name", "weight", "how"),
    ((*NORM, "parametrised"), (*NORM, "pruned"), (*NORM, "quantised"), (*PACKED, "parametrised"), (*PACKED, "pruned")),
)
def test_its_own_weights(name, weight, how):
    plain, inputs, *_ = case("open_clip mlp")
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
    assert len(said(caught)) == (how == "quantised")
    report.undo()
    assert not any(is_patched(module) for module in patched.modules())
    assert_same(step(patched, inputs), step(plain, inputs))
    if how == "parametrised":
        module = patched.get_submodule(name)
        parametrize.remove_parametrizations(module, weight)
        assert type(module) is type(plain.get_submodule(name)).__bases__[0]


@pytest.mark.parametrize("how", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
def test_a_copy_of_what_changed(how):
    plain, inputs, holder, name = case("clip mlp")
    patched = copy.deepcopy(plain)
    apply_to(patched)
    for model in (plain, patched):
        change(model, holder, name, "adapted")
    with pytest.warns(UserWarning, match="its fc2 is a Lora"):
        got = step(how(patched), inputs)
    assert_same(got, step(plain, inputs))


@pytest.mark.parametrize("how", ("hook", "adapted", "quantised"))
def test_compiled(how):
    """What the state reads guards the graph: a change after compiling is noticed."""
    plain, inputs, holder, name = case("clip mlp")
    torch._dynamo.reset()
    plain, x = plain.get_submodule(holder).eval(), torch.randn(2, 32)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    with torch.no_grad():
        run = torch.compile(patched, backend="eager")
        torch.testing.assert_close(run(x), plain(x), rtol=1e-5, atol=1e-5)
        for model in (plain, patched):
            change(model, "", name, how)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("layer", ("clip mlp", "bert mlp"))
def test_what_looks_into_a_forward(layer, how):
    """torch.func and torch.jit.trace find torch's own operators."""
    plain, inputs, holder, name = case(layer)
    plain = plain.get_submodule(holder).eval()
    patched = copy.deepcopy(plain)
    apply_to(patched)
    x = torch.randn(2, 3, 32)
    # torch's flash attention has no forward-mode derivative
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(TRANSFORMS[how](patched, x), TRANSFORMS[how](plain, x))


def test_another_dtype_is_torchs_own_error():
    plain, inputs, holder, name = case("clip mlp")
    patched = copy.deepcopy(plain)
    apply_to(patched)
    for model in (plain, patched):
        model.get_submodule(f"{holder}.{name}").bfloat16()
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="dtype"):
            warnings.simplefilter("ignore")
            model(**inputs)


@pytest.mark.parametrize("family", ("idefics", "flamingo-pytorch"))
def test_norms_of_another_dtype(family):
    """A resampler takes one dtype; a norm cast apart is torch's own affair, error or not."""
    build, inputs = resampler(family)
    model, inputs = build(), inputs()
    apply_to(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.double()
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="is torch.float64, and the input torch.float32"):
        model(**inputs)


# the loss

HEADS = {"llama": ("", "lm_head"), "gpt2": ("", "lm_head"), "roberta": ("lm_head", "decoder")}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("how", ("adapted", "quantised", "parametrised", "overridden", "hook", "offloaded"))
@pytest.mark.parametrize("when", ("before", "after"))
def test_head(name, how, when):
    plain = causal_lm(name).requires_grad_(how != "offloaded")
    patched = copy.deepcopy(plain)
    if when == "after":
        apply_to(patched, "loss")
    for model in (plain, patched):
        change(model, *HEADS[name], how)
    if when == "before":
        assert not apply_to(patched, "loss").replaced
    inputs = labelled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, again = patched(**inputs), patched(**inputs)
    expected = plain(**inputs)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(again.loss, expected.loss)
    assert len(said(caught)) == (when == "after")


def test_hooks_around_a_head():
    """After patching, on the module that holds the head."""
    plain = causal_lm("roberta")
    patched = copy.deepcopy(plain)
    apply_to(patched, "loss")
    for model in (plain, patched):
        model.lm_head.register_forward_hook(lambda m, a, y: 2 * y)
    inputs = labelled()
    with pytest.warns(UserWarning, match="its lm_head has hooks, which would see the loss"):
        got = patched(**inputs)
    torch.testing.assert_close(got.loss, plain(**inputs).loss)


def test_hooks_that_gather_weights_stay_fused():
    """DeepSpeed's on every module, after patching: they leave inputs and outputs as they are."""
    model = causal_lm("llama")
    apply_to(model, "loss")

    def gather(module, args):
        return None

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model.lm_head.register_forward_pre_hook(gather)
    assert model(**labelled()).logits is None
