"""Proves that images and maps are exact and stay aligned, and that a broken image affects no other one.

Every test runs with the native ops and with DALI's operators.

python -m pytest tests/data/test_image_pipeline.py
"""

import io
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from prismer.config import prismer_tiny
from prismer.dataloading.feed.augment import AugmentConfig, AugmentParams, Draw, draw_params, keyed_rng
from prismer.dataloading.feed.dali import UndecodableImages
from prismer.dataloading.feed.image_pipeline import ImagePipeline, rotate_normals
from prismer.dataloading.store import native_ops
from prismer.experts import EXPERTS

R, L = 96, 64
CONFIG = prismer_tiny(image_size=R, label_size=L)


@cache
def shared_pipeline(native: bool, experts: tuple[str, ...], augmented: bool) -> ImagePipeline:
    # shared, because the pipeline keeps nothing from batch to batch
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(native_ops, "is_built", lambda: False)
        pipeline = ImagePipeline(CONFIG.replace(experts=experts), batch_size=8, augmented=augmented)
    assert pipeline.native == native
    return pipeline


@pytest.fixture(params=["native", "dali"])
def make_pipeline(request):
    if request.param == "native" and not native_ops.is_built():
        pytest.skip("prismer._C was not built")

    def make(experts=CONFIG.experts, augmented=True):
        return shared_pipeline(request.param == "native", experts, augmented)

    return make


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(out, kind, **options)
    return out.getvalue()


def gradient(height: int = 120, width: int = 160) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 / width + 20, y * 200 / height + 30, (x + y) % 64 * 2], -1).astype(np.uint8)


def blocks(size: int, cells: int = 6, seed: int = 0) -> np.ndarray:
    """A map of `cells` x `cells` ids in 0..9."""
    ids = np.random.default_rng(seed).integers(0, 10, (cells, cells))
    return np.kron(ids, np.ones((size // cells, size // cells))).astype(np.uint8)


def draws(count: int, **config) -> list[AugmentParams]:
    return [draw_params(AugmentConfig(**config), keyed_rng(Draw.AUGMENT, 5, 0, i)) for i in range(count)]


def decoded(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def as_image(rgb: torch.Tensor) -> np.ndarray:
    return rgb.permute(1, 2, 0).numpy().astype(int)


def test_evaluation_only_resizes(make_pipeline):
    jpeg, seg = encode(gradient(), quality=95), blocks(120)
    rgb, maps = make_pipeline(augmented=False)([jpeg], [{"seg": seg}])
    expected = np.asarray(decoded(jpeg).resize((R, R), Image.BICUBIC)).astype(int)
    assert rgb.dtype == torch.uint8 and rgb.shape == (1, 3, R, R)
    assert np.abs(as_image(rgb[0]) - expected).max() <= 1
    nearest = np.asarray(Image.fromarray(seg).resize((L, L), Image.NEAREST))
    assert np.array_equal(maps["seg"][0, 0].numpy(), nearest)


# the right edge of the first window cuts through a pixel: native ops take the nearest pixel edge
@pytest.mark.parametrize("window", [(0.1, 0.25, 0.73, 0.95), (0.1, 0.25, 0.75, 0.95)])
def test_the_crop_equals_that_of_pillow(make_pipeline, window):
    jpeg, seg = encode(gradient(), quality=95), blocks(120)
    pipeline = make_pipeline()
    rgb, maps = pipeline([jpeg], [{"seg": seg}], [AugmentParams(window=window)])
    box = np.array(window) * [160, 120, 160, 120]
    box = tuple(box.round() if pipeline.native else box)
    expected = np.asarray(decoded(jpeg).resize((R, R), Image.BICUBIC, box=box)).astype(int)
    difference = np.abs(as_image(rgb[0]) - expected)
    if pipeline.native:
        # the crop comes first: the filter, two pixels wide on each side, sees nothing beyond it
        cropped = np.asarray(decoded(jpeg).crop(box).resize((R, R), Image.BICUBIC)).astype(int)
        assert np.abs(as_image(rgb[0]) - cropped).max() <= 1
        difference = difference[3:-3, 3:-3]
    assert difference.max() <= 1
    box = np.array(box) / [160, 120, 160, 120] * 120
    nearest = Image.fromarray(seg).resize((L, L), Image.NEAREST, box=tuple(box))
    assert (maps["seg"][0, 0].numpy() == np.asarray(nearest)).mean() > 0.98


@pytest.mark.parametrize("label_size", [60, 130, 240])
def test_image_and_map_stay_aligned(make_pipeline, label_size):
    """The red channel shows the ids of the map: both agree after any augmentation."""
    ids = blocks(240, cells=3)
    jpeg = encode(np.stack([ids * 25, 0 * ids + 128, 0 * ids + 128], -1), quality=95, subsampling=0)
    seg = np.asarray(Image.fromarray(ids).resize((label_size, label_size), Image.NEAREST))
    for start in range(0, 40, 8):
        params = draws(40)[start : start + 8]
        for p in params:
            p.autocontrast = p.equalize = False
        rgb, maps = make_pipeline()([jpeg] * 8, [{"seg": seg}] * 8, params)
        red = torch.nn.functional.interpolate(rgb[:, :1].float(), (L, L), mode="nearest-exact")[:, 0]
        seen, labels = (red / 25).round(), maps["seg"][:, 0]
        inside = labels != 255
        for i, p in enumerate(params):
            agreement = (seen[i] == labels[i])[inside[i]].float().mean().item()
            assert agreement > 0.9, f"{agreement:.3f} under {p}"
            black = (rgb[i] < 8).all(0).float().mean() - (labels[i] == 255).float().mean()
            assert abs(black) < 0.02, f"image and map are filled in different places under {p}"


def test_warp_moves_pixels_as_the_matrix_says(make_pipeline):
    jpeg = encode(gradient(R, R), quality=95)
    params = draws(8, min_area=1, flip=0)
    for p in params:
        p.autocontrast = p.equalize = False
    assert any(p.warps for p in params)
    rgb, _ = make_pipeline(experts=())([jpeg] * 8, [{}] * 8, params)
    for i, p in enumerate(params):
        matrix = p.pixel_matrix(R).ravel().tolist()
        expected = decoded(jpeg).transform((R, R), Image.AFFINE, matrix, Image.BILINEAR)
        difference = np.abs(as_image(rgb[i]) - np.asarray(expected).astype(int))
        # Pillow and DALI fill the outermost pixels differently
        assert np.median(difference) <= 1 and (difference > 8).mean() < 0.03


def test_photometric_ops_touch_the_flagged_images_alone(make_pipeline):
    jpeg, labels = encode(gradient(), quality=95), {"depth": blocks(60) * 20}
    params = [AugmentParams(), AugmentParams(autocontrast=True), AugmentParams(equalize=True)]
    rgb, maps = make_pipeline()([jpeg] * 3, [labels] * 3, params)
    plain = Image.fromarray(as_image(rgb[0]).astype(np.uint8))
    for i, op in ((1, ImageOps.autocontrast), (2, ImageOps.equalize)):
        difference = np.abs(as_image(rgb[i]) - np.asarray(op(plain)).astype(int))
        assert difference.max() <= 4 and difference.mean() < 2
        assert not torch.equal(rgb[i], rgb[0]) and torch.equal(maps["depth"][i], maps["depth"][0])


def test_a_sample_does_not_depend_on_its_batch(make_pipeline):
    jpegs = [encode(gradient(90 + i, 150 - i)) for i in range(8)]
    labels = [{"seg": blocks(60, seed=i), "normal": sphere(40 + i)} for i in range(8)]
    params = draws(8)
    pipeline = make_pipeline()
    rgb, maps = pipeline(jpegs, labels, params)
    for i in (7, 0, 3):
        alone, own_maps = pipeline([jpegs[i]], [labels[i]], [params[i]])
        assert torch.equal(alone[0], rgb[i])
        assert all(torch.equal(own_maps[name][0], maps[name][i]) for name in maps)


def sphere(size: int, centre=(0.5, 0.5), radius=0.3) -> np.ndarray:
    """The normal map of a sphere seen from the front, zeros around it."""
    grid = (np.arange(size) + 0.5) / size
    x, y = (grid[None, :] - centre[0]) / radius, (centre[1] - grid[:, None]) / radius
    x, y = np.broadcast_arrays(x, y)
    z = np.sqrt(np.maximum(1 - x * x - y * y, 0))
    pixels = ((np.stack([x, y, z], -1) + 1) * 127.5).round().clip(0, 255)
    return np.where((x * x + y * y < 1)[..., None], pixels, 0).astype(np.uint8)


ANGLE = math.radians(15)
TURN = np.array([[math.cos(ANGLE), -math.sin(ANGLE), 0], [math.sin(ANGLE), math.cos(ANGLE), 0]])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("affine", [np.eye(2, 3), TURN, TURN @ np.diag([1, 1, 0]) + [[0, 0, 0.1], [0, 0, 0]]])
def test_normals_turn_with_the_image(make_pipeline, flip, affine):
    """The augmented map of a sphere equals the map of a sphere drawn at its new place."""
    centre = np.array([0.4, 0.6])
    params = AugmentParams(flip=flip, affine=affine)
    jpeg = encode(gradient())
    _, maps = make_pipeline()([jpeg], [{"normal": sphere(256, centre)}], [params])
    moved = np.array([1 - centre[0] if flip else centre[0], centre[1]]) - 0.5
    moved = np.linalg.solve(affine[:, :2], moved - affine[:, 2]) + 0.5
    expected = sphere(L, moved).astype(float)
    got = maps["normal"][0].permute(1, 2, 0).numpy().astype(float)
    both = expected.any(-1) & got.any(-1)
    assert both.sum() > 0.9 * expected.any(-1).sum()
    dot = ((got / 127.5 - 1) * (expected / 127.5 - 1)).sum(-1)[both]
    angle = np.degrees(np.arccos(dot.clip(-1, 1)))
    assert np.median(angle) < 2.5 and np.percentile(angle, 95) < 8, f"{np.median(angle):.1f} degrees"
    # the map around the sphere stays fill
    assert (got.any(-1) & ~expected.any(-1)).sum() < 0.1 * both.sum()


def test_rotate_normals_keeps_fill_and_unrotated_maps():
    maps = torch.from_numpy(sphere(32)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    matrices = torch.stack([torch.eye(2), torch.tensor([[0.0, -1], [1, 0]])]).double()
    turned = rotate_normals(maps, matrices)
    assert torch.equal(turned[0], maps[0])
    fill = ~maps[1].bool().any(0)
    assert not turned[1][:, fill].any()
    vectors = turned[1][:, ~fill].float() / 127.5 - 1
    assert (vectors.norm(dim=0) - 1).abs().max() < 0.02
    assert (vectors[0] + maps[1, 1][~fill].float() / 127.5 - 1).abs().max() < 0.02


@pytest.mark.parametrize(
    "name, mode, options",
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", dict(progressive=True)),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
    ],
)
def test_other_encodings_become_rgb(make_pipeline, name, mode, options):
    pixels = gradient()
    pixels[..., 2] = 90
    data = encode(pixels, name, mode, **options)
    rgb, _ = make_pipeline(augmented=False)([data, encode(pixels)], [{}, {}])
    expected = np.asarray(decoded(data).resize((R, R), Image.BICUBIC)).astype(int)
    # CMYK has several conversions to RGB
    assert np.abs(as_image(rgb[0]) - expected).mean() < (12 if mode == "CMYK" else 2)


def test_absent_experts_are_filled(make_pipeline):
    jpeg = encode(gradient())
    seg = blocks(30)
    _, maps = make_pipeline()([jpeg] * 2, [{}, {"seg": seg}], draws(2))
    assert list(maps) == list(CONFIG.experts)
    for name, map_ in maps.items():
        assert map_.shape == (2, EXPERTS[name].planes, L, L) and map_.dtype == torch.uint8
        assert (map_[0] == EXPERTS[name].fill).all()
        assert name == "seg" or (map_[1] == EXPERTS[name].fill).all()
    assert set(maps["seg"][1].unique().tolist()) - {255} <= set(seg.ravel().tolist())
    _, none = make_pipeline(experts=())([jpeg], [{"seg": seg}], draws(1))
    assert none == {}


def test_maps_of_one_sample_may_differ_in_size(make_pipeline):
    labels = {"seg": blocks(60), "obj_detection": blocks(120), "normal": sphere(30)}
    _, maps = make_pipeline(augmented=False)([encode(gradient())], [labels])
    assert torch.equal(maps["seg"], maps["obj_detection"])
    expected = np.asarray(Image.fromarray(labels["normal"]).resize((L, L), Image.NEAREST)).astype(int)
    assert (np.abs(maps["normal"][0].permute(1, 2, 0).numpy() - expected) > 0).mean() < 0.15


BROKEN = {
    "truncated": lambda jpeg: jpeg[: len(jpeg) // 3],
    "header": lambda jpeg: jpeg[:20],
    "garbage": lambda jpeg: b"\xff\xd8" + bytes(range(256)) * 4,
    "empty": lambda jpeg: b"",
}


@pytest.mark.parametrize("augmented", [False, True])
def test_undecodable_images_are_named(make_pipeline, augmented):
    good = encode(gradient())
    images = [good, *(breaks(good) for breaks in BROKEN.values()), good]
    pipeline = make_pipeline(augmented=augmented)
    params = draws(6) if augmented else None
    before, _ = pipeline([good], [{}], params and params[:1])
    with pytest.raises(UndecodableImages, match="does not decode") as caught:
        pipeline(images, [{}] * 6, params)
    assert sorted(caught.value.reasons) == [1, 2, 3, 4]
    # the pipeline works on, and tensors from before the broken batch are intact
    after, _ = pipeline([good], [{}], params and params[:1])
    assert torch.equal(before, after)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 700), (700, 2), (3, 5)])
def test_images_of_any_shape(make_pipeline, height, width):
    image = encode(np.full((height, width, 3), 200, np.uint8))
    params = draw_params(AugmentConfig(num_ops=0), keyed_rng(Draw.AUGMENT, 0, 0, 0), width / height)
    rgb, _ = make_pipeline()([image], [{"seg": blocks(6)}], [params])
    assert (rgb.int() - 200).abs().max() <= 2


def test_parameters_belong_to_an_augmented_pipeline(make_pipeline):
    with pytest.raises(ValueError, match="if the pipeline was made with augmented=True, else none"):
        make_pipeline()([encode(gradient())], [{}])
