"""Proves that images of any format become upright RGB JPEGs, and that damaged ones are refused.

python -m pytest tests/data/test_rgb.py
"""

import io

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.feed.load_image import load_image
from prismer.dataloading.feed.rgb import to_jpeg
from tests.data.import_sources import encode, gradient


def test_an_rgb_jpeg_is_kept_byte_for_byte():
    for settings in ({}, {"quality": 40}, {"progressive": True}):
        data = encode(gradient(), **settings)
        assert to_jpeg(data) == (data, (12, 20), 1)
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encode(gradient(), exif=exif)
    assert to_jpeg(data)[0] is data


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(size=(32, 16)), exif=exif, quality=95)
    jpeg, size, undone = to_jpeg(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    result = Image.open(io.BytesIO(jpeg))
    assert undone == orientation and size == (expected.height, expected.width)
    assert result.getexif().get(0x0112, 1) == 1
    error = np.asarray(result).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(error).mean() < 3


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("TIFF", "CMYK"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
    ],
)
def test_other_images_become_rgb_jpegs(form, mode):
    image = gradient(mode=mode, size=(32, 16))
    jpeg, size, _ = to_jpeg(encode(image, form, **({"quality": 95} if form == "JPEG" else {})))
    result = Image.open(io.BytesIO(jpeg))
    assert (result.format, result.mode, size) == ("JPEG", "RGB", (16, 32))
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(np.asarray(result).astype(int) - expected).mean() < (16 if mode == "1" else 4)


def test_16_bit_greys_keep_their_range():
    ramp = np.linspace(0, 65535, 32 * 16).reshape(16, 32).astype(np.uint16)
    jpeg, _, _ = to_jpeg(encode(Image.fromarray(ramp), "PNG"))
    result = np.asarray(Image.open(io.BytesIO(jpeg)))[..., 0].astype(int)
    assert np.abs(result - ramp // 257).max() < 8


def test_transparency_lies_on_white():
    image = gradient(mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    result = np.asarray(Image.open(io.BytesIO(to_jpeg(encode(image, "PNG"))[0]))).astype(int)
    assert result[0].min() > 235, "the transparent side is white"
    assert np.abs(result[-1] - np.asarray(image)[-1, :, :3]).mean() < 25


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8garbage",
        b"<html>404</html>",
        encode(gradient(size=(64, 64)))[:-200],
        encode(gradient(size=(64, 64)), "PNG")[:-60],
        encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    ],
    ids=["empty", "garbage", "html", "short jpeg", "short png", "float"],
)
def test_undecodable_images_are_refused(data):
    with pytest.raises(ValueError, match="the image "):
        to_jpeg(data)


def broken_png():
    """A PNG with one damaged byte in its middle."""
    rng = np.random.default_rng(0)
    data = bytearray(encode(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG"))
    data[len(data) // 2] ^= 255
    return bytes(data)


def test_an_import_and_a_question_refuse_the_same_damaged_image(tmp_path):
    data = broken_png()
    for whole in (True, False):
        with pytest.raises(ValueError, match="cannot be decoded"):
            to_jpeg(data, whole=whole)
    with pytest.raises(ValueError):
        load_image(data, 32)
