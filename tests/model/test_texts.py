"""Proves the text rules of captions, questions, answers and class names: token ids, labels, random choices, collation.

python -m pytest tests/model/test_texts.py
"""

from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from prismer.batch import IGNORE_INDEX
from prismer.texts import (
    ChooseTexts,
    choose_captions,
    choose_class,
    choose_joint,
    choose_questions,
    clean_caption,
    clean_question,
    collate,
    encode_answer,
    encode_caption,
    encode_class,
    encode_class_name,
    encode_prompt,
    encode_qa,
    encode_question,
    format_answer,
)
from prismer.tokenizer import Tokenizer

BOS, PAD, EOS = 0, 1, 2
META = {
    "captions": ["a red cube", "a blue ball", "two things", "a scene"],
    "questions": [
        {
            "question": "what is red",
            "answers": [{"answer": "cube", "weight": 0.7}, {"answer": "box", "weight": 0.3}],
            "kind": "object",
        },
        {"question": "how many", "answers": [{"answer": "two", "weight": 1.0}], "kind": "count"},
    ],
    "class": 1,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.roberta()


def targets(labels: list[int]) -> list[int]:
    return [label for label in labels if label != IGNORE_INDEX]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a DOG runs", "A dog runs"),
        ("A dog.  (It; runs)!\n", "A dog it runs"),
        ('"Stop" sign: 10:30 #1 ~*', "stop sign 10 30 1"),
        ("what's this? a mid-size, 3/4 cup", "What's this? a mid-size, 3/4 cup"),
        ("w " * 40, ("W" + " w" * 29)),
        ("...", ""),
    ],
)
def test_captions_are_cleaned(caption, expected):
    assert clean_caption(caption) == expected


@pytest.mark.parametrize(
    "question, expected",
    [
        ("what IS this", "What is this?"),
        ("What is this?", "What is this?"),
        (" is it red: or (blue)", "is it red  or  blue?"),
        ("w " * 40, "W" + " w" * 29 + "?"),
        ("is  it", "Is  it?"),
    ],
)
def test_questions_are_cleaned(question, expected):
    # marks become blanks that stay, and the capital is set before the edges are stripped
    assert clean_question(question) == expected


def test_answers_are_formatted_and_empty_texts_refused():
    assert format_answer("RED car") == " Red car"
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="the answer .* is empty"):
            format_answer(empty)
        with pytest.raises(ValueError, match="the question .* is empty"):
            clean_question(empty)


def test_a_caption_is_trained_after_its_prefix(tokenizer):
    ids, labels = encode_caption(tokenizer, "a DOG runs.")
    assert ids == [BOS, *tokenizer.encode("A dog runs"), EOS]
    assert labels == [IGNORE_INDEX, *ids[1:]]
    ids, labels = encode_caption(tokenizer, "A dog runs.", "A picture of")
    assert ids == [BOS, *tokenizer.encode("A picture of a dog runs"), EOS]
    assert labels[:4] == [IGNORE_INDEX] * 4 and labels[4:] == ids[4:]
    # an empty caption still has an end
    assert encode_caption(tokenizer, "...") == ([BOS, EOS], [IGNORE_INDEX, EOS])


def test_a_prompt_is_the_start_of_its_captions(tokenizer):
    assert encode_prompt(tokenizer, "") == [BOS]
    assert len(encode_prompt(tokenizer, "A picture of")) == 4
    assert len(encode_prompt(tokenizer, "A photo of a")) == 5
    ids, _ = encode_caption(tokenizer, "a dog", "A picture of")
    assert ids[:4] == encode_prompt(tokenizer, "A picture of ")


def test_a_long_caption_is_cut(tokenizer):
    caption = "extraordinarily disproportionate " * 15
    whole = tokenizer.encode(clean_caption(caption))
    assert len(whole) > 30
    for max_positions, length in ((None, 30), (514, 30), (32, 30), (31, 29), (12, 10)):
        ids, labels = encode_caption(tokenizer, caption, max_positions=max_positions)
        assert ids == [BOS, *whole[: length - 2], EOS], max_positions
        assert labels[1:] == ids[1:] and len(labels) == length
    with pytest.raises(ValueError, match="the prefix 'A picture of' has 4 tokens of the 4"):
        encode_caption(tokenizer, "a dog", "A picture of", max_positions=6)


def test_a_class_name_is_trained_after_its_prefix(tokenizer):
    ids, labels = encode_class(tokenizer, "A photo of a", "German Shepherd, (dog)")
    name = tokenizer.encode(" german shepherd, (dog)")
    assert ids == [*encode_prompt(tokenizer, "A photo of a"), *name, EOS]
    assert targets(labels) == [*name, EOS] == encode_class_name(tokenizer, "German Shepherd, (dog)")
    assert encode_class(tokenizer, "", "Dog")[0] == [BOS, *tokenizer.encode("dog"), EOS]


def test_a_question_has_no_end_and_no_pad(tokenizer):
    ids = encode_question(tokenizer, "what is this")
    assert ids == [BOS, *tokenizer.encode("What is this?")]
    assert PAD not in ids and EOS not in ids
    # 30 words of several tokens each
    assert len(encode_question(tokenizer, "disproportionate " * 30)) == 35


def test_an_answer_is_trained_after_one_pad(tokenizer):
    ids, labels = encode_qa(tokenizer, "what is this", "FIRE engine")
    question = encode_question(tokenizer, "what is this")
    answer = [*tokenizer.encode(" Fire engine"), EOS]
    assert encode_answer(tokenizer, "FIRE engine") == answer
    # one <pad> at any length, and the first target right after it
    assert ids == [*question, PAD, *answer]
    assert ids.count(PAD) == 1
    assert labels == [IGNORE_INDEX] * (len(question) + 1) + answer
    first = next(t for t, label in enumerate(labels) if label != IGNORE_INDEX)
    assert ids[first - 1] == PAD


def test_a_long_question_is_cut_and_its_answer_is_not(tokenizer):
    answer = encode_answer(tokenizer, "red")
    ids, labels = encode_qa(tokenizer, "disproportionate " * 30, "red")
    assert len(ids) == 35 + 1 + len(answer) and targets(labels) == answer
    # 20 positions hold 18 tokens besides the <pad>; the question is shortened
    ids, labels = encode_qa(tokenizer, "disproportionate " * 30, "red", max_positions=20)
    assert len([i for i in ids if i != PAD]) == 18 and ids.count(PAD) == 1
    assert targets(labels) == answer and ids[0] == BOS
    with pytest.raises(ValueError, match="the answer 'red' has 2 tokens, which leaves no question within 5 positions"):
        encode_qa(tokenizer, "what", "red", max_positions=5)


def test_groups_are_padded_to_rectangles():
    a = ([BOS, 5, PAD, 6, EOS], [IGNORE_INDEX] * 3 + [6, EOS], 0.25)
    b = ([BOS, 7, EOS], [IGNORE_INDEX, 7, EOS], 1.0)
    batch = collate([[b, a], [b], []])
    assert batch.ids.dtype == batch.labels.dtype == torch.int64 and batch.weights.dtype == torch.float32
    filler = [BOS, PAD, PAD, PAD, PAD]
    short = [BOS, 7, EOS, PAD, PAD]
    assert batch.ids.tolist() == [[short, a[0]], [short, filler], [filler, filler]]
    ignored = [IGNORE_INDEX] * 5
    short = [IGNORE_INDEX, 7, EOS, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.labels.tolist() == [[short, a[1]], [short, ignored], [ignored, ignored]]
    assert batch.weights.tolist() == [[1.0, 0.25], [1.0, 0.0], [0.0, 0.0]]
    # a text has the same tokens in every batch, except for pads on the right
    alone = collate([[b]])
    assert alone.ids.tolist() == [[[BOS, 7, EOS]]]
    assert collate([[]]).ids.tolist() == [[[BOS]]] and collate([[]]).weights.tolist() == [[0.0]]
    assert collate([[b], []], pad_id=9, bos_id=8).ids.tolist() == [[[BOS, 7, EOS]], [[8, 9, 9]]]


def test_malformed_groups_are_refused():
    with pytest.raises(ValueError, match="no texts to collate"):
        collate([])
    with pytest.raises(ValueError, match="2 ids and 1 labels"):
        collate([[([0, 2], [2], 1.0)]])
    with pytest.raises(ValueError, match="0 ids and 0 labels"):
        collate([[([], [], 1.0)]])


def test_captions_are_drawn_without_replacement(tokenizer):
    every = [(*encode_caption(tokenizer, caption, "A picture of"), 1.0) for caption in META["captions"]]
    choose = partial(choose_captions, tokenizer, "A picture of", 2, None)
    seen = set()
    for seed in range(40):
        texts = choose(META, np.random.default_rng(seed))
        assert texts == choose(META, np.random.default_rng(seed))
        indices = [every.index(text) for text in texts]
        assert len(set(indices)) == 2
        seen.update(indices)
    assert seen == {0, 1, 2, 3}
    assert choose_captions(tokenizer, "A picture of", 9, None, META, np.random.default_rng(0)) == every
    # pre-training: no prefix
    (text,) = choose_captions(tokenizer, "", 1, None, {"captions": ["a dog"]}, np.random.default_rng(0))
    assert text == (*encode_caption(tokenizer, "a dog", ""), 1.0)


def test_question_answer_pairs_keep_their_weights(tokenizer):
    pairs = [("what is red", "cube", 0.7), ("what is red", "box", 0.3), ("how many", "two", 1.0)]
    every = [(*encode_qa(tokenizer, question, answer), weight) for question, answer, weight in pairs]
    assert choose_questions(tokenizer, 5, None, META, np.random.default_rng(0)) == every
    choose = partial(choose_questions, tokenizer, 2, None)
    draws = [[every.index(text) for text in choose(META, np.random.default_rng(seed))] for seed in range(40)]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert {i for draw in draws for i in draw} == {0, 1, 2}
    assert choose({"questions": []}, np.random.default_rng(0)) == []


def joint(tokenizer: Tokenizer, num_captions: int, num_questions: int) -> ChooseTexts:
    choosers = {
        "captions": partial(choose_captions, tokenizer, "", num_captions, None),
        "questions": partial(choose_questions, tokenizer, num_questions, None),
    }
    return partial(choose_joint, choosers)


def test_a_sample_with_one_kind_of_text_trains(tokenizer):
    """Lists of captions and lists of questions are imported apart; an image of either list is used."""
    choose = joint(tokenizer, 2, 9)
    for name in ("captions", "questions"):
        texts = choose({name: META[name]}, np.random.default_rng(0))
        assert texts and len(texts) < len(choose(META, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="a sample has no 'questions'"):
        choose({"source": "x"}, np.random.default_rng(0))


def test_a_long_answer_is_refused_even_if_it_is_not_drawn(tokenizer):
    """An answer that the positions cannot hold excludes its sample, whichever questions are drawn."""
    long = {"question": "what?", "answers": [{"answer": "word " * 99, "weight": 1.0}]}
    meta = {"questions": [*META["questions"], long]}
    for seed in range(5):
        with pytest.raises(ValueError, match="the answer 'word word .* too long for 82 positions"):
            choose_questions(tokenizer, 1, 82, meta, np.random.default_rng(seed))
    assert choose_questions(tokenizer, 1, 514, meta, np.random.default_rng(0))


def test_captions_come_before_questions_in_a_group(tokenizer):
    texts = joint(tokenizer, 2, 9)(META, np.random.default_rng(0))
    assert len(texts) == 2 + 3
    assert all(PAD not in ids for ids, _, _ in texts[:2]) and all(PAD in ids for ids, _, _ in texts[2:])
    batch = collate([texts, texts[:1]])
    assert batch.ids.shape[:2] == (2, 5) and batch.weights[1].tolist() == [1, 0, 0, 0, 0]


def test_the_class_of_a_sample_is_a_name_or_an_index(tokenizer):
    rng = np.random.default_rng(0)
    expected = (*encode_class(tokenizer, "A photo of a", "dog"), 1.0)
    assert choose_class(tokenizer, ["cat", "Dog"], None, META, rng) == [expected]
    assert choose_class(tokenizer, [], None, {"class": "Dog"}, rng) == [expected]
    for names in ([], ["cat"]):
        with pytest.raises(ValueError, match=f"of class 1 but {len(names)} names were given"):
            choose_class(tokenizer, names, None, META, rng)


def test_a_dataset_for_another_task_is_refused(tokenizer):
    for choose in (
        partial(choose_captions, tokenizer, "", 1, None),
        partial(choose_questions, tokenizer, 1, None),
        partial(choose_class, tokenizer, [], None),
    ):
        with pytest.raises(ValueError, match="a sample has no '.*', only source; choose a task"):
            choose({"source": "here"}, np.random.default_rng(0))


def test_choosers_can_be_sent_to_other_processes():
    tokenizer = Tokenizer.train(["a dog", "a cat"], 261)
    # a spawned loader process receives them; a closure would raise
    assert len(ForkingPickler.dumps(joint(tokenizer, 1, 1))) > 0
    assert len(ForkingPickler.dumps(partial(choose_class, tokenizer, [], None))) > 0
