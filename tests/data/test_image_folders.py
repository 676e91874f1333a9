"""Proves that every file in a folder of images is imported or named, whatever lies in it.

python -m pytest tests/data/test_image_folders.py
"""

import errno
import json
import os
import socket
import tarfile
from pathlib import Path

import pytest

from prismer.cli.main import main
from prismer.dataloading.sources import image_folders
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.webdataset_tars import tar_records
from tests.data.import_sources import DEEP, add_member, captions_of, encode, gradient, others_of, run, write


def test_img2dataset_folder(tmp_path):
    root = tmp_path / "cc12m"
    write(root / "00000/000000001.jpg", encode(gradient(1)))
    write(root / "00000/000000001.txt", "first line\nsecond line\n")
    write(root / "00000/000000001.json", {"caption": "not this one"})
    write(root / "00001/000010000.JPEG", encode(gradient(2)))
    write(root / "00001/000010000.json", {"caption": " from json ", "url": "http://a/b.jpg", "status": "success"})
    write(root / "00001/000010001.png", encode(gradient(3), "PNG"))
    write(root / "alone.webp", encode(gradient(4), "WEBP"))
    write(root / "00001/000010002.jpg", encode(gradient(5)))
    write(root / "00001/000010002.txt", b"\xff\xfe not utf-8")
    write(root / "00001/_stats.csv", "not an image")
    samples, report = run(folder_records(root), tmp_path / "out")
    assert {key: sample.meta["captions"] for key, sample in samples.items()} == {
        "alone": [],
        "00000--000000001": ["first line"],
        "00001--000010000": ["from json"],
        "00001--000010001": [],
    }
    assert samples["00001--000010000"].meta["url"] == "http://a/b.jpg"
    assert report.re_encoded == 2
    assert [(s["key"], s["reason"]) for s in report.skipped] == [
        ("00001--000010002", "its caption is not UTF-8 text (byte 0); save it as UTF-8")
    ]
    assert [(Path(o["file"]).name, o["reason"]) for o in report.others] == [
        ("_stats.csv", "not an image or a text by its name")
    ]


def test_every_file_of_a_folder_is_imported_or_named(tmp_path):
    root = tmp_path / "in"
    for name in ("a.jpg", "B.JPEG", "c.jfif", "deep/er/d.Jpg", "x.y.jpg"):
        write(root / name, encode(gradient()))
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
        write(root / folder / "a.jpg", encode(gradient()))
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
    files = {"a.jpg": encode(gradient()), "a.json": notes, "b.jpg": encode(gradient()), "b.txt": b"good"}
    (tmp_path / "in").mkdir()
    if packing == "tar":
        with tarfile.open(tmp_path / "in/t.tar", "w") as tar:
            for name, data in files.items():
                add_member(tar, name, data)
        records = tar_records(tmp_path / "in")
    else:
        for name, data in files.items():
            write(tmp_path / "in" / name, data)
        records = folder_records(tmp_path / "in")
    samples, report = run(records, tmp_path / "out")
    assert list(captions_of(samples).values()) == [["good"]]
    assert len(report.skipped) == 1 and report.skipped[0]["key"].endswith("a")


@pytest.mark.parametrize("caption", ["null", '""', "[]", '["", null]'])
def test_an_image_needs_no_caption(tmp_path, caption):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    write(tmp_path / "in/a.json", f'{{"caption": {caption}, "similarity": NaN}}')
    samples, _ = run(folder_records(tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {"a": []}


def test_json_beside_a_text_keeps_its_fields(tmp_path):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    write(tmp_path / "in/a.txt", "the caption")
    write(tmp_path / "in/a.json", {"caption": "other", "url": "http://a", "license": "CC0"})
    samples, _ = run(folder_records(tmp_path / "in"), tmp_path / "out")
    meta = samples["a"].meta
    assert (meta["captions"], meta["url"], meta["license"]) == (["the caption"], "http://a", "CC0")


def odd_files(root):
    """Pipes, links, devices and sockets, named like images and texts, and a file of 1 TB."""
    write(root / "good.jpg", encode(gradient()))
    for name in ("fifo.jpg", "good.txt.jpg.fifo"):
        os.mkfifo(root / name)
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "up").symlink_to(root, target_is_directory=True)
    write(root / "text.jpg", encode(gradient()))
    os.mkfifo(root / "text.txt")
    write(root / "huge.jpg", b"")
    os.truncate(root / "huge.jpg", 2**40)
    with socket.socket(socket.AF_UNIX) as server:
        # the address of a socket is at most 107 bytes long
        before = os.getcwd()
        os.chdir(root)
        server.bind("socket.jpg")
        os.chdir(before)
    write(Path(os.fsdecode(os.fsencode(root) + b"/\xff.jpg")), encode(gradient()))
    return root


def test_pipes_links_and_devices_neither_hang_nor_end_an_import(tmp_path):
    root = odd_files(tmp_path / "in")
    samples, report = run(folder_records(root), tmp_path / "out")
    assert len(samples) == 2 and "good" in samples, "the second is the image whose name is not UTF-8"
    reasons = {Path(s["image"]).stem: s["reason"] for s in report.skipped}
    assert set(reasons) == {"fifo", "dangling", "loop", "device", "text", "huge", "socket"}
    assert "named pipe" in reasons["fifo"] and "a device" in reasons["device"]
    assert others_of(report, root) == {
        "up": "a link to a folder that it lies in",
        "good.txt.jpg.fifo": "not an image or a text by its name",
    }


def test_a_name_that_is_not_utf8_is_escaped_in_messages(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    for name in (b"\xff.jpg", b"\xfe.txt"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"junk")
    write(root / "good.jpg", encode(gradient()))
    assert main(["data", "import", "folder", str(root), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 images imported, 1 skipped" in out and r"\udcff.jpg" in err and r"\udcfe.txt" in err
    report = json.loads((tmp_path / "out/import-report.json").read_text("utf-8"))
    assert report["skipped"][0]["image"].endswith(r"\udcff.jpg")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    for name in ("a/a.jpg", "b/b.jpg"):
        write(tmp_path / "in" / name, encode(gradient()))
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    # root may run the tests, and no file mode stops root
    monkeypatch.setattr(image_folders.os, "scandir", refuse)
    samples, report = run(folder_records(tmp_path / "in"), tmp_path / "out")
    assert list(samples) == ["b--b"]
    assert others_of(report, tmp_path / "in") == {"a": "the folder cannot be read (Permission denied)"}


def test_a_dataset_inside_a_folder_of_photos_is_not_imported_again(tmp_path):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    for _ in range(2):
        samples, _ = run(folder_records(tmp_path / "in"), tmp_path / "in/out")
        write(tmp_path / "in/out/preview/shard-000000.jpg", encode(gradient()))
        assert list(samples) == ["a"]
