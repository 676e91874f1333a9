"""Published datasets in their own folders -> records: COCO, Karpathy's splits, NoCaps, VQAv2, Visual Genome, Flickr30k.

    records = published_records("coco", "coco", split="train+restval", annotations=["coco/dataset_coco.json"])

The content of an annotation file decides how it is read, so that it may have any name.
"""

from collections.abc import Sequence
from pathlib import Path

from prismer.dataloading.sources.annotations import SCHEMAS, AnnotatedImage, AnnotationFile, Findings, read_annotations
from prismer.dataloading.sources.coco_annotations import coco_images, flickr_images, karpathy_images
from prismer.dataloading.sources.image_folders import count_unnamed
from prismer.dataloading.sources.layouts import LAYOUTS, find_annotations
from prismer.dataloading.sources.records import DatasetPaths, ImageRecords
from prismer.dataloading.sources.visual_genome import FOLDERS, add_genome_images, image_folders
from prismer.dataloading.sources.vqa_annotations import vqa_images
from prismer.errors import InputError


def published_records(
    dataset: str,
    root: str | Path,
    *,
    split: str = "",
    annotations: Sequence[str | Path] = (),
    images: str | Path | None = None,
    labels: str | Path | None = None,
) -> ImageRecords:
    """The records of a published dataset, one for each image.

    Args:
        dataset: "coco", "nocaps", "vqav2", "vg" or "flickr30k".
        root: the folder of the dataset, as its archives unpack.
        split: "train", "val2014", or several as "train+restval". Files without splits of their own take none.
        annotations: the annotation files; without them those of the split are looked for below `root`.
        images: the folder of the images, if it is not `root`.
        labels: the folder of `<expert>/<dataset>/<folder>/<image>.png`, if there are labels.

    Raises:
        ValueError: if a file is missing or of another dataset, the split is not there, or no image can be found.
    """
    root, findings = Path(root), Findings()
    splits = [name for name in split.split("+") if name]
    paths = [Path(path) for path in annotations] or find_annotations(dataset, root, splits)
    files = [read_annotations(path) for path in paths]
    for file in files:
        if file.schema not in LAYOUTS[dataset].schemas:
            right = next((name for name, other in LAYOUTS.items() if file.schema in other.schemas), "")
            advice = f"import it with `prismer data import {right}`" if right else "name another file"
            raise InputError(f"{file.path} holds {SCHEMAS[file.schema]}; {advice}")
    if annotations and splits and not any(file.schema == "karpathy" for file in files):
        raise InputError(
            f"{files[0].path} has no splits, but --split is {split}; give --split or --annotations, not both"
        )
    placed, known = _read(files, splits, root, findings)
    if not placed:
        reason = f"; {findings.faults[0].fault}" if findings.faults else ""
        raise InputError(f"{files[0].path} names no image that can be used{reason}")
    bases = [Path(images or root) / name for name in LAYOUTS[dataset].images]
    if not bases[0].is_dir():
        raise InputError(f"{bases[0]} is not a folder; name the one that holds the images with --images")
    if dataset == "vg":
        _find_genome_images(placed, bases)
    homes = _homes(placed, bases)
    if not homes:
        raise InputError(
            f"{bases[0]} holds none of the {len(placed)} images of {files[0].path}, the first {placed[0].path}; name "
            f"the folder of the images with --images"
        )
    label_paths = DatasetPaths(bases[0], labels, LAYOUTS[dataset].labels)
    records = [
        label_paths.record(image.path, image.meta, file=homes.get(image.folder, bases[0] / image.folder) / image.name)
        for image in placed
    ]
    listed: dict[Path, set[str]] = {}
    for folder, name in [*((image.folder, image.name) for image in placed), *known]:
        if folder in homes:
            listed.setdefault(homes[folder], set()).add(name)
    others = findings.others()
    for home, names in listed.items():
        others += count_unnamed(home, names)
    records += findings.faults
    return ImageRecords(len(records), records.__iter__, others=others)


def _read(
    files: list[AnnotationFile], splits: list[str], root: Path, findings: Findings
) -> tuple[list[AnnotatedImage], list[tuple[str, str]]]:
    """The images that files describe, and (folder, name) of the further images that they list."""
    schemas = {file.schema for file in files}
    if schemas & {"questions", "answers"}:
        return vqa_images(files, findings), []
    images: dict[object, AnnotatedImage] = {}
    if schemas & {"regions", "qas", "image data"}:
        data = [file for file in files if file.schema == "image data"]
        beside = (folder / "image_data.json" for folder in (root, files[0].path.parent))
        if not data and (path := next(filter(Path.is_file, beside), None)):
            data = [read_annotations(path)]
        places = {key: place for file in data for key, place in image_folders(file, findings).items()}
        for file in files:
            if file.schema != "image data":
                add_genome_images(images, file, places, findings)
        return list(images.values()), list(places.values())
    known: list[tuple[str, str]] = []
    for file in files:
        if file.schema == "karpathy":
            found, listed = karpathy_images(file, splits, findings)
            known += listed
        else:
            found = (coco_images if file.schema in ("captions", "images") else flickr_images)(file, findings)
        for image in found:
            if images.setdefault(image.path, image) is not image:
                findings.count(file.path, "images are in an earlier file, too, and read from there", image.path)
    return list(images.values()), known


def _find_genome_images(placed: list[AnnotatedImage], bases: list[Path]) -> None:
    """Give images that no image_data.json places the one of the two folders in which they lie."""
    for image in placed:
        if not image.folder:
            found = (name for base in bases for name in FOLDERS if (base / name / image.name).is_file())
            image.folder = next(found, "")


def _homes(placed: list[AnnotatedImage], bases: list[Path]) -> dict[str, Path]:
    """The folder that an annotation file gives to images -> the folder in which they lie.

    That is the folder of this name in one of `bases`, or one of `bases` itself, if all images were put together there.
    """
    homes = {}
    for folder in dict.fromkeys(image.folder for image in placed):
        own = [base / folder for base in bases if folder and (base / folder).is_dir()]
        names = [image.name for image in placed if image.folder == folder]
        flat = (base for base in bases if any((base / name).is_file() for name in names))
        home = own[0] if own else next(flat, None)
        if home:
            homes[folder] = home
    return homes
