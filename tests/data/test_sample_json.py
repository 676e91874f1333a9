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
