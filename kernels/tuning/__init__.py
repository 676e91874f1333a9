"""The measured choice: which implementation of an op is the fastest one here, looked up in a table.

A table comes from `prismer tune`, or ships with the package for a known processor. It is a file: nothing is measured
while a model runs, so two runs with one table take the same implementations and give the same bits. Without an entry
for a call, the order that the op declares decides (the prior).

An entry is found by op, dtype, whether the call keeps a graph for its gradient, and the class of its shape: the number
of rows rounded up to a power of two, numbers of tokens rounded up to 1, 2, 3, 4, 6, 8, 12, ..., and the widths as they
are.
"""

import logging
import statistics
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from prismer.kernels.tuning.tables import Table, load_table

# (op, dtype, gradient, shape class)
Key = tuple[str, torch.dtype, bool, tuple[int, ...]]


class Recording(dict[tuple[str, Key], str]):
    """What was taken for each call, by device type and key.

    Attributes:
        shapes: (op, class of the shape) -> the shape of the first call, with its own number of tokens. A measurement
            takes them, because 260 tokens and 380 are of one class, and not always faster with one implementation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}

    def to_measure(self, device_type: str) -> dict[Key, tuple[int, ...]]:
        """The keys of a device type, each with the shape to measure."""
        keys = [key for found, key in self if found == device_type]
        return {key: self.shapes.get((key[0], key[3]), key[3]) for key in keys}


_log = logging.getLogger("prismer.kernels")
_loading = threading.Lock()
# by device type; a device type that is absent was not asked about yet
_tables: dict[str, Table] = {}
_choices: dict[str, dict[Key, str]] = {}
_ops: dict[str, set[str]] = {}
# what a measurement forces, in place of every table
_forced: dict[Key, str] | None = None
_recorded: "Recording | None" = None
# counts the changes above, for those who remember what they looked up
generation = 0


def rows_class(rows: int) -> int:
    """The smallest power of two that is at least `rows`; 0 for 0."""
    return 1 << (rows - 1).bit_length() if rows > 0 else 0


def tokens_class(tokens: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least `tokens`; 0 for 0.

    The work of attention grows with the square of the tokens, so its classes are finer than those of rows.
    """
    power = rows_class(tokens)
    return power * 3 // 4 if power > 2 and tokens <= power * 3 // 4 else power


def choice(device_type: str, key: Key) -> str | None:
    """The measured choice for a call on a device type; None if no table has an entry for it."""
    if _forced is not None:
        return _forced.get(key)
    choices = _choices.get(device_type)
    if choices is None:
        choices = _load(device_type)
    return choices.get(key)


def knows(device_type: str, op: str) -> bool:
    """Is there anything to look up or to record for an op? Short calls ask this before they form a key."""
    if _forced is not None or _recorded is not None:
        return True
    if device_type not in _choices:
        _load(device_type)
    return op in _ops[device_type]


def table(device_type: str = "cpu") -> Table:
    """The table of a device type, which is empty where nothing was measured."""
    if device_type not in _tables:
        _load(device_type)
    return _tables[device_type]


def advice(device_type: str) -> str | None:
    """One line if the table of a device type is absent, put aside, or for another number of threads; else None."""
    found = table(device_type)
    if found.problem:
        return found.problem
    if not found.entries:
        return "nothing was measured on this machine, so defaults choose the kernels; run prismer tune (a few minutes)"
    measured, here = statistics.mode(entry.threads for entry in found.entries), torch.get_num_threads()
    if device_type == "cpu" and here != measured:
        return (
            f"the kernels were measured with {measured} threads and torch uses {here} here; "
            "run prismer tune to measure them again"
        )
    return None


def use_table(device_type: str, new: Table) -> None:
    """Take a table for the rest of the process, such as that of rank 0."""
    global generation
    with _loading:
        _tables[device_type] = new
        _ops[device_type] = {entry.op for entry in new.entries}
        _choices[device_type] = new.choices()
        generation += 1


def _load(device_type: str) -> dict[Key, str]:
    found = load_table(device_type)
    if found.problem:
        _log.warning("%s", found.problem)
    use_table(device_type, found)
    return _choices[device_type]


def forget(device_type: str = "cpu") -> None:
    """Read the table of a device type from disk again at the next look-up."""
    global generation
    with _loading:
        _tables.pop(device_type, None)
        _choices.pop(device_type, None)
        generation += 1


@contextmanager
def forcing(choices: Mapping[Key, str]) -> Iterator[None]:
    """Take these choices inside the block, in place of every table; a measurement compares implementations so."""
    global _forced, generation
    before, _forced = _forced, dict(choices)
    generation += 1
    try:
        yield
    finally:
        _forced = before
        generation += 1


def is_recording() -> bool:
    """Does somebody record what is taken?"""
    return _recorded is not None


def record(device_type: str, key: Key, taken: str) -> None:
    """Note what was taken for a call, if somebody records it."""
    if _recorded is not None:
        _recorded[device_type, key] = taken


def class_with_tokens(op: str, rows: int, tokens: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, ...]:
    """The class of a shape of rows, tokens and widths; a recording keeps its tokens."""
    found = (rows_class(rows), *map(tokens_class, tokens), *widths)
    if _recorded is not None:
        _recorded.shapes.setdefault((op, found), (found[0], *tokens, *widths))
    return found


@contextmanager
def recording() -> Iterator[Recording]:
    """The calls inside the block that can be measured."""
    global _recorded, generation
    before, _recorded = _recorded, Recording()
    generation += 1
    try:
        yield _recorded
    finally:
        _recorded = before
        generation += 1
