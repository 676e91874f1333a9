"""`prismer data import`: other people's datasets as shards."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.printing import describe_others, is_watched, print_left_out
from prismer.errors import InputError, check_count
from prismer.storage.places import as_place, inside

if TYPE_CHECKING:
    from prismer.dataloading.sources.records import ImageRecords

# a kind of published dataset -> its line in the help
_PUBLISHED = {
    "coco": "COCO captions, or a split of Karpathy",
    "vqav2": "VQAv2, with all ten answers",
    "nocaps": "NoCaps, with the domain of each image",
    "vg": "Visual Genome: region descriptions and questions",
    "flickr30k": "Flickr30k, or a split of Karpathy",
}


def add_import_command(steps: argparse._SubParsersAction) -> None:
    """Add `import` to the steps of `prismer data`."""
    importer = steps.add_parser("import", help="turn published datasets, lists and folders of images into shards")
    kinds = importer.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_published(kinds)
    _add_folders(kinds)
    _add_tables(kinds)
    _add_lists(kinds)
    for kind in kinds.choices.values():
        kind.add_argument(
            "--out",
            required=True,
            type=as_place,
            metavar="DIR",
            help="dataset folder, or a URL such as s3://bucket/dataset; run again to resume",
        )
        kind.add_argument("--source", default="", help="origin of the images, in a few words")
        kind.add_argument("--licence", default="", help="licence of the images")
        kind.add_argument("--class-tables", type=Path, metavar="JSON", help='{"seg": [...], "obj_detection": [...]}')
        kind.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
        kind.add_argument("--label-size", type=int, default=224, metavar="PX", help="side of the stored label maps")
        kind.add_argument("--workers", type=int, default=4, metavar="N", help="threads")
        kind.set_defaults(run=_import)


def _add_published(kinds: argparse._SubParsersAction) -> None:
    for name, about in _PUBLISHED.items():
        kind = kinds.add_parser(name, help=about)
        kind.add_argument("source_folder", type=Path, metavar="ROOT", help="its folder, as the archives unpack")
        kind.add_argument("--split", default="", help="train, val2014, test, ...; several as train+restval")
        kind.add_argument(
            "--annotations", nargs="+", type=Path, default=[], metavar="FILE", help="default: looked for in ROOT"
        )
        kind.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, if it is not ROOT")
        _add_labels(kind)


def _add_folders(kinds: argparse._SubParsersAction) -> None:
    imagenet = kinds.add_parser("imagenet", help="ImageNet, all of it or some images of each class")
    imagenet.add_argument("source_folder", type=Path, metavar="ROOT", help="its folder, as the archive unpacks")
    imagenet.add_argument("--split", default="", help="train or val")
    classes = kinds.add_parser("classes", help="a folder with one folder of images per class")
    web = kinds.add_parser("web", help="img2dataset output with captions from the list of addresses (CC3M, CC12M, SBU)")
    web.add_argument(
        "--annotations", nargs="+", type=Path, required=True, metavar="FILE", help="the TSV or JSON, or SBU's two texts"
    )
    folder = kinds.add_parser("folder", help="a folder of images with .txt or .json captions beside them")
    tars = kinds.add_parser("tars", help="a folder of WebDataset tars")
    for kind in (classes, web, folder, tars):
        kind.add_argument("source_folder", type=Path, metavar="SOURCE")
    for kind in (imagenet, classes):
        kind.add_argument("--classes", type=Path, metavar="JSON", help="{folder: name or index}, or a list of names")
        kind.add_argument("--names", type=Path, metavar="JSON", help="list of class names, if --classes gives indices")
        kind.add_argument("--shots", type=int, metavar="N", help="draw N images of each class (default: all)")
        kind.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    for kind in (imagenet, classes, web, folder):
        _add_labels(kind)


def _add_tables(kinds: argparse._SubParsersAction) -> None:
    parquet = kinds.add_parser("parquet", help="Parquet files with an image in each row")
    parquet.add_argument("tables", nargs="+", type=Path, metavar="FILE", help="files, or folders of them")
    hub = kinds.add_parser("hub", help="a dataset of the Hugging Face hub, streamed")
    hub.add_argument("name", metavar="NAME", help="such as HuggingFaceM4/NoCaps")
    hub.add_argument("--split", default="train", help="default train")
    hub.add_argument("--config", help="its configuration, if it has several")
    for kind in (parquet, hub):
        kind.add_argument(
            "--columns",
            nargs="+",
            default=[],
            metavar="WHAT=COLUMN",
            help="image, captions, question, answers, class, image_id, ...=name; default: usual names",
        )
        kind.add_argument("--limit", type=int, metavar="N", help="the most rows (default: all)")


def _add_lists(kinds: argparse._SubParsersAction) -> None:
    captions = kinds.add_parser("captions", help='a JSON list of {"image", "caption"}')
    captions.add_argument("lists", nargs=1, type=Path, metavar="LIST")
    captions.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of DATASET/image or image")
    captions.add_argument(
        "--dataset", default="vqav2", help="name of the image and label folder: vqav2 (COCO, default), nocaps, vg"
    )
    captions.add_argument(
        "--captions-file", type=Path, metavar="JSON", help="COCO captions, for a list without captions"
    )
    vqa = kinds.add_parser("vqa", help='JSON lists of {"image", "question", "answer"}')
    vqa.add_argument("lists", nargs="+", type=Path, metavar="LIST")
    vqa.add_argument("--images", type=Path, required=True, metavar="DIR")
    for kind in (captions, vqa):
        _add_labels(kind)


def _add_labels(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--labels", type=Path, metavar="DIR", help="folder of EXPERT/DATASET/image.png")


def _records(args: argparse.Namespace) -> "ImageRecords":
    from prismer.dataloading.sources.class_folders import class_records
    from prismer.dataloading.sources.coco_captions import caption_records
    from prismer.dataloading.sources.image_folders import folder_records
    from prismer.dataloading.sources.imagenet import imagenet_records
    from prismer.dataloading.sources.published import published_records
    from prismer.dataloading.sources.table_rows import table_records
    from prismer.dataloading.sources.url_captions import web_records
    from prismer.dataloading.sources.vqa_questions import vqa_records
    from prismer.dataloading.sources.webdataset_tars import tar_records

    if args.kind in _PUBLISHED:
        options = dict(split=args.split, annotations=args.annotations, images=args.images, labels=args.labels)
        return published_records(args.kind, args.source_folder, **options)
    if args.kind in ("imagenet", "classes"):
        options = dict(classes=args.classes, names=args.names, labels=args.labels, shots=args.shots, seed=args.seed)
        if args.kind == "imagenet":
            return imagenet_records(args.source_folder, args.split, **options)
        return class_records(args.source_folder, **options)
    if args.kind == "web":
        return web_records(args.source_folder, args.annotations, labels=args.labels)
    if args.kind in ("parquet", "hub"):
        options = dict(columns=_columns(args.columns), limit=args.limit)
        if args.kind == "hub":
            return table_records(args.name, split=args.split, config=args.config, **options)
        return table_records(_parquet_files(args.tables), **options)
    if args.kind == "captions":
        options = dict(labels=args.labels, dataset=args.dataset, captions_file=args.captions_file)
        return caption_records(args.lists[0], args.images, **options)
    if args.kind == "vqa":
        return vqa_records(args.lists, args.images, labels=args.labels)
    if args.kind == "folder":
        return folder_records(args.source_folder, labels=args.labels)
    return tar_records(args.source_folder)


def _columns(pairs: list[str]) -> dict[str, str]:
    """WHAT=COLUMN arguments as a dict."""
    columns = {}
    for pair in pairs:
        what, equals, column = pair.partition("=")
        if not equals or not column:
            raise InputError(f"--columns {pair} is not WHAT=COLUMN; give for instance --columns image=jpg captions=txt")
        columns[what] = column
    return columns


def _parquet_files(paths: list[Path]) -> list[Path]:
    """Files, with folders replaced by the Parquet files in them."""
    files = []
    for path in paths:
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise InputError(f"{path} is no Parquet file and no folder of them; check the path")
        files += found
    return files


def _import(args: argparse.Namespace) -> None:
    from prismer.dataloading.sources.importer import REPORT_FILE, import_records
    from prismer.reading import printable

    for name in ("samples_per_shard", "label_size", "workers", "limit", "shots"):
        if getattr(args, name, None) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    folder = getattr(args, "source_folder", None)
    if folder is not None and isinstance(args.out, Path) and folder.resolve() == args.out.resolve():
        raise InputError(f"--out {args.out} is the folder to import; name another folder for the shards")
    records = _records(args)
    if records.count == 0:
        raise InputError(f"there are no images to import; {describe_others(records)}")
    report = import_records(
        records,
        args.out,
        source=args.source or printable(_origin(args)),
        licence=args.licence,
        class_tables=args.class_tables,
        samples_per_shard=args.samples_per_shard,
        label_size=args.label_size,
        workers=args.workers,
        progress=is_watched(),
    )
    print(f"{args.out}: {report.imported} of {report.records} images imported, {len(report.skipped)} skipped")
    if report.formats:
        formats = ", ".join(f"{one['count']} {name}" for name, one in sorted(report.formats.items()))
        print(f"encoded anew as RGB JPEG: {formats}")
    print_left_out(report.skipped, report.others, inside(args.out, REPORT_FILE))
    if not report.imported:
        raise InputError(f"none of the {report.records} images could be imported; see {inside(args.out, REPORT_FILE)}")


def _origin(args: argparse.Namespace) -> str:
    """What --source is if it is not given."""
    if args.kind in (*_PUBLISHED, "imagenet"):
        return f"{args.kind} {args.split}".strip()
    if args.kind == "hub":
        return f"{args.name} {args.split}"
    named = getattr(args, "lists", None) or getattr(args, "tables", None) or [args.source_folder]
    return named[0].stem
