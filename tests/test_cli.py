"""Proves the command `prismer`: what each sub-command prints and writes, that what a user gets wrong costs one sentence
and exit code 2, and that a mistake of ours keeps its traceback. Run: pytest tests/test_cli.py"""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prismer
from prismer.cli.ask import read_texts
from prismer.cli.main import main
from prismer.config import prismer_tiny
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.semantics.features import write_table
from prismer.dataloading.store.shards import ShardDataset
from prismer.model import Prismer
from prismer.shipped import shipped_folder
from prismer.tokenizer import Tokenizer
from prismer.training.checkpoint import STATE

ROOT = Path(prismer.__file__).resolve().parent.parent
ANSWERS = ["Yes", "No", "Red", "Two"]
SMALL = dict(
    image_size=32,
    label_size=32,
    vision_width=32,
    vision_depth=1,
    vision_heads=2,
    resampler_depth=1,
    resampler_heads=2,
    num_latents=4,
    text_width=32,
    text_depth=1,
    text_heads=2,
    text_mlp_width=64,
)


@dataclasses.dataclass
class Run:
    """What one command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Call the command in this process."""

    def call(*args) -> Run:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as leaving:
            code = leaving.code
        return Run(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    texts = ["A red cube stands on the ground.", "What colour is the cube?", *(f" {a}" for a in ANSWERS)]
    tokenizer = Tokenizer.train(texts, vocab_size=280)
    folder = tmp_path_factory.mktemp("models") / "small"
    config = prismer_tiny(**SMALL, vocab_size=tokenizer.vocab_size)
    Prismer(config, tokenizer).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """train/ of 12 and val/ of 2 rendered scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    render_dataset(folder, train=12, val=2, test=0, size=48, label_size=48, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory, scenes) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    dataset = ShardDataset(scenes / "train")
    for i in range(len(dataset)):
        (folder / f"{i:02}.jpg").write_bytes(dataset[i].jpeg)
    return sorted(folder.iterdir())


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


# asking


def test_caption(run, model, photos):
    done = run("caption", *photos[:2], "--model", model)
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in photos[:2]]
    assert all(re.fullmatch(r".+: .+\.", line) for line in lines)
    greedy = run("caption", photos[0], "--model", model, "--beams", 1, "--json", "--device", "cpu")
    entry = json.loads(greedy.out)
    assert entry["image"] == str(photos[0]) and entry["caption"].endswith(".")


def test_caption_of_many_pictures_does_not_depend_on_their_batches(run, model, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:200])
    alone = [run("caption", path, "--model", model).out for path in (photos[0], photos[11])]
    # the broken one is in the first of two batches
    done = run("caption", *photos[:3], broken, *photos[3:], *photos, "--model", model)
    assert done.code == 2
    assert done.err.startswith(f"prismer: {broken} is damaged") and done.err.count("\n") == 1
    lines = done.out.splitlines(keepends=True)
    assert [line.split(":")[0] for line in lines] == [str(path) for path in [*photos, *photos]]
    assert [lines[0], lines[11]] == alone == [lines[12], lines[23]]


def test_answer(run, model, photos):
    question = ("answer", photos[0], "What colour is the cube?", "--model", model)
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
def test_answer_list_files(run, model, photos, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    question = ("answer", photos[0], "What?", "--model", model, "--top", 4, "--answers")
    assert run(*question, tmp_path / name).out == run(*question, ",".join(ANSWERS)).out


def test_answers_of_the_model_folder_are_the_default(run, copy, photos):
    question = ("answer", photos[0], "What?", "--model", copy)
    free = run(*question).out
    (copy / "answers.json").write_text("[]")
    assert run(*question).out == free
    (copy / "answers.json").write_text(json.dumps(ANSWERS))
    assert run(*question).out.strip() in ANSWERS
    assert run(*question, "--answers", "blue,green").out.strip() in ("blue", "green")
    (copy / "answers.json").write_text("{}")
    assert_sentence(run(*question), "answers.json is not a list of strings")


def test_classify(run, model, photos):
    done = run("classify", *photos[:3], "--classes", "cube,sphere,cone", "--top", 2, "--model", model)
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) == 9
    for path, line, best in zip(photos, lines[::3], lines[1::3], strict=False):
        assert line == f"{path}: {best.split()[1]}"
    entry = json.loads(run("classify", photos[0], "--classes", "cube,sphere", "--model", model, "--json").out)
    assert entry["class"] in ("cube", "sphere") and "ranked" not in entry


def test_labels_change_what_the_model_sees(run, model, scenes, tmp_path):
    key = ShardDataset(scenes / "val").key(0)
    done = run("data", "extract", scenes / "val", key, "--out", tmp_path)
    files = [tmp_path / f"{key}.{suffix}" for suffix in ("jpg", "labels", "json")]
    assert done.out.split() == [str(file) for file in files]
    ask = ("classify", files[0], "--classes", "cube,sphere", "--json", "--model", model)
    with_labels, without = (json.loads(run(*ask, *more).out) for more in (("--labels", files[1]), ()))
    assert with_labels["score"] != without["score"]


def test_a_stored_table_of_features_is_found(run, copy, scenes, tmp_path):
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
def test_the_shipped_model_is_the_default(run, photos):
    assert run("caption", photos[0]).code == 0
    assert run("answer", photos[0], "How many objects are there?").code == 0


# data


def test_data_render_check_show(run, tmp_path):
    out = tmp_path / "scenes"
    render = ("data", "render", "--out", out, "--train", 3, "--val", 1, "--test", 0, "--size", 48, "--workers", 1)
    assert "train 3, val 1 scenes" in run(*render).out
    assert len(ShardDataset(out / "train")) == 3 and not (out / "test").exists()
    checked = run("data", "check", out)
    assert checked.code == 0 and checked.out.count("no problems") == 2
    sheet = tmp_path / "sheet.png"
    assert run("data", "show", out / "train", "--out", sheet, "--count", 2, "--start", 1).code == 0
    assert Image.open(sheet).width > 7 * 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes", "sheet.png"]


def test_data_check_lists_every_problem(run, scenes, tmp_path):
    folder = Path(shutil.copytree(scenes / "train", tmp_path / "train"))
    dataset = ShardDataset(folder)
    tar = folder / dataset.shards[0]
    data = bytearray(tar.read_bytes())
    for i in (2, 5):
        data[data.index(dataset[i].jpeg) + 300] ^= 1
    tar.write_bytes(data)
    done = run("data", "check", folder)
    assert done.code == 1
    assert dataset.key(2) in done.out and dataset.key(5) in done.out and dataset.key(3) not in done.out


def test_data_import(run, photos, tmp_path):
    source = tmp_path / "mine"
    for kind in ("cat", "dog"):
        (source / kind).mkdir(parents=True)
        shutil.copy(photos[0], source / kind / "1.jpg")
    Image.open(photos[1]).save(source / "cat" / "2.png")
    (source / "cat" / "3.jpg").write_bytes(b"no picture")
    (source / "cat" / "1.txt").write_text("a cat\n")
    done = run("data", "import", "folder", source, "--out", tmp_path / "folder", "--label-size", 32)
    assert done.code == 0 and "3 of 4 images imported" in done.out and "3.jpg" in done.err
    metas = [ShardDataset(tmp_path / "folder").meta(i) for i in range(3)]
    assert [meta["captions"] for meta in metas] == [["a cat"], [], []]
    assert run("data", "import", "classes", source, "--out", tmp_path / "classes").code == 0
    assert ShardDataset(tmp_path / "classes").meta(2)["class"] == "dog"
    assert run("data", "import", "tars", tmp_path / "folder", "--out", tmp_path / "tars").code == 0
    assert len(ShardDataset(tmp_path / "tars")) == 3

    captions = [{"image": "cat/1.jpg", "caption": "A cat."}, {"image": "cat/1.jpg", "caption": "One cat."}]
    questions = [{"dataset": "vqa", "image": "cat/1.jpg", "question": "A cat?", "answer": "yes", "weight": 1.0}]
    for kind, entries in (("captions", captions), ("vqa", questions)):
        (tmp_path / f"{kind}.json").write_text(json.dumps(entries))
        listed = ("data", "import", kind, tmp_path / f"{kind}.json", "--images", source, "--out", tmp_path / f"o{kind}")
        assert run(*listed).code == 0
    assert ShardDataset(tmp_path / "ocaptions").meta(0)["captions"] == ["A cat.", "One cat."]
    assert ShardDataset(tmp_path / "ovqa").meta(0)["questions"][0]["question"] == "A cat?"


# export and info


def test_export(run, model, photos, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    shutil.copytree(model, checkpoint)
    (checkpoint / STATE).write_text(json.dumps({"step": 7}))
    (checkpoint.parent / "index.json").write_text(json.dumps({"last": checkpoint.name}))
    (tmp_path / "run" / "answers.json").write_text(json.dumps(ANSWERS))
    done = run("export", tmp_path / "run", "--out", tmp_path / "model")
    assert done.code == 0 and str(tmp_path / "model") in done.out
    assert (
        run("caption", photos[0], "--model", tmp_path / "model").out == run("caption", photos[0], "--model", model).out
    )
    assert run("answer", photos[0], "What?", "--model", tmp_path / "model").out.strip() in ANSWERS
    # again over itself, but never over something else
    assert run("export", tmp_path / "run", "--out", tmp_path / "model").code == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    refused = run("export", tmp_path / "run", "--out", precious)
    assert refused.code == 2 and "not a model folder" in refused.err and (precious / "thesis.txt").exists()


def test_info(run, model):
    done = run("info", model)
    assert done.code == 0
    total = sum(p.numel() for p in Prismer.from_pretrained(model).parameters())
    assert re.search(rf"total +{total:,}\n", done.out)
    assert re.search(rf"torch +{re.escape(torch.__version__.split('+')[0])}", done.out)
    for words in ("vision_width +32\n", "label_map, reference +usable", "trainable, freeze_lang_vision", "CPU +"):
        assert re.search(words, done.out), words
    assert re.search(r"total +274,335,321\n", run("info", "base-z").out)


# what a user gets wrong


FAULTS = {  # arguments after "caption PHOTO --model COPY" or a whole command line; words of the sentence
    "no-image": ("caption {tmp}/none.jpg", "no image file {tmp}/none.jpg; check the path"),
    "folder-for-image": ("caption {tmp}", "is a folder; name the image files in it"),
    "empty-image": ("caption {tmp}/empty.jpg --model {copy}", "is empty"),
    "no-model": ("caption {photo} --model {tmp}/none", "no model folder"),
    "not-a-model": ("caption {photo} --model {tmp}", "has no config.json"),
    "unknown-device": ("caption {photo} --model {copy} --device gpu", "unknown device 'gpu'"),
    "missing-device": ("caption {photo} --model {copy} --device cuda:99", "no device cuda:99"),
    "too-many-labels": ("caption {photo} --model {copy} --labels a b", "1 pictures and 2 --labels"),
    "no-labels-file": ("caption {photo} --model {copy} --labels {tmp}/a.labels", "no labels file"),
    "empty-labels-file": ("caption {photo} --model {copy} --labels {tmp}/empty.jpg", "empty.jpg cannot be used"),
    "empty-question": ("answer {photo} ?! --model {copy}", "the question '?!' is empty"),
    "top-of-nothing": ("answer {photo} What? --top 3 --model {copy}", "--top ranks a list of answers"),
    "no-answers-file": ("answer {photo} What? --answers {tmp}/a.json --model {copy}", "which is no file"),
    "answers-not-json": ("answer {photo} What? --answers {tmp}/bad.json --model {copy}", "bad.json is not JSON"),
    "answers-not-a-list": ("answer {photo} What? --answers {copy}/config.json", "is not a list of strings"),
    "answers-binary": ("answer {photo} What? --answers {photo}", "is not UTF-8 text"),
    "answers-one": ("answer {photo} What? --answers yes,,yes", "holds 1 different texts; give at least two"),
    "answers-empty-file": ("answer {photo} What? --answers {tmp}/empty.jpg", "holds 0 different texts"),
    "classes-deep": ("classify {photo} --classes {tmp}/deep.json", "nested too deeply"),
    "classes-zero-bytes": ("classify {photo} --classes {tmp}/zeros.txt", "zero bytes"),
    "classes-long": ("classify {photo} --classes {tmp}/long.txt --model {copy}", "shorten it"),
    "classes-one": ("classify {photo} --classes cat", "give at least two"),
    "no-dataset": ("data show {tmp}", "is not a finished dataset"),
    "splits": ("data show {scenes}", "holds several datasets; name one of"),
    "show-none": ("data show {scenes}/val --start 2", "has samples 0 to 1"),
    "no-key": ("data extract {scenes}/val nobody", "has no sample nobody"),
    "render-too-small": ("data render --out {tmp}/r --size 8", "at least 32"),
    "render-negative": ("data render --out {tmp}/r --train -1", "at least 0"),
    "import-nothing": ("data import folder {empty} --out {tmp}/o", "there are no images to import"),
    "import-missing": ("data import folder {tmp}/none --out {tmp}/o", "none is not a folder"),
    "import-bad-list": ("data import vqa {tmp}/bad.json --images {tmp} --out {tmp}/o", "is not JSON"),
    "import-all-bad": ("data import folder {bad} --out {tmp}/o", "none of the 1 images could be imported"),
    "import-onto-itself": ("data import folder {bad} --out {bad}", "is the folder that is imported"),
    "import-no-threads": ("data import folder {bad} --out {tmp}/o --workers 0", "--workers is 0"),
    "export-nothing": ("export {tmp} --out {tmp}/o", "neither a run with checkpoints nor a checkpoint"),
    "info-no-preset": ("info huge-y", "unknown preset 'huge-y'"),
    "info-no-folder": ("info {tmp}/none", "no model folder"),
    "info-not-a-model": ("info {tmp}", "has no config.json"),
    "unwritable": ("data show {scenes}/val --out {tmp}/none/sheet.png", "No such file or directory"),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffcat\r\na\u2028dog\r\n"),
        ("a.json", '\ufeff["cat", "a\\u2028dog"]'),
        (None, "cat," + "a\u2028dog," * 100),
    ],
)
def test_texts_to_choose_from_are_read_as_any_text_file(tmp_path, name, text):
    if name:
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_texts(str(tmp_path / name) if name else text, "--classes") == ["cat", "a\u2028dog"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_user_is_one_sentence(run, fault, copy, photos, scenes, tmp_path):
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
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no picture")
    names = dict(
        photo=photos[0], copy=copy, scenes=scenes, tmp=tmp_path, empty=tmp_path / "empty", bad=tmp_path / "bad"
    )
    done = run(*command.format(**names).split())
    assert_sentence(done, words.format(**names))


def assert_sentence(done: Run, words: str) -> None:
    last = done.err.splitlines()[-1]
    assert done.code == 2 and last.startswith("prismer: ") and words in last, done.err
    # an import names what it skipped first
    assert all(line.startswith(("prismer: ", "skipped ")) for line in done.err.splitlines()), done.err


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
def test_a_config_that_contradicts_itself_or_its_weights(run, copy, photos, changes, words):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    assert_sentence(run("caption", photos[0], "--model", copy), words)


@pytest.mark.parametrize(
    "name, keep, words",
    [
        ("config.json", 40, "is not JSON"),
        ("model.safetensors", 1000, "is not a whole safetensors file"),
        ("model.safetensors", 0, "is not a whole safetensors file"),
        ("vocab.json", 30, "is not JSON"),
    ],
)
def test_a_model_folder_that_was_copied_in_part(run, copy, photos, name, keep, words):
    path = copy / name
    path.write_bytes(path.read_bytes()[:keep])
    assert_sentence(run("caption", photos[0], "--model", copy), words)


def test_a_model_without_tokenizer_or_experts(run, copy, photos, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (copy / name).unlink()
    assert_sentence(run("caption", photos[0], "--model", copy), "has no tokenizer")
    plain = tmp_path / "plain"
    Prismer(prismer_tiny(**SMALL, experts=())).save_pretrained(plain)
    labels = tmp_path / "a.labels"
    labels.write_bytes(b"")
    assert_sentence(run("caption", photos[0], "--model", plain, "--labels", labels), "not packed labels")
    depth_only = prismer.ExpertLabels({"depth": np.zeros((4, 4), np.uint8)})
    labels.write_bytes(pack(depth_only.planes))
    assert_sentence(run("caption", photos[0], "--model", plain, "--labels", labels), "has no experts")


def pack(planes: dict) -> bytes:
    from prismer.dataloading.store.label_maps import pack_labels

    return pack_labels(planes)


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "required: COMMAND"),
        ("paint x.jpg", "invalid choice: 'paint'"),
        ("caption", "required: IMAGE"),
        ("caption x.jpg --beams 0", "'0' is not a number of at least 1"),
        ("caption x.jpg --beam-width 3", "unrecognized arguments: --beam-width"),
        ("classify x.jpg", "required: --classes"),
        ("data", "required: COMMAND"),
        ("data import xml a --out b", "invalid choice: 'xml'"),
    ],
)
def test_argparse_has_its_own_sentences(run, command, words):
    done = run(*command.split())
    assert done.code == 2 and words in done.err and "Traceback" not in done.err


# what is not the user's fault


def raiser(body: str):
    """A function of a module of this library whose body is `body`."""
    space = {"__name__": "prismer.something"}
    exec(f"def report(model):\n    {body}", space)
    return space["report"]


@pytest.mark.parametrize(
    "body, kind",
    [
        ("int('x')", ValueError),
        ("import torch; torch.zeros(2) + torch.zeros(3)", RuntimeError),
        ("import json; json.loads('{')", ValueError),
        ("{}['x']", KeyError),
        ("raise TypeError('x')", TypeError),
        ("assert False", AssertionError),
    ],
    ids=["builtin", "torch", "library", "key", "type", "assert"],
)
def test_mistakes_of_ours_keep_their_traceback(run, monkeypatch, body, kind):
    monkeypatch.setattr("prismer.costs.info.report", raiser(body))
    with pytest.raises(kind):
        run("info")


@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError"])
def test_what_this_library_raises_is_a_sentence(run, monkeypatch, kind):
    monkeypatch.setattr("prismer.costs.info.report", raiser(f"raise {kind}('the moon is full; wait')"))
    done = run("info")
    assert (done.code, done.err) == (2, "prismer: the moon is full; wait\n")


def test_interrupt_is_quiet(run, monkeypatch):
    monkeypatch.setattr("prismer.costs.info.report", raiser("raise KeyboardInterrupt"))
    assert run("info") == Run(130, "", "")


def test_warnings_are_one_line(run, model, photos, tmp_path):
    frames = [Image.open(path) for path in photos[:2]]
    moving = tmp_path / "moving.gif"
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    done = run("caption", moving, "--model", model)
    assert done.code == 0
    assert done.err == "prismer: warning: an image has several frames or pages; only the first is used\n"


# the process


def process(*args, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prismer", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_entry_point():
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"prismer {prismer.__version__}\n")
    done = process("caption", "none.jpg")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "prismer: no image file none.jpg; check the path\n"


def test_help_imports_nothing_heavy():
    code = "import sys, prismer, prismer.cli.main; prismer.cli.main.build_parser(); dir(prismer); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "PIL", "transformers", "nvidia", "deepspeed", "tqdm"}
    assert heavy.isdisjoint(done.stdout.split())


def test_a_closed_pipe_is_quiet(scenes):
    command = [sys.executable, "-m", "prismer", "data", "check", str(scenes / "val")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (1, b"")


class Full(io.TextIOWrapper):
    """A stream on a full disk."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self):
        pass


@pytest.mark.parametrize(
    "command", ["--version", "--help", "data check --help", "info", "caption {photo} --model {model}"]
)
def test_a_full_disk_for_the_output_is_one_sentence(run, monkeypatch, photos, model, command):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        done = run(*command.format(photo=photos[0], model=model).split())
    assert done.code == 1
    assert done.err == (
        "prismer: output cannot be written: No space left on device; free some space and give the command again\n"
    )


@pytest.mark.parametrize("stream", (Full, lambda: None), ids=("full", "closed"))
def test_a_lost_stderr_changes_no_exit_code(run, monkeypatch, photos, model, tmp_path, stream):
    commands = [
        (0, ("caption", photos[0], "--model", model)),
        (2, ("caption", tmp_path / "none.jpg")),
        (2, ("caption",)),
    ]
    for code, command in commands:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream())
            assert run(*command).code == code


def test_a_closed_stdout_is_no_failure(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert run("info").code == 0
        patch.setattr(sys, "stdout", None)
        assert run("--version").code == 0


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
def test_a_full_disk_is_one_sentence(run, monkeypatch, number):
    monkeypatch.setattr("prismer.costs.info.report", raiser(f"raise OSError({number}, 'x', 'a.bin')"))
    done = run("info")
    assert (done.code, done.err) == (
        1,
        f"prismer: a.bin cannot be written: {os.strerror(number)}; free some space and give the command again\n",
    )


@pytest.mark.parametrize(
    "command",
    ["answer {photo} What\udcff?", "classify {photo} --classes a\udcff,b", "answer {photo} a --answers \udcff,b"],
)
def test_bytes_that_are_not_utf8(run, photos, model, command):
    done = run(*command.format(photo=photos[0]).split(), "--model", model)
    assert_sentence(done, "is not UTF-8; write it in UTF-8")


def test_any_name_can_be_printed(run, monkeypatch, photos, model, tmp_path):
    odd = tmp_path / os.fsdecode(b"a\xff\xc3\xa9.jpg")
    odd.write_bytes(photos[0].read_bytes())
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


def test_export_takes_what_model_takes(run, model, photos, tmp_path):
    done = run("export", "tiny", "--out", tmp_path / "tiny")
    assert done.code == 0 and f"tiny -> {tmp_path / 'tiny'}" in done.out
    question = ("answer", photos[0], "What colour is it?", "--model")
    assert run(*question, tmp_path / "tiny").out == run(*question, "tiny").out
    weights = run("export", model / "model.safetensors", "--out", tmp_path / "again")
    assert weights.code == 0 and (tmp_path / "again" / "config.json").is_file()
    same = run("export", tmp_path / "tiny", "--out", tmp_path / "tiny")
    assert_sentence(same, "is what is to be exported")
    assert (tmp_path / "tiny" / "answers.json").is_file()
    assert_sentence(run("export", "teeny", "--out", tmp_path / "x"), "no model folder teeny")


def test_public_names():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{prismer.__version__}"' in pyproject
    assert 'prismer = "prismer.cli.main:main"' in pyproject
    for name in prismer.__all__:
        assert getattr(prismer, name) is not None
    assert prismer.preset("tiny") == prismer.prismer_tiny()
    with pytest.raises(AttributeError, match="no attribute 'prism'"):
        prismer.prism  # noqa: B018
