"""Proves that question lists of VQAv2 and Visual Genome become the right samples, and name bad entries.

python -m pytest tests/data/test_vqa_questions.py
"""

import json

import pytest

from prismer.dataloading.sources.vqa_questions import vqa_records
from tests.data.import_sources import encode, gradient, run, write


def test_questions_and_answers_of_an_image_come_together(tmp_path):
    write(tmp_path / "data/vqav2/train2014/1.jpg", encode(gradient(1)))
    write(tmp_path / "data/vqav2/train2014/2.jpg", encode(gradient(2)))
    write(tmp_path / "data/vg/VG_100K/3.jpg", encode(gradient(3)))

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
    assert [(q["question_id"], len(q["answers"])) for q in two] == [(20, 1), (21, 0)]
    assert three == [{"question": "Who?", "answers": [{"answer": "me", "weight": 0.2}], "kind": "vg"}]
    assert "captions" not in samples["VG_100K--3"].meta, "a list of questions gives no captions"


def test_a_question_list_needs_questions(tmp_path):
    lists = write(tmp_path / "l.json", [{"dataset": "vqa", "image": "a.jpg", "caption": "b"}])
    with pytest.raises(ValueError, match="expected dataset vqa or vg and a question"):
        vqa_records([lists], tmp_path)


@pytest.mark.parametrize(
    "fault",
    [
        {"question": None},
        {"question": 5},
        {"question": ""},
        {"question": ["who?"]},
        {"question": "\ud800"},
        {"dataset": []},
        {"dataset": {}},
        {"dataset": "gqa"},
        {"question_id": []},
        {"question_id": None},
        {"answer": None},
        {"answer": 5},
        {"answer": ""},
        {"answer": {"yes": 10}},
        {"answer": ["a", 5]},
        {"answer": [["a"]]},
        {"weight": "1"},
        {"weight": None},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"weight": -1},
        {"weight": 0},
        {"weight": 10**400},
        {"weight": True},
        {"weight": []},
        {"answers": ["b"]},
        {"question_id": 1, "question": "another?"},
    ],
    ids=lambda fault: ascii(fault)[:40],
)
def test_a_bad_entry_affects_no_other_entry(tmp_path, fault):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    good = {"image": "a.jpg", "question": "what?", "answer": "cat", "weight": 0.4, "question_id": 1}
    bad = {"image": "a.jpg", "question": "who?", "answer": "a", "question_id": 2, **fault}
    lists = tmp_path / "l.json"
    lists.write_text(json.dumps([bad, good][:: 1 if fault.get("question_id") != 1 else -1]))
    samples, report = run(vqa_records([lists], tmp_path / "in"), tmp_path / "out")
    (question,) = samples["a"].meta["questions"]
    assert (question["question"], question["answers"]) == ("what?", [{"answer": "cat", "weight": 0.4}])
    assert len(report.skipped) == 1 and f" of {lists} " in report.skipped[0]["reason"]


def test_raw_answers_of_ten_people_are_kept_in_their_order(tmp_path):
    write(tmp_path / "in/a.jpg", encode(gradient()))
    given = ["red", "red", "dark red", "red", "maroon", "red", "red", "red", "brown", "dark red"]
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(given)]
    lists = write(
        tmp_path / "l.json",
        [
            {"image": "a.jpg", "question": "colour?", "answers": answers},
            {"image": "a.jpg", "question": "same?", "answer": given},
            {"image": "a.jpg", "question": "shares?", "answer": "red", "weight": 0.6},
            {"image": "a.jpg", "question": "shares?", "answer": "brown", "weight": 0.4},
        ],
    )
    samples, _ = run(vqa_records([lists], tmp_path / "in"), tmp_path / "out")
    asked = {q["question"]: q for q in samples["a"].meta["questions"]}
    assert asked["colour?"]["raw_answers"] == asked["same?"]["raw_answers"] == given
    assert asked["colour?"]["answers"][0] == {"answer": "red", "weight": 0.6}
    assert "raw_answers" not in asked["shares?"], "an entry alone does not tell what each person said"
