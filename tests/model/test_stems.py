"""Proves what happens before and around the stems: pixels are normalised by the formula to the bit, constants reach a
device once, and the resize of positions has a deterministic form. Run: pytest tests/model/test_stems.py
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prismer import stems
from prismer.stems import CLIP_MEAN, CLIP_STD, normalise_low_level, normalise_rgb, resize_positions


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("planes", (1, 3))
def test_low_level_labels_are_normalised_by_the_formula(planes, dtype):
    label = torch.randint(3, 250, (4, planes, 9, 9), dtype=torch.uint8)
    # a constant map
    label[0] = 7
    before = label.clone()
    x = label.float() / 255
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    found = normalise_low_level(label, dtype)
    assert torch.equal(found, (2 * (x - low) / (high - low + 1e-6) - 1).to(dtype))
    assert torch.equal(label, before) and found.is_contiguous(memory_format=torch.channels_last)
    assert (found[0] == -1).all()


def test_rgb_is_normalised_by_the_formula_and_left_alone():
    rgb = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(normalise_rgb(rgb, torch.float32), (rgb.float() / 255 - mean) / std)
    # also one that is stored as the op computes
    stored = rgb.float().to(memory_format=torch.channels_last)
    before = stored.clone()
    normalise_rgb(stored, torch.float32)
    assert torch.equal(stored, before)


def test_the_constants_reach_a_device_once(monkeypatch):
    """A copy from the host would make it wait for a GPU, and a CUDA graph cannot capture it."""
    monkeypatch.setattr(stems, "_constants", {})
    rgb = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with torch.inference_mode():
        normalise_rgb(rgb, torch.float32)
    made = stems._constants[rgb.device]
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a constant was copied again"))
    normalise_rgb(rgb, torch.float32)
    assert stems._constants[rgb.device] is made and not any(t.is_inference() for t in made)


def test_a_constant_of_a_trace_does_not_stay(monkeypatch):
    monkeypatch.setattr(stems, "_constants", {})
    with FakeTensorMode():
        normalise_rgb(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.float32)
    assert not stems._constants
    assert type(normalise_rgb(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.float32)) is torch.Tensor
    # nor does a lasting one enter a trace
    with FakeTensorMode():
        normalise_rgb(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.float32)


@pytest.mark.parametrize("grids", ((8, 4), (14, 30), (3, 7)), ids=str)
def test_the_deterministic_resize_is_the_resize(grids):
    side, grid = grids
    table = torch.randn(side * side, 6, requires_grad=True)
    dy = torch.randn(grid * grid, 6)
    expected = resize_positions(table, grid)
    (gradient,) = torch.autograd.grad(expected, table, dy)
    torch.use_deterministic_algorithms(True)
    try:
        found = resize_positions(table, grid)
    finally:
        torch.use_deterministic_algorithms(False)
    names = set()
    nodes = [found.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert not any("Bicubic" in name for name in names), "torch refuses its gradient on a GPU"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, table, dy)[0], gradient, rtol=1e-5, atol=1e-5)
