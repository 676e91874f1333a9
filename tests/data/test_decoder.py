"""Proves that batches have the pixels of `load_image`, and that a broken image costs no other image its own; the way of
a GPU is taken with DALI's operators for the CPU.

Run: pytest tests/data/test_decoder.py
"""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.dataloading.feed import dali
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


# name -> the image, and whether DALI is to decode it on a GPU
IMAGES = {
    "jpeg": (encoded(photo()), True),
    "jpeg-4:4:4": (encoded(photo(131, 77, 1), subsampling=0, quality=98), True),
    "jpeg-4:2:2": (encoded(photo(133, 79, 2), subsampling=1, quality=60), True),
    "jpeg-progressive": (encoded(photo(151, 149, 3), progressive=True, quality=30), True),
    "jpeg-small": (encoded(photo(3, 5, 4)), True),
    "jpeg-of-the-size": (encoded(photo(SIZE, SIZE, 5)), True),
    "jpeg-large": (encoded(photo(4 * SIZE, 5 * SIZE, 6)), True),
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
def by_dali():
    """A decoder that hands JPEGs to DALI, as on a GPU."""
    decoder = ImageDecoder(SIZE, batch_size=32)
    decoder._graph = dali.Graph(decoder._define, batch_size=32)
    return decoder


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


def assert_near(name, pixels, data):
    """The pixels of `load_image`, but for roundings of a resize; large JPEGs are decoded smaller by `load_image`."""
    expected = load_image(data, SIZE)
    assert pixels.shape == expected.shape and pixels.dtype == torch.uint8
    difference = (pixels.int() - expected.int()).abs().float().mean()
    assert difference <= 2, (name, difference)


def test_on_a_cpu_the_pixels_are_those_of_load_image(decoder, pool):
    results = decoder([data for data, _ in IMAGES.values()], pool)
    for (name, (data, _)), pixels in zip(IMAGES.items(), results, strict=True):
        assert torch.equal(pixels, load_image(data, SIZE)), name


def test_dali_decodes_what_it_can(by_dali, pool, loaded):
    results = by_dali([data for data, _ in IMAGES.values()], pool)
    for (name, (data, _)), pixels in zip(IMAGES.items(), results, strict=True):
        assert_near(name, pixels, data)
    assert sorted(loaded) == sorted(data for data, is_for_dali in IMAGES.values() if not is_for_dali)


@pytest.mark.parametrize("kind", ["decoder", "by_dali"])
def test_a_broken_image_has_the_reason_of_load_image_and_costs_no_other_its_pixels(request, kind, pool):
    decoder = request.getfixturevalue(kind)
    whole = {name: data for name, (data, _) in IMAGES.items()}
    mixed = [*BROKEN.items(), *whole.items()]
    # broken ones between whole ones
    mixed = mixed[::2] + mixed[1::2]
    results = decoder([data for _, data in mixed], pool)
    for (name, data), result in zip(mixed, results, strict=True):
        if name in BROKEN:
            with pytest.raises(ValueError) as refused:
                load_image(data, SIZE)
            assert isinstance(result, ValueError) and str(result) == str(refused.value)
        else:
            assert_near(name, result, data)
    assert all(isinstance(result, ValueError) for result in decoder(list(BROKEN.values()), pool))


@pytest.mark.parametrize("end", [b"", b"\0" * 10])
def test_what_dali_refuses_is_left_to_load_image(by_dali, pool, monkeypatch, end):
    # as if all images looked like JPEGs that DALI reads
    monkeypatch.setattr(module, "_is_for_dali", lambda data: True)
    whole = IMAGES["jpeg"][0] + end
    results = by_dali([BROKEN["cut"], whole, BROKEN["text"], whole, IMAGES["gif"][0]], pool)
    assert [isinstance(result, ValueError) for result in results] == [True, False, True, False, False]
    assert_near("jpeg", results[1], whole)
    assert torch.equal(results[4], load_image(IMAGES["gif"][0], SIZE))


def test_a_jpeg_without_its_end_mark_does_not_fail_the_batch(by_dali, pool, monkeypatch):
    monkeypatch.setattr("prismer.dataloading.feed.dali.Graph._find_undecodable", None)
    results = by_dali([IMAGES["jpeg"][0], *BROKEN.values()], pool)
    assert [isinstance(result, ValueError) for result in results] == [False] + [True] * len(BROKEN)
