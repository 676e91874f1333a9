"""Proves the native CPU ops by direct calls, on every instruction set that this machine has.

Results obey the rule of numerics against float64, and depend neither on the number of threads nor on other rows.

Run: pytest tests/ops/test_native.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels.decode_attention import decode_attention_reference
from prismer.kernels.label_map import label_map_reference
from tests.ops.native_sets import HERE

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("poisoned_memory")]

ops = torch.ops.prismer_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ((0, 48), (1, 1), (3, 7), (1023, 7), (3, 60), (65, 64), (33, 768), (3, 1000), (1023, 17))
ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "squared_relu": lambda x: F.relu(x).square(),
}


@pytest.fixture
def on_each_set(monkeypatch):
    """A function that returns the results of a call, one for each instruction set of this machine."""

    def results(call):
        found = []
        for name in HERE:
            monkeypatch.setenv("PRISMER_CPU_ISA", name)
            found.append(call())
        return found

    return results


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()

    def run(threads, call):
        torch.set_num_threads(threads)
        return call()

    yield run
    torch.set_num_threads(before)


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_same(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"output {i} differs by {(a - b).abs().max()}"


# layer_norm


def draw_rows(R, D, dtype, offset=3.0):
    """x, residual, weight, bias, dy, dtotal; weight and bias are so large that ignoring them shows."""
    x, residual, dy, dtotal = (torch.randn(R, D) for _ in range(4))
    return [t.to(dtype) for t in (2 * x + offset, residual, torch.randn(D) + 2, torch.randn(D), dy, dtotal)]


def plain_layer_norm(x, residual, weight, bias):
    total = x if residual is None else x + residual
    weight, bias = (None if t is None else t.to(total.dtype) for t in (weight, bias))
    return F.layer_norm(total, total.shape[1:], weight, bias), total


def check_layer_norm(assert_no_worse, x, residual, weight, bias, dy, dtotal):
    y, total, mean, rstd = ops.layer_norm(x, residual, weight, bias, 1e-5)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    plain_y, plain_total = plain_layer_norm(*leaves)
    exact = [None if t is None else t.double().requires_grad_() for t in leaves]
    if residual is None:
        assert total.shape == (0,)
        seen = x
    else:
        assert torch.equal(total, plain_total), "total is not x + residual, rounded once"
        seen = total
        # the op normalises the rounded total, which it also returns
        exact[:2] = plain_total.detach().double(), None
    assert_no_worse("y", y, plain_y.detach(), lambda: plain_layer_norm(*exact)[0].detach())
    if x.numel():
        torch.testing.assert_close(mean, seen.double().mean(1).float(), rtol=1e-5, atol=1e-5)
        variance = seen.double().var(1, correction=0)
        torch.testing.assert_close(rstd, (variance + 1e-5).rsqrt().float(), rtol=1e-4, atol=0)

    affine = weight is not None
    grads = ops.layer_norm_backward(dy, dtotal, seen, weight, mean, rstd, affine)
    plain_x = seen.clone().requires_grad_()
    exact_x = seen.double().requires_grad_()
    names = ("dx", "dweight", "dbias") if affine else ("dx",)

    def wanted(leaf, w, b):
        out = plain_layer_norm(leaf, None, w, b)[0]
        inputs = [leaf] + ([w, b] if affine else [])
        found = list(torch.autograd.grad(out, inputs, dy.to(out.dtype)))
        if dtotal is not None:
            found[0] = found[0] + dtotal.to(out.dtype)
        return dict(zip(names, found, strict=True))

    ours = dict(zip(names, grads, strict=False))
    assert_no_worse("", ours, wanted(plain_x, *leaves[2:]), lambda: wanted(exact_x, *exact[2:]))
    if not affine:
        assert grads[1].shape == grads[2].shape == (0,)
    assert grads[0].dtype == x.dtype and grads[1].dtype == grads[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("R", "D"), ROWS)
def test_layer_norm(isa, R, D, dtype, assert_no_worse):
    x, residual, weight, bias, dy, dtotal = draw_rows(R, D, dtype)
    check_layer_norm(assert_no_worse, x, None, weight, bias, dy, None)
    check_layer_norm(assert_no_worse, x, residual, weight, bias, dy, dtotal)
    check_layer_norm(assert_no_worse, x, residual, None, None, dy, None)


@pytest.mark.parametrize("stored", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_layer_norm_takes_parameters_of_another_dtype(isa, dtype, stored):
    """The result has the same bits as with the same parameters in fp32."""
    x, _, weight, bias, dy, _ = draw_rows(5, 83, dtype)
    weight, bias = weight.to(stored), bias.to(torch.bfloat16)
    ours = ops.layer_norm(x, None, weight, bias, 1e-5)
    wide = ops.layer_norm(x, None, weight.float(), bias.float(), 1e-5)
    assert_same(ours, wide)
    assert_same(
        ops.layer_norm_backward(dy, None, x, weight, *ours[2:], True),
        ops.layer_norm_backward(dy, None, x, weight.float(), *ours[2:], True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_layer_norm_of_difficult_rows(isa, dtype, assert_no_worse):
    """Large means, huge, tiny and constant rows, for which E[x^2] - mean^2 or a sum in 16 bits fails."""
    D, draws = 768, 9
    _, _, weight, bias, dy, _ = draw_rows(6 * draws, D, dtype)
    x = torch.randn(6, draws, D)
    x[0] += 1e4
    x[1] = 7.0
    x[2] *= 1e4 if dtype != torch.float16 else 1e3
    x[3] *= 1e-6
    x[4, :, 0] = 3e4
    x[5] = torch.linspace(-1, 1, D) * torch.finfo(dtype).tiny / 8  # denormal
    x = x.to(dtype).flatten(0, 1)
    y, _, mean, rstd = ops.layer_norm(x, None, weight, bias, 1e-5)
    for kind in range(6):
        rows = slice(kind * draws, (kind + 1) * draws)
        plain, _ = plain_layer_norm(x[rows], None, weight, bias)
        high = double((x[rows], None, weight, bias))
        assert_no_worse(f"y of kind {kind}", y[rows], plain, lambda high=high: plain_layer_norm(*high)[0])
    dx = ops.layer_norm_backward(dy, None, x, weight, mean, rstd, True)[0]
    assert torch.isfinite(dx).all()


def test_layer_norm_confines_nan_and_infinity_to_their_row(isa):
    """A row with a NaN or an infinity becomes NaN, and no other row does."""
    x = torch.randn(3, 40)
    x[0, 3], x[2, 39] = float("nan"), float("inf")
    for dtype in DTYPES:
        y = ops.layer_norm(x.to(dtype), None, None, None, 1e-5)[0]
        assert y[0].isnan().all() and y[2].isnan().all() and y[1].isfinite().all()


# bias_activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("R", "D"), ROWS)
def test_bias_activation(isa, R, D, dtype, activation, assert_no_worse):
    act = ACTIVATIONS[activation]
    h, bias, dy = (2 * torch.randn(R, D)).to(dtype), (2 * torch.randn(D)).to(dtype), torch.randn(R, D).to(dtype)
    for b in (None, bias):

        def plain(kind, b=b):
            leaf = h.to(kind).requires_grad_()
            out = act(leaf if b is None else leaf + b.to(kind))
            return dict(out=out.detach(), dh=torch.autograd.grad(out, leaf, dy.to(kind))[0])

        ours = dict(out=ops.bias_activation(h, b, activation), dh=ops.bias_activation_backward(dy, h, b, activation))
        assert_no_worse("", ours, plain(dtype), lambda plain=plain: plain(torch.float64))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_activation_is_within_two_ulps(isa, activation):
    """fp32 over the whole range; the tails may be further off, because the exponent of a power is rounded there."""
    x = torch.cat((torch.linspace(-13, 13, 60001), torch.randn(99) * 1e-20, torch.zeros(1)))[:, None]
    ulp = 2**-23
    leaf = x.double().requires_grad_()
    exact = ACTIVATIONS[activation](leaf)
    slope = torch.autograd.grad(exact.sum(), leaf)[0]
    exact, size = exact.detach().abs(), leaf.detach().abs()
    # the absolute error of the polynomial
    tail = 5e-8 if activation == "gelu" else 0.0
    error = (ops.bias_activation(x, None, activation).double() - ACTIVATIONS[activation](x.double())).abs()
    assert (error <= 2 * ulp * exact * (1 + size) + tail * size + 1e-45).all()
    if activation == "gelu":
        # accurate also in the tail, where torch's 1 + erf cancels: F.gelu is off by 4e-5 at -3, and completely at -6
        down = (x < 0) & (x > -5)
        assert (error[down] <= 2e-5 * exact[down]).all()
    dx = ops.bias_activation_backward(torch.ones_like(x), x, None, activation)
    assert ((dx.double() - slope).abs() <= 2 * ulp * slope.abs().clamp(min=1)).all()


def test_bias_activation_of_extreme_numbers(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-1e30, -200.0, -0.0, 0.0, 1e-42, 200.0, 1e18, inf, nan]])
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            out = ops.bias_activation(x.to(dtype), None, activation)[0]
            dx = ops.bias_activation_backward(torch.ones_like(x, dtype=dtype), x.to(dtype), None, activation)[0]
            assert (out[:4] == 0).all(), activation
            assert 0 <= out[4] <= 1e-42 and out[7] == inf and out[8].isnan() and dx[8].isnan()
            square = activation == "squared_relu"
            expected = 2 * x.to(dtype) if square else torch.ones_like(x, dtype=dtype)
            assert torch.equal(dx[5:7], expected[0, 5:7]) and (dx[:2].abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_stores_round_to_nearest_even(isa, dtype):
    """All 16-bit numbers come back unchanged; numbers between two of them go to the nearest, ties to even."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = torch.zeros(len(every), dtype=torch.float32)
    features = every[:, None].expand(-1, 17).contiguous()
    # pass the numbers through layer_norm_backward: dy is zero, so dx is dtotal
    dx = ops.layer_norm_backward(
        torch.zeros_like(features), features, torch.zeros_like(features), None, zeros, zeros + 1, False
    )[0]
    finite = every.isfinite()
    assert torch.equal(dx[finite], features[finite])
    assert dx[every.isnan()].isnan().all()
    assert torch.equal(dx[every.isinf()], features[every.isinf()])
    # an fp32 bias gives sums anywhere between two 16-bit numbers
    x = torch.randn(64, 1000).to(dtype)
    bias = torch.cat((torch.randn(500) * 1e-2, torch.tensor([2.0**-9, 2.0**-12, 1.5 * 2.0**-8] * 166 + [0, 0])))
    positive = x.abs()
    out = ops.bias_activation(positive, bias.abs(), "squared_relu")
    assert torch.equal(out, (positive.float() + bias.abs()).square().to(dtype))


def test_rounding_keeps_nan(isa):
    """NaN whose bits a plain rounding would carry to infinity."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    bias = bits.repeat(5)
    out = ops.bias_activation(torch.ones(2, 20, dtype=torch.bfloat16), bias, "squared_relu")
    assert out.isnan().all()


def test_denormals_are_kept(isa):
    """bf16 has the range of fp32: its denormals round like other numbers, on every instruction set."""
    h = torch.tensor([[1e-38, 3e-39, 9.2e-41, 1e-40, -1e-39] * 9], dtype=torch.bfloat16)
    dh = ops.bias_activation_backward(torch.ones_like(h) / 2, h, None, "squared_relu")
    assert torch.equal(dh, h.relu()) and (dh != 0).any()


# label_map


def draw_map(B, h, w, F_, C, dtype):
    """Regions of 4 x 4 pixels with single pixels in them, so that any one of the four taps can differ from the rest."""
    ids = torch.randint(0, 255, (B, h // 4 + 1, w // 4 + 1), dtype=torch.uint8)
    ids = ids.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :h, :w].contiguous()
    ids = torch.where(torch.rand(ids.shape) < 0.1, 255, ids)
    return ids, torch.randint(0, F_, (B, 256)), (3 * torch.randn(F_, C)).to(dtype)


MAPS = ((0, 8, 8, 5, 8, 64), (1, 1, 1, 3, 1, 1), (2, 23, 17, 19, 67, 7), (1, 40, 33, 33, 37, 64), (2, 9, 9, 9, 30, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("B", "h", "w", "size", "rows", "C"), MAPS)
def test_label_map(isa, B, h, w, size, rows, C, dtype, assert_no_worse):
    ids, row, features = draw_map(B, h, w, rows, C, dtype)
    dy = torch.randn(B, size, size, C).to(dtype)

    def plain(kind):
        leaf = features.to(kind).requires_grad_()
        out = label_map_reference(ids, row, leaf, size).permute(0, 2, 3, 1)
        return dict(out=out.detach(), dfeatures=torch.autograd.grad(out, leaf, dy.to(kind))[0])

    ours = dict(out=ops.label_map(ids, row, features, size), dfeatures=ops.label_map_backward(dy, ids, row, rows))
    assert ours["dfeatures"].dtype == torch.float32
    assert_no_worse("", ours, plain(dtype), lambda: plain(torch.float64))


def test_label_map_copies_the_inside_of_a_region(isa):
    """With a single id the output equals its row bit for bit, and the gradient is the plain sum."""
    for dtype in DTYPES:
        ids, rows, features = draw_map(2, 20, 20, 9, 64, dtype)
        ids.fill_(7)
        out = ops.label_map(ids, rows, features, 11)
        assert torch.equal(out, features[rows[:, 7]][:, None, None].expand_as(out))
        assert out.eq(ops.label_map(ids, rows, features, 20)[:, :11, :11]).all()
    ones = torch.ones(2, 11, 11, 64)
    counted = ops.label_map_backward(ones, ids, rows, 9)
    expected = torch.zeros(9).index_add_(0, rows[:, 7], torch.full((2,), 121.0))
    assert torch.equal(counted, expected[:, None].expand(9, 64))


# decode_attention


def decode_attention(*inputs):
    """(R, H, Q, K); the op returns (R, Q, H, K)."""
    return ops.decode_attention(*inputs).transpose(1, 2)


def draw_attention(R, H, Q, K, S, M, A, dtype, by_query):
    q, k, v = 2 * torch.randn(R, H, Q, K), torch.randn(R, H, S, K), torch.randn(R, H, S, K) + 0.5
    mask = torch.rand(R, Q if by_query else 1, S) < 0.7
    suffix_k, suffix_v = torch.randn(R, H, M, K), torch.randn(R, H, M, K) - 0.5
    ancestors = torch.rand(R, Q, M).argsort(-1)[..., :A].contiguous()
    if A > 1:
        ancestors[..., 0] = -1
    return [*(t.to(dtype) for t in (q, k, v)), mask, *(t.to(dtype) for t in (suffix_k, suffix_v)), ancestors]


SHAPES = {  # R, H, Q, K, S, M, A
    "one": (1, 1, 1, 1, 1, 0, 0),
    "beams": (2, 2, 3, 64, 100, 5, 3),
    "one-query": (2, 1, 1, 64, 1030, 7, 2),
    "five": (1, 2, 5, 60, 65, 9, 4),
    "many": (2, 1, 70, 7, 513, 40, 35),
    "chunk-and-one": (1, 1, 33, 96, 64, 3, 3),
    "only-suffix": (1, 1, 6, 20, 0, 4, 4),
    "only-shared": (1, 3, 2, 128, 17, 0, 0),
    "no-queries": (1, 2, 0, 64, 9, 1, 1),
    "no-rows": (0, 2, 3, 64, 9, 1, 1),
}


@pytest.mark.parametrize("by_query", (False, True), ids=("row-mask", "query-mask"))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(isa, shape, dtype, by_query, assert_no_worse):
    inputs = draw_attention(*SHAPES[shape], dtype, by_query)
    plain = decode_attention_reference(*inputs)
    high = [t.double() if t.is_floating_point() else t for t in inputs]

    def exact():
        return decode_attention_reference(*high)

    assert_no_worse("out", decode_attention(*inputs), plain, exact)


def test_decode_attention_of_a_query_without_keys_is_zero(isa):
    """It has neither keys nor slots; the other queries of its tile do not change."""
    q, k, v, mask, sk, sv, ancestors = draw_attention(1, 2, 4, 16, 70, 3, 2, torch.float32, True)
    # keys that no query sees are skipped, which would shift the blocks of the others: query 0 sees all keys of query 2
    mask[:, 0] |= mask[:, 2]
    before = decode_attention(q, k, v, mask, sk, sv, ancestors)
    mask[:, 2], ancestors[:, 2] = False, -1
    out = decode_attention(q, k, v, mask, sk, sv, ancestors)
    assert (out[:, :, 2] == 0).all()
    assert torch.equal(out[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])


def test_decode_attention_ignores_masked_keys(isa):
    """Infinities and NaN in masked keys, and in slots that are not listed, do not change the result."""
    q, k, v, mask, sk, sv, ancestors = draw_attention(1, 2, 5, 48, 80, 6, 3, torch.float32, False)
    before = decode_attention(q, k, v, mask, sk, sv, ancestors)
    k[:, :, ~mask[0, 0]], v[:, :, ~mask[0, 0]] = float("nan"), float("inf")
    unlisted = [slot for slot in range(6) if not (ancestors == slot).any()]
    sk[:, :, unlisted], sv[:, :, unlisted] = float("nan"), float("nan")
    assert torch.equal(decode_attention(q, k, v, mask, sk, sv, ancestors), before)


def test_decode_attention_with_large_scores(isa, assert_no_worse):
    """Scores of hundreds, with a maximum that rises from block to block and once more in the suffix."""
    inputs = draw_attention(1, 1, 5, 64, 600, 4, 3, torch.float32, False)
    q, k = inputs[:2]
    k *= torch.linspace(0.1, 30, 600)[:, None]
    inputs[4] *= 50
    plain = decode_attention_reference(*inputs)
    high = [t.double() if t.is_floating_point() else t for t in inputs]

    def exact():
        return decode_attention_reference(*high)

    assert_no_worse("out", decode_attention(*inputs), plain, exact, factor=3.0)


# all ops


def calls(dtype):
    """name -> call, with shapes so large that two threads share the work, and rows that are no multiple of a vector."""
    x, residual, weight, bias, dy, dtotal = draw_rows(300, 515, dtype)
    _, total, mean, rstd = ops.layer_norm(x, residual, weight, bias, 1e-5)
    ids, rows, features = draw_map(3, 96, 96, 70, 64, dtype)
    dmap = torch.randn(3, 48, 48, 64).to(dtype)
    inputs = draw_attention(2, 3, 37, 64, 1100, 9, 5, dtype, True)
    return {
        "layer_norm": lambda: ops.layer_norm(x, residual, weight, bias, 1e-5),
        "layer_norm_backward": lambda: ops.layer_norm_backward(dy, dtotal, total, weight, mean, rstd, True),
        **{a: lambda a=a: [ops.bias_activation(x, bias, a)] for a in ACTIVATIONS},
        **{a + "_backward": lambda a=a: [ops.bias_activation_backward(dy, x, bias, a)] for a in ACTIVATIONS},
        "label_map": lambda: [ops.label_map(ids, rows, features, 48)],
        "label_map_backward": lambda: [ops.label_map_backward(dmap, ids, rows, 70)],
        "decode_attention": lambda: [decode_attention(*inputs)],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results_do_not_depend_on_threads(isa, dtype, with_threads):
    """Bit for bit the same on one, two and three threads, and in every run."""
    for name, call in calls(dtype).items():
        one = with_threads(1, call)
        for threads in (2, 2, 3):
            try:
                assert_same(with_threads(threads, call), one)
            except AssertionError as error:
                raise AssertionError(f"{name} on {threads} threads: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_instruction_sets_agree(dtype, on_each_set):
    """They differ only in fused multiply-adds: by a few roundings of fp32, then one of the dtype."""
    tolerance = 2 * torch.finfo(dtype).eps + 2e-5
    for name, call in calls(dtype).items():
        first, *others = on_each_set(call)
        for other in others:
            for a, b in zip(first, other, strict=True):
                a, b = a.double(), b.double()
                error = (a - b).abs() / (a.abs() + a.square().mean().sqrt())
                assert error.max() <= tolerance, f"{name}: {error.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    """A single row, image or batch item gives the same bits as among others."""
    x, residual, weight, bias, dy, dtotal = draw_rows(7, 83, dtype)
    y, total, mean, rstd = ops.layer_norm(x, residual, weight, bias, 1e-5)
    dx = ops.layer_norm_backward(dy, dtotal, total, weight, mean, rstd, True)[0]
    part = slice(4, 5)
    assert_same(ops.layer_norm(x[part], residual[part], weight, bias, 1e-5), [t[part] for t in (y, total, mean, rstd)])
    alone = ops.layer_norm_backward(dy[part], dtotal[part], total[part], weight, mean[part], rstd[part], False)
    assert torch.equal(alone[0], dx[part])
    for a in ACTIVATIONS:
        assert torch.equal(ops.bias_activation(x[part], bias, a), ops.bias_activation(x, bias, a)[part])
        ours = ops.bias_activation_backward(dy, x, bias, a)
        assert torch.equal(ops.bias_activation_backward(dy[part], x[part], bias, a), ours[part])
    ids, rows, features = draw_map(3, 40, 40, 20, 64, dtype)
    out = ops.label_map(ids, rows, features, 19)
    assert torch.equal(ops.label_map(ids[1:2], rows[1:2], features, 19), out[1:2])
    inputs = draw_attention(3, 2, 5, 64, 130, 5, 3, dtype, True)
    out = decode_attention(*inputs)
    assert torch.equal(decode_attention(*(t[1:2] for t in inputs)), out[1:2])


def test_the_instruction_set_can_be_chosen(isa, monkeypatch):
    assert ops.cpu_capability() == isa
    monkeypatch.setenv("PRISMER_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="'sse9'; choose baseline, avx2 or avx512"):
        ops.layer_norm(torch.ones(1, 4), None, None, None, 1e-5)


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: ops.layer_norm(X[0], None, None, None, 1e-5), r"x is \(4\) float32; expected \(rows"),
        (lambda: ops.layer_norm(X.double(), None, None, None, 1e-5), r"x is \(3, 4\) float64"),
        (lambda: ops.layer_norm(torch.ones(4, 3).T, None, None, None, 1e-5), "not contiguous"),
        (lambda: ops.layer_norm(X, X[:2], None, None, 1e-5), r"residual is \(2, 4\) float32; expected \(3, 4\)"),
        (lambda: ops.layer_norm(X, X.half(), None, None, 1e-5), "residual is .* float16"),
        (lambda: ops.layer_norm(X, None, X[0, :3], None, 1e-5), r"weight is \(3\) float32; expected \(4\)"),
        (lambda: ops.layer_norm(X, None, None, X[0].double(), 1e-5), "bias is .* float64"),
        (lambda: ops.layer_norm_backward(X, None, X, None, X[0], X[:, 0], True), r"mean or rstd is \(4\)"),
        (lambda: ops.layer_norm_backward(X[:2], None, X, None, X[:, 0], X[:, 0], True), r"dy is \(2, 4\)"),
        (lambda: ops.bias_activation(X, None, "relu"), "'relu'; choose quick_gelu, gelu or squared_relu"),
        (lambda: ops.bias_activation(X, X[0, :1], "gelu"), r"bias is \(1\) float32; expected \(4\)"),
        (lambda: ops.bias_activation_backward(X[:1], X, None, "gelu"), r"dy is \(1, 4\) float32; expected \(3, 4\)"),
    ),
)
def test_errors(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(ids=torch.zeros(1, 8, 8)), r"ids are \(1, 8, 8\) float32; expected"),
        (dict(rows=torch.zeros(2, 256, dtype=torch.int64)), r"rows are \(2, 256\) int64; expected \(1, 256\)"),
        (dict(rows=torch.full((1, 256), 9)), "rows hold 9 but features have 9 rows"),
        (dict(rows=torch.full((1, 256), -1)), "rows hold -1"),
        (dict(features=torch.zeros(9, 4, dtype=torch.float64)), r"features are \(9, 4\) float64"),
        (dict(size=0), "size is 0"),
    ),
)
def test_label_map_errors(change, message):
    ids, rows, features = draw_map(1, 8, 8, 9, 4, torch.float32)
    arguments = {**dict(ids=ids, rows=rows, features=features, size=4), **change}
    with pytest.raises(RuntimeError, match=message):
        ops.label_map(**arguments)
    if "features" not in change and "size" not in change:
        with pytest.raises(RuntimeError, match=message):
            ops.label_map_backward(torch.zeros(1, 4, 4, 4), arguments["ids"], arguments["rows"], 9)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    (
        (0, torch.zeros(2, 3, 8), r"q is \(2, 3, 8\) float32"),
        (1, torch.zeros(1, 2, 9, 4), r"shared_k is \(1, 2, 9, 4\) float32; expected \(1, 2, 9, 8\)"),
        (2, torch.zeros(1, 2, 8, 8), r"shared_v is \(1, 2, 8, 8\)"),
        (3, torch.ones(1, 2, 9, dtype=torch.bool), r"shared_mask is \(1, 2, 9\) bool; expected \(1, 1 or 3, 9\)"),
        (5, torch.zeros(1, 2, 4, 8).half(), r"suffix_v is \(1, 2, 4, 8\) float16"),
        (6, torch.full((1, 3, 2), 4), "ancestors hold 4 but the suffix has 4 slots"),
        (6, torch.full((1, 3, 2), -2), "ancestors hold -2"),
        (6, torch.zeros(1, 2, 2, dtype=torch.int64), r"ancestors is \(1, 2, 2\) int64"),
    ),
)
def test_decode_attention_errors(index, value, message):
    inputs = draw_attention(1, 2, 3, 8, 9, 4, 2, torch.float32, False)
    inputs[index] = value
    with pytest.raises(RuntimeError, match=message):
        decode_attention(*inputs)
