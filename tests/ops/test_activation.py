"""Proves that bias_activation is the formula, forward and every gradient, on every backend, in one pass.

Run: pytest tests/ops/test_activation.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import machine
from prismer.kernels.activation import ACTIVATIONS, bias_activation, bias_activation_op, bias_activation_reference
from prismer.kernels.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("native", "triton", "torch")
SHAPES = {  # R, D
    "one": (1, 1),
    "primes": (7, 61),
    "D60": (33, 60),
    "D1023": (5, 1023),
    "above-a-block": (9, 257),
    "BASE": (67, 768),
    "no-rows": (0, 48),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    if request.param == "native":
        reason = machine.native_missing()
        if reason is None and not hasattr(torch.ops.prismer_native, "bias_activation"):
            reason = "prismer._C was built before bias_activation was written"
        if reason is not None:
            pytest.skip(reason)
    with running(request.param):
        yield request.param


def draw(R, D, dtype):
    """Numbers on both sides of zero, and a bias large enough to matter."""
    return (2 * torch.randn(R, D)).to(dtype), (2 * torch.randn(D)).to(dtype)


def plain(h, bias, activation):
    """What a user would write."""
    u = h if bias is None else h + bias
    if activation == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    if activation.startswith("gelu"):
        return F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.relu(u).square()


def results(op, h, bias, activation, dtype, dy):
    """Output and gradients by name."""
    leaves = {"dh": h, "dbias": bias}
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items() if t is not None}
    y = op(leaves["dh"], leaves.get("dbias"), activation)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def compare(h, bias, activation, assert_no_worse):
    dtype = h.dtype
    dy = torch.randn(h.shape).to(dtype)
    got = results(bias_activation, h, bias, activation, dtype, dy)
    expected = results(plain, h, bias, activation, dtype, dy)
    assert all(value.dtype == dtype for value in got.values())
    assert_no_worse("", got, expected, lambda: results(plain, h, bias, activation, torch.float64, dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bias_activation(shape, activation, dtype, assert_no_worse):
    h, bias = draw(*shape, dtype)
    compare(h, bias, activation, assert_no_worse)


def test_more_blocks_of_rows_than_groups(assert_no_worse):
    """Then a program sums several blocks."""
    compare(*draw(2100, 256, torch.bfloat16), "squared_relu", assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_bias(activation, dtype, assert_no_worse):
    compare(draw(9, 61, dtype)[0], None, activation, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ("massive", "tiny", "zero", "tails"))
def test_hard_inputs(case, activation, dtype, assert_no_worse):
    h, bias = draw(9, 192, torch.float32)
    if case == "massive":
        h[:, 7], h[:, 8], bias[9] = 200, -200, 100
    elif case == "tiny":
        h, bias = h * 1e-4, bias * 1e-4
    elif case == "zero":
        h, bias = torch.zeros_like(h), torch.zeros_like(bias)
    else:
        h, bias = torch.linspace(-12, 12, 9 * 192).view(9, 192), torch.zeros_like(bias)
    compare(h.to(dtype), bias.to(dtype), activation, assert_no_worse)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay_visible(activation):
    """They do not become finite numbers, so that a failed run is noticed."""
    h = torch.tensor([[float("nan"), float("inf"), 1.0]])
    y = bias_activation(h, None, activation)
    assert y[0, 0].isnan() and not y[0, 1].isfinite() and y[0, 2].isfinite()


def test_the_reference_agrees_with_torch():
    h, bias = draw(7, 60, torch.float64)
    for activation in ACTIVATIONS:
        with use_backend("reference"):
            torch.testing.assert_close(bias_activation(h, bias, activation), plain(h, bias, activation))
        assert bias_activation_reference(h.bfloat16(), None, activation).dtype == torch.bfloat16


def test_parameters_in_fp32_beside_bf16(assert_no_worse):
    """A bias in fp32 over a bf16 stream, as with master weights; its gradient has its dtype."""
    h, bias = draw(11, 96, torch.float32)
    h, bias = h.bfloat16(), bias.requires_grad_()
    y = bias_activation(h, bias, "gelu")
    y.float().sum().backward()
    grad, bias = bias.grad, bias.detach()
    exact = lambda: plain(h.double(), bias.double(), "gelu")  # noqa: E731
    assert_no_worse("y", y.detach(), exact().bfloat16(), exact, inner=torch.float32)
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32


def test_tensors_may_have_any_strides():
    """Transposed inputs, more dimensions, an expanded gradient."""
    h, bias = draw(12, 60, torch.float32)
    h3 = h.view(3, 4, 60).transpose(0, 1)
    leaf, plain_leaf = h3.clone().requires_grad_(), h3.clone().requires_grad_()
    torch.testing.assert_close(bias_activation(h3, bias, "gelu"), plain(h3, bias, "gelu"))
    bias_activation(leaf, bias, "gelu").sum().backward()
    plain(plain_leaf, bias, "gelu").sum().backward()
    torch.testing.assert_close(leaf.grad, plain_leaf.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_alone_equals_its_row_in_a_batch_and_repeats(activation):
    """Bit for bit, and so do repeats of the gradient of the bias."""
    # torch's tanh GELU rounds the numbers after the last whole vectors in another way
    width = 64 if activation == "gelu_tanh" else 60
    h, bias = draw(300, width, torch.bfloat16)
    dy = torch.randn(300, width).bfloat16()
    first = results(bias_activation, h, bias, activation, torch.bfloat16, dy)
    again = results(bias_activation, h, bias, activation, torch.bfloat16, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for row in (0, 133, 299):
        one = slice(row, row + 1)
        alone = results(bias_activation, h[one], bias, activation, torch.bfloat16, dy[one])
        assert torch.equal(alone["y"], first["y"][one]) and torch.equal(alone["dh"], first["dh"][one])


def test_only_the_documented_tensors_are_saved():
    """They are h and the bias itself; nothing if nothing trains."""
    h, bias = draw(6, 32, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_activation(h, bias, "gelu")
        assert not saved
        bias_activation(h.requires_grad_(), bias.requires_grad_(), "gelu")
    assert sum(t.nbytes for t in saved) == h.nbytes + bias.nbytes
    assert any(t is bias for t in saved)


def test_a_frozen_bias_is_not_summed(count_calls):
    h, bias = draw(6, 32, torch.float32)
    with count_calls() as calls:
        bias_activation(h.requires_grad_(), bias, "gelu").sum().backward()
    assert calls["prismer::bias_activation_backward"][0]["sums"] is False
    with count_calls() as calls:
        bias_activation(h, bias.requires_grad_(), "gelu").sum().backward()
    assert calls["prismer::bias_activation_backward"][0]["sums"] is True


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    h, bias = draw(6, 32, torch.float32)
    h, bias = h.requires_grad_(requires_grad), bias.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.prismer.bias_activation, (h, bias, "quick_gelu"))
    torch.library.opcheck(torch.ops.prismer.bias_activation, (h.detach().view(32, 6).T.reshape(6, 32), None, "gelu"))
    for sums in (False, True):
        arguments = (torch.randn(32, 6).T, h.detach(), bias.detach(), "quick_gelu", sums)
        torch.library.opcheck(torch.ops.prismer.bias_activation_backward, arguments)


def test_compile():
    h, bias = (t.requires_grad_() for t in draw(6, 32, torch.float32))

    def step(h, bias):
        return bias_activation(h, bias, "quick_gelu").square().sum()

    expected = torch.autograd.grad(step(h, bias), (h, bias))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(h, bias), (h, bias)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    h, bias = (t.requires_grad_() for t in draw(3, 7, torch.float64))
    assert torch.autograd.gradcheck(lambda h, bias: bias_activation(h, bias, activation), (h, bias))
    assert torch.autograd.gradcheck(lambda h: bias_activation(h, None, activation), (h,))


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("bias", (False, True), ids=("bare", "biased"))
@pytest.mark.parametrize("R", (37, 513), ids=("one-group", "groups"))
def test_ledger(bias, R):
    """The bytes that the kernels move are those of the docstring; every address and every write is checked."""
    from tests.ops.interpreter import interpreted

    D = 300
    h, b = draw(R, D, torch.bfloat16)
    b = b if bias else None
    blocks = -(-R // 8)
    with interpreted() as ledger:
        bias_activation_op(h, b, "quick_gelu")
    assert ledger.bytes_read == R * D * 2 + bias * blocks * D * 2
    assert ledger.bytes_written == R * D * 2
    for sums in (False, True):
        with interpreted() as ledger:
            torch.ops.prismer.bias_activation_backward(h, h, b, "quick_gelu", sums)
        # with sums of up to 512 rows one program takes all rows of its columns; else there is a group for each block
        groups = 1 if sums and R == 37 else blocks
        partial = sums * (groups > 1) * 4 * groups * D
        assert ledger.bytes_read == 2 * R * D * 2 + bias * groups * D * 2 + partial
        assert ledger.bytes_written == R * D * 2 + partial + sums * 4 * D
        assert ledger.launches == 1 + sums * (groups > 1)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(h=torch.zeros(3, 4, dtype=torch.int64)), "pass floats"),
        (dict(h=torch.zeros(())), r"shape \(\.\.\., D\)"),
        (dict(bias=torch.zeros(5)), r"bias is .* pass floats of shape \(4,\)"),
        (dict(bias=torch.zeros(4, dtype=torch.int32)), "bias is torch.int32"),
        (dict(activation="relu"), "choose quick_gelu, gelu, squared_relu"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(h=torch.zeros(3, 4), bias=torch.zeros(4), activation="gelu")
    with pytest.raises(ValueError, match=message):
        bias_activation(**{**good, **change})
