"""Proves that augmentation depends on its key alone, has the published strengths, and turns normals correctly.

python -m pytest tests/data/test_augment.py
"""

import math
from collections import Counter

import numpy as np
import pytest

from prismer.dataloading.feed.augment import OPS, AugmentConfig, AugmentParams, Draw, draw_params, keyed_rng


def draw_many(config: AugmentConfig, count: int, aspect: float = 1.0) -> list[AugmentParams]:
    return [draw_params(config, keyed_rng(Draw.AUGMENT, 0, 0, i), aspect) for i in range(count)]


def test_keyed_rng_is_pinned():
    # a run that resumes under another numpy or on another machine must draw the same numbers
    draws = keyed_rng(Draw.ORDER, 42, 3).bit_generator.random_raw(2)
    assert draws.tolist() == [17620198455373672332, 7401354521157662530]


def test_keyed_rng_separates_keys():
    keys = [(draw, seed, epoch, i) for draw in Draw for seed in (0, 1) for epoch in (0, 1) for i in (0, 1)]
    draws = [int(keyed_rng(*key).bit_generator.random_raw()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [int(keyed_rng(*key).bit_generator.random_raw()) for key in keys]


@pytest.mark.parametrize("aspect", [0.6, 1.0, 1.5])
def test_window_keeps_area_and_ratio(aspect):
    windows = np.array([p.window for p in draw_many(AugmentConfig(), 400, aspect)])
    width, height = windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1]
    area, ratio = width * height, aspect * width / height
    assert windows.min() >= 0 and windows.max() <= 1
    assert ratio.min() >= 0.75 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    assert area.min() >= 0.5 - 1e-9
    assert 0.55 < np.median(area) < 0.8 and windows[:, 0].std() > 0.02


def test_window_of_a_panorama_is_its_middle():
    # no crop of half the area has a ratio below 4/3
    for params in draw_many(AugmentConfig(), 5, aspect=4.0):
        assert params.window == pytest.approx((1 / 3, 0, 2 / 3, 1))


def test_flip_and_ops_have_their_frequencies():
    params = draw_many(AugmentConfig(num_ops=1), 2000)
    assert 0.45 < np.mean([p.flip for p in params]) < 0.55
    kinds = Counter("photo" if p.autocontrast or p.equalize else "warp" if p.warps else "none" for p in params)
    assert len(OPS) == 10
    assert kinds["warp"] / 2000 == pytest.approx(0.5, abs=0.04)
    assert kinds["photo"] / 2000 == pytest.approx(0.2, abs=0.04)
    # five geometric operations of one strength and two signs
    affine = {tuple(np.round(p.affine, 6).ravel()) for p in params if p.warps}
    assert len(affine) == 10
    cos, sin = math.cos(math.radians(15)), math.sin(math.radians(15))
    for expected in (
        [[1, 0.15, 0], [0, 1, 0]],
        [[1, 0, 0], [-0.15, 1, 0]],
        [[1, 0, 0.165], [0, 1, 0]],
        [[1, 0, 0], [0, 1, -0.165]],
        [[cos, -sin, 0], [sin, cos, 0]],
    ):
        assert tuple(np.round(np.array(expected, float), 6).ravel()) in affine


def test_settings_switch_parts_off():
    assert not any(p.flip for p in draw_many(AugmentConfig(flip=0), 100))
    assert all(p.flip for p in draw_many(AugmentConfig(flip=1), 100))
    still = draw_many(AugmentConfig(num_ops=0, min_area=1), 100)
    assert not any(p.warps or p.autocontrast or p.equalize for p in still)
    assert all(p.window == (0, 0, 1, 1) for p in still)
    # the crop does not depend on the other settings
    a, b = (draw_many(AugmentConfig(flip=flip), 50) for flip in (0, 1))
    assert [p.window for p in a] == [p.window for p in b]


@pytest.mark.parametrize("field", [dict(min_area=0), dict(min_area=1.5), dict(flip=2), dict(num_ops=-1)])
def test_config_refuses_values_out_of_range(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        AugmentConfig(**field)


def test_the_pixel_matrix_moves_points_and_keeps_the_centre():
    # a shift to the left by a quarter: the output's first pixel of 8 shows the source's third
    params = AugmentParams(affine=np.array([[1.0, 0, 0.25], [0, 1, 0]]))
    assert params.pixel_matrix(8) @ [0.5, 0.5, 1] == pytest.approx([2.5, 0.5])
    # a rotation keeps the centre
    turned = AugmentParams(affine=np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0]]))
    assert turned.pixel_matrix(8) @ [4, 4, 1] == pytest.approx([4, 4])
    assert AugmentParams().pixel_matrix(7).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_normal_matrix_follows_the_surface():
    """After any flip and affine map, the normal of a tilted plane is that of the moved height field."""
    rng = np.random.default_rng(0)
    for params in draw_many(AugmentConfig(), 100):
        slope = rng.normal(size=2)

        def height(x, y, params=params, slope=slope):
            # output point -> source point, then the flip, which is applied first
            x, y = params.affine @ [x, y, 1]
            return slope @ [-x if params.flip else x, y]

        dx, dy = height(1, 0) - height(0, 0), height(0, 1) - height(0, 0)
        expected = np.array([-dx, dy, 1])
        before = np.array([-slope[0], slope[1], 1])
        after = np.append(params.normal_matrix() @ before[:2], before[2])
        assert after / np.linalg.norm(after) == pytest.approx(expected / np.linalg.norm(expected))
