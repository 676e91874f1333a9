"""Proves that linear_cross_entropy is the smoothed loss of F.cross_entropy, in value and every gradient, and that it
keeps its promises about memory: no logits beyond a chunk, no work and no saved tensors for frozen weights.

Run: pytest tests/ops/test_cross_entropy.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prismer.kernels.cross_entropy as room
from prismer.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from prismer.kernels.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {  # R, D, V, chunk in elements
    "one-row": (1, 60, 33, 2**24),
    "primes": (23, 17, 101, 2**24),
    "row-by-row": (7, 5, 13, 1),
    "ragged-chunks": (65, 24, 1023, 10 * 1023),
    "roberta": (9, 16, 50265, 4 * 50265),
    "no-rows": (0, 4, 5, 2**24),
}
NAMES = ("x", "weight", "bias")


def draw(R, D, V, dtype=torch.float64, scale=1.0, bias_scale=3.0):
    """Logits of a few units, a bias that matters, every third row ignored."""
    x = torch.randn(R, D, dtype=torch.float64)
    weight = scale * torch.randn(V, D, dtype=torch.float64) / D**0.5 * 2
    bias = bias_scale * torch.randn(V, dtype=torch.float64)
    labels = torch.randint(0, V, (R,))
    labels[1::3] = -100
    return x.to(dtype), weight.to(dtype), bias.to(dtype), labels


def plain_torch(x, weight, bias, labels, label_smoothing=0.1):
    """What a user would write: logits in the dtype of the model, the loss in fp32."""
    logits = F.linear(x, weight, bias)
    logits = logits.float() if x.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def gradients(op, tensors, labels, dy, trainable=(True, True, True), **settings):
    """Losses, and the gradients of what is trainable, by name."""
    tensors = [t.detach().requires_grad_(flag) for t, flag in zip(tensors, trainable, strict=True)]
    losses = op(*tensors, labels, **settings)
    wanted = [t for t, flag in zip(tensors, trainable, strict=True) if flag]
    names = ["d" + name for name, flag in zip(NAMES, trainable, strict=True) if flag]
    return losses.detach(), dict(zip(names, torch.autograd.grad(losses, wanted, dy.to(losses.dtype)), strict=True))


def compare(tensors, labels, dtype, assert_no_worse, **settings):
    """Ours and plain torch in `dtype` against plain torch in float64, forward and backward."""
    dy = torch.randn(labels.shape[0])
    dy[::4] = 0
    low = [t.to(dtype) for t in tensors]
    high = [t.double() for t in low]
    ours, ours_grads = gradients(linear_cross_entropy, low, labels, dy, **settings)
    plain, plain_grads = gradients(plain_torch, low, labels, dy, **settings)
    exact, exact_grads = gradients(plain_torch, high, labels, dy, **settings)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        for name, value in {"losses": ours, **ours_grads}.items():
            expected = {"losses": exact, **exact_grads}[name]
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
        return
    assert_no_worse("losses", ours, plain, exact)
    for name, value in ours_grads.items():
        assert value.dtype == dtype
        assert_no_worse(name, value, plain_grads[name], exact_grads[name], factor=3.0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_cross_entropy(shape, dtype, assert_no_worse, monkeypatch):
    R, D, V, chunk = shape
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", chunk)
    *tensors, labels = draw(R, D, V)
    compare(tensors, labels, dtype, assert_no_worse)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "trainable",
    ((True, False, False), (True, False, True), (False, True, False), (False, False, True)),
    ids=("x", "x-bias", "weight", "bias"),
)
def test_frozen_parts(trainable, dtype, assert_no_worse, monkeypatch):
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", 5 * 101)
    *tensors, labels = draw(23, 17, 101)
    compare(tensors, labels, dtype, assert_no_worse, trainable=trainable)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("frozen", (True, False))
def test_confident_targets(dtype, frozen, assert_no_worse):
    """p_y is almost 1, so p_y - 1 must not be formed from rounded numbers."""
    x, weight, bias, labels = draw(12, 16, 40)
    labels = labels.clamp(min=0)
    x = 10 * F.normalize(weight[labels])
    tensors = (x, 3 * weight, bias / 10)
    compare(tensors, labels, dtype, assert_no_worse, trainable=(True, not frozen, not frozen), label_smoothing=0.0)
    compare(tensors, labels, dtype, assert_no_worse, trainable=(True, not frozen, not frozen))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_big_values(dtype, assert_no_worse):
    """Logits of thousands neither overflow nor lose the row's differences."""
    *tensors, labels = draw(11, 8, 50, scale=50.0, bias_scale=1000.0)
    compare(tensors, labels, dtype, assert_no_worse)


@pytest.mark.parametrize("trainable", ((True, True, True), (True, False, False)), ids=("all", "x"))
def test_all_rows_ignored(trainable):
    *tensors, labels = draw(6, 4, 9, torch.float32)
    labels = torch.full_like(labels, -100)
    losses, grads = gradients(linear_cross_entropy, tensors, labels, torch.ones(6), trainable)
    for name, value in {"losses": losses, **grads}.items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_ignored_rows_are_not_read():
    """Whatever stands in an ignored row, its gradient included, changes nothing."""
    x, weight, bias, labels = draw(9, 4, 11)
    dy = torch.randn(9)
    expected = gradients(linear_cross_entropy, (x, weight, bias), labels, dy)
    x[1::3], dy[1::3] = torch.nan, torch.inf
    losses, grads = gradients(linear_cross_entropy, (x, weight, bias), labels, dy)
    for name, value in {"losses": losses, **grads}.items():
        assert torch.equal(value, {"losses": expected[0], **expected[1]}[name]), name


def test_other_ignore_index():
    x, weight, bias, labels = draw(6, 4, 9)
    changed = labels.masked_fill(labels == -100, 3)
    losses = linear_cross_entropy(x, weight, bias, changed, ignore_index=3)
    expected = plain_torch(x, weight, bias, changed).masked_fill(changed == 3, 0)
    torch.testing.assert_close(losses, expected)


def test_reference_is_the_loss_of_torch():
    x, weight, bias, labels = draw(23, 17, 101)
    for smoothing in (0.0, 0.1, 0.7):
        with use_backend("reference"):
            losses = linear_cross_entropy(x, weight, bias, labels, label_smoothing=smoothing)
        torch.testing.assert_close(losses, plain_torch(x, weight, bias, labels, smoothing))
    assert linear_cross_entropy_reference(x.float(), weight.float(), bias.float(), labels).dtype == torch.float32


def test_row_alone_equals_row_in_batch(monkeypatch):
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", 4 * 101)
    x, weight, bias, labels = draw(23, 17, 101)
    losses, grads = gradients(linear_cross_entropy, (x, weight, bias), labels, torch.ones(23))
    for row in (0, 1, 22):
        one = slice(row, row + 1)
        alone, alone_grads = gradients(linear_cross_entropy, (x[one], weight, bias), labels[one], torch.ones(1))
        torch.testing.assert_close(alone, losses[one], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(alone_grads["dx"], grads["dx"][one], rtol=1e-12, atol=1e-15)


def test_repeats_are_bit_equal():
    *tensors, labels = draw(33, 24, 1023, torch.float32)
    dy = torch.randn(33)
    first, first_grads = gradients(linear_cross_entropy, tensors, labels, dy)
    for _ in range(3):
        losses, grads = gradients(linear_cross_entropy, tensors, labels, dy)
        assert torch.equal(losses, first)
        assert all(torch.equal(value, first_grads[name]) for name, value in grads.items())


def test_many_chunks_do_not_drift(monkeypatch):
    """1000 equal contributions, one chunk each: a bf16 sum would stop growing after a quarter of them."""
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", 1)
    tensors = [t.bfloat16() for t in (torch.ones(1000, 2), torch.zeros(4, 2), torch.zeros(4))]
    _, grads = gradients(linear_cross_entropy, tensors, torch.zeros(1000, dtype=torch.int64), torch.ones(1000))
    expected = 1000 * (0.25 - 0.025 - 0.9 * F.one_hot(torch.tensor(0), 4)).bfloat16()
    torch.testing.assert_close(grads["dbias"], expected, rtol=0.01, atol=0)
    torch.testing.assert_close(grads["dweight"], expected[:, None].expand(4, 2), rtol=0.01, atol=0)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", 2 * 6)
    x, weight, bias, labels = draw(5, 3, 6)
    for trainable in ((True, True, True), (True, False, False)):
        tensors = [t.detach().requires_grad_(flag) for t, flag in zip((x, weight, bias), trainable, strict=True)]
        assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels), tensors)
        # sum() hands back one number expanded to all rows
        assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels).sum(), tensors)


class Watch(TorchDispatchMode):
    """Records the shapes of what every operator makes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.shapes += [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("trainable", ((True, True, True), (True, False, False)), ids=("all", "x"))
def test_logits_stay_within_a_chunk(trainable, monkeypatch):
    R, D, V = 64, 8, 1000
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", 5 * V)
    *tensors, labels = draw(R, D, V, torch.float32)
    with Watch() as watch:
        gradients(linear_cross_entropy, tensors, labels, torch.ones(R), trainable)
    rows = {shape[0] for shape in watch.shapes if len(shape) == 2 and shape[1] == V and shape[0] != D}
    assert max(rows) <= 5, f"logits of {max(rows)} rows exist at once"
    with Watch() as watch:
        gradients(plain_torch, tensors, labels, torch.ones(R), trainable)
    assert (R, V) in watch.shapes, "the measurement does not see plain torch's logits"


def test_frozen_weight_costs_nothing():
    """No tensor of the weight's shape is made, and dx alone is saved; thawing it brings its gradient back."""
    x, weight, bias, labels = draw(12, 8, 50, torch.float32)
    x.requires_grad_()

    def run():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), Watch() as watch:
            linear_cross_entropy(x, weight, bias, labels).sum().backward()
        return saved, watch.shapes

    saved, shapes = run()
    assert sum(t.nbytes for t in saved) == x.nbytes
    assert (50, 8) not in shapes
    weight.requires_grad_()
    saved, shapes = run()
    assert weight.grad is not None and (50, 8) in shapes
    # ZeRO-3 partitions the parameter again after forward: what is saved must be it, and not a view or copy
    assert any(t is weight for t in saved)
    weight.requires_grad_(False)
    assert (50, 8) not in run()[1]


def test_no_grad_saves_nothing():
    x, weight, bias, labels = draw(12, 8, 50, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    with torch.no_grad(), Watch() as watch:
        losses = linear_cross_entropy(x, weight, bias, labels)
    assert not losses.requires_grad and losses.grad_fn is None
    assert (12, 8) not in watch.shapes, "dx was computed for nobody"
    torch.testing.assert_close(losses, linear_cross_entropy(x, weight, bias, labels).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.zeros(2, 3, 4)), "do not fit"),
        (dict(x=torch.zeros(3, 5)), "do not fit"),
        (dict(bias=torch.zeros(8)), "do not fit"),
        (dict(labels=torch.zeros(2, dtype=torch.int64)), r"pass int64 of shape \(3,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int32)), "pass int64"),
        (dict(x=torch.zeros(3, 4, dtype=torch.bfloat16)), "same float"),
        (dict(label_smoothing=1.0), r"\[0, 1\)"),
    ),
)
def test_errors(change, message):
    good = dict(x=torch.zeros(3, 4), weight=torch.zeros(7, 4), bias=torch.zeros(7), labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})
