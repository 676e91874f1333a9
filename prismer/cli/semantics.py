"""`prismer semantics`: make, extend and import the tables that give class names and words their features."""

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path


def add_semantics_commands(commands) -> None:
    """Add `semantics` and what belongs to it to the sub-commands of `prismer`."""
    semantics = commands.add_parser("semantics", help="make the tables of features of class names and words")
    steps = semantics.add_subparsers(metavar="COMMAND", required=True)

    build = steps.add_parser("build", help="a table from a CLIP text tower")
    build.add_argument("--out", required=True, type=Path, metavar="DIR")
    build.add_argument("--prompt", metavar="WORDING", help='what the tower reads, {} being the text (default "{}")')
    build.add_argument(
        "--background", metavar="TEXT", help='the text that stands for nothing here (default "background")'
    )
    build.add_argument("--pca", type=Path, metavar="FOLDER", help="use the PCA of this table instead of fitting one")
    build.add_argument(
        "--no-vocabulary",
        action="store_true",
        help="fit the PCA to the texts alone, without the words of RoBERTa's vocabulary",
    )
    build.set_defaults(run=_build)

    add = steps.add_parser("add", help="add the words of other datasets to a table, with its own tower and PCA")
    add.add_argument("folder", type=Path, metavar="DIR", help="made by `prismer semantics build`")
    add.set_defaults(run=_add)

    for step in (build, add):
        step.add_argument(
            "--clip",
            required=step is build,
            metavar="NAME_OR_FOLDER",
            help="folder with open_clip_config.json and weights; or ARCHITECTURE@FILE, which is "
            "ViT-L-14-quickgelu@FILE for the tower of Prismer; or, from the hub, ARCHITECTURE@TAG or "
            "hf-hub:ORG/MODEL" + ("" if step is build else " (default: as before)"),
        )
        step.add_argument(
            "--data", nargs="+", default=[], type=Path, metavar="DATASET", help="class names and words of these"
        )
        step.add_argument(
            "--texts", nargs="+", default=[], type=Path, metavar="FILE", help="files with one text a line"
        )
        step.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    official = steps.add_parser("import", help="a table from the official release's feature files")
    for name, what in (
        ("coco", "coco_features.pt"),
        ("ade", "ade_features.pt"),
        ("detection", "detection_features.pt"),
    ):
        official.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    official.add_argument("--background", required=True, type=Path, metavar="FILE", help="background_features.pt")
    official.add_argument("--pca", type=Path, metavar="FILE", help="clip_pca.pkl is a pickle and never read")
    official.add_argument("--out", required=True, type=Path, metavar="DIR")
    official.set_defaults(run=_import)


def _build(args: argparse.Namespace) -> None:
    from prismer.cli.ask import pick_device
    from prismer.dataloading.semantics.clip_tables import build

    recipe = build(
        args.out,
        args.clip,
        _texts(args),
        sources=_sources(args),
        prompt=args.prompt,
        background=args.background,
        pca=args.pca,
        vocabulary=not args.no_vocabulary,
        device=pick_device(args.device),
        progress=_watched(),
    )
    fit = recipe["pca"]
    kept = (
        f"its PCA, of {fit['texts']} texts, keeps {fit['explained_variance']:.1%} of their variance"
        if "texts" in fit
        else f"its PCA is that of {args.pca}"
    )
    print(f"{args.out}: {recipe['texts']} texts; {kept}")


def _add(args: argparse.Namespace) -> None:
    from prismer.cli.ask import pick_device
    from prismer.dataloading.semantics.clip_tables import add

    if not args.data and not args.texts:
        raise ValueError("there is nothing to add; name datasets with --data or files with --texts")
    count = add(
        args.folder,
        _texts(args),
        clip=args.clip,
        sources=_sources(args),
        device=pick_device(args.device),
        progress=_watched(),
    )
    print(f"{args.folder}: {count} texts added")


def _import(args: argparse.Namespace) -> None:
    from prismer.dataloading.semantics.clip_tables import refuse_pickle
    from prismer.dataloading.semantics.published_tables import import_published

    if args.pca is not None:
        refuse_pickle(args.pca)
    tables = [path for path in (args.coco, args.ade, args.detection) if path is not None]
    if not tables:
        raise ValueError("no names are imported; give --coco, --ade or --detection")
    read, kept = import_published(args.out, tables, args.background)
    print(f"{args.out}: {kept} texts, from {read} names")
    print(
        "no PCA is known for them, so this table cannot be extended: words that it lacks enter as background; "
        "`prismer semantics build` makes a table for any words"
    )


def _texts(args: argparse.Namespace) -> Iterator[str]:
    """The texts of the files, read now, and those of the datasets, read when they are asked for."""
    from prismer.dataloading.semantics.table_texts import dataset_texts, file_texts

    texts = file_texts(args.texts)
    datasets = (dataset_texts([folder], progress=_watched()) for folder in args.data)
    return chain(texts, chain.from_iterable(datasets))


def _sources(args: argparse.Namespace) -> list[str]:
    return [str(path.absolute()) for path in (*args.data, *args.texts)]


def _watched() -> bool:
    """Whether somebody sees a progress bar."""
    return sys.stderr.isatty()
