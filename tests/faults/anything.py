"""Values of broken files: any JSON, odd texts and numbers, and mutations of correct values.

The tests of this folder draw about 2,000 values in a fixed order, so that a failure repeats. To draw 20 times as many,
in another order each time:

    PRISMER_FAULTS=20 python -m pytest tests/faults
"""

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_TIMES = int(os.environ.get("PRISMER_FAULTS", 0))

ODD_TEXTS = (
    "",
    " ",
    "\u2028",
    "\x0c",
    "\ufeffa cube",
    "a\u0085b",
    "\ud800",
    "\x00",
    "...",
    "?",
    "</s>",
    "a" * 3000,
    "-1",
    "1e999",
    "NaN",
    "null",
    "../x",
    "/etc",
    "кошка",
    "猫",
    "😀",
    "a\nb\r\nc",
)
ODD_NUMBERS = (0, -1, 1, 255, 256, 2**31, 2**63, 10**300, -0.0, 0.5, 1e300, float("nan"), float("inf"))

texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=8)
scalars = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | texts
# any JSON value, NaN and lone surrogates included
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def cases(number: int):
    """Settings of a test that draws `number` faults."""
    return settings(
        max_examples=number * max(1, _TIMES),
        derandomize=not _TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def _places(value, path=()):
    """The path of every value inside a JSON value, starting with the path () of the value itself."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, (*path, key))


@st.composite
def mutated(draw, value, most=3):
    """`value` after one to `most` changes: a part is replaced, removed, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = [path for path in _places(value) if path]
        if not isinstance(value, (dict, list)) or not places:
            return value
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if kind == "replace":
            # odd texts break readers most often, so half of the texts become odd texts
            odd = isinstance(holder[last], str) and draw(st.booleans())
            holder[last] = draw(st.sampled_from(ODD_TEXTS) if odd else anything)
        elif kind == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(last, draw(anything | st.just(holder[last])))
        else:
            holder[draw(texts)] = draw(anything)
    return value


@st.composite
def damaged(draw, data: bytes):
    """`data` after damage: cut, one bit flipped, a part doubled, emptied or overwritten."""
    kind = draw(st.sampled_from(("cut", "flip", "flip", "double", "empty", "zeros", "text")))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "cut":
        return data[:place]
    if kind == "flip" and data:
        bit = draw(st.integers(0, 7))
        return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
    if kind == "double":
        return data[:place] + data
    if kind == "zeros":
        return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    return b"" if kind == "empty" else draw(st.binary(max_size=40))


def is_sentence(text: str) -> bool:
    """Whether a message is one printable line of at most 1,000 characters."""
    return text.isprintable() and 10 < len(text) < 1000


def dump(value) -> bytes:
    """JSON as lenient writers write it, with NaN and lone surrogates."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
