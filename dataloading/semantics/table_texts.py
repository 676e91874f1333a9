"""The texts of a semantics table: class names and words of datasets, lines of files, words of a vocabulary."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from prismer.dataloading.semantics.features import normalise
from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.experts import EXPERTS
from prismer.reading import is_text, read_lines
from prismer.shipped import shipped_folder


def dataset_texts(folders: Iterable[str | Path], progress: bool = False) -> set[str]:
    """Class names and words of datasets, normalised; a folder of splits stands for all its splits.

    Samples that cannot be read are left out with one warning.

    Raises:
        ValueError: if a folder holds no dataset.
    """
    texts: set[str] = set()
    unreadable: list[CorruptSample] = []
    word_tables = [expert.table for expert in EXPERTS.values() if expert.kind == "word"]
    for folder in map(Path, folders):
        splits = sorted(path.parent for path in folder.glob("[!.]*/index.json"))
        has_splits = splits and not (folder / "index.json").exists()
        for split in splits if has_splits else [folder]:
            dataset = ShardDataset(split)
            for name, expert in EXPERTS.items():
                texts.update(dataset.classes.get(name, []) if expert.has_classes else [])
            samples = range(len(dataset))
            for i in tqdm(samples, f"words of {split}", unit="sample", disable=not progress):
                try:
                    meta = dataset.meta(i)
                except CorruptSample as error:
                    unreadable.append(error)
                    continue
                for field in word_tables:
                    # any other value makes the sample unusable for the loader too, which names it
                    if isinstance(words := meta.get(field), dict):
                        texts.update(x for x in words.values() if isinstance(x, str) and is_text(x))
    if unreadable:
        warnings.warn(
            f"the words of {len(unreadable)} samples could not be read; the first: {unreadable[0]}", stacklevel=2
        )
    return set(map(normalise, texts)) - {""}


def file_texts(files: Iterable[str | Path]) -> set[str]:
    """The lines of UTF-8 text files, normalised, without blank ones.

    Raises:
        ValueError: if a file cannot be read or is not UTF-8.
    """
    return {normalise(line) for file in files for line in read_lines(file)} - {""}


def vocabulary_words() -> list[str]:
    """The whole words in RoBERTa's vocabulary (a blank, then letters a-z), sorted."""
    vocab = json.loads((shipped_folder("roberta") / "vocab.json").read_text(encoding="utf-8"))
    # byte-level BPE writes the blank before a word as this letter
    words = {token[1:].lower() for token in vocab if token.startswith("\u0120")}
    return sorted(word for word in words if word.isascii() and word.isalpha())
