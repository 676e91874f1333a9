"""Proves that layer_norm and add_layer_norm follow the textbook, forward and in every gradient, on every backend, and
that a frozen affine costs nothing.

Run: pytest tests/ops/test_layer_norm.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels.dispatch import use_backend
from prismer.kernels.layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("native", "triton", "torch")
SHAPES = {  # R, D
    "one": (1, 1),
    "primes": (7, 61),
    "D60": (33, 60),
    "D1023": (5, 1023),
    "above-a-block": (3, 1025),
    "BASE": (67, 768),
    "many-groups": (2100, 16),
    "no-rows": (0, 48),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "residual", "weight", "bias")


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


def draw(R, D, dtype, scale=2.0, offset=1.0):
    """Rows far from zero, and weight and bias large enough to matter."""
    x = scale * torch.randn(R, D, dtype=torch.float64) + offset
    residual = torch.randn(R, D, dtype=torch.float64) - 0.5
    weight = 1 + torch.randn(D, dtype=torch.float64)
    bias = 2 * torch.randn(D, dtype=torch.float64)
    return [t.to(dtype) for t in (x, residual, weight, bias)]


def plain(x, residual, weight, bias, eps=1e-5):
    """What a user would write."""
    total = x if residual is None else x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def ours(x, residual, weight, bias, eps=1e-5):
    if residual is None:
        return layer_norm(x, weight, bias, eps), x
    return add_layer_norm(x, residual, weight, bias, eps)


def results(op, tensors, dtype, dy, dtotal, trainable=(True,) * 4):
    """Outputs and gradients by name; the total has a gradient of its own only if the op returns it."""
    leaves = [None if t is None else t.to(dtype).requires_grad_(f) for t, f in zip(tensors, trainable, strict=True)]
    y, total = op(*leaves)
    loss = (y * dy.to(dtype)).sum()
    if leaves[1] is not None:
        loss = loss + (total * dtotal.to(dtype)).sum()
    wanted = {
        "d" + name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None and leaf.requires_grad
    }
    grads = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    return {"y": y.detach(), "total": total.detach(), **grads}


def compare(tensors, dtype, assert_no_worse, trainable=(True,) * 4):
    low = [None if t is None else t.to(dtype) for t in tensors]
    dy, dtotal = (torch.randn(low[0].shape).to(dtype) for _ in range(2))
    # the sum is rounded before it is normalised, so the exact result is that of the rounded sum
    exact_inputs = list(low)
    got = results(ours, low, dtype, dy, dtotal, trainable)
    expected = results(plain, low, dtype, dy, dtotal, trainable)
    if low[1] is not None:
        assert torch.equal(got["total"], expected["total"]), "total is not x + residual, rounded once"
        exact_inputs[:2] = got["total"].double(), torch.zeros_like(low[1], dtype=torch.float64)
    assert all(value.dtype == dtype for value in got.values())
    assert_no_worse("", got, expected, lambda: results(plain, exact_inputs, torch.float64, dy, dtotal, trainable))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", (False, True), ids=("alone", "add"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layer_norm(shape, residual, dtype, assert_no_worse):
    tensors = draw(*shape, dtype)
    if not residual:
        tensors[1] = None
    compare(tensors, dtype, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ("offset", "massive", "tiny", "constant"))
def test_hard_inputs(case, dtype, assert_no_worse):
    """A large common offset, a massive activation, tiny and constant rows, for which a one-pass variance fails."""
    x, residual, weight, bias = draw(9, 192, torch.float64)
    if case == "offset":
        # on a grid, fp32 sums are exact in any order, and only the variance can be wrong
        x = (64 * x).round() / 64 + 100
        residual = (64 * residual).round() / 64
    elif case == "massive":
        x[:, 7] = 3000
    elif case == "tiny":
        x, residual = x * 1e-3, residual * 1e-3
    else:
        x, residual = torch.full_like(x, 3.0), torch.zeros_like(x)
    for tensors in ((x, residual, weight, bias), (x, None, weight, bias)):
        compare([None if t is None else t.to(dtype) for t in tensors], dtype, assert_no_worse)


def test_the_reference_agrees_with_torch():
    tensors = draw(7, 60, torch.float64)
    for op, expected in ((add_layer_norm_reference, plain), (ours, plain)):
        with use_backend("reference"):
            for a, b in zip(op(*tensors), expected(*tensors), strict=True):
                torch.testing.assert_close(a, b)
    x = tensors[0].bfloat16()
    assert layer_norm_reference(x, None, None).dtype == torch.bfloat16


def test_weight_bias_and_eps_are_optional(assert_no_worse):
    x, residual, weight, bias = draw(5, 60, torch.float32)
    for w, b in ((None, None), (weight, None), (None, bias)):
        high = x.double(), None, *(None if t is None else t.double() for t in (w, b))
        expected = plain(x, None, w, b, 0.5)[0]
        assert_no_worse("y", layer_norm(x, w, b, 0.5), expected, lambda high=high: plain(*high, 0.5)[0])
    leaf = x.clone().requires_grad_()
    leaf64 = x.double().requires_grad_()
    plain_leaf = x.clone().requires_grad_()
    layer_norm(leaf, None, None).square().sum().backward()
    (plain(leaf64, None, None, None)[0] * plain(x.double(), None, None, None)[0] * 2).sum().backward()
    # the sum of y^2 is constant but for eps, so the gradient is nearly 0
    assert leaf.grad.abs().max() < 1e-4 and plain_leaf.grad is None


def test_parameters_in_fp32_beside_bf16(assert_no_worse):
    """Weight and bias in fp32 over a bf16 stream, as with master weights; their gradients have their dtype."""
    x, residual, weight, bias = draw(11, 96, torch.float32)
    x, residual = x.bfloat16(), residual.bfloat16()
    leaves = [t.clone().requires_grad_() for t in (weight, bias)]
    y, total = add_layer_norm(x, residual, *leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32
    high = total.double(), None, weight.double(), bias.double()
    expected = plain(total.float(), None, weight, bias)[0].bfloat16()
    assert_no_worse("y", y, expected, lambda: plain(*high)[0], inner=torch.float32)
    assert torch.equal(leaves[1].grad, torch.full_like(bias, 11.0))


def test_tensors_may_have_any_strides(assert_no_worse):
    """Transposed and expanded inputs, more dimensions, an expanded gradient."""
    x, residual, weight, bias = draw(12, 60, torch.float32)
    x3 = x.view(3, 4, 60).transpose(0, 1)
    y, total = add_layer_norm(x3, residual[:1].expand(4, 3, 60), weight, bias)
    expected = plain(x3, residual[:1].expand(4, 3, 60), weight, bias)
    torch.testing.assert_close(y, expected[0])
    assert torch.equal(total, expected[1])
    leaf = x.clone().requires_grad_()
    layer_norm(leaf, weight, bias).sum().backward()
    plain_leaf = x.clone().requires_grad_()
    plain(plain_leaf, None, weight, bias)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, plain_leaf.grad)


def test_gradients_if_only_the_sum_is_used():
    """If y is dropped, the gradient of either summand is that of the sum."""
    x, residual, weight, bias = (t.requires_grad_() for t in draw(4, 16, torch.float32))
    _, total = add_layer_norm(x, residual, weight, bias)
    dtotal = torch.randn_like(total)
    total.backward(dtotal)
    assert torch.equal(x.grad, dtotal) and torch.equal(residual.grad, dtotal)


def test_a_row_alone_equals_its_row_in_a_batch_and_repeats(on_backend):
    """Bit for bit, and so do repeats of the gradients of weight and bias."""
    tensors = draw(700, 60, torch.bfloat16)
    dy, dtotal = torch.randn(2, 700, 60).bfloat16()
    first = results(ours, tensors, torch.bfloat16, dy, dtotal)
    again = results(ours, tensors, torch.bfloat16, dy, dtotal)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for row in (0, 333, 699):
        one = slice(row, row + 1)
        alone = results(ours, [t[one] for t in tensors[:2]] + tensors[2:], torch.bfloat16, dy[one], dtotal[one])
        for name in ("y", "total", "dx"):
            assert torch.equal(alone[name], first[name][one]), name


@pytest.mark.parametrize("affine", (False, True), ids=("frozen", "trained"))
def test_only_the_documented_tensors_are_saved(affine):
    """They are x (or the sum), the weight, and two numbers a row; nothing if nothing trains."""
    x, residual, weight, bias = draw(6, 32, torch.bfloat16)
    for t in (weight, bias):
        t.requires_grad_(affine)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias)
        before = len(saved)
        layer_norm(x.requires_grad_(), weight, bias)
    assert bool(before) == affine
    assert sum(t.nbytes for t in saved[before:]) == x.nbytes + weight.nbytes + 2 * 4 * 6
    assert any(t is weight for t in saved[before:]) or not affine


def test_a_frozen_affine_is_not_reduced(count_calls):
    x, _, weight, bias = draw(6, 32, torch.float32)
    with count_calls() as calls:
        layer_norm(x.requires_grad_(), weight, bias).sum().backward()
    assert calls["prismer::layer_norm_backward"][0]["affine"] is False
    with count_calls() as calls:
        layer_norm(x, weight.requires_grad_(), bias).sum().backward()
    assert calls["prismer::layer_norm_backward"][0]["affine"] is True


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    x, residual, weight, bias = draw(6, 32, torch.float32)
    x, weight = x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.prismer.layer_norm, (x, residual, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.prismer.layer_norm, (x.view(32, 6).T.reshape(6, 32), None, None, None, 1e-5))
    with torch.no_grad():
        y, total, mean, rstd = torch.ops.prismer.layer_norm(x, residual, weight, bias, 1e-5)
        for affine in (False, True):
            arguments = (y.T.contiguous().T, total, total, weight, mean, rstd, affine)
            torch.library.opcheck(torch.ops.prismer.layer_norm_backward, arguments)


def test_compile():
    x, residual, weight, bias = (t.requires_grad_() for t in draw(6, 32, torch.float32))

    def step(x, residual, weight, bias):
        y, total = add_layer_norm(x, residual, weight, bias)
        return (y * total).sum()

    expected = torch.autograd.grad(step(x, residual, weight, bias), (x, residual, weight, bias))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, residual, weight, bias), (x, residual, weight, bias))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
def test_gradcheck():
    tensors = [t.requires_grad_() for t in draw(3, 7, torch.float64)]
    assert torch.autograd.gradcheck(add_layer_norm, tensors)
    assert torch.autograd.gradcheck(layer_norm, (tensors[0], *tensors[2:]))
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, None, None), tensors[:1])


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("residual", (False, True), ids=("alone", "add"))
def test_ledger(residual):
    """The bytes that the kernels move are those of the docstring; every address and every write is checked."""
    from tests.ops.interpreter import interpreted

    R, D = 37, 60
    x, res, weight, bias = draw(R, D, torch.bfloat16)
    res = res if residual else None
    with interpreted() as ledger:
        y, total, mean, rstd = torch.ops.prismer.layer_norm(x, res, weight, bias, 1e-5)
    blocks = -(-R // 16)
    assert ledger.bytes_read == (1 + residual) * R * D * 2 + blocks * 2 * D * 2
    assert ledger.bytes_written == (1 + residual) * R * D * 2 + 8 * R
    total = total if residual else x
    dtotal = torch.randn_like(x) if residual else None
    for affine in (False, True):
        with interpreted() as ledger:
            torch.ops.prismer.layer_norm_backward(torch.randn_like(x), dtotal, total, weight, mean, rstd, affine)
        # as many groups as blocks of rows: there are few
        groups = -(-R // 32)
        read = (2 + residual) * R * D * 2 + groups * D * 2 + 8 * R
        assert ledger.bytes_read == read + affine * 8 * groups * D
        assert ledger.bytes_written == R * D * 2 + affine * (8 * groups * D + 4 * D)
        assert ledger.launches == 1 + affine


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.zeros(3, 4, dtype=torch.int64)), "pass floats"),
        (dict(weight=torch.zeros(5)), r"weight is .* pass floats of shape \(4,\)"),
        (dict(bias=torch.zeros(4, 1)), "bias is"),
        (dict(residual=torch.zeros(2, 4)), r"pass torch.float32 of shape \(3, 4\)"),
        (dict(residual=torch.zeros(3, 4).double()), "like x"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(x=torch.zeros(3, 4), residual=torch.zeros(3, 4), weight=torch.zeros(4), bias=torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**good, **change})
