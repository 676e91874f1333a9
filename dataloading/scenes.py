"""The embedded dataset: ray-cast scenes with exact expert labels, captions and questions, in numpy only.

Spheres, cubes, cylinders, cones and signs stand on a ground plane under one light. World and camera axes are x right,
y up, z towards the viewer. Camera rays have z = -1 in camera space and are not normalised, so the ray parameter `t`
is the distance along the viewing axis. A primitive is an affine image of a unit shape, which leaves `t` unchanged:
all intersections are with unit shapes.
"""

import fcntl
import functools
import io
import math
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from prismer.dataloading.scene_text import ATTRIBUTES, write_captions, write_questions
from prismer.dataloading.shards import Sample, ShardWriter, read_index
from prismer.experts import BACKGROUND

SEG_CLASSES = [*ATTRIBUTES["shape"], "sign", "ground", "sky"]
OBJECT_CLASSES = [*ATTRIBUTES["shape"], "sign"]
WORDS = (
    "bank bar bike boat book bus cafe cake city club door exit farm film fish food free game gift hotel ice juice lamp "
    "menu milk music new open park pizza post road sale ship shop spa stop taxi tea toys water zoo"
).split()

_PAINT = {  # linear RGB albedo
    "red": (0.72, 0.03, 0.03),
    "orange": (0.90, 0.26, 0.01),
    "yellow": (0.88, 0.70, 0.03),
    "green": (0.05, 0.38, 0.05),
    "cyan": (0.03, 0.60, 0.66),
    "blue": (0.03, 0.10, 0.66),
    "purple": (0.28, 0.04, 0.46),
    "white": (0.86, 0.86, 0.84),
}
_GROUNDS = [
    (0.34, 0.30, 0.25),
    (0.30, 0.33, 0.30),
    (0.26, 0.28, 0.32),
    (0.40, 0.36, 0.28),
    (0.24, 0.22, 0.22),
]
_SKIES = [  # horizon, zenith
    ((0.66, 0.78, 0.90), (0.16, 0.36, 0.72)),
    ((0.82, 0.80, 0.76), (0.40, 0.50, 0.62)),
    ((0.90, 0.72, 0.55), (0.30, 0.36, 0.60)),
    ((0.70, 0.76, 0.78), (0.45, 0.52, 0.58)),
]
_BOARDS = [  # panel, letters
    ((0.85, 0.84, 0.80), (0.02, 0.02, 0.03)),
    ((0.02, 0.07, 0.30), (0.90, 0.90, 0.88)),
    ((0.02, 0.16, 0.06), (0.90, 0.90, 0.86)),
    ((0.30, 0.02, 0.03), (0.92, 0.90, 0.86)),
    ((0.80, 0.62, 0.05), (0.02, 0.02, 0.02)),
]
_POST = (0.10, 0.09, 0.08)
_RADIUS = {"small": 0.46, "large": 0.85}
# half extents in units of the radius, chosen so that the four shapes look equally large
_EXTENT = {
    "sphere": (1.0, 1.0, 1.0),
    "cube": (0.84, 0.84, 0.84),
    "cylinder": (0.84, 0.95, 0.84),
    "cone": (1.0, 1.12, 1.0),
}

_SOURCE = "rendered scenes"
_VERSION = 1
"""Raised by whoever changes what a seed looks like, so that no old set passes for a new one."""
_REFERENCE_SIZE = 128
"""The picture size at which a layout is judged, whatever size is rendered: a seed means one scene."""
_MIN_PIXELS = 45
_FAR = 24.0
"""Where depth labels are clipped: the sky and the ground beyond are this far."""
_GROUND, _SKY = -1, -2


@dataclass(frozen=True)
class _Camera:
    """A pinhole camera; `axes` rows are right, up, back in world space; the picture is square."""

    position: np.ndarray
    axes: np.ndarray
    tangent: float

    def rays(self, n: int) -> np.ndarray:
        """(3, n, n) fp32 world directions through the centres of n x n pixels."""
        x = ((np.arange(n, dtype=np.float32) + 0.5) * 2 / n - 1) * np.float32(self.tangent)
        right, up, back = self.axes.astype(np.float32)[:, :, None, None]
        return right * x[None, :] - up * x[:, None] - back

    def project(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) world points to (..., 3): column and row as fractions of the picture, distance."""
        right, up, back = np.moveaxis((points - self.position) @ self.axes.T, -1, 0)
        distance = np.maximum(-back, 0.1)
        scale = 0.5 / (distance * self.tangent)
        return np.stack([0.5 + right * scale, 0.5 - up * scale, distance], axis=-1)


@dataclass(frozen=True)
class _Primitive:
    """An affine image of a unit shape: `extent` half sizes, turned by `yaw`, at `centre`; part of thing `owner`."""

    shape: str
    centre: np.ndarray
    extent: np.ndarray
    yaw: float
    owner: int
    paint: tuple[float, float, float]
    shiny: bool = False
    word: str | None = None
    letters: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def to_local(self, x, y, z) -> tuple:
        """Turns a world vector (three arrays or numbers) into the unit shape's space."""
        c, s = np.float32(math.cos(self.yaw)), np.float32(math.sin(self.yaw))
        a, b, d = (1 / self.extent).astype(np.float32)
        return (c * x - s * z) * a, y * b, (s * x + c * z) * d

    def to_world(self, x, y, z) -> np.ndarray:
        """Turns a vector by `yaw`, without scaling."""
        return _turn(np.float32(math.cos(self.yaw)), np.float32(math.sin(self.yaw)), x, y, z)

    def corners(self) -> np.ndarray:
        """(8, 3) corners of the box around the primitive."""
        x, y, z = (_CORNERS * self.extent).T
        return self.centre + _turn(math.cos(self.yaw), math.sin(self.yaw), x, y, z).T


_CORNERS = np.array([(i, j, k) for i in (-1.0, 1.0) for j in (-1.0, 1.0) for k in (-1.0, 1.0)])


def _turn(c, s, x, y, z) -> np.ndarray:
    """The vectors (x, y, z) turned about the vertical axis by the angle with cosine `c` and sine `s`, (3, ...)."""
    return np.stack(np.broadcast_arrays(c * x + s * z, y, c * z - s * x))


@dataclass(frozen=True)
class _Layout:
    """Everything that a picture is made of; `things` are the description of objects, then signs."""

    camera: _Camera
    primitives: list[_Primitive]
    things: list[dict]
    light: np.ndarray
    sun: float
    ambient: float
    ground: np.ndarray
    sky: np.ndarray
    pattern: np.ndarray


@dataclass(frozen=True)
class _Trace:
    """What n x n rays hit: `t`, the primitive (or _GROUND, _SKY), world normals (3, n, n); per primitive its hits."""

    t: np.ndarray
    part: np.ndarray
    normal: np.ndarray
    hits: list[int]


@dataclass(frozen=True)
class RenderedScene:
    """One picture with its labels and texts.

    Attributes:
        rgb: (size, size, 3) uint8.
        planes: expert -> uint8 (label_size, label_size), normals with a last dimension of 3.
        meta: the sample's JSON: captions, questions, instances, words, size, source, licence, and `scene`, the
            description of what stands where.
    """

    rgb: np.ndarray
    planes: dict[str, np.ndarray]
    meta: dict


def _intersect(shape: str, o: tuple, d: tuple) -> np.ndarray:
    """First `t` > 0 at which rays o + t d enter a unit shape, inf where they do not."""
    ox, oy, oz = o
    dx, dy, dz = d
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if shape == "sphere":
            a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
            c = ox * ox + oy * oy + oz * oz - 1
            t = (-b - np.sqrt(b * b - a * c)) / a
            return np.where(t > 1e-3, t, np.float32(np.inf))
        low, high = (-1 - oy) / dy, (1 - oy) / dy
        near, far = np.minimum(low, high), np.maximum(low, high)
        if shape == "cube":
            for origin, direction in ((ox, dx), (oz, dz)):
                low, high = (-1 - origin) / direction, (1 - origin) / direction
                near = np.maximum(near, np.minimum(low, high))
                far = np.minimum(far, np.maximum(low, high))
        elif shape == "cylinder":
            a, b, c = dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - 1
            root = np.sqrt(b * b - a * c)
            near, far = np.maximum(near, (-b - root) / a), np.minimum(far, (-b + root) / a)
        else:
            # the radius of the cone along the ray is q + m t; its base is never seen, since it stands on the ground
            q, m = (1 - oy) / 2, -dy / 2
            a, b = dx * dx + dz * dz - m * m, ox * dx + oz * dz - q * m
            c = ox * ox + oz * oz - q * q
            root = np.sqrt(b * b - a * c)
            first, second = (-b - root) / a, (-b + root) / a
            first, second = np.minimum(first, second), np.maximum(first, second)
            first_hits = (first > 1e-3) & (np.abs(oy + first * dy) <= 1)
            second_hits = (second > 1e-3) & (np.abs(oy + second * dy) <= 1)
            return np.where(first_hits, first, np.where(second_hits, second, np.float32(np.inf)))
        return np.where((near <= far) & (near > 1e-3), near, np.float32(np.inf))


def _local_normal(primitive: _Primitive, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Unit world normals (3, k) at points of the unit shape."""
    if primitive.shape == "cube":
        axis = np.argmax(np.abs(np.stack([x, y, z])), axis=0)
        x, y, z = (np.where(axis == i, np.sign(v), 0) for i, v in enumerate((x, y, z)))
    elif primitive.shape == "cylinder":
        top = y > 0.9995
        x, y, z = np.where(top, 0, x), np.where(top, 1, 0), np.where(top, 0, z)
    elif primitive.shape == "cone":
        y = (1 - y) / 4
    a, b, c = primitive.extent.astype(np.float32)
    normal = primitive.to_world(x / a, y / b, z / c)
    return normal / np.sqrt((normal * normal).sum(0))


def _window(camera: _Camera, points: np.ndarray, n: int) -> tuple[slice, slice]:
    """Rows and columns of an n x n picture that hold the convex hull of `points`."""
    left, top, right, bottom = _frame(camera, points) * n
    edges = np.clip([top - 1, bottom + 2, left - 1, right + 2], 0, n).astype(int).tolist()
    return slice(*edges[:2]), slice(*edges[2:])


def _trace(camera: _Camera, primitives: list[_Primitive], n: int) -> _Trace:
    """Casts n x n rays, each primitive only inside the window that it can cover."""
    rays = camera.rays(n)
    eye = camera.position.astype(np.float32)
    with np.errstate(divide="ignore"):
        t = np.where(rays[1] < -1e-6, -eye[1] / rays[1], np.float32(np.inf))
    part = np.where(t < 80, np.int8(_GROUND), np.int8(_SKY))
    normal = np.zeros((3, n, n), np.float32)
    normal[1] = part == _GROUND
    hits = []
    for index, primitive in enumerate(primitives):
        window = _window(camera, primitive.corners(), n)
        o = primitive.to_local(*(eye - primitive.centre.astype(np.float32)))
        d = primitive.to_local(*rays[:, window[0], window[1]])
        found = _intersect(primitive.shape, o, d)
        hits.append(int(np.isfinite(found).sum()))
        nearer = found < t[window]
        t[window][nearer] = found[nearer]
        part[window][nearer] = index
        at = found[nearer]
        normal[:, window[0], window[1]][:, nearer] = _local_normal(
            primitive,
            *(origin + at * direction[nearer] for origin, direction in zip(o, d, strict=True)),
        )
    return _Trace(t, part, normal, hits)


@functools.cache
def _letters(word: str) -> np.ndarray:
    """Coverage (h, w) fp32 of a word in bold capitals, cropped; about 28 rows, twice what a picture resolves."""
    font = ImageFont.load_default(size=38)
    picture = Image.new("L", (40 * len(word) + 40, 64))
    ImageDraw.Draw(picture).text((20, 8), word.upper(), fill=255, font=font, stroke_width=1)
    return np.asarray(picture.crop(picture.getbbox()), np.float32) / 255


def _board_extent(word: str, height: float) -> np.ndarray:
    """Half sizes of a board whose capitals are `height` tall, with a margin around them."""
    rows, columns = _letters(word).shape
    return np.array([height * columns / rows / 2 + 0.38 * height, height / 2 + 0.30 * height, 0.06])


def _board_letters(
    primitive: _Primitive, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For board points in unit coordinates: the coverage by letters, and whether they lie in the word's rectangle."""
    cover = _letters(primitive.word)
    rows, columns = cover.shape
    height = primitive.extent[1] / 0.8
    column = (x * primitive.extent[0] / height) * rows + columns / 2 - 0.5
    row = rows / 2 - (y * primitive.extent[1] / height) * rows - 0.5
    inside = (column > -2) & (column < columns + 1) & (row > -2) & (row < rows + 1)
    padded = np.pad(cover, 2)
    column, row = np.clip(column + 2, 0, columns + 2), np.clip(row + 2, 0, rows + 2)
    i, j = row.astype(int), column.astype(int)
    v, u = row - i, column - j
    top = padded[i, j] * (1 - u) + padded[i, j + 1] * u
    bottom = padded[i + 1, j] * (1 - u) + padded[i + 1, j + 1] * u
    return top * (1 - v) + bottom * v, inside


def _local_points(
    layout: _Layout, trace: _Trace, rays: np.ndarray, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (mask) of primitive `index` and their points (3, k) in its unit space."""
    primitive = layout.primitives[index]
    mask = trace.part == index
    offset = (layout.camera.position - primitive.centre).astype(np.float32)[:, None]
    return mask, np.stack(primitive.to_local(*(offset + trace.t[mask] * rays[:, mask])))


def _shade(layout: _Layout, n: int, trace: _Trace) -> np.ndarray:
    """Linear colours (3, n, n) of n x n rays; neighbours in a 2 x 2 cell see four points of the light."""
    camera, light = layout.camera, layout.light
    rays = camera.rays(n)
    eye = camera.position.astype(np.float32)[:, None, None]
    solid = trace.part != _SKY
    point = eye + np.where(solid, trace.t, 0) * rays
    # soft shadows: the four rays of a pixel each take another quarter of the light
    side = np.cross(light, (0.0, 1.0, 0.0))
    side /= np.linalg.norm(side)
    spread = 0.035 * np.array([[side, np.cross(side, light)], [-np.cross(side, light), -side]])
    lights = np.tile((light + spread).transpose(2, 0, 1), (1, n // 2, n // 2)).astype(np.float32)

    sunny, near = _shadows(layout, n, trace, point, lights)
    lambert = np.maximum((trace.normal * lights).sum(0), 0) * sunny
    horizon, zenith = layout.sky[:, :, None, None]
    # light from above is sky, light from below what the ground returns
    hemisphere = 0.5 + 0.5 * trace.normal[1]
    bounce = layout.ground[:, None, None]
    fill = layout.ambient * ((0.4 * horizon + 0.6) * hemisphere + bounce * (1 - hemisphere)) * near
    colour = _albedo(layout, trace, rays, point) * (fill + layout.sun * lambert)
    for index, primitive in enumerate(layout.primitives):
        if primitive.shiny:
            mask, local = _local_points(layout, trace, rays, index)
            vectors = trace.normal[:, mask], rays[:, mask], lights[:, mask]
            gloss = _gloss(layout, primitive, *vectors, sunny[mask])
            if primitive.shape == "cube":
                # a polished cube has bevelled edges, which catch the light from everywhere
                gloss += 0.4 * (np.sort(np.abs(local), axis=0)[1] > 0.89)
            colour[:, mask] = 0.72 * colour[:, mask] + gloss
    height = np.clip(rays[1] / 0.35, 0, 1)
    backdrop = horizon * (1 - height) + zenith * height
    haze = np.where(solid, 1 - np.exp(-np.maximum(trace.t - 10, 0) / 26), 1)
    return colour * (1 - haze) + backdrop * haze


def _gloss(layout: _Layout, primitive: _Primitive, normal, ray, light, sunny) -> np.ndarray:
    """What a shiny surface mirrors at k points (all vectors (3, k)): the surroundings, tinted, and the light."""
    ray = ray / np.sqrt((ray * ray).sum(0))
    facing = (ray * normal).sum(0)
    mirror = ray - 2 * facing * normal
    # the mirrored ground brightens towards its horizon, where the mirrored sky is brightest
    below = np.clip(1 + mirror[1] / 0.4, 0, 1) ** 2
    above = np.clip(mirror[1] * 12, 0, 1)
    horizon, zenith = layout.sky[:, :, None]
    ground = layout.ground[:, None] * (0.25 + below)
    sky = horizon + (zenith - horizon) * np.clip(mirror[1], 0, 1)
    around = ground + (sky - ground) * above
    paint = np.float32(primitive.paint)[:, None]
    tint = 0.4 + 0.6 * paint / paint.max()
    if primitive.shape in ("cylinder", "cone"):
        # upright walls never mirror a light this high: they show it as a streak
        flat = mirror[[0, 2]] / np.sqrt((mirror[[0, 2]] ** 2).sum(0) + 1e-6)
        aim = light[[0, 2]] / np.sqrt((light[[0, 2]] ** 2).sum(0))
        glint = 0.7 * np.maximum((flat * aim).sum(0), 0) ** 60 * (normal[1] < 0.9)
    else:
        glint = 1.8 * np.maximum((mirror * light).sum(0), 0) ** 60
    return (0.30 + 0.5 * (1 + facing) ** 4) * around * tint + glint * sunny


def _albedo(layout: _Layout, trace: _Trace, rays: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Colour of every surface: a gently patterned ground, painted objects, lettered boards."""
    a, b, c, amount = layout.pattern.astype(np.float32)
    wave = np.sin(a * point[0] + b * point[2] + c) * np.sin(b * point[0] - a * point[2] + 2 * c)
    albedo = layout.ground[:, None, None] * (1 + amount * wave)
    for index, primitive in enumerate(layout.primitives):
        if primitive.word is None:
            albedo[:, trace.part == index] = np.float32(primitive.paint)[:, None]
            continue
        mask, (x, y, z) = _local_points(layout, trace, rays, index)
        cover, _ = _board_letters(primitive, x, y)
        # a painted rim of the front, and the narrow sides, are in the colour of the letters
        width, height, _ = primitive.extent
        rim = np.minimum((1 - np.abs(x)) * width, (1 - np.abs(y)) * height) < 0.06
        cover = np.where(z > 0.99, np.maximum(cover, rim), 1)
        paint, ink = np.float32(primitive.paint)[:, None], np.float32(primitive.letters)[:, None]
        albedo[:, mask] = paint + cover * (ink - paint)
    return albedo


def _shadows(
    layout: _Layout, n: int, trace: _Trace, point: np.ndarray, lights: np.ndarray
) -> tuple:
    """How much sun (0 or 1) and how much ambient light (contact shadows, 0..1) reaches each point, both (n, n)."""
    sunny = np.ones((n, n), np.float32)
    near = np.ones((n, n), np.float32)
    for index, primitive in enumerate(layout.primitives):
        corners = primitive.corners()
        # a shadow lies within the hull of the primitive and its projections to the ground
        quarters = lights[:, :2, :2].reshape(3, 4).T
        fallen = [corners - corners[:, 1:2] * (light / light[1]) for light in quarters]
        rows, columns = _window(layout.camera, np.concatenate([corners, *fallen]), n)
        part = trace.part[rows, columns]
        other = (part != _SKY) & (part != index)
        for sibling, candidate in enumerate(layout.primitives):
            if candidate.owner == primitive.owner:
                other &= part != sibling
        origin = point[:, rows, columns][:, other] + 1e-3 * trace.normal[:, rows, columns][:, other]
        o = primitive.to_local(*(origin - primitive.centre.astype(np.float32)[:, None]))
        d = primitive.to_local(*lights[:, rows, columns][:, other])
        sunny[rows, columns][other] *= ~np.isfinite(_intersect(primitive.shape, o, d))
        if primitive.centre[1] < primitive.extent[1] + 0.1:
            reach = primitive.extent[[0, 2]].max()
            ring = np.array([[i, 0, j] for i in (-1, 1) for j in (-1, 1)]) * 2.2 * reach
            rows, columns = _window(layout.camera, primitive.centre * [1, 0, 1] + ring, n)
            floor = trace.part[rows, columns] == _GROUND
            middle = primitive.centre.astype(np.float32)
            x, z = (point[k, rows, columns][floor] - middle[k] for k in (0, 2))
            away = np.maximum(np.sqrt(x * x + z * z) / np.float32(reach) - 0.8, 0)
            near[rows, columns][floor] *= 1 - 0.55 * np.exp(-4 * away * away)
    return sunny, near


def _picture(layout: _Layout, size: int, trace: _Trace) -> np.ndarray:
    """(size, size, 3) uint8 from the trace of 2 x 2 rays per pixel."""
    colour = np.clip(_shade(layout, 2 * size, trace), 0, 1)
    colour = colour.reshape(3, size, 2, size, 2).mean((2, 4)) ** np.float32(1 / 2.2)
    return (colour.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)


def _sample_camera(rng: np.random.Generator) -> _Camera:
    azimuth = rng.uniform(-0.12, 0.12)
    distance = rng.uniform(8.0, 8.8)
    height = rng.uniform(2.8, 3.5)
    position = np.array([distance * math.sin(azimuth), height, distance * math.cos(azimuth)])
    back = position - np.array([rng.uniform(-0.15, 0.15), rng.uniform(0.75, 0.95), 0.0])
    back /= np.linalg.norm(back)
    right = np.cross((0.0, 1.0, 0.0), back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(back, right), back])
    return _Camera(position, axes, math.tan(rng.uniform(0.35, 0.38)))


def _sample_looks(rng: np.random.Generator) -> dict:
    """The light, the ground and the sky of a layout; the light comes over the viewer's shoulder."""
    azimuth, height = rng.uniform(0.35, 1.25) * rng.choice([-1, 1]), rng.uniform(0.70, 1.05)
    light = [math.sin(azimuth) * math.cos(height), math.sin(height), math.cos(azimuth) * math.cos(height)]
    ground = np.float32(_GROUNDS[rng.integers(len(_GROUNDS))])
    angle, pace = rng.uniform(0, math.pi), rng.uniform(1.2, 3.0)
    phase, amount = rng.uniform(0, 6), rng.uniform(0, 0.10)
    return {
        "light": np.array(light),
        "sun": np.float32(rng.uniform(0.95, 1.2)),
        "ambient": np.float32(rng.uniform(0.22, 0.32)),
        "ground": ground * np.float32(rng.uniform(0.8, 1.25)),
        "sky": np.float32(_SKIES[rng.integers(len(_SKIES))]),
        "pattern": np.array([pace * math.cos(angle), pace * math.sin(angle), phase, amount]),
    }


def _sample_signs(rng: np.random.Generator) -> list[dict]:
    """None, one or two signs; two have short words, to fit side by side."""
    number = int(rng.choice(3, p=[0.40, 0.50, 0.10]))
    words = rng.choice([w for w in WORDS if number < 2 or len(w) < 5], number, replace=False)
    return [{"shape": "sign", "word": str(word)} for word in words]


def _sample_objects(rng: np.random.Generator) -> list[dict]:
    """One to five objects; repeated shapes and colours make counting and telling apart worth asking."""
    things: list[dict] = []
    for _ in range(rng.choice(5, p=[0.10, 0.20, 0.25, 0.25, 0.20]) + 1):
        thing = {key: str(rng.choice(values)) for key, values in ATTRIBUTES.items()}
        if things and rng.uniform() < 0.45:
            key = str(rng.choice(["shape", "colour"]))
            thing[key] = things[rng.integers(len(things))][key]
        things.append(thing)
    return things


def _place_sign(
    rng: np.random.Generator, camera: _Camera, word: str, across: float, owner: int
) -> list[_Primitive]:
    """A lettered board on two posts behind the objects, turned roughly to the camera."""
    centre = np.array([across, 0.0, rng.uniform(-2.9, -2.3)])
    distance = camera.project(centre[None])[0, 2]
    # capitals 12.5 to 14 pixels tall in a picture of 128
    height = rng.uniform(12.5, 14.0) / _REFERENCE_SIZE * 2 * camera.tangent * distance
    extent = _board_extent(word, height)
    paint, ink = _BOARDS[rng.integers(len(_BOARDS))]
    toward = camera.position - centre
    yaw = math.atan2(toward[0], toward[2]) + rng.uniform(-0.14, 0.14)
    base = rng.uniform(0.75, 1.05)
    middle = centre + [0, base + extent[1], 0]
    board = _Primitive("cube", middle, extent, yaw, owner, paint, word=word, letters=ink)
    post = np.array([0.05, base / 2, 0.05])
    side = 0.8 * extent[0] * np.array([math.cos(yaw), 0.0, -math.sin(yaw)])
    feet = [centre + [0, base / 2, 0] + end * side for end in (-1, 1)]
    return [board, *(_Primitive("cube", foot, post, yaw, owner, _POST) for foot in feet)]


def _place_object(
    rng: np.random.Generator, camera: _Camera, thing: dict, owner: int, others: list[_Primitive]
) -> _Primitive | None:
    """The object on the ground, apart from the others and wholly in the picture; None if no place was found."""
    shape, paint, shiny = thing["shape"], _PAINT[thing["colour"]], thing["material"] == "shiny"
    extent = np.array(_EXTENT[shape]) * _RADIUS[thing["size"]] * rng.uniform(0.94, 1.06)
    # many places at once, the first good one is taken
    centres = rng.uniform((-3.2, extent[1], -2.0), (3.2, extent[1], 3.0), (64, 3))
    yaws = rng.uniform(0, math.pi, (64, 1))
    corners = np.moveaxis(_turn(np.cos(yaws), np.sin(yaws), *(_CORNERS * extent).T), 0, -1)
    frames = _frame(camera, centres[:, None] + corners)
    good = (frames.min(1) > 0.02) & (frames.max(1) < 0.98)
    for other in others:
        away = np.hypot(*(centres - other.centre)[:, [0, 2]].T)
        covered = _covered(frames, _frame(camera, other.corners()))
        if other.word is None:
            good &= (away > extent[[0, 2]].max() + other.extent[[0, 2]].max() + 0.25) & (covered < 0.45)
        else:
            # boards hang above the ground: only their word is in the way
            good &= covered < 0.02
    if not good.any():
        return None
    i = int(good.argmax())
    return _Primitive(shape, centres[i], extent, float(yaws[i, 0]), owner, paint, shiny)


def _covered(frames: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """For each of (k, 4) frames, how much of the smaller of it and `frame` the two share."""
    low, high = np.maximum(frames[:, :2], frame[:2]), np.minimum(frames[:, 2:], frame[2:])
    smaller = np.minimum((frames[:, 2:] - frames[:, :2]).prod(1), (frame[2:] - frame[:2]).prod())
    return np.maximum(high - low, 0).prod(1) / smaller


def _frame(camera: _Camera, points: np.ndarray) -> np.ndarray:
    """(..., k, 3) points to (..., 4): their left, top, right and bottom as fractions of the picture."""
    place = camera.project(points)[..., :2]
    return np.concatenate([place.min(-2), place.max(-2)], axis=-1)


def _sample_layout(rng: np.random.Generator) -> _Layout:
    """A scene that shows every object and every word: its things are drawn once, their places until they fit."""
    looks = _sample_looks(rng)
    while True:
        objects, signs = _sample_objects(rng), _sample_signs(rng)
        # some crowds fit nowhere: after many tries, other things
        for _ in range(20):
            camera = _sample_camera(rng)
            primitives: list[_Primitive] = []
            for owner, sign in enumerate(signs, len(objects)):
                # a pair stands to the left and to the right
                across = rng.uniform(-1.6, 1.6) if len(signs) == 1 else 3.7 * (owner - len(objects)) - 1.85
                primitives += _place_sign(rng, camera, sign["word"], across, owner)
            # the large ones first, while there is room
            for owner, thing in sorted(enumerate(objects), key=lambda item: item[1]["size"]):
                primitive = _place_object(rng, camera, thing, owner, primitives)
                if primitive is None:
                    break
                primitives.append(primitive)
            else:
                layout = _Layout(camera, primitives, objects + signs, **looks)
                if _is_clear(layout):
                    return layout


def _is_clear(layout: _Layout) -> bool:
    """Whether every object shows enough of itself and no word is cut off."""
    frames = np.stack([_frame(layout.camera, p.corners()) for p in layout.primitives])
    if frames.min() < 0.01 or frames.max() > 0.99:
        return False
    trace = _trace(layout.camera, layout.primitives, _REFERENCE_SIZE)
    seen = np.bincount(trace.part[trace.part >= 0], minlength=len(layout.primitives))
    for primitive, pixels, hits in zip(layout.primitives, seen, trace.hits, strict=True):
        if primitive.word is not None:
            enough = 0.97 * hits
        else:
            enough = 0 if primitive.paint == _POST else max(_MIN_PIXELS, 0.55 * hits)
        if pixels < enough:
            return False
    return True


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of picture `index` of a split: splits draw from streams that never meet."""
    entropy = [seed, int.from_bytes(split.encode(), "little"), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _owners(layout: _Layout, part: np.ndarray) -> np.ndarray:
    """The thing at each pixel; _GROUND and _SKY stay."""
    table = np.array([*(p.owner for p in layout.primitives), _SKY, _GROUND], np.int16)
    return table[part]


def _depth_map(t: np.ndarray) -> np.ndarray:
    """Inverse distance, near = bright, stretched to 0..255; the sky counts as _FAR away."""
    inverse = 1 / np.minimum(t, np.float32(_FAR))
    low, high = inverse.min(), inverse.max()
    return ((inverse - low) / (high - low) * 255).astype(np.uint8)


def _edge_map(owner: np.ndarray, t: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Dark lines on white where the thing, the distance or the surface direction jumps between neighbours."""
    edge = np.zeros(t.shape, np.float32)
    inverse = 1 / np.minimum(t, np.float32(_FAR))
    for ahead, behind in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[1:, 1:], np.s_[:-1, :-1]),
        (np.s_[1:, :-1], np.s_[:-1, 1:]),
    ):
        jump = (owner[ahead] != owner[behind]).astype(np.float32)
        fold = 1 - (normal[(slice(None), *ahead)] * normal[(slice(None), *behind)]).sum(0)
        jump = np.maximum(jump, fold > 0.3)
        step = np.abs(inverse[ahead] / inverse[behind] - 1)
        jump = np.maximum(jump, step > 0.15)
        straight = ahead[0] == slice(None) or ahead[1] == slice(None)
        for place in (ahead, behind):
            edge[place] += jump * (1.0 if straight else 0.5)
    return (255 - 255 * np.minimum(edge / 2, 1)).astype(np.uint8)


def _box(mask: np.ndarray) -> list[int] | None:
    """[left, top, right, bottom] of the true pixels, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _paint_boxes(boxes: list[list[int]], depth: np.ndarray) -> np.ndarray:
    """Box masks in depth order: an inner box lies in front, else the brighter (nearer) one keeps the overlap."""
    areas = np.zeros((len(boxes), *depth.shape), bool)
    for area, (left, top, right, bottom) in zip(areas, boxes, strict=True):
        area[top:bottom, left:right] = True
    masks = areas.copy()
    brightness = [depth[area].mean() for area in areas]
    for i in range(len(boxes)):
        for j in range(i + 1, len(boxes)):
            overlap = areas[i] & areas[j]
            if not overlap.any():
                continue
            if (overlap == areas[i]).all() or (overlap == areas[j]).all():
                front, back = (i, j) if areas[i].sum() < areas[j].sum() else (j, i)
            elif brightness[i] != brightness[j]:
                front, back = (i, j) if brightness[i] > brightness[j] else (j, i)
            else:
                continue
            masks[back] &= ~masks[front]
    painted = np.full(depth.shape, BACKGROUND, np.uint8)
    for index, mask in enumerate(masks):
        painted[mask] = index
    return painted


def _overlap(a: list[int], b: list[int]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _view_normals(layout: _Layout, trace: _Trace) -> np.ndarray:
    """Normals (3, n, n) in camera space; the sky, which has none, faces the camera."""
    right, up, back = (
        sum(np.float32(axis[k]) * trace.normal[k] for k in range(3)) for axis in layout.camera.axes
    )
    return np.stack([right, up, np.where(trace.part == _SKY, np.float32(1), back)])


def _planes(layout: _Layout, size: int, trace: _Trace) -> tuple[dict[str, np.ndarray], dict, dict]:
    """The six label maps from a trace of one ray per label pixel, the instances table and the words table."""
    owner = _owners(layout, trace.part)
    view = _view_normals(layout, trace)
    shapes = [SEG_CLASSES.index(thing["shape"]) for thing in layout.things]
    # indexed from the end by _SKY and _GROUND
    classes_of = np.array([*shapes, SEG_CLASSES.index("sky"), SEG_CLASSES.index("ground")], np.uint8)
    normal = ((np.clip(view, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    depth = _depth_map(trace.t)
    boxes, classes = [], []
    for index, thing in enumerate(layout.things):
        box = _box(owner == index)
        if box is not None and all(_overlap(box, kept) <= 0.95 for kept in boxes):
            boxes.append(box)
            classes.append(OBJECT_CLASSES.index(thing["shape"]))
    words = np.full((size, size), BACKGROUND, np.uint8)
    table = {}
    rays = layout.camera.rays(size)
    for index, primitive in enumerate(layout.primitives):
        if primitive.word is not None:
            mask, (x, y, z) = _local_points(layout, trace, rays, index)
            _, inside = _board_letters(primitive, x, y)
            words[mask] = np.where(inside & (z > 0.99), len(table), BACKGROUND)
            table[str(len(table))] = primitive.word
    planes = {
        "depth": depth,
        "normal": np.ascontiguousarray(normal.transpose(1, 2, 0)),
        "seg": classes_of[owner],
        "edge": _edge_map(owner, trace.t, view),
        "obj_detection": _paint_boxes(boxes, depth),
        "ocr_detection": words,
    }
    return planes, {str(i): c for i, c in enumerate(classes)}, table


def _describe(layout: _Layout, size: int, trace: _Trace) -> dict:
    """The scene in words and numbers; boxes and pixel counts are of the picture, from 2 x 2 rays per pixel."""
    owner = _owners(layout, trace.part)
    objects, signs = [], []
    for index, thing in enumerate(layout.things):
        mask = owner == index
        left, top, right, bottom = _box(mask)
        centre = next(p.centre for p in layout.primitives if p.owner == index)
        column, row, distance = layout.camera.project(centre[None])[0]
        entry = {
            **thing,
            "position": [round(float(v), 3) for v in centre],
            "screen": [round(float(column), 4), round(float(row), 4)],
            "distance": round(float(distance), 3),
            "box": [left // 2, top // 2, (right + 1) // 2, (bottom + 1) // 2],
            "pixels": round(int(mask.sum()) / 4),
        }
        (signs if thing["shape"] == "sign" else objects).append(entry)
    return {"objects": objects, "signs": signs}


def _check_sizes(size: int, label_size: int) -> None:
    if min(size, label_size) < 32:
        raise ValueError(
            f"picture size {size} and label size {label_size} must be at least 32; use 64 or more"
        )


def render_scene(seed: int, size: int = 128, label_size: int = 128) -> RenderedScene:
    """Renders the scene of a seed; the scene and its texts do not depend on the sizes.

    Args:
        seed: any non-negative int; the same seed gives the same bytes.
        size: side of the picture.
        label_size: side of the label maps.

    Raises:
        ValueError: if a size is below 32 (an object could vanish).
    """
    _check_sizes(size, label_size)
    rng = np.random.default_rng(seed)
    layout = _sample_layout(rng)
    fine = _trace(layout.camera, layout.primitives, 2 * size)
    scene = _describe(layout, size, fine)
    coarse = _trace(layout.camera, layout.primitives, label_size)
    planes, instances, words = _planes(layout, label_size, coarse)
    meta = {
        "captions": write_captions(scene, rng),
        "questions": write_questions(scene, rng),
        "instances": instances,
        "words": words,
        "size": [size, size],
        "source": _SOURCE,
        "licence": "Apache-2.0",
        "scene": scene,
    }
    return RenderedScene(rgb=_picture(layout, size, fine), planes=planes, meta=meta)


def render_dataset(
    folder: str | Path,
    train: int = 4000,
    val: int = 400,
    test: int = 400,
    seed: int = 0,
    size: int = 128,
    label_size: int = 128,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Writes the datasets folder/train, folder/val and folder/test; what is already there with these settings is kept.

    A split appears under its name only when it is complete. Processes that ask for the same folder wait for the first.
    Worker processes are spawned, so a script calls this below `if __name__ == "__main__":`, or with `workers=1`.

    Args:
        folder: made if absent.
        train, val, test: number of scenes; a split of 0 is not written.
        seed: two seeds share no scene, nor do the splits of one.
        size, label_size: sides of pictures and label maps.
        workers: processes that render, by default one per usable core; 1 renders in this process.
        progress: whether to show a bar with the time left.

    Raises:
        ValueError: if a number is out of range, or a split was written with other settings.
    """
    _check_sizes(size, label_size)
    if min(train, val, test, seed) < 0 or (workers is not None and workers < 1):
        raise ValueError(
            f"train {train}, val {val}, test {test}, seed {seed}, workers {workers}: "
            "numbers of scenes and the seed must be at least 0, workers at least 1"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".scenes.lock", "wb") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        missing = []
        # before anything is rendered: all or nothing
        for split, count in (("train", train), ("val", val), ("test", test)):
            about = {"renderer": _VERSION, "seed": seed, "split": split, "count": count}
            about |= {"size": size, "label_size": label_size}
            if count and not _is_complete(folder / split, about):
                missing.append(about)
        for about in missing:
            _write_split(folder, about, workers or len(os.sched_getaffinity(0)), progress)


def _is_complete(folder: Path, about: dict) -> bool:
    """Whether the split is there; one with other settings is an error."""
    if not folder.exists():
        return False
    found = read_index(folder)["about"]
    if found != about:
        raise ValueError(
            f"{folder} holds scenes rendered with {found}, asked were {about}; delete it or choose another folder"
        )
    return True


def _write_split(folder: Path, about: dict, workers: int, progress: bool) -> None:
    split, count = about["split"], about["count"]
    partial = folder / f".{split}.partial"
    # left by a run that was killed: the lock says that nobody writes there now
    shutil.rmtree(partial, ignore_errors=True)
    classes = {"seg": SEG_CLASSES, "obj_detection": OBJECT_CLASSES}
    bar = tqdm(total=count, desc=f"rendering {split}", unit="scene", disable=not progress)
    writer = ShardWriter(partial, classes=classes, source=_SOURCE, about=about)
    with writer, bar:
        for sample in _render_samples(about, workers):
            writer.write(sample)
            bar.update()
    os.replace(partial, folder / split)


def _render_samples(about: dict, workers: int) -> Iterator[Sample]:
    """The samples of a split in order, from `workers` processes that are never far ahead of the writer."""
    chunks = [range(i, min(i + 8, about["count"])) for i in range(0, about["count"], 8)]
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield from _render_chunk(about, chunk)
        return
    # spawned, not forked: the caller may hold threads and a CUDA context
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running: deque = deque()
        for chunk in chunks:
            running.append(pool.submit(_render_chunk, about, chunk))
            if len(running) > 3 * workers:
                yield from running.popleft().result()
        for future in running:
            yield from future.result()


def _render_chunk(about: dict, indices: range) -> list[Sample]:
    samples = []
    for index in indices:
        seed = scene_seed(about["seed"], about["split"], index)
        scene = render_scene(seed, about["size"], about["label_size"])
        jpeg = io.BytesIO()
        Image.fromarray(scene.rgb).save(jpeg, "JPEG", quality=92, subsampling=0)
        key = f"{about['split']}-{index:06d}"
        samples.append(Sample(key, jpeg.getvalue(), scene.planes, scene.meta))
    return samples
