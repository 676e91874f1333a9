"""Proves that an import of anything ends in samples and names: in = imported + named, for folders, lists and tars.

python -m pytest -q tests/faults/test_import.py
"""

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from anything import anything, cases, damaged, dump, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prismer.cli import _is_a_sentence
from prismer.dataloading.check import check_dataset
from prismer.dataloading.folders import IMAGE_SUFFIXES
from prismer.dataloading.importers import import_records
from prismer.dataloading.records import (
    caption_records,
    class_records,
    folder_records,
    tar_records,
    vqa_records,
)
from prismer.dataloading.shards import ShardDataset
from prismer.reading import printable


def encoded(form="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).astype(np.uint8).reshape(10, 20, 3)).save(
        file, form
    )
    return file.getvalue()


TYPES = {
    "fifo": tarfile.FIFOTYPE, "dangling": tarfile.SYMTYPE, "loop": tarfile.LNKTYPE, "up": tarfile.DIRTYPE,
}  # fmt: skip
JPEG, PNG = encoded(), encoded("PNG")
NOTES = {
    "caption": "a cat",
    "url": "http://a/b",
    "license": 3,
    "similarity": 0.3,
    "captions": ["a", "b"],
}

names = st.sampled_from(
    [
        "a",
        "b",
        "a.b",
        "a.b.c",
        ".a",
        "._a",
        "A",
        "a b",
        "a\nb",
        "é",
        "\udcff",
        "a\u2028b",
        "\U0001f600",
        "x" * 200,
        "#",
    ]
)
suffixes = st.sampled_from(
    ".jpg .jpg .jpg .JPG .png .jfif .avif .heic .txt .txt .TXT .json .json .npy .gz".split() + [""]
)
folders = st.sampled_from(
    ["", "", "c1", "c1", "c2", "c1/deep", "c1/deep/deeper", ".git", "@eaDir", "x.jpg", "c_1", "é"]
)
texts = st.sampled_from(
    [
        b"a cat",
        b"",
        b" ",
        b"\xff",
        b"\xff\xfea\0",
        b"\xef\xbb\xbfa",
        b"a\x0cb\r\nc",
        "a\u2028b".encode(),
        b"...",
        b"\0",
    ]
)
notes = st.one_of(
    anything.map(dump),
    mutated(NOTES).map(dump),
    st.sampled_from([b"{" * 5000, b'{"caption":"a","caption":"b"}']),
)
contents = st.one_of(
    st.just(JPEG), st.just(JPEG), st.just(PNG), damaged(JPEG), damaged(PNG), texts, notes,
    st.sampled_from(["fifo", "dangling", "loop", "up"]),
)  # fmt: skip
trees = st.dictionaries(st.tuples(folders, names, suffixes), contents, min_size=1, max_size=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One folder for all cases, emptied before each: thousands of them would take minutes to remove."""
    return tmp_path_factory.mktemp("case")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def suited(content, suffix):
    """Mostly what the suffix promises, so that something is imported."""
    if isinstance(content, bytes) and suffix == ".txt" and content in (JPEG, PNG):
        return b"a caption"
    if isinstance(content, bytes) and suffix == ".json" and content in (JPEG, PNG):
        return dump(NOTES)
    return content


def plant(root, tree):
    root.mkdir()
    for (folder, name, suffix), content in tree.items():
        path = root / folder / (name + suffix)
        # a file may have taken the name of a folder
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "fifo":
                os.mkfifo(path)
            elif content == "dangling":
                path.symlink_to(root / "nowhere")
            elif content == "loop":
                path.symlink_to(path.name)
            elif content == "up":
                path.symlink_to(path.parent, target_is_directory=True)
            elif not path.is_symlink() and not path.exists():
                path.write_bytes(suited(content, suffix))
    return root


def attempt(make, out, **settings):
    """The keys imported and the report; (None, None) where the source as a whole is refused in a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = make()
            report = import_records(
                records, out, source="test", progress=False, workers=1, label_size=8, **settings
            )
    except ValueError as error:
        assert _is_a_sentence(error), error
        return None, None
    assert report.records == report.imported + len(report.skipped) == len(records)
    stored = json.loads((out / "import-report.json").read_text("utf-8"))
    assert stored["skipped"] == report.skipped and stored["others"] == report.others
    dataset = ShardDataset(out)
    assert len(dataset) == report.imported
    checked = check_dataset(out, progress=False)
    assert checked.ok, checked.lines()
    return {dataset.key(i) for i in range(len(dataset))}, report


def files_in(root):
    """Every file below a folder; links to folders are not followed, as they are named themselves."""
    for folder, inner, found in os.walk(root):
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in [*found, *links])


def is_named(path, root, report):
    others = {entry["file"] for entry in report.others}
    return any(
        printable(str(p)) in others for p in (path, *path.parents) if root in (p, *p.parents)
    )


@cases(250)
@given(tree=trees, as_classes=st.booleans())
def test_every_file_of_a_folder_is_imported_or_named(base, tree, as_classes):
    empty(base)
    root = plant(base / "in", tree)
    keys, report = attempt(
        lambda: (class_records if as_classes else folder_records)(root), base / "out"
    )
    if report is None:
        return
    files = list(files_in(root))
    images = [
        p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and not is_named(p, root, report)
    ]
    skipped = [entry["image"] for entry in report.skipped]
    left = [p for p in images if printable(str(p)) not in skipped]
    assert len(left) == report.imported, (left, report)
    stems = {p.with_suffix("") for p in images}
    for path in set(files) - set(images):
        beside = path.suffix.lower() in (".txt", ".json") and path.with_suffix("") in stems
        assert beside or is_named(path, root, report), path


ENTRIES = [
    {"image": "a.jpg", "caption": "a cat", "img_id": 7, "dataset": "vqa", "question": "what?", "answer": "cat",
     "question_id": 1},
    {"image": "sub/b.jpg", "caption": ["a dog", "dogs"], "dataset": "vg", "question": "who?",
     "answer": ["x", "y", "x"], "weight": 0.5},
    {"image": "a.jpg", "caption": "cats", "question": "what?", "question_id": 1,
     "answers": [{"answer": "no"}, {"answer": "yes"}]},
    {"image": "gone.jpg", "caption": "nothing", "question": "where?", "answer": "here", "weight": 1.0},
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "sub").mkdir()
    (root / "a.jpg").write_bytes(JPEG)
    (root / "sub/b.jpg").write_bytes(PNG)
    return root


@cases(350)
@given(entries=mutated(ENTRIES), raw=st.none() | damaged(dump(ENTRIES)), of_questions=st.booleans())
def test_every_entry_of_a_list_is_imported_or_named(base, images, entries, raw, of_questions):
    empty(base)
    lists = base / "l.json"
    lists.write_bytes(dump(entries) if raw is None else raw)

    def make():
        return vqa_records([lists], images) if of_questions else caption_records(lists, images)

    keys, report = attempt(make, base / "out")
    if report is None:
        return
    entries = json.loads(lists.read_bytes().decode("utf-8-sig"))
    faults = {int(n) for e in report.skipped for n in re.findall(r"^entry (\d+) of ", e["reason"])}
    used = [entry for number, entry in enumerate(entries) if number not in faults]
    paths = {
        (entry.get("dataset", "vqa") if of_questions else "", os.path.normpath(entry["image"]))
        for entry in used
    }
    assert len(paths) + len(faults) == report.records
    for sample in map(ShardDataset(base / "out").meta, range(report.imported)):
        texts = sample["questions"] if of_questions else sample["captions"]
        assert all(isinstance(text, dict if of_questions else str) for text in texts)


@cases(250)
@given(
    members=st.lists(st.tuples(folders, names, suffixes, contents), min_size=1, max_size=9),
    damage=st.none() | st.none() | st.integers(0, 8000),
)
def test_every_member_of_a_tar_is_imported_or_named(base, members, damage):
    empty(base)
    (base / "in").mkdir()
    count = 0
    with tarfile.open(base / "in/a.tar", "w") as tar:
        for folder, name, suffix, content in members:
            info = tarfile.TarInfo(f"{folder}/{name}{suffix}".lstrip("/"))
            data = suited(content, suffix) if isinstance(content, bytes) else b""
            if not isinstance(content, bytes):
                info.type, info.linkname = TYPES[content], "nowhere"
            info.size = len(data)
            count += content != "up"
            tar.addfile(info, io.BytesIO(data))
    if damage is not None:
        data = (base / "in/a.tar").read_bytes()
        (base / "in/a.tar").write_bytes(data[: damage % len(data)])
    keys, report = attempt(lambda: tar_records(base / "in"), base / "out")
    if report is None or damage is not None:
        return
    # an image, its text and its notes are one sample
    unread = sum(int(entry["reason"].split()[0]) for entry in report.others)
    assert count <= 3 * (report.imported + len(report.skipped)) + unread
    pictures = sum(
        isinstance(content, bytes) and suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        for _, name, suffix, content in members
    )
    assert pictures <= report.records + unread
