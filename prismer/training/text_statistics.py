"""The texts of a split, counted: the tasks that it serves, the answers to rank, and the most frequent replies."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prismer.dataloading.mixture.dataset import MixedPart
from prismer.dataloading.store.sample_json import check_meta
from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.errors import InputError
from prismer.evaluation.predict import question_kind
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS
from prismer.files import write_json
from prismer.reading import read_json
from prismer.training.tasks import TASKS
from prismer.weights.folder import ANSWERS

GUESSES = "guesses.json"
_REMEDY = "restore it from a copy, or set the run aside with --fresh"


@dataclass
class TextCounts:
    """How often each text occurs in a split, and which samples cannot be used; `count_texts` makes one.

    Attributes:
        captions: caption -> number of occurrences.
        classes: class (its name or index) -> number of occurrences.
        answers: answer -> sum of its weights.
        answers_by_kind: kind of question -> answer -> sum of its weights.
        skipped: for each sample that cannot be used, a message that names the sample and the reason.
    """

    captions: Counter = field(default_factory=Counter)
    classes: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)
    answers_by_kind: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    skipped: list[str] = field(default_factory=list)

    def add(self, other: "TextCounts") -> None:
        """Add the counts of another dataset."""
        self.captions.update(other.captions)
        self.classes.update(other.classes)
        self.answers.update(other.answers)
        for kind, answers in other.answers_by_kind.items():
            self.answers_by_kind[kind].update(answers)
        self.skipped += other.skipped

    def check(self, task: str, place: Path | str) -> None:
        """Refuse a split that has no texts for `task`.

        Args:
            place: of the split, for the message.

        Raises:
            ValueError: if no usable sample has a text that the task trains on.
        """
        found = {CAPTIONS: self.captions, QUESTIONS: self.answers, CLASSES: self.classes}
        kinds = TASKS[task].texts
        if any(found[kind] for kind in kinds):
            return
        why = ""
        if self.skipped:
            why = f" ({len(self.skipped)} samples cannot be used; the first: {self.skipped[0]})"
        raise InputError(
            f"no sample of {place} has {' or '.join(kind.label for kind in kinds)}, which task {task} needs{why}; "
            f"choose another task or dataset"
        )


def count_texts(dataset: ShardDataset | MixedPart) -> TextCounts:
    """Count the texts of a split; only the JSON of its samples is read."""
    counts = TextCounts()
    for i in range(len(dataset)):
        try:
            meta = dataset.meta(i)
            check_meta(meta, dataset.classes)
        except CorruptSample as error:
            counts.skipped.append(str(error))
            continue
        except ValueError as error:
            counts.skipped.append(f"sample {dataset.key(i)}: {error}")
            continue
        counts.captions.update(meta.get("captions", ()))
        if meta.get("class") is not None:
            counts.classes[meta["class"]] += 1
        for question in meta.get("questions", ()):
            for answer in question.get("answers", ()):
                counts.answers[answer["answer"]] += answer["weight"]
                counts.answers_by_kind[question_kind(question)][answer["answer"]] += answer["weight"]
    return counts


@dataclass
class TextStatistics:
    """What evaluation takes from the texts of the training split.

    Attributes:
        answers: the distinct answers that are ranked, the most frequent first.
        guesses: kind of question -> its most frequent answer.
        caption: the most frequent caption; "" without captions.
        classes: the class names that are ranked.
    """

    answers: list[str] = field(default_factory=list)
    guesses: dict[str, str] = field(default_factory=dict)
    caption: str = ""
    classes: list[str] = field(default_factory=list)

    @classmethod
    def from_counts(
        cls, counts: TextCounts, class_names: list[str] | None, max_answers: int, fits: Callable[[str], bool]
    ) -> "TextStatistics":
        """Statistics of a training split.

        Args:
            counts: of the split.
            class_names: the dataset's own list of class names, if it has one.
            max_answers: how many distinct answers to keep, the most frequent ones.
            fits: whether the decoder has enough positions for an answer; other answers cannot be ranked.
        """

        def ranked(texts: Counter) -> list[str]:
            # equally frequent texts in alphabetical order, so that every machine gets the same list
            return sorted(texts, key=lambda text: (-texts[text], text))

        return cls(
            answers=list(itertools.islice(filter(fits, ranked(counts.answers)), max_answers)),
            guesses={kind: ranked(answers)[0] for kind, answers in sorted(counts.answers_by_kind.items())},
            caption=ranked(counts.captions)[0] if counts.captions else "",
            classes=class_names or sorted(name for name in counts.classes if isinstance(name, str)),
        )

    def save(self, folder: Path) -> None:
        """Write the answers to answers.json and everything else to guesses.json."""
        rest = asdict(self)
        write_json(folder / ANSWERS, rest.pop("answers"))
        write_json(folder / GUESSES, rest)

    @classmethod
    def load(cls, folder: Path) -> "TextStatistics":
        """Read the files that `save` wrote.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        answers = read_answers(folder / ANSWERS, _REMEDY)
        rest = read_json(folder / GUESSES, dict, _REMEDY)
        fields = {"guesses": dict, "caption": str, "classes": list}
        if {name: type(value) for name, value in rest.items()} != fields:
            raise InputError(f"{folder / GUESSES} does not hold {', '.join(fields)}; {_REMEDY}")
        _check_texts([*rest["guesses"].values(), *rest["classes"]], folder / GUESSES, _REMEDY)
        return cls(answers=answers, **rest)


def read_answers(file: Path, remedy: str = "restore it from a copy, or delete it") -> list[str]:
    """The list of answers in `file`.

    Args:
        remedy: what error messages advise.

    Raises:
        ValueError: if the file is not a list of texts.
    """
    answers = read_json(file, list, remedy)
    _check_texts(answers, file, remedy)
    return answers


def read_classes(folder: Path) -> list[str]:
    """The class names of a run; [] if it has none.

    Raises:
        ValueError: if the file that holds them is damaged.
    """
    file = folder / GUESSES
    classes = read_json(file, dict, _REMEDY).get("classes", []) if file.is_file() else []
    if not isinstance(classes, list):
        raise InputError(f"{file} does not hold classes; {_REMEDY}")
    _check_texts(classes, file, _REMEDY)
    return classes


def _check_texts(texts: list, file: Path, remedy: str) -> None:
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{file} holds entries that are not texts; {remedy}")
