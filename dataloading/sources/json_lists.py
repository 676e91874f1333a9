"""JSON lists of images, entry by entry: a bad entry becomes a record with a fault and affects no other entry."""

from collections.abc import Callable
from pathlib import Path

from prismer.dataloading.sources.records import ImageRecord, safe_key
from prismer.dataloading.store.sample_json import show_json
from prismer.errors import InputError
from prismer.reading import RepeatedKeys, printable, read_json


class BadEntry(InputError):
    """An entry of a list that cannot be used."""


def read_entries(list_files: list[str | Path], add_entry: Callable[[str, dict], None]) -> list[ImageRecord]:
    """Call `add_entry(image, entry)` for each entry of the lists.

    Args:
        list_files: JSON arrays of {"image": path, ...}.
        add_entry: may raise BadEntry, with the rest of a sentence that begins with the entry's number.

    Returns:
        ImageRecords with a fault, one for each bad entry.

    Raises:
        ValueError: if a list is not a JSON array, or all entries are bad.
    """
    faults, used = [], 0
    for list_file in list_files:
        try:
            entries = read_json(list_file, lenient=True)
        except ValueError as error:
            if "Extra data" not in str(error):
                raise
            raise InputError(f"{error}; if it is JSON lines, put the entries into one array") from None
        if not isinstance(entries, list):
            raise InputError(f"{list_file} is not a JSON array of entries; {_recognise(entries)}")
        for number, entry in enumerate(entries):
            try:
                add_entry(_image_of(entry), entry)
                used += 1
            except BadEntry as error:
                faults.append(fault_record(f"{list_file} entry {number}", f"entry {number} of {list_file} {error}"))
    if faults and not used:
        more = f"; the {len(faults) - 1} others cannot be used either" if len(faults) > 1 else ""
        raise InputError(f"{faults[0].fault}{more}")
    return faults


def fault_record(name: str, reason: str) -> ImageRecord:
    """A record that stands for a bad entry, so that an import names it."""
    return ImageRecord(safe_key(name), None, fault=printable(reason))


def entry_id(entry: dict, name: str) -> int | str:
    """The field `name` of an entry, an id.

    Raises:
        BadEntry: if it is neither a number nor a text.
    """
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | str) or printable(str(value)) != str(value):
        raise BadEntry(f"has {name} {show_json(value)}; expected a number or a text")
    return value


def _image_of(entry: object) -> str:
    """The image path of an entry, relative and inside the image folder."""
    image = entry.get("image") if isinstance(entry, dict) else None
    if not isinstance(image, str) or not image:
        keys = f" (it has {', '.join(map(str, list(entry)[:5]))})" if isinstance(entry, dict) else ""
        raise BadEntry(f"has no 'image'{keys}; expected a path of an image")
    if isinstance(entry, RepeatedKeys):
        raise BadEntry(f"({image}) gives one key twice; give each once")
    if printable(image) != image or "\0" in image:
        raise BadEntry(f"names an image that no file can have ({image!r})")
    parts = [part for part in image.split("/") if part not in ("", ".")]
    outside = image.startswith("/") or ".." in parts
    if "visual-genome" in image:
        # published with the absolute path of somebody's machine
        parts, outside = parts[-2:], ".." in parts[-2:]
    if outside or not parts:
        raise BadEntry(f"leaves the image folder ({image}); make it relative")
    return "/".join(parts)


def _recognise(content: object) -> str:
    """Which published format a JSON value other than a list has, and how to convert it."""
    captions = 'a list for `prismer data import captions` holds {"image": path, "caption": text}'
    questions = (
        'a list for `prismer data import vqa` holds {"dataset": "vqa", "image": path, "question": text, '
        '"answer": text or list}'
    )
    fields = content if isinstance(content, dict) else {}
    annotation = _first(fields.get("annotations"))
    if "caption" in annotation:
        return (
            f'it is COCO captions: list its images as [{{"image": path}}, ...] and give this file with '
            f"--captions-file; or {captions}"
        )
    if "answers" in annotation or "multiple_choice_answer" in annotation:
        return f"it is VQAv2 annotations: join them to their questions by question_id; {questions}"
    if "question" in _first(fields.get("questions")):
        return (
            f"it is VQAv2 questions: join them to their annotations by question_id, and to the images by image_id "
            f"(train2014/COCO_train2014_%012d.jpg); {questions}"
        )
    if "sentences" in _first(fields.get("images")):
        return f'it is a split of Karpathy (images with sentences): take "raw" of each; {captions}'
    if "bbox" in annotation or "category_id" in annotation:
        return f"it is COCO objects, not texts; the captions lie in captions_*.json; {captions}"
    if isinstance(fields.get("images"), list):
        return f'it is a COCO list of images without texts: take "file_name" of each; {captions}'
    if "image" in fields:
        return f"it is one entry, or JSON lines; put the entries into [ ]: {captions}; {questions}"
    return f"name the list of the dataset: {captions}; {questions}"


def _first(values: object) -> dict:
    first = values[0] if isinstance(values, list) and values else None
    return first if isinstance(first, dict) else {}
