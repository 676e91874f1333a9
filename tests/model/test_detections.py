"""Proves that the decoder reads detections as text by their definition: in training, captions and ranking, exported,
recorded, in int8, saved and loaded; and that without expert text the model is what it was.

Run: pytest tests/model/test_detections.py
"""

import copy
import dataclasses
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from prismer import capture
from prismer.batch import COLUMN, FACT_VALUES, PART, ROW, Batch, Detections, ImageBatch, TextBatch
from prismer.config import prismer_base, prismer_tiny
from prismer.costs.fake_step import FakeTrainer, blank_batch
from prismer.costs.tuned_calls import record_calls
from prismer.experts import TEXT_EXPERTS
from prismer.freezing import FREEZE_MODES, freeze
from prismer.generation import BeamSearch, beam_search, read_prompts
from prismer.kernels.dispatch import as_if_watched
from prismer.model import Prismer
from prismer.quantise import quantise
from prismer.ranking import AnswerTrie, rank_answers
from prismer.text import TextDecoder
from prismer.tokenizer import Tokenizer
from prismer.weights.load_report import Misfit
from prismer.weights.published import save_published
from tests.model.graph_stand_in import install, recordings_of
from tests.model.plain_inference import plain_generate, plain_rank
from tests.model.teacher_forcing import plain_text_losses
from tests.model.test_generation import CONFIG, PLAIN, build_decoder, draw_context, draw_prompts
from tests.model.test_ranking import ANSWERS, END

# the first four of five context tokens are the image's
TEXT = CONFIG.replace(expert_text=TEXT_EXPERTS, num_detections=3, image_size=32)
S = TEXT.num_detection_tokens
# real tokens of the detections of each image: as many as fit, some, none
LENGTHS = (S, 4, 0, 7)
OFFSETS = [0, *accumulate(FACT_VALUES)]
MATRICES = ("facts.weight", "before.weight", "project.weight", "look.weight")
PARTS = (*MATRICES, "norm.weight", "norm.bias", "project.bias")
TOKENIZER = Tokenizer.train([" Yes No Red Dark red Stop cat dog", "What is it? Which word?"] * 3, 280)


def draw_detections(config=TEXT, lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = Detections.none(len(lengths), config.num_detection_tokens, config.pad_id)
    for b, length in enumerate(lengths):
        found.ids[b, :length] = torch.randint(3, config.vocab_size, (length,), generator=draw)
        for column, values in enumerate(FACT_VALUES):
            found.facts[b, :length, column] = torch.randint(0, values, (length,), generator=draw)
    return found


def draw_texts(images, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, CONFIG.vocab_size, (images, 2, 6), generator=draw)
    ids[..., 0] = CONFIG.bos_id
    ids[0, 0, 4:] = CONFIG.pad_id
    labels = torch.where(ids.eq(CONFIG.pad_id), -100, ids)
    # eighths, because the decoder takes weights in fp32
    weights = torch.randint(1, 9, (images, 2), generator=draw).double() / 8
    return TextBatch(ids=ids, labels=labels, weights=weights)


def build(seed=0, **options):
    return build_decoder(seed, config=TEXT, **options)


class PlainContext:
    """Image tokens and detections by the definition, image by image: token by token, without padding or a mask."""

    def __init__(self, decoder, context, detections):
        self.images = []
        for image, ids, facts in zip(context, detections.ids.tolist(), detections.facts.tolist(), strict=True):
            before = [None, *ids]
            tokens = [self.token(decoder, image, *one) for one in zip(ids, before, facts, strict=False) if one[0] != 1]
            self.images.append(torch.cat([image, *(token[None] for token in tokens)])[None])

    @staticmethod
    def token(decoder, image, word, before, facts):
        part, table = decoder.detections, decoder.embeddings.word.weight
        x = table[word]
        if facts[PART] and before is not None:
            x = x + part.before.weight @ table[before]
        for offset, value in zip(OFFSETS, facts, strict=False):
            x = x + part.facts.weight[offset + value]
        x = F.layer_norm(x, x.shape, part.norm.weight, part.norm.bias, 1e-5)
        # the quarter of a 2 x 2 grid in which the cell of the 8 x 8 grid lies
        patch = image[facts[ROW] // 4 * 2 + facts[COLUMN] // 4]
        return part.project.weight @ x + part.project.bias + part.look.weight @ patch

    def __getitem__(self, images):
        return self.images[images.start]


def plain_losses(decoder, texts, context, detections):
    plain = PlainContext(decoder, context, detections)
    rows = []
    for b in range(len(texts.ids)):
        one = TextBatch(ids=texts.ids[b : b + 1], labels=texts.labels[b : b + 1], weights=texts.weights[b : b + 1])
        rows.append(plain_text_losses(decoder, one, plain[b : b + 1]))
    return torch.cat(rows)


def test_the_training_loss_and_all_gradients_are_those_of_the_definition():
    decoder = build().requires_grad_(True)
    context, texts, found = draw_context(4).requires_grad_(), draw_texts(4), draw_detections()
    assert {name for name, _ in decoder.detections.named_parameters()} == set(PARTS)
    results = []
    for loss in (
        decoder(texts, context, found),
        (texts.weights * plain_losses(decoder, texts, context, found)).mean(),
    ):
        names = dict(decoder.named_parameters())
        gradients = torch.autograd.grad(loss, [context, *names.values()])
        results.append({"loss": loss.detach(), **dict(zip(["context", *names], gradients, strict=True))})
    for name, ours in results[0].items():
        torch.testing.assert_close(ours, results[1][name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for part in PARTS:
        assert results[0][f"detections.{part}"].abs().max() > 1e-4, part


@torch.no_grad()
def test_padding_changes_no_bit_and_neighbours_change_nothing():
    decoder = build()
    context, texts, found = draw_context(4), draw_texts(4), draw_detections()
    loss = decoder(texts, context, found)
    noise = torch.randint(0, 2, found.facts.shape, dtype=torch.uint8)
    padded = found.ids.eq(TEXT.pad_id)
    other = Detections(found.ids, torch.where(padded[..., None], noise, found.facts))
    assert not torch.equal(other.facts, found.facts)
    assert torch.equal(decoder(texts, context, other), loss)

    parts = []
    for b in range(4):
        one = slice(b, b + 1)
        alone = TextBatch(ids=texts.ids[one], labels=texts.labels[one], weights=texts.weights[one])
        parts.append(decoder(alone, context[one], Detections(found.ids[one], found.facts[one])))
    torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-12, atol=0)


@torch.no_grad()
def test_each_fact_and_each_word_counts():
    """Every value of every column is an embedding of its own."""
    decoder, context, texts = build(), draw_context(1), draw_texts(1)
    losses = []
    for column, values in enumerate(FACT_VALUES):
        for value in range(1, values):
            found = draw_detections(lengths=(2,))
            found.facts.zero_()
            found.facts[0, 0, column] = value
            losses.append(float(decoder(texts, context, found)))
    for word in range(3, 9):
        found = draw_detections(lengths=(2,))
        found.facts.zero_()
        found.ids[0, 1] = word
        losses.append(float(decoder(texts, context, found)))
    ordered = sorted(losses)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) > 1e-9


@pytest.mark.parametrize("beams, read_out", ((1, "last"), (3, "pad")))
def test_captions_with_detections_are_those_of_teacher_forcing(beams, read_out):
    options = {**PLAIN, "beams": beams, "read_out": read_out}
    for seed in range(2):
        decoder, context, found = build(seed), draw_context(4, seed), draw_detections(seed=seed)
        groups = draw_prompts([[4], [3, 6], [5], []], seed)
        ours = beam_search(decoder, context, groups, detections=found, **options)
        plain = plain_generate(decoder, PlainContext(decoder, context, found), groups, **options)
        assert ours.tokens == [tokens for tokens, _ in plain]
        expected = torch.tensor([score for _, score in plain], dtype=torch.float64)
        torch.testing.assert_close(ours.scores, expected, rtol=0, atol=1e-9)
        blind = beam_search(decoder, context, groups, detections=Detections.none(4, S, TEXT.pad_id), **options)
        assert blind.scores[:3].ne(ours.scores[:3]).all()
        torch.testing.assert_close(blind.scores[3:], ours.scores[3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", (4, None))
def test_ranking_with_detections_is_that_of_teacher_forcing(top_k):
    decoder, context, found = build(1), draw_context(4), draw_detections()
    groups, trie = draw_prompts([[5, 2], [], [7], [4]]), AnswerTrie(ANSWERS, END)
    ours = rank_answers(decoder, context, groups, trie, detections=found, top_k=top_k)
    plain = plain_rank(decoder, PlainContext(decoder, context, found), groups, ANSWERS, top_k=top_k)
    assert ours.candidates.tolist() == [candidates for _, candidates, _ in plain]
    expected = torch.tensor([scores for _, _, scores in plain], dtype=torch.float64)
    torch.testing.assert_close(ours.scores, expected, rtol=0, atol=1e-9)


def test_detections_are_read_and_projected_once_for_an_image(monkeypatch):
    decoder, calls = build(), {"read": 0, "projected": 0}
    decoder.detections.register_forward_hook(lambda *_: calls.update(read=calls["read"] + 1))
    project = type(decoder.layers[0].cross).project_context

    def counting(self, context):
        calls["projected"] += 1
        assert context.shape == (4, 5 + S, TEXT.vision_width)
        return project(self, context)

    monkeypatch.setattr(type(decoder.layers[0].cross), "project_context", counting)
    context, found, groups = draw_context(4), draw_detections(), draw_prompts([[4, 3], [5], [2], [3]])
    beam_search(decoder, context, groups, detections=found, **PLAIN)
    assert calls == {"read": 1, "projected": TEXT.text_depth}
    rank_answers(decoder, context, groups, AnswerTrie(ANSWERS, END), detections=found, max_tokens=8)
    assert calls == {"read": 2, "projected": 2 * TEXT.text_depth}


def test_searches_with_detections_are_recorded(monkeypatch):
    """A CUDA graph's stand-in replays a search on other detections than those of the recording."""
    install(monkeypatch)
    decoder, groups = build(3), draw_prompts([[3, 6], [5], [4]])
    with as_if_watched(True):
        for seed in range(3):
            context, found = draw_context(3, seed), draw_detections(lengths=(2, S, 5)[seed:] + (1, 0)[:seed], seed=seed)
            ours = beam_search(decoder, context, groups, detections=found, **PLAIN)
            with capture.eager():
                expected = beam_search(decoder, context, groups, detections=found, **PLAIN)
            assert ours.tokens == expected.tokens
            torch.testing.assert_close(ours.scores, expected.scores)
    assert len(recordings_of(decoder)) == 1 and recordings_of(decoder)[0]._graph.replays


# whole models


def small(**changes):
    sizes = dict(
        experts=("depth",),
        image_size=32,
        label_size=32,
        vision_width=16,
        vision_heads=2,
        vision_depth=1,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=4,
        text_width=32,
        text_depth=1,
        text_mlp_width=48,
        vocab_size=TOKENIZER.vocab_size,
        num_detections=3,
    )
    return prismer_tiny(**{**sizes, **changes})


def build_model(tokenizer=TOKENIZER, **changes):
    torch.manual_seed(0)
    model = Prismer(small(**changes), tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model.eval()


def draw_batch(config, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (2, 3, 32, 32), generator=draw, dtype=torch.uint8)
    images = ImageBatch.without_labels(rgb, config.experts, config.label_size)
    images.detections = draw_detections(config.replace(expert_text=TEXT_EXPERTS), (4, 9), seed)
    ids = torch.randint(3, config.vocab_size, (2, 1, 6), generator=draw)
    return Batch(images, TextBatch(ids=ids, labels=ids.clone(), weights=torch.ones(2, 1)), [], [])


def test_without_expert_text_the_model_is_what_it_was():
    """The same tensors from the same seed but for cross-attention; and a batch's detections are not looked at."""
    torch.manual_seed(0)
    without = Prismer(small())
    torch.manual_seed(0)
    with_text = Prismer(small(expert_text=("ocr_detection",)))
    own, more = without.state_dict(), with_text.state_dict()
    assert set(more) - set(own) == {f"decoder.detections.{part}" for part in PARTS}
    copying = {f"decoder.layers.0.cross.{name}.weight" for name in ("query", "key", "value", "output")}
    assert {key for key, tensor in own.items() if not torch.equal(more[key], tensor)} == copying
    batch = draw_batch(without.config)
    loss = without.eval()(batch)
    batch.images.detections = None
    assert torch.equal(without(batch), loss)


@pytest.mark.parametrize("width", (32, 48))
@torch.no_grad()
def test_a_new_decoder_hands_on_words_and_finds_the_next_part_of_a_name(width):
    torch.manual_seed(0)
    decoder = TextDecoder(small(expert_text=TEXT_EXPERTS, vision_width=width))
    cross, part = decoder.layers[0].cross, decoder.detections
    torch.testing.assert_close(cross.output.weight @ cross.value.weight @ part.project.weight, torch.eye(32))
    word, after, other = torch.randn(3, 32)
    keys = [
        cross.key.weight @ part.project.weight @ (x + part.before.weight @ before)
        for x, before in ((after, word), (other, after), (word, other), (word, torch.zeros(32)))
    ]
    found = [float(cross.query.weight @ word @ key) for key in keys]
    assert found[0] > max(found[1:]) + 10
    assert part.facts.weight.std() < 0.3 * decoder.embeddings.word.weight.std()


@pytest.mark.parametrize("mode", FREEZE_MODES)
def test_the_new_parts_train_in_every_mode(mode):
    model = build_model(expert_text=TEXT_EXPERTS)
    freeze(model, mode)
    model.train()(draw_batch(model.config)).backward()
    for part in PARTS:
        assert model.decoder.get_parameter(f"detections.{part}").grad.abs().max() > 0, part


def test_recomputing_blocks_changes_no_gradient():
    model, plain = (build_model(expert_text=TEXT_EXPERTS).train() for _ in range(2))
    model.set_gradient_checkpointing(True)
    model(draw_batch(model.config)).backward()
    plain(draw_batch(model.config)).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_asked_in_words_reads_detections():
    model = build_model(expert_text=TEXT_EXPERTS)
    images = draw_batch(model.config).images
    blind = dataclasses.replace(images, detections=images.blank(model.config.pad_id).detections)
    assert blind.detections.ids.eq(model.config.pad_id).all() and blind.detections.ids.shape == (2, 9)
    names = ["cat", "dog", "stop"]
    for asked in (
        lambda images: [a.score for a in model.answer(images, ["Which word?"] * 2)],
        lambda images: [a.score for a in model.answer(images, ["Which word?"] * 2, names)],
        lambda images: [a.score for a in model.classify(images, names)],
    ):
        assert all(a != b for a, b in zip(asked(images), asked(blind), strict=True))
        assert asked(images) == pytest.approx([asked(dataclasses.replace(images))[0], asked(images)[1]])
    assert len(model.caption(images)) == 2
    images.detections = None
    with pytest.raises(ValueError, match="detections of obj_detection, ocr_detection are missing"):
        model.caption(images)
    images.detections = Detections.none(2, 7, model.config.pad_id)
    with pytest.raises(ValueError, match=r"are \(2, 7\) tokens, this model reads \(2, 9\)"):
        model(Batch(images, draw_batch(model.config).texts, [], []))


def test_int8_towers_read_detections():
    model = build_model(expert_text=TEXT_EXPERTS)
    int8, images = quantise(copy.deepcopy(model)), draw_batch(model.config).images
    for ask in (lambda m: m.answer(images, ["Which word?"] * 2, ["cat", "stop"]),):
        for ours, exact in zip(ask(int8), ask(model), strict=True):
            assert dict(ours.ranked) == pytest.approx(dict(exact.ranked), abs=0.5)
    assert int8.decoder.detections.project.weight.dtype == torch.float32


@torch.no_grad()
def test_a_model_with_detections_is_exported_whole():
    model = build_model(expert_text=TEXT_EXPERTS, experts=())
    exported = torch.export.export(model, (draw_batch(model.config),)).module()
    other = draw_batch(model.config, seed=1)
    torch.testing.assert_close(exported(other), model(other), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_of_beam_search_with_detections_is_exported():
    def begin(seed):
        decoder = build_decoder(3, config=TEXT.replace(text_depth=1))
        cross = decoder.project_context(draw_context(4, seed), draw_detections(seed=seed))
        prompts = read_prompts(decoder, cross, draw_prompts([[4], [6], [3], [5]], seed), "last", 5)
        options = dict(beams=2, max_new_tokens=5, min_new_tokens=2, length_penalty=1.0, classic=True)
        search = BeamSearch(decoder, **options)
        memory = search.remember(cross, prompts)
        return search, memory, search.start(memory)

    search, *given = begin(0)
    exported = torch.export.export(search, tuple(given)).module()
    search, memory, state = begin(1)
    own, expected = tree_map(torch.Tensor.clone, memory), state
    for _ in range(3):
        state, expected = exported(own, state), search(memory, expected)
        torch.testing.assert_close(state.sums, expected.sums)
        assert torch.equal(state.tokens, expected.tokens)


def test_a_saved_model_has_its_detections(tmp_path):
    model = build_model(expert_text=("ocr_detection",))
    model.save_pretrained(tmp_path / "model")
    again = Prismer.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(draw_batch(model.config)), model(draw_batch(model.config)))
    assert "detections of ocr_detection as text" in (tmp_path / "model" / "README.md").read_text()


def test_expert_text_is_added_to_a_saved_model_and_taken_away(tmp_path):
    model, reports = build_model(), []
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(Misfit, match="decoder.detections.facts.weight"):
        Prismer.from_pretrained(tmp_path / "model" / "model.safetensors", config=small(expert_text=TEXT_EXPERTS))
    before = torch.random.get_rng_state()
    first, second = (
        Prismer.from_pretrained(tmp_path / "model", expert_text=list(TEXT_EXPERTS), on_report=reports.append)
        for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.config == small(expert_text=TEXT_EXPERTS)
    for key, tensor in model.state_dict().items():
        assert torch.equal(first.state_dict()[key], tensor), key
    for part in PARTS:
        own = first.decoder.get_parameter(f"detections.{part}")
        assert torch.equal(own, second.decoder.get_parameter(f"detections.{part}"))
        assert own.eq(1 if part == "norm.weight" else 0).all() == (part not in MATRICES)
    assert set(reports[0].new) == {f"decoder.detections.{part}" for part in PARTS}
    assert reports[0].loaded == len(model.state_dict()) and not reports[0].plain
    assert "\nnew  decoder.detections.facts.weight  " in str(reports[0])

    first.save_pretrained(tmp_path / "more")
    fewer = Prismer.from_pretrained(tmp_path / "more", expert_text=("obj_detection",))
    assert fewer.state_dict().keys() == first.state_dict().keys()
    back = Prismer.from_pretrained(tmp_path / "more", expert_text=())
    assert back.config == model.config and back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(draw_batch(model.config)), model(draw_batch(model.config)))


def test_a_published_checkpoint_gets_expert_text(tmp_path):
    model = build_model(tokenizer=None)
    save_published(model, tmp_path / "pytorch_model.bin")
    loaded = Prismer.from_pretrained(
        tmp_path / "pytorch_model.bin", config=model.config, expert_text=("obj_detection",)
    )
    assert torch.equal(loaded.decoder.head_weight, model.decoder.head_weight)
    assert loaded(draw_batch(model.config)).isfinite()
    with pytest.raises(ValueError, match="no place for the parts that read obj_detection as text"):
        save_published(loaded, tmp_path / "other.bin")


def test_parameters_and_flops_are_counted():
    """BASE gains 36 rows of facts, a norm and three matrices; the plan's fake step runs on detections."""
    with torch.device("meta"):
        plain, more = TextDecoder(prismer_base()), TextDecoder(prismer_base(expert_text=TEXT_EXPERTS))
    count = [sum(p.numel() for p in decoder.parameters()) for decoder in (plain, more)]
    assert count[1] - count[0] == 36 * 768 + 2 * 768 + 3 * 768 * 768 + 768
    config = small(expert_text=TEXT_EXPERTS)
    batch = blank_batch(config, 2, ((1, 6),))
    assert batch.images.detections.ids.ne(config.pad_id).all()
    steps = [FakeTrainer(c, "freeze_lang_vision", "fp32").step(2, ((1, 6),)) for c in (small(), config)]
    assert steps[1].batch - steps[0].batch == 2 * 9 * (8 + len(FACT_VALUES))
    assert steps[1].kept > steps[0].kept
    calls = record_calls(config, 1, torch.device("cpu"))
    # keys of attention over image tokens and detections, with a mask
    assert any(op == "attention" and shape[4] & 2 and shape[2] > 16 for op, _, _, shape in calls)
