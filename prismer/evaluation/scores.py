"""Scores of predictions: the records of `prismer.evaluation.predict` in, numbers by name out."""

from collections.abc import Sequence

from prismer.errors import InputError
from prismer.evaluation.caption_metrics import caption_scores
from prismer.evaluation.vqa_accuracy import answer_scores
from prismer.training.tasks import TEXT_KINDS


def scores(records: Sequence[dict]) -> dict[str, float]:
    """Score the records of `predict`.

    Returns:
        "BLEU-4" and "CIDEr-D" (at most 10) for captions, "accuracy" and "accuracy/KIND" for questions, "top-1" for
        classes; and "score", which compares checkpoints: the mean of CIDEr-D / 10, accuracy and top-1, of those that
        exist. {} if nothing can be scored.
    """
    result: dict[str, float] = {}
    captioned = [row for row in records if row.get("captions")]
    if captioned:
        all_scores = caption_scores([row["caption"] for row in captioned], [row["captions"] for row in captioned])
        result.update({name: all_scores[name] for name in ("BLEU-4", "CIDEr-D")})
    questions = [question for row in records for question in row.get("questions", ()) if question["answers"]]
    if questions:
        result.update(answer_scores(*([q[name] for q in questions] for name in ("prediction", "answers", "kind"))))
    classified = [row for row in records if row.get("class") is not None]
    if classified:
        result["top-1"] = top1([row["prediction"] for row in classified], [row["class"] for row in classified])
    parts = [result[kind.metric] / kind.largest for kind in TEXT_KINDS if kind.metric in result]
    if parts:
        result["score"] = sum(parts) / len(parts)
    return result


def top1(predictions: Sequence, targets: Sequence) -> float:
    """The share of predictions (class indices or names) that equal their targets.

    Raises:
        ValueError: if the lengths differ or are 0.
    """
    if len(predictions) != len(targets) or not len(targets):
        raise InputError(
            f"got {len(predictions)} predictions for {len(targets)} targets; give one for each, at least one"
        )
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)
