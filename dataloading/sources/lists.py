"""Datasets as others publish them, JSON lists, folders and tars, -> Records, one per image.

Nothing here opens an image: `importers.py` does that, once for all kinds. Every function returns `Records`, which
knows its length (for the time left) and may be iterated again (to resume). Lists are read here, folders in
`folders.py`, tars in `tars.py`. An entry of a list that cannot be used becomes a record with a fault, which is skipped,
counted and named like an image that does not decode.
"""

import re
from pathlib import Path

from prismer.dataloading.sources.folders import class_records, count_unnamed, folder_records
from prismer.dataloading.sources.record import Other, Place, Record, Records, safe_key
from prismer.dataloading.sources.tars import tar_records
from prismer.dataloading.store.schema import meta_problems
from prismer.reading import RepeatedKeys, printable, read_json

__all__ = ["caption_records", "class_records", "folder_records", "tar_records", "vqa_records"]

VQA_FOLDERS = {"vqa": "vqav2", "vg": "vg"}
"""The field 'dataset' of a question list -> the folder that its images and labels lie in."""
VG_WEIGHT = 0.2
"""Weight of a Visual Genome answer, whose list gives none."""

# COCO ids are the digits at the end of a name; more than 18 are none
_IMAGE_ID = re.compile(r"(?<!\d)(\d{1,18})\.\w+$")


class _BadEntry(ValueError):
    """An entry of a list that cannot be used."""


def caption_records(
    list_file: str | Path,
    images: str | Path,
    *,
    labels: str | Path | None = None,
    dataset: str = "vqav2",
    captions_file: str | Path | None = None,
) -> Records:
    """A caption list: a JSON array of {"image", "caption"}; several entries of one image become its captions.

    Also the lists of images alone ({"image"} or {"image", "img_id"}, as COCO test and NoCaps have them); their id is
    kept as `image_id`. The path of a Visual Genome image is cut to its last two parts.

    Args:
        images: the folder that holds `<dataset>/<image>` or `<image>`.
        labels: the folder that holds `<expert>/<dataset>/<image>.png`, if there are labels.
        dataset: "vqav2" for COCO, "nocaps", "vg": the folder of images and labels.
        captions_file: captions in the COCO annotation format for a list that has none; an id is the same as a number
            and as the text of it.

    Raises:
        ValueError: if a list is not as described, none of its entries can be used, or no caption of `captions_file`
            belongs to any of its images.
    """
    place = Place(images, labels, dataset)
    reference, faults = _read_coco_captions(captions_file) if captions_file else ({}, [])
    metas: dict[str, dict] = {}

    def take(image: str, entry: dict) -> None:
        captions = _captions(entry)
        digits = _IMAGE_ID.search(image)
        image_id = int(digits[1]) if digits else None
        if "img_id" in entry:
            image_id = _id(entry, "img_id")
        meta = metas.setdefault(image, {"captions": []})
        meta["captions"] += captions
        if image_id is not None:
            meta.setdefault("image_id", image_id)

    faults += _read_entries([list_file], take)
    others = count_unnamed(place.images, set(metas))
    if captions_file:
        others += _add_reference(metas, reference, captions_file)
    records = [place.record(image, meta) for image, meta in metas.items()]
    return _in_order(records + faults, others)


def vqa_records(list_files: list[str | Path], images: str | Path, *, labels: str | Path | None = None) -> Records:
    """VQAv2 and Visual Genome question lists: JSON arrays of {"dataset", "image", "question", "answer", "weight"}.

    One record per image, one question per `question_id` (or text), its distinct answers with their weights. An entry
    without weight counts VG_WEIGHT for "vg" and 1 for the rest; a list of answers, or "answers" as VQAv2 has them
    ([{"answer": text}, ...]), is shared out evenly and kept as "raw_answers", what each person said; an entry without
    answer (a test set) is a question without answers.

    Args:
        list_files: one or more lists; questions of an image that is in several of them come together.
        images, labels: as for `caption_records`; the dataset folders are those of VQA_FOLDERS.

    Raises:
        ValueError: if a list is not as described, or none of its entries can be used.
    """
    places = {name: Place(images, labels, folder) for name, folder in VQA_FOLDERS.items()}
    images_of: dict[tuple[str, str], dict[object, dict]] = {}

    def take(image: str, entry: dict) -> None:
        dataset, text = entry.get("dataset", "vqa"), entry.get("question")
        if not isinstance(dataset, str) or dataset not in VQA_FOLDERS or not isinstance(text, str):
            raise _BadEntry(
                f"has dataset {_shown(dataset)} and question {_shown(text)}; expected dataset vqa or vg and a question"
            )
        raw = _answers(entry)
        weight = entry.get("weight", VG_WEIGHT if dataset == "vg" else 1.0)
        problems = meta_problems(
            {"questions": [{"question": text, "answers": [{"answer": a, "weight": weight} for a in raw]}]}
        )
        if problems:
            raise _BadEntry(f"has a question that cannot be used: {problems[0]}")
        name = _id(entry, "question_id") if "question_id" in entry else text
        questions = images_of.setdefault((dataset, image), {})
        question = questions.setdefault(name, {"question": text, "answers": {}, "kind": dataset})
        if question["question"] != text:
            raise _BadEntry(f"has the question_id {_shown(name)} of another question ({_shown(question['question'])})")
        if "question_id" in entry:
            question["id"] = name
        # what each person said is known only if every entry of the question tells it
        is_list = isinstance(entry.get("answer", entry.get("answers")), list)
        if is_list and ("raw_answers" in question or not question["answers"]):
            question["raw_answers"] = question.get("raw_answers", []) + raw
        elif raw:
            question.pop("raw_answers", None)
        for answer in raw:
            total = question["answers"].get(answer, 0) + weight / len(raw)
            question["answers"][answer] = round(total, 6)

    faults = _read_entries(list_files, take)
    records = []
    for (dataset, image), questions in images_of.items():
        for question in questions.values():
            question["answers"] = [
                {"answer": answer, "weight": weight} for answer, weight in question["answers"].items()
            ]
        records.append(places[dataset].record(image, {"questions": list(questions.values())}))
    others = []
    for root in dict.fromkeys(place.images for place in places.values()):
        named = {image for name, image in images_of if places[name].images == root}
        # a folder of another dataset than the lists' own is none of their business
        others += count_unnamed(root, named) if named else []
    return _in_order(records + faults, others)


def _in_order(records: list[Record], others: list[Other]) -> Records:
    return Records(len(records), lambda: iter(records), others=others)


def _read_entries(list_files: list[str | Path], take) -> list[Record]:
    """Give each entry of the lists to `take(image, entry)`; those that it refuses come back as records with a fault.

    Raises:
        ValueError: if a list is no JSON array, or no entry of all can be used.
    """
    faults, used = [], 0
    for list_file in list_files:
        try:
            entries = read_json(list_file, lenient=True)
        except ValueError as error:
            if "Extra data" not in str(error):
                raise
            raise ValueError(f"{error}; if it is JSON lines, put the entries into one array") from None
        if not isinstance(entries, list):
            raise ValueError(f"{list_file} is not a JSON array of entries; {_what_it_is(entries)}")
        for number, entry in enumerate(entries):
            try:
                take(_image_of(entry), entry)
                used += 1
            except _BadEntry as error:
                reason = printable(f"entry {number} of {list_file} {error}")
                faults.append(Record(safe_key(f"{list_file} entry {number}"), None, fault=reason))
    if faults and not used:
        more = f", and so are the {len(faults) - 1} others unusable" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0].fault}{more}")
    return faults


def _image_of(entry: object) -> str:
    """The image path of an entry, made relative and harmless."""
    image = entry.get("image") if isinstance(entry, dict) else None
    if not isinstance(image, str) or not image:
        keys = f" (it has {', '.join(map(str, list(entry)[:5]))})" if isinstance(entry, dict) else ""
        raise _BadEntry(f"has no 'image'{keys}; expected a path of an image")
    if isinstance(entry, RepeatedKeys):
        raise _BadEntry(f"({image}) gives one key twice; give each once")
    if printable(image) != image or "\0" in image:
        raise _BadEntry(f"names an image that no file can have ({image!r})")
    parts = [part for part in image.split("/") if part not in ("", ".")]
    outside = image.startswith("/") or ".." in parts
    if "visual-genome" in image:
        # published with the folders of the machine it was made on
        parts, outside = parts[-2:], ".." in parts[-2:]
    if outside or not parts:
        raise _BadEntry(f"leaves the image folder ({image}); make it relative")
    return "/".join(parts)


def _captions(entry: dict) -> list[str]:
    """The captions of an entry; [] if it has none."""
    if "caption" not in entry and {"question", "answer", "answers"} & entry.keys():
        raise _BadEntry(f"({entry.get('image')}) has a question and no caption; import it with `vqa`")
    captions = entry.get("caption", [])
    captions = captions if isinstance(captions, list) else [captions]
    problems = meta_problems({"captions": captions})
    if problems:
        raise _BadEntry(f"({entry.get('image')}) has no usable caption: {problems[0]}")
    return captions


def _answers(entry: dict) -> list[str]:
    """The answers of an entry in their order, as often as they were given."""
    if "answer" in entry and "answers" in entry:
        raise _BadEntry("has 'answer' and 'answers'; give one of them")
    given = entry.get("answer", entry.get("answers", []))
    given = given if isinstance(given, list) else [given]
    # VQAv2 has {"answer", "answer_confidence", "answer_id"} for each person
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    if not all(isinstance(answer, str) for answer in answers):
        raise _BadEntry(f"({entry.get('image')}) has an answer that is no text")
    return answers


def _id(entry: dict, name: str) -> int | str:
    """The id of an entry: a number or a text."""
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | str) or printable(str(value)) != str(value):
        raise _BadEntry(f"has {name} {_shown(value)}; expected a number or a text")
    return value


def _same_id(value: int | str) -> int | str:
    """One form for an id that some lists write as a number and others as a text."""
    is_number = isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 18
    return int(value) if is_number else value


def _read_coco_captions(path: str | Path) -> tuple[dict[int | str, list[str]], list[Record]]:
    """Image id -> captions, and the annotations that cannot be used."""
    content = read_json(path, lenient=True)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    captions: dict[int | str, list[str]] = {}
    faults = []
    for number, annotation in enumerate(annotations if isinstance(annotations, list) else ()):
        try:
            if not isinstance(annotation, dict) or isinstance(annotation, RepeatedKeys):
                raise _BadEntry("is no object of image_id and caption, each once")
            if not {"image_id", "caption"} <= annotation.keys():
                raise _BadEntry("has no image_id or no caption")
            texts = _captions({**annotation, "image": f"image_id {_shown(annotation['image_id'])}"})
            captions.setdefault(_same_id(_id(annotation, "image_id")), []).extend(texts)
        except _BadEntry as error:
            reason = printable(f"annotation {number} of {path} {error}")
            faults.append(Record(safe_key(f"{path} annotation {number}"), None, fault=reason))
    if not captions:
        first = f"; {faults[0].fault}" if faults else ""
        raise ValueError(f"{path} is not in the COCO caption format (annotations with image_id, caption){first}")
    return captions, faults


def _add_reference(metas: dict[str, dict], reference: dict[int | str, list[str]], path: str | Path) -> list[Other]:
    """Give each image the captions of its id; say how many on each side found no partner."""
    unused, without = set(reference), []
    for image, meta in metas.items():
        key = _same_id(meta["image_id"]) if "image_id" in meta else None
        if key in reference:
            meta["captions"] += reference[key]
            unused.discard(key)
        else:
            without.append(image)
    if len(without) == len(metas):
        raise ValueError(
            f"no image of the list has an id of {path}: it has {next(iter(reference))!r}, the list "
            f"{next(iter(metas.values())).get('image_id')!r}; name the captions of this list"
        )
    others = []
    if unused:
        reason = f"{len(unused)} image ids belong to no image of the list, the first {min(unused, key=str)!r}"
        others.append(Other(printable(str(path)), reason))
    if without:
        reason = f"it has no captions of {len(without)} images of the list, the first {without[0]}"
        others.append(Other(printable(str(path)), reason))
    return others


def _what_it_is(content: object) -> str:
    """Which published format a JSON value that is no list looks like, and how to get from there to one that is read."""
    captions = 'a list for `prismer data import captions` holds {"image": path, "caption": text}'
    questions = (
        'a list for `prismer data import vqa` holds {"dataset": "vqa", "image": path, "question": text, '
        '"answer": text or list}'
    )
    if not isinstance(content, dict):
        return f"name the list of the dataset: {captions}; {questions}"
    annotation = _first(content.get("annotations"))
    if "caption" in annotation:
        return (
            f'it is COCO captions: list its images as [{{"image": path}}, ...] and give this file with '
            f"--captions-file; or {captions}"
        )
    if "answers" in annotation or "multiple_choice_answer" in annotation:
        return f"it is VQAv2 annotations: join them to their questions by question_id; {questions}"
    if "question" in _first(content.get("questions")):
        return (
            f"it is VQAv2 questions: join them to their annotations by question_id, and to the images by image_id "
            f"(train2014/COCO_train2014_%012d.jpg); {questions}"
        )
    if "sentences" in _first(content.get("images")):
        return f'it is a split of Karpathy (images with sentences): take "raw" of each; {captions}'
    if "bbox" in annotation or "category_id" in annotation:
        return f"it is COCO objects, which are no texts; the captions lie in captions_*.json; {captions}"
    if isinstance(content.get("images"), list):
        return f'it is a COCO list of images without texts: take "file_name" of each; {captions}'
    if "image" in content:
        return f"it is one entry, or JSON lines; put the entries into [ ]: {captions}; {questions}"
    return f"name the list of the dataset: {captions}; {questions}"


def _shown(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)[:60]


def _first(values: object) -> dict:
    first = values[0] if isinstance(values, list) and values else None
    return first if isinstance(first, dict) else {}
