"""Proves that resamplers of transformers, flamingo-pytorch and open_flamingo give the same numbers on the fused ops, forward
and every gradient, in fewer than half the operators and three quarters of the saved bytes, and when they are kept.

Run: pytest tests/ops/test_patch_resamplers.py -s   (-s shows the counts)
"""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prismer.kernels.patch import apply_to

D, LATENTS = 48, 6
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")

# families: a tiny resampler, and inputs for it


def flamingo_module(package):
    if package == "flamingo_pytorch":
        return pytest.importorskip(
            "flamingo_pytorch.flamingo_pytorch", reason="pip install --no-deps flamingo-pytorch einops-exts"
        )
    # its own pins (torch 2.0.1) are those of 2023; the code runs on this torch
    pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo einops-exts")
    import open_flamingo.src.helpers

    return open_flamingo.src.helpers


def flamingo_pytorch(depth=2, width=D, heads=4, dim_head=8, latents=LATENTS):
    return flamingo_module("flamingo_pytorch").PerceiverResampler(
        dim=width, depth=depth, dim_head=dim_head, heads=heads, num_latents=latents, num_media_embeds=4
    )


def open_flamingo(depth=2, width=D, heads=4, dim_head=8, latents=LATENTS, media=None, frames=None):
    return flamingo_module("open_flamingo").PerceiverResampler(
        dim=width, depth=depth, dim_head=dim_head, heads=heads, num_latents=latents, max_num_media=media,
        max_num_frames=frames,
    )  # fmt: skip


def idefics(depth=2, width=D, heads=4, dim_head=8, latents=LATENTS, qk=False):
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        vision_config=dict(embed_dim=width), perceiver_config=dict(qk_layer_norms_perceiver=qk, use_resampler=True)
    )
    return IdeficsPerceiverResampler(config, width, depth, heads, dim_head, latents)


def idefics2(depth=2, width=D, heads=4, dim_head=8, latents=LATENTS, keys=2, attn="sdpa", act="silu"):
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(
        hidden_size=width, resampler_depth=depth, resampler_n_heads=heads, resampler_head_dim=dim_head,
        resampler_n_latents=latents, num_key_value_heads=keys, hidden_act=act,
    )  # fmt: skip
    config._attn_implementation = attn
    return Idefics2PerceiverResampler(config)


def masked(shape):
    mask = torch.ones(shape[:2], dtype=torch.int64)
    mask[0, 5:] = 0  # padding of one sample
    mask[1, 0] = 0
    return [mask]


def no_mask(shape):
    return [torch.ones(shape[:2], dtype=torch.int64)]


def nothing(shape):
    return []


CASES = {
    # name: builder, its options, shape of the inputs without the width, what else the forward takes
    "flamingo-pytorch": (flamingo_pytorch, {}, (2, 3, 13), nothing),
    "flamingo-pytorch-3d": (flamingo_pytorch, dict(depth=1), (2, 13), nothing),
    "flamingo-pytorch-wide-heads": (flamingo_pytorch, dict(heads=3, dim_head=24), (1, 1, 7), nothing),
    "open-flamingo": (open_flamingo, {}, (2, 3, 2, 7), nothing),
    "open-flamingo-times": (open_flamingo, dict(media=4, frames=5), (2, 3, 2, 7), nothing),
    "idefics": (idefics, {}, (3, 17), nothing),
    "idefics-qk-norms": (idefics, dict(qk=True), (3, 17), nothing),
    "idefics2": (idefics2, {}, (3, 17), no_mask),
    "idefics2-masked": (idefics2, {}, (3, 17), masked),
    "idefics2-one-key-head": (idefics2, dict(keys=1, attn="eager", act="gelu"), (2, 9), masked),
    "idefics2-all-key-heads": (idefics2, dict(keys=4, depth=3), (2, 9), masked),
}


def large_parameters(module):
    """So large that a forgotten norm, scale or bias shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = p.dim() == 1
            p.copy_(noise * 0.3 + (name.endswith("weight")) if norm else noise * 0.2)
            if "latents" in name or "emb" in name:
                p.copy_(noise)
    return module


def make(case):
    build, options, shape, more = CASES[case]
    module = large_parameters(build(**options))
    x = torch.randn(*shape, module.latents.shape[1]) * 2 + 0.5
    return module, x, more(shape)


def step(module, x, more, dy=None):
    """The output, then gradients of the inputs and of all parameters, by name."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x, *more)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad.clone() for n, p in module.named_parameters()}}


def assert_equal(ours, plain, forward=1e-5, gradient=1e-4):
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape
        error = (ours[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= (forward if name == "y" else gradient), f"{name}: relative error {error:.2e}"
        assert name == "y" or expected.abs().max() > 1e-3, f"{name} hardly has a gradient: the test is blind to it"


@pytest.mark.parametrize("case", CASES)
def test_resampler(case):
    module, x, more = make(case)
    plain = step(module, x, more)
    report = apply_to(module, "resampler", strict=True)
    assert report.replaced == [""]
    assert_equal(step(module, x, more), plain)
    report.undo()
    again = step(module, x, more)
    assert all(torch.equal(again[name], t) for name, t in plain.items())


@pytest.mark.parametrize("case", [case for case in CASES if "3d" not in case and "all" not in case])
def test_resampler_in_bf16(case, assert_no_worse):
    module, x, more = make(case)
    module, x = module.bfloat16(), x.bfloat16()
    # transformers' RMS norm computes in fp32 at most, so that its float64 is that
    exact = step(copy.deepcopy(module).double(), x.double(), more)
    dy = torch.randn(exact["y"].shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = step(copy.deepcopy(module).double(), x.double(), more, dy.double())
    plain = step(module, x, more, dy)
    apply_to(module, "resampler", strict=True)
    for name, ours in step(module, x, more, dy).items():
        assert_no_worse(name, ours, plain[name], exact[name], factor=2.0 if name == "y" else 3.0)


@pytest.mark.parametrize("case", ("flamingo-pytorch", "open-flamingo-times", "idefics-qk-norms", "idefics2-masked"))
def test_three_steps_of_training(case):
    module, x, more = make(case)
    losses = {}
    for name, model in (("plain", copy.deepcopy(module)), ("fused", module)):
        if name == "fused":
            apply_to(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses[name] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x, *more) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["plain"][-1] < losses["plain"][0]
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-5)


# what is saved: operators and memory


class Counting(TorchDispatchMode):
    """Counts the operators that do something."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name.removeprefix("aten::") not in NO_LAUNCH:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def training_step(module, x, more):
    """Operators of forward and backward, and bytes kept between them, each storage once, parameters left out."""
    module.zero_grad()
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)
        return t

    with Counting() as counting, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x, *more)
        total = sum(n for n, _ in saved.values())
        y.backward(torch.ones_like(y))
    return counting.counts, total


SIZES = {
    # case: builder's options, shape of the inputs without the width; a quarter of the width and depth of real ones
    "flamingo-pytorch": (dict(depth=2, width=256, heads=8, dim_head=64, latents=64), (1, 1, 256)),
    "open-flamingo": (dict(depth=2, width=256, heads=8, dim_head=64, latents=64), (1, 1, 1, 256)),
    "idefics": (dict(depth=2, width=320, heads=16, dim_head=96, latents=64), (1, 257)),
    "idefics-qk-norms": (dict(depth=2, width=320, heads=16, dim_head=96, latents=64, qk=True), (1, 257)),
    "idefics2": (dict(depth=2, width=512, heads=16, dim_head=96, latents=64, keys=4), (1, 1225)),
    "idefics2-masked": (dict(depth=2, width=512, heads=16, dim_head=96, latents=64, keys=4), (2, 1225)),
}


@pytest.mark.parametrize("trained", (False, True), ids=("frozen-inputs", "trained-inputs"))
@pytest.mark.parametrize("case", SIZES)
def test_operators_and_saved_bytes(case, trained):
    build, options, _, more = CASES[case]
    sizes, shape = SIZES[case]
    module = build(**(options | sizes))
    x = torch.randn(*shape, module.latents.shape[1], requires_grad=trained)
    plain, plain_bytes = training_step(module, x, more(shape))
    apply_to(module, "resampler", strict=True)
    fused, fused_bytes = training_step(module, x, more(shape))
    print(
        f"\n{case}: {fused.total()} operators of {plain.total()}, "
        f"{fused_bytes / 1e6:.2f} MB kept of {plain_bytes / 1e6:.2f}, {1 - fused_bytes / plain_bytes:.0%} less"
    )
    assert fused.total() <= plain.total() / 2
    assert fused_bytes <= 0.75 * plain_bytes
