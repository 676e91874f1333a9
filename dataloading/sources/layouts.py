"""Published datasets as their archives unpack: how their annotation files are named, and where their images lie."""

from dataclasses import dataclass
from pathlib import Path

from prismer.errors import InputError

# folders below the root in which archives and tools put annotation files
_FOLDERS = ("", "annotations", "Annotations", "Questions", "karpathy")


@dataclass(frozen=True)
class Layout:
    """A published dataset.

    Attributes:
        schemas: the schemas of its annotation files.
        patterns: names of its annotation files; {split} stands for a split, with the year or without.
        labels: the folder of its label maps in an expert's folder.
        images: folders below the root in which its images may lie.
    """

    schemas: tuple[str, ...]
    patterns: tuple[str, ...]
    labels: str
    images: tuple[str, ...]


LAYOUTS = {
    "coco": Layout(
        ("captions", "images", "karpathy"),
        ("captions_{split}.json", "image_info_{split}.json", "dataset_coco.json"),
        "vqav2",
        ("", "vqav2", "images"),
    ),
    "nocaps": Layout(
        ("captions", "images"),
        ("nocaps_{split}_4500_captions.json", "nocaps_{split}_image_info.json"),
        "nocaps",
        ("", "nocaps", "images", "val_imgs", "test_imgs"),
    ),
    "vqav2": Layout(
        ("questions", "answers"),
        ("v2_OpenEnded_mscoco_{split}_questions.json", "v2_mscoco_{split}_annotations.json"),
        "vqav2",
        ("", "vqav2", "images", "Images/mscoco"),
    ),
    "vg": Layout(
        ("regions", "qas", "image data"),
        ("region_descriptions.json", "question_answers.json"),
        "vg",
        ("", "vg", "images"),
    ),
    "flickr30k": Layout(
        ("karpathy", "token", "table"),
        ("dataset_flickr30k.json", "results_20130124.token", "results.csv"),
        "flickr30k",
        ("", "flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", "Images"),
    ),
}


def find_annotations(dataset: str, root: Path, splits: list[str]) -> list[Path]:
    """The annotation files of some splits below the root of a dataset.

    Raises:
        ValueError: if `root` is not a folder, a split lacks its file, or several files of one split are there.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; name the folder of {dataset}")
    patterns = LAYOUTS[dataset].patterns
    if any("{split}" in pattern for pattern in patterns):
        if not splits:
            raise InputError(f"{dataset} has several splits; name one with --split, such as --split val")
        found = [path for split in splits for path in _of_split(dataset, root, split, splits)]
    else:
        found = _of_split(dataset, root, "+".join(splits), splits)
    return list(dict.fromkeys(found))


def _of_split(dataset: str, root: Path, split: str, splits: list[str]) -> list[Path]:
    """The annotation files of one of some splits."""
    patterns = LAYOUTS[dataset].patterns
    # "val" finds val2014 and val2017, but "test" does not find test-dev2015
    names = dict.fromkeys(pattern.format(split=form) for pattern in patterns for form in (split, f"{split}[0-9]*"))
    found = [path for folder in _FOLDERS for name in names for path in sorted((root / folder).glob(name))]
    karpathy = [path for path in found if path.name.startswith("dataset_")]
    others = [path for path in found if path not in karpathy]
    if dataset == "coco" and split not in ("train", "val", "test", "restval"):
        found = others
    elif (dataset == "coco" and karpathy and {"test", "restval"} & set(splits)) or (dataset == "flickr30k" and split):
        # only Karpathy's file has such splits with captions
        found = karpathy
    elif dataset == "flickr30k":
        found = others or karpathy
    elif dataset == "nocaps":
        # both list the same images
        found = [path for path in found if "captions" in path.name] or found
    of_split = f" for the split {split}" if split else ""
    if not found:
        wanted = ", ".join(pattern.format(split=split) for pattern in patterns)
        raise InputError(
            f"{root} has no annotation file of {dataset}{of_split} ({wanted}); name the file with --annotations"
        )
    roles = {path: path.name[:10] if dataset in ("vqav2", "vg") else "" for path in found}
    if len(set(roles.values())) < len(roles):
        listed = ", ".join(map(str, found))
        raise InputError(
            f"{root} has several annotation files of {dataset}{of_split}; name one with --annotations: {listed}"
        )
    if dataset == "vqav2" and not split.startswith("test") and len(found) == 1:
        raise InputError(
            f"{root} has {found[0].name} alone{of_split}; put the questions and their annotations there, or name both "
            f"with --annotations"
        )
    return found
