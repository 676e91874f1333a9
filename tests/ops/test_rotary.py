"""Proves that rotary equals its definition and torch's operators, forward and gradient, and saves cos and sin alone.

Run: pytest tests/ops/test_rotary.py
"""

import pytest
import torch
from torch.library import opcheck

from prismer.kernels.dispatch import use_backend
from prismer.kernels.patch.rotary import rotary, rotary_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GROUPS, HEADS, SIZE = 3, 2, 8


def draw(B, N, positions, dtype):
    """cos and sin are no cosines and sines, and their halves differ, so that an exchange of them shows."""
    x = torch.randn(B, N, GROUPS, HEADS, SIZE).to(dtype)
    return x, torch.randn(positions, SIZE).to(dtype), torch.randn(positions, SIZE).to(dtype)


def plain(x, cos, sin, rotated):
    """What transformers writes, with the prefix of DINOv3."""
    prefix = x.shape[1] - len(cos)
    given = x[:, prefix:, :rotated]
    half = torch.cat((-given[..., SIZE // 2 :], given[..., : SIZE // 2]), -1)
    turned = given * cos[:, None, None] + half * sin[:, None, None]
    return torch.cat((x[:, :prefix], torch.cat((turned, x[:, prefix:, rotated:]), 2)), 1)


def results(op, x, cos, sin, rotated):
    x = x.detach().requires_grad_()
    y = op(x, cos, sin, rotated)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(x.dtype)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


def compare(x, cos, sin, rotated, assert_no_worse):
    got, expected = (results(op, x, cos, sin, rotated) for op in (rotary, plain))
    assert_no_worse("", got, expected, lambda: results(plain, x.double(), cos.double(), sin.double(), rotated))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rotated", (0, 1, 2, 3))
@pytest.mark.parametrize("positions", (5, 3, 0))
def test_rotary_rounds_no_worse_than_torch(positions, rotated, dtype, assert_no_worse):
    compare(*draw(2, 5, positions, dtype), rotated, assert_no_worse)


def test_the_definition_agrees_with_torch():
    tensors = draw(2, 5, 4, torch.float64)
    torch.testing.assert_close(rotary_reference(*tensors, 2), plain(*tensors, 2))
    with use_backend("reference"):
        assert torch.equal(rotary(*tensors, 2), rotary_reference(*tensors, 2))


def test_tensors_may_have_any_strides(assert_no_worse):
    x, cos, sin = draw(2, 5, 4, torch.float32)
    compare(x.permute(1, 0, 2, 3, 4).contiguous().permute(1, 0, 2, 3, 4), cos.T.contiguous().T, sin, 2, assert_no_worse)


def test_the_gradient_is_exact_in_float64():
    x, cos, sin = draw(1, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin, 2), x.requires_grad_())


def test_cos_and_sin_alone_are_saved():
    x, cos, sin = draw(2, 5, 5, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(x.requires_grad_(), cos, sin, 2)
    assert {id(t) for t in saved} == {id(cos), id(sin)}


@pytest.mark.parametrize("requires_grad", (False, True))
def test_the_registered_op_passes_opcheck(requires_grad):
    x, cos, sin = draw(2, 5, 4, torch.float32)
    opcheck(torch.ops.prismer.rotary.default, (x.requires_grad_(requires_grad), cos, sin, 2))


def test_wrong_arguments_are_refused():
    x, cos, sin = draw(2, 5, 4, torch.float32)
    for arguments, message in (
        ((x[0], cos, sin, 2), "x is"),
        ((x, cos[:, :4], sin, 2), "cos is"),
        ((x, cos, torch.zeros(6, SIZE), 2), "sin is"),
        ((x, cos, sin[:3], 2), "pass one shape"),
        ((x, cos, sin, 4), "rotated is 4"),
        ((x, cos.clone().requires_grad_(), sin, 2), "cos needs a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            rotary(*arguments)
