"""The kinds of text that a sample may hold beside its image, and the metric of each."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextKind:
    """One kind of text that a sample may hold beside its image.

    Attributes:
        field: name of the texts in the sample's JSON.
        label: what error messages call the texts.
        metric: the metric that compares checkpoints; prismer/evaluation/scores.py computes it.
        largest: the largest value of `metric`.
    """

    field: str
    label: str
    metric: str
    largest: float


CAPTIONS = TextKind(field="captions", label="captions", metric="CIDEr-D", largest=10.0)
QUESTIONS = TextKind(field="questions", label="questions with answers", metric="accuracy", largest=1.0)
CLASSES = TextKind(field="class", label="a class", metric="top-1", largest=1.0)
TEXT_KINDS = (CAPTIONS, QUESTIONS, CLASSES)
# task of `prismer evaluate` -> what it predicts
EVALUATED = {"caption": CAPTIONS, "vqa": QUESTIONS, "classify": CLASSES}
