"""Proves that outputs and gradients of a training stem of BASE's size are as close to float64 as those of plain torch.

In plain torch, too, a ReLU whose input is within a rounding of zero may flip, which changes a whole gradient by 1e-3.
Therefore the float64 gradients use the ReLUs' signs of the stem under test, and rounding errors alone remain.
Run: pytest tests/model/test_stem_gradients.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from prismer import batch_norm
from prismer.kernels.label_map import label_map_reference
from prismer.stems import ExpertStem, normalise_low_level

B, SIDE, WIDTH, PATCH = 2, 224, 768, 16
# four layers, each rounded after its convolution and after its norm; gradients go through them twice
FLOOR = 8 * torch.finfo(torch.float32).eps


def smooth_maps(channels, g):
    """Low-level labels: a few blobs."""
    coarse = torch.rand(B, channels, 7, 7, generator=g)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1).mul(255).byte()


def noise(channels, g):
    return torch.randint(0, 256, (B, channels, SIDE, SIDE), generator=g, dtype=torch.uint8)


def objects(channels, g):
    """Ids: a few rectangles on a background of 255."""
    ids = torch.full((B, 1, SIDE, SIDE), 255, dtype=torch.uint8)
    for i in range(4):
        top, left = torch.randint(0, SIDE - 60, (2,), generator=g).tolist()
        height, width = torch.randint(8, 120, (2,), generator=g).tolist()
        ids[..., top : top + height, left : left + width] = i
    return ids


def draw(expert, make_label, seed):
    """A stem in training mode, and label, rows and features."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    stem = ExpertStem(expert, WIDTH, PATCH, SIDE).train()
    label = make_label(stem.convs[0].in_channels, g) if not stem.is_ids else make_label(1, g)
    features = F.normalize(torch.randn(12, 64, generator=g), dim=1).requires_grad_()
    rows = torch.zeros(B, 256, dtype=torch.long)
    rows[:, :4] = torch.randint(1, 12, (B, 4), generator=g)
    if make_label is noise:
        rows = torch.randint(0, 12, (B, 256), generator=g)
    return stem, label, rows, features


def plain(stem, label, rows, features, signs=None):
    """The definition in torch's own ops, and the signs of its ReLUs; `signs`, if given, replaces them."""
    dtype = stem.project.weight.dtype
    if stem.is_ids:
        x = label_map_reference(label[:, 0], rows, features.to(dtype), stem.size).contiguous()
    else:
        x = normalise_low_level(label, dtype).contiguous()
        x = F.interpolate(x, size=(stem.size, stem.size), mode="bilinear", align_corners=True)
    own_signs = []
    for i, (conv, norm) in enumerate(zip(stem.convs, stem.norms, strict=True)):
        x = F.batch_norm(conv(x), None, None, norm.weight, norm.bias, True, eps=norm.eps)
        own_signs.append(x > 0 if signs is None else signs[i])
        x = x * own_signs[-1]
    return stem.project(x), own_signs


def ours(stem, label, rows, features):
    """The stem itself, and the signs of its ReLUs."""
    signs, norm_relu = [], batch_norm._norm_relu

    def watched(*arguments):
        y, *statistics = norm_relu(*arguments)
        signs.append(y > 0)
        return y, *statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_norm, "_norm_relu", watched)
        y = stem(label, rows, features)
    return y, signs


def gradients(stem, features, y, dy):
    names, parameters = zip(*stem.named_parameters(), strict=True)
    if stem.is_ids:
        names, parameters = (*names, "features"), (*parameters, features)
    return dict(zip(names, torch.autograd.grad(y, parameters, dy.to(y.dtype)), strict=True))


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def judge(run, stem, label, rows, features, dy):
    """Relative errors of the output and of each gradient."""
    double = copy.deepcopy(stem).double()
    exact, _ = plain(double, label, rows, features)
    y, signs = run(stem, label, rows, features)
    found = gradients(stem, features, y, dy)
    like, _ = plain(double, label, rows, features, signs)
    reference = gradients(double, features, like, dy)
    errors = {name: error(gradient, reference[name].double()) for name, gradient in found.items()}
    return {"output": error(y.detach(), exact.detach()), **errors}


@pytest.mark.parametrize(
    "expert, make_label, seed",
    [
        ("depth", smooth_maps, 0),
        ("normal", smooth_maps, 0),
        ("seg", objects, 0),
        ("ocr_detection", objects, 1),
        ("ocr_detection", noise, 0),
    ],
    ids=["depth", "normal", "objects", "more-objects", "ids-of-noise"],
)
def test_errors_are_those_of_plain_torch(expert, make_label, seed):
    stem, label, rows, features = draw(expert, make_label, seed)
    dy = torch.randn(B, WIDTH, SIDE // PATCH, SIDE // PATCH)
    theirs = judge(plain, copy.deepcopy(stem), label, rows, features, dy)
    found = judge(ours, stem, label, rows, features, dy)
    for name, value in found.items():
        times, floor = (2, FLOOR) if name == "output" else (3, 2 * FLOOR)
        assert value <= times * theirs[name] + floor, f"{name}: {value:.2g}, plain {theirs[name]:.2g}"


def test_without_gradients_the_statistics_are_the_same():
    stem, label, rows, features = draw("depth", smooth_maps, 0)
    frozen = copy.deepcopy(stem).requires_grad_(False)
    torch.testing.assert_close(frozen(label, rows, features), stem(label, rows, features), rtol=0, atol=0)
    for (name, a), b in zip(stem.named_buffers(), frozen.buffers(), strict=True):
        assert torch.equal(a, b), name
