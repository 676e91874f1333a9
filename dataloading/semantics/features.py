"""Class names and words as 64 numbers each: the features that replace ids in a high-level label map on the device.

There are two sources. `from_table` reads CLIP text features after PCA (Prismer, arXiv:2303.02506, section 3.2), from a
table that `prismer semantics` makes. `spelling` derives features from the letters: it needs neither files nor a CLIP
text tower, and any word has some.

No table holds every word that a photo may show. A word without features becomes background: its region then looks like
a place without words, which the model knows, and one warning names the word (`Semantics.known_words`). A class name
without features is an error, because every map of its expert would lose that class.
"""

import json
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from prismer.config import PrismerConfig
from prismer.dataloading.store.native_ops import values_in_use
from prismer.errors import InputError
from prismer.experts import BACKGROUND, EXPERTS, FEATURE_WIDTH
from prismer.files import write_atomically

TABLE_FILES = ("semantics.safetensors", "semantics.json")
_POSITIONS = 8
_BIGRAM_WEIGHT = 0.5
_CACHED_WORDS = 65536


class Semantics:
    """Features of texts, which are compared as `normalise` writes them.

    Args:
        lookup: normalised text -> (64,), or None if it has no features.
        background: (64,) fp32, the features of "nothing here".
        folder: of the table, for messages.

    Attributes:
        background: as given.
        unknown_words: normalised words that `known_words` left out -> how often.
    """

    def __init__(self, lookup: Callable[[str], np.ndarray | None], background: np.ndarray, folder: str = ""):
        # words repeat from image to image
        self._lookup = lru_cache(maxsize=_CACHED_WORDS)(lookup)
        self.background = background
        self.unknown_words: Counter[str] = Counter()
        self._folder = folder
        # several threads look samples up
        self._counting = threading.Lock()

    def rows(self, texts: list[str]) -> np.ndarray:
        """(len(texts), 64) fp32, one row for each text.

        Raises:
            ValueError: if a text is not in the table.
        """
        rows = np.empty((len(texts), FEATURE_WIDTH), np.float32)
        for row, text in zip(rows, texts, strict=True):
            found = self._lookup(normalise(text))
            if found is None:
                raise InputError(
                    f"{text!r} is not in the semantics table in {self._folder}; "
                    f"add it with `prismer semantics add {self._folder} --texts FILE`"
                )
            row[:] = found
        return rows

    def known_words(self, words: dict[int, str]) -> dict[int, str]:
        """The `words` of one sample that have features; the others are counted, and the first ones cause a warning.

        Args:
            words: id in the ocr_detection map -> word.
        """
        known = {i: word for i, word in words.items() if self._lookup(normalise(word)) is not None}
        missing = Counter(normalise(words[i]) for i in words.keys() - known.keys())
        if missing:
            with self._counting:
                is_first = not self.unknown_words
                self.unknown_words.update(missing)
            if is_first:
                named = ", ".join(f"{word!r} ({n})" for word, n in sorted(missing.items()))
                warnings.warn(
                    f"words without features enter as background: {named}; list them in a file and run `prismer "
                    f"semantics add {self._folder} --texts FILE`; later ones are only counted, in "
                    f"Semantics.unknown_words",
                    stacklevel=2,
                )
        return known

    @classmethod
    def spelling(cls) -> "Semantics":
        """Features from the letters alone, the same on every machine.

        Each byte at each of the first eight positions, and each pair of neighbouring bytes anywhere, has a fixed random
        vector of +1 and -1. The features of a text are the sum of its vectors (pairs count half), scaled to a mean
        square of 1. Texts with the same beginning are near each other, others are nearly orthogonal. The background
        is 0.
        """
        return cls(_spell, np.zeros(FEATURE_WIDTH, np.float32))

    @classmethod
    def from_table(cls, folder: str | Path) -> "Semantics":
        """Features from `semantics.safetensors` (features (n, 64), background (64,)) and `semantics.json` (n names).

        Raises:
            ValueError: if a file is absent or damaged, or their sizes disagree.
        """
        names, features, background = read_table(folder)
        table = dict(zip(map(normalise, names), features, strict=True))
        return cls(table.get, background, str(folder))

    @classmethod
    def for_config(cls, config: PrismerConfig, folder: str | Path | None = None) -> "Semantics":
        """The source that `config.semantics` names; "clip" reads its table from `folder`.

        A model that reads no map of ids, such as a preset with "-z", needs no table.

        Raises:
            ValueError: if a table is needed and `folder` is None or holds none.
        """
        if config.semantics == "spelling":
            return cls.spelling()
        if folder is None:
            if not any(EXPERTS[name].is_ids for name in config.experts):
                return cls.spelling()
            raise InputError(f"semantics is {config.semantics!r}, which reads a table; name the folder that holds it")
        return cls.from_table(folder)


@dataclass
class Meanings:
    """The meaning of the ids in the high-level maps of one sample.

    Attributes:
        rows: seg and obj_detection -> (256,) int64, for each id its row of the class features; 0 is the background.
        words: ocr_detection, and in a sample with class names of its own seg and obj_detection -> {id: word} of the
            words that have features; other ids are background.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    words: dict[str, dict[int, str]] = field(default_factory=dict)


class FeatureTables:
    """Maps the ids of label maps to rows of one features table: background, class names, then the words of a batch.

    Args:
        config: gives the experts; maps of others are not used.
        classes: the dataset's class tables, "seg" and "obj_detection" -> names.
        semantics: features of class names and words.

    Raises:
        ValueError: if a class name has no features.
    """

    def __init__(self, config: PrismerConfig, classes: dict[str, list[str]], semantics: Semantics):
        self.experts = [name for name in config.experts if EXPERTS[name].is_ids]
        self.semantics = semantics
        self._first_row, self._num_classes, names = {}, {}, []
        for expert in (name for name in EXPERTS if EXPERTS[name].has_classes):
            table = classes.get(expert, []) if expert in self.experts else []
            self._first_row[expert], self._num_classes[expert] = 1 + len(names), len(table)
            names += table
        self._features = np.concatenate([semantics.background[None], semantics.rows(names)])

    def look_up(
        self, labels: dict[str, np.ndarray], meta: dict, own_classes: dict[str, list[str]] | None = None
    ) -> Meanings:
        """The meanings of the ids in use; a word without features stays background.

        Args:
            labels: expert -> uint8 map.
            meta: the sample's JSON, with `instances` and `words`.
            own_classes: class tables of this sample alone, as long as the dataset's; None for the dataset's.

        Raises:
            ValueError: if an id has no entry, or a class is not in its table.
        """
        meanings = Meanings()
        for expert in self.experts:
            if expert not in labels:
                continue
            used = [i for i in values_in_use(labels[expert]) if i != BACKGROUND]
            field = EXPERTS[expert].table
            if EXPERTS[expert].kind == "word":
                words = {i: _entry(meta, field, i, str) for i in used}
                meanings.words[expert] = self.semantics.known_words(words)
                continue
            rows, names = np.zeros(256, np.int64), {}
            for i in used:
                class_id = i if field is None else _entry(meta, field, i, int)
                if not 0 <= class_id < self._num_classes[expert]:
                    raise InputError(
                        f"its {expert} map has class {class_id}, the class table has "
                        f"{self._num_classes[expert]}; label the sample again"
                    )
                rows[i] = self._first_row[expert] + class_id
                if own_classes is not None:
                    names[i] = own_classes[expert][class_id]
            if own_classes is None:
                meanings.rows[expert] = rows
            else:
                meanings.words[expert] = self.semantics.known_words(names)
        return meanings

    def collate(self, batch: list[Meanings]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The rows and features of a batch for `ImageBatch`.

        Returns:
            expert -> (B, 256) int64, and features (F, 64) fp32.
        """
        rows = {expert: np.zeros((len(batch), 256), np.int64) for expert in self.experts}
        row_of_word: dict[str, int] = {}
        for b, meanings in enumerate(batch):
            for expert, table in meanings.rows.items():
                rows[expert][b] = table
            for expert, words in meanings.words.items():
                for i, word in words.items():
                    row = row_of_word.setdefault(word, len(self._features) + len(row_of_word))
                    rows[expert][b, i] = row
        return rows, np.concatenate([self._features, self.semantics.rows(list(row_of_word))])


def read_table(folder: str | Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The n names, features (n, 64) and background (64,), fp32, of the table in `folder`.

    Raises:
        ValueError: if a file is absent or damaged, or their sizes disagree.
    """
    tensors_path, names_path = (Path(folder) / name for name in TABLE_FILES)
    try:
        tensors = load_file(tensors_path)
        names = json.loads(names_path.read_text(encoding="utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{names_path.name} is not a list of texts")
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no semantics table ({error.filename or tensors_path} is missing); "
            f'name the folder of one, or choose semantics="spelling"'
        ) from None
    except (SafetensorError, ValueError) as error:
        raise InputError(f"the semantics table in {folder} is damaged: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = {"features": (len(names), FEATURE_WIDTH), "background": (FEATURE_WIDTH,)}
    if shapes != expected:
        raise InputError(f"the semantics table in {folder} has {shapes} for {len(names)} names; expected {expected}")
    return names, *(tensors[name].astype(np.float32) for name in ("features", "background"))


def write_table(folder: str | Path, names: list[str], features: np.ndarray, background: np.ndarray) -> None:
    """Write a table for `Semantics.from_table`.

    Args:
        folder: made if absent.
        names: n texts, different from each other.
        features: (n, 64).
        background: (64,).

    Raises:
        ValueError: if the sizes disagree or two names are equal.
    """
    if features.shape != (len(names), FEATURE_WIDTH) or background.shape != (FEATURE_WIDTH,):
        raise InputError(
            f"features {features.shape} and background {background.shape} do not fit {len(names)} names; "
            f"expected ({len(names)}, {FEATURE_WIDTH}) and ({FEATURE_WIDTH},)"
        )
    if len(set(map(normalise, names))) < len(names):
        raise InputError("two names differ in case or blanks alone; give each text once")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors_path, names_path = (folder / name for name in TABLE_FILES)
    tensors = {
        "features": np.ascontiguousarray(features, np.float32),
        "background": np.ascontiguousarray(background, np.float32),
    }
    # as bytes: safetensors' own writer hides a full disk from the caller
    write_atomically(tensors_path, save(tensors))
    write_atomically(names_path, json.dumps(names, ensure_ascii=False, indent=0).encode())


def normalise(text: str) -> str:
    """The form in which texts are compared: lower case, single blanks."""
    return " ".join(text.lower().split())


def _entry(meta: dict, table: str, i: int, kind: type) -> Any:
    entries = meta.get(table, {})
    entry = entries.get(str(i)) if isinstance(entries, dict) else None
    if not isinstance(entry, kind):
        raise InputError(f"id {i} of its map has no entry in {table!r}; label the sample again")
    return entry


@lru_cache(maxsize=1)
def _signs() -> tuple[np.ndarray, np.ndarray]:
    # one 64-bit draw is one vector of 64 signs; raw draws of Philox are the same in every version of numpy
    draws = np.random.Philox(key=2303_02506).random_raw((_POSITIONS + 256) * 256)
    return draws[: _POSITIONS * 256], draws[_POSITIONS * 256 :]


def _spell(text: str) -> np.ndarray:
    positions, bigrams = _signs()
    letters = text.encode()
    # blanks around the text distinguish a first or last letter from one in the middle
    padded = b" " + letters + b" "
    single = [positions[256 * i + letter] for i, letter in enumerate(letters[:_POSITIONS])]
    pairs = [bigrams[256 * a + b] for a, b in zip(padded, padded[1:], strict=False)]
    draws = np.array(single + pairs, dtype="<u8")
    signs = np.unpackbits(draws.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little") * 2.0 - 1.0
    weights = np.repeat([1.0, _BIGRAM_WEIGHT], [len(single), len(pairs)])
    # sums of halves are exact in any order of addition: every machine gets the same bits
    vector = weights @ signs
    return (vector / np.sqrt(np.mean(vector**2))).astype(np.float32)
