"""Proves that the tests on Triton's interpreter can be trusted: bf16 rounds as on a GPU, counts are exact, and planted
bugs of each kind are caught.

Run: pytest tests/ops/test_interpreter.py
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from tests.ops.interpreter import KernelFault, bf16_interpreter, interpreted

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton compiles here: TRITON_INTERPRET is not set"),
]

BF16 = torch.bfloat16


@triton.jit
def cast_kernel(p_x, p_y, N, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < N).to(p_y.dtype.element_ty), mask=o < N)


@triton.jit
def dot_kernel(p_a, p_b, p_c, PRECISION: tl.constexpr, B: tl.constexpr):
    o_row, o_col = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    b_a, b_b = tl.load(p_a + o_row * B + o_col), tl.load(p_b + o_row * B + o_col)
    tl.store(p_c + o_row * B + o_col, tl.dot(b_a, b_b, input_precision=PRECISION))


@triton.jit
def double(b_x):
    return b_x * 2.0


@triton.jit
def many_kernel(p_x, p_y, p_out, B: tl.constexpr):
    """Write one operation to each row, in bf16 unless Triton promotes."""
    o = tl.arange(0, B)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    tl.store(p_out + 0 * B + o, b_x + b_y)
    tl.store(p_out + 1 * B + o, b_x - b_y)
    tl.store(p_out + 2 * B + o, b_x * b_y)
    tl.store(p_out + 3 * B + o, b_x / b_y)
    tl.store(p_out + 4 * B + o, -b_x)
    tl.store(p_out + 5 * B + o, tl.abs(b_x))
    tl.store(p_out + 6 * B + o, tl.maximum(b_x, b_y))
    tl.store(p_out + 7 * B + o, tl.where(b_x > b_y, b_x, b_y))
    tl.store(p_out + 8 * B + o, (b_x > b_y).to(tl.bfloat16))
    tl.store(p_out + 9 * B + o, (b_x.to(tl.float32) > 0.0).to(tl.bfloat16))
    tl.store(p_out + 10 * B + o, tl.exp(b_x.to(tl.float32)).to(tl.bfloat16))
    tl.store(p_out + 11 * B + o, tl.full((B,), 1.5, tl.bfloat16) + o.to(tl.bfloat16))
    tl.store(p_out + 12 * B + o, tl.zeros((B,), tl.bfloat16) + tl.sum(b_x, 0))
    tl.store(p_out + 13 * B + o, tl.zeros((B,), tl.bfloat16) + tl.max(b_x, 0))
    tl.store(p_out + 14 * B + o, double(b_x))
    tl.store(p_out + 15 * B + o, tl.cumsum(b_x, 0))


@triton.jit
def scale_kernel(p_x, p_y, R, D, stride, FAULT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Compute y = 2 x, row by row; FAULT plants a bug."""
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    o_col = tl.arange(0, BD)
    m = (o_row < R)[:, None] & (o_col < D)[None, :]
    m_in = m
    m_out = m
    if FAULT == "load past the end":
        m_in = (o_row <= R)[:, None] & (o_col < D)[None, :]
    if FAULT == "load past the row":
        m_in = (o_row < R)[:, None] & (o_col <= D)[None, :]
    if FAULT == "store past the end":
        m_out = (o_row <= R)[:, None] & (o_col < D)[None, :]
    if FAULT == "load before the start":
        o_row_in = o_row - 1
    else:
        o_row_in = o_row
    o_row_out = o_row
    if FAULT == "two programs, one row":
        o_row_out = o_row % 2
    b_x = tl.load(p_x + o_row_in[:, None] * stride + o_col[None, :], mask=m_in, other=0.0)
    p_out = p_y + o_row_out[:, None] * D + o_col[None, :]
    if FAULT == "one lane for all":
        p_out = p_y + o_row_out[:, None] * D + 0 * o_col[None, :]
    tl.store(p_out, double(b_x), mask=m_out)


@triton.jit
def neighbour_kernel(p_x):
    """Each program overwrites its element after it has read that of the program before it."""
    i = tl.program_id(0)
    tl.store(p_x + i, tl.load(p_x + tl.maximum(i - 1, 0)))


@triton.jit
def overtaken_kernel(p_x):
    """Each program reads the element after its own, which a later program overwrites."""
    i = tl.program_id(0)
    tl.store(p_x + i, tl.load(p_x + (i + 1) % tl.num_programs(0)))


@triton.jit
def atomic_kernel(p_count, VALUE: tl.constexpr):
    tl.atomic_add(p_count, VALUE)


@triton.jit
def masked_sum_kernel(p_x, p_y, N, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y, tl.sum(tl.load(p_x + o, mask=o < N), 0))


@triton.jit
def sum_kernel(p_x, p_y, AXIS: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    o = tl.arange(0, R)[:, None] * D + tl.arange(0, D)[None, :]
    b_sum = tl.sum(tl.load(p_x + o), AXIS, keep_dims=KEEP)
    if AXIS is None:
        tl.store(p_y + tl.arange(0, 1), tl.reshape(b_sum, (1,)) if KEEP else b_sum)
    else:
        N: tl.constexpr = D if AXIS == 0 else R
        tl.store(p_y + tl.arange(0, N), tl.reshape(b_sum, (N,)))


@triton.jit
def chosen_kernel(p_a, p_b, p_y, B: tl.constexpr, SHIFT: tl.constexpr):
    """Load through a pointer whose origin the harness cannot follow."""
    o = tl.arange(0, B)
    p = tl.where(o < B, p_a + o, p_b + o) + SHIFT
    tl.store(p_y + o, tl.load(p))


def every_float(step: int = 997) -> torch.Tensor:
    """fp32 numbers from the whole range of bit patterns: both signs, subnormals, ties, infinities and NaN."""
    bits = torch.arange(-(2**31), 2**31, step * 4096, dtype=torch.int64)
    ties = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 1]
    # infinity, and NaN whose bits rounding would carry to infinity or into the sign
    specials = [0x7F800000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF]
    odd = torch.tensor(ties + specials)
    return torch.cat([bits, odd, odd - 2**31]).to(torch.int32).view(torch.float32)


def test_cast_rounds_to_nearest_even():
    x = every_float()
    y = torch.empty(len(x), dtype=BF16)
    with bf16_interpreter():
        cast_kernel[(triton.cdiv(len(x), 256),)](x, y, len(x), B=256)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~y.isnan()].view(torch.int16), x.to(BF16)[~y.isnan()].view(torch.int16))
    back = torch.empty_like(x)
    with bf16_interpreter():
        cast_kernel[(triton.cdiv(len(x), 256),)](y, back, len(x), B=256)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64, torch.float16))
def test_cast_between_bf16_and_others(dtype):
    x = torch.arange(-300, 300).to(dtype)[:512]
    y, back = torch.empty(len(x), dtype=BF16), torch.empty_like(x)
    with bf16_interpreter():
        cast_kernel[(2,)](x, y, len(x), B=256)
        cast_kernel[(2,)](y, back, len(x), B=256)
    assert torch.equal(y, x.to(BF16))
    assert torch.equal(back, x.to(BF16).to(dtype))


def dot(a, b, precision="ieee"):
    c = torch.full((len(a), len(a)), torch.nan)
    dot_kernel[(1,)](a, b, c, PRECISION=precision, B=len(a))
    return c


def test_dot_of_bf16_is_exact():
    # with small integers, every product and sum is exact in fp32
    a, b = (torch.randint(-8, 9, (32, 32)).to(BF16) for _ in range(2))
    with bf16_interpreter():
        assert torch.equal(dot(a, b), a.float() @ b.float())


def test_the_shim_is_needed():
    """Without it a dot multiplies bit patterns and a cast truncates. If Triton fixes both, remove the shim."""
    a, b = (torch.randint(1, 9, (16, 16)).to(BF16) for _ in range(2))
    assert (dot(a, b) - a.float() @ b.float()).abs().max() > 1e6
    x = torch.tensor([1 + 2**-8 + 2**-9])
    y = torch.empty(1, dtype=BF16)
    cast_kernel[(1,)](x, y, 1, B=16)
    assert y.float() < x and x.to(BF16).float() > x


def test_dot_in_tf32_loses_what_a_gpu_loses():
    a, b = torch.eye(16), torch.randn(16, 16)
    with bf16_interpreter():
        assert torch.equal(dot(a, b, "ieee"), b)
        error = ((dot(a, b, "tf32") - b) / b).abs().max()
    assert 2**-14 < error <= 2**-11


def halves(x):
    """The sum in the order of compiled code: it adds halves, and rounds each time."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x


@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
@pytest.mark.parametrize("axis", (0, 1, None))
@pytest.mark.parametrize("keep", (False, True))
def test_a_sum_rounds_after_every_addition(dtype, axis, keep):
    x = torch.randn(8, 16).to(dtype)
    exact = halves(x.flatten()) if axis is None else halves(x if axis == 0 else x.T)
    y = torch.empty(1 if axis is None else x.shape[1 - axis], dtype=dtype)
    with bf16_interpreter():
        sum_kernel[(1,)](x, y, AXIS=axis, KEEP=keep, R=8, D=16)
    assert torch.equal(y, exact.view(-1))


def test_every_operation_in_bf16():
    x, y = (torch.randn(32).to(BF16) for _ in range(2))
    out = torch.full((16, 32), torch.nan, dtype=BF16)
    with bf16_interpreter():
        many_kernel[(1,)](x, y, out, B=32)
    expected = {
        "add": x + y,
        "sub": x - y,
        "mul": x * y,
        "div": (x.float() / y.float()).to(BF16),
        "neg": -x,
        "abs": x.abs(),
        "maximum": torch.maximum(x, y),
        "where": torch.maximum(x, y),
        "greater": (x > y).to(BF16),
        "positive": (x > 0).to(BF16),
        "exp": x.float().exp().to(BF16),
        "full": (1.5 + torch.arange(32)).to(BF16),
        "sum": halves(x).expand(32),
        "max": x.max().expand(32),
        "double": 2 * x,
        "cumsum": x.float().cumsum(0).to(BF16),
    }
    for row, (name, exact) in enumerate(expected.items()):
        torch.testing.assert_close(out[row], exact, rtol=2**-8, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_masked_lanes_load_nan_unless_other_is_given():
    x, y = torch.ones(5), torch.zeros(1)
    with bf16_interpreter():
        masked_sum_kernel[(1,)](x, y, 5, B=8)
    assert y.isnan()


def scale(x, fault="", BR=2):
    R, D = x.shape
    y = torch.full((R, D), torch.nan, dtype=x.dtype)
    scale_kernel[(triton.cdiv(R, BR),)](x, y, R, D, x.stride(0), FAULT=fault, BR=BR, BD=triton.next_power_of_2(D))
    return y


@pytest.mark.parametrize("dtype", (torch.float32, BF16, torch.float16), ids=str)
def test_ledger_counts_bytes_exactly(dtype):
    x = torch.randn(5, 7).to(dtype)
    with interpreted(x) as ledger:
        assert torch.equal(scale(x), 2 * x)
    size = 5 * 7 * x.element_size()
    assert (ledger.launches, ledger.programs, ledger.kernels) == (1, 3, ["scale_kernel"])
    assert (ledger.bytes_read, ledger.bytes_written, ledger.dot_flops) == (size, size, 0)
    assert ledger.traffic == {("scale_kernel", "p_x"): [size, 0], ("scale_kernel", "p_y"): [0, size]}


def test_ledger_counts_dots():
    a = torch.randn(32, 32).to(BF16)
    with interpreted() as ledger:
        dot(a, a)
        dot(a, a)
    assert ledger.dot_flops == 2 * 2 * 32**3
    assert (ledger.bytes_read, ledger.bytes_written, ledger.launches) == (2 * 2 * 2 * 32**2, 2 * 4 * 32**2, 2)


def test_ledger_shows_wasted_traffic():
    """The counts reveal a bug that does not change the result, such as rows that are computed twice."""
    x = torch.randn(4, 8)
    with interpreted() as ledger:
        scale(x)
        wasted = torch.empty_like(x)
        cast_kernel[(2,)](x, wasted, 32, B=16)
    assert ledger.bytes_read == 2 * x.nbytes


@pytest.mark.parametrize(
    ("fault", "says"),
    {
        "load past the end": "load through p_x reaches 7 addresses outside it, the first at element 35 of a span of 35",
        "store past the end": "store through p_y reaches 7 addresses outside it",
        "load before the start": "load through p_x reaches 7 addresses outside it, the first at element -7",
        "two programs, one row": "race: two programs of the launch store to the same address of p_y",
        "one lane for all": "race: one store puts different values to the same address of p_y",
    }.items(),
)
def test_planted_bug_is_caught(fault, says):
    with pytest.raises(KernelFault, match=f"kernel scale_kernel, program .*{says}"), interpreted():
        scale(torch.randn(5, 7), fault)


def test_a_view_ends_before_its_neighbour_in_the_storage():
    """One column too many of a packed projection reads the next tensor, which no allocator would notice."""
    packed = torch.randn(6, 14)
    left = packed[:, :7]
    with interpreted():
        assert torch.equal(scale(left), 2 * left)
    with pytest.raises(AssertionError, match="load through p_x reaches 2 addresses outside it"), interpreted():
        scale(left, "load past the row")


def test_a_load_from_another_argument_names_it():
    both = torch.randn(64)
    with pytest.raises(KernelFault, match="which belongs to p_y"), interpreted():
        cast_kernel[(1,)](both[:32], both[32:], 33, B=64)


def test_races_between_loads_and_stores_are_caught():
    for kernel, says in ((neighbour_kernel, "loads from p_x what another"), (overtaken_kernel, "stores to p_x where")):
        with pytest.raises(KernelFault, match=says), interpreted():
            kernel[(4,)](torch.zeros(4))
        with interpreted():
            kernel[(1,)](torch.zeros(4))


def test_integer_atomics_are_counted_and_float_atomics_refused():
    count = torch.zeros(1, dtype=torch.int32)
    with interpreted() as ledger:
        atomic_kernel[(3,)](count, VALUE=2)
    assert count == 6 and (ledger.bytes_read, ledger.bytes_written) == (12, 12)
    with pytest.raises(KernelFault, match="floating-point atomic on p_count"), interpreted():
        atomic_kernel[(3,)](torch.zeros(1), VALUE=2.0)


def test_pointers_of_unknown_origin_are_checked():
    a, b, y = torch.randn(16), torch.randn(16), torch.zeros(16)
    with interpreted():
        chosen_kernel[(1,)](a, b, y, B=16, SHIFT=0)
    assert torch.equal(y, a)
    with pytest.raises(KernelFault, match="unknown origin"), interpreted():
        chosen_kernel[(1,)](a[:8], b[:8], y, B=16, SHIFT=0)
    with interpreted(a):
        chosen_kernel[(1,)](a[:8], b[:8], y, B=16, SHIFT=0)


def test_triton_is_restored_after_a_fault():
    def state():
        owners = (triton_interpreter.InterpreterBuilder, triton_interpreter.GridExecutor, triton_interpreter)
        return [dict(vars(owner)) for owner in owners]

    before = state()
    with pytest.raises(KernelFault), interpreted():
        scale(torch.randn(5, 7), "load past the end")
    assert state() == before


def test_a_missing_private_name_of_triton_is_reported(monkeypatch):
    monkeypatch.delattr(triton_interpreter.InterpreterBuilder, "create_dot")
    before = dict(vars(triton_interpreter.InterpreterBuilder))
    with pytest.raises(AssertionError, match="has no InterpreterBuilder.create_dot any more"), bf16_interpreter():
        pass
    assert dict(vars(triton_interpreter.InterpreterBuilder)) == before
