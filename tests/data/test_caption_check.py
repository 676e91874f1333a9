"""Proves that the check of captions counts the kinds that are named and the words that come from nowhere.

python -m pytest tests/data/test_caption_check.py
"""

import json
import sys

import numpy as np
import pytest

from prismer.dataloading.store.shards import Sample, ShardWriter
from scripts import check_captions
from scripts.check_captions import foreign_words, found_by_experts, names

CLASSES = {"obj_detection": ["person", "dog", "traffic light"]}
META = {
    "instances": {"0": 0, "1": 0, "2": 1, "3": 2},
    "words": {"0": "STOP"},
    "boxes": {
        "obj_detection": {"0": [0, 0, 1, 1, 0.9], "1": [0, 0, 1, 1, 0.6], "2": [0, 0, 1, 1, 0.3], "3": [0, 0, 1, 1]}
    },
}


def test_a_confident_kind_counts_once():
    assert found_by_experts(META, CLASSES, 0.5) == (["person", "traffic light"], ["stop"])
    assert found_by_experts(META, CLASSES) == (["person", "dog", "traffic light"], ["stop"])
    assert found_by_experts({}, CLASSES) == ([], [])


@pytest.mark.parametrize(
    "caption, kind, named",
    [
        ("Two people and a dog", "person", True),
        ("A red traffic light", "traffic light", True),
        ("Three traffic lights, left of a dog", "traffic light", True),
        ("A traffic sign", "traffic light", False),
        ("A hot doghouse", "dog", False),
        ("", "dog", False),
    ],
)
def test_a_kind_is_named_as_a_whole_in_singular_or_plural(caption, kind, named):
    assert names(caption, kind) is named


def test_words_from_nowhere():
    kinds, words = found_by_experts(META, CLASSES)
    caption = "Two people, a small red dog and a sign that says stop"
    assert foreign_words(caption, kinds, words) == ([], 7)
    assert foreign_words("A shiny sphere behind two dogs", kinds, words) == (["sphere"], 5)
    # without a detection there is no object to speak of
    assert foreign_words("A red object and a sign", [], []) == (["object", "sign"], 3)


def test_the_shares_of_a_dataset(tmp_path, monkeypatch, capsys):
    plane = np.full((32, 32), 255, np.uint8)
    with ShardWriter(tmp_path / "photos", classes=CLASSES, source="tests") as writer:
        for i in range(2):
            writer.write(Sample(f"a{i}", b"\xff\xd8", {"obj_detection": plane}, META))
    captions = ["A person and a sphere", "Two people left of a traffic light"]
    lines = [json.dumps({"image": f"a{i}", "caption": caption}) for i, caption in enumerate(captions)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path / "photos"), str(tmp_path / "captions.jsonl")])
    check_captions.main()
    printed = capsys.readouterr().out
    assert "3 of 4 kinds with a confidence of 0.5 or more are named: 75.0%" in printed
    assert "1 of 7 content words come from nowhere: 14.3% {'sphere': 1}" in printed
    (tmp_path / "captions.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="1 lines for 2 images; caption the whole dataset"):
        check_captions.main()
