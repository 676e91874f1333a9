"""Proves that a contact sheet shows each column in its place and colours, and writes the texts.

python -m pytest tests/data/test_contact_sheet.py
"""

import io

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.store.label_maps import blank_planes
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.dataloading.views.contact_sheet import colour_map, contact_sheet, draw_sheet, one_line
from prismer.experts import EXPERTS

CLASSES = {"seg": ["ground", "sky"], "obj_detection": ["cube"]}


def make_sample(i=0, size=(40, 40), experts=tuple(EXPERTS), **meta):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "JPEG", quality=95)
    labels = {name: blank_planes(name, 32) for name in experts}
    if "seg" in labels:
        labels["seg"][:16], labels["seg"][16:] = 1, 0
    if "obj_detection" in labels:
        labels["obj_detection"][8:24, 8:24] = 0
    meta = {"captions": ["a cube"], "questions": [], "instances": {"0": 0}, "words": {}, **meta}
    return Sample(f"key{i}", file.getvalue(), labels, meta)


def cell(sheet, row, column, tile=208, row_height=None):
    """The pixels of one cell in a sheet whose rows are equally high."""
    left = 24 + column * (tile + 8)
    top = 44 + (row * row_height if row else 0)
    return np.asarray(sheet)[top : top + tile, left : left + tile].astype(int)


def test_columns_are_in_their_places():
    sheet = contact_sheet([make_sample()], CLASSES)
    assert sheet.width == 2 * 24 + 7 * 208 + 6 * 8
    assert np.abs(cell(sheet, 0, 0)[1:-1, 1:-1] - (200, 30, 30)).max() < 6, "the image"
    assert (cell(sheet, 0, 1)[5, 5] == colour_map("depth", np.zeros((1, 1), np.uint8))[0, 0]).all()
    seg = cell(sheet, 0, 3)
    sky, ground = colour_map("seg", np.array([[1, 0]], np.uint8))[0].astype(int)
    assert (seg[5, 5] == sky).all() and (seg[-5, 5] == ground).all() and (sky != ground).any()
    objects = cell(sheet, 0, 5)
    assert np.ptp(objects[5, 5]) == 0, "outside the box the image is grey"
    assert np.ptp(objects[104, 104]) > 30, "inside the box it is tinted"


def test_experts_without_maps_get_no_column_and_missing_maps_an_empty_cell():
    with_depth, without = make_sample(experts=("depth",)), make_sample(1, experts=())
    sheet = contact_sheet([with_depth, without], CLASSES)
    assert sheet.width == 2 * 24 + 2 * 208 + 8, "no columns for experts without a map"
    row = (sheet.height - 44 - 4) // 2
    assert cell(sheet, 1, 1, row_height=row).min() > 80, "an empty cell is nearly white; the far end of depth is black"
    assert cell(sheet, 0, 1).min() == 0


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (1, 40)])
def test_images_keep_their_proportions(size):
    sheet = contact_sheet([make_sample(size=size, experts=("edge",))], CLASSES)
    red = np.abs(cell(sheet, 0, 0) - (200, 30, 30)).max(-1) < 12
    height, width = (int(red.any(axis).sum()) for axis in (1, 0))
    scale = 208 / max(size)
    assert abs(width - size[0] * scale) <= 3 and abs(height - size[1] * scale) <= 3


def test_texts_make_a_sheet_higher():
    plain = contact_sheet([make_sample(captions=[])], CLASSES)
    short = contact_sheet([make_sample()], CLASSES)
    long = contact_sheet([make_sample(captions=["word " * 200])], CLASSES)
    questions = [{"question": "what?", "answers": [{"answer": "cube", "weight": 1.0}]}]
    asked = contact_sheet([make_sample(questions=questions, **{"class": "tench"})], CLASSES)
    assert plain.height < short.height < asked.height < long.height


def test_ids_have_colours_of_their_own():
    colours = colour_map("seg", np.arange(256, dtype=np.uint8)[None])[0].astype(int)
    near = np.abs(colours[:20, None] - colours[None, :20]).sum(-1) + 999 * np.eye(20)
    assert near.min() > 25
    assert colours[255].min() > 235, "the background is nearly white"


def test_an_unnamed_class_is_shown_by_its_number():
    assert contact_sheet([make_sample()], {}).height == contact_sheet([make_sample()], CLASSES).height


def test_missing_samples_and_damaged_images_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        contact_sheet([], CLASSES)
    sample = make_sample()
    sample.jpeg = b"\xff\xd8"
    with pytest.raises(ValueError, match="image of key0 does not decode"):
        contact_sheet([sample], CLASSES)


@pytest.mark.parametrize(("name", "form"), [("s.png", "PNG"), ("s.jpg", "JPEG")])
def test_a_sheet_is_written_as_png_or_jpeg(tmp_path, name, form):
    with ShardWriter(tmp_path / "data", classes=CLASSES, source="") as writer:
        for i in range(3):
            writer.write(make_sample(i))
    dataset = ShardDataset(tmp_path / "data")
    draw_sheet(dataset, tmp_path / name, count=8, start=1)
    with Image.open(tmp_path / name) as sheet:
        expected = contact_sheet([make_sample(1), make_sample(2)], CLASSES)
        assert (sheet.format, sheet.size) == (form, expected.size)
        if form == "PNG":
            np.testing.assert_array_equal(np.asarray(sheet), np.asarray(expected))
    for start, count in ((3, 1), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="choose others"):
            draw_sheet(dataset, tmp_path / "t.png", count=count, start=start)


@pytest.mark.parametrize(
    "meta", [{"captions": 5}, {"captions": ["\ud800"]}, {"questions": [{"question": 5}]}, {"words": [1]}], ids=ascii
)
def test_texts_and_tables_of_wrong_types_are_refused_in_one_sentence(meta):
    with pytest.raises(ValueError, match="the sample key0 cannot be shown: "):
        contact_sheet([make_sample(**meta)], CLASSES)


@pytest.mark.parametrize("end", ("\x85", "\u2028", "\u2029", "\n", "\x1c"))
def test_a_name_with_a_line_end_is_drawn_on_one_line(end):
    assert one_line(f"a{end}b") == "a b"
    sample = make_sample(words={"0": f"a{end}b"})
    sample.labels["ocr_detection"][:] = 0
    contact_sheet([sample], CLASSES)
