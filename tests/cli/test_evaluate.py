"""Proves that `prismer evaluate` scores each task, resumes, shares work, and refuses bad input in one sentence.

pytest tests/cli/test_evaluate.py
"""

import json
import shutil

import pytest

from prismer.config import prismer_tiny
from prismer.dataloading.store.shards import ShardDataset
from prismer.model import Prismer
from tests.cli.commands import ANSWERS, SMALL_MODEL, assert_refused
from tests.evaluation.jobs import write_samples


def read_rows(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Six noise images with texts for every task, of which one does not decode."""
    return write_samples(tmp_path_factory.mktemp("noise") / "data", 6, broken=(1,))


def test_captions_of_a_split(run, model, scenes, tmp_path):
    out = tmp_path / "out"
    done = run("evaluate", "--model", model, "--data", scenes, "--task", "caption", "--beams", 1, "--out", out)
    assert done.code == 0, done.err
    assert "| caption, 2 images | score |" in done.out and "| CIDEr-D |" in done.out
    assert "predictions.jsonl, samples.png, scores.json, scores.md" in done.out.splitlines()[-1]
    rows = read_rows(out)
    dataset = ShardDataset(scenes / "val")
    assert [(row["key"], row["captions"]) for row in rows] == [
        (dataset.key(i), dataset.meta(i)["captions"]) for i in range(2)
    ]
    found = scores_of(out)
    assert found["model"] == str(model) and found["data"] == str(scenes / "val")
    settings = found["settings"]
    assert len(settings["weights"]) == 64 and settings["semantics"] == "spelling" and settings["prefix"] == ""
    assert (settings["beams"], settings["precision"], settings["device"]) == (1, "float32", "cpu")
    assert {"prismer", "torch"} == set(settings["versions"])
    before = (out / "predictions.jsonl").read_bytes()
    again = run("evaluate", "--model", model, "--data", scenes, "--task", "caption", "--beams", 1, "--out", out)
    assert again.code == 0 and again.out == done.out and (out / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "options, prefix", [([], "A picture of"), (["--no-prefix"], ""), (["--prefix", "There is"], "There is")]
)
def test_a_caption_starts_with_the_prefix_that_is_asked_for(run, model, noise, tmp_path, monkeypatch, options, prefix):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "caption_prefix": "A picture of"}))
    (folder / "checksums.json").unlink()
    seen = []
    caption = Prismer.caption
    monkeypatch.setattr(Prismer, "caption", lambda *a, **options: seen.append(options) or caption(*a, **options))
    out = tmp_path / "out"
    done = run(
        *("evaluate", "--model", folder, "--data", noise, "--task", "caption", "--limit", 1, "--out", out), *options
    )
    assert done.code == 0, done.err
    assert seen == [{"beams": 3, "prefix": prefix if options else None}]
    assert scores_of(out)["settings"]["prefix"] == prefix


def test_answers_are_ranked_from_a_list_from_the_models_own_or_made_freely(run, model, noise, tmp_path):
    def predictions(name, folder, *options):
        done = run(
            *("evaluate", "--model", folder, "--data", noise, "--task", "vqa", "--limit", 1),
            *("--out", tmp_path / name, *options),
        )
        assert done.code == 0, done.err
        return [question["prediction"] for question in read_rows(tmp_path / name)[0]["questions"]]

    assert set(predictions("listed", model, "--answers", ",".join(ANSWERS))) <= set(ANSWERS)
    assert not set(predictions("free", model)) & set(ANSWERS)
    assert scores_of(tmp_path / "free")["settings"]["answers"] is None
    own = shutil.copytree(model, tmp_path / "model")
    (own / "answers.json").write_text('["maroon", "teal"]')
    assert set(predictions("own", own)) <= {"maroon", "teal"}
    assert scores_of(tmp_path / "own")["settings"]["answers"]["count"] == 2


def test_classes_are_those_of_the_dataset_or_of_the_command(run, model, noise, tmp_path):
    done = run("evaluate", "--model", model, "--data", noise, "--task", "classify", "--out", tmp_path / "own")
    assert done.code == 0 and "| top-1 |" in done.out, done.err
    assert "1 of 6 images were skipped (the first: s001, the image does not decode" in done.out
    rows = read_rows(tmp_path / "own")
    assert [row.get("class") for row in rows] == ["cube", None, "cone", "cube", "sphere", "cone"]
    assert set(rows[0]["ranked"]) == {"cube", "sphere", "cone"} and rows[0]["prediction"] == rows[0]["ranked"][0]
    given = ("--classes", "cat,dog", "--out", tmp_path / "given")
    assert run("evaluate", "--model", model, "--data", noise, "--task", "classify", *given).code == 0
    assert {row["prediction"] for row in read_rows(tmp_path / "given") if "class" in row} <= {"cat", "dog"}


def test_two_processes_share_the_images(run, model, noise, tmp_path, monkeypatch):
    command = ("evaluate", "--model", model, "--data", noise, "--task", "caption", "--batch-size", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = run(*command, "--out", tmp_path / "out")
    assert first.code == 0 and "process 1 of 2 is done, 1 parts are left to other processes" in first.out
    monkeypatch.setenv("RANK", "0")
    second = run(*command, "--out", tmp_path / "out")
    assert second.code == 0 and "| caption, 5 images | score |" in second.out
    assert [row["key"] for row in read_rows(tmp_path / "out")] == [f"s{i:03d}" for i in range(6)]


@pytest.fixture(scope="module")
def others(tmp_path_factory, noise):
    """Datasets and models that lack something."""
    folder = tmp_path_factory.mktemp("others")
    write_samples(folder / "broken", 2, broken=(0, 1))
    shutil.copytree(noise, folder / "splits" / "train")
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, model):
    """A model without experts, and one that lacks its table of features."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Prismer.from_pretrained(model).tokenizer
    for name, fields in (("plain", {"experts": ()}), ("clip", {"semantics": "clip"})):
        config = prismer_tiny(**SMALL_MODEL, vocab_size=tokenizer.vocab_size, **fields)
        Prismer(config, tokenizer).eval().save_pretrained(folder / name)
    return folder


FAULTS = {
    "no-dataset": ("--data {others}/nothing --task caption", "no dataset at {others}/nothing; render or import one"),
    "no-folder": ("--data {others}/none --task caption", "no dataset at {others}/none"),
    "no-split": ("--data {others}/splits --task caption", "has no split val, only train; choose one with --split"),
    "no-such-split": ("--data {others}/splits --task caption --split test", "has no split test, only train"),
    "split-of-a-dataset": ("--data {noise} --task caption --split val", "is a dataset without splits"),
    "no-model": ("--data {noise} --task caption --model {others}/none", "no model folder"),
    "no-questions": ("--data {folder} --task vqa", "no sample of {folder} has questions, which task vqa needs"),
    "no-classes": ("--data {scenes} --task classify", "lists class names; give --classes"),
    "prefix-of-answers": ("--data {noise} --task vqa --prefix A", "--prefix changes nothing in task vqa"),
    "no-prefix-of-answers": ("--data {noise} --task vqa --no-prefix", "--prefix changes nothing in task vqa"),
    "answers-of-captions": ("--data {noise} --task caption --answers a,b", "--answers changes nothing in task caption"),
    "classes-of-answers": ("--data {noise} --task vqa --classes a,b", "--classes changes nothing in task vqa"),
    "long-prefix": ("--data {noise} --task caption --prefix {long}", "--prefix has"),
    "long-answer": ("--data {noise} --task vqa --answers yes,{long}", "1 of the 2 answers are too long"),
    "no-answers-file": ("--data {noise} --task vqa --answers {others}/a.json", "which is not a file"),
    "no-experts": (
        "--data {noise} --task caption --experts depth --model {models}/plain",
        "has no experts and reads no labels; leave --experts out",
    ),
    "unknown-expert": ("--data {noise} --task caption --experts smell", "smell"),
    "no-table": ("--data {scenes} --task caption --model {models}/clip", "lacks its table of features"),
    "no-device": ("--data {noise} --task caption --device cuda:99", "no device cuda:99"),
    "all-broken": ("--data {others}/broken --task caption", "none of the 2 images can be read (the image does not"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_costs_one_sentence(run, model, noise, others, models, scenes, tmp_path, name):
    folder = tmp_path / "captions"
    if name == "no-questions":
        dataset = ShardDataset(noise)
        from prismer.dataloading.store.shards import Sample, ShardWriter

        with ShardWriter(folder, classes={}, source="noise") as writer:
            writer.write(Sample("a", dataset[0].jpeg, {}, {"captions": ["A cube."]}))
    command, words = FAULTS[name]
    places = dict(noise=noise, others=others, models=models, scenes=scenes, folder=folder, long="cube" * 40)
    asked = command.format(**places).split()
    if "--model" not in asked:
        asked += ["--model", model]
    out = tmp_path / "out"
    assert_refused(run("evaluate", *asked, "--out", out), words.format(**places))
    assert name == "all-broken" or not out.exists()


def test_an_unknown_task_is_refused(run, noise, tmp_path):
    refused = run("evaluate", "--data", noise, "--task", "retrieval", "--out", tmp_path)
    assert refused.code == 2 and "invalid choice: 'retrieval' (choose from" in refused.err


def test_results_of_other_settings_are_refused(run, model, noise, tmp_path):
    command = ("evaluate", "--model", model, "--data", noise, "--task", "caption", "--limit", 1, "--out", tmp_path)
    assert run(*command).code == 0
    assert_refused(run(*command, "--beams", 2), f"{tmp_path} was begun with other beams; give the same options")
    assert_refused(run(*command[:-4], "--out", tmp_path), "was begun with other items")


def test_a_model_without_its_table_reads_images_without_maps(run, models, noise, tmp_path):
    command = ("evaluate", "--model", models / "clip", "--data", noise, "--task", "caption", "--limit", 1)
    assert run(*command, "--out", tmp_path).code == 0
    assert scores_of(tmp_path)["settings"]["semantics"] == "clip"
