"""Proves that questions and annotations of VQAv2 keep all ten answers, ids and types, and name what is odd.

python -m pytest tests/data/test_vqa_annotations.py
"""

import json

import pytest

from prismer.dataloading.sources.published import published_records
from prismer.dataloading.sources.vqa_questions import vqa_records
from tests.data.import_sources import encode, gradient, run, write

TEN = ["red", "red", "dark red", "red", "maroon", "red", "red", "red", "", "dark red"]


def vqa(root, subtype="val2014", questions=None, annotations=None):
    """Files as published; images 42 and 43, questions 42000, 42001 and 43000."""
    for i in (42, 43):
        write(root / f"{subtype}/COCO_{subtype}_{i:012d}.jpg", encode(gradient(i)))
    asked = [(42, 42000, "What color is it?"), (42, 42001, "How many?"), (43, 43000, "Is it day?")]
    if questions is None:
        questions = [{"image_id": i, "question": text, "question_id": q} for i, q, text in asked]
    about = {"info": {}, "data_type": "mscoco", "data_subtype": subtype, "license": {}}
    paths = [
        write(
            root / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
            {**about, "task_type": "Open-Ended", "questions": questions},
        )
    ]
    if annotations is None:
        annotations = [annotation(42, 42000, TEN), annotation(42, 42001, ["2"] * 10, "how many", "number")]
        annotations += [annotation(43, 43000, ["yes"] * 9 + ["no"], "is it", "yes/no")]
    if annotations:
        content = {**about, "annotations": annotations}
        paths.append(write(root / f"v2_mscoco_{subtype}_annotations.json", content))
    return paths


def annotation(image, question, answers, question_type="what color is the", answer_type="other"):
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)]
    return {
        "question_type": question_type,
        "multiple_choice_answer": str(answers[0]),
        "answers": given,
        "image_id": image,
        "answer_type": answer_type,
        "question_id": question,
    }


def questions_of(samples):
    return {q["question_id"]: q for sample in samples.values() for q in sample.meta["questions"]}


def test_all_ten_answers_ids_and_types_are_kept(tmp_path):
    vqa(tmp_path / "in")
    samples, report = run(published_records("vqav2", tmp_path / "in", split="val"), tmp_path / "out")
    assert list(samples) == ["val2014--COCO_val2014_000000000042", "val2014--COCO_val2014_000000000043"]
    assert [sample.meta["image_id"] for sample in samples.values()] == [42, 43]
    assert list(questions_of(samples)) == [42000, 42001, 43000]
    colour = questions_of(samples)[42000]
    assert colour["raw_answers"] == TEN
    assert (colour["question_type"], colour["answer_type"], colour["kind"]) == ("what color is the", "other", "vqa")
    assert colour["answers"] == [
        {"answer": "red", "weight": 0.6},
        {"answer": "dark red", "weight": 0.2},
        {"answer": "maroon", "weight": 0.1},
    ]
    (other,) = report.others
    assert other["reason"] == "1 questions have blank answers, which get no weight, the first question 42000"


def test_training_weights_are_those_of_a_list_of_the_same_answers(tmp_path):
    answers = ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + ["d"]
    vqa(tmp_path / "in", annotations=[annotation(42, 42000, answers)])
    lists = write(
        tmp_path / "l.json",
        [{"image": "val2014/COCO_val2014_000000000042.jpg", "question": "What color is it?", "answer": answers}],
    )
    new, _ = run(published_records("vqav2", tmp_path / "in", split="val"), tmp_path / "new")
    old, _ = run(vqa_records([lists], tmp_path / "in"), tmp_path / "old")
    (before,) = old["val2014--COCO_val2014_000000000042"].meta["questions"]
    assert questions_of(new)[42000]["answers"] == before["answers"]


@pytest.mark.parametrize("split, subtype", [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_a_test_set_has_questions_without_answers(tmp_path, split, subtype):
    (questions,) = vqa(tmp_path / "in", "test2015", annotations=[])
    # both lie in one folder, and each is found by its own name
    content = {**json.loads(questions.read_text()), "data_subtype": subtype}
    write(tmp_path / "in/v2_OpenEnded_mscoco_test-dev2015_questions.json", content)
    samples, report = run(published_records("vqav2", tmp_path / "in", split=split), tmp_path / "out")
    assert list(samples)[0] == "test2015--COCO_test2015_000000000042" and report.others == []
    assert all(q["answers"] == [] and "raw_answers" not in q for q in questions_of(samples).values())


def test_several_splits_come_together(tmp_path):
    vqa(tmp_path / "in")
    asked = [{"image_id": 42, "question": "What?", "question_id": 1}]
    vqa(tmp_path / "in", "train2014", asked, [annotation(42, 1, ["x"] * 10)])
    samples, _ = run(published_records("vqav2", tmp_path / "in", split="train+val"), tmp_path / "out")
    assert list(questions_of(samples)) == [1, 42000, 42001, 43000]
    assert {key.split("--")[0] for key in samples} == {"train2014", "val2014"}


def test_images_may_lie_in_the_folder_of_coco(tmp_path):
    paths = vqa(tmp_path / "vqa/Questions")
    (tmp_path / "vqa/Questions/val2014").rename(tmp_path / "val2014")
    records = published_records("vqav2", tmp_path / "vqa", split="val", images=tmp_path)
    named = published_records("vqav2", tmp_path / "vqa", annotations=paths, images=tmp_path)
    one, _ = run(records, tmp_path / "one")
    two, _ = run(named, tmp_path / "two")
    assert questions_of(one) == questions_of(two) and len(one) == 2


def test_what_is_odd_is_corrected_counted_and_named(tmp_path):
    questions = [
        {"image_id": 42, "question": "How many?", "question_id": 1},
        {"image_id": 42, "question": "How many?", "question_id": 1},
        {"image_id": 43, "question": "Another?", "question_id": 1},
        {"image_id": 42, "question": "Unanswered?", "question_id": 2},
        {"image_id": 42, "question": "Wrong image?", "question_id": 3},
        {"image_id": "x", "question": "No number?", "question_id": 4},
        {"image_id": 42, "question": "??", "question_id": 5},
        {"image_id": 42, "question_id": 6},
        "a text",
        {"image_id": 99, "question": "Missing image?", "question_id": 7},
        {"image_id": 43, "question": "Nested?", "question_id": 8},
    ]
    annotations = [
        annotation(42, 1, [2, 2.0, 2.5, "2", None, float("nan"), " ", "two", "2", "2"]),
        annotation(42, 1, ["again"] * 10),
        annotation(43, 3, ["a"] * 10),
        annotation(42, 50, ["of no question"] * 10),
        annotation(43, 8, [["a"]] * 10),
        {"question_id": 2, "image_id": 42},
        annotation(99, 7, ["a"] * 10, question_type="", answer_type=5),
    ]
    questions_file, annotations_file = vqa(tmp_path / "in", "val2014", questions, annotations)
    samples, report = run(published_records("vqav2", tmp_path / "in", split="val"), tmp_path / "out")
    asked = questions_of(samples)
    assert list(asked) == [1, 2, 8] and asked[2]["answers"] == asked[8]["answers"] == []
    assert asked[1]["raw_answers"] == ["2", "2", "2.5", "2", "", "", " ", "two", "2", "2"]
    assert asked[1]["answers"] == [
        {"answer": "2", "weight": 0.5},
        {"answer": "2.5", "weight": 0.1},
        {"answer": "two", "weight": 0.1},
    ]
    assert sorted(o["reason"] for o in report.others if o["file"] == str(annotations_file)) == [
        "1 annotations are listed twice; the first is used, the first of question 1",
        "1 annotations belong to no question, the first question_id 50",
        "2 answers are null or NaN and kept as empty, the first of question 1",
        "2 questions have blank answers, which get no weight, the first question 1",
        "3 answers are numbers and read as texts, the first of question 1",
    ]
    assert sorted(o["reason"] for o in report.others if o["file"] == str(questions_file)) == [
        "1 questions are listed twice and read once, the first question_id 1",
        "2 questions have no annotation, the first question_id 2",
    ]
    named = " | ".join(skipped["reason"] for skipped in report.skipped)
    for words in (
        "question 2 of",
        "question 4 of",
        "expected a number of COCO",
        "holds only punctuation",
        "has no question_id, no image_id or no question",
        "is 'a text'",
        "No such file",
        "has the answer a list of 1",
        "no list of answers",
    ):
        assert words in named, words
    assert len(report.skipped) == 9


@pytest.mark.parametrize(
    "files, message",
    [
        ((1,), "holds annotations without questions; name the file of the questions"),
        ((0, 2), r"fits a question: it has question_id 900, the questions have 42000; name the two files of one split"),
        ((3,), "has the data_subtype null; expected the folder of its images"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, files, message):
    paths = vqa(tmp_path)
    other = {"annotations": [annotation(42, 900, ["a"] * 10)]}
    paths.append(write(tmp_path / "other.json", other))
    paths.append(write(tmp_path / "bare.json", {"questions": [{"question": "a", "question_id": 1, "image_id": 1}]}))
    with pytest.raises(ValueError, match=message):
        published_records("vqav2", tmp_path, annotations=[paths[i] for i in files])


def test_questions_alone_are_refused_for_training(tmp_path):
    vqa(tmp_path, annotations=[])
    with pytest.raises(ValueError, match="v2_OpenEnded_mscoco_val2014_questions.json alone for the split val; put"):
        published_records("vqav2", tmp_path, split="val")
