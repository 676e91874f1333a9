"""Word expert: the words in an image as polygons, read by the PP-OCR networks in the package rapidocr.

A detector finds lines of text. Each line is cut out, rectified to a height of 48 pixels, read letter by letter, and
split into words at the blanks, so that each word has its own place and score. `accept_word` follows the rules of
Prismer's released code (arXiv:2303.02506, section 3.2) with two of our own: Latin script only, and at least two letters
or digits.
"""

import hashlib
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismer.dataloading.experts.lexicon import Lexicon, english_lexicon, read_lexicon
from prismer.dataloading.experts.network import ExpertOutput, Images, Network, NetworkInfo
from prismer.dataloading.experts.weights import MissingWeights, file_version
from prismer.errors import InputError
from prismer.experts import BACKGROUND

# the least score of a word, of a word that is not all letters, and of a word that needs no lexicon
MIN_SCORE, MIN_SCORE_OTHER, SURE_SCORE = 0.80, 0.90, 0.98

# the first words of an image, in reading order; further words are left out
MAX_WORDS = BACKGROUND - 1

# height in pixels of the line images that the recogniser reads
_HEIGHT = 48

# characters cut from both ends of a word; signs with a meaning ($ % & # @ +) stay
_MARKS = " .,:;!?'\"`()[]{}<>|_-~*/\\^=\u2018\u2019\u201c\u201d\u2022\u00b7\u2026\u2013\u2014"


@dataclass(frozen=True)
class Word:
    """A word in an image.

    Attributes:
        text: the text.
        score: mean probability of its letters.
        corners: (4, 2) float32 x, y in pixels of the image: top left, top right, bottom right, bottom left of the
            upright word.
    """

    text: str
    score: float
    corners: np.ndarray


def accept_word(word: Word, lexicon: Lexicon) -> Word | None:
    """Return the word in lower case, or the nearest word of the lexicon, or None if the word is too doubtful.

    Marks at the ends are cut off first. A word is kept from a score of 0.98, or from 0.90 if it is not all letters.
    Other words from 0.80 are replaced by the nearest entry of the lexicon, if that is within 0 edits (entries of 1-2
    letters), 1 edit (3-5) or 2 edits (longer). Words with fewer than two letters or digits, or in other scripts, are
    dropped: in photographs without text the detector sees single signs in gratings and leaves.
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


def words_output(words: list[Word], size: tuple[int, int], label_size: int) -> ExpertOutput:
    """The output for the accepted words of an image, with the ids 0, 1, 2, ... in reading order, at most 254.

    Args:
        words: in reading order. Where two overlap, the first lies in front.
        size: height and width of the image in pixels.
        label_size: side of the map.
    """
    plane = np.full((label_size, label_size), BACKGROUND, np.uint8)
    result = ExpertOutput(plane)
    height, width = size
    for index, word in reversed(list(enumerate(words[:MAX_WORDS]))):
        corners = word.corners / np.float32([width, height])
        _paint(plane, corners * label_size, index)
        result.table[index] = word.text
        (left, top), (right, bottom) = np.clip([corners.min(0), corners.max(0)], 0, 1).tolist()
        result.boxes[index] = (left, top, right, bottom, word.score)
    return result


def split_line(probabilities: np.ndarray, letters: list[str], quad: np.ndarray, width: int, padded: int) -> list[Word]:
    """Decode one line (greedy CTC) and cut it into words at its blanks.

    Args:
        probabilities: (columns, 1 + letters) float32; entry 0 is "no letter".
        letters: the letters of the other entries.
        quad: (4, 2) corners of the line in the image, from the top left of the upright text.
        width: width in pixels of the rectified line.
        padded: width of the line image, which is padded behind the line.

    Returns:
        The words from left to right, each with its part of `quad`.
    """
    best = probabilities.argmax(1)
    # a letter starts where the best entry changes to a letter
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
    # a word ends three quarters of a letter behind the middle of its last letter, because a blank is wider than the gap
    # between letters; or half way to the next word, if that is nearer. The line's own ends are the outer ends.
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
        words.append(Word(text, score, _sub_quad(quad, min(left / width, 1), min(right / width, 1))))
    return words


class RapidOcr(Network):
    """The PP-OCRv6 small detector and recogniser of rapidocr, on onnxruntime.

    It runs on the CPU, with as many threads as torch had when it was loaded. It reads one image and one line at a time,
    so that the result does not depend on the rest of the batch.
    """

    info = NetworkInfo(
        name="rapidocr",
        expert="ocr_detection",
        summary="PP-OCRv6 small text detector and recogniser of the package rapidocr; Latin script, English lexicon",
        licence="Apache-2.0",
        trained_on="PaddleOCR's text data (not published as one set)",
        weights="package",
        side=960,
        keep_aspect=True,
    )

    def __init__(self, detector: Any, recogniser: Any, letters: list[str], lexicon: Lexicon, version: str):
        self._detector = detector
        self._recogniser = recogniser
        self._letters = letters
        self._lexicon = lexicon
        self.version = version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "RapidOcr":
        """Read the networks and the lexicon.

        Args:
            source: a folder with `*det*.onnx` and `*rec*.onnx`, or with `lexicon.txt` (a word per line), or with all
                three. The recogniser has its letters in its metadata, like rapidocr's own. By default the networks are
                those of the package, and the lexicon is English.
            device: not used.

        Raises:
            MissingWeights: if rapidocr is not installed.
            ValueError: if the folder holds none of these files, or one network without the other, or a recogniser of
                another kind.
        """
        try:
            import onnxruntime  # noqa: F401 - rapidocr needs it and imports it late
            import rapidocr
        except ImportError as error:
            raise MissingWeights(
                f"rapidocr and its weights are not on this machine ({error}); run `pip install 'prismer-vlm[experts]'`"
            ) from None
        detector, recogniser, lexicon_file = _files(Path(rapidocr.__file__).parent / "models", source)
        threads = torch.get_num_threads()
        # rapidocr downloads nothing if the paths are given
        settings = {
            "Global.log_level": "critical",
            # keeps thin images as they are: 960 x 1 would otherwise become 28800 x 7200
            "Global.min_side_len": 1,
            "Det.model_path": str(detector),
            "Det.limit_type": "max",
            "Det.limit_side_len": cls.info.side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        session = _session(recogniser, threads)
        letters = session.get_modelmeta().custom_metadata_map.get("character", "").split("\n") + [" "]
        outputs = session.get_outputs()[0].shape[-1]
        if outputs != len(letters) + 1:
            raise InputError(
                f"{recogniser} names {len(letters) - 1} letters in its metadata and has {outputs} outputs, expected "
                f"two more than letters; give a recogniser of rapidocr for onnxruntime"
            )
        lexicon = read_lexicon(lexicon_file) if lexicon_file else english_lexicon()
        parts = [file_version(detector), file_version(recogniser)]
        parts += [file_version(lexicon_file)] if lexicon_file else ["english-1"]
        version = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
        return cls(rapidocr.RapidOCR(params=settings), session, letters, lexicon, version)

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        outputs = []
        for pixels, size in zip(images.pixels.cpu().numpy(), images.sizes, strict=True):
            height, width = size
            image = np.ascontiguousarray(pixels[::-1, :height, :width].transpose(1, 2, 0))
            words = [accept_word(word, self._lexicon) for word in self.read(image)]
            outputs.append(words_output([word for word in words if word], size, images.label_size))
        return outputs

    def read(self, image: np.ndarray) -> list[Word]:
        """All words of a BGR uint8 image (height, width, 3) in reading order, doubtful ones included."""
        lines = self._detector(image, use_det=True, use_cls=False, use_rec=False).boxes
        words = []
        for quad in () if lines is None else np.float32(lines):
            across, down = _lengths(quad)
            if min(across, down) < 1:
                continue
            if down < 1.5 * across:
                words += self._read_line(image, quad)
            else:
                # the text runs down or up the image: take the direction with the higher scores
                turned = [self._read_line(image, np.roll(quad, shift, axis=0)) for shift in (-1, 1)]
                words += max(turned, key=lambda line: np.mean([word.score for word in line] or [0.0]))
        return words

    def _read_line(self, image: np.ndarray, quad: np.ndarray) -> list[Word]:
        line = _rectify(image, quad)
        width = line.shape[1]
        padded = -(-max(width, 64) // 32) * 32
        pixels = np.zeros((1, 3, _HEIGHT, padded), np.float32)
        pixels[0, :, :, :width] = line.transpose(2, 0, 1) / np.float32(127.5) - 1
        name = self._recogniser.get_inputs()[0].name
        (probabilities,) = self._recogniser.run(None, {name: pixels})
        return split_line(probabilities[0], self._letters, quad, width, padded)


NETWORKS = (RapidOcr,)


def _files(package: Path, source: str | Path | None) -> tuple[Path, Path, Path | None]:
    """The files of the detector, the recogniser and the lexicon; see `RapidOcr.load`."""
    folder = Path(source) if source else None
    own = [sorted(folder.glob(f"*{kind}*.onnx")) if folder else [] for kind in ("det", "rec")]
    lexicon = folder / "lexicon.txt" if folder and (folder / "lexicon.txt").is_file() else None
    if folder and [len(paths) for paths in own] not in ([1, 1], [0, 0]) or folder and not any((*own, lexicon)):
        raise InputError(
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


def _session(path: Path, threads: int) -> Any:
    """An onnxruntime session of the recogniser, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # the errors of onnxruntime have no public common class
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(f"{path} cannot be read as an ONNX network ({reason}); get the file again") from None


def _lengths(quad: np.ndarray) -> tuple[float, float]:
    """The width and height of a quadrilateral: the longer of each two opposite sides."""
    sides = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)
    return float(max(sides[0], sides[2])), float(max(sides[1], sides[3]))


def _rectify(image: np.ndarray, quad: np.ndarray) -> np.ndarray:
    """Warp the part of the image in `quad` to an upright image (48, width, 3)."""
    import cv2

    across, down = (max(1, round(length)) for length in _lengths(quad))
    target = np.float32([[0, 0], [across, 0], [across, down], [0, down]])
    warp = cv2.getPerspectiveTransform(quad, target)
    line = cv2.warpPerspective(image, warp, (across, down), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    width = max(1, round(across * _HEIGHT / down))
    return cv2.resize(line, (width, _HEIGHT), interpolation=cv2.INTER_AREA if down > _HEIGHT else cv2.INTER_LINEAR)


def _sub_quad(quad: np.ndarray, start: float, stop: float) -> np.ndarray:
    """The part of a line's quadrilateral between two fractions of its length."""
    top_left, top_right, bottom_right, bottom_left = quad
    top, bottom = top_right - top_left, bottom_right - bottom_left
    corners = [top_left + start * top, top_left + stop * top, bottom_left + stop * bottom, bottom_left + start * bottom]
    return np.float32(corners)


def _paint(plane: np.ndarray, corners: np.ndarray, value: int) -> None:
    """Set the pixels of `plane` whose centres lie in a convex polygon, corners clockwise, and the one at its centre."""
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
    """Whether a character is ASCII, or a letter of the Latin script."""
    return letter.isascii() or letter.isalpha() and unicodedata.name(letter, "").startswith("LATIN")
