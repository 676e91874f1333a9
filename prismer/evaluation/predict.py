"""Predictions for a split of a dataset, on one process or several, during training and after it."""

from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from prismer.dataloading.feed.loader import Loader
from prismer.inference import Answer, Candidates
from prismer.model import Prismer
from prismer.training.tasks import CAPTIONS, CLASSES, QUESTIONS, TASKS
from prismer.training.text_statistics import TextStatistics, question_kind
from prismer.training.zero import gather_json


def predict(
    model: Prismer,
    loader: Loader,
    task: str,
    statistics: TextStatistics,
    *,
    limit: int = 0,
    blank: bool = False,
    group: dist.ProcessGroup | None = None,
) -> list[dict]:
    """Predict the texts of a task for the images of a split; each rank does a share and gets all records (collective).

    Args:
        model: in evaluation mode, the same on every rank.
        loader: of the split, with `training=False` and this process's rank.
        task: decides which of captions, answers and classes are predicted.
        statistics: of the training split; answers and classes are chosen from its lists.
        limit: number of images; 0 for all.
        blank: hide image and expert labels, to see what the model predicts from the text alone.
        group: to gather the records over; None for a single process.

    Returns:
        One record for each image, in the order of the dataset: key; caption and the true captions; questions
        (question, kind, answers as `vqa_accuracy` takes them, prediction); class (None if unknown) and prediction.
    """
    kinds = TASKS[task].texts
    answers = classes = None
    if QUESTIONS in kinds and statistics.answers:
        answers = Candidates.answers(model.tokenizer, statistics.answers)
    if CLASSES in kinds:
        classes = Candidates.classes(model.tokenizer, statistics.classes)
    batches = -(-limit // (loader.batch_size * loader.world)) if limit else loader.steps_per_epoch
    records = []
    stream = loader.epoch(0)
    for number, batch in zip(range(batches), stream, strict=False):
        images = batch.images.blank() if blank else batch.images
        rows = [dict(order=[number, loader.rank, i], key=key) for i, key in enumerate(batch.keys)]
        if CAPTIONS in kinds:
            for row, meta, text in zip(rows, batch.meta, model.caption(images), strict=True):
                row.update(caption=text, captions=meta.get("captions", []))
        if answers is not None:
            asked = [meta.get("questions", []) for meta in batch.meta]
            replies = model.answer(images, [[q["question"] for q in questions] for questions in asked], answers)
            for row, questions, reply in zip(rows, asked, replies, strict=True):
                row["questions"] = [_answered(*pair) for pair in zip(questions, reply, strict=True)]
        if classes is not None:
            names = loader.dataset.classes.get("class")
            for row, meta, reply in zip(rows, batch.meta, model.classify(images, classes), strict=True):
                label = meta.get("class")
                row.update({"class": names[label] if isinstance(label, int) else label, "prediction": reply.text})
        records += rows
    stream.close()
    if group is not None:
        records = [row for part in gather_json(records, group) for row in part]
    records.sort(key=lambda row: row.pop("order"))
    return records[:limit] if limit else records


def _answered(question: dict, reply: Answer) -> dict:
    """The record of one question; true answers are each person's where the dataset keeps them, else weighted ones."""
    weights: Counter = Counter()
    for answer in question.get("answers", ()):
        weights[answer["answer"]] += answer["weight"]
    return dict(
        question=question["question"],
        kind=question_kind(question),
        answers=question.get("raw_answers") or dict(weights),
        prediction=reply.text,
    )


def most_frequent_replies(records: Sequence[dict], statistics: TextStatistics) -> list[dict]:
    """A baseline that sees no image: `records` with the training split's most frequent caption and answers."""
    replaced = []
    for row in records:
        row = dict(row)
        if "caption" in row:
            row["caption"] = statistics.caption
        if "questions" in row:
            row["questions"] = [
                dict(question, prediction=statistics.guesses.get(question["kind"], "")) for question in row["questions"]
            ]
        replaced.append(row)
    return replaced
