"""Proves that captions, answers and classes are those of plain inference on the same tokens, that an image is encoded
once for all its questions, and that wrong input is refused in one sentence.

Run: pytest tests/model/test_inference.py
"""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismer.batch import ImageBatch
from prismer.config import prismer_tiny
from prismer.inference import Answer, Candidates
from prismer.model import Prismer
from prismer.texts import collate, encode_class, encode_qa
from prismer.tokenizer import Tokenizer
from tests.model.plain_inference import plain_generate, plain_rank
from tests.model.teacher_forcing import text_losses

ANSWERS = ["yes", "no", "red", "dark red", "dark blue", "2", "no", "red cube"]
QUESTIONS = [["What is it?", "Which colour has the small cube on the left?", "How many?"], [], ["Is it red"]]
TEXTS = [" Yes No Red Dark red Dark blue dark", "What is it? Which colour has the small cube?", "A photo of a"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXTS * 3, 290)
    config = prismer_tiny(
        experts=("depth", "seg"),
        image_size=32,
        label_size=32,
        vision_width=16,
        vision_heads=2,
        vision_depth=1,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=4,
        text_width=32,
        text_depth=2,
        text_mlp_width=48,
        vocab_size=tokenizer.vocab_size,
        caption_prefix="A picture of",
    )
    model = Prismer(config, tokenizer).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # strong images and positions, so that texts differ
        strong = "position" in name or "cross.value" in name
        std = 0.7 if strong else 0.35 if parameter.dim() >= 2 else 0.25
        parameter.normal_(1.0 if "norm.weight" in name or "ln_" in name else 0.0, std)
    for parameter in model.decoder.head.norm.parameters():
        parameter.mul_(0.4)
    return model


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    batch = ImageBatch.without_labels(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), ("depth", "seg"), 32)
    batch.rgb = torch.randint(0, 256, (3, 3, 32, 32), generator=g, dtype=torch.uint8)
    batch.rgb[1, 0], batch.rgb[2, :, ::2] = 255, 0
    batch.labels["depth"] = torch.randint(0, 256, (3, 1, 32, 32), generator=g, dtype=torch.uint8)
    return batch


@pytest.fixture
def calls(monkeypatch):
    """Counts images that are encoded, and images whose keys and values are projected."""
    counts = {"encoded": 0, "projected": 0}
    encode, decoder = Prismer.encode, type(Prismer(prismer_tiny(experts=())).decoder)
    project = decoder.project_context

    def counting_encode(self, images):
        counts["encoded"] += len(images)
        return encode(self, images)

    def counting_project(self, context, *rest):
        counts["projected"] += len(context)
        return project(self, context, *rest)

    monkeypatch.setattr(Prismer, "encode", counting_encode)
    monkeypatch.setattr(decoder, "project_context", counting_project)
    return counts


def question_groups(model, questions):
    """The tokens of questions, spelt out here: `<s>` and the question, capitalised, with `?`."""
    tokenizer = model.tokenizer
    return [
        [[0, *tokenizer.encode(question if question.endswith("?") else question + "?")] for question in group]
        for group in questions
    ]


def check_answers(found, plain, texts):
    for answer, (best, candidates, scores) in zip(found, plain, strict=True):
        assert answer.text == texts[best] == answer.ranked[0][0]
        assert answer.score == answer.ranked[0][1] == pytest.approx(max(scores), abs=2e-5)
        expected = sorted(scores, reverse=True)
        assert [score for _, score in answer.ranked] == pytest.approx(expected, abs=2e-5)
        assert sorted(text for text, _ in answer.ranked) == sorted(texts[i] for i in candidates)


@pytest.mark.parametrize("prefix", (None, "", "A photo of a"))
@pytest.mark.parametrize("beams", (1, 3))
def test_captions_are_those_of_plain_beam_search(model, images, beams, prefix):
    written = "A picture of" if prefix is None else prefix
    prompt = [0, *model.tokenizer.encode(written)]
    captions = model.caption(images, beams=beams, prefix=prefix, max_length=len(prompt) + 6, min_length=len(prompt) + 2)
    plain = plain_generate(
        model.decoder,
        model.encode(images),
        [[prompt]] * 3,
        beams=beams,
        max_new_tokens=6,
        min_new_tokens=2,
        length_penalty=1.0,
        scoring="classic",
    )
    expected = [model.tokenizer.decode(tokens).strip() for tokens, _ in plain]
    assert captions == [text[:1].upper() + text[1:].lower() + "." for text in expected]
    assert len(set(captions)) == 3


def test_caption_lengths_count_the_prompt(model, images):
    """If one token is certain, captions have the largest length; if the end token is certain, the smallest."""
    model, tokenizer = copy.deepcopy(model), model.tokenizer
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    certain = next(i for i, text in enumerate(texts) if len(text) > 1 and text[0] == " ")
    prompt = len(tokenizer.encode("A picture of")) + 1
    model.decoder.head.bias[certain] += 50.0
    for options, longest in (({}, model.config.caption_max_length), ({"max_length": 20}, 20)):
        expected = tokenizer.decode([certain] * (longest - prompt)).strip().capitalize() + "."
        assert model.caption(images, **options) == [expected] * 3
    model.decoder.head.bias[tokenizer.eos_id] += 100.0
    for min_length in (0, prompt, prompt + 3):
        length = max(0, min_length - prompt)
        expected = tokenizer.decode([certain] * length).strip().capitalize() + "."
        assert model.caption(images, min_length=min_length) == [expected] * 3
    with pytest.raises(ValueError, match=f"prefix alone has {prompt} tokens"):
        model.caption(images, max_length=prompt)


@pytest.mark.parametrize("read_out", ("pad", "last", "batch"))
@pytest.mark.parametrize("top_k", (1, 3, None))
def test_answers_from_a_list_are_those_of_plain_ranking(model, images, top_k, read_out):
    found = model.answer(images, QUESTIONS, ANSWERS, top_k=top_k, read_out=read_out)
    assert [len(group) for group in found] == [3, 0, 1]
    tokens = [[*model.tokenizer.encode(" " + answer.capitalize()), 2] for answer in ANSWERS]
    groups = question_groups(model, QUESTIONS)
    plain = plain_rank(model.decoder, model.encode(images), groups, tokens, top_k=top_k, read_out=read_out)
    check_answers([answer for group in found for answer in group], plain, ANSWERS)


def test_scores_are_the_training_losses(model, images):
    """Ranking maximises per token what training minimises, with the same pads and positions."""
    tokenizer = model.tokenizer
    names = ["cat", "dark cube"]
    for found, encode, texts in (
        (model.answer(images, [QUESTIONS[0]] * 3, ANSWERS), encode_qa, ANSWERS),
        ([[a] for a in model.classify(images, names)], encode_class, names),
    ):
        sources = QUESTIONS[0] if encode is encode_qa else ["A photo of a"]
        pairs = [(source, text) for source in sources for text in texts]
        batch = collate([[(*encode(tokenizer, *pair), 1.0) for pair in pairs]] * 3)
        losses = text_losses(model.decoder, batch, model.encode(images)) / batch.labels.ge(0).sum(-1)
        for b, group in enumerate(found):
            for (source, text), loss in zip(pairs, losses[b].tolist(), strict=True):
                scores = [score for name, score in group[sources.index(source)].ranked if name == text]
                assert scores == pytest.approx([-loss] * len(scores), abs=2e-5)


def test_free_answers_are_those_of_plain_beam_search(model, images):
    found = model.answer(images, QUESTIONS)
    plain = plain_generate(
        model.decoder,
        model.encode(images),
        question_groups(model, QUESTIONS),
        read_out="pad",
        beams=3,
        max_new_tokens=10,
        min_new_tokens=1,
        length_penalty=-1.0,
        scoring="classic",
    )
    for answer, (tokens, score) in zip([a for group in found for a in group], plain, strict=True):
        assert answer.text == model.tokenizer.decode(tokens).strip().lower()
        assert answer.score == pytest.approx(score, abs=1e-3)
        assert answer.ranked == []


def test_answers_are_nested_as_questions_are(model, images):
    """One question per image comes back as one answer per image; an answer does not depend on its batch."""
    nested = model.answer(images, [["How many?"], ["What is it?"], ["How many?"]], ANSWERS)
    flat = model.answer(images, ["How many?", "What is it?", "How many?"], ANSWERS)
    assert all(isinstance(answer, Answer) for answer in flat)
    assert [[a.text for a in group] for group in nested] == [[a.text] for a in flat]
    candidates = Candidates.answers(model.tokenizer, ANSWERS)
    again = model.answer(images, [["What is it?", "How many?"], ["What is it?"], ["Is it?", "How many?"]], candidates)
    for alone, other in ((flat[0], again[0][1]), (flat[1], again[1][0]), (flat[2], again[2][1])):
        assert alone.score == pytest.approx(other.score, abs=1e-5)
    assert model.answer(images, [[], [], []], ANSWERS) == [[], [], []]


@pytest.mark.parametrize("top_k", (2, None))
def test_classes_are_those_of_plain_ranking(model, images, top_k):
    names = ["Cat", "dark cube", "dark", "Red"]
    found = model.classify(images, names, top_k=top_k)
    tokens = [[*model.tokenizer.encode(" " + name.lower()), 2] for name in names]
    prompt = [0, *model.tokenizer.encode("A photo of a")]
    plain = plain_rank(model.decoder, model.encode(images), [[prompt]] * 3, tokens, top_k=top_k, read_out="last")
    check_answers(found, plain, names)
    candidates = Candidates.classes(model.tokenizer, names)
    assert model.classify(images, candidates, top_k=top_k) == found


def test_images_are_encoded_once(model, images, calls):
    asked = [["How many?", "What is it?", "Is it red?", "Is it blue?", "Which one?"]] * 3
    model.answer(images, asked, ANSWERS)
    assert calls == {"encoded": 3, "projected": 3}
    model.answer(images, asked)
    model.caption(images)
    model.classify(images, ANSWERS)
    assert calls == {"encoded": 12, "projected": 12}


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda model, images: model.answer(images, "What?", ANSWERS), "questions is one string for 3 images"),
        (lambda model, images: model.answer(images, ["What?"], ANSWERS), "questions is a list of 1 for 3 images"),
        (lambda model, images: model.answer(images, ["What?", ["What?"], []]), "mixes strings and lists"),
        (lambda model, images: model.answer(images, ["What?", "", "What?"]), "the question '' is empty"),
        (lambda model, images: model.answer(images, ["What?"] * 3, []), r"answers is \[\]"),
        (lambda model, images: model.answer(images, ["What?"] * 3, "yes"), "answers is 'yes'"),
        (lambda model, images: model.answer(images, ["What?"] * 3, ["yes", " "]), "the answer ' ' is empty"),
        (lambda model, images: model.answer(images, ["What?"] * 3, ANSWERS, top_k=0), "top_k is 0"),
        (lambda model, images: model.classify(images, []), r"class_names is \[\]"),
        (lambda model, images: model.caption(images, labels=[None] * 3), "holds its labels already"),
        (lambda model, images: model.caption(images, beams=0), "beams is 0"),
        (lambda model, images: model.caption(images, beams="3"), "beams is '3'; give a whole"),
        (lambda model, images: model.caption(images, beams=True), "beams is True"),
        (lambda model, images: model.caption(images, max_length=float("nan")), "max_length is nan"),
        (lambda model, images: model.caption(images, min_length=None), "min_length is None"),
        (lambda model, images: model.caption(images, length_penalty=float("nan")), "penalty is nan"),
        (lambda model, images: model.caption(images, length_penalty=10**400), "length_penalty is 1"),
        (lambda model, images: model.caption(images, prefix=5), "prefix is 5, an int"),
        (lambda model, images: model.caption(images, prefix="\ud800"), "which is not UTF-8"),
        (lambda model, images: model.classify(images, [0, 1]), "entry 0 of class_names is 0, an int"),
        (lambda model, images: model.classify(images, ["a", None]), "entry 1 of class_names is None"),
        (lambda model, images: model.classify(images, np.array([1, 2])), "entry 0 of class_names"),
        (lambda model, images: model.classify(images, {"a", "b"}), "give a list of at least one"),
        (lambda model, images: model.classify(images, {"a": 1}), "give a list of at least one text"),
        (lambda model, images: model.classify(images, (c for c in "ab")), "give a list of at least"),
        (lambda model, images: model.classify(images, [b"a"]), "entry 0 of class_names is b'a'"),
        (lambda model, images: model.classify(images, ["a"], prefix=None), "prefix is None"),
        (lambda model, images: model.classify(images, ["a"], top_k=1.5), "top_k is 1.5"),
        (lambda model, images: model.classify(images, ["a" * 1000]), "can be followed by"),
        (lambda model, images: model.classify(images, ["a" * 10_000]), "entry 0 of class_names has 1"),
        (lambda model, images: model.answer(images, None), "questions is None for 3 images"),
        (lambda model, images: model.answer(images, [None] * 3), "a question is None"),
        (lambda model, images: model.answer(images, [[["a"]]] * 3), "a question is \\['a'\\], a list"),
        (lambda model, images: model.answer(images, [["a"], 5, []]), "questions of an image are 5"),
        (lambda model, images: model.answer(images, ["\udcff?"] * 3), "which is not UTF-8"),
        (lambda model, images: model.answer(images, ["a"] * 3, [1]), "entry 0 of answers is 1"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(model, images, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(model, images)


def test_tuples_and_arrays_are_lists(model, images):
    names = ["cat", "dog", "cat"]
    expected = model.classify(images, names)
    assert model.classify(images, tuple(names)) == expected
    assert model.classify(images, np.array(names)) == expected
    expected = model.answer(images, ["Is it?"] * 3, names)
    assert model.answer(images, np.array(["Is it?"] * 3), tuple(names)) == expected


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_models_of_other_dtypes_answer(model, images, dtype):
    other = copy.deepcopy(model).to(dtype)
    assert len(other.caption(images)) == len(other.classify(images, ["cat", "dog"])) == 3
    if dtype == torch.float64:
        assert other.caption(images) == model.caption(images)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.to(torch.float8_e4m3fn), "float8_e4m3fn, which no op here computes in"),
        (lambda model: model.to("meta"), "on the meta device"),
        (lambda model: model.encoder.double(), "give both one dtype"),
    ],
    ids=["float8", "meta", "mixed"],
)
def test_weights_that_no_op_computes_in_are_refused(model, images, change, message):
    other = copy.deepcopy(model)
    change(other)
    for ask in (other.caption, lambda images: other.answer(images, ["a"] * 3)):
        with pytest.raises(ValueError, match=message):
            ask(images)


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod.", "any.thing."))
def test_a_prefix_of_all_tensor_names_is_removed(model, tmp_path, prefix):
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    # they are those of the file as it was written
    (tmp_path / "m" / "checksums.json").unlink()
    for a, b in zip(Prismer.from_pretrained(tmp_path / "m").parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_models_without_tokenizer_and_in_training_are_refused(model, images):
    mute = Prismer(model.config).eval()
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        mute.caption(images)
    empty = ImageBatch.without_labels(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), ("depth", "seg"), 32)
    with pytest.raises(ValueError, match="the batch holds no images"):
        model.caption(empty)
    model.train()
    try:
        with pytest.raises(ValueError, match="in training mode"):
            model.answer(images, ["What?"] * 3)
    finally:
        model.eval()


def test_weights_that_are_not_finite_are_refused(model, images):
    broken = copy.deepcopy(model)
    broken.decoder.head.bias[3] = torch.nan
    for ask in (
        lambda: broken.caption(images),
        lambda: broken.answer(images, ["What?"] * 3),
        lambda: broken.answer(images, ["What?"] * 3, ANSWERS),
    ):
        with pytest.raises(RuntimeError, match="scores are not finite"):
            ask()
