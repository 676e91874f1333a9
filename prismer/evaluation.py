"""Captions and answers of a whole split, scored: on one process or on many, during training and after it."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from prismer.dataloading.loader import Loader
from prismer.dataloading.shards import ShardDataset
from prismer.engine import gather_json
from prismer.inference import Candidates
from prismer.metrics import answer_scores, caption_scores, top1
from prismer.model import Prismer
from prismer.run_folder import ANSWERS, write_json

CAPTION_TASKS = ("pretrain", "caption", "joint")
ANSWER_TASKS = ("vqa", "joint")


@dataclass
class Knowledge:
    """What the training split says before any image is seen: the answers to rank, and the best blind guesses.

    Attributes:
        answers: distinct answers, the most frequent first.
        guesses: kind of question -> its most frequent answer.
        caption: the most frequent caption; "" without captions.
        classes: class names, for classification.
    """

    answers: list[str] = field(default_factory=list)
    guesses: dict[str, str] = field(default_factory=dict)
    caption: str = ""
    classes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the answers, one list, to answers.json and the rest to guesses.json."""
        rest = asdict(self)
        write_json(folder / ANSWERS, rest.pop("answers"))
        write_json(folder / "guesses.json", rest)

    @classmethod
    def load(cls, folder: Path) -> "Knowledge":
        """Read what `save` wrote."""
        answers = json.loads((folder / ANSWERS).read_text())
        return cls(answers=answers, **json.loads((folder / "guesses.json").read_text()))


def kind_of(question: dict) -> str:
    """The kind of a question, "any" in datasets that tell none apart."""
    return question.get("kind") or "any"


def collect_knowledge(dataset: ShardDataset, max_answers: int) -> Knowledge:
    """Count the texts of a training split (only its JSON is read).

    Args:
        max_answers: how many distinct answers to keep, the most frequent ones.
    """
    answers, captions, classes = Counter(), Counter(), Counter()
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for i in range(len(dataset)):
        meta = dataset.meta(i)
        captions.update(meta.get("captions") or ())
        if isinstance(meta.get("class"), str):
            classes[meta["class"]] += 1
        for question in meta.get("questions") or ():
            for answer in question["answers"]:
                answers[answer["answer"]] += answer["weight"]
                by_kind[kind_of(question)][answer["answer"]] += answer["weight"]
    names = dataset.classes.get("class") or sorted(classes)
    # equal counts in alphabetical order, so that the list is the same on every machine
    ranked = sorted(answers, key=lambda text: (-answers[text], text))[:max_answers]
    guesses = {
        kind: min(count, key=lambda text: (-count[text], text)) for kind, count in by_kind.items()
    }
    caption = min(captions, key=lambda text: (-captions[text], text), default="")
    return Knowledge(
        answers=ranked, guesses=dict(sorted(guesses.items())), caption=caption, classes=names
    )


def describe(
    model: Prismer,
    loader: Loader,
    *,
    task: str,
    knowledge: Knowledge,
    limit: int = 0,
    blank: bool = False,
    group: dist.ProcessGroup | None = None,
) -> list[dict]:
    """What `model` says about the images of a split; each rank does its share, all get everything (a collective).

    Args:
        model: in evaluation mode, the same on every rank.
        loader: of the split, with `training=False` and this process's rank.
        task: decides whether captions, answers or classes are asked for.
        knowledge: the lists that answers and classes are chosen from.
        limit: number of images, 0 for all.
        blank: hide image and labels: what the model says without seeing anything.
        group: to gather over; None for a single process.

    Returns:
        One record per image in the order of the dataset: key, and by task caption and captions (true ones),
        questions (question, kind, answers, prediction), class and prediction.
    """
    candidates = None
    if task in ANSWER_TASKS and knowledge.answers:
        candidates = Candidates.answers(model.tokenizer, knowledge.answers)
    elif task == "classify":
        candidates = Candidates.classes(model.tokenizer, knowledge.classes)
    batches = -(-limit // (loader.batch_size * loader.world)) if limit else loader.steps_per_epoch
    records = []
    stream = loader.epoch(0)
    for number, batch in zip(range(batches), stream, strict=False):
        images = batch.images.blank() if blank else batch.images
        rows = [dict(order=[number, loader.rank, i], key=key) for i, key in enumerate(batch.keys)]
        if task in CAPTION_TASKS:
            for row, meta, text in zip(rows, batch.meta, model.caption(images), strict=True):
                row.update(caption=text, captions=meta.get("captions") or [])
        if task in ANSWER_TASKS and candidates is not None:
            asked = [meta.get("questions") or [] for meta in batch.meta]
            replies = model.answer(
                images, [[q["question"] for q in questions] for questions in asked], candidates
            )
            for row, questions, answers in zip(rows, asked, replies, strict=True):
                row["questions"] = [
                    dict(
                        question=question["question"],
                        kind=kind_of(question),
                        answers=[answer["answer"] for answer in question["answers"]],
                        prediction=answer.text,
                    )
                    for question, answer in zip(questions, answers, strict=True)
                ]
        if task == "classify":
            for row, meta, answer in zip(
                rows, batch.meta, model.classify(images, candidates), strict=True
            ):
                label = meta["class"]
                label = label if isinstance(label, str) else knowledge.classes[label]
                row.update({"class": label, "prediction": answer.text})
        records += rows
    stream.close()
    if group is not None:
        records = [row for part in gather_json(records, group) for row in part]
    records.sort(key=lambda row: row.pop("order"))
    return records[:limit] if limit else records


def scores(records: Sequence[dict]) -> dict[str, float]:
    """Scores of `describe`'s records.

    Returns:
        "BLEU-4" and "CIDEr-D" (of at most 10) where there are captions, "accuracy" and "accuracy/KIND" where there
        are questions, "top-1" where there are classes; and "score" by which checkpoints are compared: the mean of
        CIDEr-D / 10, accuracy and top-1 as far as they are there.
    """
    result: dict[str, float] = {}
    captioned = [row for row in records if row.get("captions")]
    if captioned:
        all_scores = caption_scores(
            [row["caption"] for row in captioned], [row["captions"] for row in captioned]
        )
        result.update({name: all_scores[name] for name in ("BLEU-4", "CIDEr-D")})
    questions = [question for row in records for question in row.get("questions", ())]
    if questions:
        result.update(
            answer_scores(
                [question["prediction"] for question in questions],
                [question["answers"] for question in questions],
                [question["kind"] for question in questions],
            )
        )
    classified = [row for row in records if "class" in row]
    if classified:
        result["top-1"] = top1(
            [row["prediction"] for row in classified], [row["class"] for row in classified]
        )
    parts = [result["CIDEr-D"] / 10] if "CIDEr-D" in result else []
    parts += [result[name] for name in ("accuracy", "top-1") if name in result]
    result["score"] = sum(parts) / len(parts) if parts else 0.0
    return result


def blind_guesses(records: Sequence[dict], knowledge: Knowledge) -> list[dict]:
    """`records` as if each reply had been the most frequent one of the training split."""
    guessed = []
    for row in records:
        row = dict(row)
        if "caption" in row:
            row["caption"] = knowledge.caption
        if "questions" in row:
            row["questions"] = [
                dict(question, prediction=knowledge.guesses.get(question["kind"], ""))
                for question in row["questions"]
            ]
        guessed.append(row)
    return guessed
