"""Proves that mlp is the two-layer perceptron, forward and every gradient, on every backend, and that what is frozen
saves nothing and computes nothing.

Run: pytest tests/ops/test_mlp.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import mlp as module
from prismer.kernels.activation import ACTIVATIONS
from prismer.kernels.dispatch import use_backend
from prismer.kernels.mlp import mlp, mlp_reference
from tests.ops.product_ledger import check, column_sums, product

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("triton", "torch")
SHAPES = {  # R, D, E, O
    "ones": (1, 1, 1, 1),
    "primes": (7, 61, 127, 31),
    "D60": (33, 60, 240, 60),
    "above-a-tile": (65, 65, 65, 65),
    "no-rows": (0, 8, 32, 8),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")
FROZEN = {  # what trains: x, fc_weight, fc_bias, proj_weight, proj_bias
    "all": (1, 1, 1, 1, 1),
    "input": (1, 0, 0, 0, 0),
    "input-and-biases": (1, 0, 1, 0, 1),
    "fc": (0, 1, 1, 0, 0),
    "fc-bias": (0, 0, 1, 0, 0),
    "proj": (0, 0, 0, 1, 1),
    "proj-bias": (0, 0, 0, 0, 1),
    "weights": (0, 1, 0, 1, 0),
}


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


def draw(R, D, E, outputs, dtype):
    """Biases as large as the products that they are added to."""
    x, w1, b1 = torch.randn(R, D), torch.randn(E, D) / D**0.5, torch.randn(E)
    w2, b2 = torch.randn(outputs, E) / E**0.5, torch.randn(outputs)
    return [t.to(dtype) for t in (x, w1, b1, w2, b2)]


def plain(x, fc_weight, fc_bias, proj_weight, proj_bias, *, activation):
    """What a user would write."""
    u = F.linear(x, fc_weight, fc_bias)
    if activation == "quick_gelu":
        a = u * torch.sigmoid(1.702 * u)
    elif activation.startswith("gelu"):
        a = F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        a = F.relu(u).square()
    return F.linear(a, proj_weight, proj_bias)


def results(op, tensors, activation, dtype, dy, trains=(True,) * 5):
    """Output and gradients by name."""
    leaves = [None if t is None else t.detach().to(dtype) for t in tensors]
    for t, f in zip(leaves, trains, strict=True):
        if t is not None:
            t.requires_grad_(bool(f))
    y = op(*leaves, activation=activation)
    wanted = {"d" + name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def compare(tensors, activation, assert_no_worse):
    dtype = tensors[0].dtype
    dy = torch.randn(*tensors[0].shape[:-1], tensors[3].shape[0]).to(dtype)
    got = results(mlp, tensors, activation, dtype, dy)
    expected = results(plain, tensors, activation, dtype, dy)
    for name, value in got.items():
        assert value.dtype == dtype and value.is_contiguous(), name
    assert_no_worse("", got, expected, lambda: results(plain, tensors, activation, torch.float64, dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlp(shape, dtype, assert_no_worse):
    compare(draw(*shape, dtype), "quick_gelu", assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype, assert_no_worse):
    compare(draw(9, 61, 60, 31, dtype), activation, assert_no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ("massive", "large-bias", "tiny"))
def test_hard_inputs(case, dtype, assert_no_worse):
    x, w1, b1, w2, b2 = draw(9, 60, 64, 60, torch.float32)
    if case == "massive":
        x[:, 7] = 100
    elif case == "large-bias":
        b1, b2 = 8 * b1, 30 * b2
    else:
        x, b1 = x * 1e-3, b1 * 1e-3
    # the two of three that lose most to a rounded product: squaring, and the tail of an exponential
    for activation in ("quick_gelu", "squared_relu"):
        compare([t.to(dtype) for t in (x, w1, b1, w2, b2)], activation, assert_no_worse)


@pytest.mark.parametrize("biases", ((False, False), (True, False), (False, True)), ids=("none", "fc", "proj"))
def test_biases_are_optional(biases, assert_no_worse):
    x, w1, b1, w2, b2 = draw(9, 60, 96, 31, torch.bfloat16)
    compare([x, w1, b1 if biases[0] else None, w2, b2 if biases[1] else None], "gelu", assert_no_worse)


def test_the_reference_agrees_with_torch():
    tensors = draw(7, 60, 96, 31, torch.float64)
    for activation in ACTIVATIONS:
        with use_backend("reference"):
            torch.testing.assert_close(mlp(*tensors, activation=activation), plain(*tensors, activation=activation))
    assert mlp_reference(*draw(7, 60, 96, 31, torch.bfloat16), activation="gelu").dtype == torch.bfloat16


def test_parameters_in_fp32_beside_bf16():
    """Biases in fp32 over a bf16 stream, as with master weights; their gradients have their dtype."""
    tensors = draw(9, 60, 96, 31, torch.bfloat16)
    tensors[2], tensors[4] = (t.float().requires_grad_() for t in tensors[2::2])
    y = mlp(*tensors, activation="gelu")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert tensors[2].grad.dtype == tensors[4].grad.dtype == torch.float32
    assert torch.equal(tensors[4].grad, torch.full((31,), 9.0))


def test_tensors_may_have_any_strides():
    """Transposed inputs and weights, more dimensions, an expanded gradient."""
    x, w1, b1, w2, b2 = draw(12, 60, 96, 31, torch.float32)
    x = x.view(3, 4, 60).transpose(0, 1)
    w1, w2 = w1.T.contiguous().T, w2.T.contiguous().T
    got, expected = [], []
    for op, grads in ((mlp, got), (plain, expected)):
        leaves = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2)]
        y = op(*leaves, activation="quick_gelu")
        assert y.shape == (4, 3, 31)
        grads += [y, *torch.autograd.grad(y.sum(), leaves)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_a_row_alone_equals_its_row_in_a_batch_and_repeats():
    """Bit for bit, and so do repeats of the gradient of every parameter."""
    tensors = draw(130, 60, 64, 61, torch.bfloat16)
    dy = torch.randn(130, 61).bfloat16()
    first = results(mlp, tensors, "quick_gelu", torch.bfloat16, dy)
    again = results(mlp, tensors, "quick_gelu", torch.bfloat16, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for row in (0, 129):
        one = slice(row, row + 1)
        alone = results(mlp, [tensors[0][one], *tensors[1:]], "quick_gelu", torch.bfloat16, dy[one])
        assert torch.equal(alone["y"], first["y"][one]) and torch.equal(alone["dx"], first["dx"][one])


@pytest.mark.parametrize("trains", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_save_and_compute_nothing(trains, on_backend, count_calls):
    """h is saved, x only if fc_weight trains, and the parameters themselves; frozen ones cost no product."""
    from tests.ops.interpreter import interpreted

    R, D, E, outputs = 6, 20, 40, 24
    tensors = draw(R, D, E, outputs, torch.bfloat16)
    dy = torch.randn(R, outputs).bfloat16()
    everything = results(mlp, tensors, "gelu", torch.bfloat16, dy)
    x, fc_weight, fc_bias, proj_weight, proj_bias = (
        t.requires_grad_(bool(f)) for t, f in zip(tensors, trains, strict=True)
    )
    saved = []
    with count_calls() as calls:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, activation="gelu")
        y.backward(dy)
    parameters = (fc_weight, fc_bias, proj_weight, proj_bias)
    activations = [t for t in saved if not any(t is p for p in parameters)]
    needs_h = any(trains[:4])
    assert sum(t.nbytes for t in activations) == R * E * 2 * needs_h + R * D * 2 * trains[1]
    (forward,), (backward,) = calls["prismer::mlp"], calls["prismer::mlp_backward"]
    assert forward["keep"] is needs_h and backward["needs"] == [bool(f) for f in trains]
    for name, t in zip(NAMES, tensors, strict=True):
        if t.requires_grad:
            # the activation is the same alone or with dh, but for rounding
            torch.testing.assert_close(t.grad, everything["d" + name], rtol=0.02, atol=0.02)
        else:
            assert t.grad is None

    need_dh = any(trains[:3])
    products = need_dh + trains[0] + trains[1] + trains[3]
    arguments = [
        dy,
        x if trains[1] else None,
        torch.randn(R, E).bfloat16(),
        fc_weight,
        fc_bias,
        proj_weight,
        proj_bias,
        "gelu",
        [bool(f) for f in trains],
    ]
    with torch.no_grad(), count_calls() as calls:
        module._backward(*arguments)
    if on_backend == "torch":
        assert len(calls["aten::mm"]) == products and not calls["aten::addmm"]
        assert len(calls["prismer::bias_activation"]) == trains[3]
        return
    with torch.no_grad(), interpreted() as ledger:
        module._backward(*arguments)
    assert ledger.kernels.count("_gemm_kernel") == products
    # the sums of fc_bias come with dh, and those of proj_bias are a launch: there are few rows
    recomputed = trains[3] and not need_dh
    assert (("_gemm_kernel", "p_activated") in ledger.traffic) == (trains[3] and need_dh)
    assert ledger.launches == products + trains[4] + recomputed


def test_nothing_is_saved_if_nothing_trains(count_calls):
    saved = []
    tensors = draw(6, 20, 40, 24, torch.bfloat16)
    with count_calls() as calls, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(*tensors, activation="gelu")
        with torch.no_grad():
            mlp(tensors[0].requires_grad_(), *tensors[1:], activation="gelu")
    assert not saved and [call["keep"] for call in calls["prismer::mlp"]] == [False, False]


def test_what_trains_may_change_between_steps(assert_no_worse):
    """What trains may change between steps."""
    x, *parameters = draw(6, 20, 40, 24, torch.float32)
    for trains in (False, True, False):
        for p in parameters:
            p.requires_grad_(trains)
            p.grad = None
        leaf = x.clone().requires_grad_()
        mlp(leaf, *parameters, activation="quick_gelu").sum().backward()
        assert leaf.grad is not None and all((p.grad is not None) == trains for p in parameters)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    tensors = [t.requires_grad_(requires_grad) for t in draw(6, 20, 40, 24, torch.float32)]
    torch.library.opcheck(torch.ops.prismer.mlp, (*tensors, "quick_gelu", requires_grad))
    x, fc_weight, fc_bias, proj_weight, proj_bias = (t.detach() for t in tensors)
    permuted = (x.T.contiguous().T, fc_weight.T.contiguous().T, None, proj_weight, None, "gelu", False)
    torch.library.opcheck(torch.ops.prismer.mlp, permuted)
    dy, h = torch.randn(24, 6).T, torch.randn(6, 40)
    for trains in (FROZEN["all"], FROZEN["proj-bias"]) if requires_grad else ():
        needs = [bool(f) for f in trains]
        arguments = (dy, x if trains[1] else None, h, fc_weight, fc_bias, proj_weight, proj_bias, "gelu", needs)
        torch.library.opcheck(torch.ops.prismer.mlp_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile():
    tensors = [t.requires_grad_() for t in draw(6, 20, 40, 24, torch.float32)]

    def step(*tensors):
        return mlp(*tensors, activation="quick_gelu").square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = [t.requires_grad_() for t in draw(3, 5, 7, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: mlp(*t, activation=activation), tensors)


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ledger(dtype):
    """FLOPs and bytes are those of the products that the docstring lists; every address and write is checked."""
    from tests.ops.interpreter import interpreted

    R, D, E, outputs = 67, 60, 130, 61
    s = dtype.itemsize
    x, fc_weight, fc_bias, proj_weight, proj_bias = draw(R, D, E, outputs, dtype)
    for keep in (False, True):
        with interpreted() as ledger:
            _, h = torch.ops.prismer.mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, "gelu", keep)
        check(ledger, product(R, E, D, dtype, bias=s, written=keep), product(R, outputs, E, dtype, bias=s))
    dy = torch.randn(R, outputs).to(dtype)
    with interpreted() as ledger:
        torch.ops.prismer.mlp_backward(dy, x, h, fc_weight, fc_bias, proj_weight, proj_bias, "gelu", [True] * 5)
    check(
        ledger,
        product(R, E, outputs, dtype, bias=s, read=2, written=1, sums=s),  # dh, and a beside it
        product(R, D, E, dtype),  # dx
        product(E, D, R, dtype),  # dfc_weight
        product(outputs, E, R, dtype),  # dproj_weight
        column_sums(R, outputs, dtype),  # dproj_bias
    )


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.zeros(3, 4, dtype=torch.int64)), "pass floats"),
        (dict(fc_weight=torch.zeros(8, 5)), r"fc_weight is .* of shape \(outputs, 4\)"),
        (dict(fc_weight=torch.zeros(8, 4).double()), "pass torch.float32, like x"),
        (dict(fc_bias=torch.zeros(4)), r"fc_bias is .* pass floats of shape \(8,\)"),
        (dict(proj_weight=torch.zeros(4, 4)), r"proj_weight is .* of shape \(outputs, 8\)"),
        (dict(proj_bias=torch.zeros(4, dtype=torch.int32)), "proj_bias is torch.int32"),
        (dict(activation="relu"), "choose quick_gelu, gelu, squared_relu"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(x=torch.zeros(3, 4), fc_weight=torch.zeros(8, 4), fc_bias=torch.zeros(8))
    good |= dict(proj_weight=torch.zeros(4, 8), proj_bias=torch.zeros(4), activation="gelu")
    with pytest.raises(ValueError, match=message):
        mlp(**{**good, **change})
