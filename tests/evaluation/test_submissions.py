"""Proves that submission files have the form of the evaluation servers, or that a sentence says why there is none.

python -m pytest tests/evaluation/test_submissions.py
"""

import copy

import pytest

from prismer.evaluation.submissions import ANSWER_FILE, CAPTION_FILE, submission_notes, submissions

CAPTIONED = [
    {"key": "a", "image_id": 7, "caption": "a dog", "captions": ["the dog"]},
    {"key": "b", "image_id": "0007", "domain": "in-domain", "caption": "", "captions": []},
    {"key": "c", "image_id": 0, "caption": "a cat", "captions": []},
]
ANSWERED = [
    {
        "key": "a",
        "image_id": 7,
        "questions": [
            {"question_id": 70, "question": "?", "kind": "any", "answers": [], "prediction": "red"},
            {"question_id": "71", "question": "?", "kind": "any", "answers": ["2"] * 10, "prediction": "2"},
        ],
    },
    {"key": "b", "image_id": 8, "questions": []},
    {"key": "c", "image_id": 8, "questions": [{"question_id": 0, "question": "?", "prediction": "no"}]},
]
SKIPPED = {"key": "d", "skipped": "it is damaged"}


def test_captions_are_submitted_with_the_ids_of_their_images():
    expected = [
        {"image_id": 7, "caption": "a dog"},
        {"image_id": "0007", "caption": ""},
        {"image_id": 0, "caption": "a cat"},
    ]
    assert submissions(CAPTIONED, "caption") == {CAPTION_FILE: expected}
    assert submission_notes(CAPTIONED, "caption") == []


def test_answers_are_submitted_with_the_ids_of_their_questions():
    expected = [
        {"question_id": 70, "answer": "red"},
        {"question_id": "71", "answer": "2"},
        {"question_id": 0, "answer": "no"},
    ]
    assert submissions(ANSWERED, "vqa") == {ANSWER_FILE: expected}
    assert submission_notes(ANSWERED, "vqa") == []


def test_classes_are_not_submitted():
    rows = [{"key": "a", "class": "cat", "prediction": "cat"}]
    assert submissions(rows, "classify") == {} and submission_notes(rows, "classify") == []


def test_rows_stay_as_they_are():
    rows = copy.deepcopy(CAPTIONED)
    submissions(rows, "caption")[CAPTION_FILE][0]["caption"] = "other"
    assert rows == CAPTIONED


def test_a_dataset_without_ids_gets_a_sentence():
    rows = [CAPTIONED[0], {"key": "b", "caption": "a cat"}, {"key": "c", "caption": "a hen", "image_id": None}]
    assert submissions(rows, "caption") == {}
    (note,) = submission_notes(rows, "caption")
    assert note.startswith(f"2 of 3 images have no image_id (the first: b), so there is no {CAPTION_FILE};")
    rows = [{"key": "a", "image_id": 1, "questions": [{"question": "?", "prediction": "red"}]}]
    assert submissions(rows, "vqa") == {}
    (note,) = submission_notes(rows, "vqa")
    assert note.startswith(f"1 of 1 questions have no question_id (the first: a), so there is no {ANSWER_FILE};")


def test_skipped_images_are_left_out_and_mentioned():
    assert submissions([*CAPTIONED, SKIPPED], "caption") == submissions(CAPTIONED, "caption")
    assert submission_notes([*CAPTIONED, SKIPPED, dict(SKIPPED, key="e")], "caption") == [
        f"{CAPTION_FILE} lacks the 2 images that were skipped; evaluation servers take only complete files"
    ]
    half_made = dict(SKIPPED, image_id=9, caption="a cow")
    assert submissions([*CAPTIONED, half_made], "caption") == submissions(CAPTIONED, "caption")
    assert submissions([SKIPPED], "caption") == {} and submission_notes([SKIPPED], "caption") == []


def test_an_id_that_occurs_twice_is_an_error():
    again = dict(CAPTIONED[0], key="z")
    with pytest.raises(ValueError, match="image_id 7 occurs twice, in a and z; evaluation servers take one"):
        submissions([*CAPTIONED, again], "caption")
    with pytest.raises(ValueError, match="question_id 0 occurs twice, in c and c"):
        submissions([*ANSWERED, ANSWERED[2]], "vqa")
