"""Proves that attention to a shared prefix and listed suffix slots equals plain attention per query over exactly those
keys. Run: pytest tests/ops/test_decode_attention.py"""

import pytest
import torch
import torch.nn.functional as F

import prismer.kernels.decode_attention as room
from prismer.kernels.decode_attention import decode_attention, decode_attention_reference

SHAPES = {  # R, H, Q, K, S, M, A
    "one-of-each": (1, 1, 1, 1, 1, 1, 1),
    "beams": (2, 12, 3, 64, 4, 18, 6),
    "trie": (2, 4, 41, 16, 14, 41, 5),
    "primes": (3, 5, 7, 11, 13, 17, 3),
    "no-prefix": (2, 2, 5, 8, 0, 9, 3),
    "no-suffix": (2, 2, 5, 8, 6, 0, 0),
    "head-60": (1, 3, 2, 60, 257, 5, 2),
}


def draw(shape, dtype=torch.float64, per_query=False, seed=0):
    """Inputs in which every query sees at least one key, and every -1 and every mask entry matters."""
    generator = torch.Generator().manual_seed(seed)
    R, H, Q, K, S, M, A = shape

    def normal(*size):
        return (2 * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)

    mask = torch.rand(R, Q, S, generator=generator) < 0.7
    mask[..., :1] = True
    ancestors = torch.full((R, Q, A), -1)
    for r in range(R):
        for i in range(Q):
            count = int(torch.randint(1, A + 1, (), generator=generator)) if A else 0
            ancestors[r, i, :count] = torch.randperm(M, generator=generator)[:count]
    shared_k, suffix_k = normal(R, H, S, K), normal(R, H, M, K)
    shared_v, suffix_v = normal(R, H, S, K), normal(R, H, M, K)
    return [
        normal(R, H, Q, K), shared_k, shared_v, mask if per_query else mask[:, 0], suffix_k, suffix_v, ancestors
    ]  # fmt: skip


def plain(q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors):
    """One query at a time, with a list of the keys it sees and no mask at all."""
    out = torch.zeros_like(q)
    for r in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = shared_mask[r] if shared_mask.dim() == 2 else shared_mask[r, i]
            slots = [slot for slot in ancestors[r, i].tolist() if slot >= 0]
            k = torch.cat((shared_k[r][:, seen], suffix_k[r][:, slots]), 1)
            v = torch.cat((shared_v[r][:, seen], suffix_v[r][:, slots]), 1)
            out[r, :, i] = F.scaled_dot_product_attention(q[r, :, i : i + 1], k, v)[:, 0]
    return out


@pytest.fixture(params=(0, 10**6), ids=("listed", "all-slots"), autouse=True)
def path(request, monkeypatch):
    """Both ways of reading the suffix, whatever the shapes would choose."""
    monkeypatch.setattr(room, "_DENSE", request.param)


@pytest.mark.parametrize("per_query", (False, True), ids=("mask-per-row", "mask-per-query"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_attention(shape, per_query):
    arguments = draw(shape, per_query=per_query)
    expected = plain(*arguments)
    torch.testing.assert_close(decode_attention(*arguments), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        decode_attention_reference(*arguments), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("per_query", (False, True), ids=("mask-per-row", "mask-per-query"))
def test_chunks(monkeypatch, per_query):
    """Queries taken one or a few at a time give what they give together, and are taken so where memory is short."""
    arguments = draw(SHAPES["trie"], per_query=per_query)
    whole = decode_attention(*arguments)
    sizes = []

    def recording(attend):
        return lambda q, *rest: sizes.append(q.shape[2]) or attend(q, *rest)

    monkeypatch.setattr(room, "_attend_all_slots", recording(room._attend_all_slots))
    monkeypatch.setattr(room, "_attend_listed_slots", recording(room._attend_listed_slots))
    for floats, most in ((1, 1), (5_000, 11), (20_000, 45)):
        sizes.clear()
        monkeypatch.setattr(room, "_MAX_FLOATS", floats)
        torch.testing.assert_close(decode_attention(*arguments), whole, rtol=1e-12, atol=1e-12)
        assert sum(sizes) == 41 and max(sizes) <= most


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_low_precision(dtype):
    """fp32 inside: at most twice the error of plain PyTorch in the same dtype, plus one rounding of the output."""
    arguments = draw(SHAPES["trie"], dtype)
    exact = plain(*(a.double() if a.is_floating_point() else a for a in arguments))
    ours = (decode_attention(*arguments).double() - exact).abs().max()
    theirs = (plain(*arguments).double() - exact).abs().max()
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max() / 2


def test_strides():
    """Layouts as the decoder makes them, (R, Q, H, K) in memory, and a cache read up to a step."""
    arguments = draw(SHAPES["beams"])
    expected = plain(*arguments)
    for i in (0, 1, 2, 4, 5):
        arguments[i] = arguments[i].transpose(1, 2).contiguous().transpose(1, 2)
    for i in (4, 5):
        arguments[i] = torch.cat((arguments[i], torch.full_like(arguments[i], torch.nan)), 2)[
            :, :, :18
        ]
    torch.testing.assert_close(decode_attention(*arguments), expected, rtol=1e-12, atol=1e-12)


def test_unseen_values_do_not_leak():
    """What no query lists or what the mask hides may hold anything finite; a query that sees nothing gives zeros."""
    arguments = draw(SHAPES["primes"])
    mask, ancestors = arguments[3], arguments[6]
    expected = decode_attention(*arguments)
    for i in (1, 2):
        arguments[i] = arguments[i].masked_fill(~mask[:, None, :, None], 1e6)
    listed = (ancestors[..., None] == torch.arange(17)).flatten(1, 2).any(1)
    assert not listed.all() and not mask.all()
    for i in (4, 5):
        arguments[i] = arguments[i].masked_fill(~listed[:, None, :, None], 1e6)
    torch.testing.assert_close(decode_attention(*arguments), expected, rtol=0, atol=0)
    arguments[3] = torch.zeros_like(mask)
    arguments[6] = torch.full_like(ancestors, -1)
    for function in (decode_attention, decode_attention_reference):
        assert function(*arguments).eq(0).all()


def test_rows_are_independent():
    """Row i alone equals row i in a batch."""
    arguments = draw(SHAPES["trie"])
    together = decode_attention(*arguments)
    alone = torch.cat([decode_attention(*(a[r : r + 1] for a in arguments)) for r in range(2)])
    torch.testing.assert_close(alone, together, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (0, lambda t: t[0], "q has shape"),
        (1, lambda t: t[:, :1], "shared_k is"),
        (2, lambda t: t.float(), "shared_v is .* torch.float32"),
        (3, lambda t: t[:, :-1], "shared_mask is"),
        (3, lambda t: t.long(), "shared_mask is .* torch.int64"),
        (5, lambda t: t[:, :, :-1], "suffix_v is"),
        (6, lambda t: t[:, :-1], "ancestors is"),
        (6, lambda t: t.int(), "ancestors is .* torch.int32"),
    ],
)
def test_refuses(position, wrong, message):
    arguments = draw(SHAPES["primes"])
    arguments[position] = wrong(arguments[position])
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments)
