"""What a model is asked about: each line of a result, with its image, its labels and its question.

    items = image_items(["photos", "shards/00000.tar", "more.txt"])
    items = question_items("questions.jsonl")

`prismer.asking.job.ask_all` asks a model about items. Nothing but names is read here.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.sources.any_source import source_records
from prismer.dataloading.sources.records import FilePart, IgnoredFile, ImageRecord, safe_key
from prismer.dataloading.store.label_maps import unpack_labels
from prismer.errors import InputError, shown
from prismer.inference import Answer
from prismer.reading import is_text, open_regular, parse_json
from prismer.resumable import json_line
from prismer.texts import clean_question

# task -> the field of its result
RESULT_KEYS = {"caption": "caption", "answer": "answer", "classify": "class"}
# fields that an answered line gets besides those of its question
_RESULT_FIELDS = ("answer", "score", "ranked", "skipped")


@dataclass(frozen=True)
class Item:
    """One line of a result.

    Attributes:
        row: what the line holds besides the result: "image", or all fields of a line of questions.
        record: where the image lies, and the maps that it brings.
        question: of the task "answer".
        classes: class tables of the maps.
        labels: KEY.labels file that is used instead of the record's own maps.
        fault: why the model cannot be asked, if that is known before the image is read.
    """

    row: dict[str, Any]
    record: ImageRecord
    question: str = ""
    classes: dict[str, list[str]] = field(default_factory=dict)
    labels: Path | None = None
    fault: str = ""

    def text_path(self, folder: Path) -> Path:
        """Where a text about the image belongs: IMAGE.txt beside IMAGE.jpg, `folder`/KEY.txt for a member of a tar."""
        image = self.record.image
        if image is not None and image.size < 0:
            return image.path.with_suffix(".txt")
        return folder / f"{self.record.key}.txt"

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            ValueError: with the reason, if it cannot be read.
        """
        if self.fault or self.record.image is None:
            raise InputError(self.fault or self.record.fault)
        return _read(self.record.image)

    def read_labels(self) -> ExpertLabels | None:
        """The labels that the item brings, if it brings any.

        Raises:
            ValueError: with the reason, if they cannot be read.
        """
        if self.labels is not None:
            return ExpertLabels.from_file(self.labels)
        if self.record.packed is None:
            return None
        planes = unpack_labels(_read(self.record.packed))
        return ExpertLabels(planes, self.record.meta, self.classes, f"the labels of {self.record.key}")


class Items:
    """Items in order; they can be iterated again and again, and are not held in memory.

    Args:
        iterate: starts a pass over the items.
        sources: where they come from, as a user names it.
        others: what else the sources hold.

    Attributes:
        sources, others: as given.
        count: number of items.
        num_labels: number of items with a `labels` file.
        digest: of all rows, to tell whether a list has changed.
    """

    def __init__(
        self, iterate: Callable[[], Iterator[Item]], sources: Sequence[str], others: Sequence[IgnoredFile] = ()
    ):
        self._iterate, self.sources, self.others = iterate, list(sources), list(others)
        digest, self.count, self.num_labels = hashlib.sha256(), 0, 0
        for item in self:
            digest.update(json_line(item.row).encode() + b"\n")
            self.count += 1
            self.num_labels += item.labels is not None
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return self._iterate()


def image_items(
    sources: Sequence[str | Path], *, question: str | None = None, labels: str | Path | None = None
) -> Items:
    """The images of any sources, one after the other.

    Args:
        sources: folders, tars, datasets of ours, .txt lists and images, see `source_records`. The paths of a list are
            relative to its folder.
        question: to ask about every image.
        labels: folder with the labels of the images: for photos/a/b.jpg of the source photos, `labels`/a/b.labels.

    Raises:
        ValueError: if a source is none of these, or holds no images, or none of them has labels in `labels`.
    """
    found = []
    for source in map(Path, sources):
        if source.suffix.lower() == ".json":
            raise InputError(
                f"{source} is JSON; give a folder, a tar, a dataset, or a .txt with the path of one image a line"
            )
        records, classes = source_records(source)
        if not len(records):
            first = records.others[0] if records.others else None
            hint = f"; of {len(records.others)} other files the first is {first.file} ({first.reason})" if first else ""
            raise InputError(f"there are no images in {source}{hint}")
        found.append((source, records, classes))

    def iterate() -> Iterator[Item]:
        for source, records, classes in found:
            is_dataset = (source / "index.json").is_file()
            for record in records:
                row = {"image": _name(source, record)}
                if question is not None:
                    row["question"] = question
                # a text beside an image that cannot be read does not concern us, but the JSON of a sample has the
                # tables of its maps
                fault = record.fault if record.image is None or is_dataset else ""
                file = labels and Path(labels) / _path_inside(source, record).with_suffix(".labels")
                yield Item(
                    row, record, question or "", classes, labels=file if file and file.is_file() else None, fault=fault
                )

    if question is not None:
        _check_question(question)
    items = Items(iterate, list(map(str, sources)), [other for _, records, _ in found for other in records.others])
    if labels is not None and not items.num_labels:
        raise InputError(
            f"none of the {len(items)} images has labels in {labels}; the labels of IMAGE.jpg are IMAGE.labels there"
        )
    return items


def question_items(file: str | Path) -> Items:
    """Questions about images, from a file with one JSON object a line.

    A line has "image", a path relative to the folder of the file, and "question"; other fields, such as "id", are
    carried through to the result. Every line becomes an item; one that holds something else has a fault.

    Raises:
        ValueError: if the file is empty, or a line has a field that belongs to the result.
        OSError: if the file cannot be read.
    """
    file = Path(file)

    def iterate() -> Iterator[Item]:
        with open_regular(file) as lines:
            for number, line in enumerate(lines, 1):
                yield _question_item(file, number, line)

    items = Items(iterate, [str(file)])
    if not items.count:
        raise InputError(f'{file} is empty; write one {{"image": ..., "question": ...}} a line')
    return items


def result_fields(task: str, result: str | Answer, top: int = 0) -> dict[str, Any]:
    """A result of `model.caption`, `answer` or `classify` as the fields of a JSON object."""
    key = RESULT_KEYS[task]
    if isinstance(result, str):
        return {key: result}
    fields: dict[str, Any] = {key: result.text, "score": result.score}
    if ranked := result.ranked[:top]:
        fields["ranked"] = [{key: name, "score": score} for name, score in ranked]
    return fields


def _question_item(file: Path, number: int, line: bytes) -> Item:
    name = f"line {number} of {file}"
    nowhere = ImageRecord("", None)
    try:
        row = parse_json(line, name, 'write {"image": ..., "question": ...}')
        if not isinstance(row, dict):
            raise InputError(f'{name} is {shown(row)}; write {{"image": ..., "question": ...}}')
    except InputError as error:
        return Item({"line": number}, nowhere, fault=str(error))
    if taken := [field for field in _RESULT_FIELDS if field in row]:
        raise InputError(f"{name} has a field {taken[0]!r}, in which the result would stand; rename it")
    image, question = row.get("image"), row.get("question")
    fault = ""
    if not isinstance(image, str) or not image:
        fault = f"the 'image' of {name} is {shown(image)}; give a path"
    else:
        try:
            _check_question(question)
        except InputError as error:
            fault = str(error)
    if not isinstance(image, str) or fault:
        return Item(row, nowhere, fault=fault)
    return Item(row, ImageRecord(safe_key(image), FilePart(file.parent / image)), question)


def _check_question(question: object) -> None:
    if not isinstance(question, str):
        raise InputError(f"its 'question' is {shown(question)}; give a text")
    if not is_text(question):
        raise InputError(f"the question {question[:60]!a} is not UTF-8; write it in UTF-8")
    clean_question(question)


def _path_inside(source: Path, record: ImageRecord) -> Path:
    """The path of an image inside its folder; its name if it comes from no folder."""
    if source.is_dir() and record.image is not None and record.image.size < 0:
        return record.image.path.relative_to(source.absolute())
    return Path(Path(record.name).name or (record.image.path.name if record.image else record.key))


def _name(source: Path, record: ImageRecord) -> str:
    """An image as a result names it: the path as the user would write it, or TAR/NAME."""
    if record.name or source.suffix.lower() == ".txt":
        return record.name
    if record.image is None:
        return str(source / record.key)
    return str(source / _path_inside(source, record)) if source.is_dir() else str(record.image.path)


def _read(part: FilePart) -> bytes:
    try:
        return part.read()
    except OSError as error:
        raise InputError(f"it cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise InputError("it does not fit into memory") from None
    except (EOFError, ValueError) as error:
        raise InputError(f"it cannot be read ({error})") from None
