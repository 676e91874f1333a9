"""Proves the matrix product kernel: every prologue and epilogue, every stride, every edge of its tiles, and its cost.

Run: pytest tests/ops/test_gemm.py
"""

import pytest
import torch

from prismer.kernels import gemm as module
from prismer.kernels.activation import bias_activation_reference
from prismer.kernels.gemm import gemm, gemm_derivative, gemm_gradient
from tests.ops.product_ledger import check, product

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # R, N, K
    "ones": (1, 1, 1),
    "primes": (7, 61, 5),
    "a-tile": (64, 64, 64),
    "above-a-tile": (65, 65, 65),
    "D60": (33, 60, 130),
    # ten rows of tiles, so that the last group of programs is not full
    "groups": (577, 65, 9),
    "no-rows": (0, 8, 8),
}


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


def draw(*shape, dtype):
    return torch.randn(shape).to(dtype)


def act(u, name):
    if name == "none":
        return u
    return torch.relu(u) if name == "relu" else bias_activation_reference(u, None, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gemm(shape, dtype, on_backend, assert_no_worse):
    R, N, K = shape
    a, weight, bias, residual = (draw(*s, dtype=dtype) for s in ((R, K), (N, K), (N,), (R, N)))
    c, h = gemm(a, weight, None, backend=on_backend)
    assert h is None
    assert_no_worse("c", c, a @ weight.T, lambda: a.double() @ weight.double().T)
    for activation, square in (("quick_gelu", False), ("none", True), ("relu", False)):
        operand = a.square() if square else a

        def plain(dtype, operand=operand, activation=activation):
            left, right, offset, more = (t.to(dtype) for t in (operand, weight, bias, residual))
            return act(left @ right.T + offset, activation) + more

        c, h = gemm(a, weight, bias, backend=on_backend, activation=activation, residual=residual, square=square)
        assert c.is_contiguous() and c.dtype == dtype and h is None
        assert_no_worse(f"c {activation}", c, plain(dtype), lambda plain=plain: plain(torch.float64))


@pytest.mark.parametrize("activation", ("quick_gelu", "gelu", "squared_relu"))
def test_the_kept_product_has_no_bias(activation, on_backend, assert_no_worse):
    """The backward pass adds the bias again."""
    a, weight, bias = (draw(*s, dtype=torch.bfloat16) for s in ((33, 70), (65, 70), (65,)))
    c, h = gemm(a, weight, bias, backend=on_backend, activation=activation, keep=True)

    def plain(dtype):
        product = a.to(dtype) @ weight.to(dtype).T
        return dict(h=product, c=act(product + bias.to(dtype), activation))

    assert_no_worse("", dict(h=h, c=c), plain(torch.bfloat16), lambda: plain(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", (False, True), ids=("bare", "biased"))
@pytest.mark.parametrize("activation", ("quick_gelu", "gelu", "squared_relu"))
def test_gemm_derivative(activation, biased, dtype, on_backend, assert_no_worse):
    R, N, K = 67, 61, 70
    dy, weight, h = (draw(*s, dtype=dtype) for s in ((R, N), (N, K), (R, K)))
    bias = draw(K, dtype=dtype) if biased else None

    def results(compute):
        leaf = h.to(compute).requires_grad_()
        a = act(leaf if bias is None else leaf + bias.to(compute), activation)
        (dh,) = torch.autograd.grad(a, leaf, dy.to(compute) @ weight.to(compute))
        return dh, a.detach(), dh.sum(0)

    got = gemm_derivative(
        dy, weight, h, bias, backend=on_backend, activation=activation, activated=True, sums=torch.float32
    )
    named = lambda tensors: dict(zip(("dh", "a", "sums"), tensors, strict=True))  # noqa: E731
    assert_no_worse("", named(got), named(results(dtype)), lambda: named(results(torch.float64)), factor=3.0)
    assert got[2].dtype == torch.float32
    dh, a, sums = gemm_derivative(dy, weight, h, bias, backend=on_backend, activation=activation)
    assert torch.equal(dh, got[0]) and not a.numel() and not sums.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("square", (False, True), ids=("plain", "squared"))
def test_gemm_gradient(square, dtype, on_backend, assert_no_worse):
    for R, N, K in ((67, 61, 70), (0, 3, 4), (1, 65, 1)):
        dy, a = draw(R, N, dtype=dtype), draw(R, K, dtype=dtype)
        operand = a.square() if square else a
        got = gemm_gradient(dy, a, backend=on_backend, square=square)
        high = dy.double(), operand.double()
        assert_no_worse("dweight", got, dy.T @ operand, lambda high=high: high[0].T @ high[1])


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_fp32_is_not_multiplied_in_tf32(dtype, on_backend):
    """Products of small integers are exact in fp32, and would not be in tf32 beyond 2048."""
    a = torch.randint(-3000, 3000, (17, 40)).to(dtype)
    identity = torch.eye(40).to(dtype)
    assert torch.equal(gemm(a, identity, None, backend=on_backend)[0], a)


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_tiles_of_large_products(monkeypatch, assert_no_worse):
    """The interpreter could not finish a product that is large enough to choose them."""
    large = module._tiles(128 * 96, 128, torch.bfloat16)
    assert large != module._tiles(64, 64, torch.bfloat16)
    a, weight, bias, residual = (draw(*s, dtype=torch.bfloat16) for s in ((260, 70), (130, 70), (130,), (260, 130)))
    small = gemm(a, weight, bias, backend="triton", activation="relu", residual=residual)[0]
    monkeypatch.setattr(module, "_tiles", lambda *_: large)
    c = gemm(a, weight, bias, backend="triton", activation="relu", residual=residual)[0]

    def plain(*tensors):
        a, weight, bias, residual = tensors
        return torch.relu(a @ weight.T + bias) + residual

    tensors = a, weight, bias, residual
    assert_no_worse("c", c, plain(*tensors), lambda: plain(*(t.double() for t in tensors)))
    # a row is summed in the same order, whatever tiles the number of rows chooses
    assert torch.equal(c, small)


def test_the_order_of_summation_does_not_depend_on_the_batch():
    for dtype in DTYPES:
        orders = {module._tiles(M, N, dtype)["BK"] for M in (1, 300, 10000) for N in (1, 768, 4096)}
        assert len(orders) == 1


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_a_row_alone_equals_its_row_in_a_batch_and_repeats():
    a, weight, bias = (draw(*s, dtype=torch.bfloat16) for s in ((130, 70), (61, 70), (61,)))
    first = gemm(a, weight, bias, backend="triton", activation="gelu")[0]
    assert torch.equal(first, gemm(a, weight, bias, backend="triton", activation="gelu")[0])
    for row in (0, 64, 129):
        alone = gemm(a[row : row + 1], weight, bias, backend="triton", activation="gelu")[0]
        assert torch.equal(alone, first[row : row + 1])


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ledger(dtype):
    """FLOPs and bytes are those of the docstring; every address and every write is checked."""
    from tests.ops.interpreter import interpreted

    R, N, K = 67, 130, 61
    s = dtype.itemsize
    a, weight, bias, c = (draw(*shape, dtype=dtype) for shape in ((R, K), (N, K), (N,), (R, N)))
    with interpreted() as ledger:
        gemm(a, weight, None, backend="triton")
    check(ledger, product(R, N, K, dtype))
    with interpreted() as ledger:
        gemm(a, weight, bias, backend="triton", activation="gelu", keep=True, residual=c)
    check(ledger, product(R, N, K, dtype, bias=s, read=1, written=1))
    with interpreted() as ledger:
        gemm_derivative(
            a, weight.T.contiguous(), c, bias, backend="triton", activation="gelu", activated=True, sums=dtype
        )
    # the activation reads h once more
    check(ledger, product(R, N, K, dtype, bias=s, read=2, written=1, sums=s))
    with interpreted() as ledger:
        gemm_gradient(c, a, backend="triton", square=True)
    check(ledger, product(N, K, R, dtype))
