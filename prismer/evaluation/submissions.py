"""The files that evaluation servers take: captions for COCO and NoCaps, answers for VQA."""

from collections.abc import Iterator, Sequence

from prismer.errors import InputError
from prismer.evaluation.text_kinds import CAPTIONS, EVALUATED, QUESTIONS

CAPTION_FILE, ANSWER_FILE = "submission_captions.json", "submission_answers.json"


def submissions(rows: Sequence[dict], task: str) -> dict[str, list[dict]]:
    """The submission files of a task, by name.

    Args:
        rows: from `predict`; rows with "skipped" are left out.
        task: decides which texts were predicted.

    Returns:
        [{"image_id", "caption"}] for the servers of COCO and NoCaps, [{"question_id", "answer"}] for that of VQA, in
        the order of the rows; an id keeps its type. A file is left out if one of its entries has no id, or if it would
        have no entry; `submission_notes` says so.

    Raises:
        ValueError: if an id occurs twice.
    """
    files: dict[str, list[dict]] = {}
    for name, field, entries in _found(rows, task):
        if entries and all(field in entry for _, entry in entries):
            _refuse_repeated(field, entries)
            files[name] = [entry for _, entry in entries]
    return files


def submission_notes(rows: Sequence[dict], task: str) -> list[str]:
    """Why `submissions(rows, task)` has no file, or why a server may refuse one, one sentence each."""
    notes = []
    skipped = sum("skipped" in row for row in rows)
    for name, field, entries in _found(rows, task):
        missing = [key for key, entry in entries if field not in entry]
        if missing:
            noun = "images" if field == "image_id" else "questions"
            notes.append(
                f"{len(missing)} of {len(entries)} {noun} have no {field} (the first: {missing[0]}), so there is no "
                f"{name}; only an import of a benchmark's own files has them"
            )
        elif entries and skipped:
            notes.append(
                f"{name} lacks the {skipped} images that were skipped; evaluation servers take only complete files"
            )
    return notes


def _found(rows: Sequence[dict], task: str) -> Iterator[tuple[str, str, list[tuple[str, dict]]]]:
    """The name of each file of the task, the field of its ids, and its entries beside the keys of their images."""
    rows = [row for row in rows if "skipped" not in row]
    if EVALUATED[task] is CAPTIONS:
        yield (
            CAPTION_FILE,
            "image_id",
            [(row["key"], _entry(row, "image_id", caption=row["caption"])) for row in rows if "caption" in row],
        )
    if EVALUATED[task] is QUESTIONS:
        yield (
            ANSWER_FILE,
            "question_id",
            [
                (row["key"], _entry(question, "question_id", answer=question["prediction"]))
                for row in rows
                for question in row.get("questions", ())
            ],
        )


def _entry(source: dict, field: str, **text: str) -> dict:
    return ({field: source[field]} if source.get(field) is not None else {}) | text


def _refuse_repeated(field: str, entries: Sequence[tuple[str, dict]]) -> None:
    first: dict[int | str, str] = {}
    for key, entry in entries:
        if entry[field] in first:
            raise InputError(
                f"{field} {entry[field]} occurs twice, in {first[entry[field]]} and {key}; evaluation servers take one "
                f"prediction for each, so import every image and question once"
            )
        first[entry[field]] = key
