"""What the experts found in an image, as text: names and boxes of a sample -> the tokens that the decoder reads.

A detection is an object or a word. Its name is the class of the object or the word itself, in lower case and encoded as
in the middle of a sentence. Its box comes from "boxes" in the sample's JSON, or else from the pixels of its id in the
map. The largest detections come first, weighted by their confidence. Nothing depends on the other samples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from prismer.batch import COLUMN, CONFIDENCE, FACT_VALUES, KIND, PART, ROW, SIZE, Detections
from prismer.config import PrismerConfig
from prismer.dataloading.feed.augment import AugmentParams, Box
from prismer.dataloading.store.native_ops import values_in_use
from prismer.errors import InputError, listed
from prismer.experts import BACKGROUND, EXPERTS, TEXT_EXPERTS
from prismer.texts import clean_caption
from prismer.tokenizer import Tokenizer

# a box is left out if less of its area is in the image
_LEAST_VISIBLE = 0.25
# the classes of size are separated by these shares of the image's area: 0.354, 0.125, 0.044, 0.016, 0.0055. Each is
# about a third of the one before, so that a box of the next class has sides about 0.6 times as long
_SIZES = tuple(2 ** (-1.5 * (i + 1)) for i in range(FACT_VALUES[SIZE] - 1))
# the classes of confidence, after 0 for "not known", are separated by these scores
_CONFIDENCES = (0.5, 0.8)
# digits by which detections are ordered: rounding noise must not decide between equal boxes
_DIGITS = 6
# letters of a name that are read: more than its first tokens can hold
_MAX_LETTERS = 1024
_CACHED_NAMES = 65536


@dataclass(frozen=True)
class Detection:
    """One object or word.

    Attributes:
        expert: the expert that found it.
        name: the class of an object, or the word; cleaned, in lower case.
        tokens: the first tokens of the name, at most 8.
        box: left, top, right, bottom of its visible part, as shares of the sides of the model's image.
        score: the confidence in 0..1; None if it is not known.
    """

    expert: str
    name: str
    tokens: tuple[int, ...]
    box: Box
    score: float | None

    @property
    def area(self) -> float:
        """The share of the image's area that the box covers."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    @property
    def weight(self) -> float:
        """Decides which detections come first: area times confidence, an unknown confidence counts as 1."""
        return round(self.area * (1.0 if self.score is None else self.score), _DIGITS)

    def facts(self) -> np.ndarray:
        """(number of tokens, 6) uint8, see `prismer.batch.Detections`."""
        facts = np.zeros((len(self.tokens), len(FACT_VALUES)), np.uint8)
        left, top, right, bottom = self.box
        facts[:, KIND] = EXPERTS[self.expert].kind == "word"
        facts[:, PART] = np.arange(len(self.tokens))
        facts[:, ROW] = _cell((top + bottom) / 2, FACT_VALUES[ROW])
        facts[:, COLUMN] = _cell((left + right) / 2, FACT_VALUES[COLUMN])
        facts[:, SIZE] = sum(self.area <= share for share in _SIZES)
        if self.score is not None:
            facts[:, CONFIDENCE] = 1 + sum(self.score >= share for share in _CONFIDENCES)
        return facts


class DetectionFinder:
    """Finds the detections of samples that a model reads as text, and collates them.

    Args:
        config: of the model: the experts whose detections are read as text, and how many of them.
        tokenizer: the model's own.

    Raises:
        ValueError: if there is no tokenizer.
    """

    def __init__(self, config: PrismerConfig, tokenizer: Tokenizer | None):
        if tokenizer is None:
            raise InputError(
                f"the model reads the detections of {listed(config.expert_text)} as text, and no tokenizer was given; "
                f"give the model's own"
            )
        self.config, self._tokenizer = config, tokenizer
        # whatever the order in the config
        self._experts = [name for name in TEXT_EXPERTS if name in config.expert_text]
        # names repeat from image to image
        self._encode = lru_cache(maxsize=_CACHED_NAMES)(self._clean_and_encode)

    def find(
        self,
        planes: dict[str, np.ndarray],
        meta: dict,
        classes: dict[str, list[str]],
        params: AugmentParams | None = None,
    ) -> list[Detection]:
        """The detections of one sample that are read as text, in their order.

        An object or word without a box and without a pixel in its map is left out, and so is a name without a letter
        or digit.

        Args:
            planes: expert -> uint8 map (h, w); maps may be missing.
            meta: the sample's JSON with the tables and "boxes", which `check_meta` accepts.
            classes: the class tables of its dataset.
            params: the augmentation of the sample, which moves its boxes; None leaves the image as it is.

        Raises:
            ValueError: if a map holds an id that is not in its table.
        """
        found = []
        for expert in self._experts:
            table = meta.get(EXPERTS[expert].table, {})
            boxes = _boxes(expert, planes.get(expert), table, meta.get("boxes", {}).get(expert, {}))
            for i in sorted(table, key=int):
                if i not in boxes:
                    continue
                is_word = EXPERTS[expert].kind == "word"
                name, tokens = self._encode(table[i] if is_word else classes[expert][table[i]], is_word)
                box, score = boxes[i]
                share = 1.0
                if params is not None:
                    box, share = params.move_box(box)
                if tokens and share >= _LEAST_VISIBLE:
                    found.append(Detection(expert, name, tokens, box, score))
        # stable: of equal weights the first expert and the smallest id come first
        found.sort(key=lambda detection: -detection.weight)
        return self._fitting(found)

    def collate(self, batch: Sequence[Sequence[Detection]]) -> Detections:
        """The detections of each image of a batch, as `find` returned them, as tensors on the CPU."""
        num_tokens = self.config.num_detection_tokens
        ids = np.full((len(batch), num_tokens), self.config.pad_id, np.int64)
        facts = np.zeros((len(batch), num_tokens, len(FACT_VALUES)), np.uint8)
        for b, found in enumerate(batch):
            start = 0
            for detection in found:
                part = slice(start, start + len(detection.tokens))
                ids[b, part], facts[b, part] = detection.tokens, detection.facts()
                start = part.stop
        return Detections(ids=torch.from_numpy(ids), facts=torch.from_numpy(facts))

    def _fitting(self, found: list[Detection]) -> list[Detection]:
        """The detections that fit into the tokens of an image; one that does not fit is left out as a whole."""
        kept: list[Detection] = []
        room = self.config.num_detection_tokens
        for detection in found:
            if len(kept) < self.config.num_detections and len(detection.tokens) <= room:
                kept.append(detection)
                room -= len(detection.tokens)
        return kept

    def _clean_and_encode(self, text: str, is_word: bool) -> tuple[str, tuple[int, ...]]:
        """A name as it is read, and its first tokens; ("", ()) if it has no letter or digit."""
        name = clean_name(text[:_MAX_LETTERS], is_word)
        if not name:
            return "", ()
        return name, tuple(self._tokenizer.encode(f" {name}")[: FACT_VALUES[PART]])


def clean_name(text: str, is_word: bool = False) -> str:
    """The name of a class, or a word, as the decoder reads it: lower case, single blanks; "" without letter or digit.

    The name of a class loses the marks that captions lose, and its underscores become blanks. A word keeps its marks,
    which may belong to it: "$5.99", "7-eleven".
    """
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split()) if is_word else clean_caption(text.replace("_", " "))
    return text.lower() if any(letter.isalnum() for letter in text) else ""


def _boxes(
    expert: str, plane: np.ndarray | None, table: dict[str, object], stored: dict[str, list[float]]
) -> dict[str, tuple[Box, float | None]]:
    """id -> box and score of each id of an expert that has a box or pixels."""
    boxes: dict[str, tuple[Box, float | None]] = {}
    if plane is not None:
        used = {str(i) for i in values_in_use(plane) if i != BACKGROUND}
        if unknown := sorted(used - table.keys(), key=int):
            field = EXPERTS[expert].table
            raise InputError(f"id {unknown[0]} of its {expert} map has no entry in {field!r}; label the sample again")
        if not used <= stored.keys():
            boxes = {i: (box, None) for i, box in _bounding_boxes(plane).items()}
    for i, (left, top, right, bottom, *score) in stored.items():
        boxes[i] = (left, top, right, bottom), float(score[0]) if score else None
    return boxes


def _bounding_boxes(plane: np.ndarray) -> dict[str, Box]:
    """id -> the box around its pixels, as shares of the sides of the map."""
    height, width = plane.shape
    rows, columns = np.zeros((256, height), bool), np.zeros((256, width), bool)
    rows[plane, np.arange(height)[:, None]] = True
    columns[plane, np.arange(width)] = True
    boxes = {}
    for i in np.flatnonzero(rows[:BACKGROUND].any(axis=1)).tolist():
        down, across = np.flatnonzero(rows[i]), np.flatnonzero(columns[i])
        left, top = across[0] / width, down[0] / height
        boxes[str(i)] = float(left), float(top), float((across[-1] + 1) / width), float((down[-1] + 1) / height)
    return boxes


def _cell(place: float, count: int) -> int:
    """Which of `count` equal parts of 0..1 holds a place."""
    return min(int(place * count), count - 1)
