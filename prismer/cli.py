"""The command `prismer`: caption, answer, classify, show, label, experts, semantics, data, plan, export, info.

Parsing imports nothing heavy, so that `prismer --help` answers at once; each sub-command imports what it runs.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from prismer import __version__
from prismer.cli_ask import add_ask_commands
from prismer.cli_data import add_data_commands
from prismer.cli_experts import add_experts_commands
from prismer.cli_plan import add_plan_command
from prismer.cli_semantics import add_semantics_commands
from prismer.errors import is_a_sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        0; 1 if a check found problems; 2 if the user or the machine must change something (one sentence on stderr);
        130 if interrupted. Malformed arguments leave through argparse's SystemExit(2).
    """
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = args.run(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader (`| head`) has gone; the interpreter's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"prismer: {error.filename} cannot be used: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        if not is_a_sentence(error):
            raise
        # weights that do not fit come with a table before their sentence
        for line in str(error).splitlines():
            print(f"prismer: {line}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each sub-command's `run` takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="prismer", description="Captions, answers and classes for pictures."
    )
    parser.add_argument("--version", action="version", version=f"prismer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    add_ask_commands(commands)
    add_data_commands(commands)
    add_experts_commands(commands)
    add_semantics_commands(commands)
    add_plan_command(commands)

    export = commands.add_parser(
        "export",
        help="turn a training run, or a published checkpoint, into a model folder, or back",
    )
    export.add_argument(
        "source",
        metavar="RUN",
        help="run folder, one of its checkpoints, or anything that --model takes",
    )
    where = export.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FOLDER", help="model folder to write")
    where.add_argument(
        "--official", type=Path, metavar="FILE", help="write the weights as published Prismers are"
    )
    export.set_defaults(run=_export)

    info = commands.add_parser(
        "info", help="a model's size, this machine, and the kernels that it can run"
    )
    info.add_argument(
        "model",
        nargs="?",
        default="tiny",
        metavar="MODEL",
        help="model folder or preset, e.g. base-z",
    )
    info.set_defaults(run=_info)
    return parser


def _export(args: argparse.Namespace) -> None:
    if args.official is not None:
        from prismer.checkpoint import from_pretrained
        from prismer.official import save_official

        found = _checkpoint(args.source) or args.source
        save_official(from_pretrained(found), args.official)
        print(f"{found} -> {args.official}")
        return
    # the export replaces the whole folder: never one that holds something else
    empty = args.out.is_dir() and not any(args.out.iterdir())
    if args.out.exists() and not empty and not (args.out / "model.safetensors").is_file():
        raise ValueError(f"{args.out} exists and is not a model folder; choose another --out")
    from prismer.checkpoint import from_pretrained
    from prismer.run_folder import export_checkpoint

    source = Path(args.source)
    if _checkpoint(args.source) is None and (source.is_file() or _holds_weights(source)):
        from_pretrained(source, on_report=print).save_pretrained(args.out)
        print(f"{source} -> {args.out}")
    else:
        print(f"{export_checkpoint(source, args.out)} -> {args.out}")


def _checkpoint(source: str) -> Path | None:
    """The checkpoint to export of a run folder, or `source` if it is one; None for anything else."""
    from prismer.run_folder import STATE, RunFolder

    path = Path(source)
    return path if (path / STATE).is_file() else RunFolder(path).best()


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _info(args: argparse.Namespace) -> None:
    from prismer.info import report

    print(report(args.model))


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"prismer: warning: {message}", file=sys.stderr)
