"""Errors that are meant for the user, values as their sentences show them, and common checks.

An InputError or a MachineError ends a command with its sentence; any other error is a mistake in this library, and its
traceback is shown. Both classes are defined with the kernels, which import nothing from here.
"""

import numbers
from collections.abc import Iterable

from prismer.kernels.errors import InputError, MachineError

__all__ = ["InputError", "MachineError", "check_count", "check_integer", "listed", "shown"]
_MAX_LENGTH = 60


def check_integer(name: str, value: object) -> None:
    """Raise InputError unless `value` is a whole number; True and 3.0 are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} is {shown(value)}; give a whole number")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise InputError unless `value` is a whole number of at least `least`."""
    check_integer(name, value)
    if value < least:
        raise InputError(f"{name} is {shown(value)}; it must be at least {least}")


def shown(value: object) -> str:
    """A value as a sentence shows it: its repr, which any terminal can print, cut to a short length."""
    text = repr(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them: the first five in alphabetical order, unprintable and long ones as `shown`."""
    names = sorted(names)
    texts = [name if name.isprintable() and 0 < len(name) <= _MAX_LENGTH else shown(name) for name in names[:5]]
    return ", ".join(texts) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
