"""Proves the ray caster: hits and normals against ray marching, windows, shadows, and the letters on boards.

python -m pytest tests/data/test_raycast.py
"""

import numpy as np
import pytest

from prismer.dataloading.scenes import layout, raycast


def _distance(shape: str, point: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(k,) signed distances of local, unscaled points (3, k) to a shape, by the textbook formula."""
    x, y, z = point
    a, b, _ = extent
    radial = np.hypot(x, z)
    if shape == "sphere":
        return np.sqrt(x * x + y * y + z * z) - a
    if shape == "cube":
        q = np.abs(point) - extent[:, None]
        return np.linalg.norm(np.maximum(q, 0), axis=0) + np.minimum(q.max(0), 0)
    if shape == "cylinder":
        q = np.stack([radial - a, np.abs(y) - b])
        return np.linalg.norm(np.maximum(q, 0), axis=0) + np.minimum(q.max(0), 0)
    # of the cone, a lower bound that is zero on the surface: its slanted side and its base
    side = ((radial - a) * 2 * b + (y + b) * a) / np.hypot(a, 2 * b)
    return np.maximum(side, -b - y)


@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder", "cone"])
def test_trace_agrees_with_ray_marching(shape):
    rng = np.random.default_rng(3)
    camera = layout.sample_camera(rng)
    extent = np.array(layout.EXTENT[shape]) * 0.9
    yaw = 0.6
    primitive = raycast.Primitive(shape, np.array([0.3, extent[1], 0.8]), extent, yaw, 0, (1, 1, 1))
    trace = raycast.cast(camera, [primitive], 96)
    turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    rays = camera.rays(96).reshape(3, -1).astype(np.float64)

    def distance(points):
        return _distance(shape, turn @ (points - primitive.centre[:, None]), extent)

    t = np.zeros(rays.shape[1])
    for _ in range(160):
        t = np.minimum(t + distance(camera.position[:, None] + t * rays) / np.linalg.norm(rays, axis=0), 40)
    hit = t < 39
    found = (trace.part == 0).ravel()
    # rays that graze the outline may hit or miss
    assert (hit != found).mean() < 2e-3
    both = hit & found
    assert both.sum() > 400
    assert np.abs(t - trace.t.ravel())[both].max() < 0.02

    # normals are the gradient of the distance, away from the creases
    points = camera.position[:, None] + trace.t.ravel()[both] * rays[:, both]
    step = 1e-4 * np.eye(3)[:, :, None]
    gradient = np.stack([distance(points + s) - distance(points - s) for s in step]) / 2e-4
    agreement = (gradient * trace.normal.reshape(3, -1)[:, both]).sum(0)
    assert (agreement > 0.995).mean() > 0.97


def test_windows_cut_nothing_off(monkeypatch):
    layouts = [layout.sample_layout(np.random.default_rng(i)) for i in range(6)]
    narrow = [raycast.paint_image(x, 64, raycast.cast(x.camera, x.primitives, 128)) for x in layouts]
    monkeypatch.setattr(raycast, "_window", lambda camera, points, n: (slice(0, n), slice(0, n)))
    wide = [raycast.paint_image(x, 64, raycast.cast(x.camera, x.primitives, 128)) for x in layouts]
    for a, b in zip(narrow, wide, strict=True):
        # contact shadows fade out: their window may cut off less than one grey level
        assert np.abs(a.astype(int) - b).max() <= 1


def test_shadow_falls_away_from_the_light():
    rng = np.random.default_rng(0)
    camera, looks = layout.sample_camera(rng), layout.sample_looks(rng)
    ball = raycast.Primitive("sphere", np.array([0.0, 0.9, 0.0]), np.full(3, 0.5), 0.0, 0, (0.5, 0.5, 0.5))
    scene = raycast.Layout(camera, [ball], [{"shape": "sphere"}], **looks)
    trace = raycast.cast(camera, [ball], 128)
    point = camera.position[:, None, None] + np.where(trace.part == -2, 0, trace.t) * camera.rays(128)
    lights = np.broadcast_to(scene.light[:, None, None], (3, 128, 128)).astype(np.float32)
    sunny, _ = raycast._shadows(scene, 128, trace, point.astype(np.float32), lights)
    ground = trace.part == -1
    # a point of the ground is in shadow if the line to the light passes the centre within a radius
    offset = ball.centre[:, None, None] - point
    along = (offset * lights).sum(0)
    passes = np.linalg.norm(offset - along * lights, axis=0)
    sure = ground & (np.abs(passes - 0.5) > 0.01)
    assert ((passes < 0.5) & ground).sum() > 50
    assert (sunny[sure] == (passes > 0.5)[sure]).all()


def test_every_word_looks_different():
    words = {raycast._letters(word).tobytes() for word in layout.WORDS}
    assert len(words) == len(layout.WORDS) == len(set(layout.WORDS)) >= 40
