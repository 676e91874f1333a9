"""Proves that linear_cross_entropy is the smoothed loss of F.cross_entropy, in value and every gradient, on every
backend and for every reduction, and that memory and work are as documented: no logits beyond a chunk, computed once
where possible, and nothing for frozen weights.

Run: pytest tests/ops/test_cross_entropy.py
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import prismer.kernels.cross_entropy as module
from prismer.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, triton_backend
from prismer.kernels.cross_entropy import torch_backend as cross_entropy_torch
from prismer.kernels.dispatch import use_backend
from tests.ops.live_bytes import peak_bytes

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("triton", "torch")
SHAPES = {  # R, D, V
    "one-row": (1, 60, 33),
    "one-word": (5, 8, 1),
    "primes": (23, 17, 101),
    "above-a-block": (130, 24, 1030),
    "no-rows": (0, 4, 5),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "bias")
ALL = (True, True, True)


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows and of vocabulary on every backend, so that no gradient comes from one chunk alone."""
    monkeypatch.setattr(cross_entropy_torch, "_CHUNK_ELEMENTS", 7 * 11)
    monkeypatch.setattr(cross_entropy_torch, "ROW_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(cross_entropy_torch, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(triton_backend, "_BUFFER_BYTES", 1)


@pytest.fixture
def formed_again(monkeypatch):
    """The backward pass computes the gradients of a sum, whatever the dtype."""
    monkeypatch.setattr(module, "_formed_in_forward", lambda x, V, reduce, needs: needs == (True, False, False))


@pytest.fixture
def formed(monkeypatch):
    """The forward pass computes the gradients of a sum, as on a GPU, in any number of chunks."""
    monkeypatch.setattr(module, "_formed_in_forward", lambda x, V, reduce, needs: any(needs) and reduce)


def draw(R, D, V, dtype=torch.float64, scale=1.0, bias_scale=3.0):
    """Logits of a few units, a bias large enough to matter, and every third row ignored."""
    x = torch.randn(R, D, dtype=torch.float64)
    weight = scale * torch.randn(V, D, dtype=torch.float64) / D**0.5 * 2
    bias = bias_scale * torch.randn(V, dtype=torch.float64)
    labels = torch.randint(0, V, (R,))
    labels[1::3] = -100
    return x.to(dtype), weight.to(dtype), bias.to(dtype), labels


def plain_torch(x, weight, bias, labels, label_smoothing=0.1, reduction="none", row_weights=None):
    """What a user would write: logits in the dtype of the model, the loss in fp32."""
    logits = F.linear(x, weight, bias)
    logits = logits.float() if x.dtype in (torch.bfloat16, torch.float16) else logits
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if row_weights is not None:
        losses = losses * row_weights
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max((labels != -100).sum(), 1)


def gradients(op, tensors, labels, dy, trainable=ALL, **settings):
    """Losses, and the gradients of trainable tensors, by name."""
    tensors = [t.detach().requires_grad_(flag) for t, flag in zip(tensors, trainable, strict=True)]
    losses = op(*tensors, labels, **settings)
    wanted = [t for t, flag in zip(tensors, trainable, strict=True) if flag]
    names = ["d" + name for name, flag in zip(NAMES, trainable, strict=True) if flag]
    dy = dy if losses.dim() else torch.tensor(1.7)
    return losses.detach(), dict(zip(names, torch.autograd.grad(losses, wanted, dy.to(losses.dtype)), strict=True))


def compare(tensors, labels, dtype, assert_no_worse, trainable=ALL, **settings):
    """Ours and plain torch in `dtype` against plain torch in float64, forward and backward."""
    dy = torch.randn(labels.shape[0])
    dy[::4] = 0
    low = [t.to(dtype) for t in tensors]
    high = [t.double() for t in low]
    ours, ours_grads = gradients(linear_cross_entropy, low, labels, dy, trainable, **settings)
    plain, plain_grads = gradients(plain_torch, low, labels, dy, trainable, **settings)
    truth = functools.partial(gradients, plain_torch, high, labels, dy, trainable, **settings)
    exact, exact_grads = truth()
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        for name, value in {"losses": ours, **ours_grads}.items():
            expected = {"losses": exact, **exact_grads}[name]
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
        return
    # losses are in fp32, from logits in the dtype of the product
    assert_no_worse("losses", ours, plain, lambda: truth()[0], inner=dtype)
    assert all(value.dtype == dtype for value in ours_grads.values())
    assert_no_worse("", ours_grads, plain_grads, lambda: truth()[1])


def weights_of(R):
    return torch.rand(R) + 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_cross_entropy(shape, reduction, dtype, assert_no_worse):
    *tensors, labels = draw(*shape)
    compare(tensors, labels, dtype, assert_no_worse, reduction=reduction, row_weights=weights_of(shape[0]))


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64(shape, reduction, assert_no_worse):
    *tensors, labels = draw(*shape)
    compare(tensors, labels, torch.float64, assert_no_worse, reduction=reduction, row_weights=weights_of(shape[0]))


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_vocabulary_of_roberta(reduction, dtype, assert_no_worse, monkeypatch):
    monkeypatch.setattr(cross_entropy_torch, "_CHUNK_ELEMENTS", 2**15)
    *tensors, labels = draw(9, 16, 50265)
    compare(tensors, labels, dtype, assert_no_worse, reduction=reduction)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("none", "sum"))
@pytest.mark.usefixtures("small_chunks")
def test_chunks(reduction, dtype, assert_no_worse):
    *tensors, labels = draw(150, 17, 101)
    compare(tensors, labels, dtype, assert_no_worse, reduction=reduction)
    compare(tensors, labels, dtype, assert_no_worse, reduction=reduction, trainable=(True, False, False))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.usefixtures("small_chunks", "formed")
def test_chunks_with_gradients_in_the_forward_pass(dtype, assert_no_worse):
    *tensors, labels = draw(150, 17, 101)
    compare(tensors, labels, dtype, assert_no_worse, reduction="sum", row_weights=weights_of(150))


@pytest.mark.parametrize("reduction", ("sum", "mean"))
@pytest.mark.usefixtures("small_chunks", "formed_again")
def test_chunks_with_logits_computed_again(reduction, assert_no_worse):
    *tensors, labels = draw(70, 17, 101)
    compare(tensors, labels, torch.float32, assert_no_worse, reduction=reduction, row_weights=weights_of(70))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("none", "sum"))
@pytest.mark.parametrize(
    "trainable",
    ((True, False, False), (True, False, True), (False, True, False), (False, False, True)),
    ids=("x", "x-bias", "weight", "bias"),
)
def test_any_part_may_be_frozen(trainable, reduction, dtype, assert_no_worse):
    *tensors, labels = draw(23, 17, 101)
    compare(tensors, labels, dtype, assert_no_worse, trainable=trainable, reduction=reduction)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("none", "sum"))
@pytest.mark.parametrize("frozen", (True, False))
def test_confident_targets(frozen, reduction, dtype, assert_no_worse):
    """p_y is almost 1, so p_y - 1 must not come from rounded numbers, nor from two roundings of one logit."""
    x, weight, bias, labels = draw(12, 16, 40)
    labels = labels.clamp(min=0)
    x = 10 * F.normalize(weight[labels])
    tensors = (x, 3 * weight, bias / 10)
    settings = dict(trainable=(True, not frozen, not frozen), reduction=reduction)
    compare(tensors, labels, dtype, assert_no_worse, label_smoothing=0.0, **settings)
    compare(tensors, labels, dtype, assert_no_worse, **settings)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_large_logits_keep_their_differences(reduction, dtype, assert_no_worse):
    """Logits of thousands do not overflow."""
    *tensors, labels = draw(11, 8, 50, scale=50.0, bias_scale=1000.0)
    compare(tensors, labels, dtype, assert_no_worse, reduction=reduction)


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("trainable", (ALL, (True, False, False)), ids=("all", "x"))
def test_all_rows_ignored(trainable, reduction):
    *tensors, labels = draw(6, 4, 9, torch.float32)
    labels = torch.full_like(labels, -100)
    losses, grads = gradients(linear_cross_entropy, tensors, labels, torch.ones(6), trainable, reduction=reduction)
    for name, value in {"losses": losses, **grads}.items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("trainable", (ALL, (True, False, False)), ids=("all", "x"))
def test_ignored_rows_are_not_read(trainable, reduction):
    """Its contents, its weight and its gradient change nothing."""
    x, weight, bias, labels = draw(9, 4, 11, torch.float32)
    dy, row_weights = torch.randn(9), weights_of(9)
    settings = dict(trainable=trainable, reduction=reduction)
    expected = gradients(linear_cross_entropy, (x, weight, bias), labels, dy, row_weights=row_weights, **settings)
    x[1::3], dy[1::3], row_weights[1::3] = torch.nan, torch.inf, torch.inf
    losses, grads = gradients(linear_cross_entropy, (x, weight, bias), labels, dy, row_weights=row_weights, **settings)
    for name, value in {"losses": losses, **grads}.items():
        assert torch.equal(value, {"losses": expected[0], **expected[1]}[name]), name


def test_other_ignore_index():
    x, weight, bias, labels = draw(6, 4, 9, torch.float32)
    changed = labels.masked_fill(labels == -100, 3)
    losses = linear_cross_entropy(x, weight, bias, changed, ignore_index=3)
    expected = plain_torch(x, weight, bias, changed).masked_fill(changed == 3, 0)
    torch.testing.assert_close(losses, expected)
    mean = linear_cross_entropy(x, weight, bias, changed, ignore_index=3, reduction="mean")
    torch.testing.assert_close(mean, expected.sum() / (changed != 3).sum())


def test_reference_is_the_loss_of_torch():
    x, weight, bias, labels = draw(23, 17, 101)
    row_weights = weights_of(23).double()
    for smoothing in (0.0, 0.1, 0.7):
        for reduction in ("none", "sum", "mean"):
            settings = dict(label_smoothing=smoothing, reduction=reduction, row_weights=row_weights)
            with use_backend("reference"):
                losses = linear_cross_entropy(x, weight, bias, labels, **settings)
            torch.testing.assert_close(losses, plain_torch(x, weight, bias, labels, **settings))
    assert linear_cross_entropy_reference(x.float(), weight.float(), bias.float(), labels).dtype == torch.float32


@pytest.mark.parametrize("smoothing", (0.0, 0.7))
def test_any_smoothing(smoothing, assert_no_worse):
    *tensors, labels = draw(9, 17, 101)
    for reduction in ("none", "sum"):
        compare(tensors, labels, torch.float32, assert_no_worse, label_smoothing=smoothing, reduction=reduction)


def test_tensors_may_have_any_strides_and_dtypes():
    """Transposed inputs, an expanded gradient, an fp32 bias and fp64 row weights over a bf16 model."""
    x, weight, bias, labels = draw(12, 16, 40, torch.float32)
    expected = linear_cross_entropy(x, weight, bias, labels)
    got = linear_cross_entropy(x.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2], labels)
    assert torch.equal(got, expected)
    leaf = bias.clone().requires_grad_()
    value = linear_cross_entropy(
        x.bfloat16(), weight.bfloat16(), leaf, labels, reduction="sum", row_weights=torch.ones(12).double()
    )
    value.backward()
    assert value.dtype == leaf.grad.dtype == torch.float32
    sum_of_dz = plain_torch(x.bfloat16().double(), weight.bfloat16().double(), leaf.double(), labels).sum()
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(sum_of_dz, leaf)[0], rtol=0.02, atol=0.02)


def test_a_row_alone_equals_its_row_in_a_batch(on_backend):
    """On Triton bit for bit; where a library multiplies, but for rounding."""
    *tensors, labels = draw(70, 17, 1100, torch.float32)
    x, weight, bias = tensors
    losses, grads = gradients(linear_cross_entropy, tensors, labels, torch.ones(70))
    for row in (0, 68):
        one = slice(row, row + 1)
        alone, alone_grads = gradients(linear_cross_entropy, (x[one], weight, bias), labels[one], torch.ones(1))
        if on_backend == "triton":
            assert torch.equal(alone, losses[one])
        torch.testing.assert_close(alone, losses[one])
        torch.testing.assert_close(alone_grads["dx"], grads["dx"][one])


@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_repeats_are_bit_equal(reduction):
    *tensors, labels = draw(33, 24, 1023, torch.float32)
    dy = torch.randn(33)
    first, first_grads = gradients(linear_cross_entropy, tensors, labels, dy, reduction=reduction)
    for _ in range(2):
        losses, grads = gradients(linear_cross_entropy, tensors, labels, dy, reduction=reduction)
        assert torch.equal(losses, first)
        assert all(torch.equal(value, first_grads[name]) for name, value in grads.items())


@pytest.mark.parametrize("reduction", ("none", "sum"))
@pytest.mark.usefixtures("small_chunks", "formed")
def test_many_chunks_do_not_drift(reduction, monkeypatch):
    """A bf16 sum of equal contributions would stop growing after a quarter of the chunks."""
    monkeypatch.setattr(cross_entropy_torch, "_BLOCK_ROWS", 1)
    monkeypatch.setattr(triton_backend, "_tiles", lambda *_, **__: dict(BR=16, BV=16, BD=16, num_warps=4, num_stages=1))
    tensors = [t.bfloat16() for t in (torch.ones(600, 2), torch.zeros(4, 2), torch.zeros(4))]
    labels = torch.zeros(600, dtype=torch.int64)
    _, grads = gradients(linear_cross_entropy, tensors, labels, 1.7 * torch.ones(600), reduction=reduction)
    expected = 1.7 * 600 * (0.25 - 0.025 - 0.9 * F.one_hot(torch.tensor(0), 4)).bfloat16()
    torch.testing.assert_close(grads["dbias"], expected.bfloat16(), rtol=0.01, atol=0)
    torch.testing.assert_close(grads["dweight"], expected.bfloat16()[:, None].expand(4, 2), rtol=0.01, atol=0)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("chunks", ("one", "many"))
def test_gradcheck(chunks, request):
    if chunks == "many":
        request.getfixturevalue("small_chunks")
    x, weight, bias, labels = draw(5, 3, 6)
    row_weights = weights_of(5).double()
    for trainable in (ALL, (True, False, False)):
        tensors = [t.detach().requires_grad_(flag) for t, flag in zip((x, weight, bias), trainable, strict=True)]
        assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels), tensors)
        # sum() passes one number, expanded to all rows, as the gradient
        assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels).sum(), tensors)
        for reduction in ("sum", "mean"):
            settings = dict(reduction=reduction, row_weights=row_weights)
            assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels, **settings), tensors)  # noqa: B023


@pytest.mark.cpu
@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("trainable", (ALL, (True, False, False)), ids=("all", "x"))
def test_memory_is_bounded_by_a_chunk(trainable, dtype, monkeypatch):
    """Beyond inputs and gradients: a chunk of logits, in fp32 and in the dtype of the product, and some rows."""
    R, D, V = 256, 16, 5003
    monkeypatch.setattr(cross_entropy_torch, "_CHUNK_ELEMENTS", 2**16)
    monkeypatch.setattr(cross_entropy_torch, "ROW_CHUNK_ELEMENTS", 2**16)
    *tensors, labels = draw(R, D, V, dtype)
    tensors = [t.requires_grad_(flag) for t, flag in zip(tensors, trainable, strict=True)]

    def step(op):
        for t in tensors:
            t.grad = None
        op(*tensors, labels, reduction="sum").backward()

    grads = sum(t.nbytes for t in tensors if t.requires_grad)
    chunk = 2**16 * (4 + (dtype != torch.float32) * dtype.itemsize)
    # the product of torch may pack its operands, such as W in bf16
    rows = 2 * R * D * (4 + dtype.itemsize) + 32 * 4 * R + tensors[1].nbytes
    assert peak_bytes(lambda: step(linear_cross_entropy)) - grads < chunk + rows + 8 * V
    assert peak_bytes(lambda: step(plain_torch)) > 2 * R * V * 4, "the measurement does not see plain torch's logits"


@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_a_frozen_weight_costs_nothing(reduction, count_calls):
    """dx alone is saved, and nothing is computed again or for the weight. A thawed weight has its gradient."""
    x, weight, bias, labels = draw(12, 8, 50, torch.float32)
    x.requires_grad_()

    def run():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            value = linear_cross_entropy(x, weight, bias, labels, reduction=reduction)
        with count_calls() as calls:
            value.sum().backward()
        return saved, calls

    saved, calls = run()
    assert sum(t.nbytes for t in saved) == x.nbytes
    assert not calls["prismer::linear_cross_entropy_backward"]
    weight.requires_grad_()
    saved, calls = run()
    assert weight.grad is not None
    if reduction == "sum":
        # the logits are computed once: the gradients exist when the forward pass ends
        assert sum(t.nbytes for t in saved) == x.nbytes + weight.nbytes
        assert not calls["prismer::linear_cross_entropy_backward"]
    else:
        # ZeRO-3 partitions the parameter again after the forward pass, so no view or copy of it may be saved
        assert any(t is weight for t in saved)
        (call,) = calls["prismer::linear_cross_entropy_backward"]
        assert (call["need_x"], call["need_weight"], call["need_bias"]) == (True, True, False)
    weight.requires_grad_(False)
    saved, calls = run()
    assert sum(t.nbytes for t in saved) == x.nbytes and not calls["prismer::linear_cross_entropy_backward"]


def test_no_grad_computes_no_gradient(count_calls):
    x, weight, bias, labels = draw(12, 8, 50, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    for reduction in ("none", "sum"):
        with torch.no_grad(), count_calls() as calls:
            losses = linear_cross_entropy(x, weight, bias, labels, reduction=reduction)
        (call,) = calls["prismer::linear_cross_entropy"]
        assert not (call["form_x"] or call["form_weight"] or call["form_bias"])
        assert not losses.requires_grad and losses.grad_fn is None
        expected = linear_cross_entropy(x, weight, bias, labels, reduction=reduction).detach()
        torch.testing.assert_close(losses, expected)


def test_the_backward_pass_scales_gradients_in_place(monkeypatch):
    """It makes no second dweight, unless the graph is kept for another backward pass."""
    x, weight, bias, labels = draw(12, 8, 50, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = linear_cross_entropy(*leaves, labels, reduction="sum")
    first = torch.autograd.grad(value, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.tensor(3.0), retain_graph=True)
    (2 * value).backward()
    for leaf, a, b, own in zip(leaves, first, second, saved, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(leaf.grad * 1.5, a)
        assert leaf.grad.data_ptr() == own.data_ptr() and a.data_ptr() != own.data_ptr()
    # without torch's answer whether the graph is kept, gradients are copied
    monkeypatch.setattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    value = linear_cross_entropy(*leaves, labels, reduction="sum")
    for a, b in zip(torch.autograd.grad(value, leaves, torch.tensor(3.0)), first, strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative():
    x, weight, bias, labels = draw(5, 4, 9, torch.float32)
    for reduction in ("none", "sum"):
        value = linear_cross_entropy(x.requires_grad_(), weight, bias, labels, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    x, weight, bias, labels = draw(6, 8, 21, torch.float32)
    x, weight = x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
    row_weights = weights_of(6)
    for factor, reduce, form in (
        (None, False, (False, False, False)),
        (row_weights, True, (False, False, False)),
        (None, False, (True, False, False)),
        (row_weights, True, (True, True, False)),
    ):
        arguments = (x, weight, bias, labels, factor, 0.1, -100, reduce, *form)
        if requires_grad and form == (True, False, False):
            arguments = (x, weight.detach(), *arguments[2:])
        torch.library.opcheck(torch.ops.prismer.linear_cross_entropy, arguments)
    with torch.no_grad():
        _, stats, *_ = torch.ops.prismer.linear_cross_entropy(*arguments)
        transposed = x.detach().T.contiguous().T
        for needs in ((True, True, True), (False, True, False)):
            arguments = (torch.randn(6), stats, transposed, weight, bias, labels, 0.1, -100, *needs)
            torch.library.opcheck(torch.ops.prismer.linear_cross_entropy_backward, arguments)
    torch.library.opcheck(torch.ops.prismer.linear_cross_entropy_scale_, (torch.randn(7, 5), torch.tensor(2.0)))


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("trainable", (ALL, (True, False, False)), ids=("all", "x"))
def test_compile(trainable, reduction):
    """Compiled code must not read memory that nothing wrote, also where rows are ignored."""
    *tensors, labels = draw(13, 8, 50, torch.float32)
    row_weights = weights_of(13)
    tensors = [t.requires_grad_(flag) for t, flag in zip(tensors, trainable, strict=True)]
    wanted = [t for t in tensors if t.requires_grad]

    def step(x, weight, bias):
        value = linear_cross_entropy(x, weight, bias, labels, reduction=reduction, row_weights=row_weights)
        return (value * 1.7).sum()

    expected = step(*tensors)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(*tensors)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got, wanted)
    for a, b in zip(grads, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_ledger(dtype):
    """Bytes and FLOPs are those of the docstring; every address and every write is checked."""
    from tests.ops.interpreter import interpreted

    R, D, V = 70 if dtype == torch.float32 else 130, 40, 1100
    x, weight, bias, labels = draw(R, D, V, dtype)
    labels = labels.clamp(min=0)
    s = dtype.itemsize
    tiles = triton_backend._tiles(dtype)
    Rb, Vb, Db = -(-R // tiles["BR"]), -(-V // tiles["BV"]), -(-D // tiles["BD"])
    S = -(-V // 1024)
    dot = 2 * Rb * tiles["BR"] * Vb * tiles["BV"] * Db * tiles["BD"]
    products = (R * Vb + V * Rb) * D * s + Rb * V * s
    logits = s * R * Vb * tiles["BV"]
    op = torch.ops.prismer.linear_cross_entropy

    with interpreted() as ledger:
        _, stats, *_ = op(x, weight, bias, labels, None, 0.1, -100, False, False, False, False)
    assert ledger.dot_flops == dot
    assert ledger.bytes_read == products + 8 * S * R + 16 * S * R + 8 * R
    assert ledger.bytes_written == 16 * S * R + 12 * R
    statistics = ledger

    with interpreted() as ledger:
        torch.ops.prismer.linear_cross_entropy_backward(
            torch.randn(R), stats, x, weight, bias, labels, 0.1, -100, True, True, True
        )
    assert ledger.dot_flops == dot and ledger.launches == 1
    assert ledger.bytes_read == products + 20 * R * Vb
    assert ledger.bytes_written == logits + 4 * Rb * V

    Rb = -(-R // triton_backend._tiles(dtype, dot=False)["BR"])
    with interpreted() as ledger:
        op(x, weight, bias, labels, torch.ones(R), 0.1, -100, True, True, True, True)
    assert ledger.dot_flops == dot, "logits are formed once"
    assert ledger.bytes_read == statistics.bytes_read + logits + 20 * R * Vb
    assert ledger.bytes_written == statistics.bytes_written + 2 * logits + 4 * Rb * V


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_ledger_of_scaling():
    """Scaling by 1, the usual gradient of a loss, reads the factor alone."""
    from tests.ops.interpreter import interpreted

    for factor in (1.0, 0.5):
        gradient = torch.randn(5000)
        expected = gradient * factor
        with interpreted() as ledger:
            torch.ops.prismer.linear_cross_entropy_scale_(gradient, torch.tensor(factor))
        assert torch.equal(gradient, expected)
        assert ledger.bytes_written == (factor != 1) * 4 * 5000
        assert ledger.bytes_read == (factor != 1) * 4 * 5000 + 2 * 4


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_blocks_of_ignored_rows_are_skipped():
    from tests.ops.interpreter import interpreted

    x, weight, bias, labels = draw(200, 16, 40, torch.float32)
    labels[64:192] = -100
    with interpreted() as ledger:
        linear_cross_entropy(x, weight, bias, labels)
    assert ledger.dot_flops == 2 * 2 * 64 * 64 * 32


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_triton_refuses_float64():
    x, weight, bias, labels = draw(3, 4, 7)
    with pytest.raises(RuntimeError, match="computes in fp32, and the call is in float64"):
        linear_cross_entropy(x, weight, bias, labels)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.zeros(2, 3, 4)), "do not fit"),
        (dict(x=torch.zeros(3, 5)), "do not fit"),
        (dict(bias=torch.zeros(8)), "do not fit"),
        (dict(weight=torch.zeros(0, 4), bias=torch.zeros(0)), "V at least 1"),
        (dict(labels=torch.zeros(2, dtype=torch.int64)), r"pass int64 of shape \(3,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int32)), "pass int64"),
        (dict(x=torch.zeros(3, 4, dtype=torch.bfloat16)), "same float"),
        (dict(bias=torch.zeros(7, dtype=torch.int64)), "bias is torch.int64; pass floats"),
        (dict(label_smoothing=1.0), r"\[0, 1\)"),
        (dict(reduction="batchmean"), "'batchmean'; choose none, sum, mean"),
        (dict(row_weights=torch.zeros(2)), r"pass floats of shape \(3,\)"),
        (dict(row_weights=torch.zeros(3, dtype=torch.int64)), "row_weights are torch.int64"),
        (dict(row_weights=torch.zeros(3, requires_grad=True)), r"pass row_weights.detach\(\)"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(x=torch.zeros(3, 4), weight=torch.zeros(7, 4), bias=torch.zeros(7), labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})
