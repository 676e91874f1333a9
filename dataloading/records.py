"""Datasets as others publish them, JSON lists, folders and tars, -> Records, one per image.

Nothing here opens an image: `importers.py` does that, once for all kinds. Every function returns `Records`, which
knows its length (for the time left) and may be iterated again (to resume).
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from prismer.dataloading.places import Place, Record, Records, Source, read_json, safe_key
from prismer.dataloading.shard_index import is_key

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VQA_FOLDERS = {"vqa": "vqav2", "vg": "vg"}
"""The field 'dataset' of a question list -> the folder that its images and labels lie in."""
VG_WEIGHT = 0.2
"""Weight of a Visual Genome answer, whose list gives none."""


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
        captions_file: captions in the COCO annotation format for a list that has none.

    Raises:
        ValueError: if a list is not as described.
    """
    reference = _read_coco_captions(captions_file) if captions_file else {}
    metas: dict[str, dict] = {}
    for image, entry in _entries(list_file):
        meta = metas.setdefault(image, {"captions": []})
        caption = entry.get("caption", [])
        meta["captions"] += [caption] if isinstance(caption, str) else caption
        digits = re.search(r"(\d+)\.\w+$", image)
        image_id = entry.get("img_id", int(digits[1]) if digits else None)
        if image_id is not None and "image_id" not in meta:
            meta["image_id"] = image_id
            meta["captions"] += reference.get(image_id, [])
    place = Place(images, labels, dataset)
    return _in_order([place.record(image, meta) for image, meta in metas.items()])


def vqa_records(
    list_files: list[str | Path], images: str | Path, *, labels: str | Path | None = None
) -> Records:
    """VQAv2 and Visual Genome question lists: JSON arrays of {"dataset", "image", "question", "answer", "weight"}.

    One record per image, one question per `question_id` (or text), its distinct answers with their weights. An entry
    without weight counts VG_WEIGHT for "vg" and 1 for the rest; a list of answers is shared out evenly; an entry
    without answer (a test set) is a question without answers.

    Args:
        list_files: one or more lists; questions of an image that is in several of them come together.
        images, labels: as for `caption_records`; the dataset folders are those of VQA_FOLDERS.

    Raises:
        ValueError: if a list is not as described.
    """
    images_of: dict[tuple[str, str], dict[object, dict]] = {}
    for list_file in list_files:
        for image, entry in _entries(list_file):
            dataset = entry.get("dataset", "vqa")
            if dataset not in VQA_FOLDERS or not isinstance(entry.get("question"), str):
                raise ValueError(
                    f"{list_file} has an entry for {image} with dataset {dataset!r} and question "
                    f"{entry.get('question')!r}; expected dataset vqa or vg and a question"
                )
            questions = images_of.setdefault((dataset, image), {})
            name = entry.get("question_id", entry["question"])
            question = questions.setdefault(
                name, {"question": entry["question"], "answers": {}, "kind": dataset}
            )
            if "question_id" in entry:
                question["id"] = entry["question_id"]
            answers = entry.get("answer", [])
            answers = [answers] if isinstance(answers, str) else answers
            weight = entry.get("weight", VG_WEIGHT if dataset == "vg" else 1.0)
            for answer in answers:
                total = question["answers"].get(answer, 0) + weight / len(answers)
                question["answers"][answer] = round(total, 6)
    places = {name: Place(images, labels, folder) for name, folder in VQA_FOLDERS.items()}
    records = []
    for (dataset, image), questions in images_of.items():
        for question in questions.values():
            question["answers"] = [
                {"answer": answer, "weight": weight}
                for answer, weight in question["answers"].items()
            ]
        records.append(places[dataset].record(image, {"questions": list(questions.values())}))
    return _in_order(records)


def folder_records(folder: str | Path, *, labels: str | Path | None = None) -> Records:
    """A folder of images, with or without one level of sub-folders, as img2dataset writes it.

    The caption of `x.jpg` is the first line of `x.txt`, or "caption" of `x.json`; without either the image has none.
    Labels lie in `<labels>/<expert>/<name of folder>/<sub-folder>/x.png`.
    """
    root = Path(folder).absolute()
    place = Place(root.parent, labels, root.name)

    def iterate() -> Iterator[Record]:
        for path in _image_paths(root):
            try:
                meta, fault = _sibling_text(path), ""
            except ValueError as error:
                meta, fault = {}, str(error)
            yield place.record(path.relative_to(root).as_posix(), meta, fault)

    return Records(sum(1 for _ in _image_paths(root)), iterate)


def class_records(
    folder: str | Path,
    *,
    classes: str | Path | None = None,
    names: str | Path | None = None,
    labels: str | Path | None = None,
) -> Records:
    """A folder with one sub-folder of images per class, as ImageNet has it; `meta["class"]` is the class name.

    Args:
        classes: JSON of {sub-folder: name}, {sub-folder: index in `names`}, or a list of names in the alphabetic order
            of the sub-folders; without it the sub-folders are the names, "_" read as a blank.
        names: JSON list of class names, where `classes` gives indices.
        labels: the folder that holds `<expert>/<name of folder>/<sub-folder>/<image>.png`.

    Raises:
        ValueError: if the class list does not name every sub-folder.
    """
    root = Path(folder).absolute()
    table = _class_names(root, classes, names)
    place = Place(root.parent, labels, root.name)

    def paths() -> Iterator[Path]:
        return (path for path in _image_paths(root) if path.parent != root)

    def iterate() -> Iterator[Record]:
        for path in paths():
            meta = {"class": table[path.parent.name]}
            yield place.record(path.relative_to(root).as_posix(), meta)

    return Records(sum(1 for _ in paths()), iterate, list(dict.fromkeys(table.values())))


def tar_records(folder: str | Path) -> Records:
    """A folder of uncompressed WebDataset tars: jpg/png/webp with txt or json, from img2dataset or our own writer.

    A tar of ours keeps its keys, texts and labels: a dataset whose index is lost is rebuilt by importing it with its
    class tables.
    """
    tars = sorted(Path(folder).glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder} holds no .tar files; name the folder of the shards")

    def iterate() -> Iterator[Record]:
        for path in tars:
            yield from _records_of_tar(path)

    return Records(sum(1 for path in tars for _ in _groups_of_tar(path)), iterate)


def _in_order(records: list[Record]) -> Records:
    return Records(len(records), lambda: iter(records))


def _entries(list_file: str | Path) -> Iterator[tuple[str, dict]]:
    """The entries of a list with the image path made relative and harmless."""
    entries = read_json(list_file)
    if not isinstance(entries, list):
        raise ValueError(
            f"{list_file} is not a JSON array of entries; name the list of the dataset"
        )
    for number, entry in enumerate(entries):
        image = entry.get("image") if isinstance(entry, dict) else None
        if not isinstance(image, str) or not image:
            raise ValueError(
                f"entry {number} of {list_file} has no 'image'; expected a path of an image"
            )
        parts = [part for part in image.split("/") if part not in ("", ".")]
        outside = image.startswith("/") or ".." in parts
        if "visual-genome" in image:
            # published with the folders of the machine it was made on
            parts, outside = parts[-2:], ".." in parts[-2:]
        if outside:
            raise ValueError(
                f"entry {number} of {list_file} leaves the image folder ({image}); make it relative"
            )
        yield "/".join(parts), entry


def _read_coco_captions(path: str | Path) -> dict[object, list[str]]:
    captions: dict[object, list[str]] = {}
    content = read_json(path)
    try:
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} is not in the COCO caption format (annotations with image_id, caption)"
        ) from None
    return captions


def _image_paths(root: Path) -> Iterator[Path]:
    """Images of a folder and of its sub-folders, in alphabetic order, one folder's names in memory at a time."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the one that holds the images")
    with os.scandir(root) as found:
        names = sorted((entry.name, entry.is_dir()) for entry in found)
    folders = [root, *(root / name for name, is_folder in names if is_folder)]
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield folder / name


def _sibling_text(path: Path) -> dict:
    text, notes = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.exists():
        return _caption_of(text.read_bytes(), None)
    if notes.exists():
        return _caption_of(None, notes.read_bytes())
    return {"captions": []}


def _caption_of(text: bytes | None, notes: bytes | None) -> dict:
    """The meta from the bytes of a .txt or .json file beside an image."""
    if text is not None:
        try:
            lines = text.decode("utf-8-sig").strip().splitlines()
        except UnicodeDecodeError:
            raise ValueError("its caption is not UTF-8 text") from None
        return {"captions": lines[:1]}
    try:
        fields = json.loads(notes or b"{}")
    except ValueError as error:
        raise ValueError(f"its json does not parse ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError("its json is not an object")
    caption = (fields.get("caption") or "").strip()
    kept = {name: fields[name] for name in ("url", "licence", "license") if fields.get(name)}
    return {"captions": [caption] if caption else [], **kept}


def _class_names(
    root: Path, classes: str | Path | None, names: str | Path | None
) -> dict[str, str]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name the one that holds one folder per class")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    table = read_json(classes) if classes else {name: name.replace("_", " ") for name in folders}
    if isinstance(table, list):
        if len(table) != len(folders):
            raise ValueError(
                f"{classes} has {len(table)} names for {len(folders)} folders; name each"
            )
        table = dict(zip(folders, table, strict=True))
    if names:
        by_index = dict(enumerate(read_json(names)))
        table = {name: by_index.get(index) for name, index in table.items()}
    missing = [name for name in folders if not isinstance(table.get(name), str)]
    if missing:
        raise ValueError(f"{classes} gives no name for {', '.join(missing[:3])}; name each folder")
    return {name: table[name] for name in folders}


def _groups_of_tar(path: Path) -> Iterator[tuple[str, dict[str, Source]]]:
    """(key, extension -> where it lies) of each group of neighbours; the key ends at the first dot of the name.

    A tar that ends too early gives a last group without members.
    """
    key, group = "", {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if group and name != key:
                    yield key, group
                    group = {}
                key = name
                group[extension.lower()] = Source(path, member.offset_data, member.size)
            # tarfile takes a damaged header for the end
            if Source(path, tar.offset, tarfile.BLOCKSIZE).read().strip(b"\0"):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, EOFError) as error:
        if group:
            yield key, group
        yield f"the rest of {path.name} ({error})", {}
        return
    if group:
        yield key, group


def _records_of_tar(path: Path) -> Iterator[Record]:
    for name, group in _groups_of_tar(path):
        images = [group[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in group]
        packed = group.get("labels")
        # keys of foreign tars may start afresh in each of them; ours are unique and stay
        key = name if packed and is_key(name) else safe_key(f"{path.stem}/{name}")
        if not images:
            yield Record(
                key,
                None,
                fault=f"no image in {path.name}"
                if group
                else f"{path.name} is damaged or cut short",
            )
            continue
        try:
            text, notes = (group[end].read() if end in group else None for end in ("txt", "json"))
            # what we wrote ourselves is kept as it is
            meta = json.loads(notes) if packed and notes else _caption_of(text, notes)
            yield Record(key, images[0], meta, packed=packed)
        except (ValueError, OSError, EOFError) as error:
            yield Record(key, images[0], fault=str(error))
