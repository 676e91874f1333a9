"""Random scenes: which things stand where, under which light, before anything is rendered.

One to five spheres, cubes, cylinders and cones, and up to two signs, stand on a ground plane under one light. World
axes are x right, y up, z towards the viewer.
"""

import math
from collections.abc import Sequence

import numpy as np

from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES
from prismer.dataloading.scenes.raycast import CORNERS, Camera, Layout, Primitive, board_extent, cast, frame_of, turn

WORDS = (
    "bank bar bike boat book bus cafe cake city club door exit farm film fish food free game gift hotel ice juice lamp "
    "menu milk music new open park pizza post road sale ship shop spa stop taxi tea toys water zoo"
).split()

# linear RGB albedo
PAINT = {
    "red": (0.72, 0.03, 0.03),
    "orange": (0.90, 0.26, 0.01),
    "yellow": (0.88, 0.70, 0.03),
    "green": (0.05, 0.38, 0.05),
    "cyan": (0.03, 0.60, 0.66),
    "blue": (0.03, 0.10, 0.66),
    "purple": (0.28, 0.04, 0.46),
    "white": (0.86, 0.86, 0.84),
}
_GROUNDS = [(0.34, 0.30, 0.25), (0.30, 0.33, 0.30), (0.26, 0.28, 0.32), (0.40, 0.36, 0.28), (0.24, 0.22, 0.22)]
# horizon, zenith
_SKIES = [
    ((0.66, 0.78, 0.90), (0.16, 0.36, 0.72)),
    ((0.82, 0.80, 0.76), (0.40, 0.50, 0.62)),
    ((0.90, 0.72, 0.55), (0.30, 0.36, 0.60)),
    ((0.70, 0.76, 0.78), (0.45, 0.52, 0.58)),
]
# panel, letters
_BOARDS = [
    ((0.85, 0.84, 0.80), (0.02, 0.02, 0.03)),
    ((0.02, 0.07, 0.30), (0.90, 0.90, 0.88)),
    ((0.02, 0.16, 0.06), (0.90, 0.90, 0.86)),
    ((0.30, 0.02, 0.03), (0.92, 0.90, 0.86)),
    ((0.80, 0.62, 0.05), (0.02, 0.02, 0.02)),
]
_POST = (0.10, 0.09, 0.08)
_RADIUS = {"small": 0.46, "large": 0.85}
# half extents in units of the radius; the four shapes look equally large
EXTENT = {
    "sphere": (1.0, 1.0, 1.0),
    "cube": (0.84, 0.84, 0.84),
    "cylinder": (0.84, 0.95, 0.84),
    "cone": (1.0, 1.12, 1.0),
}

# image size in px at which a layout is judged; it does not depend on the rendered size, so that a seed is one scene
_REFERENCE_SIZE = 128
_MIN_PIXELS = 45


def sample_camera(rng: np.random.Generator) -> Camera:
    """A camera in front of the scene that looks slightly down."""
    azimuth = rng.uniform(-0.12, 0.12)
    distance = rng.uniform(8.0, 8.8)
    height = rng.uniform(2.8, 3.5)
    position = np.array([distance * math.sin(azimuth), height, distance * math.cos(azimuth)])
    back = position - np.array([rng.uniform(-0.15, 0.15), rng.uniform(0.75, 0.95), 0.0])
    back /= np.linalg.norm(back)
    right = np.cross((0.0, 1.0, 0.0), back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(back, right), back])
    return Camera(position, axes, math.tan(rng.uniform(0.35, 0.38)))


def sample_looks(rng: np.random.Generator) -> dict:
    """Light, ground and sky of a layout, as its fields; the light comes over the viewer's shoulder."""
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


def _sample_signs(rng: np.random.Generator, vocabulary: Sequence[str]) -> list[dict]:
    """Zero to two signs; the words of two are short, so that they fit side by side."""
    number = int(rng.choice(3, p=[0.40, 0.50, 0.10]))
    words = rng.choice([w for w in vocabulary if number < 2 or len(w) < 5], number, replace=False)
    return [{"shape": "sign", "word": str(word)} for word in words]


def _sample_objects(rng: np.random.Generator) -> list[dict]:
    """One to five objects; repeated shapes and colours make questions of counting and identity worth asking."""
    things: list[dict] = []
    for _ in range(rng.choice(5, p=[0.10, 0.20, 0.25, 0.25, 0.20]) + 1):
        thing = {key: str(rng.choice(values)) for key, values in ATTRIBUTES.items()}
        if things and rng.uniform() < 0.45:
            key = str(rng.choice(["shape", "colour"]))
            thing[key] = things[rng.integers(len(things))][key]
        things.append(thing)
    return things


def _place_sign(rng: np.random.Generator, camera: Camera, word: str, across: float, owner: int) -> list[Primitive]:
    """A lettered board on two posts behind the objects, turned roughly to the camera."""
    centre = np.array([across, 0.0, rng.uniform(-2.9, -2.3)])
    distance = camera.project(centre[None])[0, 2]
    # capitals are 12.5 to 14 pixels tall in an image of 128
    height = rng.uniform(12.5, 14.0) / _REFERENCE_SIZE * 2 * camera.tangent * distance
    extent = board_extent(word, height)
    paint, ink = _BOARDS[rng.integers(len(_BOARDS))]
    toward = camera.position - centre
    yaw = math.atan2(toward[0], toward[2]) + rng.uniform(-0.14, 0.14)
    base = rng.uniform(0.75, 1.05)
    middle = centre + [0, base + extent[1], 0]
    board = Primitive("cube", middle, extent, yaw, owner, paint, word=word, letters=ink)
    post = np.array([0.05, base / 2, 0.05])
    side = 0.8 * extent[0] * np.array([math.cos(yaw), 0.0, -math.sin(yaw)])
    feet = [centre + [0, base / 2, 0] + end * side for end in (-1, 1)]
    return [board, *(Primitive("cube", foot, post, yaw, owner, _POST) for foot in feet)]


def _place_object(
    rng: np.random.Generator, camera: Camera, thing: dict, owner: int, others: list[Primitive]
) -> Primitive | None:
    """The object on the ground, apart from the others and wholly inside the image; None if no place was found."""
    shape, paint, shiny = thing["shape"], PAINT[thing["colour"]], thing["material"] == "shiny"
    extent = np.array(EXTENT[shape]) * _RADIUS[thing["size"]] * rng.uniform(0.94, 1.06)
    # many places at once; the first good one is taken
    centres = rng.uniform((-3.2, extent[1], -2.0), (3.2, extent[1], 3.0), (64, 3))
    yaws = rng.uniform(0, math.pi, (64, 1))
    corners = np.moveaxis(turn(np.cos(yaws), np.sin(yaws), *(CORNERS * extent).T), 0, -1)
    frames = frame_of(camera, centres[:, None] + corners)
    good = (frames.min(1) > 0.02) & (frames.max(1) < 0.98)
    for other in others:
        away = np.hypot(*(centres - other.centre)[:, [0, 2]].T)
        covered = _covered(frames, frame_of(camera, other.corners()))
        if other.word is None:
            good &= (away > extent[[0, 2]].max() + other.extent[[0, 2]].max() + 0.25) & (covered < 0.45)
        else:
            # boards hang above the ground: only their word must stay free
            good &= covered < 0.02
    if not good.any():
        return None
    i = int(good.argmax())
    return Primitive(shape, centres[i], extent, float(yaws[i, 0]), owner, paint, shiny)


def _covered(frames: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """(k, 4) frames -> (k,): the overlap of each with `frame`, as a share of the smaller of the two."""
    low, high = np.maximum(frames[:, :2], frame[:2]), np.minimum(frames[:, 2:], frame[2:])
    smaller = np.minimum((frames[:, 2:] - frames[:, :2]).prod(1), (frame[2:] - frame[:2]).prod())
    return np.maximum(high - low, 0).prod(1) / smaller


def sample_layout(rng: np.random.Generator, vocabulary: Sequence[str] = WORDS) -> Layout:
    """A scene that shows every object and every word; things are drawn once, their places until they fit.

    Args:
        rng: draws the scene.
        vocabulary: the words of its signs, of at most six letters.
    """
    looks = sample_looks(rng)
    while True:
        objects, signs = _sample_objects(rng), _sample_signs(rng, vocabulary)
        # some crowds fit nowhere: after many tries, draw other things
        for _ in range(20):
            camera = sample_camera(rng)
            primitives: list[Primitive] = []
            for owner, sign in enumerate(signs, len(objects)):
                # a pair stands to the left and to the right
                across = rng.uniform(-1.6, 1.6) if len(signs) == 1 else 3.7 * (owner - len(objects)) - 1.85
                primitives += _place_sign(rng, camera, sign["word"], across, owner)
            # large objects first, while there is room
            for owner, thing in sorted(enumerate(objects), key=lambda item: item[1]["size"]):
                primitive = _place_object(rng, camera, thing, owner, primitives)
                if primitive is None:
                    break
                primitives.append(primitive)
            else:
                layout = Layout(camera, primitives, objects + signs, **looks)
                if _is_clear(layout):
                    return layout


def _is_clear(layout: Layout) -> bool:
    """Whether every object shows enough of itself and no word is cut off."""
    frames = np.stack([frame_of(layout.camera, p.corners()) for p in layout.primitives])
    if frames.min() < 0.01 or frames.max() > 0.99:
        return False
    trace = cast(layout.camera, layout.primitives, _REFERENCE_SIZE)
    seen = np.bincount(trace.part[trace.part >= 0], minlength=len(layout.primitives))
    for primitive, pixels, hits in zip(layout.primitives, seen, trace.hits, strict=True):
        if primitive.word is not None:
            enough = 0.97 * hits
        else:
            enough = 0 if primitive.paint == _POST else max(_MIN_PIXELS, 0.55 * hits)
        if pixels < enough:
            return False
    return True
