"""Proves that each kind of list or folder becomes the right samples, and that nothing is lost, doubled or guessed.

python -m pytest -q tests/data/test_importers.py
"""

import io
import json
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.dataloading.feed.rgb import to_jpeg
from prismer.dataloading.sources import importer as importers
from prismer.dataloading.sources.class_folders import class_records
from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.sources.published_labels import read_published_labels
from prismer.dataloading.sources.records import safe_key
from prismer.dataloading.sources.vqa_questions import vqa_records
from prismer.dataloading.sources.webdataset_tars import tar_records
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter

TABLES = {"seg": ["person", "sky", "tree"], "obj_detection": ["cup", "dog"]}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def picture(i=0, size=(20, 12), mode="RGB"):
    """A smooth picture in which no two corners are alike, so that turning and re-encoding show."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    channels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40 * (i % 6))], -1)
    return Image.fromarray(channels.astype(np.uint8)).convert(mode)


def encode(image, form="JPEG", **settings):
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif isinstance(data, str):
        path.write_text(data)
    else:
        path.write_text(json.dumps(data))
    return path


def load(folder):
    dataset = ShardDataset(folder)
    return {dataset.key(i): dataset[i] for i in range(len(dataset))}


def run(records, out, **settings):
    settings = {"source": "test", "progress": False, "label_size": 8, "workers": 2, **settings}
    report = import_records(records, out, **settings)
    assert report.records == report.imported + len(report.skipped) == len(records)
    assert json.loads((out / "import-report.json").read_text())["skipped"] == report.skipped
    problems = check_dataset(out, progress=False).lines()
    assert problems[-1] == "no problems", problems
    return load(out), report


# --- lists


def test_coco_captions(tmp_path):
    names = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in (9, 25)]
    for i, name in enumerate(names):
        write(tmp_path / "data" / name, encode(picture(i)))
    entries = [(0, "A man."), (1, "A cat."), (0, "One man")]
    lists = write(tmp_path / "l.json", [{"image": names[i], "caption": text} for i, text in entries])
    samples, _ = run(caption_records(lists, tmp_path / "data"), tmp_path / "out", licence="CC BY 4.0")
    assert list(samples) == ["train2014--COCO_train2014_000000000009", "train2014--COCO_train2014_000000000025"]
    first, second = samples.values()
    assert first.meta == {
        "captions": ["A man.", "One man"],
        "image_id": 9,
        "size": [12, 20],
        "source": "test",
        "licence": "CC BY 4.0",
    }
    assert second.meta["captions"] == ["A cat."] and second.meta["image_id"] == 25
    assert first.jpeg == (tmp_path / "data" / names[0]).read_bytes()


def test_coco_test_list_takes_its_captions_from_the_annotations(tmp_path):
    write(tmp_path / "data/vqav2/val2014/COCO_val2014_000000000007.jpg", encode(picture()))
    lists = write(tmp_path / "l.json", [{"image": "val2014/COCO_val2014_000000000007.jpg"}])
    annotations = [{"image_id": 7, "caption": "a"}, {"image_id": 8, "caption": "b"}, {"image_id": 7, "caption": "c"}]
    captions = write(tmp_path / "gt.json", {"annotations": annotations})
    samples, _ = run(caption_records(lists, tmp_path / "data", captions_file=captions), tmp_path / "out")
    (sample,) = samples.values()
    assert sample.meta["captions"] == ["a", "c"]
    samples, _ = run(caption_records(lists, tmp_path / "data"), tmp_path / "bare")
    assert next(iter(samples.values())).meta["captions"] == []


def test_nocaps_list(tmp_path):
    write(tmp_path / "data/nocaps/val/0013ea.jpg", encode(picture()))
    lists = write(tmp_path / "l.json", [{"image": "val/0013ea.jpg", "img_id": 4}])
    samples, _ = run(caption_records(lists, tmp_path / "data", dataset="nocaps"), tmp_path / "out")
    assert samples["val--0013ea"].meta["image_id"] == 4


def test_visual_genome_paths_are_cut(tmp_path):
    write(tmp_path / "data/vg/VG_100K/2.jpg", encode(picture()))
    lists = write(tmp_path / "l.json", [{"image": "/x/visual-genome/VG_100K/2.jpg", "caption": "a tree"}])
    samples, _ = run(caption_records(lists, tmp_path / "data", dataset="vg"), tmp_path / "out")
    assert samples["VG_100K--2"].meta["captions"] == ["a tree"]


def test_vqa_lists(tmp_path):
    write(tmp_path / "data/vqav2/train2014/1.jpg", encode(picture(1)))
    write(tmp_path / "data/vqav2/train2014/2.jpg", encode(picture(2)))
    write(tmp_path / "data/vg/VG_100K/3.jpg", encode(picture(3)))

    def entry(image, question, answer=None, **more):
        more |= {"answer": answer} if answer is not None else {}
        return {"dataset": "vqa", "image": f"train2014/{image}.jpg", "question": question, **more}

    vqa = write(
        tmp_path / "vqa.json",
        [
            entry(1, "What is it?", "cat", weight=0.7),
            entry(2, "How many?", "2", weight=1.0, question_id=20),
            entry(1, "What is it?", "dog", weight=0.3),
            entry(1, "Where?", ["here", "there", "here", "here"]),
            entry(2, "How many?", question_id=21),
        ],
    )
    vg = write(
        tmp_path / "vg.json",
        [{"dataset": "vg", "image": "visual-genome/VG_100K/3.jpg", "question": "Who?", "answer": "me"}],
    )
    samples, _ = run(vqa_records([vqa, vg], tmp_path / "data"), tmp_path / "out")
    assert list(samples) == ["train2014--1", "train2014--2", "VG_100K--3"]
    one, two, three = (sample.meta["questions"] for sample in samples.values())
    assert one == [
        {
            "question": "What is it?",
            "answers": [{"answer": "cat", "weight": 0.7}, {"answer": "dog", "weight": 0.3}],
            "kind": "vqa",
        },
        {
            "question": "Where?",
            "answers": [{"answer": "here", "weight": 0.75}, {"answer": "there", "weight": 0.25}],
            "kind": "vqa",
            "raw_answers": ["here", "there", "here", "here"],
        },
    ]
    assert [(q["id"], len(q["answers"])) for q in two] == [(20, 1), (21, 0)]
    assert three == [{"question": "Who?", "answers": [{"answer": "me", "weight": 0.2}], "kind": "vg"}]
    assert "captions" not in samples["VG_100K--3"].meta, "a question set is no caption set"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image": "a.jpg"}, "not a JSON array"),
        ([{"caption": "a"}], "entry 0 of .* has no 'image'"),
        ([{"image": "../../etc/a.jpg"}], "entry 0 of .* leaves the image folder"),
        ([{"image": "/etc/a.jpg"}], "leaves the image folder"),
        ("[", "is not JSON"),
    ],
)
def test_malformed_lists_are_refused(tmp_path, content, message):
    lists = write(tmp_path / "l.json", content)
    with pytest.raises(ValueError, match=message):
        caption_records(lists, tmp_path)
    with pytest.raises(ValueError, match=message):
        vqa_records([lists], tmp_path)


def test_a_question_list_needs_questions(tmp_path):
    lists = write(tmp_path / "l.json", [{"dataset": "vqa", "image": "a.jpg", "caption": "b"}])
    with pytest.raises(ValueError, match="expected dataset vqa or vg and a question"):
        vqa_records([lists], tmp_path)


# --- folders and tars


def test_img2dataset_folder(tmp_path):
    root = tmp_path / "cc12m"
    write(root / "00000/000000001.jpg", encode(picture(1)))
    write(root / "00000/000000001.txt", "first line\nsecond line\n")
    write(root / "00000/000000001.json", {"caption": "not this one"})
    write(root / "00001/000010000.JPEG", encode(picture(2)))
    write(root / "00001/000010000.json", {"caption": " from json ", "url": "http://a/b.jpg", "status": "success"})
    write(root / "00001/000010001.png", encode(picture(3), "PNG"))
    write(root / "alone.webp", encode(picture(4), "WEBP"))
    write(root / "00001/000010002.jpg", encode(picture(5)))
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


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_img2dataset_tars(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "in" / f"{shard:05d}.tar", "w") as tar:
            for i in range(2):
                add(tar, f"{i:09d}.jpg", encode(picture(i)))
                add(tar, f"{i:09d}.txt", f"caption {shard} {i}\n".encode())
                add(tar, f"{i:09d}.json", b'{"caption": "other"}')
            add(tar, "nothing.txt", b"a text without an image")
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
def test_a_damaged_tar_gives_what_lies_before_and_says_so(tmp_path, damage):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", encode(picture(i)))
            add(tar, f"{i}.txt", b"caption")
    with tarfile.open(path) as tar:
        offset = tar.getmember("2.jpg").offset_data
    path.write_bytes(damage(path.read_bytes(), offset))
    samples, report = run(tar_records(tmp_path / "in"), tmp_path / "out")
    assert list(samples) == ["a--0", "a--1"]
    assert report.skipped
    assert all("early" in s["reason"] or "cut short" in s["reason"] for s in report.skipped)


def test_our_own_tars_are_imported_as_they_are(tmp_path):
    """A dataset that lost its indices is rebuilt: keys, bytes, labels and texts."""
    tables = {**TABLES, "class": list("abcde")}
    samples = []
    for i in range(5):
        labels = {"seg": np.full((8, 8), i % 3, np.uint8)}
        meta = {"captions": [f"c{i}"], "size": [12, 20], "source": "s", "licence": "", "class": i}
        samples.append(Sample(f"k--{i}-_", encode(picture(i)), labels, meta))
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


@pytest.mark.parametrize("form", ["names", "list", "indices", "none"])
def test_imagenet_folder(tmp_path, form):
    for folder in ("n01", "n02_x"):
        write(tmp_path / "val" / folder / "a.JPEG", encode(picture()))
    write(tmp_path / "val/stray.jpg", encode(picture()))
    classes = {
        "names": {"n01": "tench", "n02_x": "great white shark"},
        "list": ["tench", "great white shark"],
        "indices": {"n01": 1, "n02_x": 0},
        "none": None,
    }[form]
    classes = write(tmp_path / "c.json", classes) if classes else None
    names = write(tmp_path / "n.json", ["great white shark", "tench"]) if form == "indices" else None
    records = class_records(tmp_path / "val", classes=classes, names=names)
    samples, _ = run(records, tmp_path / "out")
    expected = ["n01", "n02 x"] if form == "none" else ["tench", "great white shark"]
    assert {key: sample.meta["class"] for key, sample in samples.items()} == dict(
        zip(["n01--a", "n02_x--a"], expected, strict=True)
    )
    assert ShardDataset(tmp_path / "out").classes["class"] == expected


def test_imagenet_folder_needs_all_names(tmp_path):
    write(tmp_path / "val/n01/a.jpg", encode(picture()))
    write(tmp_path / "val/n02/a.jpg", encode(picture()))
    for classes, message in (({"n01": "tench"}, "no name for n02"), (["tench"], "1 names for 2 folders")):
        with pytest.raises(ValueError, match=message):
            class_records(tmp_path / "val", classes=write(tmp_path / "c.json", classes))


# --- images


def test_an_rgb_jpeg_is_kept_byte_for_byte():
    for settings in ({}, {"quality": 40}, {"progressive": True}):
        data = encode(picture(), **settings)
        assert to_jpeg(data) == (data, (12, 20), 1)
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encode(picture(), exif=exif)
    assert to_jpeg(data)[0] is data


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(size=(32, 16)), exif=exif, quality=95)
    jpeg, size, undone = to_jpeg(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    result = Image.open(io.BytesIO(jpeg))
    assert undone == orientation and size == (expected.height, expected.width)
    assert result.getexif().get(0x0112, 1) == 1
    error = np.asarray(result).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(error).mean() < 3


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("TIFF", "CMYK"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ],
)
def test_other_images_become_rgb_jpegs(form, mode):
    image = picture(mode=mode, size=(32, 16))
    jpeg, size, _ = to_jpeg(encode(image, form, **({"quality": 95} if form == "JPEG" else {})))
    result = Image.open(io.BytesIO(jpeg))
    assert (result.format, result.mode, size) == ("JPEG", "RGB", (16, 32))
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(np.asarray(result).astype(int) - expected).mean() < (16 if mode == "1" else 4)


def test_16_bit_greys_keep_their_range():
    ramp = np.linspace(0, 65535, 32 * 16).reshape(16, 32).astype(np.uint16)
    jpeg, _, _ = to_jpeg(encode(Image.fromarray(ramp), "PNG"))
    result = np.asarray(Image.open(io.BytesIO(jpeg)))[..., 0].astype(int)
    assert np.abs(result - ramp // 257).max() < 8


def test_transparency_lies_on_white():
    image = picture(mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    result = np.asarray(Image.open(io.BytesIO(to_jpeg(encode(image, "PNG"))[0]))).astype(int)
    assert result[0].min() > 235, "the transparent side is white"
    assert np.abs(result[-1] - np.asarray(image)[-1, :, :3]).mean() < 25


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8garbage",
        b"<html>404</html>",
        encode(picture(size=(64, 64)))[:-200],
        encode(picture(size=(64, 64)), "PNG")[:-60],
        encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    ],
    ids=["empty", "garbage", "html", "short jpeg", "short png", "float"],
)
def test_undecodable_images_are_refused(data):
    with pytest.raises(ValueError, match="the image "):
        to_jpeg(data)


# --- labels of the official layout


def write_labels(root, dataset="vqav2", stem="train2014/1", seg_folder="seg_coco"):
    """All six labels of one 20 x 12 image, written the way the released code writes them."""
    y, x = np.mgrid[:12, :20]
    maps = {
        "depth": (x * 12).astype(np.uint8),
        "normal": np.stack([x * 12, y * 20, 0 * x + 200], -1).astype(np.uint8),
        "edge": (y * 20).astype(np.uint8),
        seg_folder: (x // 7).astype(np.uint8),
        "obj_detection": np.where(x < 5, 0, np.where(x < 10, 1, 255)).astype(np.uint8),
        "ocr_detection": np.where(y < 6, 0, 255).astype(np.uint8),
    }
    for expert, plane in maps.items():
        write(root / expert / dataset / f"{stem}.png", encode(Image.fromarray(plane), "PNG"))
    write(root / f"obj_detection/{dataset}/{stem}.json", {"0": 1, "1": 0})
    words = {0: {"features": torch.zeros(64), "text": "Stop"}}
    torch.save(words, root / f"ocr_detection/{dataset}/{stem}.pt")
    return maps


@pytest.fixture
def labelled(tmp_path):
    write(tmp_path / "data/vqav2/train2014/1.jpg", encode(picture()))
    write(tmp_path / "l.json", [{"image": "train2014/1.jpg", "caption": "a"}])
    write_labels(tmp_path / "labels")
    return tmp_path


def import_labelled(tmp_path, **settings):
    records = caption_records(tmp_path / "l.json", tmp_path / "data", labels=tmp_path / "labels")
    settings = {"class_tables": TABLES, **settings}
    return run(records, tmp_path / "out", **settings)


@pytest.mark.parametrize("seg_folder", ["seg_coco", "seg_ade"])
def test_official_labels(labelled, seg_folder):
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
def test_placeholders_say_nothing_and_never_person(labelled, kind):
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


def test_words_without_their_table_are_no_words(labelled):
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
        ("seg_coco/1.png", encode(Image.new("L", (20, 12), 3), "PNG"), "holds id 3, which its table of 3"),
        ("obj_detection/1.png", encode(Image.new("L", (20, 12), 7), "PNG"), "holds id 7, which its table of 2"),
        ("ocr_detection/1.png", encode(Image.new("L", (20, 12), 2), "PNG"), "holds id 2, which its table of 1"),
        ("obj_detection/1.json", {"0": 2, "1": 0}, "names class 2, the class table has 2"),
        ("obj_detection/1.json", "{", "object table"),
        ("obj_detection/1.json", {"0": None}, "object table"),
        ("depth/1.png", b"\x89PNG\r\n\x1a\nnothing", "cannot be read"),
        ("depth/1.png", encode(picture(), "PNG"), "it is RGB, expected L"),
        ("normal/1.png", encode(picture(mode="L"), "PNG"), "it is L, expected RGB"),
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


def test_labels_turn_with_their_image(labelled):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(labelled / "data/vqav2/train2014/1.jpg", encode(picture(), exif=exif))
    samples, _ = import_labelled(labelled)
    (sample,) = samples.values()
    assert sample.meta["size"] == [20, 12]
    # what was bright on the right is bright at the bottom
    assert sample.labels["depth"][-1].min() > sample.labels["depth"][0].max()
    assert "normal" not in sample.labels, "its vectors would have to turn as well"


def test_read_official_labels_of_one_file(labelled):
    files = {"depth": labelled / "labels/depth/vqav2/train2014/1.png"}
    planes, tables, blank = read_published_labels(files, TABLES, 224)
    assert planes["depth"].shape == (224, 224) and tables == {} and blank == []


def test_wrong_folders_are_refused(tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "a.jpg"}])
    with pytest.raises(ValueError, match="not a folder"):
        caption_records(lists, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folder of any expert"):
        caption_records(lists, tmp_path, labels=tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        folder_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.tar files"):
        tar_records(tmp_path)
    with pytest.raises(ValueError, match="class tables"):
        import_records(folder_records(tmp_path), tmp_path / "out", source="", class_tables=lists)


# --- the job


def make_folder(root, count, corrupt=()):
    for i in range(count):
        data = b"\xff\xd8broken" if i in corrupt else encode(picture(i))
        write(root / f"{i // 10:05d}/{i:03d}.jpg", data)
        write(root / f"{i // 10:05d}/{i:03d}.txt", f"caption {i}")
    return folder_records(root)


def test_corrupt_images_are_skipped_counted_and_named(tmp_path):
    records = make_folder(tmp_path / "in", 12, corrupt=(0, 5, 11))
    (tmp_path / "in/00000/003.jpg").rename(tmp_path / "in/00000/003.png")
    write(tmp_path / "in/00000/003.jpg", encode(picture()))
    samples, report = run(folder_records(tmp_path / "in"), tmp_path / "out", samples_per_shard=4)
    assert len(samples) == 9 and len(records) == 12
    reasons = {skipped["key"]: skipped["reason"] for skipped in report.skipped}
    assert set(reasons) == {"00000--000", "00000--003", "00000--005", "00001--011"}
    assert "has the key 00000--003 too" in reasons["00000--003"]


def test_a_vanished_image_is_skipped(tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "gone.jpg", "caption": "a"}])
    samples, report = run(caption_records(lists, tmp_path), tmp_path / "out")
    assert samples == {} and "No such file" in report.skipped[0]["reason"]


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path):
    records = make_folder(tmp_path / "in", 15, corrupt=(4,))
    for workers in (1, 5):
        run(records, tmp_path / f"out{workers}", workers=workers, samples_per_shard=4)
    one, five = ({p.name: p.read_bytes() for p in (tmp_path / f"out{n}").iterdir()} for n in (1, 5))
    assert one == five


def test_sigkill_and_resume(tmp_path):
    records = make_folder(tmp_path / "in", 24, corrupt=(2, 13))
    settings = {"source": "test", "samples_per_shard": 3, "progress": False, "workers": 2}
    target, kept = tmp_path / "killed", 0
    for attempt in range(4):
        child = os.fork()
        if child == 0:
            try:
                write_sample = ShardWriter.write

                def slow_write(self, sample, write_sample=write_sample):
                    time.sleep(0.004)
                    write_sample(self, sample)

                ShardWriter.write = slow_write
                import_records(records, target, **settings)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and len(list(target.glob("*.index.json"))) <= kept:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (target / "import-report.json").exists() or (target / "index.json").exists()
        kept = len(list(target.glob("*.index.json")))
    done = len([p for p in target.glob("shard-*.tar")])
    written = []
    write_sample = ShardWriter.write
    ShardWriter.write = lambda self, sample: (written.append(sample.key), write_sample(self, sample))
    try:
        report = import_records(records, target, **settings)
    finally:
        ShardWriter.write = write_sample
    assert (report.records, report.imported, len(report.skipped)) == (24, 22, 2)
    assert len(written) <= 22 - 3 * (done - 1), "finished shards are not done again"
    import_records(records, tmp_path / "whole", **settings)
    killed, whole = (
        {p.name: p.read_bytes() for p in folder.glob("*") if p.name != importers.REPORT_FILE}
        for folder in (target, tmp_path / "whole")
    )
    assert killed == whole


def test_safe_keys():
    names = ["a/b", "a--b", "a-/b", "a/-b", "a.b", "a_b", "a b", "x" * 91, "x" * 92, "\N{SNOWMAN}", "a/b/c", "a//b"]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 90 and key.isascii() and "." not in key for key in keys)
    assert safe_key("train2014/COCO_train2014_000000000009") == "train2014--COCO_train2014_000000000009"
