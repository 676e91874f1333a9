"""Caption lists of COCO, NoCaps and Visual Genome -> records, one per image."""

from pathlib import Path

from prismer.dataloading.sources.image_folders import count_unnamed
from prismer.dataloading.sources.json_lists import BadEntry, entry_id, fault_record, id_in_name, read_entries, same_id
from prismer.dataloading.sources.records import DatasetPaths, IgnoredFile, ImageRecord, ImageRecords
from prismer.dataloading.store.sample_json import meta_problems, show_json
from prismer.errors import InputError
from prismer.reading import RepeatedKeys, printable, read_json


def caption_records(
    list_file: str | Path,
    images: str | Path,
    *,
    labels: str | Path | None = None,
    dataset: str = "vqav2",
    captions_file: str | Path | None = None,
) -> ImageRecords:
    """A caption list: a JSON array of {"image", "caption"}; several entries of one image become its captions.

    Lists of images alone ({"image"} or {"image", "img_id"}, such as COCO test and NoCaps) are read too; their id is
    kept as `image_id`. The path of a Visual Genome image is cut to its last two parts.

    Args:
        list_file: the list.
        images: the folder that holds `<dataset>/<image>` or `<image>`.
        labels: the folder that holds `<expert>/<dataset>/<image>.png`, if there are labels.
        dataset: the folder of images and labels: "vqav2" for COCO, "nocaps", "vg".
        captions_file: captions in the COCO annotation format, for a list that has none; an id may be a number in one
            file and a text in the other.

    Raises:
        ValueError: if a list has another form, no entry can be used, or no caption of `captions_file` belongs to an
            image of the list.
    """
    paths = DatasetPaths(images, labels, dataset)
    reference, faults = _read_annotations(captions_file) if captions_file else ({}, [])
    metas: dict[str, dict] = {}

    def add_entry(image: str, entry: dict) -> None:
        captions = _captions(entry)
        image_id = entry_id(entry, "img_id") if "img_id" in entry else id_in_name(image)
        meta = metas.setdefault(image, {"captions": []})
        meta["captions"] += captions
        if image_id is not None:
            meta.setdefault("image_id", image_id)

    faults += read_entries([list_file], add_entry)
    others = count_unnamed(paths.images, set(metas))
    if captions_file:
        others += _add_reference(metas, reference, captions_file)
    records = [*(paths.record(image, meta) for image, meta in metas.items()), *faults]
    return ImageRecords(len(records), records.__iter__, others=others)


def _captions(entry: dict) -> list[str]:
    """The captions of an entry; [] if it has none."""
    if "caption" not in entry and {"question", "answer", "answers"} & entry.keys():
        raise BadEntry(f"({entry.get('image')}) has a question and no caption; import it with `vqa`")
    captions = entry.get("caption", [])
    captions = captions if isinstance(captions, list) else [captions]
    problems = meta_problems({"captions": captions})
    if problems:
        raise BadEntry(f"({entry.get('image')}) has no usable caption: {problems[0]}")
    return captions


def _read_annotations(path: str | Path) -> tuple[dict[int | str, list[str]], list[ImageRecord]]:
    """Image id -> captions of a COCO annotation file, and a record with a fault for each bad annotation."""
    content = read_json(path, lenient=True)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    captions: dict[int | str, list[str]] = {}
    faults = []
    for number, annotation in enumerate(annotations if isinstance(annotations, list) else ()):
        try:
            if not isinstance(annotation, dict) or isinstance(annotation, RepeatedKeys):
                raise BadEntry("is not an object of image_id and caption, each once")
            if not {"image_id", "caption"} <= annotation.keys():
                raise BadEntry("has no image_id or no caption")
            texts = _captions({**annotation, "image": f"image_id {show_json(annotation['image_id'])}"})
            captions.setdefault(same_id(entry_id(annotation, "image_id")), []).extend(texts)
        except BadEntry as error:
            faults.append(fault_record(f"{path} annotation {number}", f"annotation {number} of {path} {error}"))
    if not captions:
        first = f"; {faults[0].fault}" if faults else ""
        raise InputError(f"{path} is not in the COCO caption format (annotations with image_id, caption){first}")
    return captions, faults


def _add_reference(
    metas: dict[str, dict], reference: dict[int | str, list[str]], path: str | Path
) -> list[IgnoredFile]:
    """Give each image the captions of its id; report how many ids and images have no partner."""
    unused, without = set(reference), []
    for image, meta in metas.items():
        key = same_id(meta["image_id"]) if "image_id" in meta else None
        if key in reference:
            meta["captions"] += reference[key]
            unused.discard(key)
        else:
            without.append(image)
    if len(without) == len(metas):
        raise InputError(
            f"no image of the list has an id of {path}: it has {next(iter(reference))!r}, the list "
            f"{next(iter(metas.values())).get('image_id')!r}; name the captions of this list"
        )
    others = []
    if unused:
        reason = f"{len(unused)} image ids belong to no image of the list, the first {min(unused, key=str)!r}"
        others.append(IgnoredFile(printable(str(path)), reason))
    if without:
        reason = f"it has no captions of {len(without)} images of the list, the first {without[0]}"
        others.append(IgnoredFile(printable(str(path)), reason))
    return others
