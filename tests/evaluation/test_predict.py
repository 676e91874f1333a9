"""Proves what a row holds: the ids and true texts of its sample, and what the model predicted.

pytest tests/evaluation/test_predict.py
"""

from prismer.evaluation.predict import Predictor
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS
from prismer.inference import Answer
from tests.evaluation.jobs import meta_of


class StandIn:
    """A model that replies with what it was asked."""

    def caption(self, images, **options):
        return [f"{image} {options}" for image in images]

    def answer(self, images, questions, answers, **options):
        return [
            [Answer(f"{image} {question} {answers} {options}", -0.123456) for question in group]
            for image, group in zip(images, questions, strict=True)
        ]

    def classify(self, images, classes):
        return [Answer(classes[0], -1.0, [(name, -1.0) for name in classes]) for _ in images]


def rows_of(kinds, metas, **fields):
    images = [f"image {i}" for i in range(len(metas))]
    keys = [f"key {i}" for i in range(len(metas))]
    return Predictor(model=StandIn(), kinds=kinds, **fields).rows(images, keys, metas)


def test_a_caption_stands_beside_the_true_ones_and_the_ids_of_its_image():
    first, second = rows_of([CAPTIONS], [{**meta_of(3), "domain": "in-domain"}, {}], beams=2, prefix="A")
    assert first == {
        "key": "key 0",
        "image_id": 1003,
        "domain": "in-domain",
        "caption": "image 0 {'beams': 2, 'prefix': 'A'}",
        "captions": meta_of(3)["captions"],
    }
    assert second == {"key": "key 1", "caption": "image 1 {'beams': 2, 'prefix': 'A'}", "captions": []}


def test_each_question_keeps_what_each_person_said_else_the_weights():
    (row, unasked) = rows_of([QUESTIONS], [meta_of(3), {}], answers="list", beams=1)
    raw, weighted = row["questions"]
    assert raw == {
        "question_id": 30,
        "question": "What colour is it?",
        "kind": "any",
        "question_type": "what colour",
        "answer_type": "other",
        "answers": meta_of(3)["questions"][0]["raw_answers"],
        "prediction": "image 0 What colour is it? list {'beams': 1}",
        "score": -0.1235,
    }
    assert weighted["answers"] == {"two": 1.0} and weighted["question_id"] == 31
    assert "question_type" not in weighted and unasked["questions"] == []
    assert set(row) == {"key", "image_id", "questions"}


def test_a_question_without_true_answers_and_with_a_kind():
    question = {"question": "How many?", "kind": "count"}
    (row,) = rows_of([QUESTIONS], [{"questions": [question]}])
    assert row["questions"][0]["answers"] == {} and row["questions"][0]["kind"] == "count"


def test_a_class_is_named_and_the_five_best_are_kept():
    names = list("abcdefg")
    metas = [{"class": 6}, {"class": "c"}, {}]
    rows = rows_of([CLASSES], metas, classes=names[::-1], class_names=names)
    assert [row["class"] for row in rows] == ["g", "c", None]
    assert {row["prediction"] for row in rows} == {"g"}
    assert rows[0]["ranked"] == list("gfedc")


def test_a_joint_task_has_captions_and_questions_in_one_row():
    (row,) = rows_of([CAPTIONS, QUESTIONS], [meta_of(0)])
    assert list(row) == ["key", "image_id", "caption", "captions", "questions"]
