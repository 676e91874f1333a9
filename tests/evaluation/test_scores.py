"""Proves which numbers the rows of predictions give, and what their reader is told.

python -m pytest tests/evaluation/test_scores.py
"""

import pytest

from prismer.evaluation.scores import score_notes, scores

CAPTION_NAMES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]


def question(prediction: str, answers: list | dict, kind: str = "any", **fields: str) -> dict:
    return dict(question="?", kind=kind, answers=answers, prediction=prediction, **fields)


def test_answers_are_scored_in_all_and_by_kind_and_type():
    rows = [
        dict(
            key="a",
            questions=[
                question("red", ["red"] * 9 + ["maroon"], "colour", answer_type="other", question_type="what color"),
                question("maroon", ["red"] * 9 + ["maroon"], "colour", answer_type="other", question_type="what is"),
                question("2", ["two"], "count", answer_type="number"),
            ],
        ),
        dict(key="b", questions=[question("no", {"yes": 0.8, "no": 0.2}, "exist"), question("no", [], "exist")]),
    ]
    found = scores(rows)
    expected = {
        "accuracy": (1 + 0.3 + 1 + 0.6) / 4,
        "accuracy/colour": 0.65,
        "accuracy/count": 1.0,
        "accuracy/exist": 0.6,
        "accuracy/answer_type/number": 1.0,
        "accuracy/answer_type/other": 0.65,
        "accuracy/question_type/what color": 1.0,
        "accuracy/question_type/what is": 0.3,
        "score": (1 + 0.3 + 1 + 0.6) / 4,
    }
    assert found == pytest.approx(expected) and list(found) == list(expected)


def test_captions_are_scored_in_all_and_by_domain():
    rows = [
        dict(key="a", caption="a red cube", captions=["a red cube on grass"], domain="out-domain"),
        dict(key="b", caption="a blue dog", captions=["a blue dog runs", "the dog"], domain="in-domain"),
        dict(key="c", caption="two cats", captions=["three dogs"], domain="out-domain"),
        dict(key="d", caption="a test image", captions=[]),
    ]
    found = scores(rows)
    assert list(found) == [*CAPTION_NAMES, "CIDEr-D/in-domain", "CIDEr-D/out-domain", "score"]
    for domain in ("in-domain", "out-domain"):
        alone = [dict(row, domain=None) for row in rows if row.get("domain") == domain]
        assert found[f"CIDEr-D/{domain}"] == scores(alone)["CIDEr-D"]
        assert list(scores(alone)) == [*CAPTION_NAMES, "score"]
    assert found["score"] == pytest.approx(found["CIDEr-D"] / 10)


def test_classes_are_scored_by_the_best_and_the_five_best_names():
    ranked = ["cat", "dog", "cow", "hen", "pig", "fox"]
    rows = [
        {"key": str(i), "class": name, "prediction": "cat", "ranked": ranked}
        for i, name in enumerate(["cat", "pig", "fox", None])
    ]
    assert scores(rows) == pytest.approx({"top-1": 1 / 3, "top-5": 2 / 3, "score": 1 / 3})
    del rows[0]["ranked"]
    assert "top-5" not in scores(rows)


def test_skipped_images_are_left_out():
    rows = [
        dict(key="a", caption="a red cube", captions=["a red cube"]),
        dict(key="b", skipped="it is damaged"),
        dict(key="c", caption="a dog", captions=["a dog"], questions=[question("red", ["red"] * 10)]),
    ]
    kept = [row for row in rows if "skipped" not in row]
    assert scores(rows) == scores(kept) and score_notes(rows) == score_notes(kept) == []
    assert scores(rows[1:2]) == {} and score_notes(rows[1:2]) == []
    # even if it has predictions
    assert scores([*kept, dict(kept[0], skipped="?", caption="wrong")]) == scores(kept)


def test_the_reader_is_told_which_accuracy_is_not_the_official_one():
    ten = question("red", ["red"] * 10)
    assert score_notes([dict(key="a", questions=[ten, question("red", [])])]) == []
    shares, few = question("red", {"red": 1.0}), question("red", ["red"])
    notes = score_notes([dict(key="a", questions=[ten, shares]), dict(key="b", questions=[shares, few])])
    assert [note.split(":")[0] for note in notes] == [
        "2 of 4 questions keep distinct answers with weights, not what each person said",
        "1 of 4 questions have fewer than four true answers",
    ]
    assert "accuracy is that of distinct answers" in notes[0]


def test_the_reader_is_told_how_domains_are_scored():
    row = dict(key="a", caption="a dog", captions=["a dog"], domain="near-domain")
    (note,) = score_notes([row])
    assert "images of that domain alone" in note
    assert score_notes([dict(row, captions=[])]) == []
