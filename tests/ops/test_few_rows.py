"""Proves that products of few rows are exact on every instruction set, that a row has the same bits alone and in any
batch, that nothing beyond a row of weights is read, and where the products of the model run on them.

Run: pytest tests/ops/test_few_rows.py
"""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prismer.costs.counting import CostCounter
from prismer.kernels import few_rows, matmul
from prismer.kernels.adaptor import adaptor
from prismer.kernels.dispatch import as_if_watched, use_backend
from prismer.kernels.few_rows import MOST_ROWS, few_rows_linear, few_rows_serves
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from tests.ops.native_sets import HERE

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# inputs around the steps of every format: 4 to 64 numbers, and a whole cache line of them
WIDTHS = (1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 131, 768)
# outputs around four, eight and sixteen
OUTPUTS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 37)
# tiles of one to six rows, alone and after others
ROWS = (1, 2, 3, 4, 5, 6, 7, 9, 13)


def native(x, weight, scale, bias):
    return torch.ops.prismer_native.few_rows_linear(x, weight, scale, bias)


def draw(R, N, K, dtype):
    """Weights and a bias that are large enough to matter."""
    x, weight, bias = torch.randn(R, K), torch.randn(N, K), 3 * torch.randn(N)
    return [t.to(dtype) for t in (x, weight, bias)]


def draw_int8(R, N, K, dtype=torch.float32):
    """The whole range of weights, in rows of x and channels of very different sizes."""
    x = (torch.randn(R, K) * torch.logspace(-2, 1, R)[:, None]).to(dtype)
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return x, weight, torch.logspace(-2, 0, N), 3 * torch.randn(N)


def check(x, weight, bias, assert_no_worse, y=None):
    y = native(x, weight, None, bias) if y is None else y
    assert y.is_contiguous() and y.dtype == x.dtype
    high = x.double(), weight.double(), None if bias is None else bias.double()
    assert_no_worse("y", y, F.linear(x, weight, bias), lambda: F.linear(*high))


def name_of(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


# the native kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("K", WIDTHS)
def test_every_width(isa, K, dtype, assert_no_worse):
    x, weight, bias = draw(7, 21, K, dtype)
    check(x, weight, bias, assert_no_worse)
    check(x[:1], weight, None, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("N", OUTPUTS)
def test_every_number_of_outputs(isa, N, dtype, assert_no_worse):
    x, weight, bias = draw(13, N, 70, dtype)
    for R in ROWS:
        check(x[:R], weight, bias, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(isa, dtype, assert_no_worse):
    x, weight, bias = draw(MOST_ROWS, 37, 150, dtype)
    alone = torch.cat([native(row[None], weight, None, bias) for row in x])
    check(x, weight, bias, assert_no_worse, alone)
    for R in range(1, MOST_ROWS + 1):
        assert torch.equal(native(x[:R], weight, None, bias), alone[:R]), f"{R} rows"
        assert torch.equal(native(x[-R:], weight, None, bias), alone[-R:]), f"the last {R} rows"
    # nor do the bits depend on the other outputs
    for N in range(1, 37):
        assert torch.equal(native(x[:5], weight[N:], None, bias[N:]), alone[:5, N:]), f"outputs from {N}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_many_outputs(isa, dtype, assert_no_worse):
    """Read as several streams of weights, with the bits of 16 outputs alone."""
    x, weight, bias = draw(MOST_ROWS, 300, 70, dtype)
    x8, weight8, scale, bias8 = draw_int8(MOST_ROWS, 300, 70, dtype)
    for R in (1, 2, 3, 4, 7, 13, MOST_ROWS):
        check(x[:R], weight, bias, assert_no_worse)
        pieces = [native(x[:R], weight[i : i + 16], None, bias[i : i + 16]) for i in range(0, 300, 16)]
        assert torch.equal(native(x[:R], weight, None, bias), torch.cat(pieces, 1))
        y8 = native(x8[:R], weight8, scale, bias8)
        for i in range(0, 300, 16):
            part = slice(i, i + 16)
            assert torch.equal(y8[:, part], native(x8[:R], weight8[part], scale[part], bias8[part]))


@pytest.mark.parametrize("int8", (False, True), ids=("float", "int8"))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype, int8):
    x, weight, bias = draw(9, 2003, 200, dtype)
    scale = None
    if int8:
        x, weight, scale, bias = draw_int8(9, 2003, 200, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(x, weight, scale, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_operands_may_have_strides(isa, dtype, assert_no_worse):
    """Rows of wider matrices, every second row, one row again and again; around them lie NaN."""
    wide = torch.full((40, 110), math.nan, dtype=dtype)
    wide[:, 3:80] = torch.randn(40, 77).to(dtype)
    bias = torch.randn(40).to(dtype)
    inner = wide[:, 3:80]
    for x, weight in (
        (inner[:5], inner[5:27]),
        (inner[:10:2], inner[11::3]),
        (inner[:1], inner[1:2].expand(19, -1)),
        (inner[:3].clone(), inner),
    ):
        check(x, weight, bias[: len(weight)], assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("at", (0, 40, 69))
def test_nan_and_infinity_stay_in_their_row_and_output(isa, at, bad, dtype):
    x, weight, bias = draw(7, 21, 70, dtype)
    x[2, at] = bad
    y = native(x, weight, None, bias)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4, 5, 6]].isfinite().all()
    x, weight, bias = draw(7, 21, 70, dtype)
    weight[17, at] = bad
    y = native(x, weight, None, bias)
    assert not y[:, 17].isfinite().any() and y[:, :17].isfinite().all() and y[:, 18:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_difficult_numbers(isa, dtype, assert_no_worse):
    """A few huge activations among ordinary ones, sums that cancel, a large bias."""
    x, weight, bias = draw(9, 40, 768, dtype)
    x[:, ::100] *= 300
    x[:, 384:] = -x[:, :384] + 0.01 * x[:, 384:]
    weight[:, 384:] = weight[:, :384]
    check(x, weight, 100 * bias, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_instruction_sets_agree(monkeypatch, dtype):
    """They differ in the order of sums and in fused multiply-adds."""
    x, weight, bias = draw(5, 33, 768, dtype)
    found = []
    for name in HERE:
        monkeypatch.setenv("PRISMER_CPU_ISA", name)
        found.append(native(x, weight, None, bias).double())
    sizes = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + bias.abs()
    for other in found[1:]:
        error = (other - found[0]).abs()
        assert (error <= 1e-5 * sizes + 2 * torch.finfo(dtype).eps * found[0].abs()).all()


# int8


def exact_int8(x, weight, scale, bias):
    # in the dtype of x: in float64 a number halfway between two steps may round to the other one
    x8, steps = few_rows._quantised(x)
    return (x8.double() @ weight.double().T) * scale.double() * steps.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("K", WIDTHS)
def test_every_width_of_int8(isa, K, dtype):
    for R, N in ((1, 21), (2, 9), (7, 37)):
        x, weight, scale, bias = draw_int8(R, N, K, dtype)
        y = native(x, weight, scale, bias)
        exact = exact_int8(x, weight, scale, bias)
        assert y.dtype == dtype and y.shape == (R, N)
        largest = bias.abs().max().item()
        torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 * largest)
        torch.testing.assert_close(native(x, weight, scale, None), native(x, weight, scale, torch.zeros(N)))


def test_int8_sums_are_exact_and_the_same_on_every_set(monkeypatch):
    """Even where all products have the largest size and one sign."""
    x, weight, scale, _ = draw_int8(MOST_ROWS, 37, 1000)
    x[0], weight[0] = 1, 127
    x[1], weight[1] = -1, -128
    found = []
    for name in HERE:
        monkeypatch.setenv("PRISMER_CPU_ISA", name)
        found.append(native(x, weight, scale, None))
    assert all(torch.equal(y, found[0]) for y in found)
    x8, steps = few_rows._quantised(x)
    sums = (x8.long() @ weight.long().T).float()
    assert torch.equal(found[0], sums * scale * steps)


def test_int8_rounds_to_the_nearest_step_and_ties_to_even(isa):
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 3.4999, -126.6], [0] * 8, [2e-45] + [0.0] * 7])
    y = native(x, torch.eye(8).to(torch.int8), torch.ones(8), None)
    assert y[0].tolist() == [127, 0, 2, 2, 0, -2, 3, -127]
    assert y[1].tolist() == [0] * 8 and y[2].tolist() == [0] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_an_int8_row_has_the_same_bits_alone_and_in_every_batch(isa, dtype):
    x, weight, scale, bias = draw_int8(MOST_ROWS, 37, 150, dtype)
    alone = torch.cat([native(row[None], weight, scale, bias) for row in x])
    for R in range(1, MOST_ROWS + 1):
        assert torch.equal(native(x[:R], weight, scale, bias), alone[:R]), f"{R} rows"


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("at", (0, 13, 69))
def test_an_int8_row_with_nan_or_infinity_is_nan(isa, at, bad):
    """A NaN stays one whatever follows it in the row."""
    x, weight, scale, bias = draw_int8(3, 21, 70)
    x[1, at] = bad
    y = native(x, weight, scale, bias)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


# an array whose last byte is the last one before memory that must not be read
GUARDED = """
import ctypes, math, mmap, torch
from prismer.kernels.machine import native_missing
assert native_missing() is None
libc, kept = ctypes.CDLL(None, use_errno=True), []
def guarded(t):
    size = (t.nbytes // mmap.PAGESIZE + 1) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape).copy_(t)
def check(x, weight, scale, bias):
    product = torch.ops.prismer_native.few_rows_linear
    there = [None if t is None else guarded(t) for t in (x, weight, scale, bias)]
    assert torch.equal(product(*there), product(x, weight, scale, bias))
for R in (1, 3, 7):
    for K in (5, 64, 67, 131):
        for N in (1, 3, 7, 15, 16, 31, 125, 143):
            x, weight, bias = torch.randn(R, K), torch.randn(N, K), torch.randn(N)
            check(x, weight, None, bias)
            check(x.bfloat16(), weight.bfloat16(), None, bias.bfloat16())
            check(x, (20 * weight).to(torch.int8), bias.abs(), bias)
# no clean-up: tensors look into the memory
import os; os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory after the arrays is protected as on Linux")
def test_nothing_beyond_the_operands_is_read(isa):
    """In a process of its own, which ends at such a read."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.ones(4)), r"x is \(4\) float32; expected \(up to 64 rows"),
        (dict(x=torch.ones(65, 4)), r"x is \(65, 4\)"),
        (dict(x=torch.ones(4, 3).T), "dense last dimension"),
        (dict(x=torch.ones(3, 4).double()), "float64"),
        (dict(weight=torch.ones(5, 3)), r"weight is \(5, 3\) float32; expected \(outputs, 4\)"),
        (dict(weight=torch.ones(5, 4).half()), "float16"),
        (dict(weight=torch.ones(4, 5).T), "dense last dimension"),
        (dict(weight=torch.ones(5, 4, dtype=torch.int8)), "weight is int8; int8 has a scale"),
        (dict(scale=torch.ones(5)), "no other dtype has one"),
        (dict(bias=torch.ones(4)), r"bias is \(4\) float32; expected \(5\)"),
        (dict(bias=torch.ones(5).half()), "float16"),
        (dict(bias=torch.ones(10)[::2]), "bias .* is not contiguous"),
        (dict(x=torch.ones(1, 70000), weight=torch.ones(5, 70000).to(torch.int8), scale=torch.ones(5)), "up to 65536"),
    ),
)
def test_the_kernel_refuses(change, message):
    given = dict(x=torch.ones(3, 4), weight=torch.ones(5, 4), scale=None, bias=None)
    with pytest.raises(RuntimeError, match=message):
        native(*(given | change).values())


# the op


@pytest.mark.parametrize("backend", (None, "native", "torch", "reference"))
def test_backends_agree(backend):
    x, weight, bias = draw(6, 21, 70, torch.float32)
    x8, weight8, scale, bias8 = draw_int8(6, 21, 70)
    with use_backend(backend):
        y = few_rows_linear(x.view(2, 3, 70), weight, bias)
        y8 = few_rows_linear(x8.view(2, 3, 70), weight8, bias8, scale)
    torch.testing.assert_close(y, F.linear(x, weight, bias).view(2, 3, 21))
    exact = exact_int8(x8, weight8, scale, bias8).float()
    torch.testing.assert_close(y8, exact.view(2, 3, 21), rtol=1e-5, atol=1e-4)


def test_calls_that_the_kernel_does_not_serve_are_torchs():
    """More rows, float64, weights in columns, no rows, no outputs."""
    for shape, dtype in (((65, 5, 7), torch.float32), ((3, 5, 7), torch.float64)):
        x, weight, bias = draw(*shape, dtype)
        assert torch.equal(few_rows_linear(x, weight, bias), F.linear(x, weight, bias))
    x, weight, bias = draw(3, 5, 7, torch.float32)
    columns = weight.T.contiguous().T
    torch.testing.assert_close(few_rows_linear(x, columns, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(few_rows_linear(x.T.contiguous().T, weight), F.linear(x, weight))
    assert few_rows_linear(x[:0], weight, bias).shape == (0, 5) and few_rows_linear(x, weight[:0]).shape == (3, 0)
    x8, weight8, scale, bias8 = draw_int8(65, 21, 70)
    torch.testing.assert_close(few_rows_linear(x8, weight8, bias8, scale)[:64], native(x8[:64], weight8, scale, bias8))
    with use_backend("native"), pytest.raises(RuntimeError, match="up to 64 rows"):
        few_rows_linear(x8, weight8, bias8, scale)


def test_a_gradient_is_torchs():
    x, weight, bias = draw(3, 5, 7, torch.float32)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
        few_rows_linear(x, weight, bias).sum().backward()
        assert leaf.grad.isfinite().all()
        leaf.requires_grad_(False)
    x8, weight8, scale, bias8 = draw_int8(3, 5, 7)
    with pytest.raises(ValueError, match="int8 products have no gradient"):
        few_rows_linear(x8.requires_grad_(), weight8, bias8, scale)
    with torch.no_grad():
        few_rows_linear(x8, weight8, bias8, scale)


def test_opcheck_and_compile():
    x, weight, bias = draw(3, 21, 70, torch.float32)
    x8, weight8, scale, bias8 = draw_int8(3, 21, 70)
    for arguments in ((x, weight, bias, None), (x.T.contiguous().T, weight, None, None), (x8, weight8, bias8, scale)):
        torch.library.opcheck(torch.ops.prismer.few_rows_linear, arguments)
        compiled = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), few_rows_linear(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.ones(3, 4, dtype=torch.int64)), r"x is torch.int64 .* pass floats"),
        (dict(weight=torch.ones(5, 3)), r"weight is .*\(5, 3\).* of shape \(N, 4\)"),
        (dict(weight=torch.ones(5, 4).half()), "weight is torch.float16.* pass torch.float32"),
        (dict(weight=torch.ones(5, 4).to(torch.int8)), "pass a scale with int8 weights"),
        (dict(scale=torch.ones(5)), "and none with others"),
        (dict(bias=torch.ones(4)), r"bias is .*\(4,\)"),
        (dict(bias=torch.ones(5).half()), "bias is torch.float16"),
        (dict(weight=torch.ones(5, 4).to(torch.int8), scale=torch.ones(4)), r"scale is .*\(4,\)"),
        (dict(weight=torch.ones(5, 4).to(torch.int8), scale=torch.ones(5).double()), "scale is torch.float64"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    given = dict(x=torch.ones(3, 4), weight=torch.ones(5, 4), bias=None, scale=None)
    with pytest.raises(ValueError, match=message):
        few_rows_linear(**given | change)


# where it is used

# wide enough for the rule in every dtype
K, N = 740, 736


@pytest.fixture
def seen(count_calls):
    """A function that tells how many native products of few rows a call makes, as if nothing watched it."""

    def count(call):
        with torch.no_grad(), count_calls() as calls, as_if_watched(False):
            call()
        return len(calls["prismer_native::few_rows_linear"])

    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_products_of_few_rows_run_on_it(seen, dtype):
    x, weight, bias = draw(3, N, K, dtype)
    back, back_bias = torch.randn(K, N).to(dtype), torch.randn(K).to(dtype)
    assert seen(lambda: matmul.linear(x, weight, bias)) == 1
    assert seen(lambda: matmul.linear(x[None], weight)) == 1
    assert seen(lambda: linears(x[None], [(weight, bias), (weight, None)])) == 2
    assert seen(lambda: mlp(x, weight, bias, back, back_bias, activation="gelu")) == 2
    assert seen(lambda: mlp(x, weight, bias, back, back_bias, activation="quick_gelu")) == 2
    square, norm = torch.randn(N, N).to(dtype), torch.ones(N, dtype=dtype)
    h = torch.randn(3, N).to(dtype)
    assert seen(lambda: adaptor(h, norm, norm, square, norm, square, norm, late=True)) == 2


def test_a_weight_that_zero_partitions_is_read_where_it_is_gathered(seen):
    x, weight, bias = draw(3, N, K, torch.float32)
    weight = nn.Parameter(weight)
    weight.ds_id = 1  # DeepSpeed's mark
    assert seen(lambda: linears(x, [(weight, bias)])) == 1


def test_what_does_not_run_on_it():
    x, weight, bias = draw(65, N, K, torch.float32)
    few = x[:3]
    assert few_rows_serves(few, weight) and few_rows_serves(x[:64].view(8, 8, K), weight)
    assert not few_rows_serves(x, weight) and not few_rows_serves(x[:0], weight)
    assert not few_rows_serves(few.double(), weight.double()) and not few_rows_serves(few, weight.bfloat16())
    assert not few_rows_serves(few, weight.T.contiguous().T)
    assert not few_rows_serves(few[:, :8], weight[:, :8].contiguous())
    assert not few_rows_serves(few.to("meta"), weight.to("meta"))
    assert not few_rows_serves(few, nn.Parameter(weight)) and not few_rows_serves(few.clone().requires_grad_(), weight)
    with torch.no_grad():
        assert few_rows_serves(few, nn.Parameter(weight))
    with torch.inference_mode():
        assert few_rows_serves(few, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(few, weight, bias).dtype == torch.bfloat16
    with use_backend("torch"):
        assert not few_rows_serves(few, weight)
    with CostCounter() as counter:
        matmul.linear(few, weight, bias)
    assert counter.flops == 2 * 3 * N * K and list(counter.issued) != ["prismer::few_rows_linear"]
    vmapped = torch.func.vmap(lambda row: matmul.linear(row, weight, bias))(few)
    torch.testing.assert_close(vmapped, F.linear(few, weight, bias))


def test_a_compiled_product_is_torchs():
    x, weight, bias = draw(3, N, K, torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    y = torch.compile(matmul.linear, backend=backend, fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert not any("few_rows" in str(node.target) for node in graphs[0].graph.nodes)


def test_frozen_layers_among_trained_ones():
    """A frozen layer of few rows runs on it, and the trained layer after it gets its gradient."""
    x, frozen, bias = draw(3, N, K, torch.float32)
    trained = torch.randn(K, N, requires_grad=True)
    y = linears(linears(x, [(frozen, bias)])[0], [(trained, None)])[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), trained)
    hidden = F.linear(x.double(), frozen.double(), bias.double())
    leaf = trained.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(hidden, leaf).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_bias_alone_may_train():
    x, weight, bias = draw(3, N, K, torch.float32)
    linears(x, [(weight, bias.requires_grad_())])[0].sum().backward()
    assert bias.grad.tolist() == [3.0] * N


def test_flops_are_counted():
    x, weight, bias = draw(3, N, K, torch.float32)
    with use_backend("native"), CostCounter() as counter:
        few_rows_linear(x, weight, bias)
    assert counter.flops == 2 * 3 * N * K
    assert [row[0] for row in counter.rows()] == ["prismer_native::few_rows_linear"]
