"""JSON lists of images, entry by entry: a bad entry becomes a record with a fault and affects no other entry."""

import re
from collections.abc import Callable
from pathlib import Path

from prismer.dataloading.sources.records import ImageRecord, safe_key
from prismer.dataloading.store.sample_json import show_json
from prismer.errors import InputError
from prismer.reading import RepeatedKeys, printable, read_json

# ids of COCO and Flickr are the digits at the end of a file name; more than 18 digits are no id
_DIGITS = re.compile(r"(?<!\d)(\d{1,18})\.\w+$")


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
    if "visual-genome" in image:
        # published with the absolute path of somebody's machine
        image = "/".join(part for part in image.split("/") if part not in ("", "."))
        image = "/".join(image.split("/")[-2:])
    return inside_path(image)


def inside_path(image: object) -> str:
    """The path of an image, relative and inside the image folder.

    Raises:
        BadEntry: if it is no text, no file can have it, or it leaves the folder.
    """
    if not isinstance(image, str) or printable(image) != image or "\0" in image:
        raise BadEntry(f"names an image that no file can have ({show_json(image)})")
    parts = [part for part in image.split("/") if part not in ("", ".")]
    if image.startswith("/") or ".." in parts or not parts:
        raise BadEntry(f"leaves the image folder ({image}); make it relative")
    return "/".join(parts)


def same_id(value: int | str) -> int | str:
    """One form for an id that some lists write as a number and others as a text."""
    is_number = isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 18
    return int(value) if is_number else value


def id_in_name(name: str) -> int | None:
    """The digits at the end of a file name as a number; None if there are none."""
    digits = _DIGITS.search(name)
    return int(digits[1]) if digits else None


def _recognise(content: object) -> str:
    """Which published format a JSON value other than a list has, and how to convert it."""
    captions = 'a list for `prismer data import captions` holds {"image": path, "caption": text}'
    questions = (
        'a list for `prismer data import vqa` holds {"dataset": "vqa", "image": path, "question": text, '
        '"answer": text or list}'
    )
    fields = content if isinstance(content, dict) else {}
    annotation = _first(fields.get("annotations"))
    for published, name, command in (
        ("caption" in annotation, "COCO captions", "coco"),
        ({"answers", "multiple_choice_answer"} & annotation.keys(), "VQAv2 annotations", "vqav2"),
        ("question" in _first(fields.get("questions")), "VQAv2 questions", "vqav2"),
        ("sentences" in _first(fields.get("images")), "a split of Karpathy (images with sentences)", "coco"),
    ):
        if published:
            return f"it is {name}; import it with `prismer data import {command} ROOT --annotations FILE`"
    if "bbox" in annotation or "category_id" in annotation:
        return f"it is COCO objects, not texts; the captions lie in captions_*.json; {captions}"
    if isinstance(fields.get("images"), list):
        return "it is a COCO list of images; import it with `prismer data import coco ROOT --annotations FILE`"
    if "image" in fields:
        return f"it is one entry, or JSON lines; put the entries into [ ]: {captions}; {questions}"
    return f"name the list of the dataset: {captions}; {questions}"


def _first(values: object) -> dict:
    first = values[0] if isinstance(values, list) and values else None
    return first if isinstance(first, dict) else {}
