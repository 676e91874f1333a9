"""Proves that attention to a shared prefix and listed suffix slots equals plain attention per query over exactly those
keys, on every backend.

Run: pytest tests/ops/test_decode_attention.py
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import prismer.kernels.decode_attention as module
from prismer.kernels.decode_attention import decode_attention, decode_attention_reference
from prismer.kernels.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("native", "triton", "torch")
SHAPES = {  # R, H, Q, K, S, M, A
    "one-of-each": (1, 1, 1, 1, 1, 1, 1),
    "beams": (2, 3, 3, 64, 70, 18, 6),
    "trie": (2, 2, 41, 32, 14, 41, 5),
    "primes": (3, 5, 7, 11, 13, 17, 3),
    "no-prefix": (2, 2, 5, 8, 0, 9, 3),
    "no-suffix": (2, 2, 5, 8, 6, 0, 0),
    "no-listed": (2, 2, 5, 8, 6, 4, 0),
    "no-rows": (0, 2, 5, 8, 6, 4, 2),
    "no-queries": (2, 2, 0, 8, 6, 4, 2),
    "no-keys": (1, 2, 3, 8, 0, 0, 0),
    "head-60-parts": (1, 1, 2, 60, 257, 5, 2),
    "head-80": (1, 1, 3, 80, 33, 5, 2),
    "head-96-parts": (1, 2, 17, 96, 515, 30, 4),
    "head-128": (1, 1, 5, 128, 40, 30, 2),
    "head-160": (2, 1, 33, 160, 70, 9, 3),
    "head-256": (1, 1, 2, 256, 9, 5, 2),
    "many-queries": (1, 1, 67, 32, 20, 140, 3),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=("native", "triton", "listed", "all-slots"), autouse=True)
def on_backend(request, running, monkeypatch):
    """Every backend; torch with both ways of reading the suffix, whatever the shapes would choose."""
    backend = request.param if request.param in BACKENDS else "torch"
    if backend == "torch":
        monkeypatch.setattr(module, "_DENSE", dict(listed=0).get(request.param, 10**6))
    with running(backend):
        yield backend


@pytest.fixture
def dtype(request, on_backend):
    if request.param == torch.float64 and on_backend != "torch":
        pytest.skip(f"{on_backend} decode_attention computes in fp32")
    return request.param


def draw(shape, dtype=torch.float64, per_query=False):
    """Inputs in which every query sees a key if there is one, and in which every -1 and mask entry matters."""
    R, H, Q, K, S, M, A = shape

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, dtype=torch.float64)).to(dtype)

    mask = torch.rand(R, Q, S) < 0.7
    mask[..., :1] = True
    mask[..., -1:] = True
    if S > 300 and R:
        mask[:, :, 10:300] = False  # no key of the first part's last tiles
    ancestors = torch.full((R, Q, A), -1)
    for r in range(R):
        for i in range(Q):
            count = int(torch.randint(1, A + 1, ())) if A else 0
            listed = torch.randperm(M)[:count]
            if len(listed):
                listed[0] = M - 1 if (listed[1:] != M - 1).all() else listed[0]
            ancestors[r, i, torch.randperm(A)[:count]] = listed
    shared_k, suffix_k = normal(R, H, S, K), normal(R, H, M, K)
    shared_v, suffix_v = normal(R, H, S, K) + 1, normal(R, H, M, K) - 1
    if not per_query:
        mask = mask[:, 0] if Q else torch.ones(R, S, dtype=torch.bool)
    return [normal(R, H, Q, K, scale=1.5), shared_k, shared_v, mask, suffix_k, suffix_v, ancestors]


def plain(q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors):
    """One query at a time, with a list of the keys that it sees and no mask."""
    out = torch.zeros_like(q)
    for r in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = shared_mask[r] if shared_mask.dim() == 2 else shared_mask[r, i]
            slots = [slot for slot in ancestors[r, i].tolist() if slot >= 0]
            k = torch.cat((shared_k[r][:, seen], suffix_k[r][:, slots]), 1)
            v = torch.cat((shared_v[r][:, seen], suffix_v[r][:, slots]), 1)
            if k.shape[1]:
                out[r, :, i] = F.scaled_dot_product_attention(q[r, :, i : i + 1], k, v)[:, 0]
    return out


def with_mask(q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors):
    """What a user would write: all keys side by side, and a mask over them; every query sees something."""
    k, v = torch.cat((shared_k, suffix_k), 2), torch.cat((shared_v, suffix_v), 2)
    shared_mask = shared_mask if shared_mask.dim() == 3 else shared_mask[:, None].expand(-1, q.shape[2], -1)
    listed = torch.zeros(*ancestors.shape[:2], suffix_k.shape[2] + 1, dtype=torch.bool)
    listed.scatter_(2, ancestors % listed.shape[2], True)
    mask = torch.cat((shared_mask, listed[..., :-1]), 2)[:, None]
    scores = ((q * q.shape[3] ** -0.5) @ k.mT).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def double(arguments):
    return [a.double() if a.is_floating_point() else a for a in arguments]


def compare(arguments, assert_no_worse):
    out, exact = decode_attention(*arguments), functools.partial(plain, *double(arguments))
    assert out.dtype == arguments[0].dtype and out.transpose(1, 2).is_contiguous()
    if out.dtype == torch.float64:
        torch.testing.assert_close(out, exact(), rtol=1e-12, atol=1e-12)
    else:
        # fp32 is compared with the same matrix products, 16 bits with the fused op,
        # since torch would round scores
        judge = with_mask if out.dtype == torch.float32 and exact().any() else plain
        assert_no_worse("out", out, judge(*arguments), exact, inner=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("per_query", (False, True), ids=("mask-per-row", "mask-per-query"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_attention(shape, per_query, dtype, assert_no_worse):
    arguments = draw(shape, dtype, per_query)
    compare(arguments, assert_no_worse)
    if dtype == torch.float64:
        torch.testing.assert_close(decode_attention_reference(*arguments), plain(*arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str, indirect=True)
@pytest.mark.parametrize("case", ("confident", "large-scores", "offset", "late-maximum"))
def test_hard_inputs(case, dtype, assert_no_worse):
    """One dominant key, scores whose exp overflows without the maximum, a common offset, a maximum that comes last."""
    arguments = draw((1, 2, 5, 32, 300, 12, 3), dtype)
    q, shared_k = arguments[0], arguments[1]
    arguments[3][:] = True
    if case == "confident":
        shared_k[:, :, 7] = 20 * q[:, :, 0]
    elif case == "large-scores":
        # some hundreds of one sign: without the shift, exp2 of them is inf or 0 everywhere
        arguments[0], arguments[1] = q.abs() * 8, -shared_k.abs() * 8
    elif case == "offset":
        arguments[1] = shared_k + 5
        arguments[0] = q + 2
    else:
        ramp = torch.linspace(0, 30, 300)[None, None, :, None].to(dtype)
        arguments[1] = ramp * q[:, :, :1] / 20
    compare(arguments, assert_no_worse)


@pytest.mark.parametrize("on_backend", ("listed", "all-slots"), indirect=True)
@pytest.mark.parametrize("per_query", (False, True), ids=("mask-per-row", "mask-per-query"))
def test_chunks_of_queries_give_the_same(monkeypatch, per_query):
    """Queries are taken a few at a time if memory is short."""
    arguments = draw((2, 4, 41, 16, 14, 41, 5), per_query=per_query)
    whole = decode_attention(*arguments)
    sizes = []

    def recording(attend):
        return lambda q, *rest: sizes.append(q.shape[2]) or attend(q, *rest)

    monkeypatch.setattr(module, "_attend_all_slots", recording(module._attend_all_slots))
    monkeypatch.setattr(module, "_attend_listed_slots", recording(module._attend_listed_slots))
    for floats, most in ((1, 1), (5_000, 11), (20_000, 45)):
        sizes.clear()
        monkeypatch.setattr(module, "_MAX_FLOATS", floats)
        torch.testing.assert_close(decode_attention(*arguments), whole, rtol=1e-12, atol=1e-12)
        assert sum(sizes) == 41 and max(sizes) <= most


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str, indirect=True)
def test_keys_and_values_may_have_any_strides(dtype, on_backend):
    """As in the decoder: (R, Q, H, K) in memory, a cache that is read up to a step, one table for all rows."""
    arguments = draw(SHAPES["beams"], dtype)
    arguments[6] = arguments[6][:1].expand(2, -1, -1).contiguous()
    expected = decode_attention(*arguments)
    for i in (0, 1, 2, 4, 5):
        arguments[i] = arguments[i].transpose(1, 2).contiguous().transpose(1, 2)
    arguments[2] = arguments[2].contiguous()  # values with other strides than the keys
    for i in (4, 5):
        arguments[i] = torch.cat((arguments[i], torch.full_like(arguments[i], torch.nan)), 2)[:, :, :18]
    arguments[0] = arguments[0].mT.contiguous().mT
    arguments[3] = arguments[3].T.contiguous().T
    arguments[6] = arguments[6][:1].expand(2, -1, -1)
    if on_backend == "torch":
        torch.testing.assert_close(decode_attention(*arguments), expected)
    else:
        assert torch.equal(decode_attention(*arguments), expected)


def test_keys_that_are_not_seen_do_not_matter():
    """They may hold anything finite; a query that sees nothing gives zeros."""
    arguments = draw(SHAPES["primes"], torch.float32)
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
    # one query sees nothing, and others do
    arguments[6][1, 2, 0] = 4
    out = decode_attention(*arguments)
    torch.testing.assert_close(out[1, :, 2], arguments[5][1, :, 4])
    assert out[0].eq(0).all() and out[1, :, [0, 1, 3]].eq(0).all()


def test_reordering_beams_reorders_the_output():
    """Only the index table and the queries move."""
    arguments = draw(SHAPES["beams"], torch.float32)
    order = torch.tensor([2, 0, 1])
    expected = decode_attention(*arguments)[:, :, order]
    arguments[0], arguments[6] = arguments[0][:, :, order], arguments[6][:, order]
    torch.testing.assert_close(decode_attention(*arguments), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str, indirect=True)
@pytest.mark.parametrize("name", ("trie", "head-160"))
def test_a_row_alone_equals_its_row_in_a_batch_and_repeats(name, dtype, on_backend):
    """Bit for bit, but for the matrix products of torch."""
    arguments = draw(SHAPES[name], dtype)
    together = decode_attention(*arguments)
    alone = torch.cat([decode_attention(*(a[r : r + 1] for a in arguments)) for r in range(2)])
    assert torch.equal(decode_attention(*arguments), together)
    if on_backend == "torch":
        torch.testing.assert_close(alone, together)
    else:
        assert torch.equal(alone, together)


def test_a_recorded_gradient_is_refused():
    """It is refused before anything is saved; without one the op runs."""
    arguments = draw(SHAPES["primes"], torch.float32)
    expected = decode_attention(*arguments)
    for i in (0, 1, 2, 4, 5):
        trained = list(arguments)
        trained[i] = arguments[i].clone().requires_grad_()
        with pytest.raises(ValueError, match="has no gradient"):
            decode_attention(*trained)
        with torch.no_grad():
            assert torch.equal(decode_attention(*trained), expected)
    with torch.inference_mode():
        assert torch.equal(decode_attention(*arguments), expected)
    with use_backend("reference"):
        decode_attention(*trained).sum().backward()
    assert trained[5].grad.abs().sum() > 0


def test_opcheck():
    for name, dtype, per_query in (("trie", torch.float32, False), ("primes", torch.bfloat16, True)):
        arguments = draw(SHAPES[name], dtype, per_query)
        arguments[3] = arguments[3] if per_query else arguments[3][:, None]
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.prismer.decode_attention, arguments, test_utils=tests)
        arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
        torch.library.opcheck(torch.ops.prismer.decode_attention, arguments)


def test_compile():
    arguments = draw(SHAPES["primes"], torch.float32)
    compiled = torch.compile(lambda *a: decode_attention(*a) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), decode_attention(*arguments) * 2)


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize(
    "shape",
    ((2, 2, 3, 60, 270, 14, 5), (1, 2, 37, 96, 300, 50, 3), (2, 2, 3, 60, 70, 14, 5), (1, 2, 37, 96, 256, 50, 3)),
    ids=("beams-split", "candidates-split", "beams", "candidates"),
)
@pytest.mark.parametrize("per_query", (False, True), ids=("mask-per-row", "mask-per-query"))
def test_ledger(shape, per_query):
    """Bytes and FLOPs are those of the docstring; every address and every write is checked.

    A short prefix takes one launch.
    """
    from tests.ops.interpreter import interpreted

    R, H, Q, K, S, M, A = shape
    arguments = draw(shape, torch.bfloat16, per_query)
    # a part of a cache, so that the strides are not those of a contiguous tensor
    for i in (1, 2, 4, 5):
        arguments[i] = torch.cat((arguments[i], arguments[i]), 2)[:, :, : arguments[i].shape[2]]
    with interpreted() as ledger:
        decode_attention(*arguments)
    BQ, BN, K_tile = (16, 64, 64) if Q == 3 else (32, 32, 64 + 32)
    # up to 256 shared keys there is one part, which writes the output itself
    whole = S <= 256
    tiles, parts, N = -(-Q // BQ), 1 if whole else -(-S // 256) + 1, R * H * Q
    listed = int((arguments[6] >= 0).sum())
    mask = R * H * Q * S if per_query else R * H * S * tiles
    # the one part reads the queries for the shared keys, and again for the slots
    split = (
        N * K * 2 * (2 if whole else parts) + 2 * R * H * S * K * 2 * tiles + mask + 8 * N * A + 2 * H * listed * K * 2
    )
    partial = 0 if whole else N * parts * (4 * K + 8)
    assert ledger.bytes_read == split + partial
    assert ledger.bytes_written == partial + N * K * 2
    keys = sum(-(-min(256, S - start) // BN) * BN for start in range(0, S, 256))
    assert ledger.dot_flops == 4 * K_tile * R * H * tiles * BQ * keys
    assert ledger.launches == (1 if whole else 2)


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_a_slot_outside_the_cache_is_not_read():
    from tests.ops.interpreter import interpreted

    arguments = draw(SHAPES["primes"], torch.float32)
    expected = decode_attention(*arguments)
    arguments[6] = arguments[6].where(arguments[6] >= 0, 17)
    with interpreted():
        assert torch.equal(decode_attention(*arguments), expected)


@pytest.mark.parametrize("on_backend", ("listed",), indirect=True)
@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (0, lambda t: t[0], "q has shape"),
        (0, lambda t: t.long(), "q is torch.int64"),
        (1, lambda t: t[:, :1], "shared_k is"),
        (2, lambda t: t.float(), "shared_v is torch.float32"),
        (3, lambda t: t[:, :-1], "shared_mask is"),
        (3, lambda t: t.long(), "shared_mask is torch.int64"),
        (5, lambda t: t[:, :, :-1], "suffix_v is"),
        (6, lambda t: t[:, :-1], "ancestors is"),
        (6, lambda t: t.int(), "ancestors is torch.int32"),
        (4, lambda t: t.to("meta"), "one device"),
    ],
)
def test_bad_arguments_are_refused(position, wrong, message):
    arguments = draw(SHAPES["primes"])
    arguments[position] = wrong(arguments[position])
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments)


@pytest.mark.parametrize("on_backend", ("native", "triton"), indirect=True)
def test_float64_runs_on_torch(on_backend):
    arguments = draw(SHAPES["primes"])
    with pytest.raises(RuntimeError, match=f"{on_backend} decode_attention computes in fp32"):
        decode_attention(*arguments)
    with use_backend(None):
        assert decode_attention(*arguments).dtype == torch.float64
