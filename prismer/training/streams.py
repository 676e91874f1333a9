"""Printing that ends, without ending the run, when a terminal or a pipe is closed or a disk is full."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch.distributed as dist


def print_on_rank_zero(text: str) -> None:
    """Print a line on standard output, once for all ranks; an empty text prints nothing."""
    if text and dist.get_rank() == 0:
        print_line(text, sys.stdout)


def print_line(text: str, stream: TextIO) -> None:
    """Print a line, unless the stream cannot be written."""
    with tolerant_of_closing(stream):
        print(text, file=stream, flush=True)


@contextmanager
def tolerant_of_closing(stream: TextIO) -> Iterator[None]:
    """Send a stream that cannot be written in this context to os.devnull from then on."""
    try:
        yield
    except OSError as error:
        redirect_to_devnull(stream.fileno())
        # a closed pipe and a closed terminal have no reader to warn
        if error.errno not in (errno.EPIPE, errno.EIO) and stream is not sys.stderr:
            print_line(f"standard output cannot be written ({error.strerror}); going on without it", sys.stderr)


def redirect_to_devnull(descriptor: int) -> None:
    """Send everything that is written to a file descriptor, and what its buffer holds, to os.devnull."""
    devnull = os.open(os.devnull, os.O_RDWR)
    # they are equal if `descriptor` was closed and is the lowest free number
    if devnull != descriptor:
        os.dup2(devnull, descriptor)
        os.close(devnull)
