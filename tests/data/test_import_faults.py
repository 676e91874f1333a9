"""Proves that what is odd in a source costs itself alone: every file, member and entry is imported or named.

python -m pytest -q tests/data/test_import_faults.py
"""

import errno
import gzip
import json
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismer.cli.main import main
from prismer.dataloading.feed.load_image import load_image
from prismer.dataloading.feed.rgb import to_jpeg
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.sources import image_folders as folders
from prismer.dataloading.sources import importer as importers
from prismer.dataloading.sources.class_folders import class_records
from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.sources.vqa_questions import vqa_records
from prismer.dataloading.sources.webdataset_tars import tar_records
from prismer.dataloading.store import writer as shard_writer
from prismer.dataloading.store.shards import ShardDataset
from prismer.reading import lines_of, parse_json, read_lines
from tests.data.test_importers import add, encode, make_folder, picture, run, write, write_labels

DEEP = "[" * 3000


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def captions_of(samples):
    return {key: sample.meta["captions"] for key, sample in samples.items()}


def others_of(report, root):
    return {os.path.relpath(o["file"], root): o["reason"] for o in report.others}


# --- texts are read one way


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb\r\nc\rd", ["a", "b", "c", "d"]),
        ("a\u2028b\x0cc\x85d\x1ee\x0bf\n", ["a\u2028b\x0cc\x85d\x1ee\x0bf"]),
        ("a\n\nb", ["a", "", "b"]),
        ("", []),
    ],
)
def test_lines(tmp_path, text, lines):
    assert lines_of(text) == lines
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_lines(tmp_path / "a.txt") == lines, "a byte-order mark is no letter"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DEEP.encode(), "nested too deeply"),
        (b'{"a": 1, "a": 2}', "gives the key 'a' twice"),
        (b"\xff", "not UTF-8"),
        ("[]".encode("utf-16"), "not UTF-8"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
    ],
    ids=["deep", "twice", "bytes", "utf-16", "number"],
)
def test_json_ends_in_one_sentence(data, message):
    with pytest.raises(ValueError, match=f"^x .*{message}"):
        parse_json(data, "x")
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]


def test_no_file_has_zero_bytes_in_its_name():
    with pytest.raises(ValueError, match="cannot be read .no file has zero bytes"):
        read_lines("a\0b")


# --- lists


def test_a_question_list_is_no_caption_list(tmp_path):
    write(tmp_path / "in/a.jpg", encode(picture()))
    question = {"image": "a.jpg", "question": "what?", "answer": "a cat"}
    lists = tmp_path / "l.json"
    lists.write_text(json.dumps([{"image": "a.jpg", "caption": "a cat"}, question]))
    _, report = run(caption_records(lists, tmp_path / "in"), tmp_path / "out")
    (skipped,) = report.skipped
    assert "has a question and no caption; import it with `vqa`" in skipped["reason"]


@pytest.mark.parametrize(
    "fault",
    [
        5,
        None,
        [],
        "a.jpg",
        {},
        {"image": None},
        {"image": ["a.jpg"]},
        {"image": {"a.jpg": 1}},
        {"image": "."},
        {"image": "a\0.jpg"},
        {"image": "\ud800.jpg"},
        {"image": "../a.jpg"},
        {"caption": 5},
        {"caption": None},
        {"caption": {"a cat": 1}},
        {"caption": ""},
        {"caption": ["a", None]},
        {"caption": "\ud800"},
        {"caption": True},
        {"caption": float("nan")},
        {"img_id": []},
        {"img_id": {"a": 1}},
        {"img_id": None},
        {"img_id": True},
    ],
    ids=repr,
)
def test_a_bad_entry_of_a_caption_list_costs_itself_alone(tmp_path, fault):
    write(tmp_path / "in/a.jpg", encode(picture()))
    bad = {"image": "a.jpg", "caption": "a dog", **fault} if isinstance(fault, dict) and fault else fault
    lists = tmp_path / "l.json"
    lists.write_text(json.dumps([{"image": "a.jpg", "caption": "a cat"}, bad]))
    samples, report = run(caption_records(lists, tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {"a": ["a cat"]}
    (skipped,) = report.skipped
    assert skipped["reason"].startswith(f"entry 1 of {lists} ")


@pytest.mark.parametrize(
    "fault",
    [
        {"question": None},
        {"question": 5},
        {"question": ""},
        {"question": ["who?"]},
        {"question": "\ud800"},
        {"dataset": []},
        {"dataset": {}},
        {"dataset": "gqa"},
        {"question_id": []},
        {"question_id": None},
        {"answer": None},
        {"answer": 5},
        {"answer": ""},
        {"answer": {"yes": 10}},
        {"answer": ["a", 5]},
        {"answer": [["a"]]},
        {"weight": "1"},
        {"weight": None},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"weight": -1},
        {"weight": 0},
        {"weight": 10**400},
        {"weight": True},
        {"weight": []},
        {"answers": ["b"]},
        {"question_id": 1, "question": "another?"},
    ],
    ids=lambda fault: ascii(fault)[:40],
)
def test_a_bad_entry_of_a_question_list_costs_itself_alone(tmp_path, fault):
    write(tmp_path / "in/a.jpg", encode(picture()))
    good = {"image": "a.jpg", "question": "what?", "answer": "cat", "weight": 0.4, "question_id": 1}
    bad = {"image": "a.jpg", "question": "who?", "answer": "a", "question_id": 2, **fault}
    lists = tmp_path / "l.json"
    lists.write_text(json.dumps([bad, good][:: 1 if fault.get("question_id") != 1 else -1]))
    samples, report = run(vqa_records([lists], tmp_path / "in"), tmp_path / "out")
    (question,) = samples["a"].meta["questions"]
    assert (question["question"], question["answers"]) == ("what?", [{"answer": "cat", "weight": 0.4}])
    assert len(report.skipped) == 1 and f" of {lists} " in report.skipped[0]["reason"]


def test_raw_answers_of_ten_people_are_kept_in_their_order(tmp_path):
    write(tmp_path / "in/a.jpg", encode(picture()))
    given = ["red", "red", "dark red", "red", "maroon", "red", "red", "red", "brown", "dark red"]
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(given)]
    lists = write(
        tmp_path / "l.json",
        [
            {"image": "a.jpg", "question": "colour?", "answers": answers},
            {"image": "a.jpg", "question": "same?", "answer": given},
            {"image": "a.jpg", "question": "shares?", "answer": "red", "weight": 0.6},
            {"image": "a.jpg", "question": "shares?", "answer": "brown", "weight": 0.4},
        ],
    )
    samples, _ = run(vqa_records([lists], tmp_path / "in"), tmp_path / "out")
    asked = {q["question"]: q for q in samples["a"].meta["questions"]}
    assert asked["colour?"]["raw_answers"] == asked["same?"]["raw_answers"] == given
    assert asked["colour?"]["answers"][0] == {"answer": "red", "weight": 0.6}
    assert "raw_answers" not in asked["shares?"], "nobody knows who said what"


def test_a_key_given_twice_is_named(tmp_path):
    write(tmp_path / "in/a.jpg", encode(picture()))
    entries = '[{"image": "a.jpg", "caption": "a"}, {"image": "a.jpg", "caption": "b", "caption": "c"}]'
    lists = write(tmp_path / "l.json", entries)
    samples, report = run(caption_records(lists, tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {"a": ["a"]} and "one key twice" in report.skipped[0]["reason"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}, "COCO captions.*--captions-file"),
        ({"questions": [{"question": "a", "image_id": 1}]}, "VQAv2 questions.*data import vqa"),
        ({"annotations": [{"question_id": 1, "answers": []}]}, "VQAv2 annotations.*by question_id"),
        ({"annotations": [{"bbox": [], "category_id": 1}]}, "COCO objects"),
        ({"images": [{"sentences": [{"raw": "a"}]}], "dataset": "coco"}, "Karpathy"),
        ({"images": [{"file_name": "a"}]}, "file_name"),
        ({"image": "a.jpg"}, "one entry"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}', "JSON lines"),
        ([{"id": 1, "qas": []}], "has no 'image' .it has id, qas."),
        (5, "name the list"),
    ],
)
@pytest.mark.parametrize("kind", ["captions", "vqa"])
def test_published_formats_are_recognised(tmp_path, capsys, content, message, kind):
    (tmp_path / "in").mkdir()
    lists = write(tmp_path / "l.json", content)
    command = ["data", "import", kind, str(lists), "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        caption_records(lists, tmp_path / "in")


def test_reference_ids_are_the_same_as_number_and_text(tmp_path):
    for i in (7, 8):
        write(tmp_path / f"in/{i}.jpg", encode(picture()))
    lists = write(tmp_path / "l.json", [{"image": "7.jpg"}, {"image": "8.jpg"}, {"image": "gone.jpg"}])
    annotations = [{"image_id": "7", "caption": "a"}, {"image_id": 8, "caption": "b"}]
    annotations += [{"image_id": 9, "caption": "c"}, {"image_id": 8, "caption": 5}, {"image_id": 8}, "x"]
    reference = write(tmp_path / "gt.json", {"annotations": annotations})
    records = caption_records(lists, tmp_path / "in", captions_file=reference)
    samples, report = run(records, tmp_path / "out")
    assert captions_of(samples) == {"7": ["a"], "8": ["b"]}
    reasons = [entry["reason"] for entry in report.skipped]
    assert [n for n in (3, 4, 5) if any(r.startswith(f"annotation {n} of") for r in reasons)] == [3, 4, 5]
    assert [o["reason"] for o in report.others] == [
        "1 image ids belong to no image of the list, the first 9",
        "it has no captions of 1 images of the list, the first gone.jpg",
    ]


def test_a_reference_that_matches_nothing_is_refused(tmp_path):
    write(tmp_path / "in/7.jpg", encode(picture()))
    lists = write(tmp_path / "l.json", [{"image": "7.jpg"}])
    reference = write(tmp_path / "gt.json", {"annotations": [{"image_id": "x7", "caption": "a"}]})
    with pytest.raises(ValueError, match="no image of the list has an id of .*'x7', the list 7"):
        caption_records(lists, tmp_path / "in", captions_file=reference)


def test_images_that_no_list_names_are_counted(tmp_path):
    for name in ("a.jpg", "b.jpg", "deep/er/c.PNG"):
        write(tmp_path / "in" / name, encode(picture()))
    lists = write(tmp_path / "l.json", [{"image": "a.jpg", "caption": "a", "question": "what?"}])
    for records in (caption_records(lists, tmp_path / "in"), vqa_records([lists], tmp_path / "in")):
        (other,) = records.others
        assert other.reason == "2 images that no list names, the first b.jpg"


# --- folders


def test_every_file_of_a_folder_is_imported_or_named(tmp_path):
    root = tmp_path / "in"
    for name in ("a.jpg", "B.JPEG", "c.jfif", "deep/er/d.Jpg", "x.y.jpg"):
        write(root / name, encode(picture()))
    write(root / "e.avif", b"not an avif")
    write(root / "f.heic", b"\0\0\0\x18ftypheic")
    write(root / "a.TXT", "from upper case")
    write(root / "deep/er/d.txt", "\ufefffrom the deep\u2028still the first line\nsecond")
    write(root / "x.y.json", {"caption": ["one", "two"], "url": "u", "license": 3})
    write(root / "stray.txt", "a text alone")
    write(root / "notes.npy", b"1")
    write(root / ".DS_Store", b"1")
    write(root / "deep/._d.jpg", b"1")
    for folder in (".git", "@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        write(root / folder / "a.jpg", encode(picture()))
    samples, report = run(folder_records(root), tmp_path / "out")
    texts = sorted(captions_of(samples).values())
    assert texts == [[], [], ["from the deep\u2028still the first line"], ["from upper case"], ["one", "two"]]
    assert sorted(Path(s["image"]).name for s in report.skipped) == ["e.avif", "f.heic"]
    assert others_of(report, root) == {
        "stray.txt": "a text without an image",
        "notes.npy": "not an image or a text by its name",
        **dict.fromkeys(
            (".DS_Store", "deep/._d.jpg", ".git", "@eaDir", "__MACOSX", ".ipynb_checkpoints"), "hidden, or of a tool"
        ),
    }


@pytest.mark.parametrize(
    "notes",
    [
        "5",
        "null",
        "[]",
        '"text"',
        "",
        "{",
        DEEP,
        '{"caption": 5}',
        '{"caption": {"a cat": 1}}',
        '{"caption": ["a", 5]}',
        '{"caption": "\\ud800"}',
        '{"caption": "a", "caption": "b"}',
        '{"caption": "..."}',
        b'{"caption": "\xff"}',
        '{"caption": "a", "url": ["u"]}',
        '{"caption": "a", "url": "\\ud800"}',
        '{"caption": NaN}',
    ],
    ids=lambda notes: ascii(notes)[:40],
)
@pytest.mark.parametrize("packing", ["folder", "tar"])
def test_a_bad_json_beside_an_image_is_skipped_and_named(tmp_path, notes, packing):
    notes = notes if isinstance(notes, bytes) else notes.encode()
    files = {"a.jpg": encode(picture()), "a.json": notes, "b.jpg": encode(picture()), "b.txt": b"good"}
    (tmp_path / "in").mkdir()
    if packing == "tar":
        with tarfile.open(tmp_path / "in/t.tar", "w") as tar:
            for name, data in files.items():
                add(tar, name, data)
        records = tar_records(tmp_path / "in")
    else:
        for name, data in files.items():
            write(tmp_path / "in" / name, data)
        records = folder_records(tmp_path / "in")
    samples, report = run(records, tmp_path / "out")
    assert list(captions_of(samples).values()) == [["good"]]
    assert len(report.skipped) == 1 and report.skipped[0]["key"].endswith("a")


@pytest.mark.parametrize("caption", ["null", '""', "[]", '["", null]'])
def test_no_caption_is_no_fault(tmp_path, caption):
    write(tmp_path / "in/a.jpg", encode(picture()))
    write(tmp_path / "in/a.json", f'{{"caption": {caption}, "similarity": NaN}}')
    samples, _ = run(folder_records(tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {"a": []}


def test_json_beside_a_text_keeps_its_fields(tmp_path):
    write(tmp_path / "in/a.jpg", encode(picture()))
    write(tmp_path / "in/a.txt", "the caption")
    write(tmp_path / "in/a.json", {"caption": "other", "url": "http://a", "license": "CC0"})
    samples, _ = run(folder_records(tmp_path / "in"), tmp_path / "out")
    meta = samples["a"].meta
    assert (meta["captions"], meta["url"], meta["license"]) == (["the caption"], "http://a", "CC0")


def odd_files(root):
    """Files of every kind that is no file, named like images and texts."""
    write(root / "good.jpg", encode(picture()))
    for name in ("fifo.jpg", "good.txt.jpg.fifo"):
        os.mkfifo(root / name)
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "up").symlink_to(root, target_is_directory=True)
    write(root / "text.jpg", encode(picture()))
    os.mkfifo(root / "text.txt")
    write(root / "huge.jpg", b"")
    os.truncate(root / "huge.jpg", 2**40)
    with socket.socket(socket.AF_UNIX) as server:
        # an address may have 107 bytes
        before = os.getcwd()
        os.chdir(root)
        server.bind("socket.jpg")
        os.chdir(before)
    write(Path(os.fsdecode(os.fsencode(root) + b"/\xff.jpg")), encode(picture()))
    return root


def test_what_is_no_file_neither_hangs_nor_ends_an_import(tmp_path):
    root = odd_files(tmp_path / "in")
    samples, report = run(folder_records(root), tmp_path / "out")
    assert len(samples) == 2 and "good" in samples, "and the one whose name is not UTF-8"
    reasons = {Path(s["image"]).stem: s["reason"] for s in report.skipped}
    assert set(reasons) == {"fifo", "dangling", "loop", "device", "text", "huge", "socket"}
    assert "named pipe" in reasons["fifo"] and "a device" in reasons["device"]
    assert others_of(report, root) == {
        "up": "a link to a folder that it lies in",
        "good.txt.jpg.fifo": "not an image or a text by its name",
    }


def test_a_name_that_is_no_utf8_is_written_so_that_it_can_be_read(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    for name in (b"\xff.jpg", b"\xfe.txt"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"junk")
    write(root / "good.jpg", encode(picture()))
    assert main(["data", "import", "folder", str(root), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 images imported, 1 skipped" in out and r"\udcff.jpg" in err and r"\udcfe.txt" in err
    report = json.loads((tmp_path / "out/import-report.json").read_text("utf-8"))
    assert report["skipped"][0]["image"].endswith(r"\udcff.jpg")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    for name in ("a/a.jpg", "b/b.jpg"):
        write(tmp_path / "in" / name, encode(picture()))
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    # who runs the tests may be root, whom no mode stops
    monkeypatch.setattr(folders.os, "scandir", refuse)
    samples, report = run(folder_records(tmp_path / "in"), tmp_path / "out")
    assert list(samples) == ["b--b"]
    assert others_of(report, tmp_path / "in") == {"a": "the folder cannot be read (Permission denied)"}


def test_a_dataset_inside_a_folder_of_photos_is_not_imported_again(tmp_path):
    write(tmp_path / "in/a.jpg", encode(picture()))
    for _ in range(2):
        samples, _ = run(folder_records(tmp_path / "in"), tmp_path / "in/out")
        write(tmp_path / "in/out/preview/shard-000000.jpg", encode(picture()))
        assert list(samples) == ["a"]


# --- classes


def test_tool_folders_are_no_classes_and_deeper_images_are_of_the_outermost(tmp_path):
    for name in ("cat/a", "dog/b", "dog/more/c", ".ipynb_checkpoints/a", "@eaDir/a", "__MACOSX/a"):
        write(tmp_path / "in" / f"{name}.jpg", encode(picture()))
    write(tmp_path / "in/loose.jpg", encode(picture()))
    write(tmp_path / "in/cat/a.txt", "a text")
    samples, report = run(class_records(tmp_path / "in"), tmp_path / "out")
    assert {key: sample.meta["class"] for key, sample in samples.items()} == {
        "cat--a": "cat",
        "dog--b": "dog",
        "dog--more--c": "dog",
    }
    assert ShardDataset(tmp_path / "out").classes["class"] == ["cat", "dog"]
    named = others_of(report, tmp_path / "in")
    assert named.pop("cat/a.txt").startswith("the first of 1 texts")
    assert named.pop("loose.jpg") == "it lies in no class folder"
    assert set(named) == {".ipynb_checkpoints", "@eaDir", "__MACOSX"}


def test_folders_with_one_class_name_are_said(tmp_path):
    for name in ("n1/a.jpg", "n2/b.jpg", "n3/c.jpg"):
        write(tmp_path / "in" / name, encode(picture()))
    classes = write(tmp_path / "c.json", {"n1": "crane", "n2": "crane", "n3": "cat"})
    with pytest.warns(UserWarning, match=r"2 folders .* n1 \(crane\), n2 \(crane\)"):
        records = class_records(tmp_path / "in", classes=classes)
    assert records.class_names == ["crane", "cat"]


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        ({"n1": 0, "n2": 1}, {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}, "not a list of class"),
        ({"n1": 0, "n2": 1}, [["n01440764", "tench"], ["n01443537", "goldfish"]], "not a list of class"),
        ({"n1": 0, "n2": 1}, [0, 1], "not a list of class"),
        ({"n1": 0, "n2": 1}, ["tench", ""], "not a list of class"),
        ({"0": ["n1", "tench"], "1": ["n2", "goldfish"]}, None, "no name for n1"),
        ({"n1": True, "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": 1.0, "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": -1, "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": [0], "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": 0, "n2": 1}, None, "names with --names"),
        ([0, 1], None, "names with --names"),
        ([["tench"], ["goldfish"]], None, "no name for n1"),
        ("5", None, "holds one int"),
        ('"tench"', None, "holds one str"),
        ('{"n1": "a", "n1": "b", "n2": "c"}', None, "'n1' twice"),
    ],
)
def test_a_class_table_of_another_schema_is_refused(tmp_path, classes, names, message):
    for name in ("n1/a.jpg", "n2/b.jpg"):
        write(tmp_path / "in" / name, encode(picture()))
    classes = write(tmp_path / "c.json", classes)
    names = None if names is None else write(tmp_path / "n.json", names)
    with pytest.raises(ValueError, match=message):
        class_records(tmp_path / "in", classes=classes, names=names)


# --- tars


def make_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)


def test_members_of_one_name_belong_together_wherever_they_lie(tmp_path):
    """GNU tar --sort=name and some tools write all images first."""
    members = [(f"{i}.jpg", encode(picture(i))) for i in range(3)]
    members += [(f"{i}.txt", f"caption {i}".encode()) for i in range(3)]
    members += [(f"{i}.json", b'{"caption": "no", "url": "u"}') for i in range(3)]
    make_tar(tmp_path / "in/t.tar", members)
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {f"t--{i}": [f"caption {i}"] for i in range(3)}
    assert all(sample.meta["url"] == "u" for sample in samples.values()) and report.skipped == []


def test_every_member_is_imported_or_named(tmp_path):
    jpeg = encode(picture())
    members = [
        ("photo.v2.jpg", jpeg),
        ("photo.v2.txt", b"two dots"),
        ("photo.v3.JPG", jpeg),
        ("a.jpg", jpeg),
        ("a.seg.png", b"1"),
        ("a.cls", b"3"),
        ("b.jpg", jpeg),
        ("b.cls", b"4"),
        ("b.png", jpeg),
        ("c.jpg", jpeg),
        ("c.txt", b"first"),
        ("c.jpg", jpeg),
        ("c.txt", b"second"),
        ("._a.jpg", b"1"),
        ("alone.txt", b"no image"),
    ]
    make_tar(tmp_path / "in/t.tar", members)
    with tarfile.open(tmp_path / "in/t.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    write(tmp_path / "in/u.tar.gz", b"1")
    write(tmp_path / "in/notes.csv", b"1")
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    assert sorted(captions_of(samples).values()) == [[], [], [], ["first"], ["two dots"]]
    reasons = [entry["reason"] for entry in report.skipped]
    for start in ("b.png: its sample has", "c.jpg: t.tar holds", "c.txt: t.tar holds", "no image in t.tar"):
        assert sum(reason.startswith(start) for reason in reasons) == 1, start
    assert sum("is a link or no plain file" in reason for reason in reasons) == 4
    assert len(reasons) == 8
    left = sorted(o["reason"] for o in report.others)
    assert left == [
        "1 members ending in .seg.png, which are not read",
        "1 members that are hidden files, which are not read",
        "2 members ending in .cls, which are not read",
        "compressed; unpack it to a .tar to import it",
        "not a tar; the tars of one folder are read",
    ]


def test_a_tar_that_is_none_is_named(tmp_path):
    make_tar(tmp_path / "in/a.tar", [("a.jpg", encode(picture()))])
    write(tmp_path / "in/b.tar", gzip.compress((tmp_path / "in/a.tar").read_bytes()))
    os.mkfifo(tmp_path / "in/c.tar")
    (tmp_path / "in/d.tar").mkdir()
    write(tmp_path / "in/e.tar", b"")
    (tmp_path / "in/f.tar").symlink_to("f.tar")
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    assert list(samples) == ["a--a"] and len(report.skipped) == 5
    assert any("named pipe" in entry["reason"] for entry in report.skipped)


def test_compressed_tars_alone_are_named(tmp_path):
    write(tmp_path / "in/a.tar.gz", b"1")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed, unpack it"):
        tar_records(tmp_path / "in")


def test_a_fault_does_not_count_as_imported_on_resume(tmp_path):
    make_tar(tmp_path / "in/t.tar", [("a.jpg", encode(picture())), ("a.jpg", encode(picture(1)))])
    for _ in range(2):
        _, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
        assert (report.imported, len(report.skipped)) == (1, 1)


# --- images and labels


def broken_png():
    """A PNG of which one block in the middle is damaged."""
    rng = np.random.default_rng(0)
    data = bytearray(encode(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG"))
    data[len(data) // 2] ^= 255
    return bytes(data)


def test_one_rule_decides_what_decodes(tmp_path):
    data = broken_png()
    for whole in (True, False):
        with pytest.raises(ValueError, match="cannot be decoded"):
            to_jpeg(data, whole=whole)
    with pytest.raises(ValueError):
        load_image(data, 32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("obj_detection/{}.json", DEEP),
        ("obj_detection/{}.json", '{"0": 1e999}'),
        ("obj_detection/{}.json", '{"0": 0.5}'),
        ("ocr_detection/{}.pt", "fifo"),
        ("depth/{}.png", "folder"),
        ("obj_detection/{}.json", '{"0": true, "1": 0}'),
        ("obj_detection/{}.json", '{"0": 1, "0": 0, "1": 0}'),
        ("obj_detection/{}.json", "[]"),
        ("obj_detection/{}.json", '{"x": 1}'),
        ("obj_detection/{}.json", "fifo"),
        ("seg_coco/{}.png", "fifo"),
        ("depth/{}.png", "loop"),
    ],
    ids=lambda value: value[:20],
)
def test_odd_label_files_are_named(tmp_path, name, content):
    for i in (1, 2):
        write(tmp_path / f"data/vqav2/train2014/{i}.jpg", encode(picture()))
        write_labels(tmp_path / "labels", stem=f"train2014/{i}")
    entries = [{"image": f"train2014/{i}.jpg", "caption": "a"} for i in (1, 2)]
    expert, file = name.format(1).split("/")
    path = tmp_path / "labels" / expert / "vqav2/train2014" / file
    path.unlink()
    if content == "fifo":
        os.mkfifo(path)
    elif content == "loop":
        path.symlink_to(path.name)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(content)
    records = caption_records(write(tmp_path / "l.json", entries), tmp_path / "data", labels=tmp_path / "labels")
    tables = {"seg": ["person", "sky", "tree"], "obj_detection": ["cup", "dog"]}
    samples, report = run(records, tmp_path / "out", class_tables=tables)
    assert list(samples) == ["train2014--2"]
    assert str(path) in report.skipped[0]["reason"]


# --- a full disk


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("when", ["tar", "sidecar", "index", "report"])
def test_a_full_disk_leaves_what_was_whole(tmp_path, monkeypatch, when):
    records = make_folder(tmp_path / "in", 6)
    settings = {"source": "test", "samples_per_shard": 2, "progress": False}

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    real, count = shard_writer.OpenShard._put, [0]

    def put(self, data):
        count[0] += 1
        if count[0] > 15:
            full()
        real(self, data)

    with monkeypatch.context() as patch:
        if when == "tar":
            patch.setattr(shard_writer.OpenShard, "_put", put)
        elif when == "index":
            patch.setattr(shard_writer, "write_together", full)
        else:
            place = shard_writer if when == "sidecar" else importers
            patch.setattr(place, "write_atomically", full)
        with pytest.raises(OSError) as caught:
            import_records(records, tmp_path / "out", **settings)
    assert caught.value.errno == errno.ENOSPC
    left = left_in(tmp_path / "out")
    assert not [name for name in left if name.endswith(".partial") or name == ".writer.lock"]
    tars = {name[:12] for name in left if name.endswith(".tar")}
    assert tars == {name[:12] for name in left if name.startswith("shard") and name.endswith(".json")}
    report = import_records(records, tmp_path / "out", **settings)
    assert report.imported == 6
    import_records(records, tmp_path / "whole", **settings)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("shard-*")} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").glob("shard-*")
    }


def test_a_full_disk_under_the_renderer_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.OpenShard, "_put", full)
        with pytest.raises(OSError):
            render_dataset(tmp_path / "out", train=2, val=0, test=0, size=32, label_size=32, workers=1, progress=False)
    assert left_in(tmp_path / "out") == [".scenes.lock"]


@pytest.mark.parametrize("command", ["show", "extract"])
def test_a_full_disk_under_show_and_extract_leaves_nothing(tmp_path, monkeypatch, command):
    run(make_folder(tmp_path / "in", 1), tmp_path / "data")
    (tmp_path / "out").mkdir()
    key = ["00000--000"] if command == "extract" else []
    out = tmp_path / "out" if key else tmp_path / "out/sheet.png"
    written = []

    def full(handle):
        # the first file of a sample is whole when the second fails
        written.append(handle)
        if len(written) > 2 * bool(key):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["data", command, str(tmp_path / "data"), *key, "--out", str(out)]) > 0
    assert left_in(tmp_path / "out") == []
