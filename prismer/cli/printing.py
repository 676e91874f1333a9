"""What several commands print: progress bars, and the files that a job left out."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismer.dataloading.sources.records import ImageRecords


def is_watched() -> bool:
    """Whether somebody sees a progress bar."""
    return sys.stderr.isatty()


def print_left_out(skipped: list[dict[str, str]], others: list[dict[str, str]], report: str | Path) -> None:
    """Name on stderr the first images that were skipped, and the first files that are no images.

    Args:
        skipped, others: of an ImportReport or a LabelReport.
        report: the file that names them all.
    """
    lines = (f"skipped {entry['image'] or entry['key']}: {entry['reason']}" for entry in skipped)
    _print_first(5, lines, len(skipped), f"more, all in {report}")
    lines = (f"left alone {entry['file']}: {entry['reason']}" for entry in others)
    _print_first(3, lines, len(others), f"more left alone, all in {report}")


def _print_first(most: int, lines: Iterator[str], count: int, rest: str) -> None:
    for _, line in zip(range(most), lines, strict=False):
        print(line, file=sys.stderr)
    if count > most:
        print(f"... and {count - most} {rest}", file=sys.stderr)


def describe_others(records: "ImageRecords") -> str:
    """What to check where a source holds no images: the first of the files that it holds instead."""
    if not records.others:
        return "check the list or folder"
    first = records.others[0]
    return f"of {len(records.others)} other files the first is {first.file} ({first.reason})"
