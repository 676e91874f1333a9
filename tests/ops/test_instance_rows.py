"""Proves that add_instance_rows adds to each token the row of its cell's object and its position, forward and every
gradient, on every backend, and that the gradient of the tokens costs nothing.

Run: pytest tests/ops/test_instance_rows.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import instance_rows as module
from prismer.kernels.dispatch import use_backend
from prismer.kernels.instance_rows import add_instance_rows, add_instance_rows_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("triton", "torch")
SHAPES = {  # B, s, grid, rows of the table, D
    "one": (1, 1, 1, 1, 1),
    "primes": (3, 23, 5, 37, 61),
    "tiny": (2, 32, 8, 128, 96),
    "D60": (2, 9, 9, 300, 60),
    "above-a-block": (1, 50, 7, 33, 129),
    "smaller-map": (1, 3, 7, 65, 64),
    "no-images": (0, 8, 4, 37, 48),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("x", "table", "positions")


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


@pytest.fixture
def dtype(request, on_backend):
    if request.param == torch.float64 and on_backend != "torch":
        pytest.skip(f"{on_backend} instance_rows computes in fp32")
    return request.param


def draw(shape, dtype=torch.float64, with_rows=True):
    """Terms of equal size, and ids in regions, 255 among them."""
    B, s, grid, num_rows, D = shape
    ids = torch.randint(0, 12, (B, s, s), dtype=torch.uint8)
    ids[:, : s // 2, s // 3 :] = 255
    ids[:, s // 2 :, : s // 2] = 199
    x = 2 * torch.randn(B, grid**2, D, dtype=torch.float64)
    table = 3 * torch.randn(num_rows, D, dtype=torch.float64)
    positions = 1 + torch.randn(grid**2, D, dtype=torch.float64)
    rows = torch.randperm(256) % num_rows if with_rows else None
    return x.to(dtype), ids, table.to(dtype), rows, grid, positions.to(dtype)


def plain(x, ids, table, rows, grid, positions=None):
    """What a user would write, cell by cell."""
    cells = [(i * ids.shape[1] // grid, j * ids.shape[1] // grid) for i in range(grid) for j in range(grid)]
    picked = torch.stack([ids[:, y, x] for y, x in cells], 1).long()
    out = x + F.embedding(picked % len(table) if rows is None else rows[picked], table)
    return out if positions is None else out + positions


def results(op, arguments, dtype, dy):
    x, ids, table, rows, grid, positions = arguments
    leaves = {
        name: t.to(dtype).detach().requires_grad_()
        for name, t in (("x", x), ("table", table), ("positions", positions))
        if t is not None
    }
    y = op(leaves["x"], ids, leaves["table"], rows, grid, leaves.get("positions"))
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def compare(arguments, assert_no_worse):
    dtype = arguments[0].dtype
    dy = torch.randn(arguments[0].shape, dtype=torch.float64).to(dtype)
    got = results(add_instance_rows, arguments, dtype, dy)
    # plain torch would add the gradients of a row in bf16, one after another, so compare with fp32, rounded
    expected = results(plain, arguments, torch.promote_types(dtype, torch.float32), dy)
    assert all(value.dtype == dtype for value in got.values())
    expected = {name: t.to(dtype) for name, t in expected.items()}
    inner = torch.promote_types(dtype, torch.float32)
    assert_no_worse("", got, expected, lambda: results(plain, arguments, torch.float64, dy), inner=inner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("with_rows", (True, False), ids=("rows", "default"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_add_instance_rows(shape, with_rows, dtype, assert_no_worse):
    arguments = list(draw(shape, dtype, with_rows))
    compare(arguments, assert_no_worse)
    if dtype in (torch.float32, torch.float64):
        # the sum has the order of the definition
        assert torch.equal(add_instance_rows(*arguments), plain(*arguments))
    arguments[5] = None
    compare(arguments, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_plain_torch(dtype):
    arguments = draw(SHAPES["primes"], dtype)
    with use_backend("reference"):
        out = add_instance_rows(*arguments)
    assert out.dtype == dtype
    compute = torch.promote_types(dtype, torch.float32)
    wide = [t.to(compute) if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    assert torch.equal(out, plain(*wide).to(dtype))
    assert torch.equal(out, add_instance_rows_reference(*arguments))


def test_background_and_default_row():
    """By hand: id 255 has a row like any other; without rows it is 255 % F, with them what they say."""
    ids = torch.tensor([[[0, 255], [7, 255]]], dtype=torch.uint8)
    table = torch.arange(5.0)[:, None].repeat(1, 16)
    x = torch.zeros(1, 4, 16)
    assert add_instance_rows(x, ids, table, None, 2)[0, :, 3].tolist() == [0, 0, 2, 0]
    rows = torch.full((256,), 1)
    rows[255], rows[7] = 4, 3
    assert add_instance_rows(x, ids, table, rows, 2)[0, :, 3].tolist() == [1, 4, 3, 4]
    assert add_instance_rows(x[:, :1], ids, table, rows, 1)[0, :, 3].tolist() == [1]


def test_long_sums_are_in_fp32(assert_no_worse):
    """Hundreds of bf16 gradients of one sign and one row lose nothing."""
    x, ids, table, rows, grid, positions = draw((6, 16, 16, 5, 16), torch.bfloat16)
    rows.fill_(3)
    dy = torch.rand(x.shape).bfloat16()
    got = results(add_instance_rows, (x, ids, table, rows, grid, positions), torch.bfloat16, dy)
    exact = lambda: results(plain, (x, ids, table, rows, grid, positions), torch.float64, dy)["dtable"]  # noqa: E731
    assert_no_worse("dtable", got["dtable"], exact().bfloat16(), exact, inner=torch.float32)
    assert not got["dtable"][[0, 1, 2, 4]].any()


def test_parameters_in_fp32_beside_bf16():
    """Tables in fp32 beside bf16 tokens; each gradient has the dtype of its tensor."""
    x, ids, table, rows, grid, positions = draw(SHAPES["primes"], torch.float32)
    table.requires_grad_(), positions.requires_grad_()
    out = add_instance_rows(x.bfloat16(), ids, table, rows, grid, positions)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain(x.bfloat16().float(), ids, table, rows, grid, positions).bfloat16())
    out.float().sum().backward()
    assert table.grad.dtype == positions.grad.dtype == torch.float32
    assert positions.grad.eq(3).all()


def test_tensors_may_have_any_strides():
    """Tokens of a convolution, an expanded gradient, a plane cut from several."""
    x, ids, table, rows, grid, positions = draw(SHAPES["primes"], torch.float32)
    expected = plain(x, ids, table, rows, grid, positions)
    tokens_last = x.mT.contiguous().mT
    planes = torch.stack((ids, ids + 1), 1)[:, 0]
    table_t = table.t().contiguous().t().requires_grad_()
    out = add_instance_rows(tokens_last, planes, table_t, rows, grid, positions.t().contiguous().t())
    assert torch.equal(out, expected)
    out.sum().backward()
    plain_table = table.clone().requires_grad_()
    plain(x, ids, plain_table, rows, grid, positions).sum().backward()
    torch.testing.assert_close(table_t.grad, plain_table.grad)


def test_an_image_alone_equals_its_part_of_a_batch_and_repeats():
    """Bit for bit."""
    arguments = draw(SHAPES["primes"], torch.bfloat16)
    dy = torch.randn(arguments[0].shape)
    first, again = (results(add_instance_rows, arguments, torch.bfloat16, dy) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    x, ids, *rest = arguments
    assert torch.equal(add_instance_rows(x[1:2], ids[1:2], *rest), first["y"][1:2])


@pytest.mark.parametrize("trained", ((), ("x",), ("positions",), ("table",), NAMES), ids="-".join)
def test_only_the_documented_tensors_are_saved(trained, count_calls):
    """They are ids and rows if a table trains, never x. The gradient of x is that of the output, not a copy."""
    x, ids, table, rows, grid, positions = draw(SHAPES["primes"], torch.bfloat16)
    leaves = dict(x=x, table=table, positions=positions)
    for name in trained:
        leaves[name].requires_grad_()
    saved, seen = [], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = add_instance_rows(x, ids, table, rows, grid, positions)
    kept = trained not in ((), ("x",))
    assert [t.data_ptr() for t in saved] == kept * [ids.data_ptr(), rows.data_ptr()]
    if not trained:
        return
    dy = torch.randn(out.shape).bfloat16()
    if x.requires_grad:
        x.register_hook(lambda grad: seen.update(dx=grad.data_ptr()))
    with count_calls() as calls:
        out.backward(dy)
    assert seen.get("dx", dy.data_ptr()) == dy.data_ptr()
    backward = calls["prismer::instance_rows_backward"]
    assert len(backward) == kept
    if kept:
        assert backward[0]["table"] is ("table" in trained)
        assert backward[0]["positions"] is ("positions" in trained)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    x, ids, table, rows, grid, positions = draw((2, 9, 3, 7, 20), torch.float32)
    x, table, positions = (t.requires_grad_(requires_grad) for t in (x, table, positions))
    torch.library.opcheck(torch.ops.prismer.instance_rows, (x, ids, table, rows, positions, grid))
    bf16 = x.detach().bfloat16().mT.contiguous().mT
    torch.library.opcheck(torch.ops.prismer.instance_rows, (bf16, ids, table, None, None, grid))
    for table_trains, positions_train in ((True, True), (False, True), (True, False)):
        arguments = (bf16, ids, rows, 7, grid, table_trains, positions_train)
        torch.library.opcheck(torch.ops.prismer.instance_rows_backward, arguments)


def test_compile():
    x, ids, table, rows, grid, positions = draw((2, 9, 3, 7, 20), torch.float32)
    leaves = [t.requires_grad_() for t in (x, table, positions)]

    def step(x, table, positions):
        return add_instance_rows(x, ids, table, rows, grid, positions).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
def test_gradcheck():
    x, ids, table, rows, grid, positions = draw((2, 5, 3, 4, 3))

    def op(x, table, positions):
        return add_instance_rows(x, ids, table, rows, grid, positions)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in (x, table, positions)])


def test_a_row_outside_the_table_is_never_read(on_backend):
    """It raises, or gives NaN in the cells that name it where raising would wait for the device."""
    x, ids, table, rows, grid, _ = draw(SHAPES["primes"], torch.float32)
    for bad in (-1, len(table), 2**40):
        rows[255] = bad
        if on_backend == "torch":
            with pytest.raises((IndexError, RuntimeError), match="out of range"):
                add_instance_rows(x, ids, table, rows, grid)
            continue
        from tests.ops.interpreter import interpreted

        leaf = table.clone().requires_grad_()
        with interpreted():
            out = add_instance_rows(x, ids, leaf, rows, grid)
            out.backward(torch.ones_like(out))
        spoilt = out.isnan().any(2)
        assert spoilt.any() and not spoilt.all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("with_rows", (True, False), ids=("rows", "default"))
@pytest.mark.parametrize("with_positions", (True, False), ids=("positions", "alone"))
def test_ledger(with_rows, with_positions):
    """Bytes and FLOPs are those of the docstring; every address and every write is checked."""
    from tests.ops.interpreter import interpreted

    B, s, grid, num_rows, D = shape = (3, 23, 7, 70, 132)
    x, ids, table, rows, _, positions = draw(shape, torch.bfloat16, with_rows)
    if not with_positions:
        positions = None
    N, lookup = B * grid**2, 9 if with_rows else 1
    with interpreted() as ledger:
        torch.ops.prismer.instance_rows(x, ids, table, rows, positions, grid)
    assert ledger.bytes_read == (2 + with_positions) * N * D * 2 + 2 * lookup * N
    assert ledger.bytes_written == N * D * 2
    assert ledger.launches == 1

    with interpreted() as ledger:
        torch.ops.prismer.instance_rows_backward(x, ids, rows, num_rows, grid, True, with_positions)
    # the row of each cell, read from a table whose column 0 is its own index, with x = 0
    index = torch.arange(num_rows, dtype=torch.float64)[:, None]
    row = plain(torch.zeros(B, grid**2, 1).double(), ids, index, rows, grid).flatten().long()
    tiles = [row[start : start + 128] for start in range(0, N, 128)]
    met = sum(len((tile // 16).unique()) for tile in tiles)
    cells = sum(len((tile // 16).unique()) * len(tile) for tile in tiles)
    blocks, columns = -(-num_rows // 16), -(-D // 32)
    # a tile skips the blocks that none of its cells names; a rare draw names all
    assert 0 < met <= blocks * len(tiles)
    assert ledger.dot_flops == 2 * 16 * 128 * 32 * met * columns
    assert ledger.bytes_read == D * 2 * cells + blocks * columns * lookup * N
    assert ledger.bytes_written == 4 * num_rows * D
    assert ledger.launches == 1


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_many_cells_are_summed_in_parts(monkeypatch):
    """As many as fit: the partial sums of a large table would take more memory than they are worth."""
    from tests.ops.interpreter import interpreted

    assert module._parts(8 * 196, 128, 768) == (1, 13)
    assert module._parts(64 * 256, 128, 1024) == (8, 16)
    assert module._parts(64 * 256, 2048, 1024) == (2, 64)
    monkeypatch.setattr(module, "_MOST_TILES", 1)
    x, ids, table, rows, *_ = draw((3, 23, 7, 70, 132), torch.float32, True)
    with interpreted() as ledger:
        dtable, _ = torch.ops.prismer.instance_rows_backward(x, ids, rows, 70, 7, True, False)
    assert ledger.kernels == ["_table_kernel", "_sum_parts_kernel"]
    index = module._cell_rows(ids, rows, 70, 7).flatten()
    expected = torch.zeros(70, 132, dtype=torch.float64).index_add_(0, index, x.double().flatten(0, 1))
    torch.testing.assert_close(dtable.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.zeros(2, 8, 6)), r"pass floats of shape \(B, 9, D\) for a grid of 3"),
        (dict(x=torch.zeros(2, 9, 6, dtype=torch.int64)), "x is torch.int64"),
        (dict(grid=2), "for a grid of 2"),
        (dict(ids=torch.zeros(2, 5, 5)), "pass uint8"),
        (dict(ids=torch.zeros(2, 5, 4, dtype=torch.uint8)), r"pass uint8 of shape \(2, s, s\)"),
        (dict(ids=torch.zeros(1, 5, 5, dtype=torch.uint8)), r"pass uint8 of shape \(2, s, s\)"),
        (dict(table=torch.zeros(4, 5)), r"pass floats of shape \(F, 6\)"),
        (dict(table=torch.zeros(0, 6)), "F at least 1"),
        (dict(rows=torch.zeros(255, dtype=torch.int64)), r"pass int64 of shape \(256,\)"),
        (dict(rows=torch.zeros(256)), "rows are torch.float32"),
        (dict(positions=torch.zeros(8, 6)), r"pass floats of shape \(9, 6\)"),
        (dict(table=torch.zeros(4, 6, device="meta")), "one device"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(
        x=torch.zeros(2, 9, 6),
        ids=torch.zeros(2, 5, 5, dtype=torch.uint8),
        table=torch.zeros(4, 6),
        rows=torch.zeros(256, dtype=torch.int64),
        grid=3,
        positions=torch.zeros(9, 6),
    )
    with pytest.raises(ValueError, match=message):
        add_instance_rows(**{**good, **change})
