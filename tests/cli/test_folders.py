"""Proves that `caption`, `answer` and `classify` with --out give a line for each image, in order, that each line says
what a single call says, and that a job which is killed or shared ends with the same bytes.

Run: pytest tests/cli/test_folders.py
"""

import json
import multiprocessing
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from prismer.asking import asker
from prismer.asking import job as ask_job
from prismer.asking.items import image_items, question_items
from prismer.asking.job import ask_all
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.store.label_maps import pack_labels
from prismer.dataloading.store.shards import ShardDataset
from prismer.inference import Candidates
from prismer.model import Prismer
from tests.cli.commands import ANSWERS, assert_refused
from tests.experts.stand_ins import Brightness, Halves

FORK = multiprocessing.get_context("fork")
CLASSES = ["cube", "sphere", "cone", "red", "two"]


def read(path: Path) -> list[dict]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    # at line feeds alone: a caption may hold other line ends
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


@pytest.fixture(scope="module")
def prismer(model) -> Prismer:
    return Prismer.from_pretrained(model)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one batch, so that twelve images are two parts."""
    monkeypatch.setattr(ask_job, "_batches_per_part", lambda model: 1)


def classified(prismer: Prismer, images, **options) -> list[tuple[str, float]]:
    """The classes of images, each by a call of its own."""
    names = Candidates.classes(prismer.tokenizer, CLASSES)
    answers = [prismer.classify(image, names, **options)[0] for image in images]
    return [(answer.text, pytest.approx(answer.score, abs=1e-5)) for answer in answers]


# sources


@pytest.fixture
def sources(images, scenes, tmp_path) -> dict[str, tuple[list[Path], list[str]]]:
    """Form -> the sources of the same twelve images, and their names in the result."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in images:
            tar.add(path, path.name)
    (tmp_path / "lists").mkdir()
    relative = [os.path.relpath(path, tmp_path / "lists") for path in images]
    # no line end at the end, and one of Windows
    (tmp_path / "lists" / "list.txt").write_text("\r\n".join(relative[:2]) + "\n" + "\n".join(relative[2:]))
    nested = tmp_path / "nested"
    for i, path in enumerate(images):
        folder = nested / "inner" if i >= 6 else nested
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    names = [str(path) for path in images]
    tarred = [f"{tmp_path}/a.tar/{path.stem}" for path in images]
    dataset = ShardDataset(scenes / "train")
    keys = [f"{scenes}/train/{dataset.shards[0]}/{dataset.key(i)}" for i in range(12)]
    return {
        "images": (images, names),
        "folder": ([images[0].parent], names),
        "nested": ([nested], [f"{nested}/{'inner/' if i >= 6 else ''}{path.name}" for i, path in enumerate(images)]),
        "tar": ([tmp_path / "a.tar"], tarred),
        "list": ([tmp_path / "lists" / "list.txt"], relative),
        "dataset": ([scenes / "train"], keys),
        "several": ([images[3], tmp_path / "a.tar", images[0].parent], [names[3], *tarred, *names]),
    }


@pytest.mark.parametrize("form", ["images", "folder", "nested", "tar", "list", "dataset", "several"])
def test_every_form_of_source_gives_a_line_for_each_image_in_order(
    run, model, prismer, images, scenes, sources, tmp_path, form
):
    given, names = sources[form]
    out = tmp_path / "results" / "out.jsonl"
    done = run("classify", *given, "--classes", ",".join(CLASSES), "--top", 2, "--model", model, "--out", out)
    assert done.code == 0 and done.err == ""
    assert done.out == f"{out}: {len(names)} lines\n"
    rows = read(out)
    assert [row["image"] for row in rows] == names
    assert all(row["ranked"][0] == {"class": row["class"], "score": row["score"]} for row in rows)
    expected = classified(prismer, images)
    if form == "dataset":
        # a dataset brings its own maps
        dataset = ShardDataset(scenes / "train")
        samples = [dataset[i] for i in range(12)]
        without = expected
        expected = [
            classified(prismer, [s.jpeg], labels=[ExpertLabels(s.labels, s.meta, dataset.classes)])[0] for s in samples
        ]
        assert expected != without
    if form == "several":
        expected = [expected[3], *expected, *expected]
    assert [(row["class"], row["score"]) for row in rows] == expected
    notes = json.loads((out.parent / "out.jsonl.job" / "job.json").read_text())
    assert notes["choices"] == CLASSES and notes["items"] == len(names) and notes["versions"].keys() >= {"torch"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.job"]


def test_captions_of_a_folder_are_those_of_single_calls(run, images, tmp_path):
    done = run("caption", images[0].parent, "--out", tmp_path / "out.jsonl")
    assert done.code == 0, done.err
    single = [json.loads(run("caption", path, "--json").out) for path in images[:3]]
    rows = read(tmp_path / "out.jsonl")
    assert rows[:3] == single and len({row["caption"] for row in rows}) > 3


# files that are no images


@pytest.fixture
def odd_folder(images, tmp_path) -> Path:
    """A folder with every kind of file that a user's folder holds."""
    folder = tmp_path / "odd"
    folder.mkdir()
    image = Image.open(images[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "exif.jpg", exif=exif)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(2304, dtype=np.uint16).reshape(48, 48) * 28).save(folder / "deep.png")
    image.save(folder / "w.webp")
    image.save(folder / "g.gif", save_all=True, append_images=[image.rotate(90)])
    data = images[1].read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "zero.jpg").touch()
    (folder / "text.png").write_text("no image")
    (folder / "inner.jpg").mkdir()
    shutil.copy(images[2], folder / "inner.jpg" / "x.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "nowhere.jpg").symlink_to(folder / "nothing")
    shutil.copy(images[3], folder / "a\nline.jpg")
    shutil.copy(images[4], folder / os.fsdecode(b"a\xff.jpg"))
    # texts beside images and damaged ones are no concern of a caption
    (folder / "grey.txt").write_bytes(b"\xff\xfe\0")
    os.mkfifo(folder / "pipe.jpg")
    return folder


BROKEN = {
    "cut.jpg": "is damaged",
    "zero.jpg": "is empty",
    "text.png": "is not an image",
    "self.jpg": "Too many levels of symbolic links",
    "nowhere.jpg": "No such file or directory",
    "pipe.jpg": "it is a named pipe",
}


def test_each_odd_file_gives_a_line_with_its_result_or_a_reason(run, model, prismer, odd_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    done = run("classify", odd_folder, "--classes", ",".join(CLASSES), "--model", model, "--out", out)
    assert done.code == 0
    assert f"left alone {odd_folder}/loop: a link to a folder that it lies in" in done.err
    assert "skipped " in done.err and f"... and 1 more, all in {out}" in done.err
    rows = {row["image"].removeprefix(f"{odd_folder}/"): row for row in read(out)}
    good = ["exif.jpg", "grey.jpg", "cmyk.jpg", "deep.png", "w.webp", "g.gif", "inner.jpg/x.jpg", "a\nline.jpg"]
    good.append(os.fsdecode(b"a\xff.jpg"))
    assert set(rows) == {*BROKEN, *good} and len(read(out)) == len(rows)
    for name, words in BROKEN.items():
        assert words in rows[name]["skipped"] and "class" not in rows[name], name
    results = [(rows[name]["class"], rows[name]["score"]) for name in good]
    assert results == classified(prismer, [odd_folder / name for name in good])


@pytest.mark.parametrize(
    ("chunk", "batches", "expected"),
    [
        # parts of six images, of which four and five are whole
        (32, 2, [3, 1, 3, 2]),
        # one part, read three images at a time
        (3, 4, [3, 3, 3]),
    ],
)
def test_later_images_take_the_places_of_broken_ones(prismer, images, tmp_path, monkeypatch, chunk, batches, expected):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        data = images[i].read_bytes()
        (photos / f"{i:02}.png").write_bytes(data[:200] if i in (0, 5, 6) else data)
    sizes, caption = [], prismer.caption

    def counted(batch, **options):
        sizes.append(len(batch))
        return caption(batch, **options)

    monkeypatch.setattr(prismer, "caption", counted)
    counted_lines = []

    class Bar(tqdm):
        def update(self, n=1):
            counted_lines.append(n)

    monkeypatch.setattr(ask_job, "tqdm", Bar)
    monkeypatch.setattr(asker, "_CHUNK", chunk)
    monkeypatch.setattr(ask_job, "_batches_per_part", lambda model: batches)
    ask_all(prismer, image_items([photos]), tmp_path / "out", "caption", batch_size=3, progress=False)
    assert sizes == expected and sum(counted_lines) == 12
    assert [Path(row["image"]).stem for row in read(tmp_path / "out")] == [f"{i:02}" for i in range(12)]
    assert [i for i, row in enumerate(read(tmp_path / "out")) if "skipped" in row] == [0, 5, 6]


def test_each_line_of_a_list_gives_a_line(run, model, images, tmp_path):
    (tmp_path / "x.jpg").mkdir()
    lines = [os.fsencode(images[0]), b"", b"none.jpg", b"x.jpg", b"a\0b.jpg", b"\xff.jpg", b" ", os.fsencode(images[0])]
    (tmp_path / "list.txt").write_bytes(b"\n".join(lines) + b"\n")
    assert run("caption", tmp_path / "list.txt", "--model", model, "--out", tmp_path / "o").code == 0
    rows = read(tmp_path / "o")
    assert [os.fsencode(row["image"]) for row in rows] == lines
    assert rows[0] == rows[-1] and rows[0]["caption"]
    words = ["the line is empty", "No such file", "it is a folder", "zero bytes", "No such file", "the line is empty"]
    for row, reason in zip(rows[1:-1], words, strict=True):
        assert reason in row["skipped"]


def test_a_damaged_tar_gives_its_images_and_a_line_for_the_damage(run, model, images, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in images[:3]:
            tar.add(path, path.name)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"02.jpg") + 600])
    assert run("caption", tmp_path / "a.tar", "--model", model, "--out", tmp_path / "o").code == 0
    rows = read(tmp_path / "o")
    # the image that is cut, and what may have followed it
    assert ["caption" in row for row in rows] == [True, True, False, False]
    assert "damaged or cut short" in rows[3]["skipped"]


# questions


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """The number of images in each call of the encoder."""
    counts = []
    encode = Prismer.encode

    def counting(self, batch):
        counts.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(Prismer, "encode", counting)
    return counts


def write_questions(folder: Path, images) -> tuple[Path, list[dict]]:
    questions = ["What colour is the cube?", "How many objects are there on the left of the sphere", "Is it red?"]
    rows = [
        {
            "id": f"q{i}",
            "image": os.path.relpath(images[i % 4], folder),
            "question": questions[i % 3],
            "kind": [i, None],
        }
        for i in range(12)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_questions_are_answered_in_order_from_one_encoding_of_each_image(
    run, model, prismer, images, tmp_path, encodings
):
    path, rows = write_questions(tmp_path, images)
    out = tmp_path / "out.jsonl"
    ask = ("answer", "--questions", path, "--answers", ",".join(ANSWERS), "--model", model, "--out")
    assert run(*ask, out).code == 0
    assert encodings == [4]
    answered = read(out)
    for row, result in zip(rows, answered, strict=True):
        (single,) = prismer.answer([tmp_path / row["image"]], [row["question"]], ANSWERS)
        assert result == {**row, "answer": single.text, "score": pytest.approx(single.score, abs=1e-5)}
    assert run("answer", "--questions", path, "--model", model, "--out", tmp_path / "free").code == 0
    for row, result in zip(rows, read(tmp_path / "free"), strict=True):
        assert result["answer"] == prismer.answer([tmp_path / row["image"]], [row["question"]])[0].text


def test_a_line_that_is_no_question_gives_a_line_with_the_reason(run, model, images, tmp_path):
    good = {"image": str(images[0]), "question": "What?", "id": "\ud800"}
    lines = [
        json.dumps(good).encode(),
        b"",
        b"[1]",
        b'{"image": 3, "question": "What?"}',
        json.dumps({"image": "none.jpg", "question": "What?", "id": 7}).encode(),
        json.dumps({**good, "question": "?!"}).encode(),
        json.dumps({"image": str(images[0])}).encode(),
        b'{"image": "\xff"}',
        b'{"image": "a", "question": "What?", "id": NaN}',
        b'{"image": "\\ud800", "question": "What?"}',
        json.dumps(good).encode(),
    ]
    (tmp_path / "q.jsonl").write_bytes(b"\n".join(lines))
    done = run("answer", "--questions", tmp_path / "q.jsonl", "--model", model, "--out", tmp_path / "o")
    assert done.code == 0
    rows = read(tmp_path / "o")
    assert len(rows) == len(lines) and rows[0] == rows[-1] and rows[0].items() > good.items()
    assert rows[1]["line"] == 2 and rows[4]["id"] == 7
    assert "None" not in done.err.split("skipped ", 1)[1].split(":")[0]
    reasons = ["is not JSON", "is [1]", "the 'image' of line 4 of", "No such file", "is empty", "'question' is None"]
    reasons += ["not UTF-8", "NaN is no number", "cannot be read"]
    for row, reason in zip(rows[1:-1], reasons, strict=True):
        assert reason in row["skipped"]


def test_a_field_that_the_result_needs_is_refused(run, model, images, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": str(images[0]), "question": "What?", "answer": "2"}))
    done = run("answer", "--questions", tmp_path / "q.jsonl", "--model", model, "--out", tmp_path / "o")
    assert_refused(done, "has a field 'answer', in which the result would stand; rename it")
    assert not (tmp_path / "o.job").exists()


def test_one_question_about_every_image_of_a_folder(run, model, images, tmp_path):
    ask = ("answer", images[0].parent, "How many?", "--answers", ",".join(ANSWERS), "--model", model, "--out")
    assert run(*ask, tmp_path / "o").code == 0
    rows = read(tmp_path / "o")
    assert [row["image"] for row in rows] == [str(path) for path in images]
    assert all(row["question"] == "How many?" and row["answer"] in ANSWERS for row in rows)


# text files


def test_txt_writes_beside_images_and_leaves_other_texts_alone(run, model, images, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(images[0].parent, photos)
    (photos / "broken.jpg").touch()
    (photos / "03.txt").write_text("mine")
    done = run("caption", photos, "--model", model, "--out", tmp_path / "o.jsonl", "--txt")
    assert done.code == 0 and f"left {photos}/03.txt as it is: it holds another text" in done.err
    assert (photos / "03.txt").read_text() == "mine"
    captions = {Path(row["image"]).stem: row.get("caption") for row in read(tmp_path / "o.jsonl")}
    texts = {path.stem: path.read_text() for path in photos.glob("*.txt")}
    assert texts == {**{stem: f"{text}\n" for stem, text in captions.items() if text}, "03": "mine"}
    # the same captions again are no conflict, and the folder still lists the same images
    again = run("caption", photos, "--model", model, "--out", tmp_path / "again.jsonl", "--txt")
    assert again.err.count("as it is") == 1
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "o.jsonl").read_bytes()


def test_txt_of_a_dataset_goes_into_a_folder_beside_the_result(run, model, scenes, tmp_path):
    before = sorted((scenes / "val").iterdir())
    assert run("caption", scenes / "val", "--model", model, "--out", tmp_path / "o.jsonl", "--txt").code == 0
    keys = ShardDataset(scenes / "val")
    expected = {f"{keys.key(i)}.txt": f"{row['caption']}\n" for i, row in enumerate(read(tmp_path / "o.jsonl"))}
    assert {path.name: path.read_text() for path in (tmp_path / "o-txt").iterdir()} == expected
    assert sorted((scenes / "val").iterdir()) == before


# labels


def test_a_folder_of_labels_is_used(run, model, images, scenes, tmp_path):
    dataset = ShardDataset(scenes / "train")
    for i, path in enumerate(images[:5]):
        (tmp_path / f"{path.stem}.labels").write_bytes(pack_labels(dataset[i].labels))
        # the maps of one image are whole, but its tables are not
        tables = {"instances": {} if i == 3 else dataset[i].meta["instances"], "words": dataset[i].meta["words"]}
        (tmp_path / f"{path.stem}.json").write_text(json.dumps({**tables, "classes": dataset.classes}))
    (tmp_path / "04.labels").write_bytes(b"damaged")
    ask = ("classify", images[0].parent, "--classes", ",".join(CLASSES), "--model", model, "--out")
    assert run(*ask, tmp_path / "o", "--labels", tmp_path).code == 0
    assert run(*ask, tmp_path / "without").code == 0
    assert run(*(*ask[:1], scenes / "train", *ask[2:]), tmp_path / "dataset").code == 0
    with_labels, without, own = (read(tmp_path / name) for name in ("o", "without", "dataset"))
    assert "has no entry in 'instances'" in with_labels[3]["skipped"]
    assert "04.labels cannot be used" in with_labels[4]["skipped"]
    for i, row in enumerate(with_labels):
        if i not in (3, 4):
            expected = own[i] if i < 5 else without[i]
            assert (row["class"], row["score"]) == (expected["class"], pytest.approx(expected["score"], abs=1e-5))
            assert (row["score"] == pytest.approx(without[i]["score"], abs=1e-6)) == (i >= 5)


def test_a_labeller_labels_every_image_on_the_fly(prismer, images, scenes, tmp_path):
    labeller = Labeller([Brightness(), Halves()], label_size=32)
    for source, name in ((images[0].parent, "folder"), (scenes / "train", "dataset")):
        items = image_items([source])
        ask_all(prismer, items, tmp_path / name, "classify", choices=CLASSES, labeller=labeller, progress=False)
        results = [(row["class"], row["score"]) for row in read(tmp_path / name)]
        expected = [classified(prismer, [path], labels=labeller([path]))[0] for path in images]
        assert results == expected != classified(prismer, images)


def test_an_image_whose_maps_cannot_be_used_costs_no_other_its_line(run, model, scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "val")
    (shard,) = (tmp_path / "val").glob("*.tar")
    data = shard.read_bytes()
    place = data.index(b"PLBL") + 20
    shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert run("caption", tmp_path / "val", "--model", model, "--out", tmp_path / "o").code == 0
    first, second = read(tmp_path / "o")
    assert "fail their checksum" in first["skipped"] and second["caption"]


# jobs


def test_two_processes_share_a_job_and_give_the_same_bytes(run, model, images, tmp_path, monkeypatch, small_parts):
    ask = ("caption", images[0].parent, "--model", model, "--out")
    assert run(*ask, tmp_path / "alone").code == 0
    outs = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        outs.append(run(*ask, tmp_path / "shared").out)
    assert outs[0] == f"{tmp_path}/shared: process 1 of 2 is done, 1 parts are left to other processes\n"
    assert outs[1].startswith(f"{tmp_path}/shared: 12 lines")
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_finished_job_says_so_and_a_lost_result_is_named(run, model, images, tmp_path):
    ask = ("caption", images[0].parent, "--model", model, "--out", tmp_path / "o")
    first = run(*ask)
    before = os.stat(tmp_path / "o")
    assert run(*ask) == first and os.stat(tmp_path / "o") == before
    (tmp_path / "o").unlink()
    assert_refused(run(*ask), f"is a finished job whose result {tmp_path}/o is gone; delete that folder")


@pytest.mark.parametrize("change, word", [(("--beams", 1), "beams"), (("--precision", "bf16"), "model")])
def test_other_settings_are_refused(run, model, images, tmp_path, change, word):
    ask = ("caption", images[0].parent, "--model", model, "--out", tmp_path / "o")
    run(*ask)
    before = (tmp_path / "o").read_bytes()
    assert_refused(run(*ask, *change), f"was begun with other {word}; give the same options")
    assert (tmp_path / "o").read_bytes() == before


def test_other_images_are_refused(run, model, images, tmp_path):
    shutil.copytree(images[0].parent, tmp_path / "photos")
    ask = ("caption", tmp_path / "photos", "--model", model, "--out", tmp_path / "o")
    run(*ask)
    (tmp_path / "photos" / "00.jpg").rename(tmp_path / "photos" / "renamed.jpg")
    assert_refused(run(*ask), "was begun with other images")


def test_a_result_that_the_job_did_not_write_is_not_replaced(run, model, images, tmp_path, monkeypatch, small_parts):
    ask = ("caption", images[0].parent, "--model", model, "--out", tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        assert "1 parts are left" in run(*ask).out
    (tmp_path / "o").write_text("mine")
    assert_refused(run(*ask), "has not written it yet; move one of them away")
    assert (tmp_path / "o").read_text() == "mine"


def run_slowly(model: Path, source: Path, out: Path, texts: bool = False) -> None:
    """A job of many parts that takes its time, in a process of its own."""
    # a forked process has none of its parent's OpenMP threads
    torch.set_num_threads(1)
    prismer = Prismer.from_pretrained(model)
    caption = prismer.caption

    def slow(*args, **options):
        time.sleep(0.01)
        return caption(*args, **options)

    prismer.caption = slow
    ask_job._batches_per_part = lambda model: 2
    ask_all(prismer, image_items([source]), out, "caption", batch_size=1, write_texts=texts, progress=False)


def test_a_job_that_was_killed_again_and_again_gives_the_same_bytes(model, images, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        shutil.copy(images[i % 12], photos / f"{i:02}.jpg")
    (photos / "07.jpg").write_bytes(images[0].read_bytes()[:300])
    FORK.Process(target=run_slowly, args=(model, photos, tmp_path / "whole")).start()
    draw, kills, out = random.Random(0), 0, tmp_path / "out"
    parts = tmp_path / "out.job" / "parts"
    while kills < 3:
        process = FORK.Process(target=run_slowly, args=(model, photos, out, True))
        process.start()
        wanted = len(list(parts.glob("*.jsonl"))) + draw.randint(1, 2)
        while process.is_alive() and len(list(parts.glob("*.jsonl"))) < wanted:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the job ended before it was killed: give it more images"
        kills += 1
    FORK.Process(target=run_slowly, args=(model, photos, out, True)).start()
    for process in multiprocessing.active_children():
        process.join()
        assert process.exitcode == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    rows = read(out)
    assert len(rows) == 20 and "skipped" in rows[7]
    texts = {path.stem: path.read_text() for path in photos.glob("*.txt")}
    assert texts == {Path(row["image"]).stem: f"{row['caption']}\n" for row in rows if "caption" in row}


def test_the_function_refuses_what_makes_no_job(prismer, images, tmp_path):
    items = image_items(images[:1])
    for task, options, words in (
        ("describe", {}, "choose caption, answer, classify"),
        ("classify", {}, "give the texts to choose from"),
        ("answer", {"top": 1}, "give the texts to choose from"),
        ("answer", {"write_texts": True}, "text files are for captions"),
        ("caption", {"batch_size": -1}, "batch_size is -1"),
        ("caption", {"rank": 2, "world": 2}, "ranks count from 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ask_all(prismer, items, tmp_path / "o", task, progress=False, **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        question_items(tmp_path / "none.jsonl")
