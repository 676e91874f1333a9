"""Captions and answers of a whole split, scored: on one process or on many, during training and after it."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.store.schema import check_meta
from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.files import write_json
from prismer.inference import Candidates
from prismer.model import Prismer
from prismer.reading import read_json
from prismer.training.metrics import answer_scores, caption_scores, top1
from prismer.training.zero import gather_json
from prismer.weights.locate import ANSWERS

CAPTION_TASKS = ("pretrain", "caption", "joint")
ANSWER_TASKS = ("vqa", "joint")
GUESSES = "guesses.json"
_REMEDY = "restore it from a copy, or set the run aside with --fresh"


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
        write_json(folder / GUESSES, rest)

    @classmethod
    def load(cls, folder: Path) -> "Knowledge":
        """Read what `save` wrote.

        Raises:
            ValueError: if a file is absent or damaged.
        """
        answers = read_json(folder / ANSWERS, list, _REMEDY)
        rest = read_json(folder / GUESSES, dict, _REMEDY)
        fields = {"guesses": dict, "caption": str, "classes": list}
        if {name: type(value) for name, value in rest.items()} != fields:
            raise ValueError(f"{folder / GUESSES} does not hold {', '.join(fields)}; {_REMEDY}")
        for name, texts in ((ANSWERS, answers), (GUESSES, [*rest["guesses"].values(), *rest["classes"]])):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{folder / name} holds more than texts; {_REMEDY}")
        return cls(answers=answers, **rest)


def kind_of(question: dict) -> str:
    """The kind of a question, "any" in datasets that tell none apart."""
    return question.get("kind") or "any"


@dataclass
class Survey:
    """What the texts of a split say, and which of its samples cannot be used; `survey` makes one.

    Attributes:
        captions, classes: text -> number of times.
        answers: answer -> sum of its weights; `answers_by_kind`: kind of question -> the same.
        class_indices: samples whose class is an index.
        skipped: what is wrong with each sample that cannot be used, in words that name it.
    """

    captions: Counter = field(default_factory=Counter)
    classes: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)
    answers_by_kind: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    class_indices: int = 0
    skipped: list[str] = field(default_factory=list)

    def check(self, task: str, folder: Path) -> None:
        """Refuse a split that has nothing to train or score `task` with.

        Raises:
            ValueError: if no sample can be used, or none has what the task is about.
        """
        wanted = {}
        if task in CAPTION_TASKS:
            wanted["captions"] = self.captions
        if task in ANSWER_TASKS:
            wanted["questions with answers"] = self.answers
        if task == "classify":
            wanted["a class"] = self.classes or self.class_indices
        if any(wanted.values()):
            return
        why = ""
        if self.skipped:
            why = f" ({len(self.skipped)} samples cannot be used; the first: {self.skipped[0]})"
        raise ValueError(
            f"no sample of {folder} has {' or '.join(wanted)}, which task {task} needs{why}; "
            f"choose another task or dataset"
        )


def survey(dataset: ShardDataset) -> Survey:
    """Count the texts of a split (only its JSON is read); a sample that cannot be used is noted, and not counted."""
    found = Survey()
    for i in range(len(dataset)):
        try:
            meta = dataset.meta(i)
            check_meta(meta, dataset.classes)
        except CorruptSample as error:
            found.skipped.append(str(error))
            continue
        except ValueError as error:
            found.skipped.append(f"sample {dataset.key(i)}: {error}")
            continue
        found.captions.update(meta.get("captions", ()))
        if isinstance(meta.get("class"), str):
            found.classes[meta["class"]] += 1
        found.class_indices += isinstance(meta.get("class"), int)
        for question in meta.get("questions", ()):
            for answer in question.get("answers", ()):
                found.answers[answer["answer"]] += answer["weight"]
                found.answers_by_kind[kind_of(question)][answer["answer"]] += answer["weight"]
    return found


def collect_knowledge(
    dataset: ShardDataset,
    max_answers: int,
    *,
    found: Survey | None = None,
    fits: Callable[[str], bool] = lambda answer: True,
) -> Knowledge:
    """The answers to rank and the best blind guesses, from the texts of a training split.

    Args:
        max_answers: how many distinct answers to keep, the most frequent ones.
        found: what `survey(dataset)` returned, if it is at hand.
        fits: whether the decoder has room for an answer; the others cannot be ranked.
    """
    found = found or survey(dataset)
    names = dataset.classes.get("class") or sorted(found.classes)

    def ranked(counts: Counter) -> list[str]:
        # equal counts in alphabetical order, so that the list is the same on every machine
        return sorted(counts, key=lambda text: (-counts[text], text))

    answers = list(itertools.islice(filter(fits, ranked(found.answers)), max_answers))
    guesses = {kind: ranked(counts)[0] for kind, counts in sorted(found.answers_by_kind.items())}
    caption = ranked(found.captions)[0] if found.captions else ""
    return Knowledge(answers=answers, guesses=guesses, caption=caption, classes=names)


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
        questions (question, kind, answers as `vqa_accuracy` takes them, prediction), class (None if nobody knows it)
        and prediction.
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
                row.update(caption=text, captions=meta.get("captions", []))
        if task in ANSWER_TASKS and candidates is not None:
            asked = [meta.get("questions", []) for meta in batch.meta]
            replies = model.answer(images, [[q["question"] for q in questions] for questions in asked], candidates)
            for row, questions, answers in zip(rows, asked, replies, strict=True):
                row["questions"] = [
                    dict(
                        question=question["question"],
                        kind=kind_of(question),
                        answers=_true_answers(question),
                        prediction=answer.text,
                    )
                    for question, answer in zip(questions, answers, strict=True)
                ]
        if task == "classify":
            for row, meta, answer in zip(rows, batch.meta, model.classify(images, candidates), strict=True):
                label = meta.get("class")
                if isinstance(label, int):
                    label = loader.dataset.classes["class"][label]
                row.update({"class": label, "prediction": answer.text})
        records += rows
    stream.close()
    if group is not None:
        records = [row for part in gather_json(records, group) for row in part]
    records.sort(key=lambda row: row.pop("order"))
    return records[:limit] if limit else records


def _true_answers(question: dict) -> list[str] | dict[str, float]:
    """What each person said, where the dataset keeps it, or else the distinct answers with their weights."""
    if question.get("raw_answers"):
        return question["raw_answers"]
    weights: Counter = Counter()
    for answer in question.get("answers", ()):
        weights[answer["answer"]] += answer["weight"]
    return dict(weights)


def scores(records: Sequence[dict]) -> dict[str, float]:
    """Scores of `describe`'s records.

    Returns:
        "BLEU-4" and "CIDEr-D" (of at most 10) where there are captions, "accuracy" and "accuracy/KIND" where there
        are questions, "top-1" where there are classes; and "score" by which checkpoints are compared: the mean of
        CIDEr-D / 10, accuracy and top-1 as far as they are there. {} where nothing can be scored.
    """
    result: dict[str, float] = {}
    captioned = [row for row in records if row.get("captions")]
    if captioned:
        all_scores = caption_scores([row["caption"] for row in captioned], [row["captions"] for row in captioned])
        result.update({name: all_scores[name] for name in ("BLEU-4", "CIDEr-D")})
    questions = [question for row in records for question in row.get("questions", ()) if question["answers"]]
    if questions:
        result.update(
            answer_scores(
                [question["prediction"] for question in questions],
                [question["answers"] for question in questions],
                [question["kind"] for question in questions],
            )
        )
    classified = [row for row in records if row.get("class") is not None]
    if classified:
        result["top-1"] = top1([row["prediction"] for row in classified], [row["class"] for row in classified])
    parts = [result["CIDEr-D"] / 10] if "CIDEr-D" in result else []
    parts += [result[name] for name in ("accuracy", "top-1") if name in result]
    if parts:
        result["score"] = sum(parts) / len(parts)
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
                dict(question, prediction=knowledge.guesses.get(question["kind"], "")) for question in row["questions"]
            ]
        guessed.append(row)
    return guessed
