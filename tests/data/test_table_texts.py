"""Proves which texts a semantics table is made of: those of datasets, of files and of RoBERTa's vocabulary.

python -m pytest tests/data/test_table_texts.py
"""

import os

import pytest

from prismer.dataloading.semantics.table_texts import dataset_texts, file_texts, vocabulary_words
from tests.data.stand_in_clip import write_dataset


def test_vocabulary_is_whole_words():
    words = vocabulary_words()
    assert 20_000 < len(words) < 30_000 and words == sorted(set(words))
    assert {"person", "the", "paris"} < set(words) and all(map(str.isalpha, words))


def test_unreadable_samples_cause_a_warning(tmp_path):
    folder = write_dataset(tmp_path / "d", {}, [{"0": "stop"}, {"0": "exit"}])
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"stop"', b'"st0p"'))
    with pytest.warns(UserWarning, match="words of 1 samples could not be read; the first: .*0000"):
        assert dataset_texts([folder]) == {"exit"}
    with pytest.raises(ValueError, match="index.json"):
        dataset_texts([tmp_path / "nothing"])


def test_only_line_ends_end_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffstop\u2028sign\r\nA\x0cCat\rdog\n\n".encode())
    assert file_texts([tmp_path / "a.txt"]) == {"stop sign", "a cat", "dog"}


@pytest.mark.parametrize("kind", ["pipe", "folder", "bytes", "utf-16", "absent"])
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(b"\xff" if kind == "bytes" else "a".encode("utf-16"))
    with pytest.raises(ValueError, match="a.txt (cannot be read|is not UTF-8)"):
        file_texts([path])
