"""Proves which words are accepted, how lines become words and words become maps, and that drawn text is read.

python -m pytest tests/experts/test_words.py
"""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from prismer.dataloading.experts.lexicon import Lexicon
from prismer.dataloading.experts.network import Images
from prismer.dataloading.experts.weights import MissingWeights
from prismer.dataloading.experts.words import MAX_WORDS, RapidOcr, Word, accept_word, split_line, words_output

LEXICON = Lexicon(["to", "exit", "stop", "parking", "coffee", "pa"])
SQUARE = np.float32([[0, 0], [10, 0], [10, 5], [0, 5]])


def box(left, top, right, bottom) -> np.ndarray:
    return np.float32([[left, top], [right, top], [right, bottom], [left, bottom]])


@pytest.mark.parametrize(
    ("text", "score", "expected"),
    [
        ("EXIT", 0.80, "exit"),
        ("EXIT", 0.79, None),
        # one edit is allowed in entries of 3-5 letters, two in longer entries, none in shorter ones
        ("EXlT", 0.85, "exit"),
        ("EXl", 0.85, None),
        ("parkng", 0.85, "parking"),
        ("parkn", 0.85, "parking"),
        ("park", 0.85, None),
        ("to", 0.85, "to"),
        ("po", 0.85, None),
        # from 0.98 no lexicon is needed
        ("Wivenhoe", 0.98, "wivenhoe"),
        ("Wivenhoe", 0.979, None),
        ("EXlT", 0.98, "exlt"),
        # not all letters
        ("st0p", 0.90, "st0p"),
        ("st0p", 0.89, "stop"),
        ("125", 0.90, "125"),
        ("125", 0.89, None),
        ("125", 0.79, None),
        # marks at the ends are cut off, signs with a meaning stay
        ("“STOP!”", 0.85, "stop"),
        ("50%", 0.95, "50%"),
        ("B&B.", 0.95, "b&b"),
        # single letters and other scripts are dropped
        ("A", 1.0, None),
        ("5.", 1.0, None),
        ("--", 1.0, None),
        ("出口", 1.0, None),
        ("出口ab", 1.0, None),
        ("выход", 1.0, None),
        ("Café", 0.99, "café"),
        ("ＥＸＩＴ", 0.85, "exit"),
    ],
)
def test_words_are_kept_replaced_or_dropped(text, score, expected):
    word = accept_word(Word(text, score, SQUARE), LEXICON)
    assert (word and word.text) == expected
    if word:
        assert word.score == score and word.corners is SQUARE


def test_words_are_painted_as_polygons_with_the_first_in_front():
    words = [
        Word("a1", 0.9, box(20, 10, 60, 30)),
        Word("b2", 0.8, box(40, 20, 100, 40)),
        Word("c3", 1.0, np.float32([[150, 50], [200, 75], [150, 100], [100, 75]])),
    ]
    result = words_output(words, (100, 200), 100)
    expected = np.full((100, 100), 255, np.uint8)
    expected[20:40, 20:50] = 1
    expected[10:30, 10:30] = 0
    assert (result.plane[:, :50] == expected[:, :50]).all()
    assert result.table == {0: "a1", 1: "b2", 2: "c3"}
    assert result.boxes[0] == pytest.approx((0.1, 0.1, 0.3, 0.3, 0.9))
    assert result.boxes[2] == pytest.approx((0.5, 0.5, 1.0, 1.0, 1.0))
    # a diamond, not its box
    diamond = result.plane[50:, 50:] == 2
    assert diamond[25, 25] and diamond[25, 4] and diamond[4, 25]
    assert not diamond[5, 5] and not diamond[45, 45] and not diamond[5, 45] and not diamond[45, 5]
    assert diamond.mean() == pytest.approx(0.5, abs=0.05)


def test_no_words_give_a_background_map():
    result = words_output([], (30, 40), 16)
    assert (result.plane == 255).all() and result.plane.dtype == np.uint8
    assert not result.table and not result.boxes


def test_at_most_254_words_are_kept():
    words = [Word(f"w{i}", 1.0, box(i, 0, i + 1, 1)) for i in range(300)]
    result = words_output(words, (1, 300), 600)
    assert list(sorted(result.table)) == list(range(MAX_WORDS)) and MAX_WORDS == 254
    assert (result.plane[:, 508:] == 255).all()
    assert set(np.unique(result.plane)) == {*range(254), 255}


def test_found_tiny():
    """However small a word is, it has a pixel."""
    result = words_output(
        [Word("ab", 1.0, box(41, 61, 42, 62)), Word("cd", 1.0, box(99.9, 99.9, 100, 100))], (100, 100), 10
    )
    assert np.argwhere(result.plane == 0).tolist() == [[6, 4]]
    assert np.argwhere(result.plane == 1).tolist() == [[9, 9]]


def test_a_word_is_cut_at_the_border_of_the_image():
    result = words_output([Word("ab", 1.0, box(-5, 2, 45, 20))], (10, 40), 20)
    assert result.boxes[0] == pytest.approx((0, 0.2, 1, 1, 1))
    assert (result.plane[4:] == 0).all() and (result.plane[:4] == 255).all()


def outputs(text: str, letters: list[str], scores: list[float]) -> np.ndarray:
    """The output of a recogniser that sees one character in each column; "_" is no letter."""
    probabilities = np.zeros((len(text), len(letters) + 1), np.float32)
    for column, (character, score) in enumerate(zip(text, scores, strict=True)):
        entry = 0 if character == "_" else letters.index(character) + 1
        probabilities[column] = (1 - score) / len(letters)
        probabilities[column, entry] = score
    return probabilities


class TestSplitLine:
    letters = list("abcde ")

    def read(self, text, quad=None, width=None, scores=None):
        padded = 8 * len(text)
        quad = box(0, 0, padded, 48) if quad is None else quad
        scores = scores or [0.9] * len(text)
        return split_line(outputs(text, self.letters, scores), self.letters, quad, width or padded, padded)

    def test_a_letter_over_several_columns_is_one_unless_no_letter_is_between(self):
        assert [word.text for word in self.read("_aab_bb_c")] == ["abbc"]

    def test_a_line_without_letters_has_no_words(self):
        assert self.read("____") == [] and self.read("_  _") == []

    def test_the_score_of_a_word_is_the_mean_over_the_first_columns_of_its_letters(self):
        scores = [0.5, 0.9, 0.7, 0.3, 0.8, 0.6, 0.95]
        first, second = self.read("_aab dc", scores=[*scores[:3], 0.7, 0.4, *scores[5:]])
        assert first.score == pytest.approx((0.9 + 0.7) / 2) and second.score == pytest.approx((0.6 + 0.95) / 2)

    def test_a_word_ends_near_its_last_letter_or_half_way_to_the_next_word(self):
        first, second = self.read("ab cd")
        # the letters have their centres at 4, 12, 28 and 36
        assert np.allclose(first.corners, box(0, 0, 18, 48)) and np.allclose(second.corners, box(22, 0, 40, 48))
        first, second = self.read("a b")
        assert np.allclose(first.corners, box(0, 0, 12, 48)) and np.allclose(second.corners, box(12, 0, 24, 48))

    def test_the_padding_behind_a_line_does_not_count(self):
        first, second = self.read("a b_____", quad=box(100, 50, 148, 98), width=24)
        assert np.allclose(first.corners, box(100, 50, 124, 98))
        assert np.allclose(second.corners, box(124, 50, 148, 98))

    def test_a_slanted_line_has_slanted_words(self):
        quad = np.float32([[0, 0], [100, 50], [90, 70], [-10, 20]])
        first, second = self.read("a b", quad=quad)
        assert np.allclose(first.corners, [[0, 0], [50, 25], [40, 45], [-10, 20]])
        assert np.allclose(second.corners, [[50, 25], [100, 50], [90, 70], [40, 45]])


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return RapidOcr.load()


def drawn(size: tuple[int, int], texts: list[tuple[str, tuple[int, int], int]]) -> Image.Image:
    image = Image.new("RGB", size, (40, 90, 60))
    draw = ImageDraw.Draw(image)
    for text, place, height in texts:
        draw.text(place, text, (250, 240, 220), font=ImageFont.load_default(height))
    return image


def batch(*images: Image.Image, label_size: int = 240) -> Images:
    """Each image at the top left of a grey square of 960 x 960."""
    pixels = np.full((len(images), 960, 960, 3), 114, np.uint8)
    for square, image in zip(pixels, images, strict=True):
        square[: image.height, : image.width] = image
    sizes = [(image.height, image.width) for image in images]
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), sizes, label_size)


SIGN = [("COFFEE SHOP", (60, 80), 64), ("open 24 hours", (300, 300), 40)]


def test_two_lines_are_read_in_order_and_painted_in_place(network):
    result = network.predict(batch(drawn((800, 480), SIGN)), {})[0]
    assert [result.table[i] for i in sorted(result.table)] == ["coffee", "shop", "open", "24", "hours"]
    assert all(box[4] > 0.9 for box in result.boxes.values())
    assert result.plane.shape == (240, 240) and result.plane.dtype == np.uint8
    assert set(np.unique(result.plane)) == {0, 1, 2, 3, 4, 255}
    font = ImageFont.load_default(64)
    blank = 60 + font.getlength("COFFEE")
    left, top, right, bottom, _ = result.boxes[0]
    assert left * 800 == pytest.approx(60, abs=12) and right * 800 == pytest.approx(blank, abs=14)
    assert top * 480 == pytest.approx(95, abs=16) and bottom * 480 == pytest.approx(145, abs=16)
    for index, (left, top, right, bottom, _) in result.boxes.items():
        rows, columns = np.nonzero(result.plane == index)
        assert columns.min() / 240 == pytest.approx(left, abs=0.01) and rows.min() / 240 == pytest.approx(top, abs=0.01)
        assert (columns.max() + 1) / 240 == pytest.approx(right, abs=0.01)
        assert (rows.max() + 1) / 240 == pytest.approx(bottom, abs=0.01)


def test_an_image_reads_the_same_alone_and_in_a_batch_whatever_its_padding_holds(network):
    drawings = drawn((800, 480), SIGN), drawn((480, 800), [("EXIT", (100, 300), 90)]), drawn((960, 960), [])
    together = network.predict(batch(*drawings), {})
    assert [list(result.table.values()) for result in together[1:]] == [["exit"], []]
    for drawing, result in zip(drawings, together, strict=True):
        images = batch(drawing)
        images.pixels[:, :, drawing.height :] = 255
        alone = network.predict(images, {})[0]
        assert (alone.plane == result.plane).all()
        assert alone.table == result.table and alone.boxes == result.boxes


@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270], ids=["up", "down"])
def test_text_that_runs_up_or_down_is_read_in_its_own_order(network, turn):
    result = network.predict(batch(drawn((800, 480), [("COFFEE SHOP", (150, 200), 70)]).transpose(turn)), {})[0]
    assert [result.table[i] for i in sorted(result.table)] == ["coffee", "shop"]
    (_, top, _, bottom, _), (_, other_top, _, other_bottom, _) = result.boxes[0], result.boxes[1]
    if turn == Image.Transpose.ROTATE_90:
        assert other_bottom <= top + 0.01
    else:
        assert bottom <= other_top + 0.01


@pytest.mark.parametrize("size", [(960, 1), (1, 960), (960, 12), (12, 960)])
def test_a_thin_image_has_no_words(network, size):
    result = network.predict(batch(drawn(size, [])), {})[0]
    assert not result.table and (result.plane == 255).all()


def test_the_detector_reads_bgr(network, monkeypatch):
    """rapidocr expects OpenCV's order of channels."""
    asked = []
    detector = network._detector
    monkeypatch.setattr(network, "_detector", lambda image, **flags: asked.append(image) or detector(image, **flags))
    network.predict(batch(Image.new("RGB", (64, 32), (200, 100, 50))), {})
    assert asked[0].shape == (32, 64, 3) and asked[0].flags.c_contiguous
    assert (asked[0] == [50, 100, 200]).all()


def test_networks_and_a_lexicon_from_a_folder_change_the_version(network, tmp_path):
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    for name in ("PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"):
        shutil.copy(models / name, tmp_path)
    same = RapidOcr.load(tmp_path)
    assert same.version == network.version and len(same.version) == 12
    (tmp_path / "lexicon.txt").write_text("cofee\nshop\n")
    other = RapidOcr.load(tmp_path)
    assert other.version != network.version and len(other._lexicon._entries) == 2
    (tmp_path / "PP-OCRv6_det_small.onnx").unlink()
    with pytest.raises(ValueError, match=r"holds 0 \*det\*.onnx, 1 \*rec\*.onnx and a lexicon.txt; put one network"):
        RapidOcr.load(tmp_path)
    (tmp_path / "PP-OCRv6_rec_small.onnx").unlink()
    assert RapidOcr.load(tmp_path).version == other.version


def test_incomplete_and_foreign_networks_are_refused(network, tmp_path):
    import rapidocr

    with pytest.raises(ValueError, match="put one network of each kind there"):
        RapidOcr.load(tmp_path)
    # a detector in the place of the recogniser
    detector = Path(rapidocr.__file__).parent / "models" / "PP-OCRv6_det_small.onnx"
    shutil.copy(detector, tmp_path / "det.onnx")
    shutil.copy(detector, tmp_path / "rec.onnx")
    with pytest.raises(ValueError, match="give a recogniser of rapidocr"):
        RapidOcr.load(tmp_path)
    (tmp_path / "rec.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="cannot be read as an ONNX network"):
        RapidOcr.load(tmp_path)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingWeights, match=r"pip install 'prismer-vlm\[experts\]'"):
        RapidOcr.load()


def test_loading_and_reading_print_nothing_and_open_no_connection():
    pytest.importorskip("rapidocr")
    code = """
import socket
socket.socket.connect = socket.getaddrinfo = lambda *_: exec("raise AssertionError('a connection was opened')")
import torch
from prismer.dataloading.experts.network import Images
from prismer.dataloading.experts.words import RapidOcr
pixels = torch.full((1, 3, 96, 96), 114, dtype=torch.uint8)
found = RapidOcr.load().predict(Images(pixels, [(96, 96)], 24), {})
assert not found[0].table
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Recogniser:
    """Keeps the line image that it receives, and reads nothing in it."""

    name = "x"

    def get_inputs(self):
        return [self]

    def run(self, outputs, inputs):
        self.line = inputs["x"]
        return [np.tile(np.float32([1, 0, 0]), (1, self.line.shape[-1] // 8, 1))]


def test_a_line_is_upright_48_high_and_padded_with_zeros_to_a_multiple_of_32_columns():
    pytest.importorskip("cv2")
    # BGR: the left half of the line is blue, the right half red, the lower half white
    image = np.zeros((200, 300, 3), np.uint8)
    image[50:65, 20:65] = [255, 0, 0]
    image[50:65, 65:110] = [0, 0, 255]
    image[65:80, 20:110] = 255
    quad = box(20, 50, 110, 80)
    for turns in range(4):
        recogniser, lines = Recogniser(), SimpleNamespace(boxes=quad[None])
        network = RapidOcr(lambda *_, lines=lines, **__: lines, recogniser, ["a", " "], LEXICON, "v")
        assert network.read(np.ascontiguousarray(image)) == []
        line = recogniser.line
        assert line.shape == (1, 3, 48, 160) and line.dtype == np.float32
        for rows, columns, colour in (
            (slice(2, 21), slice(3, 69), [1, -1, -1]),
            (slice(2, 21), slice(76, 141), [-1, -1, 1]),
            (slice(27, 46), slice(3, 141), [1, 1, 1]),
            (slice(0, 48), slice(144, 160), [0, 0, 0]),
        ):
            assert np.allclose(line[0, :, rows, columns], np.float32(colour)[:, None, None], atol=0.02), turns
        # turns the image, and the corners of the line with it
        quad = np.stack([quad[:, 1], image.shape[1] - quad[:, 0]], axis=1)
        image = np.rot90(image)
