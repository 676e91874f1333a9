"""Broken samples of every kind never end a run: they are skipped, counted and named; a split of nothing else ends it.

python -m pytest tests/train/test_broken_data.py
"""

import json

import numpy as np
import pytest

from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.training.evaluation import Survey, collect_knowledge, describe, scores, survey
from prismer.training.progress import read_metrics

pytestmark = pytest.mark.timeout(900)

WORD = "pneumonoultramicroscopic "


def question(text="What is it?", answer="a cube", weight=1.0):
    return [{"question": text, "answers": [{"answer": answer, "weight": weight}], "kind": "x"}]


# what the JSON of a sample says instead of what it should; each must cost this sample alone
BROKEN_META = {
    "captions-number": {"captions": 5},
    "captions-of-numbers": {"captions": [5]},
    "captions-text": {"captions": "abc"},
    "captions-null": {"captions": None},
    "caption-empty": {"captions": ["a cube", ""]},
    "caption-marks": {"captions": ["..."]},
    "caption-surrogate": {"captions": ["a \ud800 cube"]},
    "questions-object": {"questions": {"what?": "cube"}},
    "question-text": {"questions": ["what?"]},
    "question-empty": {"questions": question(text=" ?")},
    "question-kind": {"questions": [dict(question()[0], kind=3)]},
    "answers-text": {"questions": [{"question": "what?", "answers": "cube"}]},
    "answer-empty": {"questions": question(answer=" ")},
    "answer-list": {"questions": question(answer=["a cube"])},
    "answer-long": {"questions": question(answer=WORD * 60)},
    "weight-nan": {"questions": question(weight=float("nan"))},
    "weight-negative": {"questions": question(weight=-1)},
    "weight-endless": {"questions": question(weight=10**300)},
    "weight-true": {"questions": question(weight=True)},
    "raw-answers": {"questions": [dict(question()[0], raw_answers=[1])]},
    "class-list": {"class": ["cube"]},
    "class-negative": {"class": -1},
    "instances-list": {"instances": [1, 0]},
    "words-number": {"words": {"0": 5}},
    "size-zero": {"size": [0, 64]},
}


def copy_with_faults(source, folder, count):
    """`count` samples of a dataset and, between them, each of the faults above once; the keys of the broken ones."""
    dataset, broken = ShardDataset(source), []
    with ShardWriter(folder, classes=dataset.classes, source="test", samples_per_shard=20) as writer:

        def add(key, meta):
            sample = dataset[len(broken) % len(dataset)]
            writer.write(Sample(key, sample.jpeg, sample.labels, {**sample.meta, **meta}))

        for i in range(count):
            add(f"whole-{i}", {})
            for name in list(BROKEN_META)[i :: max(1, count)]:
                add(name, BROKEN_META[name])
                broken.append(name)
    return broken


@pytest.fixture(autouse=True)
def json_of_anything(monkeypatch):
    """The writer refuses NaN and surrogates; other people's writers do not."""
    from prismer.dataloading.store import writer as shard_writer

    monkeypatch.setattr(shard_writer, "to_json", lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))


@pytest.fixture
def faulty(tmp_path, workshop):
    data = workshop.folder / "data"
    broken = {
        split: copy_with_faults(data / split, tmp_path / split, count) for split, count in (("train", 24), ("val", 6))
    }
    return tmp_path, broken


def test_a_run_over_broken_samples(workshop, faulty):
    folder, broken = faulty
    run = workshop.launch("broken", data=str(folder), steps=8, eval_every=4, save_every=4, precision="fp32")
    assert run.end() == 0, run.text()
    assert "Traceback" not in run.text()
    rows = [row for row in read_metrics(run.folder) if row["kind"] == "skipped"]
    named = {split: {row["key"] for row in rows if row["split"] == split} for split in broken}
    # an answer of 300 tokens can be read, but neither trained on nor ranked
    assert named["val"] == set(broken["val"]) - {"answer-long"}
    assert named["train"] == set(broken["train"])
    total = len(named["train"]) + len(named["val"])
    assert len(rows) == total and all(row["reason"] for row in rows)
    assert f"skipped {total} samples that cannot be used" in run.text()
    assert json.loads((run.folder / "finished.json").read_text())["skipped_samples"] == total
    assert "24 of 49 samples" in run.text() and "1 answers are too long" in run.text()
    results = json.loads((run.folder / "results.json").read_text())
    assert results["images"] == 7 and results["trained model"]["accuracy"] >= 0


def keep(meta, *names):
    return {name: meta[name] for name in (*names, "instances", "words", "size")}


CASES = {
    "no-texts": (dict(captions=[], questions=[]), {}, "joint", "no sample of .*train has captions or questions"),
    "no-classes": ({}, {}, "classify", "no sample of .*train has a class"),
    "val-texts": ({"captions": ["a cube"]}, {"captions": 5}, "caption", "no sample of .*val has captions, .*cannot be"),
    "val-pictures": ({"captions": ["a cube"]}, b"\xff\xd8broken", "caption", "none of the 8 samples of .*val can be"),
}


def test_nothing_to_learn_is_said_at_once(workshop, tmp_path):
    """One sentence and exit code 2, before any step; the runs go side by side."""
    runs = {}
    for name, (train, val, task, _) in CASES.items():
        for split, change in (("train", train), ("val", val)):
            source = ShardDataset(workshop.folder / "data" / split)
            with ShardWriter(tmp_path / name / split, classes=source.classes, source="x") as writer:
                for i in range(len(source)):
                    sample = source[i]
                    meta = keep(sample.meta) | (change if isinstance(change, dict) else train)
                    jpeg = sample.jpeg if isinstance(change, dict) else change
                    writer.write(Sample(sample.key, jpeg, sample.labels, meta))
        runs[name] = workshop.launch(name, task=task, data=str(tmp_path / name), steps=4, precision="fp32")
    for name, run in runs.items():
        assert run.end() == 2, f"{name}:\n{run.text()}"
        assert "Traceback" not in run.text(), run.text()
        with pytest.raises(AssertionError, match=CASES[name][3]):
            raise AssertionError(run.text())


def test_survey_counts_what_training_uses(faulty):
    folder, broken = faulty
    found = survey(ShardDataset(folder / "train"))
    assert len(found.skipped) == len(BROKEN_META) - 1
    assert all(any(name in text for text in found.skipped) for name in set(BROKEN_META) - {"answer-long"})
    assert WORD * 60 in found.answers and "abc" not in found.captions
    knowledge = collect_knowledge(
        ShardDataset(folder / "train"), 3000, found=found, fits=lambda answer: len(answer) < 300
    )
    assert WORD * 60 not in knowledge.answers and knowledge.answers


@pytest.mark.parametrize(
    ("task", "found", "fits"),
    [
        ("joint", dict(captions={"a": 1}), True),
        ("joint", dict(answers={"a": 1}), True),
        ("joint", dict(classes={"a": 1}), False),
        ("vqa", dict(captions={"a": 1}), False),
        ("caption", dict(answers={"a": 1}), False),
        ("classify", dict(class_indices=1), True),
        ("classify", dict(captions={"a": 1}), False),
    ],
)
def test_survey_fits_the_task(tmp_path, task, found, fits):
    if fits:
        return Survey(**found).check(task, tmp_path)
    with pytest.raises(ValueError, match=f"which task {task} needs; choose another"):
        Survey(**found).check(task, tmp_path)


def test_answers_keep_their_weights():
    """Ten people, six of whom say red: the majority is right, and one of two agreeing is worth what VQA gives it."""
    record = {"question": "?", "kind": "x", "answers": {"red": 0.6, "blue": 0.2, "a": 0.1, "b": 0.1}}
    found = {
        said: scores([{"key": "0", "questions": [dict(record, prediction=said)]}])["accuracy"]
        for said in ("red", "blue", "b", "green")
    }
    assert found == pytest.approx({"red": 1.0, "blue": 0.6, "b": 0.3, "green": 0.0})
    assert scores([{"key": "0", "questions": [dict(record, answers={}, prediction="red")]}]) == {}


class Answering:
    """A model that always says red, and a loader of one image."""

    class model:
        tokenizer = None

        @staticmethod
        def answer(images, questions, candidates):
            from prismer.inference import Answer

            return [[Answer("red", 0.0) for _ in group] for group in questions]

    def __init__(self, questions):
        self.batch_size = self.world = self.steps_per_epoch = 1
        self.rank, self.meta = 0, {"questions": questions}

    def epoch(self, epoch):
        from types import SimpleNamespace

        yield SimpleNamespace(images=None, keys=["key"], meta=[self.meta])


def test_raw_answers_win_over_weights(monkeypatch):
    from prismer.training import evaluation

    monkeypatch.setattr(evaluation.Candidates, "answers", lambda tokenizer, texts: texts)
    people = ["red"] * 2 + ["blue"] * 8
    weighted = [{"answer": "red", "weight": 0.9}, {"answer": "blue", "weight": 0.1}]
    questions = [
        {"question": "a?", "answers": weighted, "raw_answers": people},
        {"question": "b?", "answers": weighted},
        {"question": "c?"},
    ]
    (record,) = describe(
        Answering.model, Answering(questions), task="vqa", knowledge=evaluation.Knowledge(answers=["red"])
    )
    assert [q["answers"] for q in record["questions"]] == [people, {"red": 0.9, "blue": 0.1}, {}]
    assert scores([record])["accuracy"] == pytest.approx(np.mean([0.6, 1.0]))
