"""Proves that label_map equals expand-then-resize, forward and gradient, on every backend and for every kind of id,
without the big map.

Run: pytest tests/ops/test_label_map.py
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prismer.kernels.label_map as module
from prismer.kernels.dispatch import use_backend
from prismer.kernels.label_map import label_map, label_map_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("native", "triton", "torch")
SHAPES = {  # B, h, w, size, F, C
    "base": (1, 224, 224, 56, 70, 64),
    "patch14": (1, 224, 224, 64, 150, 64),
    "tiny": (3, 128, 128, 17, 37, 64),
    "equal": (2, 9, 9, 9, 37, 64),
    "larger": (1, 5, 7, 13, 37, 64),
    "primes": (2, 23, 17, 11, 67, 61),
    "wide": (1, 12, 10, 7, 5, 131),
    "one-pixel": (1, 1, 1, 3, 1, 1),
    "to-one": (1, 5, 4, 1, 37, 60),
    "no-rows": (0, 8, 8, 4, 37, 64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


@pytest.fixture
def dtype(request, on_backend):
    if request.param == torch.float64 and on_backend != "torch":
        pytest.skip(f"{on_backend} label_map computes in fp32")
    return request.param


@pytest.fixture
def shape(request, on_backend):
    if request.param in (SHAPES["base"], SHAPES["patch14"]) and on_backend == "triton":
        pytest.skip("takes seconds in the interpreter, and no path that smaller shapes do not")
    return request.param


def draw(shape, dtype=torch.float64, cell=3):
    """Maps with regions of `cell` pixels, so that both blended and plain outputs occur; the last id is background."""
    B, h, w, size, F, C = shape
    grid = torch.randint(0, 255, (B, -(-h // cell), -(-w // cell)), dtype=torch.uint8)
    ids = grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :h, :w].contiguous()
    ids[:, : h // 2, : w // 3] = 255
    rows = torch.randint(0, F, (B, 256))
    return ids, rows, (3 * torch.randn(F, C, dtype=torch.float64)).to(dtype)


def results(op, ids, rows, features, size, dy):
    leaf = features.detach().requires_grad_()
    out = op(ids, rows, leaf, size)
    return {"out": out.detach(), "dfeatures": torch.autograd.grad(out, leaf, dy.to(out.dtype))[0]}


def compare(ids, rows, features, size, assert_no_worse):
    dtype = features.dtype
    dy = torch.randn(ids.shape[0], features.shape[1], size, size, dtype=torch.float64).to(dtype)
    got = results(label_map, ids, rows, features, size, dy)
    plain = results(label_map_reference, ids, rows, features, size, dy)
    exact = functools.partial(results, label_map_reference, ids, rows, features.double(), size, dy)
    assert all(value.dtype == dtype for value in got.values())
    if dtype == torch.float64:
        # the positions of interpolate are off by some 1e-14 of a pixel
        torch.testing.assert_close(got, exact(), rtol=0, atol=1e-10)
    else:
        assert_no_worse("", got, plain, exact)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES, indirect=True)
def test_label_map(shape, dtype, assert_no_worse):
    got = compare(*draw(shape, dtype), shape[3], assert_no_worse)
    assert got["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ("segmentation", "objects", "words"))
def test_every_kind_of_label(kind, assert_no_worse):
    """The table of a batch of 3: background, 133 classes of segmentation, 80 of objects, 21 words of this batch."""
    B, side, size = 3, 96, 14
    features = torch.randn(1 + 133 + 80 + 21, 64)
    rows = torch.zeros(B, 256, dtype=torch.int64)
    ids = torch.full((B, side, side), 255, dtype=torch.uint8)
    meaning = torch.zeros(B, side, side, dtype=torch.int64)  # row of each pixel, written down apart from ids and rows
    for b in range(B):
        for i in range(9):
            y, x, height, width = torch.randint(1, 60, (4,)).tolist()
            box = (b, slice(y, y + height), slice(x, x + width))
            if kind == "segmentation":
                # the id is the class, the same in all images
                name = int(torch.randint(133, ()))
                row = 1 + name
                rows[:, name] = row
            elif kind == "objects":
                # the ninth object in this image, of a class that other objects have too
                name, row = i, 1 + 133 + int(torch.randint(4, ()))
                rows[b, name] = row
            else:
                name, row = i, 1 + 133 + 80 + (b * 7 + i) % 21
                rows[b, name] = row
            ids[box], meaning[box] = name, row
    got = compare(ids, rows, features, size, assert_no_worse)
    positions = torch.linspace(0, side - 1, size, dtype=torch.float64)
    whole = (positions == positions.round()).nonzero()[:, 0].tolist()
    assert whole == [0, size - 1]
    corner = got["out"][:, :, whole][..., whole]
    expected = features[meaning[:, [0, -1]][..., [0, -1]]].permute(0, 3, 1, 2)
    torch.testing.assert_close(corner, expected)
    # rows that no pixel names have a gradient of 0
    used = torch.zeros(len(features), dtype=torch.bool)
    used[meaning.unique()] = True
    assert got["dfeatures"][0].any() and not got["dfeatures"][~used].any()


def test_values_computed_by_hand():
    """By hand: a 2 x 2 map at size 3 has the corners at its corners and their mean in the middle."""
    features = torch.eye(4, 5)
    out = label_map(torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8), _rows(0, 1, 2, 3), features, 3)[0]
    for (i, j), expected in {
        (0, 0): (1, 0, 0, 0),
        (0, 2): (0, 1, 0, 0),
        (2, 2): (0, 0, 0, 1),
        (0, 1): (0.5, 0.5, 0, 0),
        (1, 1): (0.25, 0.25, 0.25, 0.25),
    }.items():
        torch.testing.assert_close(out[:4, i, j], torch.tensor(expected, dtype=torch.float32))
    assert not out[4].any()


def _rows(*first_and_background):
    rows = torch.zeros(1, 256, dtype=torch.int64)
    rows[0, [0, 1, 2, 255]] = torch.tensor(first_and_background)
    return rows


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str, indirect=True)
@pytest.mark.parametrize("case", ("one-row", "massive", "long-sum"))
def test_hard_inputs(case, dtype, assert_no_worse):
    """One row for every pixel, a row a thousand times larger than the others, and gradients of one sign."""
    ids, rows, features = draw((2, 40, 40, 19, 37, 64))
    if case == "massive":
        features[5] *= 1000
    else:
        rows.fill_(3)
    if case == "long-sum":
        dy = torch.rand(2, 64, 19, 19).to(dtype)
        ours, plain, exact = (
            functools.partial(results, op, ids, rows, features.to(t), 19, dy)
            for op, t in ((label_map, dtype), (label_map_reference, dtype), (label_map_reference, torch.float64))
        )
        assert_no_worse("", ours(), plain(), exact)
    compare(ids, rows, features.to(dtype), 19, assert_no_worse)


@pytest.mark.parametrize("tap", ((1, 1), (1, 2), (2, 1), (2, 2)), ids=str)
def test_gradient_of_one_tap(tap):
    """By hand: a 4 x 4 map at size 3 reads its middle pixels once each, for the output in the middle."""
    ids = torch.zeros(1, 4, 4, dtype=torch.uint8)
    ids[0][tap] = 9
    rows = torch.zeros(1, 256, dtype=torch.int64)
    # in a block of the table that nothing else names
    rows[0, 9] = 69
    dy = torch.randn(1, 8, 3, 3)
    grad = results(label_map, ids, rows, torch.randn(70, 8), 3, dy)["dfeatures"]
    torch.testing.assert_close(grad[69], dy[0, :, 1, 1] / 4)
    torch.testing.assert_close(grad[0], dy.sum((0, 2, 3)) - dy[0, :, 1, 1] / 4)
    assert not grad[1:69].any()


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("most", (1, 2, 9))
def test_any_number_of_parts(most, monkeypatch, assert_no_worse):
    """One part, parts of several tiles, and one part more than are added at a time."""
    monkeypatch.setattr(module, "_MAX_PARTS", most)
    shape = (2, 23, 17, 12, 70, 20)
    assert module._parts(2 * 12 * 12, 70, 20) == (most, -(-9 // most))
    compare(*draw(shape, torch.float32), 12, assert_no_worse)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
def test_gradcheck():
    ids, rows, features = draw((2, 5, 4, 3, 4, 3))
    # sum() passes an expanded gradient
    assert torch.autograd.gradcheck(lambda f: label_map(ids, rows, f, 3).sum((2, 3)), features.requires_grad_())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str, indirect=True)
def test_a_region_of_one_id_is_exact(dtype, on_backend):
    """Nothing is rounded inside it: the output is the feature, bit for bit."""
    ids, rows, features = draw((1, 32, 32, 10, 37, 64), dtype)
    ids.fill_(7)
    out = label_map(ids, rows, features, 10)
    expected = features[rows[0, 7]][None, :, None, None].expand_as(out)
    if on_backend == "torch" and dtype == torch.float32:
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)


def test_an_image_alone_equals_its_part_of_a_batch_and_repeats():
    """Bit for bit."""
    ids, rows, features = draw((3, 40, 40, 11, 37, 64), torch.float32)
    dy = torch.randn(3, 64, 11, 11)
    first, again = (results(label_map, ids, rows, features, 11, dy) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["out"][1:2], label_map(ids[1:2], rows[1:2], features, 11))


def test_tensors_may_have_any_strides():
    """Planes cut from (B, planes, h, w), permuted rows and features, any layout of the gradient."""
    ids, rows, features = draw((2, 12, 10, 5, 37, 64), torch.float32)
    dy = torch.randn(2, 64, 5, 5)
    expected = results(label_map, ids, rows, features, 5, dy)
    strided_ids = torch.stack((ids, ids + 1), 1)[:, 0]
    strided_rows, strided_features = rows.t().contiguous().t(), features.t().contiguous().t()
    strided_dy = dy.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    got = results(label_map, strided_ids, strided_rows, strided_features, 5, strided_dy)
    assert all(torch.equal(got[name], expected[name]) for name in got)
    ones = results(label_map, ids, rows, features, 5, torch.ones(()).expand_as(dy))
    torch.testing.assert_close(
        ones["dfeatures"], results(label_map_reference, ids, rows, features, 5, torch.ones_like(dy))["dfeatures"]
    )


def test_the_map_at_full_resolution_never_exists():
    """No intermediate of forward or backward comes near the 64-channel map at full resolution."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.untyped_storage().nbytes() for t in tensors)])
            return out

    ids, rows, features = draw((1, 224, 224, 20, 7, 64), torch.float32)
    features.requires_grad_()
    with Largest():
        out = label_map(ids, rows, features, 20)
        torch.autograd.grad(out, features, torch.ones_like(out))
        ours = largest
        label_map_reference(ids, rows, features, 20)
    assert ours == 20 * 20 * 64 * 4, "something is larger than the output"
    assert largest >= 224 * 224 * 64 * 4, "the measurement does not see the reference's map"


@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
def test_only_the_documented_tensors_are_saved(trained, count_calls):
    """They are ids and rows; a frozen table saves nothing and gets no gradient."""
    ids, rows, features = draw((2, 12, 10, 5, 37, 64), torch.bfloat16)
    other = torch.ones((), requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), count_calls() as calls:
        out = label_map(ids, rows, features.requires_grad_(trained), 5)
        kept = [t for t in saved]
        (out * other).sum().backward()
    assert [t.data_ptr() for t in kept] == ([ids.data_ptr(), rows.data_ptr()] if trained else [])
    assert sum(t.nbytes for t in kept) == trained * (ids.nbytes + rows.nbytes)
    assert len(calls["prismer::label_map_backward"]) == trained


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    for shape, dtype in (((2, 9, 8, 3, 7, 64), torch.float32), ((1, 4, 4, 4, 5, 20), torch.bfloat16)):
        ids, rows, features = draw(shape, dtype)
        size, dy = shape[3], torch.randn(shape[0], shape[3], shape[3], shape[5]).to(dtype)
        for layout in (features, features.t().contiguous().t()):
            layout = layout.detach().requires_grad_(requires_grad)
            torch.library.opcheck(torch.ops.prismer.label_map, (ids, rows, layout, size))
        for gradient in (dy, dy.transpose(1, 2)):
            torch.library.opcheck(torch.ops.prismer.label_map_backward, (gradient, ids, rows, shape[4]))


def test_compile():
    ids, rows, features = draw((2, 9, 8, 3, 7, 64), torch.float32)
    features.requires_grad_()

    def step(features):
        return label_map(ids, rows, features, 3).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(features), features)[0] for f in (compiled, step))
    torch.testing.assert_close(got, expected)


def test_a_row_outside_the_table_is_never_read(on_backend):
    """It raises, or gives NaN where raising would wait for the device."""
    ids, rows, features = draw((1, 8, 8, 4, 37, 64), torch.float32)
    dy = torch.ones(1, 64, 4, 4)
    for bad in (-1, len(features), 2**40):
        wrong = torch.full_like(rows, bad)
        if on_backend != "triton":
            # the message of torch's look-up depends on the number of threads
            with pytest.raises(RuntimeError, match=f"{bad}" if on_backend == "native" else "index|range"):
                label_map(ids, wrong, features, 4)
            continue
        from tests.ops.interpreter import interpreted

        with interpreted():
            got = results(label_map, ids, wrong, features, 4, dy)
            # one bad row makes NaN of the pixels that name it, and of no others
            some = rows.clone()
            some[0, 255] = bad
            part = results(label_map, ids, some, features, 4, dy)
        assert got["out"].isnan().all() and not got["dfeatures"].any()
        spoilt = part["out"].isnan()
        assert spoilt.any() and not spoilt.all() and not part["dfeatures"].isnan().any()


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("shape", ((2, 23, 17, 11, 150, 60), (1, 30, 30, 30, 9, 64)), ids=("resized", "looked-up"))
def test_ledger(shape):
    """Bytes and FLOPs are those of the docstring; every address and every write is checked."""
    from tests.ops.interpreter import interpreted

    B, h, w, size, F, C = shape
    ids, rows, features = draw(shape, torch.bfloat16, cell=6)
    with interpreted() as ledger:
        out = torch.ops.prismer.label_map(ids, rows, features, size)
    P, taps = B * size * size, tap_rows(ids, rows, size)
    blended = int((taps != taps[:, :1]).any(1).sum())
    assert (blended == 0) == (size == h) and blended < P
    assert ledger.bytes_read == 36 * P + C * 2 * (P + 3 * blended)
    assert ledger.bytes_written == C * 2 * P
    assert ledger.launches == 1

    with interpreted() as ledger:
        torch.ops.prismer.label_map_backward(torch.randn(out.shape).bfloat16(), ids, rows, F)
    blocks, met, pixels = -(-F // 64), 0, 0
    for start in range(0, P, 32):
        tile = taps[start : start + 32]
        hits = len((tile // 64).unique())
        met, pixels = met + hits, pixels + hits * len(tile)
    G = -(-P // 32)
    assert 1 < G <= 64 and (F < 64 or pixels < blocks * P)
    assert ledger.dot_flops == met * 2 * 64 * 32 * 64
    assert ledger.bytes_read == blocks * 36 * P + C * 2 * pixels + 4 * G * F * C
    assert ledger.bytes_written == 4 * G * F * C + 4 * F * C
    assert ledger.launches == 2


def tap_rows(ids, rows, size):
    """(P, 4) rows of the taps, from floor and ceil of fractions."""
    from fractions import Fraction
    from math import ceil, floor

    def axis(source):
        places = [Fraction(i * (source - 1), max(size - 1, 1)) for i in range(size)]
        return torch.tensor([floor(p) for p in places]), torch.tensor([ceil(p) for p in places])

    table = rows.gather(1, ids.flatten(1).long()).view(ids.shape)
    return torch.stack([table[:, y][:, :, x].flatten() for y in axis(ids.shape[1]) for x in axis(ids.shape[2])], 1)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(ids=torch.zeros(1, 8, 8)), "pass uint8"),
        (dict(ids=torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), r"\(B, h, w\)"),
        (dict(ids=torch.zeros(1, 0, 8, dtype=torch.uint8)), "at least one pixel"),
        (dict(rows=torch.zeros(1, 256, dtype=torch.int32)), "pass int64"),
        (dict(rows=torch.zeros(2, 256, dtype=torch.int64)), r"\(1, 256\)"),
        (dict(features=torch.zeros(4, 64, dtype=torch.int64)), "floats"),
        (dict(features=torch.zeros(64)), r"\(F, C\)"),
        (dict(size=0), "at least one pixel"),
        (dict(features=torch.zeros(4, 64, device="meta")), "one device"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    ids, rows, features = draw((1, 8, 8, 4, 37, 64), torch.float32)
    with pytest.raises(ValueError, match=message):
        label_map(**{**dict(ids=ids, rows=rows, features=features, size=4), **change})


@pytest.mark.parametrize("on_backend", ("native", "triton"), indirect=True)
def test_float64_runs_on_torch(on_backend):
    ids, rows, features = draw((1, 8, 8, 4, 37, 64))
    with pytest.raises(RuntimeError, match=f"{on_backend} label_map computes in fp32"):
        label_map(ids, rows, features, 4)
    with use_backend(None):
        assert label_map(ids, rows, features, 4).dtype == torch.float64
