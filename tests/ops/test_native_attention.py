"""Proves that the C++ of attention is its definition on every instruction set, whatever the threads and the rest of the
batch.

Run: pytest tests/ops/test_native_attention.py
"""

import functools

import pytest
import torch

from prismer.kernels.attention import attention, attention_reference, native_backend
from prismer.kernels.dispatch import use_backend

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("poisoned_memory")]
pytest.importorskip("tests.ops.native_sets")  # skips where the extension was not built

ops = torch.ops.prismer_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, H, N, L, K, what else: around blocks of 96 by 96, with tiles of 6, 4 and 2 rows and of 4 to 1 vectors
CASES = (
    (1, 1, 1, 1, 16, ""),
    (2, 3, 5, 7, 64, ""),
    (1, 2, 20, 20, 32, "causal mask"),
    (2, 1, 17, 45, 80, "mask"),
    (1, 1, 95, 96, 48, ""),
    (1, 1, 97, 97, 112, "causal"),
    (3, 1, 100, 193, 128, "mask"),
    (1, 1, 289, 3, 96, ""),
    (2, 1, 200, 200, 64, "causal mask"),
    (1, 1, 8, 300, 256, ""),
)


def draw(B, H, N, L, K, what, dtype=torch.float32):
    """q, k, v as views of a packed projection, the gradient of the output, and the options of the call."""
    packed = torch.randn(B, max(N, L), 3, H, K) * torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1) + 0.25
    q, k, v = packed.to(dtype).permute(2, 0, 3, 1, 4)
    options = dict(causal="causal" in what)
    if "mask" in what:
        # the first causal queries of the first sample see nothing; of three samples, the second sees nothing at all
        options["key_mask"] = torch.rand(B, L) > 0.5
        options["key_mask"][0, :3] = False
        options["key_mask"][1:2] = B != 3
    return (q[:, :, :N], k[:, :, :L], v[:, :, :L]), torch.randn(B, H, N, K).to(dtype), options


def plain(q, k, v, causal=False, key_mask=None, scale=None):
    """What a user would write, in the dtype of the tensors."""
    N, L = q.shape[2], k.shape[2]
    seen = torch.ones(N, L, dtype=torch.bool).tril() if causal else torch.ones(N, L, dtype=torch.bool)
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    some = seen.any(-1, keepdim=True)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~seen & some, float("-inf")).softmax(-1) * some) @ v


def results(op, tensors, dout, dtype=None, frozen="", **options):
    leaves = [t.detach().to(dtype or t.dtype) for t in tensors]
    leaves = [t.requires_grad_(name not in frozen) for name, t in zip("qkv", leaves, strict=True)]
    out = op(*leaves, **options)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, trained, dout.to(out.dtype))]


def native(*tensors, **options):
    return attention(*tensors, **options, backend="native")


def check(tensors, dout, options, assert_no_worse):
    got = results(native, tensors, dout, **options)
    expected = results(plain, tensors, dout, **options)
    exact = functools.partial(results, attention_reference, tensors, dout, torch.float64, **options)
    q, k, v = (t.double().abs() for t in tensors)
    assert all(t.dtype == tensors[0].dtype for t in got)
    named = [dict(zip(("out", "dq", "dk", "dv"), values, strict=True)) for values in (got, expected, exact())]
    if k.shape[2] < 8:
        # where few keys share all weight, dout . v and dout . out cancel up to a rounding, in every flash attention
        for name, of in (("dq", k), ("dk", q)):
            terms = (dout.double().abs() @ v.mT).amax() * of.amax()
            error = (named[0].pop(name).double() - named[2][name]).abs().amax()
            # both are sums of K terms in fp32, and are rounded when stored
            summed = 1.5 * torch.finfo(torch.float32).eps * q.shape[-1] ** 0.5
            assert error <= (2 * torch.finfo(dout.dtype).eps + summed) * terms, name
    assert_no_worse("", *named[:2], lambda: dict(zip(named[1], exact(), strict=True)))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_attention(isa, case, dtype, assert_no_worse):
    tensors, dout, options = draw(*case, dtype)
    got = check(tensors, dout, options, assert_no_worse)
    B, H, N, K = got[0].shape
    got[0].transpose(1, 2).view(B, N, H * K)
    if B == 3:
        assert all((t[1] == 0).all() for t in got), "a sample that sees no key has an output, or a gradient"


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1.7))
def test_scale(isa, scale, assert_no_worse):
    tensors, dout, options = draw(1, 2, 30, 110, 32, "")
    check(tensors, dout, options | dict(scale=scale), assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_running_maximum_rises(isa, dtype, assert_no_worse):
    """Every block of keys has a larger score than the blocks before it; then, in reverse, a smaller one."""
    (q, k, v), dout, _ = draw(1, 1, 40, 400, 32, "", dtype)
    k = k * torch.linspace(0.1, 1.0, 400)[:, None].to(dtype)
    check((q, k, v), dout, {}, assert_no_worse)
    check((q, k.flip(2), v), dout, {}, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_key_has_all_the_weight(isa, dtype):
    """Scores beyond the range of exp give the value of the heaviest key, and no gradient of scores."""
    q, k, v = (torch.randn(1, 1, n, 64).to(dtype) for n in (100, 200, 200))
    k[..., 0], q[..., 0] = 0.0, 1000.0
    k[:, :, 150, 0] = 1000.0
    out, dq, dk, dv = results(native, (q, k, v), torch.ones_like(q))
    assert torch.equal(out, v[:, :, 150:151].expand_as(out))
    assert torch.equal(dv[:, :, 150], torch.full_like(dv[:, :, 150], 100.0))
    dv[:, :, 150] = 0
    assert not dv.any() and dq.abs().max() < 1.0 and dk.isfinite().all()


def test_a_nan_reaches_only_what_it_must(isa):
    """A NaN or an infinity in a query reaches that query, the keys that it sees, and its own column; in a key, the
    queries that see the key."""
    (q, k, v), dout, _ = draw(2, 1, 100, 100, 32, "")
    clean = results(native, (q, k, v), dout, causal=True)
    for value in (float("nan"), float("inf")):
        bad = q.clone()
        bad[0, 0, 40, 3] = value
        out, dq, dk, dv = results(native, (bad, k, v), dout, causal=True)
        others = torch.arange(100) != 40
        assert out[0, 0, 40].isnan().all() and torch.equal(out[0, 0, others], clean[0][0, 0, others])
        dk[..., 3], expected = 0, clean[2].index_fill(3, torch.tensor(3), 0)
        assert torch.equal(dk[0, 0, 41:], expected[0, 0, 41:]) and (dk[0, 0, :41] != expected[0, 0, :41])[:, 4:].all()
        dk[1] = clean[2][1]
        assert all(torch.equal(a[1], b[1]) for a, b in zip((out, dq, dk, dv), clean, strict=True))
        bad = k.clone()
        bad[0, 0, 40] = value
        out = native(q, bad, v, causal=True)
        assert torch.equal(out[0, 0, :40], clean[0][0, 0, :40]) and out[0, 0, 40:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_bits_never_change(isa, dtype):
    """Repeated, with other threads, other strides, or one sample, head or query alone: always the same bits."""
    (q, k, v), dout, options = draw(2, 3, 130, 210, 48, "mask", dtype)
    mask = options["key_mask"]
    whole = results(native, (q, k, v), dout, key_mask=mask)
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        again = results(native, (q, k, v), dout, key_mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True)), threads
    torch.set_num_threads(before)
    one = (slice(1, 2), slice(2, 3))
    alone = results(native, [t[one] for t in (q, k, v)], dout[one], key_mask=mask[1:])
    assert all(torch.equal(a, b[one]) for a, b in zip(alone, whole, strict=True))
    dense = results(native, [t.contiguous() for t in (q, k, v)], dout.contiguous(), key_mask=mask)
    columns = results(native, [t.mT.contiguous().mT for t in (q, k, v)], dout, key_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(dense, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(columns, whole, strict=True))
    for i in (0, 95, 96, 129):
        assert torch.equal(native(q[:, :, i : i + 1], k, v, key_mask=mask), whole[0][:, :, i : i + 1]), i


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_log_sum_exp_is_that_of_the_torch_backend(isa, dtype):
    """It is in base 2, and infinite for a query that sees no key."""
    (q, k, v), _, options = draw(2, 2, 110, 110, 32, "causal mask", dtype)
    call = q, k, v, options["key_mask"], None, True, 0.0, 0.3
    got, wanted = (torch.ops.prismer.attention(*call, backend)[1] for backend in ("native", "torch"))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert got[0, :, :3].isposinf().all() and got[1, :, -1].isfinite().all()


@pytest.mark.parametrize("frozen", ("q", "kv", "v", "k"))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_frozen_parts_do_not_change_the_other_gradients(isa, frozen, dtype):
    tensors, dout, _ = draw(1, 2, 50, 110, 64, "", dtype)
    whole = dict(zip("qkv", results(native, tensors, dout)[1:], strict=True))
    some = results(native, tensors, dout, frozen=frozen)[1:]
    assert all(torch.equal(a, whole[n]) for a, n in zip(some, [n for n in "qkv" if n not in frozen], strict=True))


def test_expanded_keys(assert_no_worse):
    """Keys of stride 0, and the gradient of a sum, which is one expanded number."""
    q, k = torch.randn(2, 2, 9, 32).requires_grad_(), torch.randn(1, 2, 11, 32).expand(2, -1, -1, -1).requires_grad_()

    def gradients(op, *leaves):
        q, k = leaves
        return dict(zip(("dq", "dk"), torch.autograd.grad(op(q, k, k).sum(), leaves), strict=True))

    got, wanted = gradients(native, q, k), gradients(attention_reference, q, k)
    high = [t.detach().double().requires_grad_() for t in (q, k)]
    assert_no_worse("", got, wanted, lambda: gradients(attention_reference, *high))
    assert all(t.transpose(1, 2).is_contiguous() or t.shape[0] == 2 for t in got.values())


def test_which_backend_is_chosen(monkeypatch, count_calls):
    """Ours on AVX-512, and for 16 bits on AVX2, where torch multiplies those slowly; torch's own elsewhere."""
    from tests.ops.native_sets import HERE

    monkeypatch.setattr(native_backend, "has_amx", lambda: False)
    monkeypatch.setattr(native_backend, "mkl_is_slow", lambda: True)
    ran, forward = [], native_backend.forward
    monkeypatch.setattr(native_backend, "forward", lambda *args: ran.append("native") or forward(*args))

    def backend(dtype, **options):
        call = functools.partial(attention, *(torch.randn(1, 1, 4, options.pop("K", 32)).to(dtype),) * 3, **options)
        with count_calls() as calls:
            call()
        seen = [call["backend"] for call in calls["prismer::attention"]]
        # the choice is the same where no mode watches
        ran.clear()
        call()
        assert ran == seen
        return seen

    for isa, fp32, bf16 in (("baseline", [], []), ("avx2", [], ["native"]), ("avx512", ["native"], ["native"])):
        if isa in HERE:
            monkeypatch.setenv("PRISMER_CPU_ISA", isa)
            assert (backend(torch.float32), backend(torch.bfloat16)) == (fp32, bf16), isa
            with use_backend("native"):
                assert backend(torch.float32) == ["native"]
    assert backend(torch.float64) == backend(torch.float32, K=40) == backend(torch.float32, dropout=0.1) == []


@pytest.mark.parametrize(
    ("K", "change", "message"),
    (
        (40, {}, "multiples of 16, not 40"),
        (272, {}, "up to 256"),
        (32, dict(dropout=0.1), "no dropout"),
    ),
)
def test_a_refusal_says_why(K, change, message):
    with pytest.raises(RuntimeError, match=f"native was asked for, but native attention .*{message}"):
        native(*(torch.zeros(1, 1, 4, K),) * 3, **change)


def test_torch_func():
    """Function transforms see torch's own attention; ours, if asked for, refuses, since it would lose derivatives."""
    q = torch.randn(3, 1, 2, 5, 32)

    def square(op):
        return torch.func.grad(lambda t: op(t, t, t).square().sum())

    for one, x in ((square, q[0]), (lambda op: torch.func.vmap(square(op)), q)):
        torch.testing.assert_close(one(attention)(x), one(attention_reference)(x), atol=1e-5, rtol=1e-5)
    for transform in (square(native), lambda t: torch.func.jvp(lambda t: native(t, t, t), (t,), (t,))):
        with pytest.raises(RuntimeError, match="torch.func does not see through native"):
            transform(q[0])


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    q, k, v = (torch.randn(2, 2, 9, 32, requires_grad=requires_grad) for _ in range(3))
    mask = torch.arange(9).expand(2, -1) > 1
    arguments = (q, k, v, mask, None, True, 0.0, 0.2, "native")
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.prismer.attention, arguments, test_utils=utils)
    with torch.no_grad():
        out, lse = torch.ops.prismer.attention(*arguments)
        back = (torch.randn_like(out), *arguments[:5], out, lse, *arguments[5:], requires_grad, True)
        torch.library.opcheck(torch.ops.prismer.attention_backward, back, test_utils=utils)
    with torch.no_grad():
        out, lse = torch.empty(2, 9, 2, 32), torch.empty(2, 2, 9)
        torch.library.opcheck(ops.attention, (q, k, v, mask, True, 0.2, out, lse), test_utils=("test_schema",))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(q=torch.zeros(1, 2, 4, 40)), "a multiple of 16"),
        (dict(q=torch.zeros(1, 2, 4, 32, dtype=torch.float64)), "q is .* float64"),
        (dict(k=torch.zeros(1, 1, 4, 32)), "k is \\(1, 1, 4, 32\\) beside q"),
        (dict(v=torch.zeros(1, 2, 5, 32)), "got \\(1, 2, 5, 32\\)"),
        (dict(v=torch.zeros(1, 2, 4, 32).bfloat16()), "of one dtype"),
        (dict(q=torch.zeros(1, 2, 32, 4).mT), "a dense last dimension"),
        (dict(q=torch.zeros(1, 2, 3, 32), causal=True), "3 causal queries of 4 keys"),
        (dict(key_mask=torch.ones(1, 3, dtype=torch.bool)), "key_mask is \\(1, 3\\) bool"),
        (dict(out=torch.zeros(1, 2, 4, 32)), "out is"),
        (dict(lse=torch.zeros(1, 2, 3)), "lse is"),
    ),
)
def test_bad_arguments(change, message):
    call = dict(q=torch.zeros(1, 2, 4, 32), k=torch.zeros(1, 2, 4, 32), v=torch.zeros(1, 2, 4, 32), key_mask=None)
    call |= dict(causal=False, scale=1.0, out=torch.zeros(1, 4, 2, 32), lse=torch.zeros(1, 2, 4))
    with pytest.raises(RuntimeError, match=message):
        ops.attention(*(call | change).values())
    if "out" in change or "causal" in change or "key_mask" in change:
        return
    call |= change
    q, k, v, mask, causal, scale, out, lse = call.values()
    with pytest.raises(RuntimeError, match=message):
        ops.attention_backward(out, q, k, v, mask, out, lse, causal, scale, None, None, None)


def test_gradients_of_a_wrong_shape_are_refused():
    q, out, lse = torch.zeros(1, 2, 4, 32), torch.zeros(1, 4, 2, 32), torch.zeros(1, 2, 4)
    call = (out, q, q, q, None, out, lse, False, 1.0)
    with pytest.raises(RuntimeError, match="one of dk and dv"):
        ops.attention_backward(*call, None, torch.zeros_like(out), None)
    with pytest.raises(RuntimeError, match="dq is \\(1, 2, 4, 32\\)"):
        ops.attention_backward(*call, torch.zeros_like(q), None, None)
    with pytest.raises(RuntimeError, match="dv is \\(1, 5, 2, 32\\)"):
        ops.attention_backward(*call, None, out, torch.zeros(1, 5, 2, 32))
