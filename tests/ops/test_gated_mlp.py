"""Proves that gated_mlp equals its definition, forward and every gradient, and saves the two hidden tensors alone.

Run: pytest tests/ops/test_gated_mlp.py
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from prismer.kernels.patch.gated_mlp import gated_mlp, gated_mlp_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "gate_weight", "gate_bias", "up_weight", "up_bias", "down_weight", "down_bias")


def draw(R, D, E, outputs, dtype):
    """Biases as large as the products that they are added to, none of them small."""
    layers = [
        (torch.randn(n, k) / k**0.5, torch.randn(n).sign() * (0.8 + torch.rand(n)))
        for n, k in ((E, D), (E, D), (outputs, E))
    ]
    return [t.to(dtype) for t in (torch.randn(R, D), *itertools.chain(*layers))]


def plain(x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias):
    """What a user would write."""
    hidden = F.silu(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
    return F.linear(hidden, down_weight, down_bias)


def results(op, tensors, dtype, trains=NAMES):
    leaves = [None if t is None else t.detach().to(dtype) for t in tensors]
    for name, t in zip(NAMES, leaves, strict=True):
        if t is not None:
            t.requires_grad_(name in trains)
    y = op(*leaves)
    wanted = {f"d{name}": t for name, t in zip(NAMES, leaves, strict=True) if t is not None and t.requires_grad}
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(dtype)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))}


def compare(tensors, assert_no_worse, trains=NAMES):
    dtype = tensors[0].dtype
    got, expected = (results(op, tensors, dtype, trains) for op in (gated_mlp, plain))
    assert_no_worse("", got, expected, lambda: results(plain, tensors, torch.float64, trains))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((9, 16, 40, 12), (1, 1, 1, 1), (0, 8, 16, 8)), ids=str)
def test_gated_mlp_rounds_no_worse_than_torch(shape, dtype, assert_no_worse):
    compare(draw(*shape, dtype), assert_no_worse)


@pytest.mark.parametrize("trains", [(name,) for name in NAMES] + [("x", "down_weight")], ids="+".join)
def test_each_gradient_alone(trains, assert_no_worse):
    compare(draw(5, 8, 12, 6, torch.float32), assert_no_worse, trains)


def test_biases_are_optional(assert_no_worse):
    x, w_g, _, w_u, _, w_d, _ = draw(5, 8, 12, 6, torch.float32)
    compare([x, w_g, None, w_u, None, w_d, None], assert_no_worse)


def test_the_definition_agrees_with_torch():
    tensors = draw(5, 8, 12, 6, torch.float64)
    torch.testing.assert_close(gated_mlp_reference(*tensors), plain(*tensors))


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen", "trained"))
def test_two_hidden_tensors_are_saved(frozen):
    x, *weights = draw(5, 8, 12, 6, torch.float32)
    weights = [w.requires_grad_(not frozen) for w in weights]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_mlp(x.requires_grad_(), *weights)
    known = {id(w) for w in weights}
    assert sorted(t.numel() for t in saved if id(t) not in known) == sorted([60, 60] + [40] * (not frozen))


@pytest.mark.parametrize("trains", (NAMES, ("x",), ("down_weight",), ("up_bias",), ()), ids="+".join)
def test_the_registered_op_passes_opcheck(trains):
    tensors = draw(4, 8, 12, 6, torch.float32)
    opcheck(
        torch.ops.prismer.gated_mlp.default,
        tuple(t.requires_grad_(name in trains) for name, t in zip(NAMES, tensors, strict=True)),
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    (
        (0, torch.zeros(2, 8, dtype=torch.int64), "x is torch.int64"),
        (3, torch.zeros(11, 8), "up_weight is"),
        (4, torch.zeros(12, dtype=torch.float64), "up_bias is"),
        (5, torch.zeros(6, 11), "down_weight is"),
    ),
)
def test_wrong_arguments_are_refused(place, value, message):
    tensors = draw(2, 8, 12, 6, torch.float32)
    tensors[place] = value
    with pytest.raises(ValueError, match=message):
        gated_mlp(*tensors)
