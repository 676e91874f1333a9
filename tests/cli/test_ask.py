"""Proves what `prismer caption`, `answer` and `classify` print.

Run: pytest tests/cli/test_ask.py
"""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from prismer.cli.choices import read_texts
from prismer.dataloading.semantics.features import write_table
from prismer.dataloading.store.shards import ShardDataset
from prismer.shipped import shipped_folder
from tests.cli.commands import ANSWERS, assert_refused


def test_caption_prints_a_sentence_for_each_image(run, model, images):
    done = run("caption", *images[:2], "--model", model)
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in images[:2]]
    assert all(re.fullmatch(r".+: .+\.", line) for line in lines)
    greedy = run("caption", images[0], "--model", model, "--beams", 1, "--json", "--device", "cpu")
    entry = json.loads(greedy.out)
    assert entry["image"] == str(images[0]) and entry["caption"].endswith(".")


def test_captions_of_many_images_do_not_depend_on_their_batches(run, model, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[0].read_bytes()[:200])
    alone = [run("caption", path, "--model", model).out for path in (images[0], images[11])]
    # the broken one is in the first of two batches
    done = run("caption", *images[:3], broken, *images[3:], *images, "--model", model)
    assert done.code == 2
    assert done.err.startswith(f"prismer: {broken} is damaged") and done.err.count("\n") == 1
    lines = done.out.splitlines(keepends=True)
    assert [line.split(":")[0] for line in lines] == [str(path) for path in [*images, *images]]
    assert [lines[0], lines[11]] == alone == [lines[12], lines[23]]


def test_answer_is_free_text_or_ranks_a_list(run, model, images):
    question = ("answer", images[0], "What colour is the cube?", "--model", model)
    free = run(*question)
    assert free.code == 0 and free.out.count("\n") == 1
    chosen = run(*question, "--answers", ",".join(ANSWERS), "--top", 3)
    first, *ranked = chosen.out.splitlines()
    names = [line.split()[1] for line in ranked]
    scores = [float(line.split()[0]) for line in ranked]
    assert len(ranked) == 3 and names[0] == first and set(names) < set(ANSWERS)
    assert scores == sorted(scores, reverse=True)
    entry = json.loads(run(*question, "--answers", ",".join(ANSWERS), "--top", 2, "--json").out)
    assert entry["answer"] == first and [e["answer"] for e in entry["ranked"]] == names[:2]
    assert entry["score"] == entry["ranked"][0]["score"] == pytest.approx(scores[0], abs=1e-3)


@pytest.mark.parametrize(
    "name, content",
    [("a.json", json.dumps(ANSWERS)), ("a.txt", "\n".join(ANSWERS) + "\n\n"), ("a", "\r\n".join(ANSWERS))],
    ids=["json", "lines", "crlf"],
)
def test_answers_can_come_from_a_file(run, model, images, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    question = ("answer", images[0], "What?", "--model", model, "--top", 4, "--answers")
    assert run(*question, tmp_path / name).out == run(*question, ",".join(ANSWERS)).out


def test_answers_of_the_model_folder_are_the_default(run, copy, images):
    question = ("answer", images[0], "What?", "--model", copy)
    free = run(*question).out
    (copy / "answers.json").write_text("[]")
    assert run(*question).out == free
    (copy / "answers.json").write_text(json.dumps(ANSWERS))
    assert run(*question).out.strip() in ANSWERS
    assert run(*question, "--answers", "blue,green").out.strip() in ("blue", "green")
    (copy / "answers.json").write_text("{}")
    assert_refused(run(*question), "answers.json holds an object, not a list")


def test_classify_chooses_a_class_for_each_image(run, model, images):
    done = run("classify", *images[:3], "--classes", "cube,sphere,cone", "--top", 2, "--model", model)
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) == 9
    for path, line, best in zip(images, lines[::3], lines[1::3], strict=False):
        assert line == f"{path}: {best.split()[1]}"
    entry = json.loads(run("classify", images[0], "--classes", "cube,sphere", "--model", model, "--json").out)
    assert entry["class"] in ("cube", "sphere") and "ranked" not in entry


def test_labels_change_the_scores(run, model, scenes, tmp_path):
    key = ShardDataset(scenes / "val").key(0)
    done = run("data", "extract", scenes / "val", key, "--out", tmp_path)
    files = [tmp_path / f"{key}.{suffix}" for suffix in ("jpg", "labels", "json")]
    assert done.out.split() == [str(file) for file in files]
    ask = ("classify", files[0], "--classes", "cube,sphere", "--json", "--model", model)
    with_labels, without = (json.loads(run(*ask, *more).out) for more in (("--labels", files[1]), ()))
    assert with_labels["score"] != without["score"]


def test_a_table_of_features_in_the_model_folder_is_used(run, copy, scenes, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "semantics": "clip"}))
    dataset = ShardDataset(scenes / "val")
    run("data", "extract", scenes / "val", dataset.key(0), "--out", tmp_path)
    files = [tmp_path / f"{dataset.key(0)}.{suffix}" for suffix in ("jpg", "labels")]
    without = run("caption", files[0], "--labels", files[1], "--model", copy)
    assert without.code == 2 and "reads a table" in without.err
    names = sorted({*dataset.classes["seg"], *dataset.classes["obj_detection"], *dataset[0].meta["words"].values()})
    write_table(copy, names, np.zeros((len(names), 64), np.float32), np.zeros(64, np.float32))
    assert run("caption", files[0], "--labels", files[1], "--model", copy).code == 0


@pytest.mark.skipif(not shipped_folder("tiny").is_dir(), reason="this checkout ships no model")
def test_the_shipped_model_is_the_default(run, images):
    assert run("caption", images[0]).code == 0
    assert run("answer", images[0], "How many objects are there?").code == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffcat\r\na\u2028dog\r\n"),
        ("a.json", '\ufeff["cat", "a\\u2028dog"]'),
        (None, "cat," + "a\u2028dog," * 100),
    ],
)
def test_choices_with_any_line_end_or_byte_order_mark_are_read(tmp_path, name, text):
    if name:
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_texts(str(tmp_path / name) if name else text, "--classes") == ["cat", "a\u2028dog"]


def test_any_file_name_can_be_printed(run, monkeypatch, images, model, tmp_path):
    odd = tmp_path / os.fsdecode(b"a\xff\xc3\xa9.jpg")
    odd.write_bytes(images[0].read_bytes())
    for encoding in ("utf-8", "ascii"):
        for kind in ((), ("--json",)):
            out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", out)
                assert run("caption", odd, "--model", model, *kind).code == 0
            line = out.buffer.getvalue().decode(encoding)
            if kind:
                assert json.loads(line)["image"] == str(odd)
            else:
                assert "a\\udcff" in line


def test_a_warning_is_one_line(run, model, images, tmp_path):
    frames = [Image.open(path) for path in images[:2]]
    moving = tmp_path / "moving.gif"
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    done = run("caption", moving, "--model", model)
    assert done.code == 0
    assert done.err == "prismer: warning: an image has several frames or pages; only the first is used\n"
