"""Proves that benchmarks/baseline.py is a fair baseline: with the same parameters it gives the same tokens, captions,
answer scores, losses and gradients as our model, so that the two differ only in their way of computing.

The weights are so large that a norm, a bias or a table shows if one side forgets it.
Run: pytest tests/test_baseline.py
"""

import dataclasses
from pathlib import Path

import pytest
import torch

import prismer
from benchmarks.baseline import Baseline, expand_images
from prismer.batch import Batch, ImageBatch
from prismer.config import PrismerConfig
from prismer.experts import EXPERTS
from prismer.freezing import FREEZE_MODES, freeze
from prismer.generation import beam_search
from prismer.inference import Candidates
from prismer.model import Prismer
from prismer.ranking import rank_answers
from prismer.texts import collate, encode_caption, encode_prompt, encode_qa, encode_question
from prismer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(prismer.__file__).parent / "assets" / "tiny")
SMALL = dict(
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    resampler_depth=2,
    resampler_heads=4,
    num_latents=8,
    text_width=24,
    text_depth=2,
    text_heads=2,
    text_mlp_width=48,
    vocab_size=TOKENIZER.vocab_size,
    dropout=0.0,
)
CONFIGS = {
    # the label grid of 4 differs from the grid of the image
    "patch16": dict(image_size=80, label_size=64, patch_size=16),
    "patch14": dict(image_size=74, label_size=56, patch_size=14, vision_activation="gelu"),
    "no-experts": dict(image_size=64, experts=()),
}
QUESTIONS = ["What is on the table?", "how many red balls", "Where?"]
ANSWERS = [
    "red",
    "red ball",
    "red cube",
    "2",
    "2 cubes",
    "20",
    "yes",
    "no",
    "on the table",
    "on the left",
    "left",
    "a ball",
]


def build(name: str = "patch16", seed: int = 0, **changes) -> Prismer:
    """A Prismer in evaluation mode in which every tensor affects the result."""
    model = Prismer(PrismerConfig(**{**SMALL, **CONFIGS[name], **changes}), TOKENIZER).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            spread = 0.2 if p.dim() < 2 or "embedding" in key else min(0.2, 1.5 * p[0].numel() ** -0.5)
            is_scale = p.dim() == 1 and key.endswith("weight")
            p.copy_(is_scale + spread * torch.randn(p.shape, generator=g))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=g))
            if key.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=g))
    return model


def draw_images(config: PrismerConfig, count: int = 3, seed: int = 1, rows_given: bool = True) -> ImageBatch:
    """Noise; id maps consist of patches, some of them background, and each image has its own rows of features."""
    g = torch.Generator().manual_seed(seed)
    labels, rows = {}, {}
    for name in config.experts:
        expert = EXPERTS[name]
        side = config.label_size if not expert.is_ids else config.label_size // 4
        map_ = torch.randint(0, 250, (count, expert.planes, side, side), generator=g, dtype=torch.uint8)
        if expert.is_ids:
            map_ = map_ % 7
            map_[map_ == 6] = 255
            map_ = map_.repeat_interleave(4, 2).repeat_interleave(4, 3)
            rows[name] = torch.randint(0, 9, (count, 256), generator=g)
        labels[name] = map_
    return ImageBatch(
        rgb=torch.randint(0, 256, (count, 3, *[config.image_size] * 2), generator=g, dtype=torch.uint8),
        labels=labels,
        rows=rows,
        features=torch.randn(9, 64, generator=g),
        instance_rows=torch.randint(0, 128, (256,), generator=g) if rows_given else None,
    )


def assert_close(name: str, ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= relative, f"{name} is off by {error:.2g} of its largest entry, allowed {relative:.2g}"


@pytest.mark.parametrize("rows_given", (True, False), ids=("rows", "default-rows"))
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encode(name, rows_given):
    model = build(name)
    images = draw_images(model.config, rows_given=rows_given)
    tokens = Baseline(model).encode(images)
    assert_close("tokens", tokens, model.encode(images))
    torch.testing.assert_close(Baseline(model).encode(expand_images(images)), tokens, rtol=0, atol=0)


# without a bonus for the end token every caption reaches the limit; with one, some end earlier
@pytest.mark.parametrize("bonus", (0.0, 3.0, 3.5))
@torch.no_grad()
def test_caption(bonus):
    model = build()
    model.decoder.head.bias[TOKENIZER.eos_id] += bonus
    images = draw_images(model.config, count=8)
    tokens, ours, _ = search_twice(model, images, min_length=8)
    assert tokens == ours
    lengths = {len(ids) for ids in tokens}
    assert lengths == {12} if not bonus else len(lengths) > 1 and min(lengths) >= 4
    assert len({tuple(ids) for ids in tokens}) > 4, "captions do not depend on the image"
    assert Baseline(model).caption(images, max_length=16) == model.caption(images, max_length=16)


@pytest.mark.parametrize("seed", (1, 2))
@torch.no_grad()
def test_search_ends_at_the_same_step(seed):
    """Three words and the end token are likely; the end token often ranks below the open beams, and must not count."""
    model = build(seed=seed)
    bias = model.decoder.head.bias
    bias[3:] -= 30
    bias[100:103] += 30
    bias[TOKENIZER.eos_id] += 0.5
    images = draw_images(model.config, count=6)
    steps = set()
    for i in range(6):
        one = dataclasses.replace(
            images,
            rgb=images.rgb[i : i + 1],
            labels={name: map_[i : i + 1] for name, map_ in images.labels.items()},
            rows={name: table[i : i + 1] for name, table in images.rows.items()},
        )
        tokens, ours, (passes, our_passes) = search_twice(model, one, min_length=6)
        assert (tokens, passes) == (ours, our_passes)
        steps.add(passes)
    assert len(steps) > 1, "all searches take the same number of steps"


def search_twice(model: Prismer, images: ImageBatch, min_length: int, max_length: int = 16):
    """The tokens that the baseline and ours generate after the prompt, and how often each ran the decoder."""
    prompt = encode_prompt(TOKENIZER, model.config.caption_prefix)
    passes = [0, 0]
    baseline = Baseline(model)
    logits = baseline.logits

    def counting(*args):
        passes[0] += 1
        return logits(*args)

    def count_ours(*_):
        passes[1] += 1

    baseline.logits = counting
    tokens = baseline._beam_search(baseline.encode(images), prompt, 3, max_length, min_length)
    hook = model.decoder.layers[0].register_forward_hook(count_ours)
    ours = beam_search(
        model.decoder,
        model.encode(images),
        [[prompt]] * len(images),
        max_new_tokens=max_length - len(prompt),
        min_new_tokens=min_length - len(prompt),
    )
    hook.remove()
    return [ids[len(prompt) :] for ids in tokens], ours.tokens, passes


@pytest.mark.parametrize("top_k", (1, 5, len(ANSWERS)))
@torch.no_grad()
def test_rank(top_k):
    """Questions of different lengths: the longest predicts from its last token, the others predict from a `<pad>`."""
    model = build()
    images = draw_images(model.config)
    chosen, scores = Baseline(model).rank(images, QUESTIONS, ANSWERS, top_k)
    groups = [[encode_question(TOKENIZER, question)] for question in QUESTIONS]
    assert len({len(group[0]) for group in groups}) == 3
    trie = Candidates.answers(TOKENIZER, ANSWERS).trie
    ours = rank_answers(model.decoder, model.encode(images), groups, trie, top_k=top_k, read_out="batch")
    assert chosen.tolist() == ours.candidates.tolist()
    assert_close("scores", scores, ours.scores)
    assert chosen.shape == (3, top_k)


@torch.no_grad()
def test_classify():
    model = build()
    images = draw_images(model.config)
    chosen, scores = Baseline(model).classify(images, ANSWERS, top_k=5)
    ours = model.classify(images, ANSWERS, top_k=5)
    for row, values, answer in zip(chosen.tolist(), scores, ours, strict=True):
        expected = dict(answer.ranked)
        assert {ANSWERS[i] for i in row} == set(expected)
        assert_close("scores", values, torch.tensor([expected[ANSWERS[i]] for i in row]))


def draw_batch(config: PrismerConfig) -> Batch:
    """A caption, and two questions with their answers, of different lengths and weights."""
    texts = [
        (*encode_caption(TOKENIZER, "a red ball on the table", "A picture of"), 1.0),
        (*encode_qa(TOKENIZER, QUESTIONS[0], "2 cubes"), 0.6),
        (*encode_qa(TOKENIZER, QUESTIONS[2], "left"), 0.3),
    ]
    return Batch(draw_images(config), collate([[text] for text in texts]), keys=["a", "b", "c"], meta=[{}] * 3)


@pytest.mark.parametrize("mode", FREEZE_MODES)
def test_loss_and_gradients(mode):
    """Runs in training mode, where batch norm uses the statistics of the batch."""
    model = build().train()
    freeze(model, mode)
    batch = draw_batch(model.config)
    results = []
    for compute in (model, Baseline(model).loss):
        loss = compute(batch)
        model.zero_grad()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (ours, our_grads), (loss, grads) = results
    assert_close("loss", loss, ours)
    largest = max(grad.abs().max().item() for grad in our_grads.values() if grad is not None)
    for name, p in model.named_parameters():
        assert (grads[name] is not None) == (our_grads[name] is not None) == p.requires_grad, name
        if p.requires_grad:
            scale = max(our_grads[name].abs().max().item(), 1e-3 * largest)
            error = (grads[name] - our_grads[name]).abs().max().item() / scale
            assert error < 1e-4, f"gradient of {name} is off by {error:.2g} of its largest entry"


def test_dropout_runs_in_training_only():
    model = build(dropout=0.3).train()
    batch, baseline = draw_batch(model.config), Baseline(model)
    with torch.no_grad():
        assert baseline.loss(batch) != baseline.loss(batch)
        model.eval()
        assert_close("loss", baseline.loss(batch), model(batch))


@torch.no_grad()
def test_autocast():
    """Products run in bf16 on fp32 weights: image tokens are bf16, and results are off by roundings only."""
    model = build()
    batch = draw_batch(model.config)
    exact = model.encode(batch.images)
    tokens = Baseline(model, torch.bfloat16).encode(batch.images)
    assert tokens.dtype == torch.bfloat16
    assert 1e-4 < ((tokens - exact).norm() / exact.norm()).item() < 0.03
    loss = Baseline(model, torch.bfloat16).loss(batch)
    assert loss.dtype == torch.float32 and loss != model(batch)
    assert_close("loss", loss, model(batch), 0.02)


def test_other_weights_and_several_texts_are_refused():
    model = build("no-experts")
    with pytest.raises(ValueError, match="bfloat16 weights"):
        Baseline(build("no-experts").bfloat16())
    batch = draw_batch(model.config)
    texts = dataclasses.replace(batch.texts, ids=batch.texts.ids.repeat(1, 2, 1))
    with pytest.raises(ValueError, match="repeat the image"):
        Baseline(model).loss(dataclasses.replace(batch, texts=texts))
