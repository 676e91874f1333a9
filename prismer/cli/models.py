"""`prismer models`, `prismer export` and `prismer info`: find, fetch, convert and describe models."""

import argparse
from pathlib import Path

from prismer.cli.options import add_semantics_option, table_folder
from prismer.errors import InputError
from prismer.storage.places import as_place


def add_model_commands(commands: argparse._SubParsersAction) -> None:
    """Add models, export and info to the commands of `prismer`."""
    models = commands.add_parser("models", help="list the models that have names, and fetch them from the hub")
    steps = models.add_subparsers(metavar="COMMAND", required=True)
    listing = steps.add_parser("list", help="list every model, its task, size and licence, and whether it is here")
    listing.set_defaults(run=_list)
    fetch = steps.add_parser("fetch", help="download models; an interrupted download resumes")
    fetch.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="a name of `prismer models list`, owner/name of the hub, or a preset such as base for its towers",
    )
    fetch.set_defaults(run=_fetch)

    export = commands.add_parser(
        "export", help="turn a training run or a published checkpoint into a model folder, or a model into a checkpoint"
    )
    export.add_argument(
        "source", metavar="RUN", help="run folder, one of its checkpoints, or anything that --model takes"
    )
    where = export.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--out", type=as_place, metavar="FOLDER", help="write a model folder; also a URL such as s3://bucket/model"
    )
    where.add_argument(
        "--official", type=Path, metavar="FILE", help="write a checkpoint in the format of the official release"
    )
    add_semantics_option(export)
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="show a model's size, this machine, and the kernels that can run here")
    info.add_argument(
        "model", nargs="?", default="tiny", metavar="MODEL", help="model folder, name or preset, e.g. base-z"
    )
    info.set_defaults(run=_info)


def _list(args: argparse.Namespace) -> None:
    from prismer.shipped import SHIPPED_MODELS, shipped_folder
    from prismer.weights.backbones import TOWERS
    from prismer.weights.catalogue import HUB_REPOSITORY, PUBLISHED_LICENCE, PUBLISHED_MODELS
    from prismer.weights.locate import find_folder

    rows = [("name", "task", "expert maps", "parameters", "download", "licence", "here")]
    for name in SHIPPED_MODELS:
        size = sum(path.stat().st_size for path in shipped_folder(name).iterdir())
        rows.append((name, "rendered scenes", "6", "4.1 M", f"{size / 1e6:.0f} MB, ships", "Apache-2.0", "yes"))
    for name, model in PUBLISHED_MODELS.items():
        experts = "none" if model.preset.endswith("-z") else "6"
        size = f"{model.parameters / 1e6:.0f} M"
        here = str(find_folder(name) or "no")
        rows.append((name, model.task, experts, size, f"{model.gigabytes:.2f} GB", PUBLISHED_LICENCE.upper(), here))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nThe released checkpoints are those of {HUB_REPOSITORY} on the Hugging Face hub, not for commercial use.")
    print("To train a new model, train.py --model and Prismer.from_pretrained build, each also with -z (no experts):")
    for name, (vision, tag, text) in TOWERS.items():
        print(f"  {name:<5}  open_clip's {vision} ({tag}) and {text}")


def _fetch(args: argparse.Namespace) -> None:
    from prismer.model import Prismer
    from prismer.weights.backbones import TOWERS, from_preset, is_preset
    from prismer.weights.catalogue import PUBLISHED_MODELS
    from prismer.weights.locate import locate

    for name in args.names:
        # locate takes folders too, which nobody can mean here
        if name not in PUBLISHED_MODELS and not is_preset(name) and ("/" not in name or Path(name).exists()):
            raise InputError(
                f"{name} is no model of the hub; give a name of `prismer models list`, or owner/name of the hub"
            )
    for name in args.names:
        if is_preset(name):
            # building the model downloads its towers, and shows that they load
            from_preset(Prismer, name)
            vision, tag, text = TOWERS[name.removesuffix("-z")]
            print(f"{name}: open_clip's {vision} ({tag}) and {text} are on this machine", flush=True)
            continue
        folder, weights = locate(name)
        print(f"{name} -> {folder or weights}", flush=True)


def _export(args: argparse.Namespace) -> None:
    if args.official is not None:
        from prismer.model import Prismer
        from prismer.training.export import find_checkpoint
        from prismer.weights.published import save_published

        found = find_checkpoint(args.source) or args.source
        save_published(Prismer.from_pretrained(found), args.official)
        print(f"{found} -> {args.official}")
        return
    source = Path(args.source)
    if isinstance(args.out, Path):
        _check_out(args.out, source)
    from prismer.training.export import export_checkpoint, find_checkpoint

    if find_checkpoint(args.source) is None and (not source.is_dir() or _holds_weights(source)):
        _copy_model(args.source, args.out, table_folder(args.semantics))
        print(f"{args.source} -> {args.out}")
    else:
        print(f"{export_checkpoint(source, args.out, table_folder(args.semantics))} -> {args.out}")


def _check_out(out: Path, source: Path) -> None:
    # the export replaces the whole folder, so it must never be one that holds something else
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not (out / "model.safetensors").is_file():
        raise InputError(f"{out} exists and is not a model folder; choose another --out")
    if source.is_dir() and out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the folder to export; choose another")


def _copy_model(source: str, out: str | Path, semantics: Path | None) -> None:
    """Write a model folder from anything that --model takes, with its own card if it has one."""
    from prismer.model import Prismer
    from prismer.reading import read_bytes
    from prismer.storage.output import write_file
    from prismer.weights.catalogue import PUBLISHED_MODELS
    from prismer.weights.folder import save_pretrained
    from prismer.weights.locate import MODEL_CARD
    from prismer.weights.model_card import ModelCard, licence_of

    model = Prismer.from_pretrained(source, on_report=print)
    kind = "released checkpoint" if source in PUBLISHED_MODELS else "model"
    card = ModelCard(licence=licence_of(source), training=[f"Converted from the {kind} {Path(source).name}."])
    save_pretrained(model, out, semantics=semantics, card=card)
    if model.folder is not None and (model.folder / MODEL_CARD).is_file():
        write_file(out, MODEL_CARD, read_bytes(model.folder / MODEL_CARD))


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _info(args: argparse.Namespace) -> None:
    from prismer.costs.info import info_text

    print(info_text(args.model))
