"""Proves that ops which are torch's own operators in an eager call on a CPU give the same numbers.

Run: pytest tests/ops/test_on_host.py
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismer.kernels import dispatch, linear, matmul
from prismer.kernels import mlp as mlp_op
from prismer.kernels.attention import attention
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp

pytestmark = pytest.mark.cpu

D, E = 12, 20


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


def op_layer_norm():
    x, weight, bias = draw(5, D), draw(D), draw(D)
    return (lambda: layer_norm(x, weight, bias)), (x, weight, bias)


def op_add_layer_norm():
    x, residual, weight, bias = draw(5, D), draw(5, D), draw(D), draw(D)
    return (lambda: torch.cat(add_layer_norm(x, residual, weight, bias))), (x, residual, weight, bias)


def op_linears():
    x, layers = draw(5, D), [(draw(E, D), draw(E)), (draw(E, D), None)]
    return (lambda: torch.cat(linears(x, layers))), (x, *(t for layer in layers for t in layer if t is not None))


def op_mlp():
    x, fc, fc_bias, proj, proj_bias = draw(5, D), draw(E, D), draw(E), draw(D, E).detach(), draw(D)
    return (lambda: mlp(x, fc, fc_bias, proj, proj_bias, activation="gelu")), (x, fc, fc_bias, proj_bias)


def op_attention():
    q, k, v = draw(2, 3, 4, 8), draw(2, 3, 6, 8), draw(2, 3, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    return (lambda: attention(q, k, v, key_mask=mask, scale=0.7)), (q, k, v)


OPS = (op_layer_norm, op_add_layer_norm, op_linears, op_mlp, op_attention)


@pytest.mark.parametrize("op", OPS, ids=lambda f: f.__name__)
def test_torchs_operators_give_the_numbers_of_the_definition(op):
    call, leaves = op()
    ours = call()
    dy = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, leaves, dy)
    with dispatch.use_backend("reference"):
        reference = call()
        expected = torch.autograd.grad(reference, leaves, dy)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("op", OPS[:4], ids=lambda f: f.__name__)
def test_a_watcher_sees_the_registered_op(op):
    """Compilers and counters watch."""
    call, _ = op()
    with Names() as mode:
        call()
    name = op.__name__.removeprefix("op_").removeprefix("add_")
    assert f"prismer::{name}" in mode.names


def test_on_host_is_an_eager_call_that_nothing_watches():
    x = torch.randn(3)
    assert dispatch.on_host(x) and dispatch.on_host(torch.nn.Parameter(x))
    assert not dispatch.on_host(x.to("meta"))
    with dispatch.use_backend("torch"):
        assert not dispatch.on_host(x)
    with Names():
        assert not dispatch.on_host(x)
    seen = []
    torch.func.grad(lambda t: seen.append(dispatch.on_host(t)) or t.sum())(x)
    assert seen == [False]


@pytest.mark.parametrize("op", (op_linears, op_mlp), ids=lambda f: f.__name__)
def test_a_weight_that_zero_partitions_is_left_to_the_op(op, monkeypatch):
    """torch's own layers would save a view of it, which keeps it gathered."""
    call, (x, *_) = op()
    monkeypatch.setattr(matmul, "torch_multiplies", lambda x, outputs: True)
    routes = []
    route = dispatch.Op.route
    monkeypatch.setattr(dispatch.Op, "route", lambda *args: routes.append(route(*args)) or routes[-1])
    call()
    monkeypatch.setattr(linear, "is_partitioned", lambda weight: True)
    monkeypatch.setattr(mlp_op, "is_partitioned", lambda weight: True)
    call()
    assert routes == ["host", "op"]
    weight = torch.randn(3)
    assert not dispatch.is_partitioned(weight)
    weight.ds_id = 1  # DeepSpeed's mark
    assert dispatch.is_partitioned(weight)


def test_a_compiled_call_is_the_registered_op():
    call, leaves = op_linears()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(call, backend=backend, fullgraph=True)()
    assert any("prismer.linears" in str(node.target) for node in graphs[0].graph.nodes)


def test_an_op_without_a_gradient_raises_in_a_direct_call():
    """A direct call does not pass the dispatcher, which would raise too."""
    x = torch.randn(4, 6, requires_grad=True)
    with dispatch.use_backend("layer_norm:torch"):
        y = layer_norm(x.to(torch.bfloat16), None, None)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)
