"""The nearest word of a lexicon by edit distance, for doubtful words of the word expert.

Entries are sorted by length. A look-up takes the entries of similar length and drops those whose sets of letters differ
too much. It measures all remaining entries at once, one letter per step, with the bit-parallel recurrence of Myers (A
fast bit-vector algorithm for approximate string matching, 1999) on numpy columns.
"""

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from prismer.errors import InputError
from prismer.reading import read_lines

# letters of the longest word that a look-up can measure: one bit for each
MAX_LENGTH = 64

# the words of two letters: most of the vocabulary's tokens of that length are pieces of words
_TWO_LETTERS = (
    "ad ah am an as at be by do eh er ex go ha he hi ho id if in is it la lo ma me mr ms my no of oh ok on or ox pa "
    "pi so to tv uk up us we"
).split()


class Lexicon:
    """A set of words that finds the nearest of them to any text; case does not count.

    Args:
        words: the entries. Of two entries at the same distance, the earlier wins.

    Raises:
        ValueError: if there is no entry, or an entry is empty or longer than 64 letters.
    """

    def __init__(self, words: Iterable[str]):
        entries = list(dict.fromkeys(word.lower() for word in words))
        if not entries:
            raise InputError("the lexicon holds no word; write one per line")
        for entry in entries:
            if not 0 < len(entry) <= MAX_LENGTH:
                raise InputError(
                    f"the lexicon's entry {entry[:80]!r} has {len(entry)} letters, expected 1 to {MAX_LENGTH}; "
                    f"write one word per line"
                )
        self._known = frozenset(entries)
        # the sort is stable: entries of one length stay in their order of preference
        order = sorted(range(len(entries)), key=lambda index: len(entries[index]))
        self._entries = [entries[index] for index in order]
        self._rank = np.array(order)
        self._lengths = np.array([len(entry) for entry in self._entries])
        letters = sorted(set("".join(entries)))
        # code 0 fills the end of short entries
        self._codes = {letter: number for number, letter in enumerate(letters, 1)}
        self._letters = np.zeros((len(entries), self._lengths[-1]), np.int32)
        for row, entry in zip(self._letters, self._entries, strict=True):
            row[: len(entry)] = [self._codes[letter] for letter in entry]
        self._sets = np.array([_letter_set(entry) for entry in self._entries], np.uint64)

    def nearest(self, word: str, limit: int) -> tuple[str, int] | None:
        """The entry at the smallest edit distance (insert, remove or replace a letter).

        Args:
            word: any text; a text of more than 64 letters has no nearest entry.
            limit: the largest distance.

        Returns:
            The entry in lower case, and its distance; None if no entry is within `limit`.
        """
        word = word.lower()
        if word in self._known:
            return word, 0
        if not 0 < len(word) <= MAX_LENGTH or limit < 1:
            return None
        start = np.searchsorted(self._lengths, len(word) - limit, "left")
        stop = np.searchsorted(self._lengths, len(word) + limit, "right")
        # an edit removes at most one letter that only the word has, and one that only the entry has
        own, theirs = np.uint64(_letter_set(word)), self._sets[start:stop]
        differ = np.maximum(np.bitwise_count(own & ~theirs), np.bitwise_count(theirs & ~own))
        near = start + np.flatnonzero(differ <= limit)
        if not len(near):
            return None
        distances = self._distances(word, near)
        least = distances.min()
        if least > limit:
            return None
        ties = near[distances == least]
        return self._entries[ties[self._rank[ties].argmin()]], int(least)

    def _distances(self, word: str, rows: np.ndarray) -> np.ndarray:
        """The edit distances (rows,) int64 between `word` and the entries in those rows."""
        one, top = np.uint64(1), np.uint64(len(word) - 1)
        where = np.zeros(len(self._codes) + 1, np.uint64)
        for place, letter in enumerate(word):
            if letter in self._codes:
                where[self._codes[letter]] |= one << np.uint64(place)
        lengths = self._lengths[rows]
        # bit i of `up` and `down`: the distance grows or falls by one from prefix i to prefix i + 1 of the word
        up, down = np.full(len(rows), ~np.uint64(0)), np.zeros(len(rows), np.uint64)
        distance = np.full(len(rows), len(word))
        result = distance.copy()
        for column in range(lengths.max()):
            equal = where[self._letters[rows, column]]
            vertical = equal | down
            horizontal = (((equal & up) + up) ^ up) | equal
            grows, falls = down | ~(horizontal | up), up & horizontal
            distance = distance + (grows >> top & one).astype(int) - (falls >> top & one).astype(int)
            ended = lengths == column + 1
            result[ended] = distance[ended]
            grows, falls = (grows << one) | one, falls << one
            up, down = falls | ~(vertical | grows), grows & vertical
        return result


def read_lexicon(path: Path) -> Lexicon:
    """The lexicon of a UTF-8 text file with one word per line, commoner words first; empty lines are skipped.

    Raises:
        ValueError: as `Lexicon`, or if the file cannot be read or is not UTF-8.
    """
    return Lexicon(line.strip() for line in read_lines(path) if line.strip())


@cache
def english_lexicon() -> Lexicon:
    """English words: 45 of two letters, and the tokens of RoBERTa's vocabulary that are whole words, commoner first.

    There are 24,116 entries. A token counts as a whole word if it begins with a blank and has at least three letters,
    all of them ASCII. Some tokens are pieces of words all the same.
    """
    vocabulary = resources.files("prismer") / "assets" / "roberta" / "vocab.json"
    tokens = json.loads(vocabulary.read_text("utf-8"))
    whole = [token[1:] for token in tokens if token[0] == "Ġ"]
    return Lexicon(_TWO_LETTERS + [w for w in whole if len(w) >= 3 and w.isascii() and w.isalpha()])


def _letter_set(word: str) -> int:
    """A bit for each letter of the word. Letters that share a bit can only hide a difference."""
    bits = 0
    for letter in word:
        bits |= 1 << (ord(letter) % 64)
    return bits
