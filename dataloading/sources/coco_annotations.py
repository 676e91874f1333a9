"""Captions as COCO, NoCaps, Karpathy and Flickr30k publish them -> the images that they describe."""

import re
from collections import Counter
from collections.abc import Iterable

from prismer.dataloading.sources.annotations import (
    AnnotatedImage,
    AnnotationFile,
    Findings,
    clean_captions,
    entries_of,
    text_fields,
)
from prismer.dataloading.sources.json_lists import BadEntry, entry_id, id_in_name, inside_path, same_id
from prismer.errors import InputError
from prismer.reading import lines_of

# the files of 2014 and 2015 have the folder in their names: COCO_train2014_000000000009.jpg
_FOLDER = re.compile(r"COCO_([a-z]+\d{4})_\d+\.")
_TOKEN = re.compile(r"(.+?)#\d+\t(.*)")
# one line of the published results.csv lacks its second bar
_ROW = re.compile(r"(.+?)\s*\|\s*\d+\s*\|?(.*)")


def coco_images(source: AnnotationFile, findings: Findings) -> list[AnnotatedImage]:
    """The images of a file in the format of COCO, in its order, with `image_id`, `captions` and, for NoCaps, `domain`.

    Images without captions (a test set) have an empty list. Captions of one image keep their order.
    """
    images: dict[int | str, AnnotatedImage] = {}
    by_path: dict[str, AnnotatedImage] = {}
    for place, entry in entries_of(source, "images", findings):
        try:
            if "id" not in entry or "file_name" not in entry:
                raise BadEntry("has no id or no file_name")
            key, path = same_id(entry_id(entry, "id")), inside_path(entry["file_name"])
            folder, _, name = path.rpartition("/")
            image = AnnotatedImage(folder or _coco_folder(entry, name, source), name, {"image_id": entry["id"]})
            known = by_path.get(image.path) or images.get(key)
            if known and known.path != image.path:
                raise BadEntry(f"has the id {entry['id']} of another image ({known.path})")
            if known:
                findings.count(source.path, "images are listed twice, and their captions come together", name)
            image.meta |= text_fields(entry, "domain", "open_images_id")
            images[key] = by_path[image.path] = known or image
        except BadEntry as error:
            findings.fault(source.path, place, error)
    captions: dict[int, list] = {}
    for place, entry in entries_of(source, "annotations", findings):
        try:
            if "image_id" not in entry or "caption" not in entry:
                raise BadEntry("has no image_id or no caption")
            owner = images.get(same_id(entry_id(entry, "image_id")))
            if owner is None:
                example = f"with image_id {entry['image_id']}"
                findings.count(source.path, "annotations belong to no image of the file", example)
            else:
                captions.setdefault(id(owner), []).append(entry["caption"])
        except BadEntry as error:
            findings.fault(source.path, place, error)
    for image in by_path.values():
        image_id = image.meta["image_id"]
        image.meta["captions"] = clean_captions(captions.get(id(image), []), source.path, image_id, findings)
        if captions and id(image) not in captions:
            findings.count(source.path, "images have no annotation", image.path)
    return list(by_path.values())


def _coco_folder(entry: dict, name: str, source: AnnotationFile) -> str:
    """The folder of an image by its name, its address, or the name of the annotation file."""
    if match := _FOLDER.match(name):
        return match[1]
    url = entry.get("coco_url")
    parts = url.split("/") if isinstance(url, str) else []
    if len(parts) > 4 and parts[-1] == name and re.fullmatch(r"\w+", parts[-2]):
        return parts[-2]
    match = re.search(r"captions_([a-z]+\d{4})\.json$", source.path.name)
    return match[1] if match else ""


def karpathy_images(
    source: AnnotationFile, splits: list[str], findings: Findings
) -> tuple[list[AnnotatedImage], list[tuple[str, str]]]:
    """The images of some splits of Karpathy's file, in its order, with `image_id` and `captions`.

    Args:
        source: `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`.
        splits: such as ["train", "restval"].
        findings: receives what is odd.

    Returns:
        The images, and (folder, name) of all images of the file.

    Raises:
        ValueError: if the file has no such split.
    """
    images: dict[str, AnnotatedImage] = {}
    sizes: Counter = Counter()
    listed = []
    for place, entry in entries_of(source, "images", findings):
        try:
            split = entry.get("split")
            if not isinstance(split, str) or not isinstance(entry.get("sentences"), list):
                raise BadEntry("has no split or no list of sentences")
            folder = inside_path(entry["filepath"]) if entry.get("filepath") else ""
            image = AnnotatedImage(folder, inside_path(entry.get("filename")))
            sizes[split] += 1
            listed.append((image.folder, image.name))
            if split not in splits:
                continue
            sentences = entry["sentences"]
            raw = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
            captions = clean_captions(raw, source.path, image.name, findings)
            image_id = entry_id(entry, "cocoid") if "cocoid" in entry else id_in_name(image.name)
            image.meta |= {"captions": captions} | ({} if image_id is None else {"image_id": image_id})
            known = images.setdefault(image.path, image)
            if known is not image:
                findings.count(source.path, "images are listed twice, and their captions come together", image.path)
                known.meta["captions"] += [text for text in captions if text not in known.meta["captions"]]
        except BadEntry as error:
            findings.fault(source.path, place, error)
    missing = [split for split in splits if split not in sizes]
    if missing or not splits:
        held = ", ".join(f"{split} ({count} images)" for split, count in sizes.items()) or "none"
        got = f"no split {missing[0]!r}" if missing else "several splits"
        raise InputError(f"{source.path} has {got}; name some of its splits with --split: {held}")
    return list(images.values()), listed


def flickr_images(source: AnnotationFile, findings: Findings) -> list[AnnotatedImage]:
    """The images of Flickr30k's own files, `results_20130124.token` or `results.csv`, in their order."""
    pattern, lines = (_TOKEN if source.schema == "token" else _ROW), lines_of(source.content)
    texts: dict[str, list] = {}
    for number, line in enumerate(lines):
        match = pattern.fullmatch(line)
        if match:
            texts.setdefault(match[1].strip(), []).append(match[2])
        elif line.strip() and not (number == 0 and line.startswith("image_name")):
            findings.fault(source.path, f"line {number + 1}", "is not an image, a number and a caption")
    return list(_flickr(texts.items(), source, findings))


def _flickr(texts: Iterable[tuple[str, list]], source: AnnotationFile, findings: Findings) -> Iterable[AnnotatedImage]:
    for name, captions in texts:
        try:
            image = AnnotatedImage("", inside_path(name))
        except BadEntry as error:
            findings.fault(source.path, f"image {name}", error)
            continue
        image_id = id_in_name(name)
        image.meta = {"captions": clean_captions(captions, source.path, name, findings)}
        image.meta |= {} if image_id is None else {"image_id": image_id}
        yield image
