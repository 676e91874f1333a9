"""Proves that the accuracy of answers is that of the published VQA evaluation script.

python -m pytest tests/evaluation/test_vqa_accuracy.py
"""

import random
from collections import Counter

import pytest

from prismer.evaluation.vqa_accuracy import keeps_each_person, normalize_answer, vqa_accuracy
from tests.evaluation import plain_vqa_accuracy as plain

WORDS = """red Red maroon yes Yes no cat cats dog 2 10 3.5 1,000 2,5 12,345.6 10:30 u.s. U.S.A. none None NONE zero one
two Ten eleven twelve a an the The A its hell were well dont Dont dontt cant whos lets let's y'all 'twas twas o'clock
oclock somebody'd somebodyd somebodyd've it's black/white t-shirt what?! (left) "stop" [x] a+b x=y <3 @home under_score
back\\slash `tick` semi;colon ... .. . .5 5. ١,٢ ١.٢ naïve 日本""".split()
SPELLINGS = [*WORDS, *plain.CONTRACTIONS, *plain.CONTRACTIONS.values(), *plain.DIGITS]
MARKS = [*sorted(plain.MARKS), ".", "'", "&", "$", ":", "%", " ", "  ", "\n", "\t", "\r", "\xa0"]


def drawn_text(rng: random.Random) -> str:
    """Up to four words, joined and surrounded by blanks or marks; sometimes empty, sometimes dots alone."""
    if rng.random() < 0.03:
        return rng.choice(["", " ", "\n", "." * rng.randint(28, 40), "a", "the an"])
    text = rng.choice(SPELLINGS)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        joint = rng.choice(MARKS) if rng.random() < 0.3 else " "
        if rng.random() < 0.2:
            joint = rng.choice([f"{joint} ", f" {joint}", f" {joint} "])
        text += joint + rng.choice(SPELLINGS)
    return text


def spelt_otherwise(text: str, rng: random.Random) -> str:
    """A text that often equals `text` after normalisation."""
    change = rng.randrange(9)
    if change == 0:
        return text.upper() if rng.random() < 0.5 else text.capitalize()
    if change == 1:
        return f"{rng.choice(['a', 'the', 'An'])} {text}"
    if change == 2:
        return text + rng.choice([".", "!", " ?", ",", " .", "..."])
    if change == 3:
        return f"{rng.choice([' ', chr(10), chr(9)])}{text}\n"
    if change == 4:
        return text.replace("'", "", rng.randint(1, 3))
    if change == 5:
        return " ".join(map(str, (plain.DIGITS.get(word, word) for word in text.split())))
    if change == 6:
        return text.replace(" ", rng.choice(["-", "/", "\n", "  ", "\t"]))
    return text


def drawn_question(rng: random.Random) -> tuple[str, list[str]]:
    """A prediction, and what ten people said: a few texts, each in several spellings, or ten times the same text."""
    texts = [drawn_text(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.1:
        return spelt_otherwise(texts[0], rng), [texts[0]] * 10
    answers = [spelt_otherwise(rng.choice(texts), rng) for _ in range(10)]
    return spelt_otherwise(rng.choice(texts), rng), answers


def test_the_accuracy_equals_an_independent_implementation_on_random_answers():
    rng = random.Random(0)
    seen: Counter = Counter()
    for _ in range(10_000):
        prediction, answers = drawn_question(rng)
        expected = plain.accuracy(prediction, answers)
        assert abs(vqa_accuracy(prediction, answers) - expected) < 1e-12, (prediction, answers)
        seen[expected] += 1
    # 0, 1, 2, 3 and at least 4 people agree
    assert len(seen) == 5 and min(seen.values()) > 300, seen


def test_texts_are_normalised_as_by_an_independent_implementation():
    rng = random.Random(1)
    for _ in range(3_000):
        text = spelt_otherwise(drawn_text(rng), rng)
        # what the published script does before it normalises
        trimmed = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalize_answer(text) == plain.processed(trimmed), text


@pytest.mark.parametrize("short", plain.CONTRACTIONS)
def test_every_contraction_is_restored(short):
    expected = short.lower() if short[0] == "I" else plain.CONTRACTIONS[short]
    assert normalize_answer(short) == expected


@pytest.mark.parametrize(
    "answer, expected",
    {
        "The  Red\nBall.": "red ball",
        "two": "2",
        "None": "0",
        "ten": "10",
        "eleven": "eleven",
        "an apple, a pear": "apple pear",
        "dont know": "don't know",
        "its": "its",
        "hes": "he's",
        "he'dve": "he'd've",
        "twas": "'twas",
        # quirks of the published script: this pair is the wrong way round, and no word gets two apostrophes back
        "somebody'd": "somebodyd",
        "somebodyd": "somebodyd",
        "yalld've": "yalld've",
        # the full stops after the first 32 stay
        "." * 40: "." * 8,
        "wow...": "wow",
        "v1.5.": "v1.5",
        "the": "",
        "yall'd've": "y'all'd've",
        "black/white": "black white",
        "black / white": "black white",
        "1,000": "1000",
        "1,000-2": "10002",
        "3.5": "3.5",
        "u.s.": "us",
        "what?!": "what",
        "t-shirt": "t shirt",
        "10:30": "10:30",
        "'yes'": "'yes'",
    }.items(),
)
def test_answers_are_normalised_as_by_the_vqa_evaluation(answer, expected):
    assert normalize_answer(answer) == expected


def test_vqa_accuracy_counts_agreeing_people():
    def people(agreeing: int) -> list[str]:
        return ["Yes."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]

    # n people agree: n subsets leave out one of them and contain n - 1, the other 10 - n subsets contain all n
    for n, expected in {0: 0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1, 9: 1}.items():
        assert vqa_accuracy("yes", people(n)) == pytest.approx(expected), n
    # nine "red" and one "maroon"; six "red" and four others
    assert vqa_accuracy("maroon", ["red"] * 9 + ["maroon"]) == pytest.approx(0.3)
    assert vqa_accuracy("red", ["red"] * 6 + ["a", "b", "c", "d"]) == 1


def test_a_text_on_which_all_people_agree_is_compared_as_it_is():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy(" yes\n", ["yes\t"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("stop", ["STOP!"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 9 + ["Two"]) == 1


def test_empty_answers_are_answers():
    assert vqa_accuracy("", [""] * 10) == 1
    # an article alone becomes empty
    assert vqa_accuracy("the", [""] * 3 + ["red"] * 7) == pytest.approx(0.9)


def test_a_few_answers_count_as_alternatives():
    assert vqa_accuracy("a Cat", ["the cat"]) == 1
    assert vqa_accuracy("cats", ["the cat"]) == 0
    assert vqa_accuracy("2", ["three", "two"]) == 1
    assert vqa_accuracy("2", ["three", "two", "one"]) == 1
    assert vqa_accuracy("2", ["three", "two", "one", "four"]) == pytest.approx(3 / 4 / 3)
    with pytest.raises(ValueError, match="no true answer"):
        vqa_accuracy("yes", [])


def test_weights_are_shares_of_ten_people():
    shares = {"red": 0.6, "blue": 0.2, "Two": 0.1, "2": 0.1}
    assert [vqa_accuracy(said, shares) for said in ("Red", "blue", "two", "3")] == pytest.approx([1, 0.6, 0.6, 0])
    # whatever their sum, and although they are rounded
    assert vqa_accuracy("red", {"red": 3, "blue": 27}) == pytest.approx(0.3)
    assert vqa_accuracy("red", {"red": 0.29999, "blue": 0.70001}) == pytest.approx(0.9)
    # all people agree, yet nobody knows on which spelling
    assert vqa_accuracy("Yes", {"yes": 1.0}) == 1


def test_only_the_answers_of_four_or_more_people_give_the_official_accuracy():
    assert keeps_each_person(["yes"] * 10) and keeps_each_person(["yes"] * 4)
    assert not keeps_each_person(["yes"] * 3) and not keeps_each_person({"yes": 1.0})
