"""Standard streams that are closed, full or of an odd encoding, made safe for a command to write to."""

import io
import os
import sys
from typing import TextIO


class LenientStream:
    """Standard error that never fails: text that cannot be written is lost, and the command goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or discard it and all that follows."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            # a full disk, a closed pipe or a closed file: nobody is left to read it
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or discard what it holds."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            discard(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def open_closed_streams() -> None:
    """Replace standard streams that the shell closed (`>&-`), and let standard output print text in any encoding."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # this takes the lowest free file number, which no file of the command can then get
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # neither file names nor the terminal need be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Send what a standard stream still holds to os.devnull, so that the flush at the interpreter's exit succeeds."""
    if stream in (sys.__stdout__, sys.__stderr__):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def discard_if_full(stream: TextIO) -> None:
    """Discard what `stream` holds if it cannot be written."""
    try:
        stream.flush()
    except OSError:
        discard(stream)
