"""Proves what `prismer models` fetches, `prismer export` writes and `prismer info` prints; and that an exported folder
answers the same wherever it lies.

Run: pytest tests/cli/test_models.py
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from prismer.dataloading.semantics.features import write_table
from prismer.dataloading.store.shards import ShardDataset
from prismer.model import Prismer
from prismer.training.checkpoint import STATE
from prismer.training.config import TrainConfig
from tests.cli.commands import ANSWERS, assert_refused
from tests.fake_hub import FakeHub, connected, serve


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def make_run(folder, weights, **settings):
    """A run folder whose one checkpoint is a copy of the model folder `weights`."""
    checkpoint = folder / "checkpoints" / "step-00000007"
    shutil.copytree(weights, checkpoint)
    (checkpoint / STATE).write_text(json.dumps({"step": 7, "loss_sum": 0.0, "loss_count": 0}))
    (checkpoint.parent / "index.json").write_text(json.dumps({"last": checkpoint.name}))
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    if settings:
        config = dataclasses.asdict(TrainConfig(**settings))
        (folder / "train_config.json").write_text(json.dumps({"precision": "fp32", "settings": config}))
    return folder


def test_export_of_a_run_writes_a_model_folder(run, model, images, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    shutil.copytree(model, checkpoint)
    (checkpoint / STATE).write_text(json.dumps({"step": 7}))
    (checkpoint.parent / "index.json").write_text(json.dumps({"last": checkpoint.name}))
    (tmp_path / "run" / "answers.json").write_text(json.dumps(ANSWERS))
    done = run("export", tmp_path / "run", "--out", tmp_path / "model")
    assert done.code == 0 and str(tmp_path / "model") in done.out
    assert (
        run("caption", images[0], "--model", tmp_path / "model").out == run("caption", images[0], "--model", model).out
    )
    assert run("answer", images[0], "What?", "--model", tmp_path / "model").out.strip() in ANSWERS
    # a second export replaces the first, but never another folder
    assert run("export", tmp_path / "run", "--out", tmp_path / "model").code == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    refused = run("export", tmp_path / "run", "--out", precious)
    assert refused.code == 2 and "not a model folder" in refused.err and (precious / "thesis.txt").exists()


def test_export_takes_any_value_of_the_model_option(run, model, images, tmp_path):
    done = run("export", "tiny", "--out", tmp_path / "tiny")
    assert done.code == 0 and f"tiny -> {tmp_path / 'tiny'}" in done.out
    question = ("answer", images[0], "What colour is it?", "--model")
    assert run(*question, tmp_path / "tiny").out == run(*question, "tiny").out
    weights = run("export", model / "model.safetensors", "--out", tmp_path / "again")
    assert weights.code == 0 and (tmp_path / "again" / "config.json").is_file()
    same = run("export", tmp_path / "tiny", "--out", tmp_path / "tiny")
    assert_refused(same, "is the folder to export")
    assert (tmp_path / "tiny" / "answers.json").is_file()
    assert_refused(run("export", "teeny", "--out", tmp_path / "x"), "no model folder teeny")


def test_info_shows_sizes_versions_and_kernels(run, model):
    done = run("info", model)
    assert done.code == 0
    total = sum(p.numel() for p in Prismer.from_pretrained(model).parameters())
    assert re.search(rf"total +{total:,}\n", done.out)
    assert re.search(rf"torch +{re.escape(torch.__version__.split('+')[0])}", done.out)
    for words in ("vision_width +32\n", "label_map, reference +usable", "trainable, freeze_lang_vision", "CPU +"):
        assert re.search(words, done.out), words
    assert re.search(r"total +274,335,321\n", run("info", "base-z").out)


def test_a_folder_comes_before_the_shipped_model_of_its_name(run, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert "vision_width        32" in run("info", "tiny").out


def test_a_model_of_the_hub_is_fetched_listed_and_asked(run, model, images, hub, tmp_path, monkeypatch):
    """It ranks its own answers and class names, which lie where the hub's client put them."""
    stored = Prismer.from_pretrained(model)
    stored.save_pretrained(tmp_path / "m", answers=ANSWERS, classes=["cube", "sphere"])
    name = "vqa_prismer_base"
    hub.add_folder("shikunl/prismer", tmp_path / "m", f"{name}/")
    listed = {line.split()[0]: line for line in run("models", "list").out.splitlines() if line.strip()}
    assert re.search(r"questions, VQAv2 +6 +328 M +1.31 GB +CC-BY-NC-SA-4.0 +no$", listed[name])
    assert re.search(r"Apache-2.0 +yes$", listed["tiny"]) and len([n for n in listed if n.endswith("_large")]) == 6
    assert "open_clip's ViT-L-14-336-quickgelu (openai) and roberta-large" in listed["large"]
    assert hub.requests == []
    done = run("models", "fetch", name)
    folder = done.out.strip().rpartition(" -> ")[2]
    assert done.code == 0 and folder.endswith(f"/{name}")
    listed = {line.split()[0]: line for line in run("models", "list").out.splitlines() if line.strip()}
    assert listed[name].endswith(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in (name, f"shikunl/prismer/{name}"):
        assert run("caption", images[0], "--model", source).out == run("caption", images[0], "--model", model).out
        asked = json.loads(run("answer", images[0], "What?", "--model", source, "--top", 4, "--json").out)
        assert {entry["answer"] for entry in asked["ranked"]} == set(ANSWERS)
        assert run("classify", images[0], "--model", source).out.split(": ")[1].strip() in ("cube", "sphere")
    assert run("export", name, "--out", tmp_path / "copy").code == 0
    for file in ("answers.json", "classes.json", "README.md"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "m" / file).read_bytes(), file


def test_what_cannot_be_fetched_is_one_sentence(run, hub, images, tmp_path):
    for name in ("nobody", "tiny", str(tmp_path)):
        assert_refused(run("models", "fetch", name), "is no model of the hub; give a name of `prismer models list`")
    hub.repositories["shikunl/prismer"] = {}
    assert_refused(run("models", "fetch", "vqa_prismer_base"), "holds no vqa_prismer_base/model.safetensors")
    assert_refused(run("models", "fetch", "no/body"), "the hub has no no/body that you may read")
    assert_refused(run("caption", images[0], "--model", "base"), "base is a preset without trained weights; train it")


def test_the_environment_chooses_the_hub_and_the_cache(model, tmp_path):
    """As a user sets them, HF_ENDPOINT and HF_HOME, in a process of its own."""
    hub = FakeHub()
    hub.add_folder("someone/model", model)
    with serve(hub) as address:
        home = tmp_path / "home"
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "prismer", "models", "fetch", "someone/model"]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"someone/model -> {home}") and done.stderr == ""


def test_an_exported_folder_answers_the_same_wherever_it_lies(run, copy, scenes, tmp_path):
    """The table of features that the run read is copied; the original may go."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "semantics": "clip"}))
    (copy / "checksums.json").unlink()
    dataset = ShardDataset(scenes / "val")
    run("data", "extract", scenes / "val", dataset.key(0), "--out", tmp_path)
    jpeg, labels = (tmp_path / f"{dataset.key(0)}.{suffix}" for suffix in ("jpg", "labels"))
    words = dataset[0].meta["words"].values()
    names = sorted({*dataset.classes["seg"], *dataset.classes["obj_detection"], *words})
    table, noise = tmp_path / "table", np.random.default_rng(0)
    write_table(table, names, noise.normal(size=(len(names), 64)) * 3, noise.normal(size=64))
    made = make_run(tmp_path / "run", copy, semantics=str(table), model=str(copy))
    (made / "guesses.json").write_text(json.dumps({"guesses": {}, "caption": "", "classes": ["cube", "sphere"]}))

    def ask(model, *more):
        questions = (("caption", jpeg), ("answer", jpeg, "What is it?", "--top", "4"), ("classify", jpeg, *more))
        done = [run(*question, "--labels", labels, "--json", "--model", model) for question in questions]
        assert [d.code for d in done] == [0, 0, 0], done
        return [d.out for d in done]

    assert run("export", made, "--out", tmp_path / "model").code == 0
    before = ask(tmp_path / "model")
    checkpoint = made / "checkpoints" / "step-00000007"
    asked = ("classify", jpeg, "--labels", labels, "--json", "--model", checkpoint, "--classes", "cube,sphere")
    assert_refused(run(*asked), "reads a table")
    for given in (table, table / "semantics.json"):
        assert run(*asked, "--semantics", given).out == before[2]
    kept = shutil.move(table, tmp_path / "kept")
    own = make_run(tmp_path / "own", copy, model=str(copy))
    assert_refused(run("export", own, "--out", tmp_path / "none"), "where it is no more; name a copy with --semantics")
    assert_refused(run("export", made, "--out", tmp_path / "none"), f"{table} holds no semantics table")
    assert not (tmp_path / "none").exists()
    assert run("export", made, "--out", tmp_path / "other", "--semantics", kept).code == 0
    assert ask(tmp_path / "other") == before
    bare = ("export", checkpoint / "model.safetensors", "--out", tmp_path / "bare", "--semantics")
    assert run(*bare, kept / "semantics.json").code == 0
    assert (tmp_path / "bare" / "semantics.json").read_bytes() == (kept / "semantics.json").read_bytes()
    shutil.rmtree(kept)
    shutil.rmtree(made)
    moved = tmp_path / "elsewhere" / "m"
    moved.parent.mkdir()
    shutil.move(tmp_path / "model", moved)
    assert ask(moved) == before
    # from Python too, and a copy of the copy is whole
    model = Prismer.from_pretrained(moved)
    assert model.caption(jpeg, labels=[labels])[0] == json.loads(before[0])["caption"]
    model.save_pretrained(tmp_path / "again")
    assert ask(tmp_path / "again") == before
    # features matter here: others give other scores
    write_table(table, names, noise.normal(size=(len(names), 64)) * 3, noise.normal(size=64))
    other = run("classify", jpeg, "--labels", labels, "--json", "--model", moved, "--semantics", table).out
    assert json.loads(other)["score"] != json.loads(before[2])["score"]
    (moved / "semantics.json").write_text(json.dumps(list(reversed(names))))
    damaged = run("caption", jpeg, "--labels", labels, "--model", moved)
    assert_refused(damaged, "semantics.json is damaged")


def test_a_model_that_spells_takes_no_table(run, model, images, tmp_path):
    write_table(tmp_path / "table", ["cube"], np.zeros((1, 64)), np.zeros(64))
    refused = run("caption", images[0], "--model", model, "--semantics", tmp_path / "table")
    assert_refused(refused, "spells class names and words and reads no table; leave --semantics out")
    assert_refused(run("classify", images[0], "--model", model), "has no class names of its own; give --classes")


def test_the_card_of_an_export_tells_licence_data_and_scores(run, model, tmp_path):
    base = tmp_path / "released"
    shutil.copytree(model, base)
    (base / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    made = make_run(tmp_path / "run", model, data="/home/somebody/data/coco", task="caption", model=str(base))
    scores = {"BLEU-4": 0.25, "accuracy/question_type/is": 1}
    rows = [{"step": step, "kind": "validation", "CIDEr-D": step / 10, **scores} for step in (3, 7, 9)]
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("export", made, "--out", tmp_path / "model").code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-sa-4.0\n") and "CC-BY-NC-SA-4.0" in card
    assert "dataset coco, task caption, from released: step 7, 112 images" in card and "somebody" not in card
    assert "question_type" not in card and "| CIDEr-D | 0.7000 |" in card and "| BLEU-4 | 0.2500 |" in card
    assert 'Prismer.from_pretrained("model")' in card and "prismer caption image.jpg --model model" in card
    # whoever edits the card damages nothing; a model made from this one inherits its licence, not its scores
    (tmp_path / "model" / "README.md").write_text(card + "More.\n")
    Prismer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "next")
    card = (tmp_path / "next" / "README.md").read_text()
    assert (
        card.startswith("---\nlicense: cc-by-nc-sa-4.0\n") and "0.7000" not in card and "from the model model" in card
    )
    assert "license: other" in (model / "README.md").read_text()
