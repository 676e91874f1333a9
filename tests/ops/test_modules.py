"""Proves that the modules compute what the modules that they replace do, forward and every gradient, with the same
state-dict keys; that frozen ones save little for the backward pass; and that they compile, copy and thaw.

Run: pytest tests/ops/test_modules.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prismer.kernels.dispatch import use_backend
from prismer.kernels.modules import MLP, Adaptor, LayerNorm, LinearCrossEntropy, MultiheadAttention, PerceiverResampler
from tests.ops.patching import saved_bytes

B, N, L, D, HEADS, V = 2, 7, 11, 32, 4, 51
NAMES = ("query", "key", "value", "output")


class PlainMLP(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.activation = activation

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class PlainAdaptor(nn.Module):
    def __init__(self, late):
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(D, eps=0.3), nn.Linear(D, D), nn.Linear(D, D)
        self.late = late

    def forward(self, x):
        y = x + self.up(self.down(x if self.late else self.norm(x)).relu().square())
        return self.norm(y) if self.late else y


class PlainPacked(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(D, HEADS, batch_first=True)

    def forward(self, x, context=None, *, causal=False, key_mask=None):
        context = x if context is None else context
        mask = torch.ones(N, N, dtype=torch.bool).triu(1) if causal else None
        padding = None if key_mask is None else ~key_mask
        return super().forward(x, context, context, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]


class PlainSeparate(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.output = nn.Linear(D, D), nn.Linear(D, D)
        self.key, self.value = nn.Linear(24, D), nn.Linear(24, D)

    def forward(self, x, context):
        parts = self.query(x), self.key(context), self.value(context)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        out = (q @ k.mT / (D // HEADS) ** 0.5).softmax(-1) @ v
        return self.output(out.transpose(1, 2).flatten(2))


class PlainResamplerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2, self.ln_ff = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = PlainPacked(), PlainMLP(lambda h: h.relu().square())

    def forward(self, z, x):
        query = self.ln_1(z)
        z = z + self.attn(query, torch.cat((query, self.ln_2(x)), 1))
        return z + self.mlp(self.ln_ff(z))


class PlainResampler(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(5, D))
        self.blocks = nn.ModuleList(PlainResamplerBlock() for _ in range(2))

    def forward(self, x):
        z = self.latents.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            z = block(z, x)
        return z


class PlainHead(nn.Linear):
    def __init__(self, bias=True):
        super().__init__(D, V, bias)

    def forward(self, x, labels):
        return F.cross_entropy(super().forward(x).flatten(0, -2), labels.flatten(), label_smoothing=0.1)


def draw_inputs(name):
    x = torch.randn(B, N, D, dtype=torch.float64) + 0.3
    if name.startswith("head"):
        labels = torch.randint(0, V, (B, N))
        labels[0, ::3] = -100
        return (x, labels), {}
    if name in ("cross", "separate"):
        return (x, torch.randn(B, L, D if name == "cross" else 24, dtype=torch.float64)), {}
    if name == "causal":
        keep = torch.ones(B, N, dtype=torch.bool)
        keep[1, 5:] = False
        return (x,), dict(causal=True, key_mask=keep)
    return (x,), {}


PAIRS = {
    "layer_norm": (lambda: LayerNorm(D), lambda: nn.LayerNorm(D)),
    "layer_norm_eps": (lambda: LayerNorm(D, eps=0.3), lambda: nn.LayerNorm(D, eps=0.3)),
    "quick_gelu": (lambda: MLP(D, 4 * D, "quick_gelu"), lambda: PlainMLP(lambda h: h * torch.sigmoid(1.702 * h))),
    "gelu": (lambda: MLP(D, 4 * D, "gelu"), lambda: PlainMLP(F.gelu)),
    "squared_relu": (lambda: MLP(D, 4 * D, "squared_relu"), lambda: PlainMLP(lambda h: h.relu().square())),
    "adaptor": (lambda: Adaptor(D, late=False, eps=0.3), lambda: PlainAdaptor(False)),
    "late_adaptor": (lambda: Adaptor(D, late=True, eps=0.3), lambda: PlainAdaptor(True)),
    "self": (lambda: MultiheadAttention(D, HEADS), PlainPacked),
    "cross": (lambda: MultiheadAttention(D, HEADS), PlainPacked),
    "causal": (lambda: MultiheadAttention(D, HEADS), PlainPacked),
    "separate": (lambda: MultiheadAttention(D, HEADS, context_width=24, names=NAMES), PlainSeparate),
    "resampler": (lambda: PerceiverResampler(D, 2, HEADS, 5), PlainResampler),
    "head": (lambda: LinearCrossEntropy(D, V, label_smoothing=0.1), PlainHead),
    "head_alone": (lambda: LinearCrossEntropy(D, V, bias=False, label_smoothing=0.1), lambda: PlainHead(False)),
}


def build_pair(name):
    """Ours and the plain module with the same large weights, in float64."""
    ours, plain = (make().double() for make in PAIRS[name])
    # biases and norms so large that forgetting one shows
    state = {k: torch.randn_like(v) * (0.3 if v.dim() > 1 else 1.0) for k, v in ours.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    ours.load_state_dict(state)
    plain.load_state_dict(state)
    return ours, plain


def step(module, arguments, options, dy=None):
    """Output and the gradients of the inputs and of all parameters that train."""
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    y = module(*leaves, **options)
    module.zero_grad()
    y.backward(torch.ones_like(y) if dy is None else dy)
    grads = {f"d{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.requires_grad}
    return {"y": y.detach(), **grads, **{k: p.grad for k, p in module.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("name", PAIRS)
def test_a_module_equals_what_it_replaces(name, backend):
    ours, plain = build_pair(name)
    arguments, options = draw_inputs(name)
    with use_backend(backend):
        got = step(ours, arguments, options)
    expected = step(plain, arguments, options)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", PAIRS)
def test_frozen_weights_get_no_gradient_until_they_thaw(name):
    """The gradient of the input stays as it is."""
    ours, _ = build_pair(name)
    arguments, options = draw_inputs(name)
    all_trained = step(ours, arguments, options)
    ours.requires_grad_(False)
    frozen = step(ours, arguments, options)
    torch.testing.assert_close(frozen["d0"], all_trained["d0"], rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in ours.parameters())
    ours.requires_grad_(True)
    again = step(ours, arguments, options)
    for key, value in again.items():
        torch.testing.assert_close(value, all_trained[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_is_saved_if_nothing_trains(name):
    """With frozen parameters and inputs that need no gradient, and under no_grad."""
    ours, _ = build_pair(name)
    arguments, options = draw_inputs(name)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            ours(*arguments, **options)
        ours.requires_grad_(False)
        y = ours(*arguments, **options)
    assert not saved and y.grad_fn is None


@pytest.mark.parametrize("name", PAIRS)
def test_a_module_can_be_compiled_copied_and_cast(name):
    ours, _ = build_pair(name)
    arguments, options = draw_inputs(name)
    expected = step(ours, arguments, options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    ours.zero_grad()
    y = compiled(*leaves, **options)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y.detach(), expected["y"])
    torch.testing.assert_close(leaves[0].grad, expected["d0"])
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], msg=lambda m, k=key: f"{k}: {m}")
    again = step(copy.deepcopy(ours), arguments, options)
    assert all(torch.equal(value, expected[key]) for key, value in again.items())
    low = copy.deepcopy(ours).bfloat16()
    y = low(*(a.bfloat16() if a.is_floating_point() else a for a in arguments), **options)
    torch.testing.assert_close(y.double(), expected["y"], rtol=0.2, atol=0.2 * expected["y"].abs().max().item())


def frozen_bytes(module, arguments, options):
    """Bytes that a frozen module saves for the gradient of its input."""
    module.requires_grad_(False)
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in arguments]
    return saved_bytes(module, lambda: module(*leaves, **options))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        # bytes for each number of the input in bf16, beside a few numbers a row: see the docstring of each op
        # the input
        "layer_norm": 2,
        # the pre-activation, four times as wide
        "quick_gelu": 8,
        "gelu": 8,
        "squared_relu": 8,
    }.items(),
)
def test_frozen_modules_save_few_bytes(name, expected):
    module = PAIRS[name][0]().bfloat16()
    arguments, options = draw_inputs(name)
    arguments = [a.bfloat16() if a.is_floating_point() else a for a in arguments]
    per_number = frozen_bytes(module, arguments, options) / (B * N * D)
    assert per_number <= expected + 8 / D, f"{per_number} bytes"


def test_a_head_gives_losses_of_rows_and_logits():
    head = LinearCrossEntropy(D, V, label_smoothing=0.1, reduction="none").double()
    torch.nn.init.normal_(head.bias)
    (x, labels), _ = draw_inputs("head")
    losses = head(x, labels)
    logits = F.linear(x, head.weight, head.bias)
    expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(losses, expected.view(labels.shape))
    torch.testing.assert_close(head.logits(x), logits)
    weights = torch.rand(labels.shape, dtype=torch.float64)
    head.reduction = "sum"
    torch.testing.assert_close(head(x, labels, weights), (weights * losses).sum())


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="width 30 does not divide into 4 heads"):
        MultiheadAttention(30, 4)
    with pytest.raises(ValueError, match="cannot take a context of width 24 beside 32; pass names"):
        MultiheadAttention(32, 4, context_width=24)
    with pytest.raises(ValueError, match="takes only one dimension, the last"):
        LayerNorm((3, 4))
