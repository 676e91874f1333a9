"""What errors say: values as a sentence can hold them, and which exceptions are sentences for the user at all.

The others are mistakes of ours, whose traceback is needed.
"""

import dis
import numbers
from collections.abc import Iterable

_LONGEST = 60


def is_a_sentence(error: BaseException) -> bool:
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


def shown(value: object) -> str:
    """A value in a sentence: its repr, which any terminal takes, cut to a short length."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Names in a sentence, in alphabetical order; odd ones and long ones as `shown` shows them, and not too many."""
    names = sorted(names)
    texts = [name if name.isprintable() and 0 < len(name) <= _LONGEST else shown(name) for name in names[:5]]
    return ", ".join(texts) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is an integer, which True and 3.0 are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {value!r}; give a whole number")
