"""Proves that rms_norm and add_rms_norm equal their definitions, forward and every gradient, and save one number a row.

Run: pytest tests/ops/test_rms_norm.py
"""

import pytest
import torch
from torch.library import opcheck

from prismer.kernels.dispatch import use_backend
from prismer.kernels.patch.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = ((5, 60), (2, 3, 768), (1, 1), (0, 8), (4, 1023))


def step(op, tensors, dys):
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, dys[: len(outputs)])
    return [y.detach() for y in outputs] + list(grads)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_its_definition(shape, residual, dtype, assert_no_worse):
    x, more = (torch.randn(shape).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(shape[-1]).to(dtype)
    dys = [torch.randn(shape).to(dtype) for _ in range(2)]
    tensors = (x, more, weight) if residual else (x, weight)
    op, reference = (add_rms_norm, add_rms_norm_reference) if residual else (rms_norm, rms_norm_reference)

    def plain(*tensors):
        *xs, weight = tensors
        total = sum(xs[1:], xs[0])
        y = torch.nn.functional.rms_norm(total, total.shape[-1:], weight, 1e-6)
        return (y, total) if residual else y

    high = [t.double() for t in tensors], [dy.double() for dy in dys]
    names = ("y", "total", "dx", "dresidual", "dweight") if residual else ("y", "dx", "dweight")
    exact = lambda: dict(zip(names, step(reference, *high), strict=True))  # noqa: E731
    ours, theirs = (dict(zip(names, step(f, tensors, dys), strict=True)) for f in (op, plain))
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact(), rtol=1e-11, atol=1e-11)
    else:
        assert_no_worse("", ours, theirs, exact)


def draw_inputs():
    return torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)


def test_the_weight_is_optional():
    x, residual = draw_inputs()
    with use_backend("reference"):
        expected = rms_norm(x, None), add_rms_norm(x, residual, None)[0]
    torch.testing.assert_close((rms_norm(x, None), add_rms_norm(x, residual, None)[0]), expected)


def test_the_gradient_of_the_sum_alone_passes_through():
    x, residual = draw_inputs()
    dx, dresidual = torch.autograd.grad(add_rms_norm(x, residual, None)[1].sum(), (x, residual))
    assert (dx == 1).all() and (dresidual == 1).all()


def test_the_input_and_a_number_a_row_are_saved():
    x, _ = draw_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, None)
    assert sorted(t.numel() for t in saved) == [6, 48]


def test_the_registered_op_passes_opcheck():
    rows = torch.randn(4, 8, requires_grad=True)
    opcheck(torch.ops.prismer.rms_norm.default, (rows, None, torch.randn(8, requires_grad=True), 1e-6))
    opcheck(torch.ops.prismer.rms_norm.default, (rows, rows.detach(), None, 1e-6))


def test_wrong_arguments_are_refused():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="x is torch.int64"):
        rms_norm(x.long(), None)
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="residual is"):
        add_rms_norm(x, x.double(), None)
