"""Proves that batches decoded by DALI have the pixels of `load_image`, and that a broken image costs no
other image its own.

Run: pytest tests/data/test_decoder.py
"""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.dataloading.feed import decoder as module
from prismer.dataloading.feed.decoder import ImageDecoder
from prismer.dataloading.feed.load_image import load_image

SIZE = 48


def photo(width=70, height=60, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray(np.asarray(smooth) ^ rng.integers(0, 8, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# name -> the image, and whether DALI is to decode it
IMAGES = {
    "jpeg": (encoded(photo()), True),
    "jpeg-4:4:4": (encoded(photo(131, 77, 1), subsampling=0, quality=98), True),
    "jpeg-4:2:2": (encoded(photo(133, 79, 2), subsampling=1, quality=60), True),
    "jpeg-progressive": (encoded(photo(151, 149, 3), progressive=True, quality=30), True),
    "jpeg-small": (encoded(photo(3, 5, 4)), True),
    "jpeg-of-the-size": (encoded(photo(SIZE, SIZE, 5)), True),
    "jpeg-large": (encoded(photo(4 * SIZE, 5 * SIZE, 6)), False),
    "jpeg-wide": (encoded(photo(30 * SIZE, SIZE, 7)), True),
    "jpeg-turned": (encoded(photo(), exif=turned()), False),
    "jpeg-grey": (encoded(photo().convert("L")), False),
    "jpeg-cmyk": (encoded(photo().convert("CMYK")), False),
    "png": (encoded(photo(), "PNG"), False),
    "png-transparent": (encoded(photo().convert("RGBA").rotate(20), "PNG"), False),
    "png-16-bit": (encoded(Image.fromarray(np.arange(4200, dtype=np.uint16).reshape(60, 70) * 15), "PNG"), False),
    "webp": (encoded(photo(), "WEBP"), False),
    "gif": (encoded(photo(), "GIF"), False),
    "tiff": (encoded(photo(), "TIFF"), False),
}
BROKEN = {
    "nothing": b"",
    "text": b"this is no image",
    "cut": encoded(photo(131, 77, 1), quality=98)[:900],
    "header-alone": encoded(photo())[:30],
    "png-cut": encoded(photo(), "PNG")[:2000],
}


@pytest.fixture(scope="module")
def decoder():
    return ImageDecoder(SIZE, batch_size=32)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def loaded(monkeypatch):
    """The images that `load_image` decodes for the decoder."""
    found = []

    def load(data, size):
        found.append(data)
        return load_image(data, size)

    monkeypatch.setattr(module, "load_image", load)
    return found


def assert_same(name, pixels, data, exactly=False):
    """The pixels of `load_image`, in which a decoder of another version may round a few in its own way."""
    expected = load_image(data, SIZE)
    assert pixels.shape == expected.shape and pixels.dtype == torch.uint8
    difference = (pixels.int() - expected.int()).abs().float().mean()
    assert difference <= (0 if exactly else 0.02), name


def test_pixels_are_those_of_load_image_and_dali_decodes_what_it_can(decoder, pool, loaded):
    results = decoder([data for data, _ in IMAGES.values()], pool)
    for (name, (data, by_dali)), pixels in zip(IMAGES.items(), results, strict=True):
        assert_same(name, pixels, data, exactly=not by_dali)
    files = [data for data in loaded if isinstance(data, bytes)]
    assert sorted(files) == sorted(data for data, by_dali in IMAGES.values() if not by_dali)


def test_a_broken_image_has_the_reason_of_load_image_and_costs_no_other_its_pixels(decoder, pool):
    whole = [data for data, _ in IMAGES.values()]
    mixed = [*whole[:3], *BROKEN.values(), *whole[3:]]
    results = decoder(mixed, pool)
    for data, result in zip(mixed, results, strict=True):
        if data in BROKEN.values():
            with pytest.raises(ValueError) as refused:
                load_image(data, SIZE)
            assert isinstance(result, ValueError) and str(result) == str(refused.value)
        else:
            assert_same(data[:20], result, data)
    assert all(isinstance(result, ValueError) for result in decoder(list(BROKEN.values()), pool))


@pytest.mark.parametrize("end", [b"", b"\0" * 10])
def test_what_dali_refuses_is_left_to_load_image(pool, monkeypatch, end):
    # as if all images looked like JPEGs that DALI reads
    monkeypatch.setattr(ImageDecoder, "_is_for_dali", lambda decoder, data: True)
    whole = IMAGES["jpeg"][0] + end
    results = ImageDecoder(SIZE, batch_size=8)([BROKEN["cut"], whole, BROKEN["text"], whole, IMAGES["gif"][0]], pool)
    assert [isinstance(result, ValueError) for result in results] == [True, False, True, False, False]
    assert_same("jpeg", results[1], whole)
    assert torch.equal(results[4], load_image(IMAGES["gif"][0], SIZE))


def test_a_jpeg_without_its_end_mark_does_not_fail_the_batch(decoder, pool, monkeypatch):
    monkeypatch.setattr("prismer.dataloading.feed.dali.Graph._find_undecodable", None)
    results = decoder([IMAGES["jpeg"][0], *BROKEN.values()], pool)
    assert [isinstance(result, ValueError) for result in results] == [False] + [True] * len(BROKEN)
