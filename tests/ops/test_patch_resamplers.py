"""Proves that resamplers of transformers, flamingo-pytorch and open_flamingo give the same numbers on fused ops,
forward and every gradient, with half the operators and three quarters of the saved bytes, and says when they are kept.

Run: pytest tests/ops/test_patch_resamplers.py -s   (-s shows the counts)
"""

import copy
import functools

import pytest
import torch
from torch import nn

from prismer.costs.counting import Counter
from prismer.kernels.patch import apply_to, is_patched

D, LATENTS = 48, 6

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
        dim=width,
        depth=depth,
        dim_head=dim_head,
        heads=heads,
        num_latents=latents,
        max_num_media=media,
        max_num_frames=frames,
    )


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
        hidden_size=width,
        resampler_depth=depth,
        resampler_n_heads=heads,
        resampler_head_dim=dim_head,
        resampler_n_latents=latents,
        num_key_value_heads=keys,
        hidden_act=act,
    )
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
        if name.endswith("k_layer_norm.bias"):
            # it adds the same to all scores of a query: both gradients are rounding
            assert max(t[name].abs().max() for t in (ours, plain)) < 1e-4 * plain["y"].abs().max()
            continue
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
    # a sharp softmax makes one draw's error a matter of luck, of the original as of ours: many are judged together
    found, exact = {"ours": [], "plain": []}, []
    for _ in range(8):
        module, x, more = make(case)
        module, x = module.bfloat16(), x.bfloat16()
        high = copy.deepcopy(module).double()
        dy = torch.randn(high(x.double(), *more).shape).bfloat16()
        # transformers' RMS norm computes in fp32 at most, which is exact enough here
        exact.append(functools.partial(step, high, x.double(), more, dy.double()))
        found["plain"].append(step(module, x, more, dy))
        apply_to(module, "resampler", strict=True)
        found["ours"].append(step(module, x, more, dy))
    pooled = lambda steps: {  # noqa: E731
        name if name == "y" else f"d {name}": torch.stack([t[name] for t in steps]) for name in steps[0]
    }
    assert_no_worse("", pooled(found["ours"]), pooled(found["plain"]), lambda: pooled([run() for run in exact]))


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

    with Counter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x, *more)
        total = sum(n for n, _ in saved.values())
        y.backward(torch.ones_like(y))
    return counter.issued, total


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


# the parts alone, and calls that the fused forward gives back


def attention_of(case):
    module, x, _ = make(case)
    attn = module.layers[0][0] if "flamingo" in case else module.blocks[0][0]
    x = x.unsqueeze(1) if "3d" in case else x.flatten(2, 3) if x.dim() == 5 else x
    return attn, x, torch.randn(*x.shape[:-2], LATENTS, x.shape[-1])


@pytest.mark.parametrize("case", ("flamingo-pytorch", "open-flamingo", "idefics", "idefics-qk-norms"))
def test_attention_alone(case):
    attn, x, latents = attention_of(case)
    plain = step(attn, x, [latents])
    apply_to(attn, "attention", strict=True)
    assert_equal(step(attn, x, [latents]), plain)


@pytest.mark.parametrize("case", ("flamingo-pytorch", "open-flamingo", "idefics"))
def test_attentions_are_patched_where_the_resampler_is_not(case):
    module, x, more = make(case)
    plain = step(module, x, more)
    report = apply_to(module, ("attention", "layer_norm"))
    assert len(report.replaced) == 2 + 3  # attentions with their norms; norms of the feed-forwards, and the last
    assert_equal(step(module, x, more), plain)


def locations(B, N, media):
    """Media tokens: one sample begins with text, one has more media tokens than media."""
    at = torch.zeros(B, N, dtype=torch.bool)
    at[0, 3] = at[0, 6] = True
    at[1, 0] = at[1, 4] = at[1, 5] = at[1, 8] = True
    return at[:, :N] if media is None else at


@pytest.mark.parametrize("located", (True, False, "cached"))
@pytest.mark.parametrize("immediate", (True, False), ids=("immediate", "all-before"))
@pytest.mark.parametrize("package", ("flamingo_pytorch", "open_flamingo"))
def test_cross_attention_to_media(package, immediate, located):
    options = {"dim_visual": 40} if package == "open_flamingo" else {}
    if located == "cached" and not options:
        pytest.skip("flamingo-pytorch has no cached media")
    if not located and options:
        pytest.skip("open_flamingo always has media locations")
    module = large_parameters(
        flamingo_module(package).MaskedCrossAttention(
            dim=D, dim_head=8, heads=4, only_attend_immediate_media=immediate, **options
        )
    )
    x = torch.randn(2, 10 if located != "cached" else 3, D)
    media = torch.randn(2, 3, 5, options.get("dim_visual", D), requires_grad=True)
    more = [media, locations(2, 10, 3) if located else None] + [True] * (located == "cached")

    def run():
        media.grad = None
        return step(module, x, more) | {"dmedia": media.grad}

    plain = run()
    apply_to(module, "attention", strict=True)
    assert_equal(run(), plain)


@pytest.mark.parametrize("case", ("flamingo-pytorch", "open-flamingo", "idefics", "idefics2"))
def test_frozen_parts_and_inference(case):
    module, x, more = make(case)
    for name, p in module.named_parameters():
        trained = "latents", "to_q", "context_layer_norm", "norm_media", "k_proj"
        p.requires_grad_(any(part in name for part in trained))
    results = []
    for patched in (False, True):
        if patched:
            apply_to(module, "resampler", strict=True)
        module.zero_grad()
        module(x, *more).square().mean().backward()
        with torch.no_grad():
            y = module(x, *more)
        results.append({"y": y} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("case", ("flamingo-pytorch", "idefics", "idefics2"))
def test_calls_that_are_given_back(case):
    module, x, more = make(case)
    # another dtype than the weights', and a batch of none, which Idefics2 does not take itself
    others = (x.bfloat16(), x[:0])[: 1 if case == "idefics2" else 2]

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            yield module(x, *more)
        for other in others:
            yield module(other, *[m[: len(other)] for m in more])

    plain = list(results())
    apply_to(module, "resampler", strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results(), plain, strict=True))


def test_idefics2_takes_keywords_and_gives_dropout_back():
    module, x, (mask,) = make("idefics2-masked")
    plain = module(context=x, attention_mask=mask)
    apply_to(module, "resampler", strict=True)
    fused = module(context=x, attention_mask=mask.bool())
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    for layer in module.layers:
        layer.self_attn.attention_dropout = 0.5
    module.train()
    torch.manual_seed(3)
    dropped = module(x, mask)
    torch.manual_seed(3)
    assert torch.equal(dropped, module.unpatched_class.forward(module, x, mask))
    module.eval()
    torch.testing.assert_close(module(x, mask), plain, rtol=1e-4, atol=1e-5)


def test_under_compile():
    module, x, more = make("open-flamingo-times")
    plain = step(module, x, more)
    apply_to(module, "resampler", strict=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = x.requires_grad_()
    module.zero_grad()
    y = compiled(x, *more)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    assert_equal({"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in module.named_parameters()}, plain)


# when a resampler is kept


class Quantised(nn.Linear):
    """Stands for a layer of bitsandbytes or peft."""


def biased(module):
    module.layers[1][0].to_q = nn.Linear(D, 32)


def quantised(module):
    module.layers[0][0].to_kv = Quantised(D, 64, bias=False)


def tanh_gelu(module):
    module.layers[0][1][2] = nn.GELU("tanh")


def longer(module):
    module.layers[0][1].append(nn.Dropout(0.1))


def other_eps(module):
    module.layers[1][0].norm_media.eps = 1e-3


def hooked(module):
    module.layers[1][0].to_out.register_forward_hook(lambda *a: None)


def mixed(module):
    module.layers[1][0].to_out.bfloat16()


def no_layers(module):
    module.layers = nn.ModuleList()


REASONS = {
    biased: "layers.1.0.to_q has a bias",
    quantised: "layers.0.0.to_kv is a Quantised",
    tanh_gelu: "layers.0.1.2 is the tanh approximation",
    longer: "layers.0.1 has 5 parts",
    other_eps: "different eps",
    hooked: "layers.1.0.to_out has hooks",
    mixed: "2 dtypes",
    no_layers: "no layers",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda f: f.__name__)
def test_kept_with_a_reason(change):
    module, _, _ = make("open-flamingo")
    change(module)
    before = {name: type(m) for name, m in module.named_modules()}
    with pytest.raises(ValueError, match=REASONS[change]):
        apply_to(module, "resampler", strict=True)
    assert {name: type(m) for name, m in module.named_modules()} == before
    report = apply_to(module, "resampler")
    assert report.replaced == [] and REASONS[change] in str(report)


def test_other_families_are_kept_with_a_reason():
    module, _, _ = make("idefics")
    module.blocks[0][1].act = nn.GELU()
    assert "blocks.0.1.act is a GELU" in str(apply_to(module, "resampler"))
    module, _, _ = make("idefics2")
    module.layers[0].mlp.up_proj = Quantised(D, 4 * D, bias=False)
    assert "layers.0.mlp.up_proj is a Quantised" in str(apply_to(module, "resampler"))
    module, _, _ = make("idefics2")
    module.layers[1].input_context_norm.variance_epsilon = 1e-3
    assert "different eps" in str(apply_to(module, "resampler"))


def test_keys_and_copies():
    module, x, more = make("idefics-qk-norms")
    keys = list(module.state_dict())
    report = apply_to(module, "resampler")
    assert list(module.state_dict()) == keys
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x, *more), module(x, *more))
    report.undo()
    assert is_patched(twin) and not is_patched(module)
