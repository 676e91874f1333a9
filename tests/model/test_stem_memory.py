"""Proves that the stems keep half of what torch would keep, with the same outputs, gradients and running statistics.

Run: pytest tests/model/test_stem_memory.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from prismer.stems import ExpertStem, normalise_low_level
from tests.ops.live_bytes import kept_bytes


class PlainStem(ExpertStem):
    """The definition: convolution, batch norm, ReLU, each torch's own."""

    def forward(self, label, rows, features):
        x = normalise_low_level(label, self.project.weight.dtype)
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=True)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.project(x)


def draw(dtype):
    stem = ExpertStem("depth", 32, 16, 48)
    for norm in stem.norms:
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias)
    stem = stem.to(dtype).train()
    plain = copy.deepcopy(stem)
    plain.__class__ = PlainStem
    return stem, plain, torch.randint(0, 256, (3, 1, 48, 48), dtype=torch.uint8)


def run(stem, label):
    return stem(label, None, torch.zeros(1, 64))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_training_stem_is_convolutions_norms_and_relus(dtype):
    stem, plain, label = draw(dtype)
    for _ in range(2):
        y, expected = run(stem, label), run(plain, label)
        dy = torch.randn(y.shape).to(dtype)
        y.backward(dy)
        expected.backward(dy)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y, expected, **tolerance)
    for (name, a), b in zip(stem.named_parameters(), plain.parameters(), strict=True):
        error = (a.grad.float() - b.grad.float()).norm() / b.grad.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), name
    for (name, a), b in zip(stem.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_graph_keeps_half_of_the_bytes(dtype):
    """It holds the outputs of the convolutions, but not those of norms and ReLUs."""
    stem, plain, label = draw(dtype)
    ours, theirs = (kept_bytes(lambda model=model: run(model, label)) for model in (stem, plain))
    assert ours < 0.65 * theirs


def test_stems_in_evaluation_and_frozen_stems_agree_with_torch():
    stem, plain, label = draw(torch.float32)
    for model in (stem, plain):
        model.eval()
    torch.testing.assert_close(stem(label, None, None), plain(label, None, None))
    for model in (stem, plain):
        model.train().requires_grad_(False)
    torch.testing.assert_close(stem(label, None, None), plain(label, None, None))
    for (name, a), b in zip(stem.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_convolution_with_a_hook_is_called():
    stem, plain, label = draw(torch.float32)
    called = []
    stem.project.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(run(stem, label), run(plain, label))
    assert called == [True]


def test_a_second_derivative_is_refused():
    stem, _, label = draw(torch.float32)
    y = stem(label, None, None)
    (gradient,) = torch.autograd.grad(y.square().sum(), stem.norms[0].weight, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
