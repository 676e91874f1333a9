"""Proves that an import of broken annotation files keeps every whole entry or names it, or ends with one sentence.

python -m pytest tests/faults/test_published_imports.py
"""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.anything import cases, dump, mutated
from tests.faults.test_imports import JPEGS, empty, is_named, run

COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "domain": "in-domain"} for i in range(3)],
    "annotations": [{"id": n, "image_id": n % 3, "caption": f"caption number {n}"} for n in range(6)],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "",
            "filename": f"{i}.jpg",
            "split": ["train", "restval"][i % 2],
            "cocoid": i,
            "sentences": [{"raw": f"caption number {n}"} for n in (2 * i, 2 * i + 1)],
        }
        for i in range(3)
    ],
}
REGIONS = [{"id": i, "regions": [{"image_id": i, "phrase": f"caption number {i}"}]} for i in range(3)]
QAS = [{"id": i, "qas": [{"qa_id": i, "question": f"question {i}?", "answer": "Yes."}]} for i in range(3)]
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"image_id": n % 3, "question": f"question {n}?", "question_id": n} for n in range(6)],
}
ANSWERS = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_id": n,
            "image_id": n % 3,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": ["a", "b"][i % 2], "answer_id": i} for i in range(10)],
        }
        for n in range(6)
    ],
}


@pytest.fixture(scope="module", autouse=True)
def fast_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


def lay_out(place, contents):
    """Images under their plain names and those of COCO; returns the paths of the annotation files."""
    images = empty(place) / "images"
    images.mkdir()
    for i in range(3):
        for name in (f"{i}.jpg", f"COCO_val2014_{i:012d}.jpg"):
            (images / name).write_bytes(JPEGS[i])
    for number, content in enumerate(contents):
        (place / f"{number}.json").write_bytes(dump(content))
    return [place / f"{number}.json" for number in range(len(contents))]


@cases(40)
@given(which=st.sampled_from(["coco", "karpathy", "regions", "qas"]), data=st.data())
def test_every_image_of_a_broken_annotation_file_is_imported_or_named(place, capsys, which, data):
    whole = {"coco": COCO, "karpathy": KARPATHY, "regions": REGIONS, "qas": QAS}[which]
    content = data.draw(mutated(whole))
    (file,) = lay_out(place, [content])
    kind = "coco" if which in ("coco", "karpathy") else "vg"
    split = ["--split", "train+restval"] if which == "karpathy" else []
    arguments = [kind, place, *split, "--images", place / "images", "--annotations", file]
    samples, skipped, printed = run(arguments, place / "out", capsys)
    if not samples and not skipped:
        return
    kept = {sample.jpeg for sample in samples}
    if which in ("coco", "karpathy"):
        listed = content.get("images") if isinstance(content, dict) else None
        for entry, name in ((entry, "file_name" if which == "coco" else "filename") for entry in whole["images"]):
            if isinstance(listed, list) and entry in listed:
                assert JPEGS[int(entry[name][0])] in kept or is_named(entry[name], skipped, printed), entry
    else:
        for i, entry in enumerate(whole):
            if isinstance(content, list) and entry in content:
                assert JPEGS[i] in kept or is_named(f"{i}.jpg", skipped, printed), entry


@cases(40)
@given(questions=mutated(QUESTIONS), answers=mutated(ANSWERS), which=st.sampled_from(["questions", "answers", "both"]))
def test_every_question_of_broken_files_of_vqav2_is_imported_or_named(place, capsys, questions, answers, which):
    questions = QUESTIONS if which == "answers" else questions
    answers = ANSWERS if which == "questions" else answers
    files = lay_out(place, [questions, answers])
    arguments = ["vqav2", place, "--images", place / "images", "--annotations", *files]
    samples, skipped, printed = run(arguments, place / "out", capsys)
    if not samples and not skipped:
        return
    found = {q["question"]: q for sample in samples for q in sample.meta["questions"]}
    listed = questions.get("questions") if isinstance(questions, dict) else None
    for number, entry in enumerate(listed if isinstance(listed, list) else []):
        if entry in QUESTIONS["questions"]:
            names = f"question {number} of", f"COCO_val2014_{entry['image_id']:012d}.jpg"
            assert entry["question"] in found or any(is_named(name, skipped, printed) for name in names), entry
    if which == "questions":
        for question in found.values():
            raw = question.get("raw_answers")
            assert raw is None or raw == ["a", "b"] * 5, "whole annotations keep their answers"
