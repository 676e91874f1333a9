"""Proves that rendered scenes are what they say they are: geometry against ray marching, labels against the geometry,
texts against an interpreter of its own; and that datasets are reproducible, disjoint, and written whole or not at all.

    python -m pytest tests/data/test_scenes.py
"""

import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.scenes import dataset as scenes
from prismer.dataloading.scenes import exact_labels as scene_labels
from prismer.dataloading.scenes import layout, raycast
from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES
from prismer.dataloading.store.shards import ShardDataset

SIGN, GROUND, SKY = (scenes.SEG_CLASSES.index(name) for name in ("sign", "ground", "sky"))
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def rendered() -> list[scenes.RenderedScene]:
    return [scenes.render_scene(scenes.scene_seed(7, "train", i)) for i in range(40)]


@pytest.fixture(scope="module")
def metas() -> list[dict]:
    """Many scenes at the smallest size: texts do not depend on it."""
    return [scenes.render_scene(i, size=32, label_size=32).meta for i in range(120)]


# geometry


def _distance(shape: str, point: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Signed distance (k,) of local, unscaled points (3, k) to a shape, in the textbook form of each."""
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
    # a lower bound that is zero on the surface: the slanted side and the base
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
    # rays that graze the outline may go either way
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
        # contact shadows fade out: their window may cut off what is below one grey level
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
    # a point of the ground is in the dark if the line to the light passes the centre within a radius
    offset = ball.centre[:, None, None] - point
    along = (offset * lights).sum(0)
    passes = np.linalg.norm(offset - along * lights, axis=0)
    sure = ground & (np.abs(passes - 0.5) > 0.01)
    assert ((passes < 0.5) & ground).sum() > 50
    assert (sunny[sure] == (passes > 0.5)[sure]).all()


# one scene


def test_render_scene_is_reproducible():
    first, again, other = (scenes.render_scene(seed) for seed in (11, 11, 12))
    assert first.rgb.tobytes() == again.rgb.tobytes()
    assert json.dumps(first.meta) == json.dumps(again.meta)
    for name, plane in first.planes.items():
        assert plane.tobytes() == again.planes[name].tobytes(), name
    assert first.rgb.tobytes() != other.rgb.tobytes() and first.meta["scene"] != other.meta["scene"]


def test_scene_does_not_depend_on_sizes():
    small, large = (scenes.render_scene(5, size=48, label_size=80), scenes.render_scene(5, size=96, label_size=80))
    assert small.rgb.shape == (48, 48, 3) and large.rgb.shape == (96, 96, 3)
    for name in small.planes:
        assert (small.planes[name] == large.planes[name]).all(), name
    assert small.meta["captions"] == large.meta["captions"]
    assert small.meta["questions"] == large.meta["questions"]
    # the large picture, halved, is the small one
    halved = large.rgb.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(halved - small.rgb).mean() < 3


def test_planes_are_well_formed(rendered):
    experts = {"depth", "normal", "seg", "edge", "obj_detection", "ocr_detection"}
    for scene in rendered:
        assert scene.rgb.dtype == np.uint8 and scene.rgb.shape == (128, 128, 3)
        assert set(scene.planes) == experts
        for name, plane in scene.planes.items():
            shape = (128, 128, 3) if name == "normal" else (128, 128)
            assert plane.dtype == np.uint8 and plane.shape == shape and plane.flags.c_contiguous, name
        meta, planes = scene.meta, scene.planes
        assert planes["seg"].max() < len(scenes.SEG_CLASSES)
        ids = {str(i) for i in np.unique(planes["obj_detection"])} - {"255"}
        assert ids <= set(meta["instances"])
        assert all(0 <= c < len(scenes.OBJECT_CLASSES) for c in meta["instances"].values())
        assert {str(i) for i in np.unique(planes["ocr_detection"])} - {"255"} == set(meta["words"])
        assert list(meta["words"].values()) == [sign["word"] for sign in meta["scene"]["signs"]]
        assert meta["size"] == [128, 128] and meta["source"] == "rendered scenes" and meta["licence"] == "Apache-2.0"
        assert planes["depth"].min() == 0 and planes["depth"].max() == 255
        json.dumps(meta, allow_nan=False)


def test_labels_agree_with_each_other(rendered):
    for scene in rendered:
        seg, depth, edge = (scene.planes[name] for name in ("seg", "depth", "edge"))
        normal = scene.planes["normal"].astype(float) / 127.5 - 1
        assert (scene.planes["normal"][seg == SKY] == (127, 127, 255)).all()
        assert (depth[seg == SKY] == 0).all()
        # unit normals that never point away from the viewer by more than perspective allows
        assert np.abs(np.linalg.norm(normal, axis=2) - 1).max() < 0.03
        assert normal[..., 2].min() > -0.45
        # the ground faces up and comes nearer downwards
        assert (normal[seg == GROUND] @ [0, 1, 0]).min() > 0.85
        for column in range(0, 128, 16):
            assert (np.diff(depth[seg[:, column] == GROUND, column].astype(int)) >= 0).all()
        # dark exactly where classes meet, nowhere on the open ground or in the sky
        jump = seg[:, 1:] != seg[:, :-1]
        assert edge[:, 1:][jump].max() < 255 and edge[:, :-1][jump].max() < 255
        plain = np.lib.stride_tricks.sliding_window_view(np.pad(seg, 2, mode="edge"), (5, 5))
        plain = (plain.min((2, 3)) == plain.max((2, 3))) & ((seg == GROUND) | (seg == SKY))
        assert (edge[plain] == 255).all()


def test_description_matches_the_labels(rendered):
    for scene in rendered:
        seg = scene.planes["seg"]
        objects, signs = scene.meta["scene"]["objects"], scene.meta["scene"]["signs"]
        assert 1 <= len(objects) <= 5 and len(signs) <= 2
        pixels = Counter()
        for thing in objects:
            pixels[thing["shape"]] += thing["pixels"]
            assert thing["pixels"] >= 40
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            assert (seg[top:bottom, left:right] == scenes.SEG_CLASSES.index(thing["shape"])).any()
        for shape, count in pixels.items():
            seen = (seg == scenes.SEG_CLASSES.index(shape)).sum()
            assert abs(seen - count) <= 0.1 * count + 8
        names = sorted(scenes.OBJECT_CLASSES[c] for c in scene.meta["instances"].values())
        # a box that nearly equals another one is dropped
        assert Counter(names) <= Counter(thing["shape"] for thing in objects + signs)
        assert len(names) >= len(objects) + len(signs) - 1


def test_colours_are_where_the_description_says(rendered):
    """A pixel of a small neighbourhood that holds one object only has the hue of its paint."""
    paints = {name: np.array(paint) / np.linalg.norm(paint) for name, paint in layout.PAINT.items()}
    right = total = 0
    for scene in rendered:
        linear = (scene.rgb / 255) ** 2.2
        for thing in scene.meta["scene"]["objects"]:
            left, top, right_edge, bottom = thing["box"]
            mask = np.zeros((128, 128), bool)
            mask[top:bottom, left:right_edge] = True
            mask &= scene.planes["seg"] == scenes.SEG_CLASSES.index(thing["shape"])
            # the middle in brightness: neither glints nor shadows
            colour = np.median(linear[mask], axis=0)
            nearest = max(paints, key=lambda name: paints[name] @ colour)
            right += nearest == thing["colour"]
            total += 1
    assert right / total > 0.93


def test_words_can_be_read(rendered):
    signs = 0
    for scene in rendered:
        for index, sign in enumerate(scene.meta["scene"]["signs"]):
            signs += 1
            assert sign["word"] in layout.WORDS and 3 <= len(sign["word"]) <= 5
            mask = scene.planes["ocr_detection"] == index
            assert (scene.planes["seg"][mask] == SIGN).all()
            left, top, right, bottom = scene_labels.bounding_box(mask)
            assert bottom - top >= 12 and right - left >= 6 * len(sign["word"])
            # dark and bright strokes alternate
            grey = scene.rgb.mean(2)[mask]
            assert np.percentile(grey, 95) - np.percentile(grey, 5) > 60
    assert signs > 15


def test_every_word_looks_different():
    pictures = {raycast._letters(word).tobytes() for word in layout.WORDS}
    assert len(pictures) == len(layout.WORDS) == len(set(layout.WORDS)) >= 40


def test_paint_boxes():
    """The overlap rules of the detection labels."""
    depth = np.zeros((8, 8), np.uint8)
    depth[:, 4:] = 200
    far, near, inner = [0, 0, 5, 5], [3, 0, 8, 5], [1, 1, 3, 3]
    painted = scene_labels.paint_boxes([near, far], depth)
    assert (painted[0, 3:5] == 0).all(), "the nearer box keeps the overlap whatever the order"
    painted = scene_labels.paint_boxes([inner, far], depth)
    assert (painted[1:3, 1:3] == 0).all() and painted[0, 0] == 1, "an inner box lies in front"
    painted = scene_labels.paint_boxes([[0, 6, 3, 8], [1, 6, 4, 8]], depth)
    assert painted[6].tolist()[:4] == [0, 1, 1, 1], "equal depth: later paints over earlier"
    assert (painted[:6] == 255).all()


@pytest.mark.parametrize("sizes", [(16, 128), (128, 16)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="at least 32"):
        scenes.render_scene(0, *sizes)


# texts: an interpreter of its own, which shares no code with the writer

_WORDS_OF = {value: key for key, values in ATTRIBUTES.items() for value in values}
_SIGN = r"a sign (?:that says|saying|with the word) (\w+)"
_RELATION = r"(?:to the )?(left of|right of)|(in front of)|(behind)"


def _wanted(noun: str) -> dict:
    """Attributes named by `small red cubes`; raises on a word that is no attribute."""
    wanted = {}
    for word in noun.split():
        if word in ("object", "objects"):
            continue
        value = word if word in _WORDS_OF else word.removesuffix("s")
        wanted[_WORDS_OF[value]] = value
    return wanted


def _find(scene: dict, noun: str) -> list[dict]:
    wanted = _wanted(noun)
    return [o for o in scene["objects"] if all(o[key] == value for key, value in wanted.items())]


def _one(scene: dict, name: str) -> dict:
    (thing,) = _find(scene, name.removeprefix("the "))
    return thing


def _related(a: dict, relation: str, b: dict) -> float:
    """Positive where the relation holds: by pixels of the boxes' origin, independent of the writer's thresholds."""
    if "left" in relation or "right" in relation:
        return (b["screen"][0] - a["screen"][0]) * (1 if "left" in relation else -1)
    return (b["distance"] - a["distance"]) * (1 if "front" in relation else -1)


def _check_caption(scene: dict, caption: str) -> None:
    words = [sign["word"] for sign in scene["signs"]]
    for word in re.findall(_SIGN, caption):
        assert word in words
    match = re.fullmatch(rf"an? (.+?) (?:{_RELATION}) an? (.+)", caption)
    if match and "sign" not in caption and "," not in caption:
        first, *relations, second = match.groups()
        relation = next(filter(None, relations))
        pairs = [(a, b) for a in _find(scene, first) for b in _find(scene, second) if a is not b]
        assert any(_related(a, relation, b) > 0 for a, b in pairs)
        return
    match = re.fullmatch(rf"(?:{_SIGN}) behind an? (.+)|an? (.+) in front of {_SIGN}", caption)
    if match:
        first, second, third, fourth = match.groups()
        (sign,) = [sign for sign in scene["signs"] if sign["word"] == (first or fourth)]
        assert any(_related(thing, "in front of", sign) > 0 for thing in _find(scene, second or third))
        return
    if match := re.fullmatch(r"(.+?) (?:that stands |standing )?on the ground", caption):
        caption = match[1]
    whole = "namely" in caption or "just one object" in caption
    if match := re.match(r"(\w+) objects? on the ground, namely (.+)|(just one object), (.+)", caption):
        assert len(scene["objects"]) == NUMBERS.get(match[1], 1)
        caption = match[2] or match[4]
    listed = 0
    for phrase in re.split(r", | and ", re.sub(_SIGN, "", caption)):
        if not phrase.strip():
            continue
        number, noun = phrase.strip().split(" ", 1)
        count = 1 if number in ("a", "an") else NUMBERS[number]
        found = len(_find(scene, noun))
        assert count == found if number not in ("a", "an") else found >= 1
        listed += count
    if whole:
        assert listed == len(scene["objects"])


def test_captions_are_true(metas):
    for meta in metas:
        assert 4 <= len(meta["captions"]) <= 5 and len(set(meta["captions"])) == len(meta["captions"])
        for caption in meta["captions"]:
            assert len(caption.split()) <= 24 and re.fullmatch(r"[a-z ,]+", caption)
            _check_caption(meta["scene"], caption)
        # the first one leaves nothing out
        first = meta["captions"][0]
        assert all(sign["word"] in first.split() for sign in meta["scene"]["signs"])
        counts = [NUMBERS.get(word, 1) for word in re.findall(r"\b(an?|two|three|four|five) (?!sign)", first)]
        assert sum(counts) == len(meta["scene"]["objects"])


def test_caption_check_notices_lies(metas):
    """The interpreter above is not satisfied with everything."""
    noticed = total = 0
    for meta in metas:
        for caption in meta["captions"]:
            for truth, lie in [("left of", "right of"), ("cube", "sphere"), ("red", "blue"), ("three", "four")]:
                if truth in caption and lie not in caption:
                    total += 1
                    try:
                        _check_caption(meta["scene"], caption.replace(truth, lie))
                    except AssertionError:
                        noticed += 1
    assert total > 100 and noticed / total > 0.8


def _answer(scene: dict, question: str, kind: str) -> str:
    """What a question asks, worked out from the description."""
    text = question.removesuffix("?")
    if kind == "read":
        if len(scene["signs"]) == 1:
            return scene["signs"][0]["word"]
        first, second = sorted(scene["signs"], key=lambda sign: sign["box"][0])
        return (first if text.split(" on the ")[-1].startswith("left") else second)["word"]
    if kind == "count":
        noun = re.fullmatch(
            r"how many (.+?) (?:are there|are in the picture|do you see)|what is the number of (.+)", text
        )
        return str(len(_find(scene, noun[1] or noun[2])))
    if kind == "yes/no":
        noun = re.fullmatch(
            r"(?:is there an?|do you see an?|can you see an?|are there any) (.+?)(?: in the picture)?", text
        )
        return "yes" if _find(scene, noun[1]) else "no"
    if match := re.fullmatch(rf"is (the .+?) (?:{_RELATION}) (the .+)", text):
        first, *relations, second = match.groups()
        gap = _related(_one(scene, first), next(filter(None, relations)), _one(scene, second))
        return "yes" if gap > 0 else "no"
    attribute, name = re.fullmatch(r"what (?:is the )?(colour|shape) (?:is|of) (the .+)", text).groups()
    if match := re.fullmatch(rf"the object (?:{_RELATION}) (the .+)", name):
        *relations, anchor = match.groups()
        relation, anchor = next(filter(None, relations)), _one(scene, anchor)
        (thing,) = [o for o in scene["objects"] if o is not anchor and _related(o, relation, anchor) > 0]
    else:
        thing = _one(scene, name)
    return thing[attribute]


def test_questions_are_answered_truly(metas):
    for meta in metas:
        questions = [q["question"] for q in meta["questions"]]
        assert len(set(questions)) == len(questions) >= 6
        for q in meta["questions"]:
            (answer,) = q["answers"]
            assert answer["weight"] == 1.0
            assert answer["answer"] == _answer(meta["scene"], q["question"], q["kind"]), q
            assert re.fullmatch(r"[a-z ]+\?", q["question"]) and len(q["question"].split()) <= 24


def test_questions_do_not_give_themselves_away(metas):
    answers: dict[str, Counter] = {}
    for meta in metas:
        for q in meta["questions"]:
            answers.setdefault(q["kind"], Counter())[q["answers"][0]["answer"]] += 1
    assert set(answers) == {"yes/no", "count", "colour", "shape", "relation", "read"}
    share = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    limits = {"yes/no": 0.56, "count": 0.40, "colour": 0.25, "shape": 0.38, "relation": 0.45, "read": 0.15}
    assert all(share[kind] < limit for kind, limit in limits.items()), share
    assert set(answers["count"]) == set("012345")
    assert 9 <= sum(c.total() for c in answers.values()) / len(metas) <= 15
    # a "no" names shapes and colours that are there: knowing either is not enough
    hard = total = 0
    for meta in metas:
        for q in meta["questions"]:
            if q["kind"] == "yes/no" and q["answers"][0]["answer"] == "no":
                noun = q["question"].removesuffix("?").replace(" in the picture", "").split(maxsplit=3)[-1]
                wanted = _wanted(noun.removeprefix("a ").removeprefix("an ").removeprefix("any "))
                if len(wanted) > 1:
                    total += 1
                    hard += any(o[key] == value for o in meta["scene"]["objects"] for key, value in wanted.items())
    assert hard / total > 0.95


# datasets


def _contents(folder) -> list:
    dataset = ShardDataset(folder)
    return [dataset[i] for i in range(len(dataset))]


def test_splits_share_no_scene():
    splits = ("train", "val", "test")
    seeds = [scenes.scene_seed(s, n, i) for s in (0, 1) for n in splits for i in range(500)]
    assert len(set(seeds)) == len(seeds)
    described = [
        {json.dumps(scenes.render_scene(scenes.scene_seed(0, split, i), 32, 32).meta["scene"]) for i in range(12)}
        for split in splits
    ]
    assert all(len(split) == 12 for split in described)
    assert len(set.union(*described)) == 36


def test_render_dataset(tmp_path):
    settings = dict(train=12, val=2, test=0, size=32, label_size=48, progress=False)
    scenes.render_dataset(tmp_path / "a", workers=1, **settings)
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if not p.name.startswith(".")) == ["train", "val"]
    samples = _contents(tmp_path / "a" / "train")
    assert [s.key for s in samples] == [f"train-{i:06d}" for i in range(12)]
    expected = scenes.render_scene(scenes.scene_seed(0, "train", 3), 32, 48)
    assert samples[3].meta == expected.meta
    for name, plane in expected.planes.items():
        assert (samples[3].labels[name] == plane).all(), name
    with Image.open(io.BytesIO(samples[3].jpeg)) as image:
        assert image.size == (32, 32)
        # 4:4:4: every component has the same sampling
        assert len({component[1:3] for component in image.layer}) == 1
        assert np.abs(np.asarray(image).astype(int) - expected.rgb).mean() < 4
    dataset = ShardDataset(tmp_path / "a" / "train")
    assert dataset.classes == {"seg": scenes.SEG_CLASSES, "obj_detection": scenes.OBJECT_CLASSES}

    # two processes write the same bytes as one
    scenes.render_dataset(tmp_path / "b", workers=2, **settings)
    shards = sorted((tmp_path / "a" / "train").glob("shard*"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "b" / "train" / shard.name).read_bytes()

    # what is there is kept, and a new split joins it
    before = shards[0].stat()
    scenes.render_dataset(tmp_path / "a", workers=1, **(settings | {"test": 2}))
    assert shards[0].stat().st_mtime_ns == before.st_mtime_ns and shards[0].stat().st_ino == before.st_ino
    assert len(ShardDataset(tmp_path / "a" / "test")) == 2
    with pytest.raises(ValueError, match="delete it or choose another folder"):
        scenes.render_dataset(tmp_path / "a", workers=1, **(settings | {"seed": 1}))
    (tmp_path / "c" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no dataset"):
        scenes.render_dataset(tmp_path / "c", workers=1, **settings)
    with pytest.raises(ValueError, match="at least 0"):
        scenes.render_dataset(tmp_path / "a", train=-1)


def test_an_interrupted_split_is_not_a_split(tmp_path, monkeypatch):
    settings = dict(train=10, val=0, test=0, size=32, label_size=32, workers=1, progress=False)
    render_chunk = scenes._render_chunk

    def fail(about, indices):
        if 8 in indices:
            raise KeyboardInterrupt
        return render_chunk(about, indices)

    monkeypatch.setattr(scenes, "_render_chunk", fail)
    with pytest.raises(KeyboardInterrupt):
        scenes.render_dataset(tmp_path, **settings)
    assert not (tmp_path / "train").exists()
    monkeypatch.setattr(scenes, "_render_chunk", render_chunk)
    scenes.render_dataset(tmp_path, **settings)
    assert len(ShardDataset(tmp_path / "train")) == 10
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["train"]
