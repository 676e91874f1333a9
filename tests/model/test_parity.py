"""Proves that the parts compute what independent implementations compute on the same random weights: the encoder and
open_clip's tower, the decoder and transformers' RoBERTa, the resampler and a composition of nn.MultiheadAttention.

Values and gradients are compared in fp32; in bf16 the error is at most twice that of plain PyTorch. How the other
libraries' models get our weights is in twins.py. Run: pytest tests/model/test_parity.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prismer.batch import ImageBatch, TextBatch
from prismer.config import ALL_EXPERTS
from prismer.kernels.modules import PerceiverResampler
from prismer.model import Prismer
from prismer.stems import CLIP_MEAN, CLIP_STD
from prismer.vision import VisionEncoder
from prismer.weights.names import from_clip
from prismer.weights.published import to_ours
from tests.model.plain_published import PlainPrismer, ResamplerBlock, randomise
from tests.model.published_files import (
    draw_ids,
    inputs,
    small,
)
from tests.model.teacher_forcing import logits_of, text_losses
from tests.model.twins import (
    DECODERS,
    TOWERS,
    assert_close,
    build_decoders,
    build_towers,
    encode_without_adaptors,
    ids_of,
    open_clip_tokens,
    plain_adaptor,
    theirs_logits,
)


def assert_gradients_close(pairs, relative=1e-4):
    """pairs: name -> (ours, theirs); each against the largest gradient of all, and its own if that is not tiny."""
    largest = max(theirs.abs().max().item() for _, theirs in pairs.values())
    for name, (ours, theirs) in pairs.items():
        scale = max(theirs.abs().max().item(), 1e-3 * largest)
        error = (ours - theirs).abs().max().item() / scale
        assert error <= relative, f"gradient of {name} is off by {error:.2g} of its largest entry"


@pytest.mark.parametrize("name", TOWERS)
def test_encoder_gives_open_clips_tokens_and_gradients(name):
    """Every patch token, and the gradients of all inherited tensors and of the pixels."""
    ours, theirs = build_towers(name)
    theirs.requires_grad_(True)
    side = TOWERS[name]["image_size"]
    pixels = [torch.randn(2, 3, side, side).requires_grad_(True)]
    pixels.append(pixels[0].detach().clone().requires_grad_(True))
    tokens = encode_without_adaptors(ours, pixels[0])
    expected = open_clip_tokens(theirs, pixels[1])
    assert_close("tokens", tokens, expected)
    dy = torch.randn_like(expected)
    tokens.backward(dy)
    expected.backward(dy)
    own = dict(ours.named_parameters())
    pairs = {"pixels": (pixels[0].grad, pixels[1].grad)}
    for key, parameter in theirs.named_parameters(prefix="visual"):
        name = from_clip(key)
        if name is not None:
            grad = parameter.grad[1:] if name == "encoder.positional_embedding" else parameter.grad
            pairs[name] = own[name].grad, grad
    assert len(pairs) == 6 + 12 * len(ours.encoder.blocks) + 1
    assert_gradients_close(pairs)


@pytest.mark.parametrize("name", ["B16", "odd"])
def test_encoder_in_bf16(name, assert_no_worse):
    ours, theirs = build_towers(name, torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    side = TOWERS[name]["image_size"]
    pixels = torch.randn(2, 3, side, side).bfloat16()
    with torch.no_grad():
        assert_no_worse(
            "tokens",
            encode_without_adaptors(ours, pixels),
            open_clip_tokens(theirs, pixels),
            lambda: open_clip_tokens(exact, pixels.double()),
        )


@pytest.mark.parametrize("cross", [False, True], ids=["plain", "cross"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_gives_robertas_logits(name, cross):
    """At every position, including those of pads."""
    ours, theirs = build_decoders(name, cross=cross)
    ids, context = ids_of(ours.config), torch.randn(2, 9, ours.config.vision_width)
    logits = theirs_logits(theirs, ids, context if cross else None)
    assert_close("logits", logits_of(ours, ids, context), logits)


@pytest.mark.parametrize("name", ["huge", "odd"])
def test_decoder_gives_robertas_gradients(name):
    """The gradients of the training loss, of every tensor and of the image tokens."""
    ours, theirs = build_decoders(name)
    config = ours.config
    # the hooks of theirs read our adaptors: a second copy of ours has gradients of its own
    twin = copy.deepcopy(ours)
    for layer, our_layer in zip(theirs.roberta.encoder.layer, twin.layers, strict=False):
        layer.crossattention._forward_hooks.clear()
        layer.crossattention.register_forward_hook(plain_adaptor(our_layer.adaptor))
    ids = ids_of(config)
    targets = F.pad(torch.where(ids.eq(1), -100, ids)[:, 1:], (0, 1), value=-100)
    contexts = [torch.randn(2, 9, config.vision_width).requires_grad_(True)]
    contexts.append(contexts[0].detach().clone().requires_grad_(True))
    for model in (ours, twin, theirs):
        model.requires_grad_(True)
    labels = torch.where(ids.eq(1), -100, ids)[:, None]
    ours(TextBatch(ids=ids[:, None], labels=labels, weights=torch.full((2, 1), 2.0)), contexts[0]).backward()
    logits = theirs_logits(theirs, ids, contexts[1]).flatten(0, 1)
    F.cross_entropy(logits, targets.flatten(), label_smoothing=0.1, reduction="sum").backward()
    grads = {"context": (contexts[0].grad, contexts[1].grad)}
    their_grads = {key: p.grad for key, p in theirs.named_parameters()}
    twins = dict(twin.named_parameters())
    for key, parameter in ours.named_parameters():
        if ".adaptor." in key:
            grads[key] = parameter.grad, twins[key].grad
    layers = theirs.roberta.encoder.layer
    for i, layer in enumerate(ours.layers):
        for part in ("query", "key", "value"):
            theirs_linear = getattr(layers[i].crossattention.self, part)
            ours_linear = getattr(layer.cross, part)
            grads[f"{i}.cross.{part}.weight"] = ours_linear.weight.grad, theirs_linear.weight.grad
            ours_linear = getattr(layer.attention, part)
            theirs_linear = getattr(layers[i].attention.self, part)
            grads[f"{i}.attention.{part}.weight"] = (ours_linear.weight.grad, theirs_linear.weight.grad)
        grads[f"{i}.mlp.output.bias"] = layer.mlp.output.bias.grad, layers[i].output.dense.bias.grad
        grads[f"{i}.mlp.norm.weight"] = (layer.mlp.norm.weight.grad, layers[i].output.LayerNorm.weight.grad)
    last = layers[-1].intermediate.dense
    grads["extra"] = ours.extra.mlp.intermediate.weight.grad, last.weight.grad
    for ours_name, their_name in (
        ("word", "word_embeddings"),
        ("position", "position_embeddings"),
        ("token_type", "token_type_embeddings"),
    ):
        ours_table = getattr(ours.embeddings, ours_name).weight.grad
        grads[ours_name] = ours_table, their_grads[f"roberta.embeddings.{their_name}.weight"]
    grads["head"] = ours.head.dense.weight.grad, their_grads["lm_head.dense.weight"]
    grads["head.bias"] = ours.head.bias.grad, their_grads["lm_head.bias"]
    assert_gradients_close(grads)


@pytest.mark.parametrize("name", ["base", "odd"])
def test_decoder_in_bf16(name, assert_no_worse):
    ours, theirs = build_decoders(name, torch.bfloat16)
    _, exact = build_decoders(name)
    exact.load_state_dict({key: tensor.double() for key, tensor in theirs.state_dict().items()})
    exact = exact.double()
    for layer, our_layer in zip(exact.roberta.encoder.layer, ours.layers, strict=False):
        layer.crossattention._forward_hooks.clear()
        layer.crossattention.register_forward_hook(plain_adaptor(copy.deepcopy(our_layer.adaptor).double()))
    ids, context = ids_of(ours.config), torch.randn(2, 9, ours.config.vision_width).bfloat16()
    with torch.no_grad():
        assert_no_worse(
            "logits",
            logits_of(ours, ids, context),
            theirs_logits(theirs, ids, context),
            lambda: theirs_logits(exact, ids, context.double()),
        )


def test_training_loss_is_smoothed():
    """Label smoothing 0.1, summed over a text's tokens; question, pads and `<s>` are no targets."""
    ours, theirs = build_decoders("huge")
    ids, context = ids_of(ours.config), torch.randn(2, 9, ours.config.vision_width)
    labels = torch.where(ids.eq(1), -100, ids)
    labels[:, :3] = -100
    texts = TextBatch(ids=ids[:, None], labels=labels[:, None], weights=torch.ones(2, 1))
    losses = text_losses(ours, texts, context)
    log_probs = theirs_logits(theirs, ids, context).log_softmax(-1)
    for b in range(2):
        loss = 0.0
        for t in range(1, ids.shape[1]):
            if labels[b, t] != -100:
                loss -= 0.9 * log_probs[b, t - 1, labels[b, t]] + 0.1 * log_probs[b, t - 1].mean()
        assert_close("loss", losses[b, 0], loss)


class PlainResampler(nn.Module):
    def __init__(self, width, depth, heads, latents):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, width))
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads) for _ in range(depth))

    def forward(self, x):
        z = self.latents.expand(len(x), -1, -1)
        for block in self.blocks:
            z = block(z, x)
        return z


@pytest.mark.parametrize(
    "width, depth, heads, latents, inputs",
    [(768, 2, 8, 64, 392), (1024, 1, 8, 64, 256), (48, 4, 3, 5, 17), (32, 3, 8, 1, 1)],
    ids=["base", "large", "odd", "one"],
)
def test_resampler_is_a_composition_of_torchs_attention(width, depth, heads, latents, inputs, assert_no_worse):
    """Values and all gradients in fp32; values in bf16."""
    plain = randomise(PlainResampler(width, depth, heads, latents)).requires_grad_(True)
    ours = PerceiverResampler(width, depth, heads, latents)
    ours.load_state_dict(plain.state_dict())
    xs = [torch.randn(2, inputs, width).mul(2).add(0.5).requires_grad_(True)]
    xs.append(xs[0].detach().clone().requires_grad_(True))
    found, expected = ours(xs[0]), plain(xs[1])
    assert_close("latents", found, expected)
    dy = torch.randn_like(expected)
    found.backward(dy)
    expected.backward(dy)
    grads = {"x": (xs[0].grad, xs[1].grad)}
    expected_grads = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in ours.named_parameters():
        grads[name] = p.grad, expected_grads[name]
    # of a fused (q, k, v) bias the middle third has no gradient but rounding
    for name in [name for name in grads if name.endswith("in_proj_bias")]:
        grads[name] = tuple(torch.cat([g[:width], g[2 * width :]]) for g in grads[name])
    assert_gradients_close(grads)
    with torch.no_grad():
        x = xs[0].bfloat16()
        rounded = copy.deepcopy(plain).bfloat16()
        exact = copy.deepcopy(rounded).double()
        assert_no_worse("latents in bf16", ours.bfloat16()(x), rounded(x), lambda: exact(x.double()))


@pytest.mark.parametrize("experts", [ALL_EXPERTS, ()], ids=["experts", "z"])
def test_whole_model_in_bf16(experts, assert_no_worse):
    """Our error is at most twice that of the plain model with published names."""
    plain = randomise(PlainPrismer(small(experts=experts, text_width=64, vision_width=64)))
    model = Prismer(small(experts=experts, text_width=64, vision_width=64)).eval()
    model.load_state_dict(to_ours(plain.state_dict(), "plain")[0])
    model = model.bfloat16()
    images, (rgb, labels, objects, rows) = inputs(model.config)
    ids = draw_ids(model.config)
    plain = plain.bfloat16()
    exact = copy.deepcopy(plain).double()

    def run(model, dtype):
        cast = {name: label.to(dtype) for name, label in labels.items()}
        context = model.expert_encoder(rgb.to(dtype), cast, objects, rows)
        return dict(context=context, logits=model.text_decoder(ids, context))

    with torch.no_grad():
        context = model.encode(images)
        ours = dict(context=context, logits=logits_of(model.decoder, ids, context))
        assert_no_worse("", ours, run(plain, torch.bfloat16), lambda: run(exact, torch.float64))


def test_the_encoder_does_what_the_tests_here_run_by_hand():
    """`encode_without_adaptors` gives what `VisionEncoder` gives for uint8 pixels."""
    ours, theirs = build_towers("odd")
    assert isinstance(ours.encoder, VisionEncoder)
    rgb = torch.randint(0, 256, (2, 3, 60, 60), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (rgb / 255 - mean) / std
    encode_without_adaptors(ours, pixels)
    images = ImageBatch(rgb=rgb, labels={}, rows={}, features=torch.zeros(1, 64))
    assert_close("tokens", ours.encode(images), open_clip_tokens(theirs, pixels))
