"""Proves that label_map equals expand-then-resize, forward and gradient, on every backend, without the big map.

Run: pytest tests/ops/test_label_map.py
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismer.kernels.dispatch import native_missing, use_backend
from prismer.kernels.label_map import label_map, label_map_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {  # B, h, w, size
    "base": (2, 224, 224, 56),
    "patch14": (1, 224, 224, 64),
    "tiny": (3, 128, 128, 32),
    "equal": (2, 9, 9, 9),
    "larger": (1, 5, 7, 13),
    "primes": (2, 23, 17, 11),
    "one-pixel": (1, 1, 1, 3),
    "to-one": (1, 5, 4, 1),
    "no-rows": (0, 8, 8, 4),
}


@pytest.fixture(params=("native", "torch"))
def backend(request):
    if request.param == "native" and native_missing() is not None:
        pytest.skip(native_missing())
    with use_backend(request.param):
        yield request.param


def draw(B, h, w, dtype=torch.float64, count=37, width=64, cell=3):
    """Maps with regions of `cell` pixels, so that both blended and plain outputs occur; the last id is background."""
    grid = torch.randint(0, 255, (B, -(-h // cell), -(-w // cell)), dtype=torch.uint8)
    ids = grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :h, :w].contiguous()
    ids[:, : h // 2, : w // 3] = 255
    rows = torch.randint(0, count, (B, 256))
    return ids, rows, (3 * torch.randn(count, width, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_label_map(backend, shape, dtype, assert_no_worse):
    B, h, w, size = shape
    ids, rows, features = draw(B, h, w, dtype)
    out = label_map(ids, rows, features, size)
    assert out.dtype == dtype and out.shape == (B, 64, size, size)
    exact = label_map_reference(ids, rows, features.double(), size)
    if dtype == torch.float64:
        # interpolate's own positions are off by some 1e-14 of a pixel
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-11)
    else:
        assert_no_worse("out", out, label_map_reference(ids, rows, features, size), exact)


def test_known_values(backend):
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", ("tiny", "equal", "larger", "primes", "to-one", "no-rows"))
def test_label_map_backward(backend, name, dtype, assert_no_worse):
    B, h, w, size = SHAPES[name]
    ids, rows, features = draw(B, h, w, dtype)
    dy = torch.randn(B, 64, size, size, dtype=torch.float64).to(dtype)

    def gradient(op, features, dy):
        features = features.detach().requires_grad_()
        return torch.autograd.grad(op(ids, rows, features, size), features, dy)[0]

    exact = gradient(label_map_reference, features.double(), dy.double())
    plain = gradient(label_map_reference, features, dy)
    ours = gradient(label_map, features, dy)
    assert ours.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)
    else:
        assert_no_worse("dfeatures", ours, plain, exact, factor=3.0)
    assert torch.equal(ours, gradient(label_map, features, dy)), "dfeatures differ between two runs"


def test_label_map_gradcheck(backend):
    ids, rows, features = draw(2, 5, 4, width=3, count=4)
    # an expanded gradient, as sum() gives, comes with it
    assert torch.autograd.gradcheck(lambda f: label_map(ids, rows, f, 3).sum((2, 3)), features.requires_grad_())


def test_region_is_exact(backend):
    """Inside one region nothing is rounded: the output is the feature, bit for bit."""
    ids, rows, features = draw(1, 32, 32, torch.bfloat16)
    ids.fill_(7)
    out = label_map(ids, rows, features, 10)
    assert torch.equal(out, features[rows[0, 7]][None, :, None, None].expand_as(out))


def test_image_alone_equals_image_in_batch(backend):
    ids, rows, features = draw(3, 40, 40, torch.float32)
    out = label_map(ids, rows, features, 11)
    assert torch.equal(out[1:2], label_map(ids[1:2], rows[1:2], features, 11))


def test_any_layout(backend):
    """Planes cut from (B, planes, h, w), permuted rows and features read the same as contiguous ones."""
    ids, rows, features = draw(2, 12, 10, torch.float32)
    expected = label_map(ids, rows, features, 5)
    strided_ids = torch.stack((ids, ids + 1), 1)[:, 0]
    strided_rows, strided_features = rows.t().contiguous().t(), features.t().contiguous().t()
    out = label_map(strided_ids, strided_rows, strided_features, 5)
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_big_map_never_exists(backend):
    """No intermediate of forward or backward comes near the 64-channel map at full resolution."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.untyped_storage().nbytes() for t in tensors)])
            return out

    ids, rows, features = draw(1, 224, 224, torch.float32)
    features.requires_grad_()
    with Largest():
        out = label_map(ids, rows, features, 56)
        torch.autograd.grad(out, features, torch.ones_like(out))
        ours = largest
        label_map_reference(ids, rows, features, 56)
    assert ours == 56 * 56 * 64 * 4, "something is larger than the output"
    assert largest >= 224 * 224 * 64 * 4, "the measurement does not see the reference's map"


def test_native_op_is_a_good_citizen():
    """opcheck: schema, fake implementation, aliasing; the op itself carries no gradient, the room's Function does."""
    if native_missing() is not None:
        pytest.skip(native_missing())
    for ids, rows, features in (draw(2, 9, 8, torch.float32), draw(1, 4, 4, torch.bfloat16)):
        for layout in (features, features.t().contiguous().t()):
            torch.library.opcheck(torch.ops.prismer.label_map.default, (ids, rows, layout, 3))


def test_row_outside_the_table(backend):
    """A row that features do not have is an error on the CPU, never a read outside the table."""
    ids, rows, features = draw(1, 8, 8, torch.float32)
    for bad in (-1, len(features)):
        with pytest.raises(RuntimeError, match=f"{bad}"):
            label_map(ids, torch.full_like(rows, bad), features, 4)


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
def test_errors(change, message):
    ids, rows, features = draw(1, 8, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        label_map(**{**dict(ids=ids, rows=rows, features=features, size=4), **change})
