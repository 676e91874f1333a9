"""A vectorised ray caster: spheres, cubes, cylinders, cones and lettered boards on a ground plane, in numpy only.

World and camera axes are x right, y up, z towards the viewer. Camera rays have z = -1 in camera space and are not
normalised, so the ray parameter `t` is the distance along the viewing axis. A primitive is an affine image of a unit
shape, which leaves `t` unchanged: all intersections are with unit shapes.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# hits of rays that meet no primitive
GROUND, SKY = -1, -2

# a number or an array, which numpy's arithmetic broadcasts
Numbers = float | np.ndarray


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with a square image.

    Attributes:
        position: (3,) world coordinates.
        axes: (3, 3), the rows are right, up and back in world space.
        tangent: of half the viewing angle.
    """

    position: np.ndarray
    axes: np.ndarray
    tangent: float

    def rays(self, n: int) -> np.ndarray:
        """(3, n, n) fp32 world directions through the centres of n x n pixels."""
        x = ((np.arange(n, dtype=np.float32) + 0.5) * 2 / n - 1) * np.float32(self.tangent)
        right, up, back = self.axes.astype(np.float32)[:, :, None, None]
        return right * x[None, :] - up * x[:, None] - back

    def project(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) world points to (..., 3): column and row as fractions of the image, distance."""
        right, up, back = np.moveaxis((points - self.position) @ self.axes.T, -1, 0)
        distance = np.maximum(-back, 0.1)
        scale = 0.5 / (distance * self.tangent)
        return np.stack([0.5 + right * scale, 0.5 - up * scale, distance], axis=-1)


@dataclass(frozen=True)
class Primitive:
    """A unit shape that was scaled, turned and moved.

    Attributes:
        shape: "sphere", "cube", "cylinder" or "cone".
        centre: (3,) world coordinates.
        extent: (3,) half sizes.
        yaw: rotation about the vertical axis.
        owner: index of the thing that it is part of.
        paint: linear RGB.
        shiny: whether it mirrors its surroundings.
        word: on the front, of a board; None for other primitives.
        letters: linear RGB of the word.
    """

    shape: str
    centre: np.ndarray
    extent: np.ndarray
    yaw: float
    owner: int
    paint: tuple[float, float, float]
    shiny: bool = False
    word: str | None = None
    letters: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def to_local(self, x: Numbers, y: Numbers, z: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """A world vector in the space of the unit shape."""
        c, s = np.float32(math.cos(self.yaw)), np.float32(math.sin(self.yaw))
        a, b, d = (1 / self.extent).astype(np.float32)
        return (c * x - s * z) * a, y * b, (s * x + c * z) * d

    def to_world(self, x: Numbers, y: Numbers, z: Numbers) -> np.ndarray:
        """A vector turned by `yaw`, without scaling."""
        return turn(np.float32(math.cos(self.yaw)), np.float32(math.sin(self.yaw)), x, y, z)

    def corners(self) -> np.ndarray:
        """(8, 3) world coordinates of the corners of the box around the primitive."""
        x, y, z = (CORNERS * self.extent).T
        return self.centre + turn(math.cos(self.yaw), math.sin(self.yaw), x, y, z).T


CORNERS = np.array([(i, j, k) for i in (-1.0, 1.0) for j in (-1.0, 1.0) for k in (-1.0, 1.0)])


def turn(c: Numbers, s: Numbers, x: Numbers, y: Numbers, z: Numbers) -> np.ndarray:
    """(3, ...): the vectors (x, y, z) turned about the vertical axis by the angle of cosine `c` and sine `s`."""
    return np.stack(np.broadcast_arrays(c * x + s * z, y, c * z - s * x))


@dataclass(frozen=True)
class Layout:
    """Everything that an image is rendered from.

    Attributes:
        camera: the viewer.
        primitives: the shapes.
        things: the descriptions of the objects, then of the signs.
        light: (3,) direction towards the light.
        sun, ambient: strengths of the direct and of the surrounding light.
        ground: (3,) linear RGB.
        sky: (2, 3) linear RGB at the horizon and at the zenith.
        pattern: (4,) two frequencies, phase and strength of the pattern on the ground.
    """

    camera: Camera
    primitives: list[Primitive]
    things: list[dict]
    light: np.ndarray
    sun: float
    ambient: float
    ground: np.ndarray
    sky: np.ndarray
    pattern: np.ndarray


@dataclass(frozen=True)
class Trace:
    """The hits of n x n rays.

    Attributes:
        t: (n, n) distance along the viewing axis.
        part: (n, n) index of the primitive, or GROUND or SKY.
        normal: (3, n, n) in world space; 0 for the sky.
        hits: for each primitive, the rays that would hit it if it stood alone.
    """

    t: np.ndarray
    part: np.ndarray
    normal: np.ndarray
    hits: list[int]


def intersect(shape: str, o: tuple, d: tuple) -> np.ndarray:
    """First `t` > 0 at which rays o + t d enter a unit shape; inf where they miss it."""
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
            # the radius of the cone along the ray is q + m t; its base stands on the ground and is never seen
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


def _local_normal(primitive: Primitive, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
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


def frame_of(camera: Camera, points: np.ndarray) -> np.ndarray:
    """(..., k, 3) points to (..., 4): their left, top, right and bottom as fractions of the image."""
    place = camera.project(points)[..., :2]
    return np.concatenate([place.min(-2), place.max(-2)], axis=-1)


def _window(camera: Camera, points: np.ndarray, n: int) -> tuple[slice, slice]:
    """Rows and columns of an n x n image that hold the convex hull of `points`."""
    left, top, right, bottom = frame_of(camera, points) * n
    edges = np.clip([top - 1, bottom + 2, left - 1, right + 2], 0, n).astype(int).tolist()
    return slice(*edges[:2]), slice(*edges[2:])


def cast(camera: Camera, primitives: list[Primitive], n: int) -> Trace:
    """Cast n x n rays; each primitive is intersected only inside the window that it can cover."""
    rays = camera.rays(n)
    eye = camera.position.astype(np.float32)
    with np.errstate(divide="ignore"):
        t = np.where(rays[1] < -1e-6, -eye[1] / rays[1], np.float32(np.inf))
    part = np.where(t < 80, np.int8(GROUND), np.int8(SKY))
    normal = np.zeros((3, n, n), np.float32)
    normal[1] = part == GROUND
    hits = []
    for index, primitive in enumerate(primitives):
        window = _window(camera, primitive.corners(), n)
        o = primitive.to_local(*(eye - primitive.centre.astype(np.float32)))
        d = primitive.to_local(*rays[:, window[0], window[1]])
        found = intersect(primitive.shape, o, d)
        hits.append(int(np.isfinite(found).sum()))
        nearer = found < t[window]
        t[window][nearer] = found[nearer]
        part[window][nearer] = index
        at = found[nearer]
        normal[:, window[0], window[1]][:, nearer] = _local_normal(
            primitive, *(origin + at * direction[nearer] for origin, direction in zip(o, d, strict=True))
        )
    return Trace(t, part, normal, hits)


@functools.cache
def _letters(word: str) -> np.ndarray:
    """(h, w) fp32 coverage of a word in bold capitals, cropped; about 28 rows, twice the resolution of an image."""
    font = ImageFont.load_default(size=38)
    image = Image.new("L", (40 * len(word) + 40, 64))
    ImageDraw.Draw(image).text((20, 8), word.upper(), fill=255, font=font, stroke_width=1)
    return np.asarray(image.crop(image.getbbox()), np.float32) / 255


def board_extent(word: str, height: float) -> np.ndarray:
    """Half sizes of a board whose capitals are `height` tall, with a margin around them."""
    rows, columns = _letters(word).shape
    return np.array([height * columns / rows / 2 + 0.38 * height, height / 2 + 0.30 * height, 0.06])


def board_letters(primitive: Primitive, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For points of a board in unit coordinates: their coverage by letters, and whether the word's box holds them."""
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


def local_points(layout: Layout, trace: Trace, rays: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask of the pixels of primitive `index`, and their points (3, k) in its unit space."""
    primitive = layout.primitives[index]
    mask = trace.part == index
    offset = (layout.camera.position - primitive.centre).astype(np.float32)[:, None]
    return mask, np.stack(primitive.to_local(*(offset + trace.t[mask] * rays[:, mask])))


def _shade(layout: Layout, n: int, trace: Trace) -> np.ndarray:
    """Linear colours (3, n, n) of n x n rays; the rays of a 2 x 2 cell see four different points of the light."""
    camera, light = layout.camera, layout.light
    rays = camera.rays(n)
    eye = camera.position.astype(np.float32)[:, None, None]
    solid = trace.part != SKY
    point = eye + np.where(solid, trace.t, 0) * rays
    # soft shadows: the four rays of a pixel each take another quarter of the light
    side = np.cross(light, (0.0, 1.0, 0.0))
    side /= np.linalg.norm(side)
    spread = 0.035 * np.array([[side, np.cross(side, light)], [-np.cross(side, light), -side]])
    lights = np.tile((light + spread).transpose(2, 0, 1), (1, n // 2, n // 2)).astype(np.float32)

    sunny, near = _shadows(layout, n, trace, point, lights)
    lambert = np.maximum((trace.normal * lights).sum(0), 0) * sunny
    horizon, zenith = layout.sky[:, :, None, None]
    # light from above comes from the sky, light from below is reflected by the ground
    hemisphere = 0.5 + 0.5 * trace.normal[1]
    bounce = layout.ground[:, None, None]
    fill = layout.ambient * ((0.4 * horizon + 0.6) * hemisphere + bounce * (1 - hemisphere)) * near
    colour = _albedo(layout, trace, rays, point) * (fill + layout.sun * lambert)
    for index, primitive in enumerate(layout.primitives):
        if primitive.shiny:
            mask, local = local_points(layout, trace, rays, index)
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


def _gloss(
    layout: Layout, primitive: Primitive, normal: np.ndarray, ray: np.ndarray, light: np.ndarray, sunny: np.ndarray
) -> np.ndarray:
    """(3, k) colours that a shiny surface mirrors at k points (vectors (3, k)): tinted surroundings, and the light."""
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
        # upright walls never mirror a light this high: they show a streak instead
        flat = mirror[[0, 2]] / np.sqrt((mirror[[0, 2]] ** 2).sum(0) + 1e-6)
        aim = light[[0, 2]] / np.sqrt((light[[0, 2]] ** 2).sum(0))
        glint = 0.7 * np.maximum((flat * aim).sum(0), 0) ** 60 * (normal[1] < 0.9)
    else:
        glint = 1.8 * np.maximum((mirror * light).sum(0), 0) ** 60
    return (0.30 + 0.5 * (1 + facing) ** 4) * around * tint + glint * sunny


def _albedo(layout: Layout, trace: Trace, rays: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Colours (3, n, n) of the surfaces: a gently patterned ground, painted objects, lettered boards."""
    a, b, c, amount = layout.pattern.astype(np.float32)
    wave = np.sin(a * point[0] + b * point[2] + c) * np.sin(b * point[0] - a * point[2] + 2 * c)
    albedo = layout.ground[:, None, None] * (1 + amount * wave)
    for index, primitive in enumerate(layout.primitives):
        if primitive.word is None:
            albedo[:, trace.part == index] = np.float32(primitive.paint)[:, None]
            continue
        mask, (x, y, z) = local_points(layout, trace, rays, index)
        cover, _ = board_letters(primitive, x, y)
        # the rim of the front and the narrow sides have the colour of the letters
        width, height, _ = primitive.extent
        rim = np.minimum((1 - np.abs(x)) * width, (1 - np.abs(y)) * height) < 0.06
        cover = np.where(z > 0.99, np.maximum(cover, rim), 1)
        paint, ink = np.float32(primitive.paint)[:, None], np.float32(primitive.letters)[:, None]
        albedo[:, mask] = paint + cover * (ink - paint)
    return albedo


def _shadows(
    layout: Layout, n: int, trace: Trace, point: np.ndarray, lights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) sun (0 or 1) and (n, n) ambient light (0..1, contact shadows) that reach each point."""
    sunny = np.ones((n, n), np.float32)
    near = np.ones((n, n), np.float32)
    for index, primitive in enumerate(layout.primitives):
        corners = primitive.corners()
        # a shadow lies within the hull of the primitive and its projections to the ground
        quarters = lights[:, :2, :2].reshape(3, 4).T
        fallen = [corners - corners[:, 1:2] * (light / light[1]) for light in quarters]
        rows, columns = _window(layout.camera, np.concatenate([corners, *fallen]), n)
        part = trace.part[rows, columns]
        other = (part != SKY) & (part != index)
        for sibling, candidate in enumerate(layout.primitives):
            if candidate.owner == primitive.owner:
                other &= part != sibling
        origin = point[:, rows, columns][:, other] + 1e-3 * trace.normal[:, rows, columns][:, other]
        o = primitive.to_local(*(origin - primitive.centre.astype(np.float32)[:, None]))
        d = primitive.to_local(*lights[:, rows, columns][:, other])
        sunny[rows, columns][other] *= ~np.isfinite(intersect(primitive.shape, o, d))
        if primitive.centre[1] < primitive.extent[1] + 0.1:
            reach = primitive.extent[[0, 2]].max()
            ring = np.array([[i, 0, j] for i in (-1, 1) for j in (-1, 1)]) * 2.2 * reach
            rows, columns = _window(layout.camera, primitive.centre * [1, 0, 1] + ring, n)
            floor = trace.part[rows, columns] == GROUND
            middle = primitive.centre.astype(np.float32)
            x, z = (point[k, rows, columns][floor] - middle[k] for k in (0, 2))
            away = np.maximum(np.sqrt(x * x + z * z) / np.float32(reach) - 0.8, 0)
            near[rows, columns][floor] *= 1 - 0.55 * np.exp(-4 * away * away)
    return sunny, near


def paint_image(layout: Layout, size: int, trace: Trace) -> np.ndarray:
    """(size, size, 3) uint8 from the trace of 2 x 2 rays per pixel."""
    colour = np.clip(_shade(layout, 2 * size, trace), 0, 1)
    colour = colour.reshape(3, size, 2, size, 2).mean((2, 4)) ** np.float32(1 / 2.2)
    return (colour.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)
