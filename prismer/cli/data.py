"""`prismer data`: render the embedded dataset, import others, check and index datasets, draw and extract samples."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.data_import import add_import_command
from prismer.cli.data_recipes import add_recipes_command
from prismer.cli.printing import is_watched
from prismer.errors import InputError

if TYPE_CHECKING:
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
    render.add_argument(
        "--sign-words", choices=("few", "many"), default="few", help="words on signs: 43, or about 1,500 (default few)"
    )
    render.set_defaults(run=_render)

    add_import_command(steps)
    add_recipes_command(steps)

    check = steps.add_parser("check", help="read every byte of a dataset and list all problems")
    check.add_argument("place", type=_place, metavar="DIR", help="dataset folder, or a folder of splits")
    check.set_defaults(run=_check)

    index = steps.add_parser(
        "index", help="make index.bin, the table of all samples, again from the index files of shards"
    )
    index.add_argument("place", type=_place, metavar="DIR", help="dataset folder, or a folder of splits")
    index.set_defaults(run=_index)

    show = steps.add_parser("show", help="draw samples and all their expert labels in one PNG")
    show.add_argument("place", type=_place, metavar="DIR", help="dataset folder")
    show.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="PNG", help="default sheet.png")
    show.add_argument("--count", type=int, default=8, metavar="N", help="number of samples (default 8)")
    show.add_argument("--start", type=int, default=0, metavar="I", help="position of the first sample")
    show.set_defaults(run=_draw_samples)

    extract = steps.add_parser("extract", help="write one sample as KEY.jpg, KEY.labels and KEY.json")
    extract.add_argument("place", type=_place, metavar="DIR", help="dataset folder")
    extract.add_argument("key", metavar="KEY")
    extract.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")
    extract.set_defaults(run=_extract)


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
        sign_words=args.sign_words,
    )
    splits = [f"{split} {getattr(args, split)}" for split in ("train", "val", "test") if getattr(args, split)]
    print(f"{args.out}: {', '.join(splits)} scenes")


def _check(args: argparse.Namespace) -> int:
    from prismer.dataloading.store.check import check_dataset

    reports = [check_dataset(place, progress=is_watched()) for place in _splits(args.place) or [args.place]]
    for report in reports:
        print("\n".join(report.lines()))
    return 0 if all(report.ok for report in reports) else 1


def _index(args: argparse.Namespace) -> None:
    from prismer.dataloading.store.shards import make_table

    for place in _splits(args.place) or [args.place]:
        index = make_table(place, progress=is_watched())
        print(f"{place}/index.bin: {index['count']} samples")


def _draw_samples(args: argparse.Namespace) -> None:
    from prismer.dataloading.views.contact_sheet import draw_sheet

    dataset = _open(args.place)
    if args.count < 1 or not 0 <= args.start < len(dataset):
        raise InputError(
            f"{args.place} has samples 0 to {len(dataset) - 1}; --start {args.start} --count {args.count} shows none"
        )
    draw_sheet(dataset, args.out, count=args.count, start=args.start)
    print(args.out)


def _extract(args: argparse.Namespace) -> None:
    from prismer.dataloading.store.label_maps import pack_labels
    from prismer.files import write_atomically
    from prismer.reading import printable

    dataset = _open(args.place)
    index = dataset.find(args.key)
    if index is None:
        first = dataset.key(0) if len(dataset) else "none"
        raise InputError(f"{args.place} has no sample {args.key}; its {len(dataset)} keys start with {first}")
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


def _open(place: str) -> "ShardDataset":
    from prismer.dataloading.store.shards import ShardDataset

    splits = _splits(place)
    if splits:
        raise InputError(f"{place} holds several datasets; name one of {', '.join(splits)}")
    return ShardDataset(place)


def _place(text: str) -> str:
    """An argument that names a dataset: a normal path, or a place in object storage as it was given."""
    return text if "://" in text else str(Path(text))


def _splits(place: str) -> list[str]:
    """The datasets in a folder; [] if the folder, or the place in object storage, is a dataset itself."""
    folder = Path(place)
    if (folder / "index.json").exists():
        return []
    return sorted(str(path.parent) for path in folder.glob("*/index.json") if not path.parent.name.startswith("."))
