"""Proves what the table of scores and the sheet of samples show.

pytest tests/evaluation/test_report.py
"""

import io

from PIL import Image

from prismer.evaluation.report import main_scores, samples_png, score_table

SCORES = {
    "CIDEr-D": 1.25,
    "CIDEr-D/in-domain": 1.5,
    "accuracy": 0.5,
    "accuracy/yes/no": 1.0,
    "accuracy/answer_type/number": 0.25,
    "accuracy/question_type/is the": 0.75,
    "score": 0.1,
}


def test_the_table_names_each_score_and_leaves_out_the_one_that_compares_checkpoints():
    assert score_table({"first": SCORES, "second": {"accuracy": 0.0}}, "4 images").splitlines() == [
        "| 4 images | first | second |",
        "|---|---|---|",
        "| CIDEr-D | 1.250 |  |",
        "| CIDEr-D, in-domain | 1.500 |  |",
        "| VQA accuracy, all | 0.500 | 0.000 |",
        "| VQA accuracy, yes/no | 1.000 |  |",
        "| VQA accuracy, answers of type number | 0.250 |  |",
        "| VQA accuracy, questions of type is the | 0.750 |  |",
    ]


def test_question_types_are_not_main_scores():
    assert list(SCORES.keys() - main_scores(SCORES).keys()) == ["accuracy/question_type/is the"]


def jpeg(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "JPEG")
    return file.getvalue()


def test_any_texts_and_shapes_can_be_drawn():
    question = {"question": "what?", "kind": "any", "answers": ["$5"], "prediction": "$$\\frac{"}
    rows = [
        {"key": "a", "caption": "Price $5 or $\\undefined{.", "captions": ["two $ signs $"]},
        {"key": "b", "questions": [question, {**question, "answers": {}}, {**question, "answers": {"red": 1.0}}]},
        {"key": "c", "class": "cat", "prediction": "cat", "ranked": ["cat"]},
        {"key": "d", "class": None, "prediction": "cat", "ranked": ["cat"]},
        {"key": "e", "caption": "\u732b", "captions": []},
    ]
    samples = [(jpeg(300, 20 * n + 1), row) for n, row in enumerate(rows)]
    drawn = samples_png(samples)
    # four columns and two rows
    width, height = Image.open(io.BytesIO(drawn)).size
    assert width > 1700 and height > 800
    assert samples_png(samples) == drawn


def test_the_sheet_shows_true_and_predicted_texts(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.text", lambda axis, x, y, text, **style: shown.append((text, style["color"]))
    )
    ten = ["grey", "red", "red", *["blue"] * 7]
    question = {"question": "which colour?", "kind": "any", "answers": ten, "prediction": "grey"}
    rows = [
        {"caption": "A cat.", "captions": ["a dog", "a fox"]},
        {"questions": [question, {**question, "prediction": "blue"}, {**question, "answers": {"a": 0.1, "b": 0.9}}]},
        {"class": "cat", "prediction": "dog", "ranked": ["dog"]},
    ]
    samples_png([(jpeg(20, 20), row) for row in rows])
    assert shown == [
        ("true: a dog", "dimgray"),
        ("generated: A cat.", "black"),
        ("which colour? grey (true: blue)", "firebrick"),
        ("which colour? blue", "darkgreen"),
        ("which colour? grey (true: b)", "firebrick"),
        ("dog (true: cat)", "firebrick"),
    ]
