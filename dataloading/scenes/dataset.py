"""The embedded dataset: ray-cast scenes with exact expert labels, captions and questions, in numpy only.

One to five spheres, cubes, cylinders and cones, and up to two signs, stand on a ground plane under one light. World
axes are x right, y up, z towards the viewer.
"""

import fcntl
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
from PIL import Image
from tqdm import tqdm

from prismer.dataloading.scenes.labels import OBJECT_CLASSES, SEG_CLASSES, describe, label_planes
from prismer.dataloading.scenes.raycast import (
    CORNERS,
    Camera,
    Layout,
    Primitive,
    board_extent,
    cast,
    frame_of,
    paint_picture,
    turn,
)
from prismer.dataloading.scenes.text import ATTRIBUTES, write_captions, write_questions
from prismer.dataloading.store.shards import Sample, ShardWriter, read_index

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
_GROUNDS = [(0.34, 0.30, 0.25), (0.30, 0.33, 0.30), (0.26, 0.28, 0.32), (0.40, 0.36, 0.28), (0.24, 0.22, 0.22)]
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


def _sample_camera(rng: np.random.Generator) -> Camera:
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


def _place_sign(rng: np.random.Generator, camera: Camera, word: str, across: float, owner: int) -> list[Primitive]:
    """A lettered board on two posts behind the objects, turned roughly to the camera."""
    centre = np.array([across, 0.0, rng.uniform(-2.9, -2.3)])
    distance = camera.project(centre[None])[0, 2]
    # capitals 12.5 to 14 pixels tall in a picture of 128
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
    """The object on the ground, apart from the others and wholly in the picture; None if no place was found."""
    shape, paint, shiny = thing["shape"], _PAINT[thing["colour"]], thing["material"] == "shiny"
    extent = np.array(_EXTENT[shape]) * _RADIUS[thing["size"]] * rng.uniform(0.94, 1.06)
    # many places at once, the first good one is taken
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
            # boards hang above the ground: only their word is in the way
            good &= covered < 0.02
    if not good.any():
        return None
    i = int(good.argmax())
    return Primitive(shape, centres[i], extent, float(yaws[i, 0]), owner, paint, shiny)


def _covered(frames: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """For each of (k, 4) frames, how much of the smaller of it and `frame` the two share."""
    low, high = np.maximum(frames[:, :2], frame[:2]), np.minimum(frames[:, 2:], frame[2:])
    smaller = np.minimum((frames[:, 2:] - frames[:, :2]).prod(1), (frame[2:] - frame[:2]).prod())
    return np.maximum(high - low, 0).prod(1) / smaller


def _sample_layout(rng: np.random.Generator) -> Layout:
    """A scene that shows every object and every word: its things are drawn once, their places until they fit."""
    looks = _sample_looks(rng)
    while True:
        objects, signs = _sample_objects(rng), _sample_signs(rng)
        # some crowds fit nowhere: after many tries, other things
        for _ in range(20):
            camera = _sample_camera(rng)
            primitives: list[Primitive] = []
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


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of picture `index` of a split: splits draw from streams that never meet."""
    entropy = [seed, int.from_bytes(split.encode(), "little"), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _check_sizes(size: int, label_size: int) -> None:
    if min(size, label_size) < 32:
        raise ValueError(f"picture size {size} and label size {label_size} must be at least 32; use 64 or more")


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
    fine = cast(layout.camera, layout.primitives, 2 * size)
    scene = describe(layout, size, fine)
    coarse = cast(layout.camera, layout.primitives, label_size)
    planes, instances, words = label_planes(layout, label_size, coarse)
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
    return RenderedScene(rgb=paint_picture(layout, size, fine), planes=planes, meta=meta)


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
    if not (folder / "index.json").exists():
        raise ValueError(f"{folder} is there but holds no dataset; delete it or choose another folder")
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
    try:
        with writer, bar:
            for sample in _render_samples(about, workers):
                writer.write(sample)
                bar.update()
        os.replace(partial, folder / split)
    except BaseException:
        # the next run begins the split anew; on a full disk its shards would only be in the way
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
