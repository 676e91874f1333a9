"""Word expert: text in a photo as polygons of words, read with the PP-OCR networks inside the package rapidocr.

A detector finds lines; each is cut out, straightened to 48 pixels of height and read letter by letter. Lines are split
into words at the blanks that were read, so that every word has its own place and score. Which words are kept, and which
are first replaced by a word of the lexicon, are Prismer's rules (arXiv:2303.02506) with two of our own: Latin script
only, and two letters or digits at least.
"""

import hashlib
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from prismer.dataloading.experts.lexicon import Lexicon, english_lexicon, read_lexicon
from prismer.dataloading.experts.network import Card, Found, Images, MissingWeights, Network
from prismer.dataloading.experts.weights import file_version
from prismer.experts import BACKGROUND

MIN_SCORE, MIN_SCORE_OTHER, SURE_SCORE = 0.80, 0.90, 0.98
"""Of any word; of one that is not all letters; of one that needs no lexicon."""

MAX_WORDS = BACKGROUND - 1
"""Words of one image: later ones, in reading order, are left out."""

_HEIGHT = 48
"""Pixels of the line images that the recogniser reads."""

_MARKS = " .,:;!?'\"`()[]{}<>|_-~*/\\^=\u2018\u2019\u201c\u201d\u2022\u00b7\u2026\u2013\u2014"
"""What is cut from both ends of a word; signs that say something ($ % & # @ +) stay."""


@dataclass(frozen=True)
class Word:
    """A word that was read.

    Attributes:
        text: as read.
        score: mean probability of its letters.
        corners: (4, 2) float32 x, y in pixels of the image: top left, top right, bottom right, bottom left of the
            upright word.
    """

    text: str
    score: float
    corners: np.ndarray


def accepted(word: Word, lexicon: Lexicon) -> Word | None:
    """The word in lower case, or the lexicon's word for it, or None if it is not to be trusted.

    Kept as it is: from 0.98, or from 0.90 if it is not all letters. Replaced by the nearest entry: other words from
    0.80, if that is within no edit (entries of 1-2 letters), one (3-5) or two (longer). Marks at its ends are cut
    first; what has fewer than two letters or digits, or other scripts, is dropped: on photos without text a detector of
    many scripts sees single signs in gratings and leaves.
    """
    text = unicodedata.normalize("NFKC", word.text).strip(_MARKS).lower()
    if sum(letter.isalnum() for letter in text) < 2 or not all(map(_is_latin, text)):
        return None
    if word.score < MIN_SCORE:
        return None
    if word.score < SURE_SCORE and (text.isalpha() or word.score < MIN_SCORE_OTHER):
        nearest = lexicon.nearest(text, 2)
        if nearest is None:
            return None
        text, distance = nearest
        if distance > (0 if len(text) <= 2 else 1 if len(text) <= 5 else 2):
            return None
    return replace(word, text=text)


def found(words: list[Word], size: tuple[int, int], label_size: int) -> Found:
    """The map of accepted words.

    Args:
        words: in reading order; of two that overlap, the first lies in front.
        size: height and width in pixels of the image that the corners are in.
        label_size: side of the map.

    Returns:
        Ids 0, 1, 2... in reading order, at most 254 of them.
    """
    plane = np.full((label_size, label_size), BACKGROUND, np.uint8)
    result = Found(plane)
    height, width = size
    for index, word in reversed(list(enumerate(words[:MAX_WORDS]))):
        corners = word.corners / np.float32([width, height])
        _paint(plane, corners * label_size, index)
        result.words[index] = word.text
        (left, top), (right, bottom) = np.clip([corners.min(0), corners.max(0)], 0, 1).tolist()
        result.boxes[index] = (left, top, right, bottom, word.score)
    return result


def split_line(probabilities: np.ndarray, letters: list[str], quad: np.ndarray, width: int, padded: int) -> list[Word]:
    """Read one line: the letters' most probable run (CTC), cut into words at its blanks.

    Args:
        probabilities: (columns, 1 + letters) float32; entry 0 is "no letter".
        letters: what the other entries mean.
        quad: (4, 2) corners of the line in the image, from the top left of the upright text.
        width: columns of pixels that show the line; `padded` with those added behind it.

    Returns:
        The words from left to right, each with its part of `quad`.
    """
    best = probabilities.argmax(1)
    # a letter is read where the best entry changes to one that is a letter
    starts = np.flatnonzero((best > 0) & (np.diff(best, prepend=0) != 0))
    runs: list[list[int]] = [[]]
    for column in starts:
        if letters[best[column] - 1].isspace():
            runs.append([])
        else:
            runs[-1].append(column)
    runs = [np.array(run) for run in runs if run]
    scale = padded / len(best)
    firsts, lasts = ([(run[end] + 0.5) * scale for run in runs] for end in (0, -1))
    # a blank is wider than the gap of two letters: the word ends three quarters of a letter behind its last one's
    # middle, or half way to the next word; the outer ends are the line's own
    reach = [
        0.75 * (last - first) / (len(run) - 1) if len(run) > 1 else np.inf
        for first, last, run in zip(firsts, lasts, runs, strict=True)
    ]
    words = []
    for number, run in enumerate(runs):
        left, right = 0.0, float(width)
        if number > 0:
            left = max((lasts[number - 1] + firsts[number]) / 2, firsts[number] - reach[number])
        if number < len(runs) - 1:
            right = min((lasts[number] + firsts[number + 1]) / 2, lasts[number] + reach[number])
        text = "".join(letters[entry - 1] for entry in best[run])
        score = float(probabilities[run, best[run]].mean())
        words.append(Word(text, score, _part(quad, min(left / width, 1), min(right / width, 1))))
    return words


class RapidOcr(Network):
    """The PP-OCRv6 small detector and recogniser of rapidocr, on onnxruntime.

    Runs on the CPU with the threads that torch had when it was loaded, one image and one line after the other: what is
    read does not depend on what else is in the batch.
    """

    card = Card(
        name="rapidocr",
        expert="ocr_detection",
        about="PP-OCRv6 small text detector and recogniser of the package rapidocr; Latin script, English lexicon",
        licence="Apache-2.0",
        trained_on="PaddleOCR's text data (not published as one set)",
        weights="package",
        side=960,
        keep_aspect=True,
    )

    def __init__(self, detector, recogniser, letters: list[str], lexicon: Lexicon, version: str):
        self._detector = detector
        self._recogniser = recogniser
        self._letters = letters
        self._lexicon = lexicon
        self.version = version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "RapidOcr":
        """Read the networks and the lexicon.

        Args:
            source: a folder with `*det*.onnx` and `*rec*.onnx` (the recogniser's letters in its metadata, as rapidocr's
                have them), or `lexicon.txt` (a word per line), or all three; what it lacks is the package's networks,
                the English lexicon.
            device: not used.

        Raises:
            MissingWeights: if rapidocr is not installed.
            ValueError: if the folder holds none of these, one network without the other, or no recogniser of this kind.
        """
        try:
            import onnxruntime  # noqa: F401
            import rapidocr
        except ImportError as error:
            raise MissingWeights(
                f"rapidocr and its weights are not on this machine ({error}); run `pip install 'prismer-vlm[experts]'`"
            ) from None
        detector, recogniser, lexicon_file = _files(Path(rapidocr.__file__).parent / "models", source)
        threads = torch.get_num_threads()
        # a named path is used as it is: nothing is downloaded
        settings = {
            "Global.log_level": "critical",
            # a sliver is not blown up: 960 x 1 would become 28800 x 7200
            "Global.min_side_len": 1,
            "Det.model_path": str(detector),
            "Det.limit_type": "max",
            "Det.limit_side_len": cls.card.side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        session = _session(recogniser, threads)
        letters = session.get_modelmeta().custom_metadata_map.get("character", "").split("\n") + [" "]
        outputs = session.get_outputs()[0].shape[-1]
        if outputs != len(letters) + 1:
            raise ValueError(
                f"{recogniser} names {len(letters) - 1} letters in its metadata and has {outputs} outputs, expected "
                f"two more than letters; give a recogniser of rapidocr for onnxruntime"
            )
        lexicon = read_lexicon(lexicon_file) if lexicon_file else english_lexicon()
        parts = [file_version(detector), file_version(recogniser)]
        parts += [file_version(lexicon_file)] if lexicon_file else ["english-1"]
        version = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
        return cls(rapidocr.RapidOCR(params=settings), session, letters, lexicon, version)

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        results = []
        for pixels, size in zip(images.pixels.cpu().numpy(), images.sizes, strict=True):
            height, width = size
            image = np.ascontiguousarray(pixels[::-1, :height, :width].transpose(1, 2, 0))
            words = [accepted(word, self._lexicon) for word in self.read(image)]
            results.append(found([word for word in words if word], size, images.label_size))
        return results

    def read(self, image: np.ndarray) -> list[Word]:
        """All words of a BGR uint8 image (height, width, 3) in reading order, whether they can be trusted or not."""
        lines = self._detector(image, use_det=True, use_cls=False, use_rec=False).boxes
        words = []
        for quad in () if lines is None else np.float32(lines):
            across, down = _lengths(quad)
            if min(across, down) < 1:
                continue
            if down < 1.5 * across:
                words += self._read_line(image, quad)
            else:
                # text that runs down or up the image: what is read with more confidence
                turned = [self._read_line(image, np.roll(quad, shift, axis=0)) for shift in (-1, 1)]
                words += max(turned, key=lambda line: np.mean([word.score for word in line] or [0.0]))
        return words

    def _read_line(self, image: np.ndarray, quad: np.ndarray) -> list[Word]:
        line = _straightened(image, quad)
        width = line.shape[1]
        padded = -(-max(width, 64) // 32) * 32
        pixels = np.zeros((1, 3, _HEIGHT, padded), np.float32)
        pixels[0, :, :, :width] = line.transpose(2, 0, 1) / np.float32(127.5) - 1
        name = self._recogniser.get_inputs()[0].name
        (probabilities,) = self._recogniser.run(None, {name: pixels})
        return split_line(probabilities[0], self._letters, quad, width, padded)


NETWORKS = (RapidOcr,)


def _files(package: Path, source: str | Path | None) -> tuple[Path, Path, Path | None]:
    """The detector, the recogniser and the lexicon to use; see `RapidOcr.load`."""
    folder = Path(source) if source else None
    own = [sorted(folder.glob(f"*{kind}*.onnx")) if folder else [] for kind in ("det", "rec")]
    lexicon = folder / "lexicon.txt" if folder and (folder / "lexicon.txt").is_file() else None
    if folder and [len(paths) for paths in own] not in ([1, 1], [0, 0]) or folder and not any((*own, lexicon)):
        raise ValueError(
            f"{folder} holds {len(own[0])} *det*.onnx, {len(own[1])} *rec*.onnx and {'a' if lexicon else 'no'} "
            f"lexicon.txt; put one network of each kind there, or a lexicon.txt, or all three"
        )
    if folder and any(own):
        return own[0][0], own[1][0], lexicon
    paths = package / "PP-OCRv6_det_small.onnx", package / "PP-OCRv6_rec_small.onnx"
    for path in paths:
        if not path.is_file():
            raise MissingWeights(f"rapidocr is installed without {path.name}; run `pip install rapidocr==3.10.0`")
    return *paths, lexicon


def _session(path: Path, threads: int):
    """The recogniser as an onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's errors have no common class that it shows
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(f"{path} cannot be read as an ONNX network ({reason}); get the file again") from None


def _lengths(quad: np.ndarray) -> tuple[float, float]:
    """Width and height of a quadrilateral: the longer of opposite sides."""
    sides = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)
    return float(max(sides[0], sides[2])), float(max(sides[1], sides[3]))


def _straightened(image: np.ndarray, quad: np.ndarray) -> np.ndarray:
    """What `quad` shows, as an upright image (48, width, 3)."""
    import cv2

    across, down = (max(1, round(length)) for length in _lengths(quad))
    target = np.float32([[0, 0], [across, 0], [across, down], [0, down]])
    warp = cv2.getPerspectiveTransform(quad, target)
    line = cv2.warpPerspective(image, warp, (across, down), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    width = max(1, round(across * _HEIGHT / down))
    return cv2.resize(line, (width, _HEIGHT), interpolation=cv2.INTER_AREA if down > _HEIGHT else cv2.INTER_LINEAR)


def _part(quad: np.ndarray, start: float, stop: float) -> np.ndarray:
    """The part of a line's quadrilateral between two fractions of its length."""
    top_left, top_right, bottom_right, bottom_left = quad
    top, bottom = top_right - top_left, bottom_right - bottom_left
    corners = [top_left + start * top, top_left + stop * top, bottom_left + stop * bottom, bottom_left + start * bottom]
    return np.float32(corners)


def _paint(plane: np.ndarray, corners: np.ndarray, value: int) -> None:
    """Set the pixels of `plane` whose middles lie in a convex polygon, corners clockwise, and the one in its middle."""
    size = len(plane)
    left, top = np.clip(np.floor(corners.min(0)), 0, size - 1).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(0)), 1, size).astype(int)
    part = plane[top:bottom, left:right]
    y, x = np.ogrid[top + 0.5 : bottom, left + 0.5 : right]
    inside = np.ones(part.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (y - y0) >= (y1 - y0) * (x - x0)
    part[inside] = value
    column, row = np.clip(corners.mean(0), 0, size - 1).astype(int)
    plane[row, column] = value


def _is_latin(letter: str) -> bool:
    """Whether it is in Latin script, or of none and in ASCII."""
    return letter.isascii() or letter.isalpha() and unicodedata.name(letter, "").startswith("LATIN")
