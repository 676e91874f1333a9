"""Proves the common checks, and how sentences show values and names.

Run: pytest tests/test_errors.py
"""

import numpy as np
import pytest

from prismer.errors import InputError, check_count, listed, shown


@pytest.mark.parametrize(("value", "least"), [(1, 1), (0, 0), (np.int64(3), 3)])
def test_a_whole_number_of_at_least_the_least_is_accepted(value, least):
    check_count("--workers", value, least)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "workers is 0; it must be at least 1"),
        (-(10**300), "...; it must be at least 1"),
        (True, "workers is True; give a whole number"),
        (3.0, "workers is 3.0; give a whole number"),
        ("3", "workers is '3'; give a whole number"),
        (None, "workers is None; give a whole number"),
    ],
)
def test_anything_else_is_refused_in_one_short_sentence(value, words):
    with pytest.raises(InputError) as caught:
        check_count("workers", value)
    assert words in str(caught.value) and len(str(caught.value)) < 100


def test_a_long_value_is_cut():
    assert shown("x") == "'x'" and shown("a\nb\ud800") == r"'a\nb\ud800'"
    assert shown("x" * 58) == repr("x" * 58)
    assert shown("x" * 59) == "'" + "x" * 56 + "..."


def test_the_first_five_names_are_listed():
    assert listed(["b", "a"]) == "a, b"
    assert listed("fedcbag") == "a, b, c, d, e and 2 more"
    assert listed(["", "a\nb", "x" * 61]) == rf"'', 'a\nb', '{'x' * 56}..."
