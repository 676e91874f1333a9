"""Proves that the C++ statistics of logits, taken chunk by chunk, are exact on every instruction set of this machine.

Run: pytest tests/ops/test_native_logits.py
"""

import math

import pytest
import torch

from prismer.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from prismer.kernels.dispatch import use_backend

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("poisoned_memory")]
pytest.importorskip("tests.ops.native_sets")  # skips where the extension was not built

ops = torch.ops.prismer_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fresh(rows):
    state = torch.zeros(rows, 4)
    state[:, 0] = -math.inf
    return state


def run(logits, bias, targets, widths):
    """The statistics of (R, V) logits, taken in chunks of these widths."""
    state, first = fresh(len(logits)), 0
    for width in widths:
        part = slice(first, first + width)
        ops.logit_statistics(logits[:, part].contiguous(), bias[part].contiguous(), targets, first, state)
        first += width
    assert first == logits.shape[1]
    return state


def exact(logits, bias, targets):
    z = logits.double() + bias.double()
    top = z.amax(1)
    picked = z.gather(1, targets[:, None])[:, 0]
    return torch.stack((top, (z - top[:, None]).exp().sum(1), picked, z.sum(1)), 1)


def check(state, logits, bias, targets):
    truth = exact(logits, bias, targets)
    scale = (logits.double() + bias.double()).abs().sum(1)
    for i, (name, size) in enumerate((("largest", None), ("exp sum", None), ("target's", None), ("sum", scale))):
        size = truth[:, i].abs() if size is None else size
        error = ((state[:, i].double() - truth[:, i]).abs() / size.clamp(min=1e-30)).max()
        assert error < 1e-6, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", ((1,), (15,), (16,), (17, 3), (4096,), (4097,), (5000, 4100, 7), (1,) * 20), ids=str)
@pytest.mark.parametrize("R", (1, 5))
def test_statistics(isa, R, widths, dtype):
    V = sum(widths)
    logits, bias = (3 * torch.randn(R, V) - 20).to(dtype), 5 * torch.randn(V)
    targets = torch.randint(V, (R,))
    targets[0], targets[-1] = 0, V - 1
    check(run(logits, bias, targets, widths), logits, bias, targets)


def test_a_chunk_without_targets_changes_no_picked_logit(isa):
    """Columns 7 to 11 hold no target, and the logit that was picked before stays."""
    state = fresh(3)
    state[:, 2] = 42
    ops.logit_statistics(torch.randn(3, 5), torch.randn(5), torch.tensor([6, 12, 0]), 7, state)
    assert state[:, 2].tolist() == [42, 42, 42]


def test_the_largest_logit_may_come_last(isa):
    """The earlier sum is scaled down, across blocks and across chunks."""
    logits = torch.linspace(-300, 300, 3 * 4096).expand(2, -1).contiguous()
    bias, targets = torch.zeros(3 * 4096), torch.tensor([5, 9000])
    check(run(logits, bias, targets, (2 * 4096, 4096)), logits, bias, targets)


def test_many_equal_terms_keep_their_digits(isa):
    """2^20 terms are summed."""
    logits, bias = torch.full((1, 2**20), 0.1), torch.zeros(2**20)
    state = run(logits, bias, torch.tensor([0]), (2**20,))
    assert state[0, 1] == 2**20 and abs(state[0, 3] / (2**20 * torch.tensor(0.1)) - 1) < 1e-5


def test_masked_logits_count_nothing_and_infinite_ones_stay_visible(isa):
    """Even a whole block may be -inf; +inf and NaN stay visible."""
    logits, bias = torch.zeros(1, 3 * 4096), torch.zeros(3 * 4096)
    bias[:8000] = -math.inf
    state = run(logits, bias, torch.tensor([9000]), (3 * 4096,))
    assert state[0].tolist()[:3] == [0.0, 3 * 4096 - 8000, 0.0]
    nothing = run(logits[:, :4096], bias[:4096], torch.tensor([1]), (4096,))
    assert nothing[0].tolist()[:2] == [-math.inf, 0.0]
    for bad in (math.nan, math.inf):
        logits[0, 9001] = bad
        state = run(logits, torch.zeros(3 * 4096), torch.tensor([0]), (3 * 4096,))
        assert not torch.isfinite(state[0, 1]) or not torch.isfinite(state[0, 0])


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("at", (0, 5, 4095, 4096, 4100, 8999))
def test_one_infinite_entry_among_forbidden_ones(isa, at, bad):
    """In any lane, in a block whose other entries are all -inf, or in the tail."""
    logits, bias = torch.zeros(1, 9000), torch.full((9000,), -math.inf)
    bias[4200:8200] = 0
    logits[0, at], bias[at] = bad, 0
    assert run(logits, bias, torch.tensor([5000]), (9000,))[0, 1].isnan()
    assert run(logits, bias, torch.tensor([5000]), (4096, 4904))[0, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_and_any_number_of_threads_give_the_same(isa, dtype):
    logits, bias, targets = torch.randn(9, 9000).to(dtype), torch.randn(9000), torch.randint(9000, (9,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(logits, bias, targets, (9000,)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
    for i in range(9):
        alone = run(logits[i : i + 1], bias, targets[i : i + 1], (9000,))
        assert torch.equal(alone[0], results[0][i])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_loss_uses_the_statistics(dtype, assert_no_worse):
    """On a CPU without gradients; the loss is no worse than eager."""
    x, weight, bias = torch.randn(6, 16).to(dtype), torch.randn(5000, 16).to(dtype), 3 * torch.randn(5000)
    labels = torch.randint(5000, (6,))
    labels[2] = -100
    arguments = x, weight, bias, labels
    with torch.no_grad():
        ours = linear_cross_entropy(*arguments)
        with use_backend("torch"):
            plain = linear_cross_entropy(*arguments)
    high = x.double(), weight.double(), bias.double(), labels
    assert ours[2] == 0
    assert_no_worse("losses", ours, plain, lambda: linear_cross_entropy_reference(*high))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(2, 3, dtype=torch.float64)), "float64; expected"),
        (dict(logits=torch.zeros(3, 2).T), "logits .* is not contiguous"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"targets are \(3\) int64"),
        (dict(targets=torch.zeros(2)), r"targets are \(2\) float32"),
        (dict(state=torch.zeros(2, 3)), r"state is \(2, 3\)"),
        (dict(bias=torch.zeros(2)), "bias"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    targets = torch.zeros(2, dtype=torch.int64)
    given = dict(logits=torch.zeros(2, 3), bias=torch.zeros(3), targets=targets, first=0, state=fresh(2))
    with pytest.raises(RuntimeError, match=message):
        ops.logit_statistics(*(given | change).values())
