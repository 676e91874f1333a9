"""The evaluation of a run: predictions for its validation splits, shared by the ranks, and a baseline for them."""

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from prismer.dataloading.feed.loader import Loader
from prismer.evaluation.predict import Predictor
from prismer.evaluation.text_kinds import CLASSES, QUESTIONS
from prismer.inference import Candidates
from prismer.model import Prismer
from prismer.training.tasks import TASKS
from prismer.training.text_statistics import TextStatistics
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
    """Predict the texts of a task for the images of a split; each rank does a share and gets all rows (collective).

    Args:
        model: in evaluation mode, the same on every rank.
        loader: of the split, with `training=False` and this process's rank.
        task: decides which of captions, answers and classes are predicted.
        statistics: of the training split; answers and classes are chosen from its lists, and only about renamed scenes
            answers are generated. Without answers, questions are left out.
        limit: number of images; 0 for all.
        blank: hide image and expert labels, to see what the model predicts from the text alone.
        group: to gather the rows over; None for a single process.

    Returns:
        The rows of `prismer.evaluation.predict`, in the order of the dataset.
    """
    kinds = [kind for kind in TASKS[task].texts if kind is not QUESTIONS or statistics.answers]
    classified = CLASSES in kinds
    # no list holds all names of a renamed scene: the model writes them
    ranked = QUESTIONS in kinds and loader.rename is None
    predictor = Predictor(
        model=model,
        kinds=kinds,
        answers=Candidates.answers(model.tokenizer, statistics.answers) if ranked else None,
        classes=Candidates.classes(model.tokenizer, statistics.classes) if classified else None,
        class_names=loader.dataset.classes.get("class", ()) if classified else (),
    )
    batches = -(-limit // (loader.batch_size * loader.world)) if limit else loader.steps_per_epoch
    rows = []
    stream = loader.epoch(0)
    for number, batch in zip(range(batches), stream, strict=False):
        images = batch.images.blank(model.config.pad_id) if blank else batch.images
        found = predictor.rows(images, batch.keys, batch.meta)
        rows += [dict(row, order=[number, loader.rank, i]) for i, row in enumerate(found)]
    stream.close()
    if group is not None:
        rows = [row for part in gather_json(rows, group) for row in part]
    rows.sort(key=lambda row: row.pop("order"))
    return rows[:limit] if limit else rows


def labelled(what: str, name: str) -> str:
    """The name of what belongs to one dataset of a mixture; the only dataset of a run, "", adds no name."""
    return f"{what}/{name}" if name else what


def checkpoint_score(splits: Sequence[Mapping[str, float]]) -> float | None:
    """The number that compares checkpoints: the mean "score" of the validation splits that have one; None without."""
    found = [scores["score"] for scores in splits if "score" in scores]
    return sum(found) / len(found) if found else None


def most_frequent_replies(rows: Sequence[dict], statistics: TextStatistics) -> list[dict]:
    """A baseline that sees no image: `rows` with the training split's most frequent caption and answers."""
    replaced = []
    for row in rows:
        row = dict(row)
        if "caption" in row:
            row["caption"] = statistics.caption
        if "questions" in row:
            row["questions"] = [
                dict(question, prediction=statistics.guesses.get(question["kind"], "")) for question in row["questions"]
            ]
        replaced.append(row)
    return replaced
