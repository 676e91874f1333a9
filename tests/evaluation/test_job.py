"""Proves that an evaluation ends with the same bytes however it was killed and by however many processes it was made.

pytest tests/evaluation/test_job.py
"""

import dataclasses
import json
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError
from prismer.evaluation import job
from prismer.evaluation.predict import Predictor
from prismer.evaluation.scores import scores
from prismer.model import Prismer
from prismer.training.evaluation import predict
from prismer.training.text_statistics import TextStatistics
from tests.data.noise_shards import flip, offset_of
from tests.evaluation.jobs import (
    ANSWERS,
    CLASSES,
    Slow,
    evaluation,
    meta_of,
    read_files,
    save_model,
    start_job,
    write_samples,
)
from tests.experts.stand_ins import Brightness, Halves

COUNT = 48


@pytest.fixture(autouse=True)
def short_parts_and_few_samples(monkeypatch):
    monkeypatch.setattr(job, "_BATCHES_PER_PART", 1)
    # drawing takes most of the time
    monkeypatch.setattr(job, "_NUM_SAMPLES", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def model_folder(folder):
    return save_model(folder / "model")


@pytest.fixture(scope="module")
def model(model_folder):
    return Prismer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def data(folder):
    return write_samples(folder / "data", COUNT, broken=(5, 8, 9))


@pytest.fixture(scope="module")
def unbroken(folder, model_folder, data):
    """The files of a run that nothing stopped."""
    process = start_job(model_folder, data, folder / "unbroken")
    process.join()
    assert process.exitcode == 0
    return read_files(folder / "unbroken")


def read_rows(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_the_results_hold_every_image_once_in_order(unbroken, folder):
    rows = read_rows(folder / "unbroken")
    assert [row["key"] for row in rows] == [f"s{i:03d}" for i in range(COUNT)]
    skipped = [row for row in rows if "skipped" in row]
    assert [row["key"] for row in skipped] == ["s005", "s008", "s009"]
    assert all("does not decode" in row["skipped"] and set(row) == {"key", "skipped"} for row in skipped)
    found = json.loads(unbroken["scores.json"])
    assert found["skipped"] == skipped
    assert (found["task"], found["images"], found["predicted"], found["questions"]) == (
        "vqa",
        COUNT,
        COUNT - 3,
        2 * COUNT - 6,
    )
    assert found["scores"] == scores(rows) and "accuracy/answer_type/other" in found["scores"]
    assert any("45 of 90 questions keep distinct answers" in note for note in found["notes"])
    settings = found["settings"]
    assert settings["weights"] == "random" and settings["answers"]["count"] == len(ANSWERS) and settings["beams"] == 2
    assert "| vqa, 45 images | score |" in unbroken["scores.md"].decode()
    submission = json.loads(unbroken["submission_answers.json"])
    expected = [10 * i + n for i in range(COUNT) if i not in (5, 8, 9) for n in (0, 1)]
    assert [entry["question_id"] for entry in submission] == expected
    assert Image.open(folder / "unbroken" / "samples.png").width > 800


@pytest.mark.parametrize("number", (3, pytest.param(10, marks=pytest.mark.long)))
def test_a_job_that_was_killed_many_times_gives_the_same_bytes(unbroken, folder, model_folder, data, number):
    out, draw = folder / f"killed-{number}", random.Random(0)
    kills = 0

    def parts():
        return len(list((out / "parts").glob("*.jsonl")))

    while kills < number:
        world = draw.choice([1, 2, 3])
        before = parts()
        process = start_job(model_folder, data, out, draw.randrange(world), world, Slow)
        # a new part shows that the process is at work; then it dies somewhere in the next one
        while process.is_alive() and parts() == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert not (out / "scores.json").exists(), "the job is too short for so many kills"
    process = start_job(model_folder, data, out)
    process.join()
    assert read_files(out) == unbroken


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(unbroken, model_folder, data, tmp_path, world):
    processes = [start_job(model_folder, data, tmp_path, rank, world) for rank in range(world)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert read_files(tmp_path) == unbroken
    assert not (tmp_path / "parts").exists()


def test_a_process_alone_leaves_the_parts_of_others(model, data, tmp_path):
    what = evaluation(model, data)
    assert what.run(tmp_path, rank=1, world=2) == COUNT // 4
    assert not (tmp_path / "scores.json").exists()
    assert what.run(tmp_path, rank=0, world=2) == 0
    assert len(read_rows(tmp_path)) == COUNT


@pytest.mark.parametrize("name", ["scores", "samples_png", "write_together"])
def test_a_run_that_died_while_it_wrote_the_results_writes_them_all(model, data, tmp_path, monkeypatch, name):
    what = evaluation(model, data, limit=6)
    what.run(tmp_path / "whole")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, name, die)
        what.run(tmp_path / "dead")
    assert not (tmp_path / "dead" / "scores.json").exists()
    monkeypatch.setattr(job.Evaluation, "_rows_of_batches", die)
    assert what.run(tmp_path / "dead") == 0
    assert read_files(tmp_path / "dead") == read_files(tmp_path / "whole")


@pytest.mark.parametrize("batch_size, limit, expected", [(2, 5, 5), (4, 1, 1), (5, 100, COUNT)])
def test_a_limit_takes_the_first_images(model, data, tmp_path, batch_size, limit, expected):
    evaluation(model, data, batch_size=batch_size, limit=limit).run(tmp_path)
    assert [row["key"] for row in read_rows(tmp_path)] == [f"s{i:03d}" for i in range(expected)]


@pytest.mark.parametrize("task", ["caption", "vqa", "classify"])
def test_the_rows_are_those_of_the_trainer(model, data, tmp_path, task):
    evaluation(model, data, task, batch_size=4, limit=12).run(tmp_path)
    loader = Loader(
        ShardDataset(data),
        config=model.config,
        batch_size=4,
        semantics=Semantics.for_config(model.config),
        training=False,
    )
    with pytest.warns(UserWarning, match="skipping sample s005"):
        rows = predict(model, loader, task, TextStatistics(answers=ANSWERS, classes=CLASSES), limit=6)
    mine = [row for row in read_rows(tmp_path) if "skipped" not in row][:6]
    if task == "caption":
        # the trainer has the default beam width
        mine = [{**row, "caption": ""} for row in mine]
        rows = [{**row, "caption": ""} for row in rows]
    assert len(rows) == 6 and mine == rows


def test_each_task_has_its_scores_and_its_submission(model, data, tmp_path):
    files = {"caption": {"submission_captions.json"}, "vqa": {"submission_answers.json"}, "classify": set()}
    names = {"caption": "CIDEr-D", "vqa": "accuracy", "classify": "top-1"}
    for task, submission in files.items():
        out = tmp_path / task
        evaluation(model, data, task, limit=4).run(out)
        found = json.loads((out / "scores.json").read_text())
        assert names[task] in found["scores"] and ("questions" in found) == (task == "vqa")
        rest = {"job.json", "predictions.jsonl", "scores.json", "scores.md", "samples.png"}
        assert set(os.listdir(out)) == rest | submission


def test_a_damaged_shard_costs_its_samples_alone(model, tmp_path):
    data = write_samples(tmp_path / "data", 16)
    flip(data / "shard-000000.tar", offset_of(data / "shard-000000.tar", "s003.jpg") + 40)
    (data / "shard-000001.index.json").write_text("{}")
    # the table would hold what the index file of the shard said
    (data / "index.bin").unlink()
    with pytest.warns(UserWarning, match="skipping sample"):
        evaluation(model, data).run(tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    keys = [f"s{i:03d}" for i in range(7)] + [f"shard-000001.tar#{i}" for i in range(7)] + ["s014", "s015"]
    assert [row["key"] for row in rows] == keys
    reasons = {row["key"]: row["skipped"] for row in rows if "skipped" in row}
    assert "its jpg fails the checksum" in reasons.pop("s003")
    assert len(reasons) == 7 and all("fails its checksum" in reason for reason in reasons.values())


def test_a_dataset_without_a_readable_image_has_no_scores(model, tmp_path):
    data = write_samples(tmp_path / "data", 3, broken=(0, 1, 2))
    evaluation(model, data).run(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["scores"] == {} and found["predicted"] == 0 and len(found["skipped"]) == 3
    assert not (tmp_path / "out" / "samples.png").exists()


def test_ids_that_occur_twice_cost_the_submission_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.evaluation.jobs.meta_of", lambda i: {**meta_of(i), "image_id": 7})
    data = write_samples(tmp_path / "data", 2)
    evaluation(model, data, "caption").run(tmp_path / "out")
    assert not (tmp_path / "out" / "submission_captions.json").exists()
    notes = json.loads((tmp_path / "out" / "scores.json").read_text())["notes"]
    assert any("image_id 7 occurs twice" in note for note in notes)


def test_other_settings_are_refused(model, data, tmp_path):
    what = evaluation(model, data, limit=4)
    what.run(tmp_path)
    before = read_files(tmp_path)
    greedy = dataclasses.replace(what.predictor, beams=1)
    changes = dict(predictor=greedy), dict(batch_size=3), dict(notes={"weights": "others"}), dict(limit=3)
    for change, word in zip(changes, ("beams", "batch_size", "weights", "items"), strict=True):
        with pytest.raises(ValueError, match=f"was begun with other .*{word}"):
            dataclasses.replace(what, **change).run(tmp_path)
    assert what.run(tmp_path) == 0 and read_files(tmp_path) == before


class Recorder(Predictor):
    """Keeps the images that it is asked about."""

    seen: list = []

    def rows(self, images, keys, metas):
        self.seen.append(images)
        return super().rows(images, keys, metas)


class Picky(Labeller):
    """Refuses one image."""

    refused = b""

    def __call__(self, images):
        if self.refused in images:
            raise InputError("the image cannot be labelled: it is refused")
        return super().__call__(images)


def test_experts_label_the_images_and_skip_those_that_they_refuse(model, tmp_path):
    data = write_samples(tmp_path / "data", 4)
    what = evaluation(model, data, "caption")
    labeller = Picky([Brightness(), Halves()], label_size=model.config.label_size)
    labeller.refused = what.dataset[2].jpeg
    Recorder.seen = []
    predictor = Recorder(**vars(what.predictor))
    dataclasses.replace(what, predictor=predictor, labeller=labeller).run(tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert [row.get("skipped") for row in rows] == [None, None, "the image cannot be labelled: it is refused", None]
    assert [len(images) for images in Recorder.seen] == [2, 1]
    expected = labeller([what.dataset[i].jpeg for i in (0, 1)]) + labeller([what.dataset[3].jpeg])
    for name in ("depth", "obj_detection"):
        maps = np.concatenate([images.labels[name].numpy() for images in Recorder.seen])
        np.testing.assert_array_equal(maps[:, 0], [found.planes[name] for found in expected])
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["settings"]["experts"]["depth"]["network"] == "brightness"
