"""Proves that the C++ of dropout keeps the same weights as torch's operators, on every instruction set.

Run: pytest tests/ops/test_native_philox.py
"""

import pytest
import torch

from prismer.kernels import philox
from prismer.kernels.dispatch import use_backend

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("poisoned_memory")]
pytest.importorskip("tests.ops.native_sets")  # skips where the extension was not built

ops = torch.ops.prismer_native
SEEDS = (0, -1, -0x123456789ABCDEF, 2**63 - 1, 2**32)


@pytest.mark.parametrize("keys", (1, 3, 4, 63, 64, 65, 200))
@pytest.mark.parametrize(("heads", "row", "rows"), ((1, 0, 1), (5, 0, 3), (2, 7, 4)))
def test_keeps_the_same_as_torch(isa, heads, row, rows, keys):
    for seed in SEEDS:
        call = torch.tensor([seed]), heads, row, rows, keys, round(0.3 * 2**24)
        got = ops.philox_kept(*call)
        assert got.dtype == torch.bool and got.shape == (heads, rows, keys)
        assert torch.equal(got, philox._kept_torch(*call))
        # a byte of a bool is 0 or 1
        assert got.view(torch.uint8).max() <= 1


def test_enough_lines_for_several_threads(isa):
    call = torch.tensor([42]), 6, 0, 50, 1001, round(0.1 * 2**24)
    assert torch.equal(ops.philox_kept(*call), philox._kept_torch(*call))


def test_nothing_and_everything_survives(isa):
    seed = torch.tensor([7])
    assert ops.philox_kept(seed, 2, 0, 3, 100, 0).all()
    assert not ops.philox_kept(seed, 2, 0, 3, 100, 1 << 24).any()
    assert ops.philox_kept(seed, 0, 0, 3, 100, 0).shape == (0, 3, 100)


def test_survivors_are_the_same_with_and_without_the_extension():
    seed, call = torch.tensor([3]), (2, 3, 1, 4, 10, 0.25)
    native = philox.survivors(seed, *call)
    with use_backend("torch"):
        assert torch.equal(native, philox.survivors(seed, *call))
    assert native.shape == (2, 3, 4, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(seed=torch.tensor([1, 2])), "seed is \\(2\\) int64"),
        (dict(seed=torch.tensor([1], dtype=torch.int32)), "expected one int64"),
        (dict(rows=-1), "rows -1"),
        (dict(threshold=(1 << 24) + 1), "threshold up to"),
    ),
)
def test_bad_arguments(change, message):
    call = dict(seed=torch.tensor([1]), heads=1, row=0, rows=1, keys=4, threshold=5) | change
    with pytest.raises(RuntimeError, match=message):
        ops.philox_kept(*call.values())
