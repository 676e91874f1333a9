"""Predictions for a batch of samples, in training and after it: the rows that `scores` and `submissions` read.

A row is the JSON object of one image, with the fields of its task:

    key, image_id, domain    of the sample; the last two where the dataset has them
    caption, captions        the predicted caption, and the true ones
    questions                for each question: question_id, question, kind, question_type, answer_type, the true
                             "answers" (what each person said, else {answer: weight}), "prediction" and its "score"
    class, prediction        the true class, null if unknown, and the predicted one
    ranked                   the five best classes
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prismer.batch import ImageBatch
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS, TextKind
from prismer.inference import Answer, Candidates
from prismer.model import Prismer

# how many classes of a ranking a row keeps
_RANKED = 5
# fields of a sample's JSON that a row repeats, and those of a question
_NAMES = ("image_id", "domain")
_QUESTION_NAMES = ("question_type", "answer_type")


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predicts the texts of samples, batch by batch.

    Attributes:
        model: in evaluation mode.
        kinds: which of captions, answers and classes are predicted.
        answers: the answers that are ranked; None generates answers freely.
        classes: the class names that are ranked.
        class_names: the names of the classes, for samples that hold an index.
        prefix: how captions start; None takes the model's own prefix.
        beams: of captions and of generated answers.
    """

    model: Prismer
    kinds: Sequence[TextKind]
    answers: Candidates | None = None
    classes: Candidates | None = None
    class_names: Sequence[str] = ()
    prefix: str | None = None
    beams: int = 3

    def rows(self, images: ImageBatch, keys: Sequence[str], metas: Sequence[dict]) -> list[dict]:
        """The row of each sample.

        Args:
            images: B images with their expert labels.
            keys, metas: name and JSON of each sample.
        """
        rows = [{"key": key, **_chosen(meta, _NAMES)} for key, meta in zip(keys, metas, strict=True)]
        if CAPTIONS in self.kinds:
            texts = self.model.caption(images, beams=self.beams, prefix=self.prefix)
            for row, meta, text in zip(rows, metas, texts, strict=True):
                row.update(caption=text, captions=meta.get("captions", []))
        if QUESTIONS in self.kinds:
            asked = [meta.get("questions", []) for meta in metas]
            texts = [[question["question"] for question in questions] for questions in asked]
            replies = self.model.answer(images, texts, self.answers, beams=self.beams)
            for row, questions, reply in zip(rows, asked, replies, strict=True):
                row["questions"] = [_answered(*pair) for pair in zip(questions, reply, strict=True)]
        if CLASSES in self.kinds:
            for row, meta, reply in zip(rows, metas, self.model.classify(images, self.classes), strict=True):
                label = meta.get("class")
                row["class"] = self.class_names[label] if isinstance(label, int) else label
                row["prediction"] = reply.text
                row["ranked"] = [name for name, _ in reply.ranked[:_RANKED]]
        return rows


def question_kind(question: dict) -> str:
    """The kind of a question; "any" in datasets that distinguish none."""
    return question.get("kind") or "any"


def _answered(question: dict, reply: Answer) -> dict:
    """The entry of one question; true answers are each person's where the dataset keeps them, else weighted ones."""
    weights: Counter = Counter()
    for answer in question.get("answers", ()):
        weights[answer["answer"]] += answer["weight"]
    return {
        **_chosen(question, ("question_id",)),
        "question": question["question"],
        "kind": question_kind(question),
        **_chosen(question, _QUESTION_NAMES),
        "answers": question.get("raw_answers") or dict(weights),
        "prediction": reply.text,
        # processes with other numbers of threads add in another order
        "score": round(reply.score, 4),
    }


def _chosen(entry: dict, names: Sequence[str]) -> dict:
    return {name: entry[name] for name in names if name in entry}
