"""The accuracy of answers to questions, as the VQA evaluation computes it."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from prismer.errors import InputError

# the contractions that the VQA evaluation restores when an apostrophe is missing; "its", "hell", "were" and others that
# are also words without an apostrophe are not among them
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()


def _without_apostrophes(word: str) -> list[str]:
    """Every spelling of `word` without some of its apostrophes; of several, at least one stays."""
    at = [i for i, c in enumerate(word) if c == "'"]
    drops = itertools.chain.from_iterable(itertools.combinations(at, n) for n in range(1, max(2, len(at))))
    return ["".join(c for i, c in enumerate(word) if i not in drop) for drop in drops]


_RESTORED = {short: word for word in _CONTRACTIONS for short in _without_apostrophes(word)}
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_ANSWER_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(answer: str) -> str:
    """The form in which the VQA evaluation compares answers.

    The text becomes lower case. A punctuation mark is removed if it touches a blank somewhere in the answer, or if the
    answer has a comma between digits; otherwise a blank replaces it. Full stops are removed unless a digit follows.
    Zero to ten and none become digits, articles are removed, and contractions get their apostrophes back.
    """
    answer = " ".join(answer.split())
    text = answer
    remove = re.search(r"\d,\d", answer) is not None
    for mark in _ANSWER_MARKS:
        touches = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if remove or touches else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


# people who answered each question of VQA; the weight of an answer is the share of them that gave it
PEOPLE = 10


def vqa_accuracy(prediction: str, answers: Sequence[str] | Mapping[str, float]) -> float:
    """The accuracy of one answer, between 0 and 1, after `normalize_answer` on both sides.

        mean over the answers a of min(1, #(others than a that agree) / 3)

    This metric is made for the answers of ten people. With fewer than four answers it could not reach 1, so any
    agreement counts as 1 there: with a single true answer it is exact match. The official script compares the raw texts
    where all ten people wrote the same; here texts are always normalised.

    Args:
        answers: each person's answer, or distinct answers with their weights. Weights are shares of ten people,
            whatever their sum: 0.6, 0.2, 0.1, 0.1 are six, two, one and one.

    Raises:
        ValueError: if there is no answer to compare with.
    """
    if not answers:
        raise InputError("a question has no true answer; leave it out of the evaluation")
    prediction = normalize_answer(prediction)
    if isinstance(answers, Mapping):
        people = PEOPLE
        same = [weight for text, weight in answers.items() if normalize_answer(text) == prediction]
        # weights are stored rounded; 2.9999 people are three
        agree = round(PEOPLE * sum(same) / sum(answers.values()), 3)
    else:
        people = len(answers)
        agree = sum(normalize_answer(text) == prediction for text in answers)
        if people < 4:
            return float(agree > 0)
    # leaving out a person who agrees leaves one fewer who agrees
    own, others = max(0.0, agree - 1), agree
    return (agree * min(1.0, own / 3) + (people - agree) * min(1.0, others / 3)) / people


def answer_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str] | Mapping[str, float]], kinds: Sequence[str]
) -> dict[str, float]:
    """Mean VQA accuracy, over all questions and for each kind of question.

    Args:
        predictions: the predicted answer of each question.
        answers: the true answers of each question, as for `vqa_accuracy`.
        kinds: the kind of each question ("colour", "count").

    Returns:
        "accuracy", then "accuracy/KIND" for the kinds in alphabetical order.

    Raises:
        ValueError: if the lengths differ or are 0, or a question has no true answer.
    """
    if not len(predictions) == len(answers) == len(kinds) != 0:
        raise InputError(
            f"got {len(predictions)} predictions for {len(answers)} questions of {len(kinds)} kinds; "
            f"give one of each, at least one"
        )
    scores = [vqa_accuracy(p, a) for p, a in zip(predictions, answers, strict=True)]
    by_kind = defaultdict(list)
    for kind, score in zip(kinds, scores, strict=True):
        by_kind[kind].append(score)
    means = {f"accuracy/{kind}": float(np.mean(by_kind[kind])) for kind in sorted(by_kind)}
    return {"accuracy": float(np.mean(scores)), **means}
