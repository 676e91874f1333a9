"""What the readers of published annotation files share: schemas, clean texts, and counts of what is odd."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismer.dataloading.sources.json_lists import BadEntry, fault_record
from prismer.dataloading.sources.records import IgnoredFile, ImageRecord
from prismer.dataloading.store.sample_json import meta_problems, show_json
from prismer.errors import InputError
from prismer.reading import RepeatedKeys, decode_text, is_text, open_regular, parse_json, printable, read_bytes

# the schema of an annotation file -> what an error calls it
SCHEMAS = {
    "captions": "captions in the format of COCO",
    "images": "a list of images in the format of COCO",
    "karpathy": "a split of Karpathy",
    "questions": "questions of VQAv2",
    "answers": "annotations of VQAv2",
    "regions": "region descriptions of Visual Genome",
    "qas": "questions and answers of Visual Genome",
    "image data": "image_data.json of Visual Genome",
    "objects": "objects of COCO, without texts",
    "token": "the captions of Flickr30k in results_20130124.token",
    "table": "the captions of Flickr30k in results.csv",
    "list": 'a list of {"image", ...} for `prismer data import captions` or `vqa`',
    "": "no annotations that are known here",
}


@dataclass(frozen=True)
class AnnotationFile:
    """A published annotation file, read whole.

    Attributes:
        path: the file.
        schema: one of SCHEMAS, recognised by the content.
        content: the JSON value, or the text of a file that is not JSON.
    """

    path: Path
    schema: str
    content: Any


@dataclass
class AnnotatedImage:
    """An image that annotation files name.

    Attributes:
        folder: the folder that the published layout gives it, such as "train2014"; "" if there is none.
        name: the file in that folder.
        meta: its texts and ids, as in a sample's JSON.
    """

    folder: str
    name: str
    meta: dict = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}" if self.folder else self.name


class Findings:
    """What is odd in annotation files: faults of single entries, and counts of what was corrected or left out."""

    def __init__(self) -> None:
        self.faults: list[ImageRecord] = []
        self._counts: dict[tuple[Path, str], tuple[int, str]] = {}

    def count(self, file: Path, what: str, example: object, number: int = 1) -> None:
        """Count `number` more of `what` in `file`; the report names the first example."""
        before, first = self._counts.get((file, what), (0, str(example)))
        self._counts[file, what] = before + number, first

    def fault(self, file: Path, place: str, reason: object) -> None:
        """Name an entry that cannot be used.

        Args:
            file: its file.
            place: which entry, such as "annotation 3".
            reason: the rest of the sentence that begins with the entry.
        """
        self.faults.append(fault_record(f"{file} {place}", f"{place} of {file} {reason}"))

    def others(self) -> list[IgnoredFile]:
        """One entry for each kind of thing that was counted."""
        return [
            IgnoredFile(printable(str(file)), printable(f"{number} {what}, the first {first}"))
            for (file, what), (number, first) in self._counts.items()
        ]


def read_annotations(path: Path) -> AnnotationFile:
    """Read an annotation file and recognise its schema.

    Raises:
        ValueError: if it is missing, or neither JSON nor text.
    """
    try:
        with open_regular(path) as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no annotation file {path}; check the path") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a file that can") from None
    if start.startswith(b"PK\x03\x04"):
        raise InputError(f"{path} is a zip archive; unpack it and name the file inside")
    if start[:1] not in (b"{", b"["):
        text = decode_text(data, path)
        first = text.lstrip()[:500].split("\n")[0]
        schema = "table" if "|" in first else "token" if re.match(r"\S+#\d\t", first) else ""
        return AnnotationFile(path, schema, text)
    content = parse_json(data, path, lenient=True)
    return AnnotationFile(path, _schema_of(content), content)


def _schema_of(content: object) -> str:
    if isinstance(content, list):
        keys = _keys_of(content)
        for name in ("regions", "qas"):
            if name in keys:
                return name
        if "image" in keys:
            return "list"
        return "image data" if {"image_id", "url"} <= keys else ""
    if not isinstance(content, dict):
        return ""
    images, annotations = _keys_of(content.get("images")), _keys_of(content.get("annotations"))
    if "sentences" in images:
        return "karpathy"
    if "caption" in annotations:
        return "captions"
    if "question" in _keys_of(content.get("questions")):
        return "questions"
    if annotations & {"answers", "multiple_choice_answer"}:
        return "answers"
    if annotations & {"bbox", "category_id"}:
        return "objects"
    return "images" if "file_name" in images else ""


def _keys_of(entries: object) -> set[str]:
    """The keys of the first entries, of which one may be malformed."""
    some = entries[:8] if isinstance(entries, list) else []
    return {key for entry in some if isinstance(entry, dict) for key in entry}


def entries_of(source: AnnotationFile, name: str, findings: Findings) -> Iterator[tuple[str, dict]]:
    """(place, entry) of a list in an annotation file; an entry that is no plain object becomes a fault.

    Args:
        source: the file.
        name: the field that holds the list; "" if the file is the list.
        findings: receives the faults.
    """
    entries = source.content.get(name) if name else source.content
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        place = f"{name.removesuffix('s') or 'entry'} {number}"
        if isinstance(entry, dict) and not isinstance(entry, RepeatedKeys):
            yield place, entry
        else:
            what = "gives one key twice" if isinstance(entry, RepeatedKeys) else f"is {show_json(entry)}"
            findings.fault(source.path, place, f"{what}; expected an object that gives each key once")


def clean_captions(texts: list, file: Path, image: object, findings: Findings) -> list[str]:
    """The captions of an image, each on one line; what is no caption is counted and left out."""
    kept = []
    for text in texts:
        if not isinstance(text, str) or not is_text(text):
            findings.count(file, "captions are no text and left out", f"of image {image}")
            continue
        if "\n" in text or "\r" in text:
            findings.count(file, "captions have line breaks and are joined to one line", f"of image {image}")
        line = " ".join(text.split())
        if meta_problems({"captions": [line]}):
            findings.count(file, "captions have no words and are left out", f"of image {image}")
        else:
            kept.append(line)
    return kept


def text_fields(entry: Mapping, *names: str) -> dict[str, str]:
    """Those of some fields that hold texts."""
    found = {name: entry.get(name) for name in names}
    return {name: text for name, text in found.items() if isinstance(text, str) and text.strip() and is_text(text)}


def answer_text(value: object, file: Path, question: object, findings: Findings) -> str:
    """What one person answered; numbers become text, and NaN and null become the empty answer.

    Raises:
        BadEntry: if it is neither.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        findings.count(file, "answers are null or NaN and kept as empty", f"of question {question}")
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        findings.count(file, "answers are numbers and read as texts", f"of question {question}")
        return str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str) or not is_text(value):
        raise BadEntry(f"has the answer {show_json(value)}; expected a text")
    return value
