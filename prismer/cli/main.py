"""The command `prismer`: its parser, and the exit code of each error.

Parsing imports nothing heavy, so that `prismer --help` answers at once. A command imports what it needs when it runs.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from prismer import __version__
from prismer.cli.ask import add_ask_commands
from prismer.cli.data import add_data_commands
from prismer.cli.evaluate import add_evaluate_command
from prismer.cli.experts import add_experts_commands
from prismer.cli.models import add_model_commands
from prismer.cli.plan import add_plan_command
from prismer.cli.semantics import add_semantics_commands
from prismer.cli.streams import LenientStream, discard, discard_if_full, open_closed_streams
from prismer.cli.tune import add_tune_command
from prismer.errors import InputError, MachineError
from prismer.files import is_disk_failure, sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        0 on success; 1 if a check found problems, or if a disk is full or broken; 2 if the user has to change
        something; 130 if interrupted. Code 2 and a failing disk come with one sentence on stderr. argparse refuses
        malformed arguments with SystemExit(2).
    """
    open_closed_streams()
    with contextlib.redirect_stderr(LenientStream(sys.stderr)):
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
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
        discard(sys.stdout)
        return 1
    except Exception as error:
        if is_disk_failure(error):
            _print_error(sentence(error))
            discard_if_full(sys.stdout)
            return 1
        if isinstance(error, OSError) and error.filename is not None:
            _print_error(sentence(error))
            return 2
        if not isinstance(error, InputError | MachineError):
            raise
        # weights that do not fit the model come with a table above their sentence
        for line in str(error).splitlines():
            _print_error(line)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the `run` of each command takes the parsed arguments."""
    parser = _Parser(prog="prismer", description="Caption images, answer questions about them, and classify them.")
    parser.add_argument("--version", action="version", version=f"prismer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_ask_commands(commands)
    add_data_commands(commands)
    add_evaluate_command(commands)
    add_experts_commands(commands)
    add_semantics_commands(commands)
    add_plan_command(commands)
    add_tune_command(commands)
    add_model_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that raises where its help cannot be written; argparse ignores that and reports success."""

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        if message:
            (file or sys.stderr).write(message)


def _print_error(line: str) -> None:
    print(f"prismer: {line}", file=sys.stderr)


def _show_warning(
    message: Warning | str, category: type, filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    _print_error(f"warning: {message}")
