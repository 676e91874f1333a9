"""Scores of predictions: the rows of `prismer.evaluation.predict` in, numbers by name out."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from prismer.evaluation.caption_metrics import caption_scores
from prismer.evaluation.text_kinds import TEXT_KINDS
from prismer.evaluation.vqa_accuracy import keeps_each_person, vqa_accuracy

# the groups of questions whose accuracy is shown: a prefix of the name, and the field that tells them apart
_GROUPS = {"accuracy": "kind", "accuracy/answer_type": "answer_type", "accuracy/question_type": "question_type"}
# the number of class names that a top-5 score looks at
_TOP = 5


def scores(rows: Sequence[dict]) -> dict[str, float]:
    """Score predictions; rows with "skipped", and images without a true text, are left out.

    Args:
        rows: from `predict`, for each image the fields of its task: caption and the true captions, and its domain;
            questions (question, kind, answers as `vqa_accuracy` takes them, prediction, answer_type, question_type);
            class, prediction and the best class names, "ranked".

    Returns:
        For captions "BLEU-1" to "BLEU-4", "ROUGE-L", "CIDEr-D" (at most 10), and "CIDEr-D/DOMAIN" as `caption_scores`
        says. For questions "accuracy", "accuracy/KIND", "accuracy/answer_type/TYPE" and "accuracy/question_type/TYPE".
        For classes "top-1", and "top-5" if every row has "ranked". Last "score", which compares checkpoints: the mean
        of CIDEr-D / 10, accuracy and top-1, of those that exist. {} if nothing can be scored.
    """
    rows = [row for row in rows if "skipped" not in row]
    result: dict[str, float] = {}
    captioned = [row for row in rows if row.get("captions")]
    if captioned:
        result |= caption_scores(
            [row["caption"] for row in captioned],
            [row["captions"] for row in captioned],
            [row.get("domain") for row in captioned],
        )
    result |= _answer_scores(_answered(rows))
    classified = [row for row in rows if row.get("class") is not None]
    if classified:
        result["top-1"] = _mean([row["prediction"] == row["class"] for row in classified])
        if all("ranked" in row for row in classified):
            result[f"top-{_TOP}"] = _mean([row["class"] in row["ranked"][:_TOP] for row in classified])
    parts = [result[kind.metric] / kind.largest for kind in TEXT_KINDS if kind.metric in result]
    if parts:
        result["score"] = sum(parts) / len(parts)
    return result


def score_notes(rows: Sequence[dict]) -> list[str]:
    """What a reader of `scores(rows)` has to know, one sentence each; [] if every score is the official one."""
    answers = [question["answers"] for question in _answered([row for row in rows if "skipped" not in row])]
    distinct = sum(isinstance(given, Mapping) for given in answers)
    few = sum(not keeps_each_person(given) for given in answers) - distinct
    notes = []
    if distinct:
        notes.append(
            f"{distinct} of {len(answers)} questions keep distinct answers with weights, not what each person said: "
            f"their accuracy is that of distinct answers, not the official VQA accuracy"
        )
    if few:
        notes.append(
            f"{few} of {len(answers)} questions have fewer than four true answers: a prediction that equals one of "
            f"them counts as 1, not as in the official VQA accuracy"
        )
    if any(row.get("domain") for row in rows if row.get("captions")):
        notes.append(
            "CIDEr-D of a domain takes its n-gram weights from the images of that domain alone, as the NoCaps "
            "evaluation does"
        )
    return notes


def _answered(rows: Sequence[dict]) -> list[dict]:
    """The questions that have true answers."""
    return [question for row in rows for question in row.get("questions", ()) if question["answers"]]


def _answer_scores(questions: Sequence[dict]) -> dict[str, float]:
    """Mean VQA accuracy over all questions, then for each group of them in alphabetical order."""
    if not questions:
        return {}
    accuracies = [vqa_accuracy(question["prediction"], question["answers"]) for question in questions]
    result = {"accuracy": _mean(accuracies)}
    for prefix, field in _GROUPS.items():
        groups = defaultdict(list)
        for question, accuracy in zip(questions, accuracies, strict=True):
            if question.get(field) is not None:
                groups[question[field]].append(accuracy)
        result |= {f"{prefix}/{name}": _mean(groups[name]) for name in sorted(groups)}
    return result


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
