"""Proves that linear_cross_entropy takes logits that are not finite as F.cross_entropy does, loss and gradients, on
every backend: forbidden entries and padded vocabularies, forbidden targets, overflow, NaN; and that ignored rows may
hold anything.

Run: pytest tests/ops/test_cross_entropy_infinite.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

import prismer.kernels.cross_entropy as module
from prismer.kernels.cross_entropy import linear_cross_entropy, triton_backend
from prismer.kernels.cross_entropy import torch_backend as cross_entropy_torch
from prismer.kernels.dispatch import use_backend

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "on_backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of Triton's interpreter
]

R, D, V = 9, 8, 101
INF = math.inf


WHOLE, FORMED, AGAIN = "whole", "formed in chunks", "formed again in chunks"
WAYS = [(backend, WHOLE) for backend in ("triton", "torch", "fastest", "reference")]
WAYS += [("torch", FORMED), ("torch", AGAIN), ("triton", AGAIN)]


@pytest.fixture(params=WAYS, ids=lambda way: " ".join(way))
def on_backend(request, running, monkeypatch):
    """A backend, with one chunk or with chunks of rows and vocabulary, some of which hold forbidden entries alone."""
    backend, chunks = request.param
    if chunks != WHOLE:
        monkeypatch.setattr(cross_entropy_torch, "_CHUNK_ELEMENTS", 7 * 11)
        monkeypatch.setattr(cross_entropy_torch, "ROW_CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(cross_entropy_torch, "_BLOCK_ROWS", 7)
        monkeypatch.setattr(triton_backend, "_BUFFER_BYTES", 1)
        monkeypatch.setattr(
            module, "_formed_in_forward", lambda x, V, reduce, needs: chunks == FORMED and any(needs) and reduce
        )
    if backend in ("fastest", "reference"):
        with use_backend(None if backend == "fastest" else "reference"):
            yield backend
    else:
        with running(backend):
            yield backend


def draw():
    x, weight, bias = torch.randn(R, D), torch.randn(V, D), 2 * torch.randn(V)
    labels = torch.randint(60, 90, (R,))
    labels[1::4] = -100
    return x, weight, bias, labels


def forbidden(x, weight, bias, labels):
    bias[[0, 7, 93]] = -INF


def padded(x, weight, bias, labels):
    """The first and the last entries, more than a chunk of them."""
    bias[:60], bias[90:] = -INF, -INF


def forbidden_target(x, weight, bias, labels):
    bias[labels[0]] = -INF


def all_forbidden(x, weight, bias, labels):
    bias[:] = -INF


def certain(x, weight, bias, labels):
    bias[70] = INF


def nan_row(x, weight, bias, labels):
    x[3] = math.nan


def nan_entry(x, weight, bias, labels):
    """Beside forbidden entries, in its own chunk of the vocabulary."""
    bias[:60] = -INF
    bias[4] = math.nan


def infinite_row(x, weight, bias, labels):
    """Logits of both infinities."""
    x[3, 0] = INF


def overflowing_row(x, weight, bias, labels):
    x[3] = 3e38


CASES = (forbidden, padded, forbidden_target, all_forbidden, certain, nan_row, nan_entry, infinite_row, overflowing_row)


def results(op, tensors, labels, trainable=(True, True, True), **settings):
    """Losses and gradients."""
    tensors = [t.clone().requires_grad_(flag) for t, flag in zip(tensors, trainable, strict=True)]
    losses = op(*tensors, labels, **settings)
    losses.sum().backward()
    return losses.detach(), [t.grad for t in tensors if t.requires_grad]


def yardstick(x, weight, bias, labels, reduction, **settings):
    """torch's loss of the rows that count; an ignored row with a NaN logit would have a gradient of NaN."""
    kept = labels != -100
    losses = F.cross_entropy(F.linear(x[kept], weight, bias), labels[kept], reduction=reduction, **settings)
    return torch.zeros(R).index_put((kept.nonzero()[:, 0],), losses) if reduction == "none" else losses


def check(got, expected):
    torch.testing.assert_close(got[0], expected[0], equal_nan=True, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("case", CASES)
def test_infinite_logits_are_treated_as_in_torch(case, reduction, smoothing):
    *tensors, labels = draw()
    case(*tensors, labels)
    settings = dict(label_smoothing=smoothing, reduction=reduction)
    expected = results(yardstick, tensors, labels, **settings)
    check(results(linear_cross_entropy, tensors, labels, **settings), expected)
    frozen = results(linear_cross_entropy, tensors, labels, (True, False, False), **settings)
    check(frozen, (expected[0], expected[1][:1]))
    with torch.no_grad():
        losses = linear_cross_entropy(*tensors, labels, **settings)
    torch.testing.assert_close(losses, expected[0], equal_nan=True, rtol=1e-5, atol=1e-5)


def test_the_documented_values_by_hand():
    """Losses and gradients are those of the docstring."""
    x, weight, bias, labels = draw()
    labels[:] = 70
    allowed = torch.arange(V) % 3 == 70 % 3
    bias[~allowed] = -INF
    losses, (dx, dweight, dbias) = results(linear_cross_entropy, (x, weight, bias), labels, label_smoothing=0.0)
    at = int(allowed[:70].sum())
    alone = F.cross_entropy(F.linear(x, weight[allowed], bias[allowed]), torch.full((R,), at), reduction="none")
    torch.testing.assert_close(losses, alone)
    assert not dweight[~allowed].any() and not dbias[~allowed].any() and dx.isfinite().all()
    smoothed, grads = results(linear_cross_entropy, (x, weight, bias), labels, label_smoothing=0.1)
    assert smoothed.eq(INF).all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("what", (math.nan, INF))
def test_an_ignored_row_may_hold_anything(what, weighted, reduction, smoothing=0.1):
    x, weight, bias, labels = draw()
    ignored = labels == -100
    row_weights = torch.rand(R) + 0.5 if weighted else None
    settings = dict(label_smoothing=smoothing, reduction=reduction)
    expected = results(linear_cross_entropy, (x, weight, bias), labels, row_weights=row_weights, **settings)
    x = x.masked_fill(ignored[:, None], what)
    row_weights = None if row_weights is None else row_weights.masked_fill(ignored, what)
    got = results(linear_cross_entropy, (x, weight, bias), labels, row_weights=row_weights, **settings)
    check(got, expected)
    assert not got[1][0][ignored].any()


@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_logits_that_overflow_fp16(on_backend, reduction, smoothing):
    """A logit beyond 65504 is infinite where it is rounded to fp16, and finite where it is not."""
    x, weight, bias, labels = draw()
    x[3] = 200.0 * weight[5].sign()
    weight[5] *= 100
    labels[3] = 70
    tensors = [t.half() for t in (x, weight, bias)]
    losses, _ = results(linear_cross_entropy, tensors, labels, label_smoothing=smoothing, reduction=reduction)
    low = F.linear(*tensors).float()
    assert low[3, 5] == INF
    value = losses[3] if reduction == "none" else losses
    assert value.isnan() or value > 1e4
    others = torch.arange(R) != 3
    if reduction == "none":
        expected = F.cross_entropy(low, labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(losses[others], expected[others], rtol=1e-2, atol=1e-2)
