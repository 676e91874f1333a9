"""`prismer export` and `prismer info`: turn a run or a checkpoint into a model folder, and describe a model."""

import argparse
from pathlib import Path

from prismer.errors import InputError
from prismer.shipped import model_folder


def add_model_commands(commands: argparse._SubParsersAction) -> None:
    """Add export and info to the commands of `prismer`."""
    export = commands.add_parser(
        "export", help="turn a training run or a published checkpoint into a model folder, or a model into a checkpoint"
    )
    export.add_argument(
        "source", metavar="RUN", help="run folder, one of its checkpoints, or anything that --model takes"
    )
    where = export.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FOLDER", help="write a model folder")
    where.add_argument(
        "--official", type=Path, metavar="FILE", help="write a checkpoint in the format of the official release"
    )
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="show a model's size, this machine, and the kernels that can run here")
    info.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help="model folder or preset, e.g. base-z")
    info.set_defaults(run=_info)


def _export(args: argparse.Namespace) -> None:
    if args.official is not None:
        from prismer.model import Prismer
        from prismer.weights.published import save_published

        found = _checkpoint(args.source) or args.source
        save_published(Prismer.from_pretrained(found), args.official)
        print(f"{found} -> {args.official}")
        return
    # the export replaces the whole folder, so it must never be one that holds something else
    empty = args.out.is_dir() and not any(args.out.iterdir())
    if args.out.exists() and not empty and not (args.out / "model.safetensors").is_file():
        raise InputError(f"{args.out} exists and is not a model folder; choose another --out")
    from prismer.model import Prismer
    from prismer.training.run_folder import export_checkpoint
    from prismer.training.text_statistics import read_answers
    from prismer.weights.folder import save_pretrained
    from prismer.weights.locate import ANSWERS

    source = Path(args.source)
    if source.is_dir() and args.out.resolve() == source.resolve():
        raise InputError(f"--out {args.out} is the folder to export; choose another")
    if _checkpoint(args.source) is None and (not source.is_dir() or _holds_weights(source)):
        answers = model_folder(args.source) / ANSWERS
        listed = read_answers(answers) if answers.is_file() else None
        save_pretrained(Prismer.from_pretrained(args.source, on_report=print), args.out, answers=listed)
        print(f"{args.source} -> {args.out}")
    else:
        print(f"{export_checkpoint(source, args.out)} -> {args.out}")


def _checkpoint(source: str) -> Path | None:
    """`source` if it is a checkpoint, the best checkpoint if it is a run folder, None if it is anything else."""
    from prismer.training.checkpoint import STATE
    from prismer.training.run_folder import RunFolder

    path = Path(source)
    return path if (path / STATE).is_file() else RunFolder(path).best()


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _info(args: argparse.Namespace) -> None:
    from prismer.costs.info import info_text

    print(info_text(args.model))
