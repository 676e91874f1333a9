"""Proves the loader's native ops against numpy and against DALI, on every instruction set of this machine.

python -m pytest tests/data/test_native_pixels.py
"""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.config import prismer_tiny
from prismer.dataloading.feed import dali, native_pixels
from prismer.dataloading.feed.augment import AugmentConfig, AugmentParams, Draw, draw_params, keyed_rng
from prismer.dataloading.feed.image_pipeline import ImagePipeline, rotate_normals
from prismer.dataloading.store import native_ops
from prismer.experts import EXPERTS

if not native_ops.is_built():
    pytest.skip("prismer._C was not built", allow_module_level=True)

ops = torch.ops.prismer_native
SETS = ("baseline", "avx2", "avx512")
SETS = SETS[: SETS.index(ops.cpu_capability()) + 1]
ANGLE = math.radians(15)
AFFINES = {
    "shift": np.array([[1.0, 0, 0.165], [0, 1, -0.1]]),
    "shear": np.array([[1.0, 0.15, 0], [0, 1, 0]]),
    "rotate": np.array([[math.cos(ANGLE), -math.sin(ANGLE), 0], [math.sin(ANGLE), math.cos(ANGLE), 0]]),
    "away": np.array([[1.0, 0, 3], [0, 1, 0]]),
}
BOX = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(params=SETS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PRISMER_CPU_ISA", request.param)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with edges, smooth parts and noise; its channels have different histograms."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([30 + x * 150 / width, 60 + y * 120 / height, 90 + (x + y) % 64], -1)
    smooth[height // 3 : height // 2, width // 4 : width // 2] += [40, -50, 60]
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def jpeg(height: int = 240, width: int = 320, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(height, width, seed)).save(out, "JPEG", quality=90)
    return out.getvalue()


def labels(side: int, seed: int) -> dict[str, np.ndarray]:
    """Maps of all experts: regions, a ramp, and normals in all directions with fill in a corner."""
    rng = np.random.default_rng(seed)
    maps = {}
    for name, expert in EXPERTS.items():
        cells = rng.integers(0, 256, (8, 8, expert.planes))
        maps[name] = np.kron(cells, np.ones((side // 8, side // 8, 1))).astype(np.uint8).squeeze()
    normals = rng.normal(size=(side, side, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    maps["normal"] = ((normals + 1) * 127.5).round().astype(np.uint8)
    maps["normal"][: side // 5, : side // 3] = 0
    maps["depth"] = np.mgrid[:side, :side].sum(0).astype(np.uint8)
    return maps


def photo(image: np.ndarray, params: AugmentParams) -> np.ndarray:
    """augment_photo of a square image: (R, R, 3) int."""
    out = torch.full((3, len(image), len(image)), 77, dtype=torch.uint8)
    matrix = torch.from_numpy(params.pixel_matrix(len(image))) if params.warps else None
    flags = params.flip, params.autocontrast, params.equalize
    ops.augment_photo(torch.from_numpy(image), matrix, *flags, out)
    return out.permute(1, 2, 0).numpy().astype(int)


def looking(affine: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the source point of each output pixel, in pixels from the corner."""
    centre = (np.arange(side) + 0.5) / side - 0.5
    x, y = np.meshgrid(centre, centre)
    return tuple(side * (row[0] * x + row[1] * y + row[2] + 0.5) for row in affine)


def bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples in float64, black outside the image."""
    side = len(image)
    padded = np.pad(image.astype(float), ((2, 3), (2, 3), (0, 0)))
    x, y = x.clip(-1.5, side + 1.5) - 0.5, y.clip(-1.5, side + 1.5) - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    wx, wy = (x - left)[..., None], (y - top)[..., None]
    a, b, c, d = (padded[top + 2 + i, left + 2 + j] for i in (0, 1) for j in (0, 1))
    return (a * (1 - wx) + b * wx) * (1 - wy) + (c * (1 - wx) + d * wx) * wy


@pytest.mark.parametrize("side", [1, 7, 61, 96])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("affine", AFFINES)
def test_images_are_flipped_and_warped(isa, side, flip, affine):
    image = pixels(side, side)
    params = AugmentParams(flip=flip, affine=AFFINES[affine])
    seen = image[:, ::-1] if flip else image
    expected = bilinear(seen, *looking(params.affine, side))
    difference = np.abs(photo(image, params) - expected)
    # source points are rounded to 1/256 of a pixel; half of that, at a step of 255, is half a level along each axis
    assert difference.max() <= 2 and difference.mean() < 0.4, (difference.max(), difference.mean())
    plain = AugmentParams(flip=flip)
    assert np.array_equal(photo(image, plain), seen)


@pytest.mark.parametrize("autocontrast, equalize", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("flip", [False, True])
def test_lookup_tables_are_those_of_dali(isa, autocontrast, equalize, flip):
    """To the bit, on noise, narrow histograms, one colour and two colours."""
    from nvidia.dali import fn, types
    from nvidia.dali.auto_aug import augmentations

    side = 64
    images = [pixels(side, side, seed) for seed in range(4)]
    images += [pixels(side, side, 9) // 3 + 50, np.full((side, side, 3), 99, np.uint8)]
    images += [np.where(images[0] > 90, 200, 7).astype(np.uint8), images[1] // 60 * 13]

    def define():
        image = fn.external_source(name="image", dtype=types.UINT8, layout="HWC")
        image = augmentations.auto_contrast(image) if autocontrast else image
        return (fn.equalize(image) if equalize else image,)

    expected = dali.Graph(define, batch_size=len(images), threads=1).run({"image": images})[0]
    params = AugmentParams(autocontrast=autocontrast, equalize=equalize, flip=flip)
    for image, dalis in zip(images, expected.numpy(), strict=True):
        assert np.array_equal(photo(image, params), dalis[:, ::-1] if flip else dalis)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("affine", [None, *AFFINES])
@pytest.mark.parametrize("window", [BOX, (0.1, 0.25, 0.7, 0.9)])
def test_maps_take_the_nearest_value(isa, window, affine, flip):
    size, maps = 61, labels(48, 3) | {"edge": labels(80, 4)["edge"]}
    params = AugmentParams(flip=flip, affine=np.eye(2, 3) if affine is None else AFFINES[affine])
    out = {name: torch.full((e.planes, size, size), 77, dtype=torch.uint8) for name, e in EXPERTS.items()}
    del maps["seg"]
    native_pixels.augment_maps(maps, window, params, out)
    assert (out["seg"] == EXPERTS["seg"].fill).all()
    x, y = looking(params.affine, size)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    column, line = (np.floor(v).clip(0, size - 1) for v in (x, y))
    column = size - 1 - column if flip else column
    for name, map_ in maps.items():
        h, w = map_.shape[:2]
        from_x = (window[0] + (column + 0.5) / size * (window[2] - window[0])) * w
        from_y = (window[1] + (line + 0.5) / size * (window[3] - window[1])) * h
        expected = map_[from_y.astype(int), from_x.astype(int)].reshape(size, size, -1)
        expected = np.where(inside[..., None], expected, EXPERTS[name].fill).transpose(2, 0, 1)
        got = out[name].numpy()
        if name == "normal":
            matrix = torch.from_numpy(params.normal_matrix())[None]
            expected = rotate_normals(torch.from_numpy(expected[None].astype(np.uint8)), matrix)[0].numpy()
            assert np.array_equal(got.any(0), expected.any(0))
        wrong = np.abs(got.astype(int) - expected) > (name == "normal")
        # rounding decides where a source point lies exactly between two pixels, as often under a shear
        assert wrong.mean() < 0.02, f"{name}: {wrong.mean():.4f}"


def test_an_image_does_not_depend_on_the_instruction_set(monkeypatch):
    maps, results = labels(64, 0), []
    for name in SETS:
        monkeypatch.setenv("PRISMER_CPU_ISA", name)
        params = AugmentParams(flip=True, equalize=True, affine=AFFINES["rotate"])
        out = {n: torch.zeros(e.planes, 50, 50, dtype=torch.uint8) for n, e in EXPERTS.items()}
        native_pixels.augment_maps(maps, BOX, params, out)
        results.append([photo(pixels(99, 99), params), *(m.numpy().astype(int) for m in out.values())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # fused multiply-adds round once
            assert (np.abs(a - b) > 1).mean() < 0.002


def test_native_ops_and_dali_agree(monkeypatch):
    """With the same draws, images agree within rounding, and maps except at the borders of regions."""
    config = prismer_tiny(image_size=96, label_size=64)
    native = ImagePipeline(config, batch_size=32, augmented=True)
    monkeypatch.setattr(native_ops, "is_built", lambda: False)
    dalis = ImagePipeline(config, batch_size=32, augmented=True)
    assert native.native and not dalis.native
    params = [draw_params(AugmentConfig(), keyed_rng(Draw.AUGMENT, 3, 0, i), 4 / 3) for i in range(32)]
    assert all(any(getattr(p, name) for p in params) for name in ("flip", "equalize", "autocontrast", "warps"))
    for p in params:
        box = native_pixels.whole_pixels(p.window, 240, 320)
        p.window = tuple(np.array(box) / [320, 240, 320, 240])
    images, maps = [jpeg(seed=i) for i in range(32)], [labels(128, i) for i in range(32)]
    rgb, named = native(images, maps, params)
    expected, dalis_named = dalis(images, maps, params)
    difference = (rgb.int() - expected.int()).abs().float()
    for i, p in enumerate(params):
        # DALI's filter sees beyond the crop; stretching a histogram enlarges that difference
        limit = 1.5 if p.equalize or p.autocontrast else 0.25
        assert difference[i].mean() < limit, f"{difference[i].mean():.3f} under {p}"
    assert (difference > 4).float().mean() < 0.005
    for name, map_ in named.items():
        wrong = (map_.int() - dalis_named[name].int()).abs() > (name == "normal")
        assert wrong.float().mean() < 0.01, f"{name}: {wrong.float().mean():.4f}"


def test_nothing_depends_on_threads():
    config = prismer_tiny(image_size=64, label_size=48)
    params = [draw_params(AugmentConfig(), keyed_rng(Draw.AUGMENT, 1, 0, i)) for i in range(5)]
    images, maps = [jpeg(seed=i) for i in range(5)], [labels(64, i) for i in range(5)]
    (rgb, named), *others = (
        ImagePipeline(config, batch_size=5, augmented=True, threads=threads)(images, maps, params)
        for threads in (1, 3, 8)
    )
    for other, other_named in others:
        assert torch.equal(rgb, other)
        assert all(torch.equal(named[name], other_named[name]) for name in named)


def test_outputs_outlive_the_next_batch():
    config = prismer_tiny(image_size=64, label_size=48)
    pipeline = ImagePipeline(config, batch_size=2, augmented=False)
    rgb, _ = pipeline([jpeg(seed=0)], [{}])
    before = rgb.clone()
    for seed in range(1, 4):
        pipeline([jpeg(100, 500, seed)] * 2, [{}] * 2)
    assert torch.equal(rgb, before)


@pytest.mark.parametrize(
    "window, height, width, expected",
    [
        (BOX, 3, 5, (0, 0, 5, 3)),
        ((0.1, 0.25, 0.73, 0.95), 120, 160, (16, 30, 117, 114)),
        ((0.3, 0.2, 0.6, 0.3), 1, 1, (0, 0, 1, 1)),
        ((0.99, 0.1, 1.0, 0.9), 10, 10, (9, 1, 10, 9)),
        ((0.41, 0.1, 0.44, 0.9), 10, 10, (4, 1, 5, 9)),
    ],
)
def test_windows_move_to_the_nearest_pixel_edges(window, height, width, expected):
    assert native_pixels.whole_pixels(window, height, width) == expected


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (5, 1), (37, 101), (224, 672)])
def test_undifference_adds_up_rows(isa, height, width):
    plane = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    expected = np.add.accumulate(plane, axis=0, dtype=np.uint8)
    native_ops.undifference(plane)
    assert np.array_equal(plane, expected)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_values_in_use_are_found(size):
    for values in ([0], [255], [3, 200], range(256)):
        plane = np.random.default_rng(size).choice(list(values), (size,)).astype(np.uint8)
        assert native_ops.values_in_use(plane) == sorted(set(plane.tolist()))
        assert native_ops.values_in_use(np.sort(plane)) == sorted(set(plane.tolist()))
    assert native_ops.values_in_use(np.repeat(np.uint8([9, 0, 9, 4]), 8)) == [0, 4, 9]
    # only the last value differs
    plane = np.zeros((3, 9), np.uint8)
    plane[-1, -1] = 9
    assert native_ops.values_in_use(plane) == [0, 9]


def test_maps_may_be_read_only_or_strided():
    maps = labels(64, 0)
    out, again = ({n: torch.zeros(e.planes, 40, 40, dtype=torch.uint8) for n, e in EXPERTS.items()} for _ in "ab")
    native_pixels.augment_maps(maps, BOX, AugmentParams(), out)
    for name in maps:
        maps[name] = np.asfortranarray(maps[name])
        maps[name].flags.writeable = False
    native_pixels.augment_maps(maps, BOX, AugmentParams(), again)
    assert all(torch.equal(out[name], again[name]) for name in out)


def byte(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


WINDOW = torch.tensor(BOX, dtype=torch.float64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.augment_photo(byte(4, 5, 3), None, False, False, False, byte(3, 4, 4)), r"\(R, R, 3\)"),
        (lambda: ops.augment_photo(byte(4, 4, 3), None, False, False, False, byte(3, 5, 5)), r"expected \(3, 4, 4\)"),
        (lambda: ops.augment_photo(byte(4, 4, 3).float(), None, False, False, False, byte(3, 4, 4)), "uint8"),
        (lambda: ops.augment_photo(byte(4, 4, 3), torch.eye(2), False, False, False, byte(3, 4, 4)), r"\(2, 3\)"),
        (lambda: ops.augment_maps([byte(4, 4)], [], WINDOW, None, False, None, [byte(1, 2, 2)]), "one of each"),
        (lambda: ops.augment_maps([byte(4, 4)], [0], WINDOW, None, False, None, [byte(3, 2, 2)]), r"\(1, 2, 2\)"),
        (lambda: ops.augment_maps([byte(0, 4)], [0], WINDOW, None, False, None, [byte(1, 2, 2)]), r"\(h, w\)"),
        (lambda: ops.augment_maps([byte(4, 4)], [256], WINDOW, None, False, None, [byte(1, 2, 2)]), "0 to 255"),
        (lambda: ops.augment_maps([byte(4, 4)], [0], WINDOW * 2, None, False, None, [byte(1, 2, 2)]), "shares"),
        (lambda: ops.augment_maps([byte(4, 4)], [0], WINDOW, None, False, torch.eye(3), [byte(1, 2, 2)]), r"\(2, 2\)"),
        (lambda: ops.undifference(byte(4)), r"\(h, w\)"),
        (lambda: ops.undifference(byte(4, 6)[:, ::2]), "contiguous"),
        (lambda: ops.values_in_use(torch.zeros(3)), "uint8"),
    ],
)
def test_malformed_arguments_are_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
