"""Proves that every member of a WebDataset tar is imported or named, whole or damaged.

python -m pytest tests/data/test_webdataset_tars.py
"""

import gzip
import os
import tarfile

import numpy as np
import pytest

from prismer.dataloading.sources import webdataset_tars
from prismer.dataloading.sources.webdataset_tars import tar_records
from prismer.dataloading.store.shards import Sample, ShardWriter
from tests.data.import_sources import TABLES, add_member, captions_of, encode, gradient, make_tar, run, write


def test_img2dataset_tars(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "in" / f"{shard:05d}.tar", "w") as tar:
            for i in range(2):
                add_member(tar, f"{i:09d}.jpg", encode(gradient(i)))
                add_member(tar, f"{i:09d}.txt", f"caption {shard} {i}\n".encode())
                add_member(tar, f"{i:09d}.json", b'{"caption": "other"}')
            add_member(tar, "nothing.txt", b"a text without an image")
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    # both tars number from zero
    assert {key: sample.meta["captions"] for key, sample in samples.items()} == {
        f"0000{shard}--00000000{i}": [f"caption {shard} {i}"] for shard in (0, 1) for i in (0, 1)
    }
    assert [s["reason"] for s in report.skipped] == ["no image in 00000.tar", "no image in 00001.tar"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, offset: data[: offset + 100],
        lambda data, offset: data[: offset - 200],
        lambda data, offset: data[: offset - 512],
        lambda data, offset: data[: offset - 512] + b"x" * 512 + data[offset:],
    ],
    ids=["cut in image", "cut in header", "cut between members", "bad header"],
)
def test_samples_before_the_damage_of_a_tar_are_imported(tmp_path, damage):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            add_member(tar, f"{i}.jpg", encode(gradient(i)))
            add_member(tar, f"{i}.txt", b"caption")
    with tarfile.open(path) as tar:
        offset = tar.getmember("2.jpg").offset_data
    path.write_bytes(damage(path.read_bytes(), offset))
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    assert list(samples) == ["a--0", "a--1"]
    assert report.skipped
    assert all("early" in s["reason"] or "cut short" in s["reason"] for s in report.skipped)


def test_shards_of_this_library_are_imported_unchanged(tmp_path):
    """A dataset that lost its index files is rebuilt: keys, bytes, labels and texts."""
    tables = {**TABLES, "class": list("abcde")}
    samples = []
    for i in range(5):
        labels = {"seg": np.full((8, 8), i % 3, np.uint8)}
        meta = {"captions": [f"c{i}"], "size": [12, 20], "source": "s", "licence": "", "class": i}
        samples.append(Sample(f"k--{i}-_", encode(gradient(i)), labels, meta))
    settings = {"classes": tables, "source": "test", "samples_per_shard": 2}
    with ShardWriter(tmp_path / "in", **settings) as writer:
        for sample in samples:
            writer.write(sample)
    for path in (tmp_path / "in").glob("*.json"):
        path.unlink()
    back, _ = run(tar_records(tmp_path / "in"), tmp_path / "out", class_tables=tables, samples_per_shard=2)
    assert list(back) == [sample.key for sample in samples]
    for sample in samples:
        assert (back[sample.key].jpeg, back[sample.key].meta) == (sample.jpeg, sample.meta)
        np.testing.assert_array_equal(back[sample.key].labels["seg"], sample.labels["seg"])


def test_members_of_one_name_belong_together_wherever_they_lie(tmp_path):
    """Some tools, and GNU tar --sort=name, write all images first."""
    members = [(f"{i}.jpg", encode(gradient(i))) for i in range(3)]
    members += [(f"{i}.txt", f"caption {i}".encode()) for i in range(3)]
    members += [(f"{i}.json", b'{"caption": "no", "url": "u"}') for i in range(3)]
    make_tar(tmp_path / "in/t.tar", members)
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {f"t--{i}": [f"caption {i}"] for i in range(3)}
    assert all(sample.meta["url"] == "u" for sample in samples.values()) and report.skipped == []


def test_every_member_is_imported_or_named(tmp_path):
    jpeg = encode(gradient())
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
    assert sum("is a link or not a plain file" in reason for reason in reasons) == 4
    assert len(reasons) == 8
    left = sorted(o["reason"] for o in report.others)
    assert left == [
        "1 members ending in .seg.png, which are not read",
        "1 members that are hidden files, which are not read",
        "2 members ending in .cls, which are not read",
        "compressed; unpack it to a .tar to import it",
        "not a tar; the tars of one folder are read",
    ]


def test_a_tar_that_cannot_be_read_is_named(tmp_path):
    make_tar(tmp_path / "in/a.tar", [("a.jpg", encode(gradient()))])
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
    make_tar(tmp_path / "in/t.tar", [("a.jpg", encode(gradient())), ("a.jpg", encode(gradient(1)))])
    for _ in range(2):
        _, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
        assert (report.imported, len(report.skipped)) == (1, 1)


def test_a_part_of_the_records_opens_its_own_tars_alone(tmp_path, monkeypatch):
    for name in "abc":
        # in each tar two whole samples, an image without texts, a fault, and damage at the end
        members = [("0.jpg", b"0"), ("0.txt", name.encode()), ("1.jpg", b"1"), ("1.json", b'{"caption": "one"}')]
        make_tar(tmp_path / f"in/{name}.tar", [*members, ("2.jpg", b"2"), ("2.jpg", b"again")])
        path = tmp_path / f"in/{name}.tar"
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    records = tar_records(tmp_path / "in")
    whole = list(records)
    assert len(whole) == len(records) == 15 and [bool(record.fault) for record in whole[:5]] == [0, 0, 0, 1, 1]
    assert [(record.key, record.image) for record in records.outlines()] == [(r.key, r.image) for r in whole]
    opened, read = [], webdataset_tars._read_tar
    monkeypatch.setattr(webdataset_tars, "_read_tar", lambda path: opened.append(path) or read(path))
    for begin in range(16):
        for end in range(begin, 16):
            opened.clear()
            assert list(records.part(range(begin, end), range(0))) == whole[begin:end]
            first, last = begin // 5, -(-end // 5)
            assert [path.stem for path in opened] == list("abc"[first:last] if begin < end else "")
