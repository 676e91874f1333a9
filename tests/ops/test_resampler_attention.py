"""Proves that both orders of resampler_attention are multi-head attention over [query ; norm(x)], forward and every
gradient, on every backend; that they cost the documented FLOPs and bytes; and that frozen parameters cost nothing.

Run: pytest tests/ops/test_resampler_attention.py
"""

import functools
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from prismer.kernels import absorbed_projection, tuning
from prismer.kernels import resampler_attention as module
from prismer.kernels.dispatch import asked, use_backend
from prismer.kernels.resampler_attention import flops, resampler_attention, resampler_attention_reference, standardise
from prismer.kernels.resampler_attention import torch_backend as resampler_torch
from prismer.kernels.resampler_attention import triton_backend as resampler_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS = {"torch": ("torch", "absorbed"), "triton": ("triton", "absorbed"), "ordinary": ("torch", "ordinary")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp16 takes the same path as bf16, which rounds more coarsely
SHORT_DTYPES = (*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.long))
NAMES = ("query", "x_hat", "norm_weight", "norm_bias", "in_proj_weight", "in_proj_bias")
SHAPES = {  # B, M, L, D, H
    "one": (1, 1, 1, 16, 1),
    "primes": (3, 7, 13, 15, 3),
    "above-a-block": (1, 65, 129, 32, 2),
    "a-block": (1, 16, 64, 96, 8),
    "wide": (2, 5, 60, 160, 1),
    "no-inputs": (2, 4, 0, 16, 2),
    "no-images": (0, 4, 8, 16, 2),
}


@pytest.fixture(params=VARIANTS)
def order(request, running):
    backend, order = VARIANTS[request.param]
    with running(backend):
        yield order


@pytest.fixture
def draws(order):
    """How many problems a comparison pools: the interpreter is slow."""
    return 4 if asked() == "triton" else 8


@pytest.fixture
def on_triton(running):
    with running("triton"):
        yield


def draw(B, M, L, D, dtype=torch.float64):
    """A norm with zeros and negative weights, biases large enough to matter, scores that favour some keys."""
    query, x, in_proj_weight = torch.randn(B, M, D), torch.randn(B, L, D) * 2 + 1, torch.randn(3 * D, D) * D**-0.5 * 0.8
    norm_weight, norm_bias = torch.randn(D) + 0.3, 2 * torch.randn(D)
    norm_weight[:: max(D // 4, 2)] = 0
    tensors = query, standardise(x), norm_weight, norm_bias, in_proj_weight, torch.randn(3 * D)
    return [t.to(dtype) for t in tensors]


def plain(query, x_hat, norm_weight, norm_bias, in_proj_weight, in_proj_bias, H):
    """What a user would write, in the dtype of the tensors."""
    keys = torch.cat([query, x_hat * norm_weight + norm_bias], dim=1)
    weights, biases = in_proj_weight.chunk(3), in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(t, weight, bias).unflatten(2, (H, -1)).transpose(1, 2)
        for t, weight, bias in zip((query, keys, keys), weights, biases, strict=True)
    )
    return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def results(op, tensors, dtype, dy, trainable=NAMES):
    leaves = [t.detach().to(dtype).requires_grad_(name in trainable) for name, t in zip(NAMES, tensors, strict=True)]
    y = op(*leaves)
    wanted = {"d" + name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf.requires_grad}
    return {
        "y": y.detach(),
        **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy.to(dtype)), strict=True)),
    }


def compare(problems, H, order, assert_no_worse):
    """Errors are pooled over several draws, since those of one draw depend on a few probabilities."""
    exact = order != "composed"
    dtype, D = problems[0][0].dtype, problems[0][0].shape[2]
    dys = [torch.randn(tensors[0].shape).to(dtype) for tensors in problems]

    def pooled(op, dtype):
        found = [results(op, tensors, dtype, dy) for tensors, dy in zip(problems, dys, strict=True)]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def without_keys_bias(found):
        found["din_proj_bias"] = torch.cat([found["din_proj_bias"][:, :D], found["din_proj_bias"][:, 2 * D :]], 1)
        return found

    got = pooled(lambda *t: resampler_attention(*t, H, order=order), dtype)
    assert all(value.dtype == dtype for value in got.values())
    cancelled = not got["din_proj_bias"][:, D : 2 * D].any()
    assert cancelled or not exact, "the bias of the keys cancels, and so must its gradient"
    of_torch = lambda dtype: without_keys_bias(pooled(lambda *t: plain(*t, H), dtype))  # noqa: E731
    assert_no_worse("", without_keys_bias(got), of_torch(dtype), lambda: of_torch(torch.float64))


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_resampler_attention(shape, dtype, order, draws, assert_no_worse):
    *sizes, H = shape
    compare([draw(*sizes, dtype) for _ in range(draws)], H, order, assert_no_worse)


@pytest.mark.parametrize("order", ("absorbed", "ordinary"))
def test_images_together_are_images_one_by_one(order, monkeypatch):
    """The sizes of the steps change the order of sums over images, and nothing else; the last step is smaller."""
    B, M, L, D, H = 5, 3, 7, 16, 2
    tensors, dy, found = draw(B, M, L, D), torch.randn(B, M, D), []
    for images in (1, 2, B):
        steps = []

        def slices(x, numbers, images=images, steps=steps):
            monkeypatch.setattr(absorbed_projection, "_CACHED", numbers * images)
            steps.append(list(absorbed_projection.image_slices(x, numbers)))
            return steps[-1]

        monkeypatch.setattr(resampler_torch, "image_slices", slices)
        with use_backend("torch"):
            run = functools.partial(resampler_attention, num_heads=H, order=order)
            found.append(results(run, tensors, torch.float64, dy))
        assert len(steps) >= 2 and {len(each) for each in steps} == {-(-B // images)}
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_scores_of_a_step_stay_in_the_cache():
    images = torch.empty(9, 4)
    many = absorbed_projection._CACHED
    assert [s.stop - s.start for s in absorbed_projection.image_slices(images, many // 4)] == [4, 4, 1]
    assert len(list(absorbed_projection.image_slices(images, 10 * many))) == 9
    assert list(absorbed_projection.image_slices(images.to("meta"), many)) == [slice(0, 9)]


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_order_of_torchs_operators(shape, dtype, assert_no_worse):
    *sizes, H = shape
    compare([draw(*sizes, dtype) for _ in range(8)], H, "composed", assert_no_worse)


def test_the_measured_order_runs_and_a_gpu_starts_with_the_vendors_attention(monkeypatch):
    query, x_hat, *rest = draw(2, 5, 9, 16, torch.float32)
    key = "resampler_attention", torch.float32, False, (2, 6, 12, 16, 2)
    for order in module.PATHS:
        with tuning.forcing({key: order}), tuning.recording() as taken:
            resampler_attention(query, x_hat, *rest, 2)
        assert taken["cpu", key] == order
    on_a_gpu = types.SimpleNamespace(shape=query.shape, dtype=query.dtype, device=torch.device("cuda"))
    assert module._fastest_order(on_a_gpu, x_hat, 2, []) == "composed"
    with use_backend("resampler_attention:triton"):
        assert module._fastest_order(on_a_gpu, x_hat, 2, []) != "composed"
    # BASE with one expert: too few inputs for the absorbed order
    few = types.SimpleNamespace(shape=(1, 64, 768), dtype=torch.float16, device=torch.device("cpu"))
    inputs = types.SimpleNamespace(shape=(1, 196, 768))
    with tuning.forcing({}):
        assert module._fastest_order(few, inputs, 8, []) == "composed"
        assert module._fastest_order(few, inputs, 8, ["query"]) == "ordinary"


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ("large-beta", "no-gamma", "confident", "massive", "key-bias", "value-bias"))
def test_hard_inputs(case, dtype, order, draws, assert_no_worse):
    problems = []
    for _ in range(draws):
        tensors = draw(3, 5, 66, 48)
        query, x_hat, norm_weight, norm_bias, _, in_proj_bias = tensors
        if case == "large-beta":
            norm_bias *= 5
        elif case == "no-gamma":
            norm_weight.zero_()
        elif case == "confident":
            query *= 2.5
        elif case == "massive":
            for i in range(3):
                x_hat[i, 3 + i, 5 + 7 * i] = 50
        elif case == "key-bias":
            in_proj_bias[48:96] += 30
        else:
            in_proj_bias[96:] += 50
        problems.append([t.to(dtype) for t in tensors])
    compare(problems, 3, order, assert_no_worse)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 1, 1, 1, 1), (2, 64, 205, 96, 8)], ids=str)
def test_both_orders_are_exact_in_float64(shape):
    """They, the reference and torch's own attention give the same numbers and gradients."""
    *sizes, H = shape
    tensors, D = draw(*sizes), shape[3]
    dy = torch.randn(tensors[0].shape, dtype=torch.float64)

    def of_torch(query, x_hat, norm_weight, norm_bias, in_proj_weight, in_proj_bias):
        keys = torch.cat([query, x_hat * norm_weight + norm_bias], dim=1).transpose(0, 1)
        eye = torch.eye(D, dtype=torch.float64)
        y, _ = F.multi_head_attention_forward(
            query.transpose(0, 1), keys, keys, D, H, in_proj_weight, in_proj_bias, None, None, False, 0.0, eye, None
        )
        return y.transpose(0, 1)

    all_results = [results(lambda *t: resampler_attention_reference(*t, H), tensors, torch.float64, dy)]
    if shape[0]:
        all_results.append(results(of_torch, tensors, torch.float64, dy))
    for order in ("absorbed", "ordinary"):
        with use_backend("torch"):
            ours = lambda *t: resampler_attention(*t, H, order=order)  # noqa: B023, E731
            all_results.append(results(ours, tensors, torch.float64, dy))
    first, *others = all_results
    for other, (name, expected) in itertools.product(others, first.items()):
        error = (other[name] - expected).abs().amax() if expected.numel() else 0
        assert error <= 1e-12 * max(1, expected.abs().amax() if expected.numel() else 1), name


def test_reference_and_standardise():
    tensors = draw(2, 5, 13, 24)
    with use_backend("reference"):
        torch.testing.assert_close(resampler_attention(*tensors, 3), plain(*tensors, 3))
    x = torch.randn(3, 4, 60, dtype=torch.float64) * 3 + 1
    torch.testing.assert_close(standardise(x, 0.1), F.layer_norm(x, (60,), eps=0.1))
    x = x.bfloat16()
    assert resampler_attention_reference(*(t.bfloat16() for t in tensors), 3).dtype == standardise(x).dtype == x.dtype


def test_tensors_may_have_any_strides_and_a_norm_in_fp32(order):
    """Transposed and expanded inputs, an expanded gradient, a norm in fp32 beside a stream in bf16."""
    tensors = draw(3, 4, 6, 24, torch.float32)
    moved = [tensors[0][:1].expand(3, 4, 24), tensors[1].transpose(0, 1).contiguous().transpose(0, 1), *tensors[2:4]]
    moved += [tensors[4].T.contiguous().T, tensors[5]]
    expected = plain(*moved, 3)
    torch.testing.assert_close(resampler_attention(*moved, 3, order=order), expected)
    dy = torch.ones(()).expand(3, 4, 24)
    got = results(lambda *t: resampler_attention(*t, 3, order=order), moved, torch.float32, dy)
    want = results(lambda *t: plain(*t, 3), moved, torch.float32, dy)
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5, msg=name)
    low = [t.bfloat16() for t in tensors]
    low[2:4] = (t.clone().requires_grad_() for t in tensors[2:4])
    y = resampler_attention(*low, 3, order=order)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and low[2].grad.dtype == low[3].grad.dtype == torch.float32


def test_repeats_are_bit_equal(order):
    """An image alone also gives the same as in a batch."""
    tensors = draw(3, 9, 70, 48, torch.bfloat16)
    dy = torch.randn(3, 9, 48)
    ours = lambda *t: resampler_attention(*t, 3, order=order)  # noqa: E731
    first, again = (results(ours, tensors, torch.bfloat16, dy) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for i in range(3):
        one = slice(i, i + 1)
        alone = results(ours, [t[one] for t in tensors[:2]] + tensors[2:], torch.bfloat16, dy[one])
        for name in ("y", "dquery", "dx_hat"):
            # torch multiplies by the weights, and may round a row otherwise in another batch
            torch.testing.assert_close(alone[name], first[name][one], rtol=2e-2, atol=2e-2, msg=name)


def test_a_single_key_has_no_gradient_of_scores(order):
    """Its probability is one, and the gradient cancels exactly."""
    tensors = draw(3, 1, 0, 32, torch.bfloat16)
    got = results(lambda *t: resampler_attention(*t, 2, order=order), tensors, torch.bfloat16, torch.randn(3, 1, 32))
    assert not got["din_proj_weight"][:64].any() and not got["din_proj_bias"][:64].any()
    assert not got["dnorm_weight"].any() and not got["dnorm_bias"].any()


def test_kernels_do_not_depend_on_the_batch(on_triton):
    """Between the products with weights, an image of a batch gives the bits that it gives alone."""
    query, x_hat, gamma, beta, _, _ = draw(3, 9, 70, 48, torch.bfloat16)
    a = torch.randn(3, 3, 9, 48).bfloat16()
    t, *state = resampler_triton.attend(a.view(3, 27, 48), query, x_hat, gamma, beta, True)
    for i in range(3):
        one = slice(i, i + 1)
        arguments = a[:, i].contiguous(), query[one], x_hat[one], gamma, beta, True
        alone, *kept = resampler_triton.attend(*arguments)
        assert torch.equal(alone, t.view(3, 3, 9, 48)[:, i])
        assert all(torch.equal(mine[0], whole[i]) for mine, whole in zip(kept, state, strict=True))


@pytest.mark.parametrize("trains", ((), ("query",), ("x_hat",), ("norm_bias",), ("in_proj_weight",), NAMES), ids=str)
def test_only_the_documented_tensors_are_saved(trains, order):
    """Beside the parameters themselves; nothing if nothing trains."""
    B, M, L, D, H, s = 2, 5, 70, 48, 3, 2
    N, Q = M + L, H * M
    leaves = [t.requires_grad_(name in trains) for name, t in zip(NAMES, draw(B, M, L, D, torch.bfloat16), strict=True)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        resampler_attention(*leaves, H, order=order)
    if not trains:
        assert not saved
        return
    assert any(t is leaves[4] for t in saved), "the parameter itself is kept, not a view of it"
    mixed = bool({"norm_weight", "norm_bias", "in_proj_weight"} & set(trains))
    if order == "ordinary":
        expected = B * M * D * s + B * Q * N * s + 2 * B * N * D * s
    else:
        expected = B * M * D * s + B * Q * N * s + mixed * (B * Q * D * s + 4 * B * Q)
        if any(t.shape == (B, Q, 192) for t in saved):
            W = 64 * (1 + 2)
            expected += B * Q * (W - N) * s + 4 * B * Q * W // 64
    assert sum(t.nbytes for t in saved) == expected + sum(t.nbytes for t in leaves[:5])


GRADS = [c for n in range(7) for c in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("order", ("absorbed", "ordinary"))
def test_flops(order):
    """`flops` counts the multiplications that run, for every choice of gradients."""
    B, M, L, D, H = 2, 3, 10, 12, 2
    tensors = draw(B, M, L, D)
    absorbed, dy = order == "absorbed", torch.randn(B, M, D, dtype=torch.float64)
    for grads in GRADS:
        mixed = absorbed and bool(set(grads) & {"norm_weight", "norm_bias", "in_proj_weight"})
        needs = ["query" in grads, "x_hat" in grads, "norm_weight" in grads or "norm_bias" in grads]
        needs += ["in_proj_weight" in grads, "in_proj_bias" in grads]
        with use_backend("torch"), FlopCounterMode(display=False) as counter:
            _, *state = module._forward(*tensors, H, absorbed, bool(grads), mixed)
            if grads:
                module._backward(dy, *tensors[:5], *state, H, *needs)
        assert counter.get_total_flops() == flops(order, B, M, L, D, H, grads), grads


def test_frozen_parameters_are_left_out(count_calls, order):
    tensors = draw(2, 4, 8, 24, torch.float32)
    for trains in (("x_hat",), ("query", "norm_bias"), ("in_proj_weight",), ("in_proj_bias",)):
        leaves = [t.detach().requires_grad_(name in trains) for name, t in zip(NAMES, tensors, strict=True)]
        with count_calls() as calls:
            resampler_attention(*leaves, 3, order=order).sum().backward()
        (call,) = calls["prismer::resampler_attention_backward"]
        needs = {name: call[f"need_{name}"] for name in ("query", "x_hat", "norm", "weight", "bias")}
        named = {"norm": "norm_bias", "weight": "in_proj_weight", "bias": "in_proj_bias"}
        assert needs == {name: named.get(name, name) in trains for name in needs}
        with torch.no_grad():
            state = torch.ops.prismer.resampler_attention(*leaves, 3, order == "absorbed", True, order == "absorbed")
            grads = torch.ops.prismer.resampler_attention_backward(
                torch.ones(2, 4, 24), *leaves[:5], *state[1:], 3, *needs.values()
            )
        wanted = needs["query"], needs["x_hat"], needs["norm"], needs["norm"], needs["weight"], needs["bias"]
        assert [bool(grad.numel()) for grad in grads] == list(wanted)


def test_the_cheaper_order_runs(count_calls):
    """The ratios are those of the docstring."""

    def ratio(L, D, grads=(), without_q=True):
        # both orders project the queries
        common = 2 * 64 * D * D * (without_q and not grads)
        return (flops("absorbed", 1, 64, L, D, 8, grads) - common) / (flops("ordinary", 1, 64, L, D, 8, grads) - common)

    assert [round(ratio(L, D), 2) for L, D in ((1176, 768), (1536, 1024), (1536, 1280))] == [0.66, 0.51, 0.42]
    assert round(ratio(196, 768), 2) == 0.84
    assert [round(ratio(L, D, NAMES), 2) for L, D in ((1176, 768), (1536, 1024))] == [0.68, 0.53]
    assert ratio(1176, 768, ("query", "x_hat")) < 1
    assert ratio(196, 256, ()) > 1
    # with one expert of BASE, many small products lose what the absorbed order saves
    assert module.cheaper_order(1, 64, 196, 768, 8) == "ordinary"
    assert module.cheaper_order(1, 64, 1176, 768, 8) == "absorbed"
    for trains, (M, L, D) in itertools.product(((), ("x_hat",), NAMES), ((1, 64, 64), (16, 8, 8), (1, 3, 64))):
        leaves = [t.requires_grad_(name in trains) for name, t in zip(NAMES, draw(1, M, L, D), strict=True)]
        with use_backend("torch"), count_calls() as calls:
            resampler_attention(*leaves, 8)
        (call,) = calls["prismer::resampler_attention"]
        assert call["absorbed"] == (module.cheaper_order(1, M, L, D, 8, trains) == "absorbed")
        assert call["keep"] == bool(trains)


def test_the_backward_pass_takes_the_backend_of_its_forward_pass(on_triton, assert_no_worse):
    """The forward pass runs on Triton, and the backward pass runs outside the block that asked for Triton."""
    tensors = [t.requires_grad_() for t in draw(2, 5, 13, 24, torch.float32)]
    y = resampler_attention(*tensors, 3, order="absorbed")
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    with use_backend("torch"):
        got = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad, order):
    tensors = draw(2, 3, 5, 24, torch.float32)
    leaves = [t.requires_grad_(requires_grad) for t in tensors]
    absorbed = order == "absorbed"
    torch.library.opcheck(
        torch.ops.prismer.resampler_attention, (*leaves, 3, absorbed, requires_grad, absorbed and requires_grad)
    )
    if requires_grad:
        return
    with torch.no_grad():
        moved = [leaves[0].transpose(0, 1).contiguous().transpose(0, 1), *leaves[1:4], leaves[4].T.contiguous().T]
        y, *state = torch.ops.prismer.resampler_attention(*moved, leaves[5], 3, absorbed, True, absorbed)
        for needs in ((True,) * 5, (False, True, False, False, False)):
            torch.library.opcheck(
                torch.ops.prismer.resampler_attention_backward, (y.mT.contiguous().mT, *moved, *state, 3, *needs)
            )


def test_compile(order):
    tensors = [t.requires_grad_() for t in draw(2, 3, 5, 24, torch.float32)]

    def step(*tensors):
        return resampler_attention(*tensors, 3, order=order).square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ("absorbed", "ordinary"))
def test_gradcheck(order):
    tensors = [t.requires_grad_() for t in draw(2, 2, 3, 6)]
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda *t: resampler_attention(*t, 2, order=order), tensors)


def test_ledger(on_triton):
    """Bytes and products of every kernel are those of the docstring, times the tiles that read the same."""
    from tests.ops.interpreter import interpreted

    B, M, L, D, H, s = 2, 5, 70, 72, 3, 2
    Q, NZ, NB = H * M, 1, 3
    BQ, columns, W = 16, 2, 64 * NB  # as many programs as blocks of 64 columns read the same tiles
    query, x_hat, gamma, beta, _, _ = draw(B, M, L, D, torch.bfloat16)
    a, dt = torch.randn(2, H, B * M, D).bfloat16()
    with interpreted() as ledger:
        t, probs, factor, share, mixed = resampler_triton.attend(a, query, x_hat, gamma, beta, True)
    keys, rows = B * (M + L) * D * s, B * Q * D * s
    scale = rows + -(-B * Q // 16) * 2 * D * s, rows + 4 * B * Q
    scores = NB * rows + keys + (NB - NZ) * 4 * B * Q, B * Q * W * s + 8 * B * Q * NB
    affine = B * 2 * D * s
    factors = 8 * B * Q * NB, 4 * B * Q * (NB + 1)
    mix = columns * (B * Q * W * s + 4 * B * Q * (NB + 1)) + keys + affine, 2 * rows
    assert ledger.kernels == ["_scale_kernel", "_scores_kernel", "_factor_kernel", "_mix_kernel"]
    assert ledger.bytes_read == scale[0] + scores[0] + factors[0] + mix[0]
    assert ledger.bytes_written == scale[1] + scores[1] + factors[1] + mix[1]
    product = 2 * B * BQ * W * 64 * columns
    assert ledger.dot_flops == 2 * product
    results = [torch.empty_like(query), torch.empty_like(x_hat), torch.empty(D), torch.empty(D), None, None]
    tiles, number = B * Q * W * s, 4 * B * Q  # all tiles of probabilities; a number for every absorbed query
    backward = {  # by kernel, for all gradients
        "_scale_kernel": (2 * scale[0], 2 * scale[1]),
        "_scores_kernel": (scores[0] + tiles + NB * number, tiles + NB * number),
        "_mix_kernel": (  # da; t again
            columns * (2 * tiles + (1 + NB) * number)
            + keys
            + affine
            + columns * (tiles * NZ // NB + (1 + NZ) * number)
            + rows
            + B * M * D * s
            + affine,
            2 * rows + number + rows,
        ),
        "_keys_kernel": (2 * NB * rows + columns * 2 * (tiles + NB * number), keys),
        "_norm_kernel": (4 * rows + 2 * number, -(-B * Q // 16) * 8 * D),
    }
    everything = ("query", "x_hat", "norm", "in_proj_weight", "in_proj_bias")
    for names in (everything, ("x_hat",), ("query",), ("norm",)):
        needs = {name: name in names for name in everything}
        with interpreted() as ledger:
            resampler_triton.attend_backward(
                a, dt, query, x_hat, gamma, beta, probs, factor, share, mixed, needs, results
            )
        kernels = ["_scale_kernel", "_scores_kernel"]
        kernels += ["_mix_kernel"] * (names != ("x_hat",)) + ["_mix_kernel"] * needs["in_proj_weight"]
        kernels += ["_scale_kernel"] * needs["x_hat"] + ["_keys_kernel"] * (needs["x_hat"] or needs["query"])
        assert ledger.kernels == kernels + ["_norm_kernel"] * needs["norm"]
        if names == everything:
            for kernel, (read, written) in backward.items():
                counted = [ledger.traffic[key] for key in ledger.traffic if key[0] == kernel]
                assert sum(count[0] for count in counted) == read, kernel
                assert sum(count[1] for count in counted) == written, kernel
            assert ledger.dot_flops == 4 * product + product * NZ // NB


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(query=torch.zeros(3, 8)), r"pass floats of shape \(B, M, D\)"),
        (dict(query=torch.zeros(2, 3, 8, dtype=torch.int64)), "pass floats"),
        (dict(x_hat=torch.zeros(1, 5, 8)), r"x_hat is .* pass torch.float32 of shape \(2, L, 8\)"),
        (dict(x_hat=torch.zeros(2, 5, 8).double()), "x_hat is torch.float64"),
        (dict(norm_weight=torch.zeros(9)), "norm_weight is"),
        (dict(norm_bias=torch.zeros(8, 1)), "norm_bias is"),
        (dict(in_proj_weight=torch.zeros(8, 24)), r"in_proj_weight is .* shape \(24, 8\)"),
        (dict(in_proj_bias=torch.zeros(24).bfloat16()), "in_proj_bias is"),
        (dict(num_heads=3), "num_heads is 3; pass a divisor of the width 8"),
        (dict(order="fast"), "order is 'fast'; pass 'absorbed'"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(
        query=torch.zeros(2, 3, 8),
        x_hat=torch.zeros(2, 5, 8),
        norm_weight=torch.zeros(8),
        norm_bias=torch.zeros(8),
        in_proj_weight=torch.zeros(24, 8),
        in_proj_bias=torch.zeros(24),
        num_heads=2,
    )
    with pytest.raises(ValueError, match=message):
        resampler_attention(**{**good, **change})


def test_float64_is_refused_by_triton(on_triton):
    with pytest.raises(RuntimeError, match="computes in fp32, and the call is in float64"):
        resampler_attention(*draw(1, 2, 3, 8), 2, order="absorbed")


def test_cases_cover_every_kernel_and_model():
    cases = resampler_triton.kernel_cases()
    assert len({case.name for case in cases}) == len(cases) >= 15
    assert all(case.bytes > 0 and case.flops > 0 for case in cases)
