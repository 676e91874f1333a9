"""Proves what public ops do with dtypes for which they have no kernels: they compute float64 exactly, and refuse float8
with one sentence that names the dtype and what to do.

Run: pytest tests/ops/test_dtypes.py
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prismer.kernels.activation import bias_activation
from prismer.kernels.adaptor import adaptor
from prismer.kernels.attention import attention
from prismer.kernels.cross_attention import cross_attention
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.decode_attention import decode_attention
from prismer.kernels.dispatch import use_backend
from prismer.kernels.few_rows import few_rows_linear
from prismer.kernels.instance_rows import add_instance_rows
from prismer.kernels.label_map import label_map
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.patch.gated_mlp import gated_mlp
from prismer.kernels.patch.resampler_projections import resampler_projections
from prismer.kernels.patch.rms_norm import add_rms_norm, rms_norm
from prismer.kernels.patch.rotary import rotary
from prismer.kernels.resampler_attention import resampler_attention, standardise

B, M, L, D, H = 2, 4, 6, 16, 2


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def square():
    return draw(D, D), draw(D)


# op -> a call of it; `to` casts each float64 tensor to the tested dtype
CALLS = {
    "layer_norm": lambda to: layer_norm(to(draw(M, D)), to(draw(D)), to(draw(D))),
    "add_layer_norm": lambda to: add_layer_norm(to(draw(M, D)), to(draw(M, D)), to(draw(D)), to(draw(D)))[0],
    "rms_norm": lambda to: rms_norm(to(draw(M, D)), to(draw(D))),
    "add_rms_norm": lambda to: add_rms_norm(to(draw(M, D)), to(draw(M, D)), to(draw(D)))[0],
    "gated_mlp": lambda to: gated_mlp(to(draw(M, D)), *map(to, (*square(), *square(), *square()))),
    "rotary": lambda to: rotary(to(draw(B, M, 3, H, 8)), *(to(draw(M, 8)).detach() for _ in range(2)), 2),
    "bias_activation": lambda to: bias_activation(to(draw(M, D)), to(draw(D)), "gelu"),
    "mlp": lambda to: mlp(to(draw(M, D)), *map(to, square()), *map(to, square()), activation="gelu"),
    "adaptor": lambda to: adaptor(
        to(draw(M, D)), to(draw(D)), to(draw(D)), *map(to, square()), *map(to, square()), late=False, eps=1e-5
    ),
    "linears": lambda to: linears(to(draw(M, D)), [tuple(map(to, square()))])[0],
    "few_rows_linear": lambda to: few_rows_linear(to(draw(M, D)), *map(to, square())),
    "attention": lambda to: attention(*(to(draw(B, H, M, 8)) for _ in range(3))),
    "cross_attention": lambda to: cross_attention(
        to(draw(B, M, D)), to(draw(B, L, D)), *map(to, square()), *map(to, square()), H
    ),
    "linear_cross_entropy": lambda to: linear_cross_entropy(
        to(draw(M, D)), to(draw(L, D)), to(draw(L)), torch.tensor([0, 1, -100, 3])
    ),
    "decode_attention": lambda to: decode_attention(
        to(draw(B, H, 1, 8)),
        to(draw(B, H, L, 8)),
        to(draw(B, H, L, 8)),
        torch.ones(B, L, dtype=torch.bool),
        to(draw(B, H, 1, 8)),
        to(draw(B, H, 1, 8)),
        torch.zeros(B, 1, 1, dtype=torch.int64),
    ),
    "add_instance_rows": lambda to: add_instance_rows(
        to(draw(B, 4, D)), torch.zeros(B, 4, 4, dtype=torch.uint8), to(draw(3, D)), None, 2
    ),
    "label_map": lambda to: label_map(
        torch.zeros(B, 4, 4, dtype=torch.uint8), torch.zeros(B, 256, dtype=torch.int64), to(draw(3, 64)), 2
    ),
    "resampler_attention": lambda to: resampler_attention(
        to(draw(B, M, D)),
        standardise(to(draw(B, L, D))),
        to(draw(D)),
        to(draw(D)),
        to(draw(3 * D, D)),
        to(draw(3 * D)),
        H,
    ),
    "resampler_projections": lambda to: resampler_projections(
        to(draw(B, M, D)), to(draw(B, L, D)), to(draw(D)), to(draw(D)), *(to(draw(D, D)) for _ in range(3))
    )[1],
}


@pytest.mark.parametrize("name", CALLS)
def test_float64_is_computed_exactly(name):
    """The result is as exact as the definition, and in float64."""
    torch.manual_seed(0)
    got = CALLS[name](lambda t: t)
    torch.manual_seed(0)
    with use_backend("reference"):
        expected = CALLS[name](lambda t: t)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_float8_is_refused(name, dtype):
    with pytest.raises(ValueError, match=str(dtype).replace(".", r"\.")):
        CALLS[name](lambda t: t.to(dtype))


@pytest.mark.parametrize("name", ("mlp", "linears", "layer_norm", "linear_cross_entropy", "adaptor"))
def test_float8_weights_beside_an_fp32_input_are_refused(name):
    """Matrices and norms are in float8."""
    count = iter(range(99))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        CALLS[name](lambda t: t.float() if next(count) == 0 else t.to(torch.float8_e4m3fn))


class FakeBesideReal(TorchDispatchMode):
    """Compares the outputs of each registered op that is called with those of its fake implementation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "prismer" or function._schema.is_mutable:
            return function(*args, **(kwargs or {}))
        with FakeTensorMode() as mode:
            fakes = tree_leaves(function(*tree_map_only(torch.Tensor, mode.from_tensor, args)))
        outputs = function(*args)
        for i, (real, fake) in enumerate(zip(tree_leaves(outputs), fakes, strict=True)):
            got, expected = ((t.shape, t.dtype, t.stride()) for t in (fake, real))
            assert got == expected, f"output {i} of {function}: the fake one is {got}, the real one {expected}"
        self.names.add(function._opname)
        return outputs


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_fake_outputs_are_like_real_ones(name, dtype):
    """Forward and backward; torch.compile allocates what the fake ones say."""
    trains = name not in ("decode_attention", "few_rows_linear")
    leaves = []

    def to(t):
        leaves.append(t.to(dtype).requires_grad_(trains))
        return leaves[-1]

    # attention may run on another library, which has no op of ours
    with use_backend("torch" if name == "attention" else None), FakeBesideReal() as mode:
        y = CALLS[name](to)
        if trains:
            torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    assert mode.names and any(op.endswith("_backward") for op in mode.names) == trains
