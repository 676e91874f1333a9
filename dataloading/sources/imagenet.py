"""ImageNet as its archive unpacks -> records for classification, all images or some of each class."""

from collections import Counter
from pathlib import Path

from prismer.dataloading.sources.annotations import Findings
from prismer.dataloading.sources.class_folders import Draw, class_records
from prismer.dataloading.sources.image_folders import count_unnamed, subfolders
from prismer.dataloading.sources.records import DatasetPaths, ImageRecords
from prismer.errors import InputError
from prismer.reading import read_lines


def imagenet_records(
    root: str | Path,
    split: str,
    *,
    classes: str | Path | None = None,
    names: str | Path | None = None,
    labels: str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> ImageRecords:
    """A split of ImageNet: `<split>/<wnid>/<image>.JPEG`, in `root` or in ILSVRC/Data/CLS-LOC.

    The archive has all images of "val" in one folder; `LOC_val_solution.csv` gives their classes. Without `classes`,
    `LOC_synset_mapping.txt` gives the names: the first synonym of a class, or all synonyms where another class has the
    same first one.

    Args:
        root: the folder of ImageNet.
        split: "train" or "val".
        classes, names, labels, shots, seed: as for `class_records`.

    Raises:
        ValueError: if the split is not there, or the classes of its images are not, or as for `class_records`.
    """
    root = Path(root)
    places = [root / place / split for place in ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")]
    folder = next((place for place in places if place.is_dir()), None)
    if not split or folder is None:
        raise InputError(f"{root} has no folder {split or 'of a split'}; name it with --split, such as --split train")
    table = classes
    if classes is None and (root / "LOC_synset_mapping.txt").is_file():
        table = _synset_names(root / "LOC_synset_mapping.txt")
    if subfolders(folder):
        return class_records(folder, classes=table, names=names, labels=labels, shots=shots, seed=seed)
    solution = root / f"LOC_{split}_solution.csv"
    if not solution.is_file() or not isinstance(table, dict):
        raise InputError(
            f"{folder} has no class folders; put LOC_{split}_solution.csv and LOC_synset_mapping.txt into {root}, or "
            f"sort the images into folders of their wnids"
        )
    return _listed_records(folder, solution, table, labels, shots, seed)


def _listed_records(
    folder: Path, solution: Path, names: dict[str, str], labels: str | Path | None, shots: int | None, seed: int
) -> ImageRecords:
    """Images of one folder with the classes of a list of lines "ILSVRC2012_val_00000001,n01751748 111 108 390 333"."""
    findings, wnids = Findings(), {}
    for number, line in enumerate(read_lines(solution)):
        image, _, boxes = line.partition(",")
        wnid = boxes.split(" ")[0].strip()
        if wnid in names and image and "/" not in image:
            wnids[f"{image}.JPEG"] = wnid
        elif line.strip() and image != "ImageId":
            findings.fault(solution, f"line {number + 1}", "is not an image and a wnid of the mapping")
    others = count_unnamed(folder, set(wnids))
    if shots is not None:
        draw = Draw(shots, seed)
        for path, wnid in wnids.items():
            draw.add(names[wnid], path)
        others += draw.others(folder, len(wnids))
        wnids = {path: wnid for path, wnid in wnids.items() if path in draw.chosen}
    paths = DatasetPaths(folder.parent, labels, folder.name)
    records = [paths.record(path, {"class": names[wnid]}) for path, wnid in sorted(wnids.items())]
    records += findings.faults
    return ImageRecords(len(records), records.__iter__, list(dict.fromkeys(names[w] for w in sorted(names))), others)


def _synset_names(path: Path) -> dict[str, str]:
    """wnid -> name of a mapping with lines such as "n01440764 tench, Tinca tinca"."""
    lines = {wnid: text.strip() for wnid, _, text in (line.partition(" ") for line in read_lines(path))}
    uses = Counter(text.split(",")[0] for text in lines.values())
    return {wnid: text if uses[text.split(",")[0]] > 1 else text.split(",")[0] for wnid, text in lines.items()}
