"""Proves that attention is its definition, forward and every gradient, on every backend: self, causal, padded, cross,
with dropout that depends on seed and place alone; and that frozen parts cost nothing.

Run: pytest tests/ops/test_attention.py
"""

import functools
import math
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import machine
from prismer.kernels.attention import OP, attention, attention_reference, native_backend, torch_backend, triton_backend
from prismer.kernels.attention.call import Facts
from prismer.kernels.dispatch import use_backend
from prismer.kernels.philox import philox, survivors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {  # B, H, N, L, K, what else
    "one": (1, 1, 1, 1, 32, ""),
    "self": (1, 2, 37, 37, 64, ""),
    "causal": (1, 1, 65, 65, 32, "causal"),
    "padded": (3, 1, 17, 45, 64, "mask"),
    "causal-padded": (2, 1, 33, 33, 32, "causal mask"),
    "text": (2, 1, 40, 40, 64, "causal mask dropout"),
    "text-to-image": (1, 2, 7, 70, 128, "dropout"),
    "resampler": (1, 2, 20, 81, 96, ""),
    "wide-resampler": (1, 1, 33, 40, 160, ""),
    "narrow": (2, 1, 35, 35, 32, "causal mask dropout"),
}
SDPA_CASES = ("one", "self", "causal", "padded", "causal-padded")
EAGER_CASES = ("one", "self", "causal", "resampler", "wide-resampler")
RUNS = [(backend, case) for backend in ("triton", "torch") for case in CASES]
RUNS += [("sdpa", case) for case in SDPA_CASES] + [("eager", case) for case in EAGER_CASES]
SEED = torch.tensor([-0x123456789ABCDEF])
P = 0.3


def small_blocks(BM=32, BN=32):
    return lambda *shape: dict(BM=BM, BN=BN, num_warps=4, num_stages=1)


@pytest.fixture
def blocks(monkeypatch):
    """Small Triton blocks, so that small tensors have several; call it again for other sizes."""

    def use(BM=32, BN=32):
        monkeypatch.setattr(triton_backend, "tiles", small_blocks(BM, BN))
        # what a launch needs beside its tensors is kept
        triton_backend._settings.cache_clear()

    use()
    yield use
    triton_backend._settings.cache_clear()


@pytest.fixture
def on(running):
    """Call it with a name to run the rest of the test on that backend."""
    with ExitStack() as stack:
        yield lambda backend: stack.enter_context(running(backend))


def draw(B, H, N, L, K, what, dtype=torch.float64):
    """Tensors by name, views of a packed projection (in cross-attention v is apart), and the options of the call."""
    packed = torch.randn(B, max(N, L), 3, H, K, dtype=torch.float64)
    packed *= torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1)
    packed += torch.tensor([0.0, 0.0, 0.5]).view(3, 1, 1)
    q, k, v = packed.to(dtype).permute(2, 0, 3, 1, 4)
    tensors = dict(q=q[:, :, :N], k=k[:, :, :L], v=v[:, :, :L])
    if N != L:
        tensors["v"] = tensors["v"].contiguous()
    options = dict(causal="causal" in what)
    if "mask" in what:
        # one sample sees nothing, one everything; causal queries may see nothing at first
        options["key_mask"] = torch.rand(B, L) > 0.5
        options["key_mask"][0] = False
        options["key_mask"][-1] = B != 2
        options["key_mask"][-1, 1:] = True
    if "dropout" in what:
        options |= dict(dropout=P, seed=SEED)
    return tensors, options


def visible(q, k, causal, key_mask):
    """(B, 1, N, L)"""
    B, N, L = q.shape[0], q.shape[2], k.shape[2]
    seen = torch.ones(B, N, L, dtype=torch.bool)
    if causal:
        seen &= torch.arange(L) <= torch.arange(N)[:, None]
    if key_mask is not None:
        seen &= key_mask[:, None]
    return seen[:, None]


def plain(q, k, v, causal=False, key_mask=None, dropout=0.0, seed=None):
    """What a user would write, in the dtype of the tensors."""
    seen = visible(q, k, causal, key_mask)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    some = seen.any(3, keepdim=True)
    weights = scores.masked_fill(~seen & some, float("-inf")).softmax(3) * some
    if dropout:
        # (B, H, N, L): what dropout multiplies weights by
        weights = weights * (survivors(seed, *weights.shape[:2], 0, *weights.shape[2:], dropout) / (1 - dropout)).to(
            weights.dtype
        )
    return weights @ v


def results(op, tensors, dout, dtype, frozen=(), **options):
    leaves = {name: t.detach().to(dtype).requires_grad_(name not in frozen) for name, t in tensors.items()}
    out = op(**leaves, **options)
    trained = {name: leaf for name, leaf in leaves.items() if name not in frozen}
    grads = torch.autograd.grad(out, list(trained.values()), dout.to(dtype))
    return {"out": out.detach(), **{"d" + name: g for name, g in zip(trained, grads, strict=True)}}


def compare(tensors, options, dtype, assert_no_worse, saturated=False):
    low = {name: t.to(dtype) for name, t in tensors.items()}
    dout = torch.randn(low["q"].shape).to(dtype)
    got = results(attention, low, dout, dtype, **options)
    expected = results(plain, low, dout, dtype, **options)
    truth = functools.partial(results, attention_reference, low, dout, torch.float64, **options)
    exact, judged = truth(), {}
    for name, value in got.items():
        assert value.dtype == dtype, name
        if saturated and name in ("dq", "dk"):
            # where one key has all the weight, dout . v and dout . out cancel up to one rounding, in every flash
            # attention; the rule judges larger errors, since large scores are rounded too, in every order otherwise
            terms = (dout.double().abs() @ low["v"].double().abs().mT).amax()
            cancelled = terms * low["q" if name == "dk" else "k"].abs().amax()
            if (value.double() - exact[name]).abs().amax() <= 2 * torch.finfo(dtype).eps * cancelled:
                continue
        judged[name] = value
    assert_no_worse("", judged, expected, truth)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), RUNS, ids=lambda x: x)
def test_attention(backend, case, dtype, blocks, on, assert_no_worse):
    on(backend)
    tensors, options = draw(*CASES[case], dtype)
    got = compare(tensors, options, dtype, assert_no_worse, case == "one")
    # heads merge by a view
    B, H, N, K = got["out"].shape
    got["out"].transpose(1, 2).view(B, N, H * K)
    if "key_mask" in options:
        assert (got["out"][0] == 0).all() and (got["dq"][0] == 0).all() and (got["dk"][0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", ("massive", "same", "tiny", "hot-key"))
@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_extreme_inputs(backend, case, dtype, blocks, on, assert_no_worse):
    """A saturated and a uniform softmax, tiny numbers, and a last key that outweighs all others."""
    on(backend)
    tensors, options = draw(1, 1, 18, 40, 32, "")
    if case == "massive":
        tensors["q"], tensors["k"] = 30 * tensors["q"], 30 * tensors["k"]
    elif case == "same":
        tensors["k"] = tensors["k"][:, :, :1].expand(-1, -1, 40, -1).contiguous()
    elif case == "tiny":
        tensors = {name: 1e-6 * t for name, t in tensors.items()}
    else:
        tensors["k"][:, :, -1] = 20 * tensors["q"][:, :, 0]
    compare(tensors, options, dtype, assert_no_worse, case in ("massive", "hot-key"))


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_the_blocks_of_a_real_launch(backend, on, assert_no_worse):
    """The decoder's shape with the blocks of a launch: one program computes all of it."""
    on(backend)
    assert triton_backend.tiles("forward", 64, 2, 40, 40, True)["BN"] == 64
    tensors, options = draw(1, 1, 40, 40, 64, "causal dropout", torch.bfloat16)
    compare(tensors, options, torch.bfloat16, assert_no_worse)


def test_the_reference_is_torchs_attention():
    """The definition agrees with torch's attention, and with `plain`, which is written independently."""
    for case in CASES.values():
        tensors, options = draw(*case)
        out = attention_reference(**tensors, **options)
        torch.testing.assert_close(out, plain(**tensors, **options))
        with use_backend("reference"):
            assert torch.equal(attention(**tensors, **options), out)
    tensors, _ = draw(*CASES["self"])
    expected = F.scaled_dot_product_attention(*tensors.values(), is_causal=True, scale=0.3)
    torch.testing.assert_close(attention_reference(**tensors, causal=True, scale=0.3), expected)
    assert attention_reference(*(t.bfloat16() for t in tensors.values())).dtype == torch.bfloat16


def test_blocks_of_queries_give_the_same(monkeypatch):
    """The torch backend gives the same, whether all scores fit a block or those of five queries do."""
    tensors, options = draw(2, 2, 37, 37, 32, "causal mask dropout")
    dout = torch.randn(2, 2, 37, 32)
    with use_backend("torch"):
        whole = results(attention, tensors, dout, torch.float64, **options)
        monkeypatch.setattr(torch_backend, "_BLOCK_BYTES", 8 * 4 * 37 * 5)
        for name, value in results(attention, tensors, dout, torch.float64, **options).items():
            torch.testing.assert_close(value, whole[name])


# dropout


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
)
def test_philox_gives_the_known_answers(counter, seed, words):
    """The published test vectors of Philox 4x32-10."""
    got = philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in got) == words


def test_dropout_depends_on_the_place_alone(blocks, on):
    """With a unit matrix as values the output is the dropped weights: the zeros agree in all backends and blocks."""
    tensors, _ = draw(2, 2, 64, 64, 64, "")
    tensors["v"][:] = torch.eye(64)
    tensors = {name: t.float() for name, t in tensors.items()}
    wanted = survivors(SEED, 2, 2, 0, 64, 64, P)
    on("triton")
    for backend, shape in (("torch", None), ("triton", (16, 32)), ("triton", (32, 16))):
        if shape:
            blocks(*shape)
        out = attention(**tensors, dropout=P, seed=SEED, backend=backend)
        assert torch.equal(out != 0, wanted), (backend, shape)


def test_dropout_is_fair():
    """A share of 1 - p survives; other heads, queries, keys and seeds keep others."""
    kept = survivors(SEED, 2, 3, 0, 101, 203, P).double()
    assert abs(kept.mean().item() - (1 - P)) < 4 * math.sqrt(P * (1 - P) / kept.numel())
    flat = kept.flatten(0, 1)
    others = [survivors(SEED + 1, 2, 3, 0, 101, 203, P)]
    others += [kept.roll(shift, dim) for dim, shift in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 4))]
    for other in others:
        # independent: the covariance is that of chance
        covariance = ((flat - 1 + P) * (other.double().flatten(0, 1) - 1 + P)).mean()
        assert abs(covariance.item()) < 4 * P * (1 - P) / math.sqrt(kept.numel())
    assert torch.equal(survivors(SEED, 2, 3, 50, 51, 203, P), kept[:, :, 50:].bool())


@pytest.mark.parametrize("backend", ("torch", "sdpa", "reference"))
def test_without_a_seed_torchs_generator_decides(backend):
    tensors, _ = draw(*CASES["self"], torch.float32)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(attention(**tensors, dropout=0.5, backend=backend))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# memory, layouts, reproducibility


@pytest.mark.parametrize("backend", ("triton", "torch"))
@pytest.mark.parametrize(("N", "L"), ((0, 5), (3, 0), (0, 0)))
def test_no_queries_or_no_keys(backend, N, L, blocks, on):
    on(backend)
    q, k, v = (torch.randn(2, 1, n, 32, requires_grad=True) for n in (N, L, L))
    out = attention(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = attention_reference(q, k, v)
    wanted = torch.autograd.grad(expected.sum(), (q, k, v))
    torch.testing.assert_close(out, expected)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_layouts_of_inputs_and_gradients(backend, blocks, on, assert_no_worse):
    """A transposed last dimension, keys that all samples share, an expanded gradient; gradients lie (B, N, H, K)."""
    on(backend)
    q = torch.randn(2, 2, 32, 9).mT.requires_grad_()
    k, v = (torch.randn(1, 2, 11, 32).expand(2, -1, -1, -1).requires_grad_() for _ in range(2))

    def gradients(op, *leaves):
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(op(*leaves, scale=0.3).sum(), leaves), strict=True))

    got, wanted = gradients(attention, q, k, v), gradients(attention_reference, q, k, v)
    high = [t.detach().double().requires_grad_() for t in (q, k, v)]
    assert_no_worse("", got, wanted, lambda: gradients(attention_reference, *high))
    assert all(t.transpose(1, 2).is_contiguous() for t in got.values())


def test_repeats_and_a_sample_alone_give_the_same_bits(blocks, on):
    on("triton")
    tensors, options = draw(2, 2, 20, 53, 32, "mask", torch.bfloat16)
    dout = torch.randn(2, 2, 20, 32).bfloat16()
    first = results(attention, tensors, dout, torch.bfloat16, **options)
    again = results(attention, tensors, dout, torch.bfloat16, **options)
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = results(
        attention,
        {name: t[1:] for name, t in tensors.items()},
        dout[1:],
        torch.bfloat16,
        key_mask=options["key_mask"][1:],
    )
    assert all(torch.equal(alone[name], first[name][1:]) for name in first)


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_saved_bytes(backend, blocks, on):
    """Saved are q, k, v, the output and one number a row, without a copy; nothing if nothing trains."""
    on(backend)
    tensors, _ = draw(1, 2, 9, 17, 32, "", torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(**tensors)
        assert not saved
        attention(**tensors | dict(q=tensors["q"].requires_grad_()))
    assert sum(t.nbytes for t in saved) == 2 * (9 + 17 + 17 + 9) * 2 * 32 + 2 * 9 * 4
    storages = [t.untyped_storage().data_ptr() for t in saved]
    assert all(t.untyped_storage().data_ptr() in storages for t in tensors.values())


@pytest.mark.parametrize("frozen", (("q",), ("k",), ("v",), ("k", "v")), ids="-".join)
def test_frozen_parts_are_not_computed(frozen, blocks, on, count_calls):
    from tests.ops.interpreter import interpreted

    tensors, _ = draw(1, 1, 9, 17, 32, "", torch.float32)
    dout = torch.randn(1, 1, 9, 32)
    with use_backend("torch"), count_calls() as calls:
        expected = results(attention, tensors, dout, torch.float32, frozen)
    call = calls["prismer::attention_backward"][0]
    need_keys = frozen != ("k", "v")
    assert (call["need_q"], call["need_keys"]) == ("q" not in frozen, need_keys)
    on("triton")
    with interpreted() as ledger:
        got = results(attention, tensors, dout, torch.float32, frozen)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)
    assert ledger.kernels.count("_keys_kernel") == need_keys
    assert ("_queries_kernel", "p_k") in ledger.traffic or "q" in frozen


def formula(B, H, N, L, K, what, BM, BN, s):
    """Bytes read, bytes written and dot FLOPs of the three kernels, from the docstring of `triton_backend.py`."""
    causal, masked, dropout = ("causal" in what), ("mask" in what), ("dropout" in what)
    query_blocks, key_blocks = range(0, N, BM), range(0, L, BN)
    seen = [min(L, i + BM) if causal else L for i in query_blocks]  # keys that a block of queries reads
    pairs = sum(-(-n // BN) for n in seen)
    keys = sum(n * (2 * K * s + masked) for n in seen)
    seeds = 8 * dropout * len(query_blocks)
    forward = (N * K * s + keys + seeds, N * K * s + 4 * N, pairs * 4 * BM * BN * K)
    queries = (3 * N * K * s + 4 * N + keys + seeds, N * K * s + 4 * N, pairs * 6 * BM * BN * K)
    later = [N - (j // BM * BM if causal else 0) for j in key_blocks]  # queries that a block of keys reads
    own = 2 * L * K * s
    read = own + L * masked + 8 * dropout * len(key_blocks) + sum(later) * (2 * K * s + 8)
    keys_kernel = (read, own, sum(-(-n // BM) for n in later) * 8 * BM * BN * K)
    return [tuple(B * H * x for x in kernel) for kernel in (forward, queries, keys_kernel)]


@pytest.mark.parametrize("case", ("causal", "resampler", "narrow"))
def test_traffic_is_the_published_formula(case, blocks, on):
    """Bytes and FLOPs are those of the docstring; the interpreter checks every address and every write."""
    from tests.ops.interpreter import interpreted

    BM, BN = 16, 32
    blocks(BM, BN)
    on("triton")
    tensors, options = draw(*CASES[case], torch.bfloat16)
    B, H, N, K = tensors["q"].shape
    with interpreted() as ledger:
        results(attention, tensors, torch.randn(B, N, H, K).transpose(1, 2), torch.bfloat16, **options)
    read, written, flops = (sum(column) for column in zip(*formula(*CASES[case], BM, BN, 2), strict=True))
    assert ledger.dot_flops == flops
    assert ledger.bytes_read == read
    assert ledger.bytes_written == written
    assert ledger.launches == 3


# torch's own machinery


@pytest.mark.parametrize("backend", ("triton", "torch"))
@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(backend, requires_grad, blocks, on):
    on(backend)
    tensors, _ = draw(1, 1, 9, 9, 32, "", torch.float32)
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in tensors.values())
    mask = torch.arange(9)[None] > 1
    options = (True, P, 0.2, backend)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "torch":
        utils += ("test_aot_dispatch_dynamic",)
    for arguments in ((q, k, v, mask, SEED, *options), (q, k, v, None, None, False, 0.0, 0.2, backend)):
        torch.library.opcheck(torch.ops.prismer.attention, arguments, test_utils=utils)
        with torch.no_grad():
            out, lse = torch.ops.prismer.attention(*arguments)
            needs = (True, True) if requires_grad else (False, arguments[3] is not None)
            back = (torch.randn_like(out), *arguments[:5], out, lse, *arguments[5:], *needs)
            torch.library.opcheck(torch.ops.prismer.attention_backward, back, test_utils=utils)


@pytest.mark.parametrize("backend", ("triton", "torch", "sdpa"))
def test_compile(backend, blocks, on):
    on(backend)
    case = "padded" if backend == "sdpa" else "text"
    tensors, options = draw(*CASES[case], torch.float32)
    leaves = [t.detach().requires_grad_() for t in tensors.values()]

    def step(*leaves):
        return attention(**dict(zip(tensors, leaves, strict=True)), **options).square().sum()

    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    with use_backend("torch"):
        for case in ((2, 1, 3, 6, 5, "mask dropout"), (1, 2, 4, 4, 3, "causal")):
            tensors, options = draw(*case)
            leaves = [t.detach().requires_grad_() for t in tensors.values()]
            names = list(tensors)
            assert torch.autograd.gradcheck(
                lambda *t, names=names, options=options: attention(**dict(zip(names, t, strict=True)), **options),
                leaves,
            )


# which backend


@pytest.mark.cpu
@pytest.mark.parametrize(("amx", "mkl"), ((False, True), (True, True), (False, False)))
def test_the_instruction_set_and_the_vendor_decide_until_it_is_measured(monkeypatch, amx, mkl):
    """AMX multiplies 16 bits faster than our vectors, MKL is fast for few queries, whose gradient is eager."""
    if machine.native_missing() is not None or torch.ops.prismer_native.cpu_capability() != "avx512":
        pytest.skip("the kernel is chosen on AVX-512 alone")
    monkeypatch.setattr(native_backend, "has_amx", lambda: amx)
    monkeypatch.setattr(native_backend, "mkl_is_slow", lambda: not mkl)

    def chosen(queries, dtype, gradient=False):
        shape = 8, queries, 1024, 64, 0
        return OP.choose(Facts(device=torch.device("cpu"), dtype=dtype, head_dim=64, shape=shape, gradient=gradient))

    assert chosen(1024, torch.float32) == "native"
    assert chosen(1024, torch.bfloat16) == ("sdpa" if amx else "native")
    assert chosen(32, torch.float32, True) == ("sdpa" if mkl else "native")
    assert chosen(32, torch.bfloat16) == ("sdpa" if amx or mkl else "native")
    assert chosen(32, torch.bfloat16, True) == "eager"
    assert chosen(1024, torch.bfloat16, True) == ("sdpa" if amx else "native")
    assert chosen(512, torch.float32) == ("sdpa" if mkl else "native")
    assert chosen(512, torch.bfloat16) == ("sdpa" if amx or mkl else "native")
    assert chosen(512, torch.float32, True) == "native"


@pytest.mark.cpu
def test_which_backend_is_chosen(count_calls, monkeypatch):
    """On a CPU ours where it is faster or a seed is given, torch's own with dropout; the argument beats the context."""
    monkeypatch.setattr(native_backend, "mkl_is_slow", lambda: True)
    tensors, _ = draw(1, 1, 5, 5, 32, "", torch.float32)

    def ours(**options):
        with count_calls() as calls:
            attention(**tensors, **options)
        return [call["backend"] for call in calls["prismer::attention"]]

    wide = machine.native_missing() is None and torch.ops.prismer_native.cpu_capability() == "avx512"
    assert ours() == ours(causal=True) == ["native"] * wide
    assert ours(dropout=0.1) == []
    assert ours(dropout=0.1, seed=SEED) == ["torch"]
    with use_backend("sdpa"):
        assert ours(backend="torch") == ["torch"]
        with pytest.raises(RuntimeError, match="sdpa draws dropout from torch's generator"):
            attention(**tensors, dropout=0.1, seed=SEED)
    with use_backend("torch"):
        assert ours(backend="sdpa") == []


def test_eager_attention_drops_weights_and_scales_the_rest():
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 100, 16), torch.ones(1, 1, 100, 16)
    out = attention(q, k, v, dropout=0.5, backend="eager")
    assert out.std(2).min() > 0 and 0.8 < out.mean() < 1.2


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "backend", "message"),
    (
        (dict(), "flash-attn", "serves cuda tensors"),
        (dict(q=torch.zeros(1, 1, 4, 48), k=torch.zeros(1, 1, 4, 48), v=torch.zeros(1, 1, 4, 48)), "triton", "not 48"),
        (dict(dropout=0.1, seed=SEED), "sdpa", "a seed was given"),
    ),
)
def test_a_backend_that_cannot_run_the_call_says_why(change, backend, message):
    good = dict.fromkeys("qkv", torch.zeros(1, 1, 4, 32))
    with pytest.raises(RuntimeError, match=message):
        attention(**good | change, backend=backend)
    with pytest.raises(RuntimeError, match="float64"):
        attention(**dict.fromkeys("qkv", torch.zeros(1, 1, 4, 32).double()), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(q=torch.zeros(4, 32)), r"pass floats of shape \(B, H, N, K\)"),
        (dict(q=torch.zeros(1, 1, 4, 32).int()), "q is torch.int32"),
        (dict(k=torch.zeros(1, 2, 4, 32)), r"k is .* \(1, 1, keys, 32\)"),
        (dict(v=torch.zeros(1, 1, 5, 32)), "as many values as keys"),
        (dict(v=torch.zeros(1, 1, 4, 32).half()), "v is torch.float16"),
        (dict(q=torch.zeros(1, 1, 3, 32), causal=True), "as many keys as queries"),
        (dict(key_mask=torch.ones(1, 3, dtype=torch.bool)), "True where seen"),
        (dict(key_mask=torch.ones(1, 4)), "key_mask is torch.float32"),
        (dict(dropout=1.0), "below 1"),
        (dict(dropout=0.1, seed=torch.zeros(2, dtype=torch.int64)), "pass one torch.int64"),
        (dict(backend="cuda"), "choose eager, flash-attn, native, sdpa, triton"),
    ),
)
def test_bad_arguments(change, message):
    good = dict.fromkeys("qkv", torch.zeros(1, 1, 4, 32))
    with pytest.raises(ValueError, match=message):
        attention(**good | change)
