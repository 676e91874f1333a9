"""Proves that labels in the published layout are imported exactly, and that damaged ones are named.

python -m pytest tests/data/test_published_labels.py
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.published_labels import read_published_labels
from prismer.dataloading.store.shards import ShardDataset
from tests.data.import_sources import DEEP, TABLES, encode, gradient, run, write, write_labels


@pytest.fixture
def labelled(tmp_path):
    write(tmp_path / "data/vqav2/train2014/1.jpg", encode(gradient()))
    write(tmp_path / "l.json", [{"image": "train2014/1.jpg", "caption": "a"}])
    write_labels(tmp_path / "labels")
    return tmp_path


def import_labelled(tmp_path, **settings):
    records = caption_records(tmp_path / "l.json", tmp_path / "data", labels=tmp_path / "labels")
    settings = {"class_tables": TABLES, **settings}
    return run(records, tmp_path / "out", **settings)


@pytest.mark.parametrize("seg_folder", ["seg_coco", "seg_ade"])
def test_all_six_labels_are_imported(labelled, seg_folder):
    if seg_folder == "seg_ade":
        os.rename(labelled / "labels/seg_coco", labelled / "labels/seg_ade")
    samples, report = import_labelled(labelled)
    (sample,) = samples.values()
    maps = write_labels(labelled / "again", seg_folder="seg")
    for expert, plane in maps.items():
        small = Image.fromarray(plane).resize((8, 8), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(sample.labels[expert], np.asarray(small), err_msg=expert)
    assert sample.meta["instances"] == {"0": 1, "1": 0}
    assert sample.meta["words"] == {"0": "stop"}
    assert ShardDataset(labelled / "out").classes == TABLES
    assert report.blank_labels == {}


def test_class_tables_from_a_file_and_without_one(labelled):
    tables = write(labelled / "t.json", TABLES)
    import_labelled(labelled, class_tables=tables)
    assert ShardDataset(labelled / "out").classes == TABLES
    records = caption_records(labelled / "l.json", labelled / "data", labels=labelled / "labels")
    run(records, labelled / "numbered")
    classes = ShardDataset(labelled / "numbered").classes
    assert classes["seg"][:2] == ["class 0", "class 1"] and len(classes["seg"]) == 255
    assert len(classes["obj_detection"]) == 722


@pytest.mark.parametrize("kind", ["empty", "absent"])
def test_empty_and_absent_files_become_background_and_never_class_0(labelled, kind):
    for path in sorted((labelled / "labels").rglob("*.*")):
        path.unlink()
        if kind == "empty" and path.suffix == ".png":
            path.touch()
    samples, report = import_labelled(labelled)
    (sample,) = samples.values()
    for expert in ("seg", "obj_detection", "ocr_detection"):
        assert (sample.labels[expert] == 255).all(), f"{expert} is background"
    for expert in ("depth", "normal", "edge"):
        assert len(np.unique(sample.labels[expert])) == 1, f"{expert} is constant"
    assert (sample.meta["instances"], sample.meta["words"]) == ({}, {})
    assert report.blank_labels == dict.fromkeys(sample.labels, 1)


def test_experts_without_a_folder_are_left_out(labelled):
    for expert in ("normal", "ocr_detection"):
        os.rename(labelled / "labels" / expert, labelled / f"not-{expert}")
    samples, _ = import_labelled(labelled)
    (sample,) = samples.values()
    assert set(sample.labels) == {"depth", "seg", "edge", "obj_detection"}
    assert "words" not in sample.meta
    assert set(ShardDataset(labelled / "out").experts) == set(sample.labels)


def test_a_word_map_without_its_table_becomes_background(labelled):
    (labelled / "labels/ocr_detection/vqav2/train2014/1.pt").unlink()
    samples, _ = import_labelled(labelled)
    (sample,) = samples.values()
    assert (sample.labels["ocr_detection"] == 255).all() and sample.meta["words"] == {}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("seg_coco/1.png", encode(Image.new("L", (20, 12), 3), "PNG"), "holds id 3, which is not in its table"),
        (
            "obj_detection/1.png",
            encode(Image.new("L", (20, 12), 7), "PNG"),
            "holds id 7, which is not in its table",
        ),
        (
            "ocr_detection/1.png",
            encode(Image.new("L", (20, 12), 2), "PNG"),
            "holds id 2, which is not in its table",
        ),
        ("obj_detection/1.json", {"0": 2, "1": 0}, "names class 2, the class table has 2"),
        ("obj_detection/1.json", "{", "object table"),
        ("obj_detection/1.json", {"0": None}, "object table"),
        ("depth/1.png", b"\x89PNG\r\n\x1a\nnothing", "cannot be read"),
        ("depth/1.png", encode(gradient(), "PNG"), "it is RGB, expected L"),
        ("normal/1.png", encode(gradient(mode="L"), "PNG"), "it is L, expected RGB"),
        ("ocr_detection/1.pt", b"not a torch file", "word table"),
        ("ocr_detection/1.pt", "malicious", "word table"),
    ],
    ids=lambda value: "" if isinstance(value, (bytes, dict)) else value,
)
def test_damaged_labels_are_named_and_skipped(labelled, monkeypatch, name, content, reason):
    monkeypatch.chdir(labelled)
    expert, file = name.split("/")
    path = labelled / "labels" / expert / "vqav2/train2014" / file
    write(path, content)
    if content == "malicious":
        torch.save({0: {"text": Malicious()}}, path)
    records = caption_records(labelled / "l.json", labelled / "data", labels=labelled / "labels")
    samples, report = run(records, labelled / "out", class_tables=TABLES)
    assert samples == {}
    (skipped,) = report.skipped
    assert skipped["key"] == "train2014--1" and skipped["image"].endswith("train2014/1.jpg")
    assert reason in skipped["reason"] and str(path) in skipped["reason"]
    assert not (labelled / "unpickled").exists()


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
        write(tmp_path / f"data/vqav2/train2014/{i}.jpg", encode(gradient()))
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


def test_labels_turn_with_their_image(labelled):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(labelled / "data/vqav2/train2014/1.jpg", encode(gradient(), exif=exif))
    samples, _ = import_labelled(labelled)
    (sample,) = samples.values()
    assert sample.meta["size"] == [20, 12]
    # the bright right side is now at the bottom
    assert sample.labels["depth"][-1].min() > sample.labels["depth"][0].max()
    assert "normal" not in sample.labels, "its vectors would have to turn too"


def test_one_label_file_alone(labelled):
    files = {"depth": labelled / "labels/depth/vqav2/train2014/1.png"}
    planes, tables, blank = read_published_labels(files, TABLES, 224)
    assert planes["depth"].shape == (224, 224) and tables == {} and blank == []
