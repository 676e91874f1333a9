"""Parquet files and datasets of the Hugging Face hub -> records, streamed row by row through `datasets`.

    records = table_records(["train-00000.parquet"], columns={"captions": "text"})
    records = table_records("HuggingFaceM4/NoCaps", split="validation")

A row is an image with its texts. Images stay encoded: the bytes of the file are read, not its pixels.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prismer.dataloading.sources.annotations import Findings, answer_text, clean_captions, text_fields
from prismer.dataloading.sources.json_lists import BadEntry, entry_id
from prismer.dataloading.sources.records import FilePart, ImageBytes, ImageRecord, ImageRecords
from prismer.dataloading.sources.vqa_questions import add_answers, weighted
from prismer.dataloading.store.sample_json import show_json
from prismer.errors import InputError, MachineError, listed

# what a column holds -> the names that it usually has, the most telling first
COLUMNS = {
    "image": ("image", "jpg", "img", "png", "webp", "jpeg", "image_bytes", "bytes", "pixel_values"),
    "captions": ("captions", "caption", "annotations_captions", "sentences", "sentence", "txt", "text", "alt_text"),
    "question": ("question",),
    "answers": ("answers", "answer", "multiple_choice_answer"),
    "class": ("label", "class", "fine_label"),
    "image_id": ("image_id", "cocoid", "img_id"),
    "question_id": ("question_id",),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "domain": ("domain", "image_domain"),
}


def table_records(
    source: str | Sequence[str | Path],
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> ImageRecords:
    """The rows of Parquet files, or of a dataset on the hub.

    Args:
        source: Parquet files, or the name of a dataset on the hub, such as "HuggingFaceM4/NoCaps".
        split: of a dataset on the hub.
        config: its configuration, if it has several.
        columns: what a column holds -> its name; the others are guessed by their usual names, see COLUMNS.
        limit: the most rows to read.

    Raises:
        ValueError: if the dataset cannot be opened, or no column holds images.
        RuntimeError: if `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MachineError(
            "Parquet files and hub datasets need the package datasets; run pip install 'prismer-vlm[hub-data]'"
        ) from None
    name = source if isinstance(source, str) else str(source[0])
    try:
        if isinstance(source, str):
            table = datasets.load_dataset(source, config, split=split, streaming=True)
        else:
            files = [str(path) for path in source]
            table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        features = dict(table.features or {})
        names = list(features or table.column_names or next(iter(table), {}))
    except Exception as error:  # the hub, the file system and the parsers raise errors of many classes
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(f"{name} cannot be opened ({reason}); check its name, its split and the connection") from None
    chosen = _choose(names, features, columns or {}, name)
    image_column = chosen["image"]
    if isinstance(features.get(image_column), datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))
    labels = features.get(chosen.get("class", ""))
    class_names = list(labels.names) if isinstance(labels, datasets.ClassLabel) else []
    others: list = []

    def iterate() -> Iterator[ImageRecord]:
        findings = Findings()
        rows = itertools.islice(table, limit)
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # as above, in the middle of a stream
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                raise InputError(f"{name} ends at row {number} ({reason}); run the command again to resume") from None
            if row is None:
                break
            key, shown = f"{number:09d}", f"row {number} of {name}"
            try:
                image = _image(row[image_column], shown)
                meta = _meta(row, chosen, class_names, Path(name), number, findings)
                yield ImageRecord(key, image, meta, name=shown)
            except BadEntry as error:
                yield ImageRecord(key, None, fault=f"{shown} {error}", name=shown)
        others[:] = findings.others()

    known = getattr((getattr(table.info, "splits", None) or {}).get(split), "num_examples", None)
    count = min(known, limit or known) if known and isinstance(source, str) else None
    return ImageRecords(count, iterate, class_names, others)


def _choose(names: list[str], features: Mapping[str, Any], given: Mapping[str, str], source: str) -> dict[str, str]:
    """What a column holds -> the column, as given or guessed."""
    for what, column in given.items():
        if what not in COLUMNS:
            raise InputError(f"--columns {what}={column} is not known; a column holds one of {', '.join(COLUMNS)}")
        if column not in names:
            raise InputError(f"{source} has no column {column}; its columns are {listed(names)}")
    chosen = dict(given)
    for what, usual in COLUMNS.items():
        kind = {"image": "Image", "class": "ClassLabel"}.get(what)
        typed = [name for name, feature in features.items() if kind and type(feature).__name__ == kind]
        found = [*typed, *(name for name in usual if name in names)]
        if what == "class":
            # numbers without names are often no classes: they are taken only where --columns says so
            found = [name for name in found if name in typed or getattr(features.get(name), "dtype", "") == "string"]
        if what not in chosen and found:
            chosen[what] = found[0]
    if "image" not in chosen:
        raise InputError(f"{source} has the columns {listed(names)}; name that of the images, --columns image=NAME")
    return chosen


def _image(value: object, name: str) -> ImageBytes | FilePart:
    """The encoded image of a row: bytes, or a struct of "bytes" or "path"."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes | bytearray):
        return ImageBytes(Path(name), bytes(data))
    if data is None and isinstance(path, str) and path:
        return FilePart(Path(path))
    raise BadEntry(f"has {show_json(data)} as its image; expected the bytes of an image file")


def _meta(
    row: dict, chosen: Mapping[str, str], class_names: list[str], file: Path, number: int, findings: Findings
) -> dict:
    """The JSON of a sample from a row."""
    told = {what: row[column] for what, column in chosen.items() if row.get(column) is not None}
    meta: dict[str, Any] = {}
    if "image_id" in told:
        meta["image_id"] = entry_id(told, "image_id")
    meta |= text_fields(told, "domain")
    if "captions" in told:
        meta["captions"] = clean_captions(_texts(told["captions"], "raw"), file, f"row {number}", findings)
    if "question" in told:
        question = {"question": told["question"], "answers": [], "kind": "vqa"}
        if "question_id" in told:
            question["question_id"] = entry_id(told, "question_id")
        question |= text_fields(told, "question_type", "answer_type")
        given = told.get("answers", [])
        raw = [answer_text(text, file, f"row {number}", findings) for text in _texts(given, "answer")]
        weights: dict[str, float] = {}
        add_answers(weights, raw)
        question["answers"] = weighted({answer: weight for answer, weight in weights.items() if answer.strip()})
        if not isinstance(given, str) and raw:
            question["raw_answers"] = raw
        meta["questions"] = [question]
    if "class" in told:
        value = told["class"]
        is_index = isinstance(value, int) and not isinstance(value, bool)
        if is_index and 0 <= value < len(class_names):
            value = class_names[value]
        if not isinstance(value, str):
            raise BadEntry(f"has the class {show_json(value)}; expected a name, or an index of a column with names")
        meta["class"] = value
    return meta


def _texts(value: object, field: str) -> list:
    """A text, a list of texts, or structs with the text in `field`, as a list."""
    if isinstance(value, dict):
        value = value.get(field, value)
    values = value if isinstance(value, list) else [value]
    return [entry.get(field) if isinstance(entry, dict) else entry for entry in values]
