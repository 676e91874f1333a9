"""Rendered scenes that resemble photographs, with exact depth and normals, for scripts/train_geometry_head.py.

dataloading/scenes/raycast.py casts them, as it does the embedded dataset. They show rooms, streets, landscapes and
close-ups of textured figures made of spheres, cubes, cylinders and cones; the height, pitch and angle of view of the
camera vary. World axes are x right, y up, z towards the viewer.
"""

import io
import math

import numpy as np
from PIL import Image, ImageFilter

from prismer.dataloading.experts.vit_trunk import HEAD_SIDE
from prismer.dataloading.scenes.raycast import GROUND, SKY, Camera, Primitive, cast, intersect

# side of the target maps, equal to that of the head's outputs
TARGET = 96
# the largest distance, and the distance of the sky
FAR = 60.0
# the sky faces the camera, as in the maps of the embedded dataset
SKY_NORMAL = (0.0, 0.0, 1.0)


def _paint(rng: np.random.Generator) -> tuple:
    """A random linear RGB albedo: earthy and grey colours are common, strong colours are rare."""
    grey = rng.uniform(0.03, 0.85) ** 1.3
    tint = rng.normal(0, 1, 3) * rng.choice([0.05, 0.15, 0.5], p=[0.4, 0.4, 0.2])
    return tuple(np.clip(grey * np.exp(tint), 0.01, 0.95))


def _solid(shape: str, centre, extent, yaw: float, owner: int, rng: np.random.Generator, paint=None) -> Primitive:
    return Primitive(shape, np.array(centre, float), np.array(extent, float), yaw, owner, paint or _paint(rng))


def _figure(rng: np.random.Generator, x: float, z: float, size: float, owner: int) -> list[Primitive]:
    """A random figure of height about `size` that stands at (x, 0, z), such as an animal, a tree or a house."""
    kind = rng.choice(
        ["animal", "person", "tree", "house", "table", "pile", "single", "bottle", "hill", "vehicle"],
        p=[0.2, 0.1, 0.12, 0.08, 0.1, 0.1, 0.1, 0.06, 0.04, 0.1],
    )
    yaw = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(yaw), math.sin(yaw)
    main, second = _paint(rng), _paint(rng)
    parts: list[Primitive] = []

    def add(shape: str, along: float, up: float, across: float, extent, paint=main, turn: float = 0.0) -> None:
        """Add a solid; positions and extents are in units of `size`, in the axes of the figure."""
        centre = (x + size * (c * along + s * across), size * up, z + size * (c * across - s * along))
        parts.append(_solid(shape, centre, size * np.array(extent), yaw + turn, owner, rng, paint))

    u = rng.uniform
    if kind == "animal":
        leg, girth, length = u(0.1, 0.45), u(0.14, 0.28), u(0.3, 0.55)
        add("sphere", 0, leg + girth * 0.9, 0, (length, girth, girth * u(0.7, 1)))
        head = leg + girth * u(1.2, 2.4)
        add("sphere", length * u(0.8, 1.15), head, u(-0.1, 0.1), (u(0.12, 0.2), u(0.11, 0.17), u(0.1, 0.16)), main)
        if u() < 0.6:
            add("sphere", length * 1.2 + 0.08, head - 0.04, 0, (0.1, 0.06, 0.07), second)
        for side in (-1, 1):
            if u() < 0.7:
                add("cone", length * 0.95, head + 0.16, side * 0.09, (0.04, u(0.05, 0.14), 0.04), main)
            for end in (-0.7, 0.7):
                add("cylinder", end * length, leg / 2, side * girth * 0.5, (u(0.03, 0.07), leg / 2 + girth * 0.3, 0.05))
    elif kind == "person":
        width = u(0.09, 0.15)
        for side in (-1, 1):
            add("cylinder", 0, 0.24, side * 0.07, (0.05, 0.24, 0.05), second)
            add("cylinder", u(-0.06, 0.1), 0.62, side * (width + 0.04), (0.035, u(0.14, 0.2), 0.035))
        add("sphere", 0, 0.64, 0, (width * 0.75, 0.22, width))
        add("sphere", 0, 0.92, 0, (0.075, 0.09, 0.07), _paint(rng))
    elif kind == "tree":
        stem, crown = u(0.15, 0.5), u(0.2, 0.4)
        add("cylinder", 0, stem / 2, 0, (u(0.02, 0.06), stem / 2 + 0.1, 0.04), second)
        if u() < 0.35:
            add("cone", 0, stem + 0.35, 0, (crown * 0.8, 0.4, crown * 0.8))
        else:
            for _ in range(rng.integers(2, 7)):
                r = crown * u(0.4, 0.8)
                add("sphere", u(-0.2, 0.2), stem + u(0.1, 0.5), u(-0.2, 0.2), (r, r * u(0.6, 1), r))
    elif kind == "house":
        w, d, h = u(0.3, 0.8), u(0.3, 0.6), u(0.3, 0.8)
        add("cube", 0, h / 2, 0, (w, h / 2, d))
        for i in range(rng.integers(0, 4)):
            add("cube", u(-0.8, 0.8) * w, u(0.2, 0.8) * h, (-1) ** i * d, (u(0.04, 0.1), u(0.05, 0.12), 0.01), second)
        if u() < 0.4:
            add("cone", 0, h + 0.2, 0, (w * 1.1, 0.2, d * 1.1), second)
        elif u() < 0.5:
            add("cube", u(-0.5, 0.5) * w, h + 0.15, 0, (w * 0.3, 0.2, d * 0.4), second)
    elif kind == "table":
        w, d, h = u(0.4, 0.9), u(0.3, 0.6), u(0.35, 0.6)
        add("cube", 0, h, 0, (w, 0.03, d))
        for i in (-1, 1):
            for j in (-1, 1):
                add("cube", i * w * 0.9, h / 2, j * d * 0.9, (0.03, h / 2, 0.03), second)
        if u() < 0.5:
            add("cube", -w * 0.95, h + 0.3, 0, (0.03, 0.3, d))
        for _ in range(rng.integers(0, 4)):
            r = u(0.05, 0.15)
            shape = str(rng.choice(["sphere", "cylinder", "cube"]))
            add(shape, u(-0.7, 0.7) * w, h + 0.03 + r, u(-0.7, 0.7) * d, (r, r, r * u(0.5, 1)), _paint(rng), u(0, 3))
    elif kind == "vehicle":
        length, wheel = u(0.6, 1.0), u(0.12, 0.22)
        add("cube", 0, wheel + 0.18, 0, (length, u(0.12, 0.22), u(0.25, 0.4)))
        add("cube", u(-0.3, 0.2), wheel + 0.42, 0, (length * u(0.35, 0.7), u(0.12, 0.22), 0.26), second)
        for i in (-1, 1):
            for j in (-1, 1):
                add("sphere", i * length * 0.65, wheel, j * 0.32, (wheel, wheel, 0.07), (0.02, 0.02, 0.02))
    elif kind == "bottle":
        r, h = u(0.1, 0.25), u(0.5, 0.8)
        add("cylinder", 0, h / 2, 0, (r, h / 2, r))
        add("sphere", 0, h, 0, (r, r * 0.6, r))
        add("cylinder", 0, h + 0.15, 0, (r * 0.35, 0.16, r * 0.35), second)
    elif kind == "hill":
        add("sphere", 0, 0, 0, (u(0.6, 2), u(0.3, 0.9), u(0.6, 2)))
    else:
        for i in range(1 if kind == "single" else rng.integers(3, 8)):
            extent = u(0.1, 0.5, 3) if i == 0 else u(0.05, 0.25, 3)
            shape = str(rng.choice(["sphere", "cube", "cylinder", "cone"]))
            along, across = (0, 0) if i == 0 else u(-0.5, 0.5, 2)
            up = extent[1] + (0 if u() < 0.6 else u(0, 0.6))
            add(shape, along, up, across, extent, _paint(rng), u(0, 3))
    return parts


def _sample_scene(rng: np.random.Generator) -> tuple[Camera, list[Primitive]]:
    """A random camera, one to six units from the main figure, and the solids of its scene."""
    kind = rng.choice(["room", "open", "close"], p=[0.35, 0.35, 0.3])
    u = rng.uniform
    pitch = math.radians(u(-8, 25) if u() < 0.75 else u(20, 60))
    away = u(1.2, 3.0) if kind == "close" else u(2.0, 6.0)
    height = max(0.15, away * math.sin(pitch) + u(0.2, 1.0))
    roll = math.radians(rng.normal(0, 3))
    back = np.array([0.0, math.sin(pitch), math.cos(pitch)])
    right = np.array([math.cos(roll), math.sin(roll) * math.cos(pitch), -math.sin(roll) * math.sin(pitch)])
    right -= back * (right @ back)
    right /= np.linalg.norm(right)
    position = np.array([0.0, height, away * math.cos(pitch)])
    camera = Camera(position, np.stack([right, np.cross(back, right), back]), math.tan(math.radians(u(36, 72)) / 2))
    parts: list[Primitive] = []
    if kind == "room":
        deep, left, wide = u(0.8, 6), -u(1.2, 5), u(1.2, 5)
        tall = height + u(0.8, 3)
        near = position[2] - 0.2
        parts.append(_solid("cube", (0, tall / 2, -deep), (12, tall, 0.05), u(-0.3, 0.3), 0, rng))
        for side in (left, wide):
            if u() < 0.7:
                middle, half = (near - deep) / 2, (near + deep) / 2
                parts.append(_solid("cube", (side, tall / 2, middle), (0.05, tall, half), 0.0, 0, rng))
        if u() < 0.6:
            parts.append(_solid("cube", (0, tall + 0.3, (near - deep) / 2), (12, 0.3, (near + deep) / 2), 0.0, 0, rng))
        for _ in range(rng.integers(0, 4)):
            # paintings, windows, shelves
            centre, extent = (u(left, wide), u(0.3, tall), -deep + 0.06), (*u(0.2, 0.7, 2), u(0.02, 0.25))
            parts.append(_solid("cube", centre, extent, 0.0, 0, rng))
    elif kind == "open":
        for i in range(rng.integers(2, 9)):
            z = -u(6, 45)
            parts += _figure(rng, u(-0.9, 0.9) * (away - z), z, u(1.5, 9), 1 + i)
    elif u() < 0.5:
        for i in range(rng.integers(1, 6)):
            z = -u(2, 14)
            parts += _figure(rng, u(-0.7, 0.7) * (away - z), z, u(0.8, 4), 1 + i)
    else:
        parts.append(_solid("cube", (0, 4, -u(0.7, 3)), (12, 4, 0.05), u(-0.5, 0.5), 0, rng))
    big = {"close": u(0.7, 1.5), "room": u(0.5, 1.2), "open": u(0.6, 1.6)}[kind]
    for i in range(rng.integers(1, 4) if kind == "close" else rng.integers(2, 9)):
        z = 0.0 if i == 0 else u(-3, 0.5 * position[2])
        x = u(-0.3, 0.3) if i == 0 else u(-0.6, 0.6) * (away - z)
        parts += _figure(rng, x, z, big * (1 if i == 0 else u(0.3, 1.1)), 20 + i)
    return camera, parts[:120]


def _waves(rng: np.random.Generator, points: np.ndarray, pace: float) -> np.ndarray:
    """A texture (k,) of about [-1, 1] at (3, k) points: noise, stripes, checks or spots, with `pace` waves per unit."""
    kind = rng.choice(["noise", "stripes", "checks", "spots"], p=[0.72, 0.1, 0.08, 0.1])
    if kind == "noise":
        value = np.zeros(points.shape[1], np.float32)
        for octave in range(5):
            for _ in range(3):
                direction = rng.normal(0, pace * 2**octave, 3).astype(np.float32)
                value += np.sin(direction @ points + rng.uniform(0, 6)) * np.float32(0.75**octave / 3)
        return value
    turned = np.linalg.qr(rng.normal(0, 1, (3, 3)))[0] if kind == "spots" else np.eye(3)
    waves = np.sin(turned.astype(np.float32) @ points * np.float32(3 * pace) + rng.uniform(0, 6))
    if kind == "stripes":
        return np.sign(waves[rng.integers(3)])
    product = waves.prod(0)
    return np.sign(product) if kind == "checks" else np.tanh(8 * (product - 0.2))


def render_scene(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render one scene.

    Returns:
        The image (HEAD_SIDE, HEAD_SIDE, 3) uint8; inverse distances (TARGET, TARGET) fp16, 1 / FAR for the sky; normals
        (3, TARGET, TARGET) int8, in units of 1 / 127.
    """
    rng = np.random.default_rng(seed)
    while True:
        camera, parts = _sample_scene(rng)
        labels = cast(camera, parts, TARGET)
        # rejects cameras that are inside a solid or see only a wall
        inverse = 1 / np.minimum(labels.t, np.float32(FAR))
        if labels.t.min() > 0.15 and np.quantile(inverse, 0.95) > 1.15 * np.quantile(inverse, 0.05):
            break
    axes = camera.axes.astype(np.float32)
    normal = np.einsum("ij,jhw->ihw", axes, labels.normal)
    normal = np.where(labels.part == SKY, np.float32(SKY_NORMAL)[:, None, None], normal)
    image = _photograph(rng, camera, parts)
    return image, inverse.astype(np.float16), np.round(normal * 127).astype(np.int8)


def _photograph(rng: np.random.Generator, camera: Camera, parts: list[Primitive]) -> np.ndarray:
    """The image of a scene, with textures, sun, shadows, haze, and a camera's exposure, noise, blur and JPEG."""
    n, u = HEAD_SIDE, rng.uniform
    trace, rays = cast(camera, parts, n), camera.rays(n)
    solid = trace.part != SKY
    points = camera.position.astype(np.float32)[:, None, None] + np.where(solid, trace.t, 0) * rays
    colour = np.zeros((3, n, n), np.float32)
    for index in [GROUND, *range(len(parts))]:
        mask = trace.part == index
        if not mask.any():
            continue
        paint = np.float32(_paint(rng) if index == GROUND else parts[index].paint)[:, None]
        other = np.float32(_paint(rng))[:, None] if u() < 0.3 else paint * np.float32(u(0.2, 0.9))
        pace = u(0.5, 6) if index == GROUND or parts[index].extent.max() > 3 else u(1.5, 15)
        mix = np.clip(0.5 + _waves(rng, points[:, mask], pace) * u(0.05, 0.6), 0, 1)
        colour[:, mask] = paint + (other - paint) * mix
    light = rng.normal(0, 1, 3)
    light[1] = abs(light[1]) + 0.4
    light[2] += 0.3
    light = (light / np.linalg.norm(light)).astype(np.float32)
    sunny = np.ones((n, n), np.float32)
    if u() < 0.6:
        origin = points[:, solid] + 2e-3 * trace.normal[:, solid]
        lit = np.ones(origin.shape[1], bool)
        for part in parts:
            # walls and ceilings cast no shadow
            if part.extent.max() < 8:
                o = part.to_local(*(origin - part.centre.astype(np.float32)[:, None]))
                lit &= ~np.isfinite(intersect(part.shape, o, part.to_local(*light)))
        sunny[solid] = lit
    sun, ambient = u(0.3, 1.3), u(0.15, 0.7)
    facing = np.maximum(np.einsum("i,ihw->hw", light, trace.normal), 0)
    sky = np.float32([_paint(rng), _paint(rng)]) * 0.5 + np.float32(u(0.2, 0.5))
    rise = np.clip(rays[1] / 0.6, 0, 1)
    backdrop = sky[0][:, None, None] * (1 - rise) + sky[1][:, None, None] * rise
    if u() < 0.5:
        clouds = _waves(rng, rays.reshape(3, -1) / np.maximum(rays[1].ravel(), 0.1), 1.0).reshape(n, n)
        backdrop = backdrop + np.float32(u(0, 0.3)) * np.clip(clouds, 0, 1)
    colour = colour * (ambient * (0.75 + 0.25 * trace.normal[1]) + sun * facing * sunny)
    haze = np.where(solid, 1 - np.exp(-trace.t.clip(0, FAR) / u(15, 200)), 1) if u() < 0.6 else (~solid)
    colour = colour * (1 - haze) + backdrop * haze
    colour = colour * np.float32(u(0.7, 1.1) / max(0.2, np.quantile(colour, 0.95)))
    colour = colour * np.float32(np.exp(rng.normal(0, 0.08, 3)))[:, None, None]
    tone = np.clip(colour, 0, 1) ** np.float32(1 / u(1.8, 2.6)) + rng.normal(0, u(0, 0.03), (3, n, n))
    image = Image.fromarray((np.clip(tone, 0, 1).transpose(1, 2, 0) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(u(0.3, 1.4)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(u(50, 95)))
    return np.asarray(Image.open(file))
