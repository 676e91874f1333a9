"""The command `prismer`: caption, answer, classify, show, label, experts, semantics, data, export, info.

Parsing imports nothing heavy, so that `prismer --help` answers at once; each sub-command imports what it runs.
"""

import argparse
import dis
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from prismer import __version__
from prismer.cli_ask import add_ask_commands
from prismer.cli_data import add_data_commands
from prismer.cli_experts import add_experts_commands
from prismer.cli_semantics import add_semantics_commands


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
        if not _is_a_sentence(error):
            raise
        print(f"prismer: {error}", file=sys.stderr)
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

    export = commands.add_parser("export", help="turn a training run into a model folder")
    export.add_argument(
        "source", metavar="RUN", type=Path, help="run folder, or one of its checkpoints"
    )
    export.add_argument("--out", required=True, type=Path, metavar="FOLDER")
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
    # the export replaces the whole folder: never one that holds something else
    empty = args.out.is_dir() and not any(args.out.iterdir())
    if args.out.exists() and not empty and not (args.out / "model.safetensors").is_file():
        raise ValueError(f"{args.out} exists and is not a model folder; choose another --out")
    from prismer.run_folder import export_checkpoint

    print(f"{export_checkpoint(args.source, args.out)} -> {args.out}")


def _info(args: argparse.Namespace) -> None:
    from prismer.info import report

    print(report(args.model))


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"prismer: warning: {message}", file=sys.stderr)


def _is_a_sentence(error: Exception) -> bool:
    """Whether this library raised `error` on purpose: a `raise` in its code, or an exception of its own kind.

    The same classes come out of torch, numpy and the interpreter for mistakes of ours, whose traceback is needed.
    """
    if type(error).__module__.startswith("prismer."):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    raised = dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and frame.f_globals.get("__name__", "").startswith("prismer.")
