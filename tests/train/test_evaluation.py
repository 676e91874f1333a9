"""Proves what evaluation takes from the training split's texts, how records are scored, and what the baseline replies.

python -m pytest tests/train/test_evaluation.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from prismer.evaluation.report import score_table
from prismer.evaluation.scores import scores
from prismer.inference import Answer
from prismer.training import evaluation
from prismer.training.evaluation import most_frequent_replies, predict
from prismer.training.text_statistics import TextCounts, TextStatistics, count_texts


class Metas:
    """A split of which only the JSON can be read."""

    classes: dict = {}

    def __init__(self, metas):
        self.metas = metas

    def __len__(self):
        return len(self.metas)

    def meta(self, i):
        return self.metas[i]


def question(kind, *answers):
    return dict(question="what?", kind=kind, answers=[dict(answer=a, weight=w) for a, w in answers])


def test_statistics_rank_texts_by_frequency(tmp_path):
    metas = [
        dict(
            captions=["a", "b"], questions=[question("yes/no", ("yes", 1.0)), question("count", ("2", 0.3), ("3", 0.6))]
        ),
        dict(captions=["b"], questions=[question("yes/no", ("no", 1.0)), question("count", ("2", 0.5))]),
        dict(captions=[], questions=[]),
    ]
    statistics = TextStatistics.from_counts(count_texts(Metas(metas)), None, 3, bool)
    # no and yes are equally frequent, hence in alphabetical order; 2 outweighs 3
    assert statistics.answers == ["no", "yes", "2"]
    assert statistics.guesses == {"count": "2", "yes/no": "no"} and statistics.caption == "b"
    statistics.save(tmp_path)
    assert TextStatistics.load(tmp_path) == statistics
    assert json.loads((tmp_path / "answers.json").read_text()) == statistics.answers


def test_class_names_come_from_the_dataset_or_the_samples():
    counts = count_texts(Metas([{"class": "dog"}, {"class": "cat"}]))
    assert TextStatistics.from_counts(counts, None, 9, bool).classes == ["cat", "dog"]
    assert TextStatistics.from_counts(counts, ["dog", "cat", "cow"], 9, bool).classes == ["dog", "cat", "cow"]


@pytest.mark.parametrize(
    ("task", "found", "fits"),
    [
        ("joint", dict(captions={"a": 1}), True),
        ("joint", dict(answers={"a": 1}), True),
        ("joint", dict(classes={"a": 1}), False),
        ("vqa", dict(captions={"a": 1}), False),
        ("caption", dict(answers={"a": 1}), False),
        ("classify", dict(classes={1: 1}), True),
        ("classify", dict(captions={"a": 1}), False),
    ],
)
def test_a_split_without_texts_for_the_task_is_refused(tmp_path, task, found, fits):
    if fits:
        return TextCounts(**found).check(task, tmp_path)
    with pytest.raises(ValueError, match=f"which task {task} needs; choose another"):
        TextCounts(**found).check(task, tmp_path)


def test_records_and_their_baseline_are_scored():
    records = [
        dict(
            key="0",
            caption="A red cube on the ground.",
            captions=["a red cube on the ground"],
            questions=[
                dict(question="?", kind="count", answers=["2"], prediction="2"),
                dict(question="?", kind="yes/no", answers=["yes"], prediction="no"),
            ],
        ),
        dict(
            key="1",
            caption="A blue sphere.",
            captions=["two green cones near a sign"],
            questions=[dict(question="?", kind="count", answers=["3"], prediction="3")],
        ),
    ]
    found = scores(records)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["accuracy/count"], found["accuracy/yes/no"]) == (1.0, 0.0)
    assert found["score"] == pytest.approx((found["CIDEr-D"] / 10 + 2 / 3) / 2) and found["CIDEr-D"] > 1
    statistics = TextStatistics(guesses={"count": "2", "yes/no": "yes"}, caption="a cube")
    baseline = scores(most_frequent_replies(records, statistics))
    assert (baseline["accuracy/count"], baseline["accuracy/yes/no"]) == (0.5, 1.0)
    assert records[1]["caption"] == "A blue sphere.", "the baseline overwrote the records"
    table = score_table({"trained": found, "most frequent": baseline, "blank": found}, "2 images")
    assert "| VQA accuracy, yes/no | 0.000 | 1.000 | 0.000 |" in table


def test_classes_are_scored_by_top_1():
    records = [
        {"key": "0", "class": "cat", "prediction": "cat"},
        {"key": "1", "class": "dog", "prediction": "cat"},
        {"key": "2", "class": None, "prediction": "cat"},
    ]
    assert scores(records) == {"top-1": 0.5, "score": 0.5}


def test_answers_keep_their_weights():
    """Six of ten people say red: the majority is right, and an answer of two people gets its share by VQA's metric."""
    record = {"question": "?", "kind": "x", "answers": {"red": 0.6, "blue": 0.2, "a": 0.1, "b": 0.1}}
    found = {
        said: scores([{"key": "0", "questions": [dict(record, prediction=said)]}])["accuracy"]
        for said in ("red", "blue", "b", "green")
    }
    assert found == pytest.approx({"red": 1.0, "blue": 0.6, "b": 0.3, "green": 0.0})
    assert scores([{"key": "0", "questions": [dict(record, answers={}, prediction="red")]}]) == {}


class AlwaysRed:
    """A model that answers every question with red."""

    tokenizer = None

    @staticmethod
    def answer(images, questions, candidates, **options):
        return [[Answer("red", 0.0) for _ in group] for group in questions]


class OneImage:
    """A loader of one image with questions."""

    batch_size = world = steps_per_epoch = 1
    rank = 0
    rename = None

    def __init__(self, questions):
        self.meta = {"questions": questions}

    def epoch(self, epoch):
        yield SimpleNamespace(images=None, keys=["key"], meta=[self.meta])


def test_raw_answers_win_over_weights(monkeypatch):
    monkeypatch.setattr(evaluation.Candidates, "answers", lambda tokenizer, texts: texts)
    people = ["red"] * 2 + ["blue"] * 8
    weighted = [{"answer": "red", "weight": 0.9}, {"answer": "blue", "weight": 0.1}]
    questions = [
        {"question": "a?", "answers": weighted, "raw_answers": people},
        {"question": "b?", "answers": weighted},
        {"question": "c?"},
    ]
    (record,) = predict(AlwaysRed, OneImage(questions), task="vqa", statistics=TextStatistics(answers=["red"]))
    assert [q["answers"] for q in record["questions"]] == [people, {"red": 0.9, "blue": 0.1}, {}]
    assert scores([record])["accuracy"] == pytest.approx(np.mean([0.6, 1.0]))
