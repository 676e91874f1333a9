"""Proves that texts and JSON of other people are read one way, and that odd ones end in one sentence.

python -m pytest tests/data/test_reading.py
"""

import pytest

from prismer.reading import lines_of, parse_json, read_lines
from tests.data.import_sources import DEEP


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb\r\nc\rd", ["a", "b", "c", "d"]),
        ("a\u2028b\x0cc\x85d\x1ee\x0bf\n", ["a\u2028b\x0cc\x85d\x1ee\x0bf"]),
        ("a\n\nb", ["a", "", "b"]),
        ("", []),
    ],
)
def test_only_line_ends_end_a_line(tmp_path, text, lines):
    assert lines_of(text) == lines
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_lines(tmp_path / "a.txt") == lines, "a byte-order mark is no letter"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DEEP.encode(), "nested too deeply"),
        (b'{"a": 1, "a": 2}', "gives the key 'a' twice"),
        (b"\xff", "not UTF-8"),
        ("[]".encode("utf-16"), "not UTF-8"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
    ],
    ids=["deep", "twice", "bytes", "utf-16", "number"],
)
def test_json_ends_in_one_sentence(data, message):
    with pytest.raises(ValueError, match=f"^x .*{message}"):
        parse_json(data, "x")
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]


def test_a_name_with_zero_bytes_is_refused():
    with pytest.raises(ValueError, match="cannot be read .no file has zero bytes"):
        read_lines("a\0b")
