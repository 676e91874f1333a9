"""Proves that JSON lists of another form end in one sentence that says how to convert them.

python -m pytest tests/data/test_json_lists.py
"""

import pytest

from prismer.cli.main import main
from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.vqa_questions import vqa_records
from tests.data.import_sources import captions_of, encode, gradient, run, write


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"images": [], "annotations": [{"image_id": 1, "caption": "a"}]},
            "COCO captions; import it with `prismer data import coco",
        ),
        (
            {"questions": [{"question": "a", "image_id": 1}]},
            "VQAv2 questions; import it with `prismer data import vqav2",
        ),
        (
            {"annotations": [{"question_id": 1, "answers": []}]},
            "VQAv2 annotations; import it with `prismer data import vqav2",
        ),
        ({"annotations": [{"bbox": [], "category_id": 1}]}, "COCO objects"),
        (
            {"images": [{"sentences": [{"raw": "a"}]}], "dataset": "coco"},
            "Karpathy .images with sentences.; import it with",
        ),
        ({"images": [{"file_name": "a"}]}, "COCO list of images; import it with `prismer data import coco"),
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


def test_a_key_given_twice_is_named(tmp_path):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    entries = '[{"image": "a.jpg", "caption": "a"}, {"image": "a.jpg", "caption": "b", "caption": "c"}]'
    lists = write(tmp_path / "l.json", entries)
    samples, report = run(caption_records(lists, tmp_path / "in"), tmp_path / "out")
    assert captions_of(samples) == {"a": ["a"]} and "one key twice" in report.skipped[0]["reason"]


def test_images_that_no_list_names_are_counted(tmp_path):
    for name in ("a.jpg", "b.jpg", "deep/er/c.PNG"):
        write(tmp_path / "in" / name, encode(gradient()))
    lists = write(tmp_path / "l.json", [{"image": "a.jpg", "caption": "a", "question": "what?"}])
    for records in (caption_records(lists, tmp_path / "in"), vqa_records([lists], tmp_path / "in")):
        (other,) = records.others
        assert other.reason == "2 images that no list names, the first b.jpg"
