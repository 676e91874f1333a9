"""Proves that CostCounter's FLOPs are exact: against closed formulas written out here, for layers, attention on every
backend, and the whole tiny model forward and backward.

Run: pytest tests/test_counting.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prismer import Prismer
from prismer.batch import Batch, ImageBatch, TextBatch
from prismer.config import preset
from prismer.costs.counting import CostCounter
from prismer.freezing import freeze
from prismer.kernels.attention import attention
from prismer.kernels.attention import native_backend as attention_native
from prismer.kernels.decode_attention import decode_attention
from prismer.kernels.dispatch import as_if_watched, use_backend
from prismer.kernels.mlp import mlp
from prismer.kernels.resampler_attention import flops as resampler_flops
from prismer.kernels.resampler_attention import resampler_attention

# rows, input width, output width
R, D, V = 6, 10, 14


def count(run) -> tuple[int, int]:
    """FLOPs of the forward pass of `run()`, and of its backward pass."""
    with CostCounter() as counter:
        out = run()
        forward = counter.flops
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.flops - forward


def draw(*shape, device="cpu", grad=False):
    return torch.randn(shape, device=device, requires_grad=grad)


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("bias", (False, True))
def test_a_linear_layer(device, bias):
    layer = nn.Linear(D, V, bias=bias, device=device)
    one = 2 * R * D * V
    assert count(lambda: layer(draw(R, D, device=device, grad=True))) == (one, 2 * one)
    # x needs no gradient
    assert count(lambda: layer(draw(R, D, device=device))) == (one, one)
    # torch handles two leading dimensions with other operators
    assert count(lambda: layer(draw(2, 3, D, device=device, grad=True))) == (one, 2 * one)
    with torch.inference_mode():
        assert count(lambda: layer(draw(2, 3, D, device=device))) == (one, 0)


def test_products_that_overwrite_and_products_with_vectors():
    a, b, c = draw(R, D), draw(D, V), draw(R, V)
    x, y = draw(D), draw(R)
    for run, flops in (
        (lambda: torch.mm(a, b, out=c), 2 * R * D * V),
        (lambda: c.addmm_(a, b), 2 * R * D * V),
        (lambda: c.expand(3, R, V).clone().baddbmm_(a.expand(3, R, D), b.expand(3, D, V)), 6 * R * D * V),
        (lambda: a @ x, 2 * R * D),
        (lambda: y.addmv(a, x), 2 * R * D),
        (lambda: x.dot(x), 2 * D),
        (lambda: torch.addr(a, y, x), 2 * R * D),
        (lambda: torch.einsum("rd,dv->rv", a, b), 2 * R * D * V),
    ):
        assert count(run) == (flops, 0)


@pytest.mark.parametrize("groups", (1, 2))
def test_a_convolution(groups):
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups), draw(2, 4, 9, 8, grad=True)
    one = 2 * 2 * (5 * 4) * 6 * (4 // groups) * 9  # images, points out, channels, filter
    assert count(lambda: layer(x)) == (one, 2 * one)
    assert count(lambda: layer(x.detach())) == (one, one)


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_the_mlp(device, frozen):
    fc_weight, fc_bias = draw(V, D, device=device), draw(V, device=device)
    proj_weight, proj_bias = draw(D, V, device=device), draw(D, device=device)
    weights = [t.requires_grad_(not frozen) for t in (fc_weight, fc_bias, proj_weight, proj_bias)]
    x, one = draw(R, D, device=device, grad=True), 2 * R * D * V
    # two products; the backward pass has one for each gradient, two or four in all
    assert count(lambda: mlp(x, *weights, activation="quick_gelu")) == (2 * one, (2 if frozen else 4) * one)
    with as_if_watched(False):
        assert device == "meta" or count(lambda: mlp(x, *weights, activation="quick_gelu")) == (
            2 * one,
            (2 if frozen else 4) * one,
        )


@pytest.mark.parametrize("backend", ("native", "sdpa", "torch", "triton", "reference"))
def test_attention_on_every_backend(backend):
    B, H, N, S, K = 2, 3, 4, 5, 32
    q, k, v = (draw(B, H, n, K, grad=True) for n in (N, S, S))
    one = 2 * B * H * N * S * K
    with use_backend(backend):
        forward, backward = count(lambda: attention(q, k, v))
    assert forward == 2 * one
    # five products if scores are computed again, four if they were kept
    assert backward == (4 if backend == "reference" else 5) * one


def test_attention_to_keys_without_gradient():
    q, k, v = draw(1, 2, 4, 32, grad=True), draw(1, 2, 5, 32), draw(1, 2, 5, 32)
    one = 2 * 2 * 4 * 5 * 32
    with use_backend("native"):
        assert count(lambda: attention(q, k, v)) == (2 * one, 3 * one)
        assert count(lambda: attention(q.detach(), k.requires_grad_(), v)) == (2 * one, 4 * one)


@pytest.mark.parametrize("backend", ("native", "torch"))
def test_attention_without_data(backend, monkeypatch):
    """The kernel must not run on fake CPU tensors, which have no data."""
    for name in ("forward", "backward"):
        monkeypatch.delattr(attention_native, name)
    with FakeTensorMode(), use_backend(backend):
        q, k, v = (draw(2, 3, n, 32, grad=True) for n in (4, 5, 5))
        assert count(lambda: attention(q, k, v)) == (2 * 2 * 2 * 3 * 4 * 5 * 32, 5 * 2 * 2 * 3 * 4 * 5 * 32)


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_resampler_attention(device, backend):
    """Triton's kernels count as the same op on torch's operators."""
    B, M, L, width, H = 1, 4, 40, 32, 2
    names = ("query", "x_hat", "norm_weight", "norm_bias", "in_proj_weight", "in_proj_bias")
    shapes = (B, M, width), (B, L, width), (width,), (width,), (3 * width, width), (3 * width,)
    tensors = [draw(*shape, device=device, grad=True) for shape in shapes]
    with use_backend(backend):
        forward, backward = count(lambda: resampler_attention(*tensors, H, order="absorbed"))
    size = ("absorbed", B, M, L, width, H)
    expected = resampler_flops(*size)
    # the op's formula leaves out products with vectors: here the queries times the norm's bias
    assert forward == expected + 2 * H * M * width
    exact = resampler_flops(*size, names) - expected
    assert exact <= backward < 1.03 * exact


def decode_inputs():
    R, H, Q, K, S, M, A = 2, 3, 4, 8, 20, 12, 3
    ancestors = torch.arange(R * Q * A).view(R, Q, A) % M
    ancestors[0, 1, 1:] = -1
    tensors = draw(R, H, Q, K), draw(R, H, S, K), draw(R, H, S, K), torch.ones(R, S, dtype=torch.bool)
    return *tensors, draw(R, H, M, K), draw(R, H, M, K), ancestors


def test_decode_attention():
    inputs = decode_inputs()
    R, H, Q, K = inputs[0].shape
    S, M, listed = 20, 12, 2 * 4 * 3 - 2
    with use_backend("native"), torch.inference_mode(), CostCounter() as counter:
        decode_attention(*inputs)
    assert counter.flops == 4 * H * K * (R * Q * S + listed) and counter.calls == 1
    assert [row[0] for row in counter.rows()] == ["prismer_native::decode_attention"]
    # with few slots torch multiplies by all of them
    with use_backend("torch"), torch.inference_mode(), CostCounter() as counter:
        decode_attention(*inputs)
    assert counter.flops == 4 * H * K * R * Q * (S + M) and counter.calls == 1


def whole_batch(config) -> Batch:
    side = config.image_size
    ids = torch.full((2, 3, 8), 5)
    rgb = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    images = ImageBatch.without_labels(rgb, config.experts, config.label_size)
    return Batch(images, TextBatch(ids, ids.clone(), torch.ones(2, 3)), [], [])


class Products(torch.overrides.TorchFunctionMode):
    """Counts FLOPs of torch's public functions instead of operators, with one more product for each gradient."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm):
            one = 2 * out.numel() * args[0].shape[-1]
        elif func in (F.conv2d, torch.conv2d):
            one = 2 * out.numel() * args[1][0].numel()
        else:
            return out
        self.forward += one
        self.backward += one * (args[0].requires_grad + args[1].requires_grad)
        return out


@pytest.mark.parametrize("mode", ("freeze_lang_vision", "freeze_vision", "none"))
def test_the_whole_model(mode):
    """Operators and functions agree, as do real, unwatched and fake tensors; frozen parts add no gradients."""
    model = Prismer(preset("tiny")).train()
    batch = whole_batch(model.config)
    freeze(model, mode)
    # a convolution with a hook is a function of its own; others are inside the op of their norm and ReLU
    convs = [module for module in model.encoder.stems.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(lambda *_: None) for conv in convs]
    with use_backend("reference"):
        with Products() as products:
            model(batch)
        for hook in hooks:
            hook.remove()
        assert count(lambda: model(batch)) == (products.forward, products.backward)
    seen = count(lambda: model(batch))
    with as_if_watched(False):
        assert count(lambda: model(batch)) == seen
    with FakeTensorMode():
        fake = Prismer(model.config).train()
        freeze(fake, mode)
        forward, backward = count(lambda: fake(whole_batch(model.config)))
    # without data all positions count as targets, even the last of each text; the loss forms its gradients at once
    head = 2 * 6 * model.config.text_width * model.config.vocab_size
    assert (forward, backward) == (seen[0] + 3 * head, seen[1])


def test_calls_and_bytes_of_simple_operators():
    x = draw(4, 8)
    with CostCounter() as counter:
        y = torch.empty(4, 8)
        y.copy_(x)
        y.view(8, 4).add_(1.0)
        F.embedding(torch.tensor([1, 3, 3]), x)
    # tensor, copy_, add_ and embedding count; the allocation and the view launch nothing
    rows = {name: row for name, *row in counter.rows()}
    size = 4 * 8 * 4
    assert rows["aten::copy_"] == [1, 0, 2 * size]
    assert rows["aten::add_"] == [1, 0, 2 * size]
    # three rows read and written, and three indices; not the whole table
    assert rows["aten::embedding"] == [1, 0, 2 * 3 * 32 + 3 * 8]
    assert "aten::empty" not in rows and "aten::view" not in rows
    assert counter.calls == sum(row[0] for row in rows.values())


def test_a_registered_op_is_one_call():
    x, weight, bias = draw(R, D), draw(V, D), draw(V)
    with CostCounter() as counter, torch.no_grad():
        mlp(x, weight, bias, draw(D, V), draw(D), activation="gelu")
    assert counter.issued["prismer::mlp"] == 1 and "aten::mm" not in counter.issued
    inner = {name: calls for name, calls, *_ in counter.rows()}
    found = sum(inner.get(name, 0) for name in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"))
    assert "prismer::mlp" not in inner and found == 2
