"""Proves that `linears` equals one to three linear layers, forward and every gradient, and that frozen weights cost
nothing.

Run: pytest tests/ops/test_linear.py
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels.dispatch import use_backend
from prismer.kernels.linear import linears

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def as_one_op():
    """Run the op: an eager call on a CPU would be torch's own layers (test_on_host.py)."""
    with use_backend("torch"):
        yield


def draw(count, dtype=torch.float64, bias=True, D=12):
    x = torch.randn(3, 5, D, dtype=torch.float64).to(dtype)
    layers = [(torch.randn(n, D).to(dtype), torch.randn(n).to(dtype) if bias else None) for n in (8, 7, 12)[:count]]
    return x, layers


def separate(x, layers):
    return [F.linear(x, weight, bias) for weight, bias in layers]


def step(op, x, layers, trained, dys):
    """Outputs, then the gradients of x and of the trained parameters."""
    x = x.detach().requires_grad_("x" in trained)
    layers = [
        (w.detach().requires_grad_(f"w{i}" in trained), b.detach().requires_grad_(f"b{i}" in trained))
        for i, (w, b) in enumerate(layers)
    ]
    outputs = op(x, layers)
    leaves = [t for t in (x, *(t for layer in layers for t in layer)) if t is not None and t.requires_grad]
    used = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None and y.requires_grad]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [dy for _, dy in used], allow_unused=True)
    return [y.detach() for y in outputs], grads


TRAINED = ("x", "x w0 b0 w1 b1 w2 b2", "w0 b0 w1 b1 w2 b2", "x b1", "x w2", "b0")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("count", (1, 2, 3))
def test_linears(count, trained, dtype, assert_no_worse):
    trained = [t for t in trained.split() if t == "x" or int(t[1]) < count]
    if not trained:
        pytest.skip("nothing trains with so few layers")
    x, layers = draw(count, dtype)
    dys = [torch.randn(3, 5, w.shape[0]).to(dtype) for w, _ in layers]
    ours = step(linears, x, layers, trained, dys)
    plain = step(separate, x, layers, trained, dys)
    high = [(w.double(), b.double()) for w, b in layers]
    exact = functools.partial(step, separate, x.double(), high, trained, [dy.double() for dy in dys])
    for part, kind in enumerate(("y", "d")):

        def named(results, part=part, kind=kind):
            return {f"{kind}{i}": t for i, t in enumerate(results[part])}

        assert all(t.dtype == dtype for t in ours[part])
        if dtype == torch.float64:
            torch.testing.assert_close(named(ours), named(exact()), rtol=1e-13, atol=1e-13)
        else:
            assert_no_worse("", named(ours), named(plain), lambda named=named: named(exact()))


def test_a_dropped_output_has_no_gradient():
    """Its weight gets none either, and the gradient of the input comes from the other outputs."""
    x, layers = draw(3)
    dys = [torch.randn(3, 5, 8, dtype=torch.float64), None, torch.randn(3, 5, 12, dtype=torch.float64)]
    trained = TRAINED[1].split()
    got, expected = (step(op, x, layers, trained, dys)[1] for op in (linears, separate))
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_only_the_documented_tensors_are_saved():
    """Frozen weights save themselves alone, trained ones behind a frozen input save the input alone."""
    x, layers = draw(3, torch.float32)
    saved = []

    def run():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            linears(x, layers)
        return saved

    assert not run()
    x.requires_grad_()
    assert len(run()) == 3 and all(any(t is w for t in saved) for w, _ in layers)
    x.requires_grad_(False)
    layers[1][0].requires_grad_()
    assert [tuple(t.shape) for t in run()] == [(15, 12)]


def test_opcheck_and_compile():
    for grad in (False, True):
        x, layers = draw(2, torch.float32, bias=False)
        x, w1, w2 = x[0].requires_grad_(grad), layers[0][0].requires_grad_(grad), layers[1][0]
        torch.library.opcheck(torch.ops.prismer.linears, (x, w1, None, w2, None, None, None))
    dys = [torch.randn(5, 8), torch.randn(5, 7).T.contiguous().T]
    for needs in ([True, True, False, False, True], [False, False, True, True, False]):
        arguments = x.detach(), dys, [w1.detach(), w2] if needs[0] else [], needs
        torch.library.opcheck(torch.ops.prismer.linears_backward, arguments)
    x, layers = draw(3)
    tensors = [x] + [t for layer in layers for t in layer]
    tensors = [t.requires_grad_() for t in tensors]

    def loss(x, *flat):
        return sum(y.square().sum() for y in linears(x, list(zip(flat[::2], flat[1::2], strict=True))))

    expected = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda *t: tuple(linears(t[0], list(zip(t[1::2], t[2::2], strict=True)))), tensors)
    with use_backend("reference"):
        for a, b in zip(linears(x, layers), separate(x, layers), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("layers", "message"),
    (
        ([], "0 layers were given"),
        ([(torch.zeros(3, 4), None)] * 4, "4 layers"),
        ([(torch.zeros(3, 5), None)], r"pass \(N, 4\)"),
        ([(torch.zeros(3, 4), torch.zeros(4))], "do not fit"),
        ([(torch.zeros(3, 4).double(), None)], "do not fit"),
    ),
)
def test_bad_arguments_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        linears(torch.zeros(2, 4), layers)
