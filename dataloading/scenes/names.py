"""The names that renamed scenes give to their kinds of objects, and the words on signs: two lists of English words.

Every eighth word is held out: training draws no entry that has it, so that a model which uses it has read it from its
experts.
"""

import re
import zlib
from functools import lru_cache

from prismer.shipped import shipped_folder

_HELD_OUT = 8
# a vowel that sounds like a consonant, and an h that nobody hears
_CONSONANT = re.compile("(uni(?!n|m)|use|ute|uku|eu|ewe|one)")
_SILENT = re.compile("(hour|heir|honest|honour|honor)")


def regular_plural(noun: str) -> str:
    """The plural that the rules of English spelling give."""
    if re.search("(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search("[^aeiou]y$", noun) else noun + "s"


def with_article(phrase: str) -> str:
    """The phrase behind "a", or behind "an" if it begins with the sound of a vowel: "an owl", "an hourglass"."""
    vowel = phrase[0] in "aeiou" and not _CONSONANT.match(phrase)
    return ("an " if vowel or _SILENT.match(phrase) else "a ") + phrase


def _is_held_out(entry: str) -> bool:
    """Whether training never draws this entry of a list."""
    return any(zlib.crc32(word.encode()) % _HELD_OUT == 0 for word in entry.split())


def plural_of(noun: str) -> str:
    """The plural of a name of the list, or the regular one of another noun."""
    return _irregular_plurals().get(noun) or regular_plural(noun)


@lru_cache(maxsize=1)
def kind_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of kinds: those of training, and the held-out ones. A name with an irregular plural is not held out."""
    names = [line.partition("\t")[0] for line in _lines("kinds.txt")]
    held_out = [_is_held_out(name) and name not in _irregular_plurals() for name in names]
    pairs = list(zip(names, held_out, strict=True))
    return tuple(name for name, out in pairs if not out), tuple(name for name, out in pairs if out)


@lru_cache(maxsize=1)
def sign_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words on signs: those of training, and the held-out ones."""
    words = _lines("signs.txt")
    return tuple(w for w in words if not _is_held_out(w)), tuple(w for w in words if _is_held_out(w))


@lru_cache(maxsize=1)
def _irregular_plurals() -> dict[str, str]:
    return dict(line.split("\t") for line in _lines("kinds.txt") if "\t" in line)


def _lines(file: str) -> list[str]:
    return (shipped_folder("names") / file).read_text(encoding="utf-8").splitlines()
