"""The accuracy of answers to questions, as the published VQA evaluation script computes it."""

import re
from collections.abc import Mapping, Sequence

from prismer.errors import InputError

# words that get a missing apostrophe back; "its", "hell", "were" and others that are also words without an apostrophe
# are not among them
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'"]


_RESTORED = {short: word for word in _CONTRACTIONS for short in _without_one_apostrophe(word)}
# the published script writes this pair the wrong way round
_RESTORED["somebody'd"] = "somebodyd"
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# the published script passes the flag re.UNICODE, which is 32, where re.sub takes the largest number of replacements
_MAX_FULL_STOPS = 32
# with fewer answers than this, leaving one out would keep every accuracy below 1
_FEWEST_PEOPLE = 4
# the number of people who answered each question of VQA
_PEOPLE = 10


def normalize_answer(answer: str) -> str:
    """The form in which the VQA evaluation compares answers.

    A punctuation mark is removed if it touches a blank somewhere in the answer, or if the answer has a comma between
    digits; otherwise a blank replaces it. Full stops are removed unless a digit follows. The text becomes lower case,
    zero to ten and none become digits, articles are removed, and contractions get their apostrophes back.
    """
    answer = _trimmed(answer)
    text = answer
    has_digit_comma = re.search(r"\d,\d", answer) is not None
    for mark in _MARKS:
        touches_blank = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if touches_blank or has_digit_comma else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=_MAX_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str] | Mapping[str, float]) -> float:
    """The accuracy of one answer, between 0 and 1.

        mean over the answers a of min(1, #(answers other than a that equal the prediction) / 3)

    What each of four or more people said is scored as by the published VQA evaluation script: where all of them wrote
    the same, the prediction must equal that text as it is, so that "Yes" is wrong if ten people wrote "yes"; otherwise
    both sides are normalised with `normalize_answer`.

    Two cases are not the official accuracy. Of fewer than four answers, any one that equals the prediction after
    normalisation counts as 1. Of distinct answers with weights, the weights are taken for shares of ten people,
    whatever their sum: 0.6, 0.2, 0.1, 0.1 are six, two, one and one; both sides are always normalised.
    `scores.score_notes` says how many questions of a dataset are such cases.

    Args:
        prediction: the answer to score.
        answers: each person's answer, or distinct answers with their weights.

    Raises:
        ValueError: if there is no answer to compare with.
    """
    if not answers:
        raise InputError("a question has no true answer; leave it out of the evaluation")
    if isinstance(answers, Mapping):
        prediction = normalize_answer(prediction)
        same = sum(weight for text, weight in answers.items() if normalize_answer(text) == prediction)
        # weights are stored rounded; 2.9999 people are three
        return _leave_one_out(round(_PEOPLE * same / sum(answers.values()), 3), _PEOPLE)
    if not keeps_each_person(answers):
        return float(normalize_answer(prediction) in map(normalize_answer, answers))
    prediction, answers = _trimmed(prediction), [_trimmed(text) for text in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(text) for text in answers]
    return _leave_one_out(answers.count(prediction), len(answers))


def keeps_each_person(answers: Sequence[str] | Mapping[str, float]) -> bool:
    """Whether `answers` hold what each of several people said, so that `vqa_accuracy` is the official accuracy."""
    return not isinstance(answers, Mapping) and len(answers) >= _FEWEST_PEOPLE


def _trimmed(text: str) -> str:
    """The text as the published script reads it, before it decides whether to normalise."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(agree: float, people: int) -> float:
    """The accuracy of an answer on which `agree` of so many people agree."""
    # leaving out a person who agrees leaves one fewer who agrees
    own, others = max(0.0, agree - 1), agree
    return (agree * min(1.0, own / 3) + (people - agree) * min(1.0, others / 3)) / people
