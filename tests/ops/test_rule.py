"""Proves the rule of numerics (`assert_no_worse`): it accepts every order of summation and rejects faults.

A fault changes an argument before the op sees it: it scales the argument by one per cent (by ten in bf16), or it
removes the last entry, as a wrong tail, mask or stride would. Each fault is planted in each op, one argument after
another, and the op's own test must find it.

Run: pytest tests/ops/test_rule.py
"""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from prismer.kernels.dispatch import use_backend
from prismer.kernels.machine import native_missing

pytestmark = pytest.mark.cpu


def one_after_another(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension in fp32 or shorter, rounded after each term."""
    total = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        total += term
    return total


ORDERS = {
    "first to last": lambda terms: terms,
    "last to first": lambda terms: terms.flip(-1),
    "by size": lambda terms: terms.gather(-1, terms.abs().argsort(-1, descending=True)),
    "shuffled": lambda terms: terms[..., torch.randperm(terms.shape[-1])],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", (3, 256, 1500))
@pytest.mark.parametrize("mean", (0.0, 1.0))
def test_a_product_may_sum_in_any_order(order, length, mean, assert_no_worse):
    """Compared with a PyTorch that is exact except for the last rounding."""
    a, b = torch.randn(4, length) + mean, torch.randn(5, length) + mean
    ours = one_after_another(ORDERS[order](a[:, None] * b))
    high = a.double(), b.double()
    assert_no_worse("y", ours, (high[0] @ high[1].T).float(), lambda: high[0] @ high[1].T)


@pytest.mark.parametrize("order", ORDERS)
def test_attention_may_sum_in_any_order(order, assert_no_worse):
    """A case reported from a processor with AMX: one head of size 256, 300 keys, fp32."""
    q, k, v = 2 * torch.randn(8, 256) + 0.25, torch.randn(300, 256) + 0.25, torch.randn(300, 256) + 0.25
    scores = one_after_another(ORDERS[order](q[:, None] * k)) / 16
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    products = ORDERS[order](torch.cat([weights[:, None] * v.T, weights[:, None]], 1))
    sums = one_after_another(products)
    high = [t.double() for t in (q, k, v)]

    def exact():
        return (high[0] @ high[1].T / 16).softmax(-1) @ high[2]

    assert_no_worse("out", sums[:, :-1] / sums[:, -1:], exact().float(), exact)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_norm_may_sum_in_any_order(dtype, assert_no_worse):
    x = (2 * torch.randn(9, 768) + 3).to(dtype)
    wide = x.float()
    centred = wide - one_after_another(wide.flip(-1))[:, None] / 768
    ours = (centred / (one_after_another(centred.square())[:, None] / 768 + 1e-5).sqrt()).to(dtype)
    high = x.double()

    def exact():
        return F.layer_norm(high, (768,))

    assert_no_worse("y", ours, exact().to(dtype), exact)


@pytest.mark.parametrize("length", (256, 1500))
def test_a_short_accumulator_is_rejected(length, assert_no_worse):
    """Sums held in bf16, and products of numbers cut to ten bits, as in tf32."""
    a, b = torch.randn(4, length), torch.randn(5, length)
    low = a.bfloat16(), b.bfloat16()
    high = [t.double() for t in low]

    def exact():
        return high[0] @ high[1].T

    with pytest.raises(AssertionError, match="y is off"):
        assert_no_worse("y", one_after_another(low[0][:, None] * low[1]), exact().bfloat16(), exact)
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)]
    with pytest.raises(AssertionError, match="y is off"):
        assert_no_worse("y", cut[0] @ cut[1].T, a @ b.T, lambda: a.double() @ b.double().T)


# name -> a function of an argument and the dtype of the op; bf16 needs a larger fault, it has two to three digits
FAULTS = {
    "scale": lambda t, dtype: t * (1.01 if dtype == torch.float32 else 1.1),
    "no end": lambda t, dtype: torch.cat([t[..., :-1], torch.zeros_like(t[..., -1:])], -1),
}


def with_fault(op, place: int | None, fault, floats: list):
    """`op` with `fault` applied to its floating-point argument number `place`; `floats` receives their count."""

    @functools.wraps(op)
    def broken(*args, **kwargs):
        leaves, spec = tree_flatten((args, kwargs))
        found = [i for i, t in enumerate(leaves) if torch.is_tensor(t) and t.is_floating_point()]
        floats.append(len(found))
        if place is not None:
            leaves[found[place]] = fault(leaves[found[place]])
        args, kwargs = tree_unflatten(leaves, spec)
        return op(*args, **kwargs)

    return broken


# module of the test -> name of the op in it, and a function that runs its test on one shape in a dtype
OPS = {
    "adaptor": ("adaptor", lambda m, dtype, rule: m.compare(m.draw(33, 20, 9, dtype), False, rule)),
    "mlp": ("mlp", lambda m, dtype, rule: m.compare(m.draw(33, 20, 15, 9, dtype), "gelu", rule)),
    "activation": ("bias_activation", lambda m, dtype, rule: m.compare(*m.draw(7, 61, dtype), "gelu", rule)),
    "layer_norm": ("add_layer_norm", lambda m, dtype, rule: m.compare(m.draw(7, 61, dtype), dtype, rule)),
    "rms_norm": (
        "add_rms_norm",
        lambda m, dtype, rule: m.test_rms_norm_equals_its_definition((5, 60), True, dtype, rule),
    ),
    "gated_mlp": ("gated_mlp", lambda m, dtype, rule: m.compare(m.draw(33, 20, 8, 9, dtype), rule)),
    "rotary": ("rotary", lambda m, dtype, rule: m.compare(*m.draw(2, 5, 4, dtype), 2, rule)),
    "linear": ("linears", lambda m, dtype, rule: m.test_linears(2, "x w0 b0 w1 b1", dtype, rule)),
    "few_rows": ("native", lambda m, dtype, rule: m.check(*m.draw(7, 21, 61, dtype), rule)),
    "gemm": ("gemm", lambda m, dtype, rule: m.test_gemm((7, 61, 5), dtype, "torch", rule)),
    "attention": ("attention", lambda m, dtype, rule: m.compare(*m.draw(2, 1, 17, 45, 64, "mask", dtype), dtype, rule)),
    "native_attention": ("native", lambda m, dtype, rule: m.check(*m.draw(2, 1, 17, 45, 80, "mask", dtype), rule)),
    "decode_attention": (
        "decode_attention",
        lambda m, dtype, rule: m.compare(m.draw((3, 5, 7, 11, 13, 17, 3), dtype), rule),
    ),
    "cross_attention": ("cross_attention", lambda m, dtype, rule: m.test_low_precision("caption", dtype, rule)),
    "resampler_attention": (
        "resampler_attention",
        lambda m, dtype, rule: m.compare([m.draw(3, 7, 13, 8, dtype)], 2, "absorbed", rule),
    ),
    "resampler_projections": (
        "resampler_projections",
        lambda m, dtype, rule: m.test_resampler_projections_round_no_worse_than_torch(24, False, dtype, rule),
    ),
    "cross_entropy": (
        "linear_cross_entropy",
        lambda m, dtype, rule: m.compare(
            m.draw(22, 17, 11)[:3], m.draw(22, 17, 11)[3], dtype, rule, row_weights=m.weights_of(22)
        ),
    ),
    "label_map": ("label_map", lambda m, dtype, rule: m.compare(*m.draw((2, 9, 9, 9, 37, 64), dtype), 9, rule)),
    "instance_rows": ("add_instance_rows", lambda m, dtype, rule: m.compare(m.draw((3, 23, 5, 37, 61), dtype), rule)),
}

# arguments that cannot change the result: the bias of the keys adds the same number to all scores of a query, and
# softmax ignores that
UNSEEN = {"cross_attention": {3}}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_planted_faults_are_found(name, dtype, assert_no_worse, monkeypatch):
    if name in ("native_attention", "few_rows") and native_missing():
        pytest.skip(native_missing())
    module = importlib.import_module(f"tests.ops.test_{name}")
    op, run = OPS[name]
    whole, count = getattr(module, op), []
    with use_backend(None if name == "native_attention" else "torch"):
        monkeypatch.setattr(module, op, with_fault(whole, None, None, count))
        run(module, dtype, assert_no_worse)
        missed = []
        for place in set(range(min(count))) - UNSEEN.get(name, set()):
            for kind, fault in FAULTS.items():
                torch.manual_seed(0)
                monkeypatch.setattr(module, op, with_fault(whole, place, lambda t, fault=fault: fault(t, dtype), []))
                try:
                    run(module, dtype, assert_no_worse)
                except AssertionError:
                    continue
                missed.append((place, kind))
    assert count and not missed, f"the test of {name} misses the faults {missed} (argument, kind)"
