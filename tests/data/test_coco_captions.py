"""Proves that caption lists of COCO, NoCaps and Visual Genome become the right samples, and name bad entries.

python -m pytest tests/data/test_coco_captions.py
"""

import json

import pytest

from prismer.dataloading.sources.coco_captions import caption_records
from tests.data.import_sources import captions_of, encode, gradient, run, write


def test_entries_of_one_image_become_its_captions(tmp_path):
    names = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in (9, 25)]
    for i, name in enumerate(names):
        write(tmp_path / "data" / name, encode(gradient(i)))
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
    write(tmp_path / "data/vqav2/val2014/COCO_val2014_000000000007.jpg", encode(gradient()))
    lists = write(tmp_path / "l.json", [{"image": "val2014/COCO_val2014_000000000007.jpg"}])
    annotations = [{"image_id": 7, "caption": "a"}, {"image_id": 8, "caption": "b"}, {"image_id": 7, "caption": "c"}]
    captions = write(tmp_path / "gt.json", {"annotations": annotations})
    samples, _ = run(caption_records(lists, tmp_path / "data", captions_file=captions), tmp_path / "out")
    (sample,) = samples.values()
    assert sample.meta["captions"] == ["a", "c"]
    samples, _ = run(caption_records(lists, tmp_path / "data"), tmp_path / "bare")
    assert next(iter(samples.values())).meta["captions"] == []


def test_nocaps_ids_are_kept(tmp_path):
    write(tmp_path / "data/nocaps/val/0013ea.jpg", encode(gradient()))
    lists = write(tmp_path / "l.json", [{"image": "val/0013ea.jpg", "img_id": 4}])
    samples, _ = run(caption_records(lists, tmp_path / "data", dataset="nocaps"), tmp_path / "out")
    assert samples["val--0013ea"].meta["image_id"] == 4


def test_visual_genome_paths_are_cut(tmp_path):
    write(tmp_path / "data/vg/VG_100K/2.jpg", encode(gradient()))
    lists = write(tmp_path / "l.json", [{"image": "/x/visual-genome/VG_100K/2.jpg", "caption": "a tree"}])
    samples, _ = run(caption_records(lists, tmp_path / "data", dataset="vg"), tmp_path / "out")
    assert samples["VG_100K--2"].meta["captions"] == ["a tree"]


def test_a_question_list_is_refused_as_a_caption_list(tmp_path):
    write(tmp_path / "in/a.jpg", encode(gradient()))
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
def test_a_bad_entry_affects_no_other_entry(tmp_path, fault):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    bad = {"image": "a.jpg", "caption": "a dog", **fault} if isinstance(fault, dict) and fault else fault
    lists = tmp_path / "l.json"
    lists.write_text(json.dumps([{"image": "a.jpg", "caption": "a cat"}, bad]))
    samples, report = run(caption_records(lists, tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {"a": ["a cat"]}
    (skipped,) = report.skipped
    assert skipped["reason"].startswith(f"entry 1 of {lists} ")


def test_ids_match_as_number_and_as_text(tmp_path):
    for i in (7, 8):
        write(tmp_path / f"in/{i}.jpg", encode(gradient()))
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


def test_annotations_that_match_no_image_are_refused(tmp_path):
    write(tmp_path / "in/7.jpg", encode(gradient()))
    lists = write(tmp_path / "l.json", [{"image": "7.jpg"}])
    reference = write(tmp_path / "gt.json", {"annotations": [{"image_id": "x7", "caption": "a"}]})
    with pytest.raises(ValueError, match="no image of the list has an id of .*'x7', the list 7"):
        caption_records(lists, tmp_path / "in", captions_file=reference)
