"""Proves that a mistake of the user costs one sentence and exit code 2, and a mistake of ours keeps its traceback.

Run: pytest tests/cli/test_refusals.py
"""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

import prismer
from prismer.config import prismer_tiny
from prismer.dataloading.store.label_maps import pack_labels
from prismer.kernels.dispatch import use_backend
from prismer.model import Prismer
from tests.cli.commands import SMALL_MODEL, assert_refused, raiser

# name -> command line, words of the sentence that refuses it
FAULTS = {
    "no-image": ("caption {tmp}/none.jpg", "no image file {tmp}/none.jpg; check the path"),
    "folder-for-image": ("caption {tmp}", "is a folder; add --out FILE.jsonl to caption its images"),
    "list-for-image": ("classify {tmp}/long.txt --classes a,b", "is no image; add --out FILE.jsonl to classify"),
    "no-question": ("answer {image}", "give an image and a question, or --questions"),
    "questions-without-out": ("answer --questions {tmp}/bad.json", "goes with --out"),
    "questions-and-image": ("answer {image} What? --questions {tmp}/bad.json --out {tmp}/o", "names the images itself"),
    "txt-without-out": ("caption {image} --txt", "--txt goes with --out"),
    "json-with-out": ("caption {image} --json --out {tmp}/o", "leave them out with --out"),
    "out-exists": ("caption {image} --out {tmp}/bad.json", "bad.json exists and no job has written it"),
    "out-is-a-folder": ("caption {image} --out {empty}", "is a folder; name the file of the result"),
    "out-no-images": ("caption {empty} --out {tmp}/o", "there are no images in {empty}"),
    "out-no-source": ("caption {tmp}/none --out {tmp}/o", "there is no file or folder {tmp}/none"),
    "out-json-source": ("caption {tmp}/bad.json --out {tmp}/o", "is JSON; give a folder"),
    "out-all-bad": ("caption {bad} --model {copy} --out {tmp}/o", "none of the 1 images could be read"),
    "out-no-experts": ("caption {bad} --experts edge --labels {bad} --out {tmp}/o", "choose one of them"),
    "out-no-labels": ("caption {bad} --labels {empty} --out {tmp}/o", "none of the 1 images has labels"),
    "out-no-questions": ("answer --questions {tmp}/empty.jpg --out {tmp}/o", "is empty; write one"),
    "out-empty-question": ("answer {bad} ?! --out {tmp}/o", "the question '?!' is empty"),
    "empty-image": ("caption {tmp}/empty.jpg --model {copy}", "is empty"),
    "no-model": ("caption {image} --model {tmp}/none", "no model folder"),
    "not-a-model": ("caption {image} --model {tmp}", "has no config.json"),
    "unknown-device": ("caption {image} --model {copy} --device gpu", "unknown device 'gpu'"),
    "missing-device": ("caption {image} --model {copy} --device cuda:99", "no device cuda:99"),
    "too-many-labels": ("caption {image} --model {copy} --labels a b", "1 images and 2 --labels"),
    "no-labels-file": ("caption {image} --model {copy} --labels {tmp}/a.labels", "no labels file"),
    "empty-labels-file": ("caption {image} --model {copy} --labels {tmp}/empty.jpg", "empty.jpg cannot be used"),
    "empty-question": ("answer {image} ?! --model {copy}", "the question '?!' is empty"),
    "top-of-nothing": ("answer {image} What? --top 3 --model {copy}", "--top ranks a list of answers"),
    "no-answers-file": ("answer {image} What? --answers {tmp}/a.json --model {copy}", "which is not a file"),
    "answers-not-json": ("answer {image} What? --answers {tmp}/bad.json --model {copy}", "bad.json is not JSON"),
    "answers-not-a-list": ("answer {image} What? --answers {copy}/config.json", "is not a list of strings"),
    "answers-binary": ("answer {image} What? --answers {image}", "is not UTF-8 text"),
    "answers-one": ("answer {image} What? --answers yes,,yes", "holds 1 different texts; give at least two"),
    "answers-empty-file": ("answer {image} What? --answers {tmp}/empty.jpg", "holds 0 different texts"),
    "classes-deep": ("classify {image} --classes {tmp}/deep.json", "nested too deeply"),
    "classes-zero-bytes": ("classify {image} --classes {tmp}/zeros.txt", "zero bytes"),
    "classes-long": ("classify {image} --classes {tmp}/long.txt --model {copy}", "shorten it"),
    "classes-one": ("classify {image} --classes cat", "give at least two"),
    "no-dataset": ("data show {tmp}", "is not a finished dataset"),
    "splits": ("data show {scenes}", "holds several datasets; name one of"),
    "show-none": ("data show {scenes}/val --start 2", "has samples 0 to 1"),
    "no-index": ("data index {tmp}", "is not a finished dataset"),
    "no-key": ("data extract {scenes}/val nobody", "has no sample nobody"),
    "render-too-small": ("data render --out {tmp}/r --size 8", "at least 32"),
    "render-negative": ("data render --out {tmp}/r --train -1", "at least 0"),
    "import-nothing": ("data import folder {empty} --out {tmp}/o", "there are no images to import"),
    "import-missing": ("data import folder {tmp}/none --out {tmp}/o", "none is not a folder"),
    "import-bad-list": ("data import vqa {tmp}/bad.json --images {tmp} --out {tmp}/o", "is not JSON"),
    "import-all-bad": ("data import folder {bad} --out {tmp}/o", "none of the 1 images could be imported"),
    "import-onto-itself": ("data import folder {bad} --out {bad}", "is the folder to import"),
    "import-no-threads": ("data import folder {bad} --out {tmp}/o --workers 0", "--workers is 0"),
    "export-nothing": ("export {tmp} --out {tmp}/o", "neither a run with checkpoints nor a checkpoint"),
    "info-no-preset": ("info huge-y", "unknown preset 'huge-y'"),
    "info-no-folder": ("info {tmp}/none", "no model folder"),
    "info-not-a-model": ("info {tmp}", "has no config.json"),
    "unwritable": ("data show {scenes}/val --out {tmp}/none/sheet.png", "No such file or directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_of_the_user_is_one_sentence(run, fault, copy, images, scenes, tmp_path):
    command, words = FAULTS[fault]
    for name, data in (
        ("empty.jpg", b""),
        ("bad.json", b"[1,"),
        ("deep.json", b"[" * 100_000),
        ("zeros.txt", b"a\0b\nc"),
        ("long.txt", b"x" * 100_000 + b"\nc"),
    ):
        (tmp_path / name).write_bytes(data)
    for name in ("empty", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"not an image")
    names = dict(
        image=images[0], copy=copy, scenes=scenes, tmp=tmp_path, empty=tmp_path / "empty", bad=tmp_path / "bad"
    )
    done = run(*command.format(**names).split())
    assert_refused(done, words.format(**names))


@pytest.mark.parametrize(
    "command",
    ["answer {image} What\udcff?", "classify {image} --classes a\udcff,b", "answer {image} a --answers \udcff,b"],
)
def test_arguments_that_are_not_utf8_are_refused(run, images, model, command):
    done = run(*command.format(image=images[0]).split(), "--model", model)
    assert_refused(done, "is not UTF-8; write it in UTF-8")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vision_heads": 5}, "vision_width 32 is not a multiple of vision_heads 5"),
        ({"experts": ["depht"]}, "unknown expert 'depht'"),
        ({"image_size": 8}, "image_size 8 is smaller than patch_size 16"),
        ({"colour": 1}, "unknown settings (colour)"),
        ({"text_width": 64, "text_heads": 4}, "does not fit the config"),
        ({"vocab_size": 999}, "tokenizer has"),
    ],
    ids=["heads", "expert", "sizes", "unknown", "weights", "vocabulary"],
)
def test_a_config_that_contradicts_itself_or_its_weights_is_refused(run, copy, images, changes, words):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    assert_refused(run("caption", images[0], "--model", copy), words)


@pytest.mark.parametrize(
    "name, keep, words",
    [
        ("config.json", 40, "is not JSON"),
        ("model.safetensors", 1000, "is not a whole safetensors file"),
        ("model.safetensors", 0, "is not a whole safetensors file"),
        ("vocab.json", 30, "is not JSON"),
    ],
)
def test_a_model_folder_that_was_copied_in_part_is_refused(run, copy, images, name, keep, words):
    path = copy / name
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(run("caption", images[0], "--model", copy), words)


def test_a_model_without_tokenizer_or_experts_is_refused(run, copy, images, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (copy / name).unlink()
    assert_refused(run("caption", images[0], "--model", copy), "has no tokenizer")
    plain = tmp_path / "plain"
    Prismer(prismer_tiny(**SMALL_MODEL, experts=())).save_pretrained(plain)
    labels = tmp_path / "a.labels"
    labels.write_bytes(b"")
    assert_refused(run("caption", images[0], "--model", plain, "--labels", labels), "not packed labels")
    depth_only = prismer.ExpertLabels({"depth": np.zeros((4, 4), np.uint8)})
    labels.write_bytes(pack_labels(depth_only.planes))
    assert_refused(run("caption", images[0], "--model", plain, "--labels", labels), "has no experts")


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "required: COMMAND"),
        ("paint x.jpg", "invalid choice: 'paint'"),
        ("caption", "required: IMAGE"),
        ("caption x.jpg --beams 0", "'0' is not a number of at least 1"),
        ("caption x.jpg --beam-width 3", "unrecognized arguments: --beam-width"),
        ("classify", "required: IMAGE"),
        ("data", "required: COMMAND"),
        ("data import xml a --out b", "invalid choice: 'xml'"),
    ],
)
def test_malformed_arguments_are_refused_by_argparse(run, command, words):
    done = run(*command.split())
    assert done.code == 2 and words in done.err and "Traceback" not in done.err


def test_a_backend_that_cannot_run_here_is_refused(run, model, images):
    with use_backend("flash-attn"):
        done = run("caption", images[0], "--model", model, "--device", "cpu")
    assert_refused(done, "backend flash-attn was asked for, but")


@pytest.mark.parametrize(
    "body, kind",
    [
        ("int('x')", ValueError),
        ("import torch; torch.zeros(2) + torch.zeros(3)", RuntimeError),
        ("import json; json.loads('{')", ValueError),
        ("{}['x']", KeyError),
        ("raise TypeError('x')", TypeError),
        ("raise ValueError('x')", ValueError),
        ("assert False", AssertionError),
    ],
    ids=["builtin", "torch", "library", "key", "type", "value", "assert"],
)
def test_a_mistake_in_this_library_keeps_its_traceback(run, monkeypatch, body, kind):
    monkeypatch.setattr("prismer.costs.info.info_text", raiser(body))
    with pytest.raises(kind):
        run("info")


@pytest.mark.parametrize("kind", ["InputError", "MachineError"])
def test_an_error_that_this_library_raises_is_one_sentence(run, monkeypatch, kind):
    monkeypatch.setattr(
        "prismer.costs.info.info_text",
        raiser(f"from prismer.errors import {kind}; raise {kind}('the moon is full; wait')"),
    )
    done = run("info")
    assert (done.code, done.err) == (2, "prismer: the moon is full; wait\n")


def built_errors(path: Path) -> list[str]:
    """The errors of Python's own classes that a file builds or inherits from."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = node.bases if isinstance(node, ast.ClassDef) else [getattr(node, "func", getattr(node, "exc", None))]
        found += [
            f"{path}:{node.lineno}"
            for name in names
            if isinstance(name, ast.Name) and name.id in ("ValueError", "RuntimeError")
        ]
    return found


def test_deliberate_errors_have_a_class_of_this_library():
    """So that a command can tell them from mistakes; the argument checks of kernels are for programmers."""
    root = Path(prismer.__file__).resolve().parents[1]
    files = [*(root / "prismer").rglob("*.py"), *(root / "dataloading").rglob("*.py")]
    assert len(files) > 50
    assert [line for path in files if "kernels" not in path.parts for line in built_errors(path)] == []
