"""Proves that inference wastes nothing: the decoder's FLOPs at BASE are the minimum with caches, a token costs a fixed
number of operators and one host synchronisation, and one compiled program serves all steps of a caption, all images and
all steps of training. Run: pytest tests/model/test_inference_work.py"""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from prismer.batch import Batch, ImageBatch, TextBatch
from prismer.config import preset, prismer_tiny
from prismer.costs.counting import CostCounter
from prismer.freezing import freeze
from prismer.generation import BeamSearch, beam_search, read_prompts
from prismer.kernels.dispatch import Op, as_if_watched, use_backend
from prismer.kernels.launch import counted
from prismer.model import Prismer
from prismer.ranking import AnswerTrie, rank_answers
from prismer.stems import normalise_rgb
from prismer.text import TextDecoder
from tests.model.test_generation import CONFIG, PLAIN, build_decoder, draw_context, draw_prompts

# operators at BASE: 12 layers and the extra one
MOST_PER_TOKEN = 217


@pytest.fixture
def compiled():
    """A compiler that refuses graph breaks and counts how often it had to compile."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    yield counter, lambda function: torch.compile(function, fullgraph=True, backend=counter)
    torch._dynamo.reset()


def begin(decoder, context, groups, *, beams=3, max_new_tokens=7, read_out="last"):
    cross = decoder.project_context(context)
    prompts = read_prompts(decoder, cross, groups, read_out, max_new_tokens)
    options = dict(beams=beams, max_new_tokens=max_new_tokens, min_new_tokens=2, length_penalty=1.0, classic=True)
    search = BeamSearch(decoder, **options)
    memory = search.remember(cross, prompts)
    return search, memory, search.start(memory)


@pytest.fixture
def base():
    """BASE's decoder and the tokens of one 480 px image, without data: an operator that needs data raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = TextDecoder(preset("base")).eval()
        yield decoder, torch.empty(1, 964, 768)


def test_flops_of_a_caption(base):
    """Three beams, 4 -> 20 tokens, none recomputed; every step costs the same."""
    decoder, context = base
    with torch.inference_mode(), CostCounter() as counter:
        search, memory, state = begin(decoder, context, [[[0, 5, 6, 7]]], max_new_tokens=16)
        once = counter.flops
        search(memory, search(memory, state))
    step = (counter.flops - once) / 2
    # by hand: per token and layer 4 D^2 of self-attention, 2 of cross, 2 of the adaptor, 8 of the MLP, then the head
    D, L, V = 768, 12, 50265
    per_token = 2 * D * D * (L * 16 + 12 + 1) + 2 * D * V
    attention = 4 * D * (L * 964 + (L + 1) * (4 + 16))
    assert step == pytest.approx(3 * (per_token + attention), rel=0.01)
    assert once + 15 * step == pytest.approx(44e9, rel=0.1)


@pytest.mark.parametrize(("answers", "most"), ((16, 48e9), (128, 167e9)))
def test_flops_of_ranking(base, answers, most):
    """A question of 14 tokens, and answers of 3 tokens that share no prefix."""
    decoder, context = base
    trie = AnswerTrie([[10 + 2 * i, 11 + 2 * i, 2] for i in range(answers)], 2)
    with CostCounter() as counter:
        rank_answers(decoder, context, [[list(range(100, 114))]], trie)
    # 27.3 GF project the image's keys and values; with far less for the rest, answers would be left out
    assert 27.3e9 + (most - 27.3e9) * 0.6 < counter.flops < most


def test_every_step_issues_the_same_number_of_operators():
    """With as many layers as BASE."""
    decoder = TextDecoder(dataclasses.replace(CONFIG, text_depth=12)).eval()
    counts = []
    with torch.inference_mode():
        search, memory, state = begin(decoder, torch.randn(1, 5, 24), [[[0, 5]]])
        for _ in range(6):
            with CostCounter() as counter:
                state = search(memory, state)
            counts.append(counter.calls)
    print(counts, counter.issued)
    assert len(set(counts)) == 1 and 13 * 12 < counts[0] <= MOST_PER_TOKEN


@pytest.mark.parametrize(("ours", "limit"), ((True, 117), (False, 40)), ids=("every-op-on-triton", "vendors-first"))
def test_a_token_launches_few_kernels_of_triton(ours, limit, monkeypatch):
    """Outside a recorded graph; products and norms are a vendor's where those come first, as on a GPU."""
    if not ours:
        choose = Op.choose
        monkeypatch.setattr(
            Op, "choose", lambda self, *args, **options: "torch" if self.vendor else choose(self, *args, **options)
        )
    with torch.device("meta"), torch.inference_mode():
        decoder = TextDecoder(preset("base")).bfloat16().eval()
        context = torch.empty(1, 964, 768, dtype=torch.bfloat16)
        search, memory, state = begin(decoder, context, [[[0, 5, 6, 7]]], max_new_tokens=16)
        with use_backend("triton"), as_if_watched(False), counted() as launches:
            search(memory, state)
    own = {kernel: n for kernel, n in launches.items() if not kernel.startswith("attention.")}
    print(own)
    # one for each layer of self-attention
    assert sum(n for kernel, n in own.items() if kernel.startswith("decode_attention")) == 13
    assert sum(own.values()) < limit


@pytest.mark.parametrize("end_bias", (-30.0, 2.5))
def test_a_step_waits_for_the_device_once(end_bias, count_calls):
    """It asks whether all prompts are done; nothing else waits for the device."""
    decoder, context, groups = build_decoder(0, end_bias=end_bias), draw_context(2), draw_prompts([[4], [6]])
    with count_calls() as calls:
        beam_search(decoder, context, groups, **PLAIN)
    steps = len(calls["prismer::decode_attention"]) // (CONFIG.text_depth + 1)
    assert steps == PLAIN["max_new_tokens"] - 1 if end_bias < 0 else steps > 1
    stopped = steps < PLAIN["max_new_tokens"] - 1
    # the operators that wait for the device
    waits = {name: len(calls[f"aten::{name}"]) for name in ("is_nonzero", "item", "_local_scalar_dense", "nonzero")}
    assert waits == {"is_nonzero": steps + stopped, "item": 0, "_local_scalar_dense": 0, "nonzero": 0}


def test_a_step_needs_no_data():
    """On tensors without data, reading a value raises; a step reads none, and all shapes stay."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        decoder = TextDecoder(CONFIG).eval()
        search, memory, first = begin(decoder, torch.empty(2, 5, 24), [[[0, 5, 6]], [[0]]])
        second = search(memory, search(memory, first))
    for name, before, after in zip(first._fields, first, second, strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype, name


def test_empty_cache_slots_are_finite(poisoned_memory):
    """torch's attention multiplies slots that no beam has written yet by zero."""
    ours = beam_search(build_decoder(2), draw_context(2), draw_prompts([[4], [6]]), **PLAIN)
    assert torch.isfinite(ours.scores).all()


def test_one_program_for_all_steps(compiled):
    counter, compile_ = compiled
    decoder, context, groups = build_decoder(3), draw_context(2), draw_prompts([[4], [6]])
    with torch.inference_mode():
        search, memory, state = begin(decoder, context, groups)
        step = compile_(search)
        for _ in range(6):
            state = step(memory, state)
        ours = search.best(memory.prompts, state)
    expected = beam_search(decoder, context, groups, **PLAIN)
    assert counter.frame_count == 1
    assert ours.tokens == expected.tokens
    torch.testing.assert_close(ours.scores, expected.scores)


def tiny():
    config = prismer_tiny(
        experts=("depth", "normal", "obj_detection"),
        image_size=32,
        label_size=32,
        vision_width=32,
        vision_heads=2,
        vision_depth=1,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=4,
        text_width=32,
        text_depth=1,
        text_mlp_width=48,
        vocab_size=40,
    )
    torch.manual_seed(0)
    return Prismer(config)


def draw_images(config, number=2):
    images = ImageBatch.without_labels(
        torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8), config.experts, config.label_size
    )
    images.labels = {name: torch.randint(0, 256, x.shape, dtype=torch.uint8) for name, x in images.labels.items()}
    return images


def test_maps_are_channels_last():
    """Then convolutions need no copy, and the tokens (B, N, D) are a view."""
    model = tiny().eval()
    images = draw_images(model.config)
    rgb = normalise_rgb(images.rgb, torch.float32)
    assert rgb.is_contiguous(memory_format=torch.channels_last)
    for expert in model.config.experts:
        maps = model.encoder.stems[expert](images.labels[expert], images.rows.get(expert), images.features)
        assert maps.flatten(2).mT.is_contiguous(), expert
    assert model.encoder.stems["rgb"](rgb).flatten(2).mT.is_contiguous()


def test_one_program_for_all_images(compiled):
    counter, compile_ = compiled
    model = tiny().eval()
    encode = compile_(model.encoder)
    with torch.inference_mode():
        outputs = [(encode(images), model.encoder(images)) for images in (draw_images(model.config) for _ in range(3))]
    assert counter.frame_count == 1
    for ours, eager in outputs:
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "lengths",
    [pytest.param((9,), id="fixed", marks=pytest.mark.long), pytest.param((9, 14, 6, 11, 17), id="varying")],
)
def test_training_never_recompiles(compiled, lengths):
    """Twenty steps with the losses of the eager model; a text's length becomes a variable once."""
    counter, compile_ = compiled
    model = tiny().train()
    freeze(model, "freeze_lang_vision")
    loss_of = compile_(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(20):
        ids = torch.randint(3, 40, (2, 1, lengths[step % len(lengths)]))
        texts = TextBatch(ids=ids, labels=ids.clone(), weights=torch.ones(2, 1))
        batch = Batch(images=draw_images(model.config), texts=texts, keys=[], meta=[])
        loss = loss_of(batch)
        if step % 10 == 9:
            torch.testing.assert_close(loss, model(batch), rtol=1e-4, atol=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == min(len(lengths), 2)
