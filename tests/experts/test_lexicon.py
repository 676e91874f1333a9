"""Proves that the lexicon finds the entry that a search through all entries finds, and fast enough.

python -m pytest tests/experts/test_lexicon.py
"""

import random
import time

import pytest

from prismer.dataloading.experts.lexicon import Lexicon, english_lexicon, read_lexicon


def edit_distance(a: str, b: str) -> int:
    """The Levenshtein distance, row by row."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def search(entries: list[str], word: str, limit: int) -> tuple[str, int] | None:
    """The nearest entry, found by measuring every entry."""
    distances = [edit_distance(word, entry) for entry in entries]
    least = min(distances)
    return (entries[distances.index(least)], least) if least <= limit else None


def random_word(letters: str, longest: int) -> str:
    return "".join(random.choices(letters, k=random.randint(1, longest)))


@pytest.mark.parametrize(
    ("letters", "longest", "limit", "count"),
    [("ab", 6, 1, 300), ("abc", 9, 2, 300), ("abcdefghij", 7, 3, 300), ("azäß'9-", 5, 2, 300), ("ab", 64, 20, 50)],
)
def test_the_nearest_entry_is_that_of_a_full_search(letters, longest, limit, count):
    entries = list(dict.fromkeys(random_word(letters, longest) for _ in range(count)))
    lexicon = Lexicon(entries)
    assert len(lexicon._entries) == len(entries)
    hits = 0
    for _ in range(count):
        word = random_word(letters + "x", longest)
        expected = search(entries, word, limit)
        assert lexicon.nearest(word, limit) == expected, word
        hits += expected is not None and expected[1] > 0
    assert hits > 10


def test_an_entry_with_one_changed_letter_is_found():
    entries = random.sample(sorted(english_lexicon()._known), 400)
    lexicon = Lexicon(entries)
    for entry in entries[:100]:
        place = random.randrange(len(entry))
        changed = entry[:place] + "q" + entry[place + 1 :]
        assert lexicon.nearest(changed, 2) == search(entries, changed, 2)


def test_case_does_not_count_and_the_earlier_of_equal_entries_wins():
    lexicon = Lexicon(["Cart", "card", "CARD", "care"])
    assert len(lexicon._entries) == 3
    assert lexicon.nearest("CART", 0) == ("cart", 0) and lexicon.nearest("cars", 0) is None
    assert lexicon.nearest("cARD", 0) == ("card", 0)
    # all three are one letter away: the earliest entry wins
    assert lexicon.nearest("carx", 2) == ("cart", 1)
    assert lexicon.nearest("carx", 0) is None


def test_far_empty_and_too_long_words_have_no_nearest_entry():
    lexicon = Lexicon(["a" * 64, "b"])
    assert lexicon.nearest("", 2) is None
    assert lexicon.nearest("a" * 65, 2) is None
    assert lexicon.nearest("a" * 63 + "c", 2) == ("a" * 64, 1)
    assert lexicon.nearest("ccccc", 2) is None


@pytest.mark.parametrize("words", [[], [""], ["x" * 65]], ids=["none", "empty", "long"])
def test_empty_and_too_long_entries_are_refused(words):
    with pytest.raises(ValueError, match="word per line|one per line"):
        Lexicon(words)


def test_a_lexicon_file_has_a_word_per_line(tmp_path):
    (tmp_path / "lexicon.txt").write_text("Straße\n\n  exit \n", "utf-8")
    lexicon = read_lexicon(tmp_path / "lexicon.txt")
    assert len(lexicon._entries) == 2
    assert lexicon.nearest("exot", 1) == ("exit", 1)


def test_the_english_lexicon_has_common_words_and_is_fast():
    lexicon = english_lexicon()
    assert len(lexicon._entries) == 24116
    assert all(lexicon.nearest(word, 0) for word in ("parking", "no", "at", "coffee", "street"))
    assert not any(lexicon.nearest(word, 0) for word in ("th", "<s>", "1990", "x"))
    assert lexicon.nearest("prohibted", 2) == ("prohibited", 1)
    words = ["".join(random.choices("aeinorst", k=random.randint(3, 11))) for _ in range(1000)]
    start = time.perf_counter()
    for word in words:
        lexicon.nearest(word, 2)
    # 0.3 s on a quiet core
    assert time.perf_counter() - start < 5
