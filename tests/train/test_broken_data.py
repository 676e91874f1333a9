"""Proves that broken samples are skipped, counted and named, and that a run without any other sample is refused.

python -m pytest tests/train/test_broken_data.py
"""

import json

import pytest

from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.training.progress import read_metrics
from prismer.training.text_statistics import TextStatistics, count_texts

pytestmark = pytest.mark.timeout(900)

WORD = "pneumonoultramicroscopic "


def question(text="What is it?", answer="a cube", weight=1.0):
    return [{"question": text, "answers": [{"answer": answer, "weight": weight}], "kind": "x"}]


# faults in the JSON of a sample; each must cost this sample alone
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
    """Write `count` samples of a dataset and, between them, each of the faults above once; returns the broken keys."""
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
def writer_that_refuses_nothing(monkeypatch):
    """Our writer refuses NaN and surrogates, but other people's writers may not."""
    from prismer.dataloading.store import writer as shard_writer

    monkeypatch.setattr(shard_writer, "to_json", lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))


@pytest.fixture
def faulty(tmp_path, workshop):
    data = workshop.folder / "data"
    broken = {
        split: copy_with_faults(data / split, tmp_path / split, count) for split, count in (("train", 24), ("val", 6))
    }
    return tmp_path, broken


def test_a_run_skips_and_names_broken_samples(workshop, faulty):
    folder, broken = faulty
    run = workshop.launch("broken", data=str(folder), steps=8, eval_every=4, save_every=4, precision="fp32")
    assert run.end() == 0, run.text()
    assert "Traceback" not in run.text()
    rows = [row for row in read_metrics(run.folder) if row["kind"] == "skipped"]
    named = {split: {row["key"] for row in rows if row["split"] == split} for split in broken}
    # an answer of 300 tokens can be evaluated, but neither trained on nor ranked
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
    "val-images": ({"captions": ["a cube"]}, b"\xff\xd8broken", "caption", "none of the 8 samples of .*val can be"),
}


def test_a_split_without_usable_samples_is_refused_at_once(workshop, tmp_path):
    """One sentence and exit code 2, before any step; the runs are parallel."""
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


def test_broken_samples_are_not_counted(faulty):
    folder, _ = faulty
    counts = count_texts(ShardDataset(folder / "train"))
    assert len(counts.skipped) == len(BROKEN_META) - 1
    assert all(any(name in text for text in counts.skipped) for name in set(BROKEN_META) - {"answer-long"})
    assert WORD * 60 in counts.answers and "abc" not in counts.captions
    statistics = TextStatistics.from_counts(counts, None, 3000, fits=lambda answer: len(answer) < 300)
    assert WORD * 60 not in statistics.answers and statistics.answers
