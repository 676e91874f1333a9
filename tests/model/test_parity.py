"""Proves that the parts compute what independent implementations compute on the same random weights: the encoder what
open_clip's tower does, the decoder what transformers' RoBERTa does, the resampler what a composition of
nn.MultiheadAttention does, beam search what transformers' generate does, ranking what the published procedure gives
when a transformers model carries it out. Values and gradients in fp32, and bf16 by the rule of twice plain PyTorch's
error. Run: pytest tests/model/test_parity.py

What differs between the libraries' models and Prismer, and how the tests meet it:
- open_clip's tower has a class token; its key is masked, so that patch tokens do not see it.
- Prismer's blocks have adaptors; on the vision side they are zeroed. On the text side a zeroed sub-layer is not the
  identity, since its norm comes after the residual; cross-attention and adaptor are either taken out, or put into
  transformers' model: its layers have the cross-attention, a hook applies the adaptor, written in plain torch.
- Prismer's last text layer has no cross-attention; in transformers' model of one layer more it is taken out there.
- transformers projects image tokens of the text width alone; its key and value layers are exchanged for wider ones.
- transformers' generate (seen in 5.23) numbers the positions of a RoBERTa from 0, its forward from pad_id + 1; a hook
  shifts them where they start at 0.
"""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, RobertaConfig, RobertaForCausalLM

from prismer.batch import ImageBatch, TextBatch
from prismer.config import ALL_EXPERTS, PrismerConfig
from prismer.generation import beam_search
from prismer.kernels.modules import PerceiverResampler
from prismer.model import Prismer
from prismer.ranking import AnswerTrie, rank_answers
from prismer.stems import CLIP_MEAN, CLIP_STD
from prismer.text import TextDecoder
from prismer.vision import VisionEncoder
from prismer.weights.names import from_clip, to_published
from prismer.weights.published import to_ours
from tests.model.plain_inference import plain_beam_search
from tests.model.plain_published import PlainPrismer, ResamplerBlock, randomise
from tests.model.teacher_forcing import logits_of, text_losses
from tests.model.test_backbones import encode_without_adaptors, open_clip_tokens
from tests.model.test_published_checkpoint import draw_ids, inputs, small


def assert_close(name, ours, theirs, relative=1e-5):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= relative, f"{name} is off by {error:.2g} of its largest entry, allowed {relative:.2g}"


def assert_gradients_close(pairs, relative=1e-4):
    """pairs: name -> (ours, theirs); each against the largest gradient of all, and its own if that is not tiny."""
    largest = max(theirs.abs().max().item() for _, theirs in pairs.values())
    for name, (ours, theirs) in pairs.items():
        scale = max(theirs.abs().max().item(), 1e-3 * largest)
        error = (ours - theirs).abs().max().item() / scale
        assert error <= relative, f"gradient of {name} is off by {error:.2g} of its largest entry"


# the encoder, and open_clip

TOWERS = {
    "B16": dict(patch_size=16, image_size=224, width=768, layers=2, heads=12, quick=True),
    "L14": dict(patch_size=14, image_size=112, width=1024, layers=2, heads=16, quick=True),
    "H14": dict(patch_size=14, image_size=112, width=1280, layers=2, heads=16, quick=False),
    "odd": dict(patch_size=8, image_size=60, width=96, layers=5, heads=3, quick=False),
}


def build_towers(name, dtype=torch.float32):
    """open_clip's tower, and our model with the same weights and no experts."""
    tower = dict(TOWERS[name])
    quick = tower.pop("quick")
    activation = open_clip.transformer.QuickGELU if quick else nn.GELU
    theirs = open_clip.transformer.VisionTransformer(**tower, mlp_ratio=4.0, output_dim=16, act_layer=activation)
    theirs = randomise(theirs).to(dtype)
    config = PrismerConfig(
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        vision_width=tower["width"],
        vision_depth=tower["layers"],
        vision_heads=tower["heads"],
        vision_activation="quick_gelu" if quick else "gelu",
        experts=(),
        text_width=16,
        text_depth=1,
        text_heads=2,
        text_mlp_width=16,
        vocab_size=20,
    )
    ours = Prismer(config).eval().to(dtype)
    own = ours.state_dict()
    for key, tensor in theirs.state_dict(prefix="visual.").items():
        name = from_clip(key)
        if name is not None:
            own[name].copy_(tensor[1:] if name == "encoder.positional_embedding" else tensor)
    return ours, theirs


@pytest.mark.parametrize("name", TOWERS)
def test_encoder_is_open_clip_s(name):
    """Every patch token; and the gradients of all inherited tensors and of the pixels."""
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
def test_encoder_bf16(name, assert_no_worse):
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


# the decoder, and transformers

DECODERS = {
    "base": dict(text_width=768, text_depth=2, text_heads=12, text_mlp_width=3072, vision_width=768, vocab_size=2000),
    "huge": dict(text_width=256, text_depth=3, text_heads=4, text_mlp_width=512, vision_width=320, vocab_size=300),
    "odd": dict(text_width=24, text_depth=4, text_heads=2, text_mlp_width=40, vision_width=40, vocab_size=29),
}


class NoCrossAttention(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states, None


def build_decoders(name, dtype=torch.float32, cross=True, seed=0):
    """Our decoder, and transformers' model of one layer more with the same weights, `cross` with what is new."""
    sizes = DECODERS[name]
    config = PrismerConfig(**sizes, vision_heads=8, max_positions=40, resampler_heads=8)
    ours = randomise(TextDecoder(config), seed)
    # ends come now and then, pads never: transformers counts no position for a pad that a model writes
    ours.head.bias[config.eos_id] += 1.5
    ours.head.bias[config.pad_id] -= 40.0
    depth = config.text_depth
    theirs = RobertaForCausalLM(
        RobertaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            num_hidden_layers=depth + 1,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_mlp_width,
            is_decoder=True,
            max_position_embeddings=config.max_positions,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            add_cross_attention=cross,
        )
    ).eval()
    layers = theirs.roberta.encoder.layer
    for layer, our_layer in zip(layers if cross else (), ours.layers, strict=False):
        attention = layer.crossattention
        for part in ("key", "value"):
            setattr(attention.self, part, nn.Linear(config.vision_width, config.text_width))
        attention.register_forward_hook(plain_adaptor(our_layer.adaptor))
    if cross:
        layers[-1].crossattention = NoCrossAttention()
    else:
        for layer in ours.layers:
            layer.cross.forward = lambda x, context: x
            layer.adaptor.forward = lambda x: x
    own = theirs.state_dict()
    filled = set()
    for key, tensor in ours.state_dict().items():
        if ".adaptor." in key or (".cross." in key and not cross):
            continue
        for name in to_published(f"decoder.{key}"):
            name = name.removeprefix("text_decoder.").replace("output_layer.", f"layer.{depth}.0.")
            name = name.replace(".1.self.", ".crossattention.self.").replace(".1.output.", ".crossattention.output.")
            for i in range(depth + 1):
                name = name.replace(f"layer.{i}.0.", f"layer.{i}.").replace(f"{i}.0.", f"{i}.")
                name = name.replace(f"layer.{i}.1.", f"layer.{i}.")
            own[name].copy_(tensor)
            filled.add(name)
    assert filled == set(own), set(own) ^ filled
    return ours.to(dtype), theirs.to(dtype).requires_grad_(False)


def plain_adaptor(module):
    """A hook that applies our adaptor, in plain torch, to what transformers' cross-attention gives."""
    down, up, norm = module.down, module.up, module.norm

    def hook(_, __, output):
        x = output[0]
        h = torch.relu(x @ down.weight.T + down.bias) ** 2
        return F.layer_norm(x + (h @ up.weight.T + up.bias), x.shape[-1:], norm.weight, norm.bias), output[1]

    return hook


def ids_of(config, rows=2, length=11):
    ids = torch.randint(3, config.vocab_size, (rows, length))
    ids[:, 0] = config.bos_id
    # one text ends early, one has its pads in between, as a question and its answer do
    ids[0, 7:], ids[1, 4:6] = config.pad_id, config.pad_id
    return ids


def theirs_logits(model, ids, context=None):
    return model(ids, attention_mask=ids.ne(1).long(), encoder_hidden_states=context).logits


@pytest.mark.parametrize("cross", [False, True], ids=["plain", "cross"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_roberta(name, cross):
    """Logits at every position, pads as queries included."""
    ours, theirs = build_decoders(name, cross=cross)
    ids, context = ids_of(ours.config), torch.randn(2, 9, ours.config.vision_width)
    logits = theirs_logits(theirs, ids, context if cross else None)
    assert_close("logits", logits_of(ours, ids, context), logits)


@pytest.mark.parametrize("name", ["huge", "odd"])
def test_decoder_gradients(name):
    """Of the smoothed loss, of every tensor and of the image tokens."""
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
def test_decoder_bf16(name, assert_no_worse):
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


def test_training_loss_is_the_smoothed_one():
    """Label smoothing 0.1, summed over a text's tokens, with question, pads and `<s>` as no targets (spec 1.7)."""
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


# the resampler, and nn.MultiheadAttention


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
def test_resampler_is_a_composition(width, depth, heads, latents, inputs, assert_no_worse):
    """Values and all gradients in fp32; bf16 by the rule."""
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


# the whole, and the published layout


@pytest.mark.parametrize("experts", [ALL_EXPERTS, ()], ids=["experts", "z"])
def test_whole_model_in_bf16(experts, assert_no_worse):
    """The plain model of the published key table in bf16 is off by so much; ours by no more than twice that."""
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


# beam search, and generate


class PositionsFromPad:
    """A hook before RoBERTa's embeddings: where generate starts its positions at 0, they are shifted to pad_id + 1."""

    def __init__(self, pad_id):
        self.first, self.shift = None, pad_id + 1

    def __call__(self, module, args, kwargs):
        positions = kwargs["position_ids"]
        if positions is not None:
            self.first = positions.min().item() if self.first is None else self.first
            kwargs["position_ids"] = positions + self.shift * (self.first == 0)
        return args, kwargs


def generate(model, prompts, context, *, cache, beams, max_new_tokens, min_new_tokens, length_penalty):
    """transformers' tokens without prompt and end, and its scores."""
    options = {"use_cache": False}
    hook = model.roberta.embeddings.register_forward_pre_hook(PositionsFromPad(1), with_kwargs=True)
    if cache:
        caches = (DynamicCache(config=model.config), DynamicCache(config=model.config))
        options = {"past_key_values": EncoderDecoderCache(*caches)}
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=context,
        num_beams=beams,
        do_sample=False,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        length_penalty=length_penalty,
        pad_token_id=1,
        eos_token_id=2,
        **options,
    )
    hook.remove()
    written = [row[len(prompts[0]) :].tolist() for row in out.sequences]
    return [row[: row.index(2)] if 2 in row else row for row in written], out.sequences_scores


SEARCHES = [
    dict(beams=3, length_penalty=1.0, min_new_tokens=2, max_new_tokens=8),
    dict(beams=4, length_penalty=-1.0, min_new_tokens=0, max_new_tokens=6),
    dict(beams=2, length_penalty=0.0, min_new_tokens=1, max_new_tokens=7),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"beams{s['beams']}-penalty{s['length_penalty']}")
@pytest.mark.parametrize("cache", [False, True], ids=["recomputed", "cached"])
def test_beam_search_is_generate(search, cache):
    """Modern scoring: the tokens and scores of transformers' generate on transformers' model, images in a batch."""
    lengths, seen = set(), set()
    for seed in range(4):
        ours, theirs = build_decoders("odd", torch.float64, seed=seed)
        context = torch.randn(3, 5, 40, dtype=torch.float64)
        prompts = [[0, *torch.randint(3, 29, (3,)).tolist()] for _ in range(3)]
        found = beam_search(ours, context, [[p] for p in prompts], scoring="modern", **search)
        tokens, scores = generate(theirs, prompts, context, cache=cache, **search)
        assert found.tokens == tokens
        torch.testing.assert_close(found.scores, scores.double(), rtol=1e-6, atol=1e-9)
        lengths |= {len(row) for row in tokens}
        seen |= {tuple(row) for row in tokens}
    assert len(lengths) > 1 and len(seen) > 4


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"beams{s['beams']}-penalty{s['length_penalty']}")
def test_classic_scoring_on_transformers_model(search):
    """The rule of the time, written plainly, on logits of transformers' model; it chooses otherwise than the modern."""
    differs = False
    for seed in range(4):
        ours, theirs = build_decoders("odd", torch.float64, seed=seed)
        context = torch.randn(2, 5, 40, dtype=torch.float64)
        prompts = [[0, *torch.randint(3, 29, (3,)).tolist()] for _ in range(2)]
        groups = [[p] for p in prompts]
        found = beam_search(ours, context, groups, scoring="classic", **search)
        for b, prompt in enumerate(prompts):

            def next_log_probs(tokens, prompt=prompt, image=context[b : b + 1], model=theirs):
                return theirs_logits(model, torch.tensor([prompt + tokens]), image)[0, -1].log_softmax(-1).tolist()

            tokens, score = plain_beam_search(next_log_probs, len(prompt), 2, scoring="classic", **search)
            assert found.tokens[b] == tokens
            assert found.scores[b].item() == pytest.approx(score, rel=1e-6)
        modern = beam_search(ours, context, groups, scoring="modern", **search)
        differs |= not torch.allclose(modern.scores, found.scores)
    assert differs or search["length_penalty"] == 0


# ranking, and the published procedure

ANSWERS = [[7, 2], [7, 8, 2], [5, 9, 11, 2], [5, 9, 12, 2], [22, 2], [7, 8, 8, 8, 2], [9, 5, 2], [14, 2], [14, 3, 2]]


def published_ranking(model, context, questions, k, extra_pads):
    """Step by step what the released code does (spec 5.6), on transformers' model.

    `extra_pads` = 0 is the released procedure, where only shorter questions of a batch end in pads; 1 appends a pad to
    each, so that a result does not depend on the batch.
    """
    columns = max(map(len, questions)) + extra_pads
    padded = torch.tensor([q + [1] * (columns - len(q)) for q in questions])
    first = theirs_logits(model, padded, context)[:, -1].softmax(-1)[:, [answer[0] for answer in ANSWERS]]
    results = []
    for b in range(len(questions)):
        kept = sorted(first[b].sort(descending=True, stable=True).indices[:k].tolist())
        scores = []
        for i in kept:
            whole = torch.cat([padded[b], torch.tensor(ANSWERS[i])])[None]
            logits = theirs_logits(model, whole, context[b : b + 1])[0, columns - 1 : -1]
            target = torch.tensor(ANSWERS[i])
            loss = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
            scores.append(-loss.item() / len(target))
        results.append((kept[scores.index(max(scores))], kept, scores))
    return results


@pytest.mark.parametrize("k", [3, len(ANSWERS)], ids=["top3", "all"])
@pytest.mark.parametrize("read_out", ["batch", "pad"])
def test_ranking_is_the_published_procedure(read_out, k):
    """Parity mode ("batch") in one batch, and the batch-independent mode ("pad"), also one question at a time."""
    trie = AnswerTrie(ANSWERS, 2)
    best = set()
    for seed in range(3):
        ours, theirs = build_decoders("odd", torch.float64, seed=seed)
        context = torch.randn(3, 5, 40, dtype=torch.float64)
        questions = [[0, *torch.randint(3, 29, (n,)).tolist()] for n in (3, 6, 2)]
        groups = [[q] for q in questions]
        found = rank_answers(ours, context, groups, trie, top_k=k, read_out=read_out)
        expected = published_ranking(theirs, context, questions, k, extra_pads=int(read_out == "pad"))
        assert found.best.tolist() == [chosen for chosen, _, _ in expected]
        assert found.candidates.tolist() == [kept for _, kept, _ in expected]
        scores = torch.tensor([scores for *_, scores in expected], dtype=torch.float64)
        torch.testing.assert_close(found.scores, scores, rtol=1e-6, atol=1e-9)
        best |= set(found.best.tolist())
        alone = torch.cat(
            [
                rank_answers(ours, context[b : b + 1], [[q]], trie, top_k=k, read_out=read_out).scores
                for b, q in enumerate(questions)
            ]
        )
        assert torch.allclose(alone, found.scores) == (read_out == "pad")
    assert len(best) > 1


def test_fp32_logits_choose_alike():
    """In fp32 at a real width, scores of both libraries agree to 1e-5."""
    ours, theirs = build_decoders("base")
    context = torch.randn(2, 30, 768)
    questions = [[0, 5, 9, 20], [0, 7]]
    found = rank_answers(ours, context, [[q] for q in questions], AnswerTrie(ANSWERS, 2), top_k=4, read_out="batch")
    expected = published_ranking(theirs, context, questions, 4, extra_pads=0)
    assert found.candidates.tolist() == [kept for _, kept, _ in expected]
    assert_close("scores", found.scores, torch.tensor([scores for *_, scores in expected]))


def test_encoder_alone_is_the_model_s():
    """What the tests above run by hand is what `VisionEncoder` does with uint8 pixels."""
    ours, theirs = build_towers("odd")
    assert isinstance(ours.encoder, VisionEncoder)
    rgb = torch.randint(0, 256, (2, 3, 60, 60), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = (rgb / 255 - mean) / std
    encode_without_adaptors(ours, pixels)
    images = ImageBatch(rgb=rgb, labels={}, rows={}, features=torch.zeros(1, 64))
    assert_close("tokens", ours.encode(images), open_clip_tokens(theirs, pixels))
