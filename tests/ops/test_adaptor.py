"""Proves that adaptor is the one of Prismer, in both orders of the norm, forward and in every gradient, on every
backend; that it saves the bytes of its docstring; and that frozen parameters save and compute nothing.

Run: pytest tests/ops/test_adaptor.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import adaptor as module
from prismer.kernels.adaptor import adaptor, adaptor_reference
from prismer.kernels.dispatch import use_backend
from tests.ops.product_ledger import Cost, check, product

pytestmark = pytest.mark.usefixtures("poisoned_memory", "on_backend")

BACKENDS = ("triton", "torch")
SHAPES = {  # R, D, E
    "ones": (1, 1, 1),
    "primes": (7, 61, 31),
    "D60": (33, 60, 60),
    "above-a-tile": (65, 65, 65),
    "no-rows": (0, 8, 8),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias")
FROZEN = {  # what trains, in the order of NAMES
    "all": (1, 1, 1, 1, 1, 1, 1),
    "input": (1, 0, 0, 0, 0, 0, 0),
    "adaptor-below-all": (0, 1, 1, 1, 1, 1, 1),
    "norm": (0, 1, 1, 0, 0, 0, 0),
    "norm-bias": (0, 0, 1, 0, 0, 0, 0),
    "down": (0, 0, 0, 1, 1, 0, 0),
    "down-bias": (0, 0, 0, 0, 1, 0, 0),
    "up": (0, 0, 0, 0, 0, 1, 1),
    "up-bias": (0, 0, 0, 0, 0, 0, 1),
    "input-and-weights": (1, 0, 0, 1, 0, 1, 0),
}
ORDERS = pytest.mark.parametrize("late", (False, True), ids=("early", "late"))


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request, running):
    with running(request.param):
        yield request.param


def draw(R, D, E, dtype):
    """Rows far from zero, and a norm and biases large enough to matter."""
    tensors = [2 * torch.randn(R, D) + 1, 1 + torch.randn(D), torch.randn(D)]
    tensors += [torch.randn(E, D) / D**0.5, torch.randn(E), torch.randn(D, E) / E**0.5, 2 * torch.randn(D)]
    return [t.to(dtype) for t in tensors]


def plain(x, gamma, beta, down_weight, down_bias, up_weight, up_bias, *, late, eps=1e-5):
    """What a user would write."""
    u = x if late else F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    total = x + F.linear(F.relu(F.linear(u, down_weight, down_bias)).square(), up_weight, up_bias)
    return F.layer_norm(total, x.shape[-1:], gamma, beta, eps) if late else total


def results(op, tensors, late, dtype, dy, trains=(True,) * 7):
    """Output and gradients by name."""
    leaves = [None if t is None else t.detach().to(dtype) for t in tensors]
    for t, f in zip(leaves, trains, strict=True):
        if t is not None:
            t.requires_grad_(bool(f))
    y = op(*leaves, late=late)
    wanted = {"d" + name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def compare(tensors, late, assert_no_worse):
    dtype = tensors[0].dtype
    dy = torch.randn(tensors[0].shape).to(dtype)
    got = results(adaptor, tensors, late, dtype, dy)
    expected = results(plain, tensors, late, dtype, dy)
    for name, value in got.items():
        assert value.dtype == dtype and value.is_contiguous(), name
    assert_no_worse("", got, expected, lambda: results(plain, tensors, late, torch.float64, dy))


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adaptor(shape, dtype, late, assert_no_worse):
    compare(draw(*shape, dtype), late, assert_no_worse)


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ("massive", "large-bias", "dead"))
def test_hard_inputs(case, dtype, late, assert_no_worse):
    """A massive activation, large biases, and a hidden layer of zeros."""
    tensors = draw(9, 60, 60, torch.float32)
    if case == "massive":
        tensors[0][:, 7] = 30
    elif case == "large-bias":
        tensors[4], tensors[6] = 6 * tensors[4], 10 * tensors[6]
    else:
        tensors[4] = torch.full_like(tensors[4], -100)
    compare([t.to(dtype) for t in tensors], late, assert_no_worse)


@ORDERS
def test_norm_and_biases_are_optional(late, assert_no_worse):
    tensors = draw(9, 60, 31, torch.bfloat16)
    for missing in ((1, 2), (4,), (6,)):
        compare([None if i in missing else t for i, t in enumerate(tensors)], late, assert_no_worse)


@ORDERS
def test_the_reference_agrees_with_torch(late):
    tensors = draw(7, 60, 31, torch.float64)
    with use_backend("reference"):
        torch.testing.assert_close(adaptor(*tensors, late=late, eps=0.5), plain(*tensors, late=late, eps=0.5))
    torch.testing.assert_close(adaptor_reference(*tensors, late=late, eps=0.5), plain(*tensors, late=late, eps=0.5))
    assert adaptor_reference(*draw(7, 60, 31, torch.bfloat16), late=late).dtype == torch.bfloat16


@ORDERS
def test_eps_is_used_forward_and_backward(late, assert_no_worse):
    """It is large enough to matter, also where the norm is computed again."""
    tensors = draw(7, 60, 31, torch.float32)
    dy = torch.randn(7, 60)

    def with_eps(op):
        return lambda *leaves, late: op(*leaves, late=late, eps=2.0)

    got = results(with_eps(adaptor), tensors, late, torch.float32, dy)
    expected = results(with_eps(plain), tensors, late, torch.float32, dy)
    assert_no_worse("", got, expected, lambda: results(with_eps(plain), tensors, late, torch.float64, dy))


@ORDERS
def test_parameters_in_fp32_beside_bf16(late, assert_no_worse):
    """Norm and biases in fp32 over a bf16 stream, as with master weights; each gradient has the parameter's dtype."""
    tensors = draw(9, 60, 31, torch.bfloat16)
    low = {name: t for name, t in zip(NAMES, tensors, strict=True)}
    small = [name for name in NAMES if "bias" in name or "norm" in name]
    leaves = {name: (t.float() if name in small else t).requires_grad_() for name, t in low.items()}
    y = adaptor(**leaves, late=late)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.grad.dtype == t.dtype for t in leaves.values())
    tensors = [t.detach() for t in tensors]
    expected = plain(*tensors, late=late)
    assert_no_worse("y", y.detach(), expected, lambda: plain(*(t.double() for t in tensors), late=late))


@ORDERS
def test_tensors_may_have_any_strides(late):
    """Transposed inputs and weights, more dimensions, an expanded gradient."""
    x, gamma, beta, down, down_bias, up, up_bias = draw(12, 60, 31, torch.float32)
    x, down, up = x.view(3, 4, 60).transpose(0, 1), down.T.contiguous().T, up.T.contiguous().T
    got, expected = [], []
    for op, grads in ((adaptor, got), (plain, expected)):
        leaves = [t.detach().requires_grad_() for t in (x, gamma, beta, down, down_bias, up, up_bias)]
        y = op(*leaves, late=late)
        assert y.shape == x.shape
        grads += [y, *torch.autograd.grad(y.sum(), leaves)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@ORDERS
@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_a_row_alone_equals_its_row_in_a_batch_and_repeats(late):
    """Bit for bit, and so do repeats of the gradient of every parameter."""
    tensors = draw(130, 60, 61, torch.bfloat16)
    dy = torch.randn(130, 60).bfloat16()
    first = results(adaptor, tensors, late, torch.bfloat16, dy)
    again = results(adaptor, tensors, late, torch.bfloat16, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for row in (0, 129):
        one = slice(row, row + 1)
        alone = results(adaptor, [tensors[0][one], *tensors[1:]], late, torch.bfloat16, dy[one])
        assert torch.equal(alone["y"], first["y"][one]) and torch.equal(alone["dx"], first["dx"][one])


@ORDERS
@pytest.mark.parametrize("trains", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_save_and_compute_nothing(trains, late, on_backend, count_calls):
    """The saved bytes are those of the docstring, and frozen parameters cost no product."""
    from tests.ops.interpreter import interpreted

    R, D, E = 6, 20, 24
    tensors = draw(R, D, E, torch.bfloat16)
    dy = torch.randn(R, D).bfloat16()
    everything = results(adaptor, tensors, late, torch.bfloat16, dy)
    leaves = [t.requires_grad_(bool(f)) for t, f in zip(tensors, trains, strict=True)]
    saved = []
    with count_calls() as calls:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = adaptor(*leaves, late=late)
        y.backward(dy)
    (backward,) = calls["prismer::adaptor_backward"]
    needs = [bool(f) for f in trains]
    assert backward["needs"] == needs
    for name, t in zip(NAMES, leaves, strict=True):
        if t.requires_grad:
            assert torch.equal(t.grad, everything["d" + name]), name
        else:
            assert t.grad is None

    need_x, need_gamma, need_beta, need_down, need_down_bias, need_up, need_up_bias = needs
    affine = need_gamma or need_beta
    need_u = need_x or (affine and not late)
    need_dh = need_u or need_down or need_down_bias
    bytes_r = R * E * 2 * (need_dh or need_up)
    if late:
        expected = bytes_r + R * D * 2 + 8 * R + R * D * 2 * need_down
    else:
        expected = bytes_r + 8 * R * need_u + R * D * 2 * (need_u or need_down)
    activations = [t for t in saved if not any(t is p for p in leaves[1:])]
    assert sum(t.nbytes for t in activations) == expected

    products = need_dh + need_u + need_down + need_up
    names = [argument.name for argument in torch.ops.prismer.adaptor_backward.default._schema.arguments]
    arguments = [backward[name] for name in names]
    with torch.no_grad(), count_calls() as calls:
        module._backward(*arguments)
    # the early order computes the norm again for the gradient of down_weight alone
    again, norms = need_down and not late, int(late or need_u)
    if on_backend == "torch":
        assert [call["affine"] for call in calls["prismer::layer_norm_backward"]] == [affine] * norms
        assert len(calls["prismer::layer_norm"]) == again
        assert len(calls["aten::mm"]) == products and not calls["aten::addmm"]
        return
    with torch.no_grad(), interpreted() as ledger:
        module._backward(*arguments)
    assert ledger.kernels.count("_gemm_kernel") == products
    # in one pass with the gradient of the norm, if that is computed
    assert (("_backward_kernel", "p_y") in ledger.traffic) == (again and need_u)
    assert ledger.kernels.count("_forward_kernel") == (again and not need_u)
    in_norm = ledger.traffic.get(("_sum_groups_kernel", "p_second"), [0, 0])[1] > 0
    assert in_norm == (affine and norms > 0)
    # the sums of dt end the pass of the norm, or are a launch of their own
    sums = norms and (affine or need_up_bias)
    alone = need_up_bias and not norms
    assert ledger.launches == products + norms + sums + (again and not need_u) + alone


@ORDERS
def test_nothing_is_saved_if_nothing_trains(late):
    saved = []
    tensors = draw(6, 20, 24, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adaptor(*tensors, late=late)
        with torch.no_grad():
            adaptor(tensors[0].requires_grad_(), *tensors[1:], late=late)
    assert not saved


@ORDERS
def test_what_trains_may_change_between_steps(late):
    """What trains may change between steps."""
    x, *parameters = draw(6, 20, 24, torch.float32)
    for trains in (False, True, False):
        for p in parameters:
            p.requires_grad_(trains)
            p.grad = None
        leaf = x.clone().requires_grad_()
        adaptor(leaf, *parameters, late=late).square().sum().backward()
        assert leaf.grad is not None and all((p.grad is not None) == trains for p in parameters)


@ORDERS
@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad, late):
    tensors = [t.requires_grad_(requires_grad) for t in draw(6, 20, 24, torch.float32)]
    torch.library.opcheck(torch.ops.prismer.adaptor, (*tensors, late, 1e-5))
    x, gamma, beta, down, down_bias, up, up_bias = (t.detach() for t in tensors)
    permuted = (x.T.contiguous().T, None, None, down.T.contiguous().T, None, up, None, late, 1e-5)
    torch.library.opcheck(torch.ops.prismer.adaptor, permuted)
    _, r, total, mean, rstd = torch.ops.prismer.adaptor(*(t.detach() for t in tensors), late, 1e-5)
    for trains in FROZEN.values() if requires_grad else ():
        arguments = (
            torch.randn(20, 6).T,
            x,
            r,
            total if late else None,
            mean,
            rstd,
            gamma,
            beta,
            down,
            down_bias,
            up,
            up_bias,
            late,
            1e-5,
            [bool(f) for f in trains],
        )
        torch.library.opcheck(
            torch.ops.prismer.adaptor_backward, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_opcheck_on_triton():
    """Outputs that kernels fill are new tensors too, of the shapes of the fake implementation."""
    tensors = draw(3, 8, 8, torch.float32)
    some = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.prismer.adaptor, (*tensors, True, 1e-5), **some)
    _, r, total, mean, rstd = torch.ops.prismer.adaptor(*tensors, True, 1e-5)
    arguments = (tensors[0], tensors[0], r, total, mean, rstd, *tensors[1:], True, 1e-5, [True] * 7)
    torch.library.opcheck(torch.ops.prismer.adaptor_backward, arguments, **some)


@ORDERS
def test_compile(late):
    tensors = [t.requires_grad_() for t in draw(6, 20, 24, torch.float32)]

    def step(*tensors):
        return adaptor(*tensors, late=late).square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


@ORDERS
@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
def test_gradcheck(late):
    tensors = [t.requires_grad_() for t in draw(3, 5, 7, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: adaptor(*t, late=late), tensors)


@ORDERS
@pytest.mark.parametrize("on_backend", ("triton",), indirect=True)
def test_ledger(late):
    """FLOPs and bytes are those of the products that the docstring lists; every address and write is checked."""
    from tests.ops.interpreter import interpreted

    R, D, E, dtype = 67, 60, 70, torch.bfloat16
    tensors = draw(R, D, E, dtype)
    # test_layer_norm.py proves the bytes of the norm; one block is 16 rows, and 32 in the backward pass
    blocks, groups = -(-R // 16), -(-R // 32)
    norm = Cost(read=R * D * 2 + blocks * 2 * D * 2, written=R * D * 2 + 8 * R)
    with interpreted() as ledger:
        _, r, total, mean, rstd = torch.ops.prismer.adaptor(*tensors, late, 1e-5)
    check(ledger, norm, product(R, E, D, dtype, bias=2), product(R, D, E, dtype, bias=2, read=1))
    dy = torch.randn(R, D).to(dtype)
    with interpreted() as ledger:
        torch.ops.prismer.adaptor_backward(
            dy, tensors[0], r, total if late else None, mean, rstd, *tensors[1:], late, 1e-5, [True] * 7
        )
    norm_backward = Cost(
        # three sums: those for the affine, and of dt for dup_bias; the early order writes the norm again, for ddown
        read=(2 + (not late)) * R * D * 2 + (1 + (not late)) * groups * D * 2 + 8 * R + 12 * groups * D,
        written=(1 + (not late)) * R * D * 2 + 12 * groups * D + 6 * D,
    )
    check(
        ledger,
        norm_backward,
        product(R, E, D, dtype, read=1, sums=2),  # dh
        product(R, D, E, dtype, read=int(late)),  # du, and dx of the late order
        product(E, D, R, dtype),  # ddown
        product(D, E, R, dtype),  # dup
    )


@pytest.mark.parametrize("on_backend", ("torch",), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(x=torch.zeros(3, 4, dtype=torch.int64)), "pass floats"),
        (dict(norm_weight=torch.zeros(5)), r"norm_weight is .* pass floats of shape \(4,\)"),
        (dict(norm_bias=torch.zeros(4, dtype=torch.int32)), "norm_bias is torch.int32"),
        (dict(down_weight=torch.zeros(8, 5)), r"down_weight is .* of shape \(outputs, 4\)"),
        (dict(down_weight=torch.zeros(8, 4).double()), "pass torch.float32, like x"),
        (dict(down_bias=torch.zeros(4)), r"down_bias is .* pass floats of shape \(8,\)"),
        (dict(up_weight=torch.zeros(5, 8)), r"up_weight is .* of shape \(4, 8\)"),
        (dict(up_bias=torch.zeros(8)), r"up_bias is .* pass floats of shape \(4,\)"),
    ),
)
def test_bad_arguments_are_refused(change, message):
    good = dict(x=torch.zeros(3, 4), norm_weight=torch.zeros(4), norm_bias=torch.zeros(4))
    good |= dict(down_weight=torch.zeros(8, 4), down_bias=torch.zeros(8))
    good |= dict(up_weight=torch.zeros(4, 8), up_bias=torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        adaptor(**{**good, **change}, late=False)
