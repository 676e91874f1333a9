"""`prismer semantics`: build, extend and import tables of features, one row for each class name or word."""

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from prismer.cli.options import add_device_option, pick_device
from prismer.cli.printing import is_watched
from prismer.errors import InputError


def add_semantics_commands(commands: argparse._SubParsersAction) -> None:
    """Add the group `semantics` to the commands of `prismer`."""
    semantics = commands.add_parser("semantics", help="make tables of features for class names and words")
    steps = semantics.add_subparsers(metavar="COMMAND", required=True)

    build = steps.add_parser("build", help="build a table with a CLIP text tower")
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    build.add_argument("--prompt", metavar="WORDING", help='prompt of the tower, where {} is the text (default "{}")')
    build.add_argument(
        "--background", metavar="TEXT", help='text whose features mean that nothing is there (default "background")'
    )
    build.add_argument("--pca", type=Path, metavar="FOLDER", help="take the PCA of this table instead of fitting one")
    build.add_argument(
        "--no-vocabulary",
        action="store_true",
        help="fit the PCA to the texts only, without the words of RoBERTa's vocabulary",
    )
    build.set_defaults(run=_build)

    add = steps.add_parser("add", help="add the words of more datasets to a table, with the table's tower and PCA")
    add.add_argument("folder", type=Path, metavar="DIR", help="table that `prismer semantics build` wrote")
    add.set_defaults(run=_add)

    for step in (build, add):
        step.add_argument(
            "--clip",
            required=step is build,
            metavar="NAME_OR_FOLDER",
            help="folder with open_clip_config.json and weights; or ARCHITECTURE@FILE, which is "
            "ViT-L-14-quickgelu@FILE for the tower of Prismer; or, from the hub, ARCHITECTURE@TAG or "
            "hf-hub:ORG/MODEL" + ("" if step is build else " (default: the table's)"),
        )
        step.add_argument(
            "--data",
            nargs="+",
            default=[],
            type=Path,
            metavar="DATASET",
            help="datasets whose class names and words get features",
        )
        step.add_argument(
            "--texts", nargs="+", default=[], type=Path, metavar="FILE", help="files with one text a line"
        )
        add_device_option(step)

    official = steps.add_parser("import", help="convert the feature files of the official release")
    for name, what in (
        ("coco", "coco_features.pt"),
        ("ade", "ade_features.pt"),
        ("detection", "detection_features.pt"),
    ):
        official.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    official.add_argument("--background", required=True, type=Path, metavar="FILE", help="background_features.pt")
    official.add_argument(
        "--pca", type=Path, metavar="FILE", help="refused: clip_pca.pkl is a pickle, which is never read"
    )
    official.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    official.set_defaults(run=_import)


def _build(args: argparse.Namespace) -> None:
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
        progress=is_watched(),
    )
    fit = recipe["pca"]
    kept = (
        f"its PCA, of {fit['texts']} texts, keeps {fit['explained_variance']:.1%} of their variance"
        if "texts" in fit
        else f"its PCA is that of {args.pca}"
    )
    print(f"{args.out}: {recipe['texts']} texts; {kept}")


def _add(args: argparse.Namespace) -> None:
    from prismer.dataloading.semantics.clip_tables import add

    if not args.data and not args.texts:
        raise InputError("there is nothing to add; name datasets with --data or files with --texts")
    count = add(
        args.folder,
        _texts(args),
        clip=args.clip,
        sources=_sources(args),
        device=pick_device(args.device),
        progress=is_watched(),
    )
    print(f"{args.folder}: {count} texts added")


def _import(args: argparse.Namespace) -> None:
    from prismer.dataloading.semantics.clip_tables import refuse_pickle
    from prismer.dataloading.semantics.published_tables import import_published

    if args.pca is not None:
        refuse_pickle(args.pca)
    tables = [path for path in (args.coco, args.ade, args.detection) if path is not None]
    if not tables:
        raise InputError("no names are imported; give --coco, --ade or --detection")
    read, kept = import_published(args.out, tables, args.background)
    print(f"{args.out}: {kept} texts, from {read} names")
    print(
        "no PCA is known for this table, so it cannot be extended: words that it lacks count as background; "
        "`prismer semantics build` makes a table for any words"
    )


def _texts(args: argparse.Namespace) -> Iterator[str]:
    """The texts of the files, which are read now, and of the datasets, which are read when they are needed."""
    from prismer.dataloading.semantics.table_texts import dataset_texts, file_texts

    texts = file_texts(args.texts)
    datasets = (dataset_texts([folder], progress=is_watched()) for folder in args.data)
    return chain(texts, chain.from_iterable(datasets))


def _sources(args: argparse.Namespace) -> list[str]:
    return [str(path.absolute()) for path in (*args.data, *args.texts)]
