"""Proves which ids, types and answers a sample's JSON may hold; tests/faults/test_sample_json.py draws the rest.

python -m pytest tests/data/test_sample_json.py
"""

import pytest

from prismer.dataloading.store.sample_json import check_meta, meta_problems

QUESTION = {"question": "What is it?"}


def question(**fields: object) -> dict:
    return {"questions": [QUESTION | fields]}


@pytest.mark.parametrize("image_id", [0, 391895, -1, "391895", "COCO_val2014_000000391895.jpg"])
def test_an_id_is_a_whole_number_or_a_text(image_id):
    check_meta({"image_id": image_id, **question(question_id=image_id)})


@pytest.mark.parametrize("value", [None, "", "  ", 1.5, True, [1], {"id": 1}, "\ud800"])
def test_other_ids_are_refused(value):
    (problem,) = meta_problems({"image_id": value})
    assert problem.startswith("its image_id is ") and problem.endswith("; expected a whole number or a text")
    (problem,) = meta_problems(question(question_id=value))
    assert problem.startswith("question 0 has the question_id ") and problem.endswith("a whole number or a text")


@pytest.mark.parametrize("field", ["question_type", "answer_type"])
def test_a_type_is_a_text(field):
    check_meta(question(**{field: "yes/no"}))
    for value in (None, "", " ", 1, ["other"]):
        (problem,) = meta_problems(question(**{field: value}))
        assert problem.startswith(f"question 0 has the {field} ") and problem.endswith("; expected a text")


def test_a_domain_is_a_text():
    check_meta({"domain": "near-domain"})
    for value in (None, "", 1, ["in-domain"]):
        (problem,) = meta_problems({"domain": value})
        assert problem.startswith("its domain is ") and problem.endswith("; expected a text")


def test_raw_answers_are_any_strings():
    check_meta(question(answers=[], raw_answers=["", " ", "...", "two\nlines", "2"] * 2))
    check_meta(question(raw_answers=[]))
    for value in (None, "red", [1], ["red", None], ["\ud800"], {"red": 1}):
        (problem,) = meta_problems(question(raw_answers=value))
        assert problem.startswith("question 0 has raw_answers ") and problem.endswith("; expected a list of strings")


def test_a_dataset_without_these_fields_stays_valid():
    answer = {"answer": "red", "weight": 0.6}
    check_meta({"captions": ["a cube"], "questions": [QUESTION | {"answers": [answer], "kind": None}], "id": None})


def test_a_box_is_four_edges_and_perhaps_a_score():
    boxes = {"0": [0, 0, 1, 1], "254": [0.25, 0.5, 0.25, 0.75, 0.9], "7": [0.0, 0.1, 0.2, 0.3, 0]}
    check_meta({"boxes": {"obj_detection": boxes, "ocr_detection": {}}})
    check_meta({"boxes": {}})


@pytest.mark.parametrize(
    "box",
    [None, [], [0, 0, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1.5, 1], [-0.1, 0, 1, 1], [0.6, 0, 0.5, 1], [0, 0.6, 1, 0.5]]
    + [[0, 0, 1, 1, 1.5], [0, 0, 1, float("nan")], [0, 0, 1, True], [0, 0, 1, "1"], {"left": 0}, "0011"],
    ids=repr,
)
def test_other_boxes_are_refused(box):
    (problem,) = meta_problems({"boxes": {"obj_detection": {"3": box, "4": [0, 0, 1, 1]}}})
    assert problem.startswith("box 3 of obj_detection is not left, top, right, bottom")


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        (None, "its 'boxes' are null; expected an object of expert: {id: box}"),
        ([[0, 0, 1, 1]], "its 'boxes' are a list of 1; expected"),
        ({"depth": {}}, "its 'boxes' name 'depth'; expected obj_detection or ocr_detection"),
        ({"obj_detection": [0]}, "its boxes of obj_detection are a list of 1; expected an object of id: box"),
        ({"ocr_detection": {"255": [0, 0, 1, 1]}}, "its boxes of ocr_detection have the id '255'; expected 0 to 254"),
        ({"ocr_detection": {"07": [0, 0, 1, 1]}}, "its boxes of ocr_detection have the id '07'; expected 0 to 254"),
    ],
)
def test_boxes_belong_to_ids_of_experts_with_names(boxes, problem):
    (found,) = meta_problems({"boxes": boxes})
    assert found.startswith(problem)
