"""The command `prismer`: caption, answer, classify, show, label, experts, semantics, data, plan, export, info.

Parsing imports nothing heavy, so that `prismer --help` answers at once; each sub-command imports what it runs.
"""

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from prismer import __version__
from prismer.cli.ask import add_ask_commands
from prismer.cli.data import add_data_commands
from prismer.cli.experts import add_experts_commands
from prismer.cli.plan import add_plan_command
from prismer.cli.semantics import add_semantics_commands
from prismer.errors import is_a_sentence
from prismer.files import is_disk_failure, sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        0; 1 if a check found problems, or what was asked for cannot be written since a disk is full; 2 if the user or
        the machine must change something (one sentence on stderr, as of the full disk); 130 if interrupted. Malformed
        arguments leave through argparse's SystemExit(2).
    """
    _open_closed_streams()
    with contextlib.redirect_stderr(_Unfailing(sys.stderr)):
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    """`main`, with streams that can be written to."""
    try:
        try:
            args = build_parser().parse_args(argv)
        except SystemExit:
            # help and version are output too
            sys.stdout.flush()
            raise
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = args.run(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop(sys.stdout)
        return 1
    except Exception as error:
        if is_disk_failure(error):
            _tell(sentence(error))
            _drop_if_full(sys.stdout)
            return 1
        if isinstance(error, OSError) and error.filename is not None:
            _tell(sentence(error))
            return 2
        if not (isinstance(error, ValueError | RuntimeError) and is_a_sentence(error)):
            raise
        # weights that do not fit come with a table before their sentence
        for line in str(error).splitlines():
            _tell(line)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose help fails where it cannot be written; argparse's own would say success."""

    def _print_message(self, message: str, file=None) -> None:
        if message:
            (file or sys.stderr).write(message)


class _Unfailing:
    """Standard error, of which what cannot be written is lost: what was asked for ends as it does."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            # a full disk, a closed pipe, a closed file: nobody is left to be told
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _drop(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Give a process without standard streams (`>&-`) empty ones; and let any text be printed in any encoding."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # takes the lowest free number: no file of a command is then taken for a stream
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files need not be UTF-8, nor need the terminal be
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop(stream) -> None:
    """Lead a stream nowhere: the interpreter's own flush at exit must not complain about what could not be written."""
    if stream in (sys.__stdout__, sys.__stderr__):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _drop_if_full(stream) -> None:
    try:
        stream.flush()
    except OSError:
        _drop(stream)


def _tell(sentence: str) -> None:
    print(f"prismer: {sentence}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each sub-command's `run` takes the parsed arguments."""
    parser = _Parser(prog="prismer", description="Captions, answers and classes for pictures.")
    parser.add_argument("--version", action="version", version=f"prismer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    add_ask_commands(commands)
    add_data_commands(commands)
    add_experts_commands(commands)
    add_semantics_commands(commands)
    add_plan_command(commands)

    export = commands.add_parser(
        "export", help="turn a training run, or a published checkpoint, into a model folder, or back"
    )
    export.add_argument(
        "source", metavar="RUN", help="run folder, one of its checkpoints, or anything that --model takes"
    )
    where = export.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FOLDER", help="model folder to write")
    where.add_argument("--official", type=Path, metavar="FILE", help="write the weights as published Prismers are")
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="a model's size, this machine, and the kernels that it can run")
    info.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help="model folder or preset, e.g. base-z")
    info.set_defaults(run=_info)
    return parser


def _export(args: argparse.Namespace) -> None:
    if args.official is not None:
        from prismer.model import Prismer
        from prismer.weights.published import save_published

        found = _checkpoint(args.source) or args.source
        save_published(Prismer.from_pretrained(found), args.official)
        print(f"{found} -> {args.official}")
        return
    # the export replaces the whole folder: never one that holds something else
    empty = args.out.is_dir() and not any(args.out.iterdir())
    if args.out.exists() and not empty and not (args.out / "model.safetensors").is_file():
        raise ValueError(f"{args.out} exists and is not a model folder; choose another --out")
    from prismer.model import Prismer
    from prismer.training.run_folder import export_checkpoint, read_answers
    from prismer.weights.folder import save_pretrained
    from prismer.weights.locate import ANSWERS

    source = Path(args.source)
    if source.is_dir() and args.out.resolve() == source.resolve():
        raise ValueError(f"{args.out} is what is to be exported; choose another --out")
    if _checkpoint(args.source) is None and (not source.is_dir() or _holds_weights(source)):
        from prismer.cli.ask import model_folder

        answers = model_folder(args.source) / ANSWERS
        listed = read_answers(answers) if answers.is_file() else None
        save_pretrained(Prismer.from_pretrained(args.source, on_report=print), args.out, answers=listed)
        print(f"{args.source} -> {args.out}")
    else:
        print(f"{export_checkpoint(source, args.out)} -> {args.out}")


def _checkpoint(source: str) -> Path | None:
    """The checkpoint to export of a run folder, or `source` if it is one; None for anything else."""
    from prismer.training.run_folder import STATE, RunFolder

    path = Path(source)
    return path if (path / STATE).is_file() else RunFolder(path).best()


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def _info(args: argparse.Namespace) -> None:
    from prismer.costs.info import report

    print(report(args.model))


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _tell(f"warning: {message}")
