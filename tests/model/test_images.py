"""Proves that images of every kind become the square RGB tensor that training reads, that broken ones are refused in
one sentence, and that expert labels are read as the loader reads them. Run: pytest tests/model/test_images.py"""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.config import prismer_base, prismer_tiny
from prismer.dataloading.feed.image_batch import ExpertLabels, image_batch
from prismer.dataloading.feed.load_image import load_image, load_images
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.scenes.dataset import OBJECT_CLASSES, SEG_CLASSES, render_scene
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.label_maps import pack_labels
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.experts import EXPERTS

SIZE = 32
CLASSES = {"seg": SEG_CLASSES, "obj_detection": OBJECT_CLASSES}


def gradient(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right, green downwards: every rotation and channel swap shows."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 40)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expected(image: Image.Image) -> torch.Tensor:
    square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def assert_near(got: torch.Tensor, wanted: torch.Tensor, levels: int) -> None:
    assert got.dtype == torch.uint8 and got.shape == (3, SIZE, SIZE) and got.is_contiguous()
    assert (got.int() - wanted.int()).abs().max() <= levels


RGB = gradient()
GREY = RGB.convert("L")
# 200 more than the exact values, which 8 bits do not show
SIXTEEN = Image.fromarray(np.minimum(np.asarray(GREY).astype(np.uint32) * 257 + 200, 65535).astype(np.uint16))
# name -> (bytes, the image they show, grey levels lost by compression)
KINDS = {
    "png": (encoded(RGB, "PNG"), RGB, 0),
    "jpeg": (encoded(RGB, "JPEG", quality=95), RGB, 12),
    "progressive-jpeg": (encoded(RGB, "JPEG", quality=95, progressive=True), RGB, 12),
    "webp": (encoded(RGB, "WEBP", lossless=True), RGB, 0),
    "bmp": (encoded(RGB, "BMP"), RGB, 0),
    "tiff": (encoded(RGB, "TIFF"), RGB, 0),
    "gif": (encoded(RGB, "GIF"), RGB.convert("P"), 40),
    "grey": (encoded(GREY, "PNG"), GREY, 0),
    "grey-jpeg": (encoded(GREY, "JPEG", quality=95), GREY, 12),
    "bilevel": (encoded(GREY.convert("1"), "PNG"), GREY.convert("1"), 0),
    "palette": (encoded(RGB.quantize(256), "PNG"), RGB.quantize(256), 0),
    "16-bit-png": (encoded(SIXTEEN, "PNG"), GREY, 0),
    "16-bit-pgm": (encoded(SIXTEEN, "PPM"), GREY, 0),
    "16-bit-tiff": (encoded(SIXTEEN, "TIFF"), GREY, 0),
    "cmyk-jpeg": (encoded(RGB.convert("CMYK"), "JPEG", quality=95), RGB, 12),
    "cmyk-tiff": (encoded(RGB.convert("CMYK"), "TIFF"), RGB, 0),
    "one-pixel": (encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), Image.new("RGB", (1, 1), (9, 8, 7)), 0),
    "one-row": (encoded(RGB.crop((0, 0, 80, 1)), "PNG"), RGB.crop((0, 0, 80, 1)), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_load_image_reads_every_kind(kind, tmp_path):
    data, image, levels = KINDS[kind]
    assert_near(load_image(data, SIZE), expected(image), levels)
    path = tmp_path / "no-suffix-needed"
    path.write_bytes(data)
    assert torch.equal(load_image(str(path), SIZE), load_image(data, SIZE))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(kind, tmp_path):
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    image.paste((0, 90, 0, 255), (20, 0, 40, 40))
    image = {"RGBA": image, "LA": image.convert("LA"), "PA": image.quantize(16)}[kind]
    got = load_image(encoded(image, "PNG"), 40)
    assert (got[:, :, :18] == 255).all()
    assert (got[:, :, 22:] < 120).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    undo = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ][orientation - 1]
    stored = RGB.transpose(undo) if undo is not None else RGB
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    assert_near(load_image(data, SIZE), expected(RGB), 12)
    assert_near(load_image(Image.open(io.BytesIO(data)), SIZE), expected(RGB), 12)


def test_an_image_with_damaged_exif_loads():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    data = encoded(RGB, "JPEG", quality=95, exif=exif)
    # Pillow's own warning
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        got = load_image(data, SIZE)
    assert_near(got, expected(RGB), 12)


def test_an_animation_gives_its_first_frame_and_warns_once():
    frames = [RGB, Image.new("RGB", RGB.size, "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        first = load_image(data, SIZE)
        load_image(data, SIZE)
    assert_near(first, expected(RGB), 0)
    assert [str(w.message) for w in seen] == ["an image has several frames or pages; only the first is used"]


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    blocks = np.random.default_rng(0).integers(0, 256, (70, 92, 3), dtype=np.uint8)
    image = Image.fromarray(blocks.repeat(7, 0).repeat(7, 1))
    data = encoded(image, "JPEG", quality=92)
    decoded = Image.open(io.BytesIO(data))
    decoded.draft(None, (2 * SIZE, 2 * SIZE))
    # of 644
    assert max(decoded.size) < 200
    got, wanted = load_image(data, SIZE).float(), expected(Image.open(io.BytesIO(data))).float()
    # blocks of random colours are the worst case: 3 levels; at the next smaller size they would be 9
    assert (got - wanted).square().mean().sqrt() < 4


def test_arrays_and_tensors_load():
    pixels = np.array(RGB)
    wanted = expected(RGB)
    assert torch.equal(load_image(pixels, SIZE), wanted)
    assert torch.equal(load_image(torch.from_numpy(pixels).permute(2, 0, 1), SIZE), wanted)
    assert torch.equal(load_image(pixels[::-1][::-1], SIZE), wanted)
    assert torch.equal(load_image(np.asarray(SIXTEEN), SIZE), expected(GREY))
    assert torch.equal(load_image(np.asarray(GREY)[..., None], SIZE), expected(GREY))
    rgba = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])
    assert (load_image(rgba, SIZE) == 255).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((8,), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8),
    ],
    ids=["float", "two-channels", "one-axis", "no-rows", "channels-last-tensor", "float-tensor"],
)
def test_arrays_of_other_shapes_and_dtypes_are_refused(array):
    with pytest.raises(ValueError, match=r"expected|no pixels"):
        load_image(array, SIZE)


def huge_png() -> bytes:
    """60000 x 60000 pixels in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"this is no image at all", "not an image"),
    "html": (b"<!doctype html><html>404</html>", "not an image"),
    "bomb": (huge_png(), "million pixels; shrink it"),
    "float": (encoded(GREY.convert("F"), "TIFF"), "floating-point"),
    "32-bit": (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "more than 16 bits"),
    **{
        f"truncated-{kind}-{keep}": (KINDS[kind][0][: int(len(KINDS[kind][0]) * keep)], "damaged|not an image")
        for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp")
        for keep in (0.04, 0.3, 0.8)
    },
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_in_one_sentence(kind, tmp_path):
    data, words = BROKEN[kind]
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source, name in ((path, str(path)), (data, f"the image of {len(data)} bytes")):
        with pytest.raises(ValueError, match=words) as error:
            load_image(source, SIZE)
        sentence = str(error.value)
        assert sentence.startswith(name) and "\n" not in sentence


def test_flipped_bytes_raise_nothing_but_value_errors():
    rng = np.random.default_rng(1)
    with warnings.catch_warnings():
        # Pillow's own warnings about damaged metadata
        warnings.simplefilter("ignore")
        for data, *_ in KINDS.values():
            for _ in range(8):
                broken = bytearray(data)
                for position in rng.integers(0, len(data), 4):
                    broken[position] = rng.integers(256)
                try:
                    got = load_image(bytes(broken), 8)
                except ValueError as error:
                    assert "\n" not in str(error)
                else:
                    assert got.shape == (3, 8, 8)


def test_missing_files_folders_and_other_things_are_refused(tmp_path):
    for source, words in (
        (tmp_path / "none.jpg", "no image file"),
        (tmp_path, "is a folder"),
        (5, "is a int; give a path"),
        ("", "folder|no image file"),
    ):
        with pytest.raises(ValueError, match=words):
            load_image(source, SIZE)
    with pytest.raises(ValueError, match="image size 0"):
        load_image(RGB, 0)


def test_load_images_keeps_the_order_and_names_the_broken_one(tmp_path):
    colours = [(i * 12, 0, 0) for i in range(20)]
    paths = []
    for i, colour in enumerate(colours):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (5 + i, 9), colour).save(paths[-1])
    got = load_images(paths, 4)
    assert got.shape == (20, 3, 4, 4)
    assert got[:, 0, 0, 0].tolist() == [colour[0] for colour in colours]
    paths[7].write_bytes(b"x")
    with pytest.raises(ValueError, match="7.png"):
        load_images(paths, 4)
    for nothing in ([], "photo.jpg"):
        with pytest.raises(ValueError, match="at least one"):
            load_images(nothing, 4)


# expert labels


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    samples = []
    for seed in range(3):
        scene = render_scene(seed, size=64, label_size=48)
        jpeg = encoded(Image.fromarray(scene.rgb), "JPEG", quality=95)
        samples.append(Sample(f"scene{seed}", jpeg, scene.planes, scene.meta))
    samples[1].labels.pop("seg")
    return samples


def features_per_pixel(images) -> dict[str, torch.Tensor]:
    """The features that the stems read; the rows of a table may have any order."""
    return {
        name: torch.stack([images.features[images.rows[name][b, ids[0].long()]] for b, ids in enumerate(label)])
        for name, label in images.labels.items()
        if EXPERTS[name].is_ids
    }


@pytest.mark.parametrize("label_size", [48, 32, 64])
def test_image_batch_agrees_with_the_loader(scenes, label_size, tmp_path):
    config = prismer_tiny(image_size=64, label_size=label_size)
    with ShardWriter(tmp_path, classes=CLASSES, source="test") as writer:
        for sample in scenes:
            writer.write(sample)
    semantics = Semantics.spelling()
    loader = Loader(ShardDataset(tmp_path), config=config, batch_size=3, semantics=semantics, training=False, threads=1)
    (batch,) = loader.epoch(0)
    labels = [ExpertLabels(sample.labels, sample.meta, CLASSES) for sample in scenes]
    ours = image_batch([sample.jpeg for sample in scenes], config, labels)
    assert (ours.rgb.int() - batch.images.rgb.int()).abs().max() <= 1
    assert ours.labels.keys() == batch.images.labels.keys()
    for name, label in batch.images.labels.items():
        assert torch.equal(ours.labels[name], label), name
    theirs = features_per_pixel(batch.images)
    for name, found in features_per_pixel(ours).items():
        assert torch.equal(found, theirs[name]), name
    assert (theirs["seg"][0] != 0).any() and (theirs["ocr_detection"] != 0).any()


def test_labels_are_read_from_files(scenes, tmp_path):
    config = prismer_tiny()
    path = tmp_path / "a.labels"
    path.write_bytes(pack_labels(scenes[0].labels))
    with pytest.raises(ValueError, match=r"a\.json with their tables is missing"):
        ExpertLabels.from_file(path)
    (tmp_path / "a.json").write_text(json.dumps({**scenes[0].meta, "classes": CLASSES}))
    from_files = image_batch([scenes[0].jpeg, RGB], config, [path, None])
    direct = image_batch([scenes[0].jpeg], config, [ExpertLabels(scenes[0].labels, scenes[0].meta, CLASSES)])
    for name in config.experts:
        assert torch.equal(from_files.labels[name][:1], direct.labels[name])
        assert (from_files.labels[name][1] == EXPERTS[name].fill).all()
    assert all((rows[1] == 0).all() for rows in from_files.rows.values())

    for name, data, words in (
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[]", "does not hold tables"),
        ("a.json", b'{"classes": {"seg": 5}}', "a.json cannot be used: the class table of seg"),
        (
            "a.json",
            json.dumps({"classes": CLASSES}).encode(),
            "a.labels cannot be used: id 0 of its map has no entry in 'instances'",
        ),
        ("a.labels", path.read_bytes()[:-3], "checksum"),
        ("a.labels", b"", "not packed labels"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            image_batch([RGB], config, [path])
    with pytest.raises(ValueError, match="no labels file"):
        image_batch([RGB], config, [tmp_path / "none.labels"])
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        image_batch([RGB, RGB], config, [None])


def test_maps_of_other_shapes_and_dtypes_are_refused():
    plane = np.zeros((4, 4), np.uint8)
    for planes, words in (
        ({"depht": plane}, "unknown expert 'depht'"),
        ({"depth": plane.astype(np.float32)}, r"depth map of the expert labels is float32 \(4, 4\)"),
        ({"normal": plane}, r"expected uint8 \(h, w, 3\)"),
        ({"seg": plane[..., None]}, r"expected uint8 \(h, w\)"),
    ):
        with pytest.raises(ValueError, match=words):
            ExpertLabels(planes)


def test_semantics_are_required_for_ids_alone(scenes):
    labels = [ExpertLabels(scenes[0].labels, scenes[0].meta, CLASSES)]
    clip = prismer_tiny(semantics="clip")
    assert (image_batch([RGB], clip).features == 0).all()
    with pytest.raises(ValueError, match="reads a table"):
        image_batch([RGB], clip, labels)
    given = image_batch([RGB], clip, labels, Semantics.spelling())
    assert len(given.features) > 1
    low_level = [ExpertLabels({"depth": scenes[0].labels["depth"]})]
    assert image_batch([RGB], clip, low_level).labels["depth"].float().std() > 0
    without = image_batch([RGB], prismer_base(experts=(), image_size=64), labels)
    assert without.labels == {} and without.rgb.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"), "on the meta device"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8).to_sparse(), "is sparse"),
        (np.zeros((8, 8, 3), bool), "an image array is bool"),
        (np.zeros((8, 8, 3), object), "an image array is object"),
        ([[0, 1]], "an image is a list"),
        ("x" * 5000, "longer than a name can be"),
    ],
)
def test_other_things_than_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image, SIZE)


@pytest.mark.parametrize(
    "labels, message",
    [
        (5, "labels are int"),
        ((x for x in [None]), "labels are generator"),
        ([5], "labels of an image are int"),
        ([{}], "labels of an image are dict"),
    ],
)
def test_other_things_than_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        image_batch([RGB], prismer_tiny(), labels)


@pytest.mark.parametrize(
    "fields, message",
    [
        (([],), "the planes of the expert labels are list"),
        (({"depth": [[1]]},), "the depth map of the expert labels is list"),
        (({"depth": np.zeros((0, 4), np.uint8)},), "the depth map of the expert labels is empty"),
        (({}, 5), "the meta of the expert labels are int"),
        (({}, {}, {"seg": [1]}), "must be a list of non-empty strings"),
    ],
)
def test_malformed_expert_labels_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertLabels(*fields)
