"""Proves that beam search with caches has the tokens and scores of a search that recomputes everything, that its rule
is that of transformers, and that it does no more work than documented. Run: pytest tests/model/test_generation.py"""

import pytest
import torch

import prismer.generation as generation
from prismer.config import PrismerConfig
from prismer.generation import beam_search
from prismer.text import TextDecoder
from tests.model.plain_inference import plain_beam_search, plain_generate

CONFIG = PrismerConfig(
    vision_width=24,
    vision_heads=4,
    resampler_heads=4,
    text_width=32,
    text_depth=2,
    text_heads=4,
    text_mlp_width=48,
    vocab_size=29,
    max_positions=40,
)
PLAIN = {"beams": 3, "max_new_tokens": 7, "min_new_tokens": 2, "length_penalty": 1.0, "scoring": "classic"}


def build_decoder(seed=0, dtype=torch.float64, end_bias=1.8, config=CONFIG):
    """Random weights so large that each matters, including biases and norms.

    Large positions and soft logits keep it from repeating one token; end tokens come often, but not always.
    """
    torch.manual_seed(seed)
    decoder = TextDecoder(config).eval().to(dtype).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        std = 0.7 if "position" in name else 0.35 if parameter.dim() == 2 else 0.25
        parameter.normal_(1.0 if "norm.weight" in name else 0.0, std)
    for parameter in decoder.head.norm.parameters():
        parameter.mul_(0.4)
    decoder.head.bias[CONFIG.eos_id] += end_bias
    return decoder


def draw_context(images, seed=0, dtype=torch.float64):
    return torch.randn(images, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_prompts(lengths, seed=0):
    """Groups of different prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def prompt(length):
        return [0] + torch.randint(3, CONFIG.vocab_size, (length - 1,), generator=generator).tolist()

    return [[prompt(length) for length in group] for group in lengths]


def compare(decoder, context, groups, atol=1e-9, **options):
    ours = beam_search(decoder, context, groups, **options)
    plain = plain_generate(decoder, context, groups, **{**PLAIN, **options})
    assert ours.tokens == [tokens for tokens, _ in plain]
    expected = torch.tensor([score for _, score in plain], dtype=torch.float64)
    torch.testing.assert_close(ours.scores.double(), expected, rtol=0, atol=atol)
    return ours


@pytest.fixture
def count(monkeypatch):
    """Counts tokens that go through the decoder and images whose keys and values are projected."""
    counts = {"tokens": 0, "images": 0}
    run, project = TextDecoder.run, TextDecoder.project_context

    def counting_run(self, ids, positions, attend, cross):
        counts["tokens"] += ids.numel()
        if isinstance(cross, torch.Tensor):
            counts["images"] += len(cross)
        return run(self, ids, positions, attend, cross)

    def counting_project(self, context, *rest):
        counts["images"] += len(context)
        return project(self, context, *rest)

    monkeypatch.setattr(TextDecoder, "run", counting_run)
    monkeypatch.setattr(TextDecoder, "project_context", counting_project)
    return counts


@pytest.mark.parametrize("scoring", ("classic", "modern"))
@pytest.mark.parametrize("length_penalty", (-1.0, 0.0, 1.0))
@pytest.mark.parametrize("beams", (1, 3, 5))
def test_beam_search_writes_what_recomputing_writes(beams, length_penalty, scoring):
    lengths = set()
    for seed, images in enumerate((1, 2, 3, 2)):
        decoder = build_decoder(seed)
        context, groups = draw_context(images, seed), draw_prompts([[4]] * images, seed)
        options = {**PLAIN, "beams": beams, "length_penalty": length_penalty, "scoring": scoring}
        lengths |= {len(tokens) for tokens in compare(decoder, context, groups, **options).tokens}
    # hypotheses end at different steps
    assert len(lengths) > 1


@pytest.mark.parametrize("end_bias", (-30.0, 0.5, 2.5, 30.0))
@pytest.mark.parametrize("min_new_tokens", (0, 1, 5))
def test_end_tokens_may_come_at_any_step(end_bias, min_new_tokens):
    """Never, now and then, or at once; they are forbidden below the lower bound."""
    decoder = build_decoder(7, end_bias=end_bias)
    options = {**PLAIN, "max_new_tokens": 5, "min_new_tokens": min_new_tokens}
    ours = compare(decoder, draw_context(3), draw_prompts([[3]] * 3), **options)
    lengths = [len(tokens) for tokens in ours.tokens]
    assert min(lengths) >= min_new_tokens
    if end_bias < -10:
        assert lengths == [5, 5, 5]
    if end_bias > 5:
        assert min(lengths) == min_new_tokens


@pytest.mark.parametrize("read_out", ("last", "pad", "batch"))
@pytest.mark.parametrize(
    "lengths", ([[3], [7], [1]], [[2, 9], [6, 4]], [[5, 1, 3], [], [8]]), ids=("G1", "G2", "ragged")
)
def test_prompts_of_different_lengths(lengths, read_out):
    decoder, groups = build_decoder(3), draw_prompts(lengths)
    options = {**PLAIN, "length_penalty": -1.0, "read_out": read_out}
    compare(decoder, draw_context(len(lengths)), groups, **options)


def test_one_generated_token():
    """The shortest search writes no cache slot."""
    options = {**PLAIN, "max_new_tokens": 1, "min_new_tokens": 0}
    compare(build_decoder(1), draw_context(2), draw_prompts([[2], [5]]), **options)


def test_a_search_in_fp32():
    decoder, context = build_decoder(2, torch.float32), draw_context(2, dtype=torch.float32)
    compare(decoder, context, draw_prompts([[4], [4]]), atol=1e-5, **PLAIN)


@pytest.mark.parametrize("beams", (1, 2))
def test_done_prompts_stay_as_they_are(beams):
    """With a penalty that favours length, better hypotheses after a prompt is done are ignored."""
    options = {**PLAIN, "beams": beams, "length_penalty": 2.0, "min_new_tokens": 1}
    ours = compare(build_decoder(0, end_bias=2.5), draw_context(8), draw_prompts([[4]] * 8), **options)
    assert len({len(tokens) for tokens in ours.tokens}) > 1


@pytest.mark.parametrize("read_out", ("last", "pad"))
def test_results_do_not_depend_on_the_batch(read_out):
    decoder, groups = build_decoder(4), draw_prompts([[3, 8], [6], [2, 2, 9]])
    context = draw_context(3)
    options = {**PLAIN, "read_out": read_out}
    together = beam_search(decoder, context, groups, **options)
    p = 0
    for b, group in enumerate(groups):
        for prompt in group:
            alone = beam_search(decoder, context[b : b + 1], [[prompt]], **options)
            assert alone.tokens == together.tokens[p : p + 1]
            torch.testing.assert_close(alone.scores, together.scores[p : p + 1], rtol=0, atol=1e-10)
            p += 1


def test_results_depend_on_the_image():
    decoder, prompts = build_decoder(5), [[[0, 5, 6]]] * 6
    generated = beam_search(decoder, draw_context(6), prompts, **PLAIN)
    assert len({tuple(tokens) for tokens in generated.tokens}) > 1


def test_nothing_is_computed_twice(count):
    """One projection per image; the prompt once; then `beams` tokens a step, except for the last step."""
    decoder, context, groups = (build_decoder(0, end_bias=-30.0), draw_context(2), draw_prompts([[4], [4]]))
    options = {**PLAIN, "max_new_tokens": 6}
    beam_search(decoder, context, groups, **options)
    assert count == {"images": 2, "tokens": 2 * (4 + 3 * 5)}
    count.update(images=0, tokens=0)
    plain_generate(decoder, context, groups, **options)
    recomputed = 2 * (4 + 3 * sum(range(5, 10)))
    assert count == {"images": 2 * (1 + 3 * 5), "tokens": recomputed}


def test_the_search_stops_when_all_prompts_are_done(count):
    """If the end token is certain, greedy search runs the prompts alone, and three beams stop early."""
    decoder, context = build_decoder(0, end_bias=60.0), draw_context(2)
    options = {**PLAIN, "min_new_tokens": 0, "max_new_tokens": 20}
    for beams, at_most in ((1, 2 * 2), (3, 2 * (2 + 3 * 4))):
        count["tokens"] = 0
        generated = beam_search(decoder, context, [[[0, 3]]] * 2, **{**options, "beams": beams})
        assert generated.tokens == [[], []] and count["tokens"] <= at_most


def test_caches_stay_in_place(monkeypatch):
    """Reordering beams changes the ancestor table alone: the keys and values of all steps are in one allocation.

    Each step lists one more slot per beam, in a table of the same shape.
    """
    seen, listed = set(), []

    def recording(q, shared_k, shared_v, mask, suffix_k, suffix_v, ancestors):
        seen.add((suffix_k.data_ptr(), suffix_v.data_ptr(), shared_k.data_ptr(), suffix_k.shape, ancestors.shape))
        listed.append((ancestors >= 0).sum(-1).unique().tolist())
        return attention(q, shared_k, shared_v, mask, suffix_k, suffix_v, ancestors)

    attention = generation.decode_attention
    monkeypatch.setattr(generation, "decode_attention", recording)
    beam_search(build_decoder(0, end_bias=-30.0), draw_context(1), [[[0, 3]]], **PLAIN)
    layers = CONFIG.text_depth + 1
    assert len(seen) == layers
    assert listed == [[step] for step in range(1, 7) for _ in range(layers)]


@pytest.mark.parametrize("beams, length_penalty, min_new_tokens", [(3, 1.0, 2), (4, -1.0, 0), (5, 0.0, 1)])
def test_plain_rule_is_the_library_rule(beams, length_penalty, min_new_tokens):
    """The plain search with modern scoring agrees with transformers on a model of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=23, n_positions=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )
    lengths = set()
    for seed in (0, 1, 4):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval().double().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        # end tokens come now and then
        model.transformer.ln_f.bias += 0.6 * model.transformer.wte.weight[2]
        prompt = [0, 5, 7, 9]

        def next_log_probs(tokens, model=model, prompt=prompt):
            return model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1).tolist()

        options = {"max_new_tokens": 6, "min_new_tokens": min_new_tokens, "length_penalty": length_penalty}
        tokens, score = plain_beam_search(next_log_probs, len(prompt), 2, beams=beams, scoring="modern", **options)
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 4, dtype=torch.int64),
            num_beams=beams,
            do_sample=False,
            early_stopping=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        written = theirs.sequences[0, len(prompt) :].tolist()
        lengths.add(len(tokens))
        assert tokens == (written[: written.index(2)] if 2 in written else written)
        assert score == pytest.approx(theirs.sequences_scores.item(), rel=1e-6)
    assert len(lengths) > 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scoring="fair"), "scoring is 'fair'"),
        (dict(read_out="mean"), "read_out is 'mean'"),
        (dict(beams=0), "beams is 0"),
        (dict(beams=15), "beams is 15; expected 1 to 14"),
        (dict(max_new_tokens=0, min_new_tokens=0), "leave nothing to generate"),
        (dict(min_new_tokens=9), "min_new_tokens 9 and max_new_tokens 7"),
        (dict(max_new_tokens=36), "a prompt of 3 tokens can be followed by 36 tokens"),
        (dict(groups=[[[0, 4]]]), "prompts are given for 1 images, but there are 2"),
        (dict(groups=[[], []]), "a prompt is empty or there is none"),
        (dict(groups=[[[]], [[0]]]), "a prompt is empty"),
    ],
)
def test_wrong_options_are_refused(change, message):
    options = {**PLAIN, "groups": [[[0, 4, 5]], [[0]]], **change}
    if change.get("max_new_tokens") == 36:
        # 36 tokens just fit
        beam_search(build_decoder(), draw_context(2), **{**options, "max_new_tokens": 36})
        options["max_new_tokens"], message = 37, message + ", not 37"
    with pytest.raises(ValueError, match=message):
        beam_search(build_decoder(), draw_context(2), **options)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        beam_search(build_decoder().train(), draw_context(1), [[[0]]], **PLAIN)
