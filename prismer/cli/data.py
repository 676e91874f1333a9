"""`prismer data`: render the embedded dataset, import other datasets, check, draw and extract samples."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.printing import describe_others, is_watched, print_left_out
from prismer.errors import InputError, check_count

if TYPE_CHECKING:
    from prismer.dataloading.sources.records import ImageRecords
    from prismer.dataloading.store.shards import ShardDataset


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Add the group `data` to the commands of `prismer`."""
    data = commands.add_parser("data", help="make, import, check and view datasets")
    steps = data.add_subparsers(metavar="COMMAND", required=True)

    render = steps.add_parser("render", help="render the embedded dataset: scenes with exact expert labels")
    render.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="DIR/train, DIR/val and DIR/test are written"
    )
    for split, default in (("train", 4000), ("val", 400), ("test", 400)):
        render.add_argument(f"--{split}", type=int, default=default, metavar="N", help=f"scenes (default {default})")
    render.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    render.add_argument("--size", type=int, default=128, help="side of images and label maps, px (default 128)")
    render.add_argument("--workers", type=int, metavar="N", help="processes (default: one per usable core)")
    render.set_defaults(run=_render)

    _add_import(steps)

    check = steps.add_parser("check", help="read every byte of a dataset and list all problems")
    check.add_argument("folder", type=Path, metavar="DIR", help="dataset folder, or a folder of splits")
    check.set_defaults(run=_check)

    show = steps.add_parser("show", help="draw samples and all their expert labels in one PNG")
    show.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    show.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="PNG", help="default sheet.png")
    show.add_argument("--count", type=int, default=8, metavar="N", help="number of samples (default 8)")
    show.add_argument("--start", type=int, default=0, metavar="I", help="position of the first sample")
    show.set_defaults(run=_draw_samples)

    extract = steps.add_parser("extract", help="write one sample as KEY.jpg, KEY.labels and KEY.json")
    extract.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    extract.add_argument("key", metavar="KEY")
    extract.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")
    extract.set_defaults(run=_extract)


def _add_import(steps: argparse._SubParsersAction) -> None:
    importer = steps.add_parser("import", help="turn lists and folders of images into shards")
    kinds = importer.add_subparsers(dest="kind", metavar="KIND", required=True)

    captions = kinds.add_parser("captions", help="a JSON list of images and captions (COCO, NoCaps, Visual Genome)")
    captions.add_argument("lists", nargs=1, type=Path, metavar="LIST")
    captions.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of DATASET/image or image")
    captions.add_argument(
        "--dataset", default="vqav2", help="name of the image and label folder: vqav2 (COCO, default), nocaps, vg"
    )
    captions.add_argument(
        "--captions-file", type=Path, metavar="JSON", help="COCO captions, for a list without captions"
    )

    vqa = kinds.add_parser("vqa", help="JSON lists of images, questions and answers (VQAv2, Visual Genome)")
    vqa.add_argument("lists", nargs="+", type=Path, metavar="LIST")
    vqa.add_argument("--images", type=Path, required=True, metavar="DIR")

    folder = kinds.add_parser("folder", help="a folder of images with .txt or .json captions beside them")

    classes = kinds.add_parser("classes", help="a folder with one folder of images per class (ImageNet)")
    classes.add_argument("--classes", type=Path, metavar="JSON", help="{folder: name or index}, or a list of names")
    classes.add_argument("--names", type=Path, metavar="JSON", help="list of class names, if --classes gives indices")

    tars = kinds.add_parser("tars", help="a folder of WebDataset tars")

    for kind in (folder, classes, tars):
        kind.add_argument("source_folder", type=Path, metavar="SOURCE")
    for kind in (captions, vqa, folder, classes):
        kind.add_argument("--labels", type=Path, metavar="DIR", help="folder of EXPERT/DATASET/image.png")
    for kind in (captions, vqa, folder, classes, tars):
        kind.add_argument("--out", required=True, type=Path, metavar="DIR", help="dataset folder; run again to resume")
        kind.add_argument("--source", default="", help="origin of the images, in a few words")
        kind.add_argument("--licence", default="", help="licence of the images")
        kind.add_argument("--class-tables", type=Path, metavar="JSON", help='{"seg": [...], "obj_detection": [...]}')
        kind.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
        kind.add_argument("--label-size", type=int, default=224, metavar="PX", help="side of the stored label maps")
        kind.add_argument("--workers", type=int, default=4, metavar="N", help="threads")
        kind.set_defaults(run=_import)


def _render(args: argparse.Namespace) -> None:
    from prismer.dataloading.scenes.dataset import render_dataset

    render_dataset(
        args.out,
        train=args.train,
        val=args.val,
        test=args.test,
        seed=args.seed,
        size=args.size,
        label_size=args.size,
        workers=args.workers,
        progress=is_watched(),
    )
    splits = [f"{split} {getattr(args, split)}" for split in ("train", "val", "test") if getattr(args, split)]
    print(f"{args.out}: {', '.join(splits)} scenes")


def _records(args: argparse.Namespace) -> "ImageRecords":
    from prismer.dataloading.sources.class_folders import class_records
    from prismer.dataloading.sources.coco_captions import caption_records
    from prismer.dataloading.sources.image_folders import folder_records
    from prismer.dataloading.sources.vqa_questions import vqa_records
    from prismer.dataloading.sources.webdataset_tars import tar_records

    if args.kind == "captions":
        options = dict(labels=args.labels, dataset=args.dataset, captions_file=args.captions_file)
        return caption_records(args.lists[0], args.images, **options)
    if args.kind == "vqa":
        return vqa_records(args.lists, args.images, labels=args.labels)
    if args.kind == "folder":
        return folder_records(args.source_folder, labels=args.labels)
    if args.kind == "classes":
        return class_records(args.source_folder, classes=args.classes, names=args.names, labels=args.labels)
    return tar_records(args.source_folder)


def _import(args: argparse.Namespace) -> None:
    from prismer.dataloading.sources.importer import REPORT_FILE, import_records
    from prismer.reading import printable

    for name in ("samples_per_shard", "label_size", "workers"):
        check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    if "source_folder" in args and args.source_folder.resolve() == args.out.resolve():
        raise InputError(f"--out {args.out} is the folder to import; name another folder for the shards")
    records = _records(args)
    if not len(records):
        raise InputError(f"there are no images to import; {describe_others(records)}")
    first = args.lists[0] if "lists" in args else args.source_folder
    report = import_records(
        records,
        args.out,
        source=args.source or printable(first.stem),
        licence=args.licence,
        class_tables=args.class_tables,
        samples_per_shard=args.samples_per_shard,
        label_size=args.label_size,
        workers=args.workers,
        progress=is_watched(),
    )
    print(f"{args.out}: {report.imported} of {report.records} images imported, {len(report.skipped)} skipped")
    print_left_out(report.skipped, report.others, args.out / REPORT_FILE)
    if not report.imported:
        raise InputError(f"none of the {report.records} images could be imported; see {args.out / REPORT_FILE}")


def _check(args: argparse.Namespace) -> int:
    from prismer.dataloading.store.check import check_dataset

    reports = [check_dataset(folder, progress=is_watched()) for folder in _splits(args.folder) or [args.folder]]
    for report in reports:
        print("\n".join(report.lines()))
    return 0 if all(report.ok for report in reports) else 1


def _draw_samples(args: argparse.Namespace) -> None:
    from prismer.dataloading.views.contact_sheet import draw_sheet

    dataset = _open(args.folder)
    if args.count < 1 or not 0 <= args.start < len(dataset):
        raise InputError(
            f"{args.folder} has samples 0 to {len(dataset) - 1}; --start {args.start} --count {args.count} shows none"
        )
    draw_sheet(dataset, args.out, count=args.count, start=args.start)
    print(args.out)


def _extract(args: argparse.Namespace) -> None:
    from prismer.dataloading.store.label_maps import pack_labels
    from prismer.files import write_atomically
    from prismer.reading import printable

    dataset = _open(args.folder)
    index = next((i for i in range(len(dataset)) if dataset.key(i) == args.key), None)
    if index is None:
        first = dataset.key(0) if len(dataset) else "none"
        raise InputError(f"{args.folder} has no sample {args.key}; its {len(dataset)} keys start with {first}")
    sample = dataset[index]
    args.out.mkdir(parents=True, exist_ok=True)
    tables = json.dumps({**sample.meta, "classes": dataset.classes}, ensure_ascii=False, indent=1)
    paths, made = [], []
    try:
        for suffix, data in (
            ("jpg", sample.jpeg),
            ("labels", pack_labels(sample.labels)),
            # JSON can hold the lone surrogates of a damaged text, UTF-8 cannot
            ("json", printable(tables).encode()),
        ):
            path = args.out / f"{sample.key}.{suffix}"
            paths.append(path)
            made += [] if path.exists() else [path]
            write_atomically(path, data)
    except OSError:
        # leave no part of a sample behind
        for path in made:
            path.unlink(missing_ok=True)
        raise
    for path in paths:
        print(path)


def _open(folder: Path) -> "ShardDataset":
    from prismer.dataloading.store.shards import ShardDataset

    splits = _splits(folder)
    if splits:
        raise InputError(f"{folder} holds several datasets; name one of {', '.join(map(str, splits))}")
    return ShardDataset(folder)


def _splits(folder: Path) -> list[Path]:
    """The datasets in a folder; [] if the folder is a dataset itself."""
    if (folder / "index.json").exists():
        return []
    return sorted(path.parent for path in folder.glob("*/index.json") if not path.parent.name.startswith("."))
