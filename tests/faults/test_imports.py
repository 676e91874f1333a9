"""Proves that an import of any lists, tars and folders imports or names every image, or ends with one sentence.

python -m pytest tests/faults/test_imports.py
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prismer.cli.main import main
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.shards import Sample, ShardDataset
from tests.faults.anything import anything, cases, damaged, dump, mutated, texts


def jpeg(i: int) -> bytes:
    """A different RGB JPEG for each number; imports keep its bytes."""
    file = io.BytesIO()
    pixels = np.full((4, 4, 3), (i % 251, i // 251, 90), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", comment=str(i).encode())
    return file.getvalue()


JPEGS = [jpeg(i) for i in range(24)]


@pytest.fixture(scope="module", autouse=True)
def fast_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("imports")


def empty(place: Path) -> Path:
    shutil.rmtree(place)
    place.mkdir()
    return place


def run(arguments: list, out: Path, capsys: pytest.CaptureFixture) -> tuple[list[Sample], list[dict], str]:
    """Import, and check what is true of every import.

    Returns:
        The samples of the dataset, the entries of the report, and everything printed.
    """
    options = ["--out", str(out), "--label-size", "8", "--workers", "1"]
    code = main(["data", "import", *map(os.fspath, arguments), *options])
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "Traceback" not in printed
    # fails on a lone surrogate, which no terminal takes
    printed.encode()
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")] if out.exists() else True
    if not (out / "import-report.json").exists():
        assert code in (1, 2) and captured.err.startswith("prismer: "), (code, printed)
        return [], [], printed
    report = json.loads((out / "import-report.json").read_bytes())
    assert report["records"] == report["imported"] + len(report["skipped"])
    assert (code == 0) == bool(report["imported"]), (code, printed)
    assert all(entry["reason"] for entry in report["skipped"])
    dataset = ShardDataset(out)
    samples = [dataset[i] for i in range(len(dataset))]
    assert len(samples) == report["imported"]
    assert check_dataset(out, progress=False).lines()[-1] == "no problems"
    return samples, report["skipped"] + report["others"], printed


def is_named(name: str, skipped: list[dict], printed: str) -> bool:
    """Whether a report or message holds the name, with odd characters escaped in any way."""
    spelt = {name, name.encode("utf-8", "backslashreplace").decode(), repr(name)[1:-1], ascii(name)[1:-1]}
    listed = "\n".join([printed, *(str(value) for entry in skipped for value in entry.values())])
    return any(form in listed for form in spelt)


CAPTIONS = [{"image": f"{i}.jpg", "caption": f"caption number {i}"} for i in range(6)]
QUESTIONS = [
    {
        "dataset": "vqa",
        "image": f"{i % 3}.jpg",
        "question": f"question {i}?",
        "answer": ["yes", "no"][: i % 3],
        "question_id": i,
        "weight": 0.5,
    }
    for i in range(6)
]


@cases(150)
@given(entries=mutated(CAPTIONS), tail=st.sampled_from([b"", b"\n", b"]", b"\xff"]), mark=st.booleans())
def test_every_image_of_a_caption_list_is_imported_or_named(place, capsys, entries, tail, mark):
    images = empty(place) / "images"
    images.mkdir()
    for i in range(6):
        (images / f"{i}.jpg").write_bytes(JPEGS[i])
    (place / "list.json").write_bytes(b"\xef\xbb\xbf" * mark + dump(entries) + tail)
    samples, skipped, printed = run(["captions", place / "list.json", "--images", images], place / "out", capsys)
    if not samples and not skipped:
        return
    found = {text for sample in samples for text in sample.meta["captions"]}
    for number, entry in enumerate(entries):
        if entry in CAPTIONS:
            assert entry["caption"] in found or is_named(entry["image"], skipped, printed), entry
        else:
            # a mutated entry is used for an image, or is named by its image or its place in the list
            image = str(entry.get("image") if isinstance(entry, dict) else None)
            used = any(JPEGS[i] == s.jpeg for s in samples for i in range(6) if image in f"./{i}.jpg")
            names = f"entry {number}", image
            assert used or any(is_named(name, skipped, printed) for name in names), entry


@cases(150)
@given(entries=mutated(QUESTIONS))
def test_every_image_of_a_question_list_is_imported_or_named(place, capsys, entries):
    images = empty(place) / "images"
    images.mkdir()
    for i in range(3):
        (images / f"{i}.jpg").write_bytes(JPEGS[i])
    (place / "list.json").write_bytes(dump(entries))
    samples, skipped, printed = run(["vqa", place / "list.json", "--images", images], place / "out", capsys)
    if not samples and not skipped:
        return
    found = {q["question"] for sample in samples for q in sample.meta["questions"]}
    for entry in entries:
        if entry in QUESTIONS:
            assert entry["question"] in found or is_named(entry["image"], skipped, printed), entry


members = st.tuples(
    st.sampled_from(["a", "b", "sub/a", "a.x", "c d", "é", "__bad", "a" * 95]) | texts,
    st.sampled_from(["jpg", "JPG", "jpeg", "png", "txt", "json", "cls", "x.jpg", "avif", "labels", ""]),
    st.sampled_from(["file", "file", "file", "file", "folder", "link", "fifo", "empty"]),
)


def pack(path: Path, entries: list[tuple[str, str, str]], form: int) -> dict[str, bytes]:
    """Write a tar of `entries`; returns its images by member name."""
    images = {}
    with tarfile.open(path, "w", format=form) as tar:
        for number, (stem, suffix, kind) in enumerate(entries):
            name = f"{stem}.{suffix}" if suffix else stem
            data = {"txt": f"text {number}".encode(), "json": b'{"caption": "j"}'}.get(suffix, JPEGS[number])
            member = tarfile.TarInfo(name.encode("utf-8", "replace").decode().replace("\0", "_") or "x")
            member.type = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "fifo": tarfile.FIFOTYPE}.get(
                kind, tarfile.REGTYPE
            )
            member.linkname = "a.jpg" if kind == "link" else ""
            data = b"" if kind != "file" else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            if kind == "file" and data == JPEGS[number]:
                images[member.name] = data
    return images


@cases(150)
@given(
    entries=st.lists(members, min_size=1, max_size=9),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_image_of_a_tar_is_imported_or_named(place, capsys, entries, form):
    folder = empty(place) / "tars"
    folder.mkdir()
    try:
        images = pack(folder / "00.tar", entries, form)
    except ValueError:
        return  # this format of tar cannot hold one of the names
    samples, skipped, printed = run(["tars", folder], place / "out", capsys)
    if not samples and not skipped:
        return
    kept = {sample.jpeg for sample in samples}
    # members that are not read are counted, not listed
    counted = sum(int(e["reason"].split()[0]) for e in skipped if e["reason"].split()[0].isdecimal())
    lost = [
        name
        for name, data in images.items()
        if data not in kept
        and not is_named(name, skipped, printed)
        # a member that belongs to an image is named with its sample
        and not is_named(name.rpartition("/")[2].partition(".")[0], skipped, printed)
    ]
    assert len(lost) <= counted, lost


@cases(100)
@given(data=st.data())
def test_every_sample_of_a_damaged_tar_is_imported_or_named(place, capsys, data):
    folder = empty(place) / "tars"
    folder.mkdir()
    whole = [(f"k{i // 2}", "jpg" if i % 2 else "txt", "file") for i in range(8)]
    images = pack(folder / "00.tar", whole, tarfile.USTAR_FORMAT)
    broken = data.draw(damaged((folder / "00.tar").read_bytes()))
    (folder / "00.tar").write_bytes(broken)
    samples, skipped, printed = run(["tars", folder], place / "out", capsys)
    # a tar has checksums of its headers alone: changed pixels that still decode go unnoticed
    assert len(samples) + len(skipped) >= len(images) or "00.tar" in printed


names = texts.map(lambda text: text.replace("/", "_").replace("\0", "_")) | st.sampled_from(
    ["photo", "photo.x", ".hidden", "a b", "x" * 240, "\udcff\udcfe", "Ünï", "new\nline", "-dash", "tab\t"]
)
files = st.tuples(
    st.sampled_from(["", "", "", "sub", "sub/deep", "sub/deep/er"]),
    names,
    st.sampled_from([".jpg", ".jpg", ".JPG", ".jpeg", ".jfif", ".png", ".avif", ".txt", ".json", ""]),
    st.sampled_from(["file", "file", "file", "file", "folder", "loop", "dangling", "fifo", "socket-like", "cut"]),
    st.binary(max_size=12) | anything.map(dump),
)


def lay_out(folder: Path, entries: list[tuple]) -> dict[str, bytes]:
    """Make the files, folders, links and pipes; returns the readable images by path."""
    images = {}
    for number, (inside, name, suffix, kind, content) in enumerate(entries):
        path = os.path.join(folder, inside, name + suffix)
        try:
            if name in ("", ".", "..") or len(os.fsencode(name + suffix)) > 250:
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if os.path.lexists(path):
                continue
            if kind == "folder":
                os.mkdir(path)
            elif kind == "loop":
                os.symlink(os.path.basename(path), path)
            elif kind == "dangling":
                os.symlink("nowhere", path)
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                is_image = suffix not in (".txt", ".json", "")
                data = JPEGS[number] if is_image else content
                with open(path, "wb") as file:
                    file.write(data[: len(data) // 2] if kind == "cut" else data)
                if is_image and kind != "cut":
                    images[path] = data
        except UnicodeEncodeError:
            continue  # no file name can hold this surrogate
    return images


@cases(150)
@given(entries=st.lists(files, min_size=1, max_size=9))
def test_every_image_of_a_folder_is_imported_or_named(place, capsys, entries):
    folder = empty(place) / "photos"
    folder.mkdir()
    images = lay_out(folder, entries)
    samples, skipped, printed = run(["folder", folder], place / "out", capsys)
    kept = {sample.jpeg for sample in samples}
    for path, data in images.items():
        name = os.path.basename(path)
        assert data in kept or is_named(name, skipped, printed) or name.startswith("."), name


@cases(80)
@given(entries=st.lists(files, min_size=1, max_size=9), table=st.none() | anything)
def test_every_image_of_class_folders_is_imported_or_named(place, capsys, entries, table):
    folder = empty(place) / "classes"
    folder.mkdir()
    images = lay_out(folder, entries)
    arguments = ["classes", folder]
    if table is not None:
        (place / "table.json").write_bytes(dump(table))
        arguments += ["--classes", place / "table.json"]
    samples, skipped, printed = run(arguments, place / "out", capsys)
    if not samples and not skipped:
        return
    kept = {sample.jpeg for sample in samples}
    for path, data in images.items():
        name, parts = os.path.basename(path), os.path.relpath(path, folder).split(os.sep)
        hidden = any(part.startswith(".") for part in parts)
        assert data in kept or is_named(name, skipped, printed) or hidden, name
    assert all(sample.meta["class"] not in ("0", "1") or table is None for sample in samples)
