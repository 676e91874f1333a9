"""Proves what `prismer export` writes and `prismer info` prints.

Run: pytest tests/cli/test_models.py
"""

import json
import re
import shutil

import torch

from prismer.model import Prismer
from prismer.training.checkpoint import STATE
from tests.cli.commands import ANSWERS, assert_refused


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
