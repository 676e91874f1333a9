"""Proves which detections of a sample the decoder reads as text, in which order, and where augmentation moves them.

python -m pytest tests/data/test_detections.py
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.batch import COLUMN, CONFIDENCE, FACT_VALUES, KIND, PART, ROW, SIZE, Batch, Detections
from prismer.config import prismer_tiny
from prismer.dataloading.feed.augment import AugmentConfig, AugmentParams, draw_params
from prismer.dataloading.feed.detections import Detection, DetectionFinder, clean_name
from prismer.dataloading.feed.image_batch import ExpertLabels, batch_of_pixels
from prismer.dataloading.feed.image_pipeline import ImagePipeline
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.scenes.dataset import render_scene
from prismer.dataloading.scenes.exact_labels import OBJECT_CLASSES
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.tokenizer import Tokenizer

# every letter is a token
LETTERS = Tokenizer.train(["a"], vocab_size=261)
BOTH = ("obj_detection", "ocr_detection")
NAMES = {"obj_detection": ["dog", "Traffic_Light", "a long name of a thing", "??"]}
SIZES = dict(image_size=48, label_size=32, vocab_size=LETTERS.vocab_size)
CONFIG = prismer_tiny(expert_text=BOTH, **SIZES)


def finder(**changes) -> DetectionFinder:
    return DetectionFinder(CONFIG.replace(**changes), LETTERS)


def objects(*boxes: list[float], class_id: int = 0) -> dict:
    """The JSON of a sample with an object for each box, with ids from 0."""
    return {
        "instances": {str(i): class_id for i in range(len(boxes))},
        "boxes": {"obj_detection": {str(i): box for i, box in enumerate(boxes)}},
    }


def read(meta: dict, planes: dict | None = None, params: AugmentParams | None = None, **changes) -> list[Detection]:
    return finder(**changes).find(planes or {}, meta, NAMES, params)


def texts_of(detections: Detections, b: int = 0) -> str:
    return LETTERS.decode(detections.ids[b])


def test_the_largest_and_surest_detections_come_first():
    meta = {
        "instances": {"0": 0, "1": 1, "10": 0, "2": 0},
        "words": {"0": "STOP", "1": "Taxi"},
        "boxes": {
            # areas times scores: 0.25, 0.02, 0.04, 0.04
            "obj_detection": {
                "0": [0, 0, 0.5, 1, 0.5],
                "1": [0, 0, 0.2, 0.1, 1],
                "10": [0, 0, 0.2, 0.2],
                "2": [0.8, 0.8, 1, 1, 1.0],
            },
            # 0.04, and 0.3
            "ocr_detection": {"0": [0.4, 0.4, 0.6, 0.6, 1.0], "1": [0, 0, 0.5, 1, 0.6]},
        },
    }
    found = read(meta)
    # equal weights: objects before words, then by number, although "10" < "2" as text
    assert [one.name for one in found] == ["taxi", "dog", "dog", "dog", "stop", "traffic light"]
    assert [one.box[0] for one in found] == [0, 0, 0.8, 0, 0.4, 0]
    assert read(meta, expert_text=BOTH[::-1]) == found
    assert [one.name for one in read(meta, expert_text=("ocr_detection",))] == ["taxi", "stop"]
    assert [one.score for one in found] == [0.6, 0.5, 1.0, None, 1.0, 1.0]


def test_a_name_is_encoded_as_in_the_middle_of_a_sentence():
    roberta = DetectionFinder(prismer_tiny(expert_text=BOTH, vocab_size=50265), Tokenizer.roberta())
    (one,) = roberta.find({}, objects([0, 0, 1, 1], class_id=1), NAMES)
    assert one.tokens == tuple(Tokenizer.roberta().encode("A traffic light")[1:])
    assert Tokenizer.roberta().decode(one.tokens) == " traffic light"


def test_a_long_name_is_cut_after_eight_tokens():
    (one,) = read(objects([0, 0, 1, 1], class_id=2))
    # " a long name of a thing", a letter a token
    assert LETTERS.decode(one.tokens) == " a long " and one.name == "a long name of a thing"


def test_detections_that_do_not_fit_are_left_out_as_a_whole():
    meta = {
        "instances": {"0": 2, "1": 0, "2": 2, "3": 0, "4": 0},
        "boxes": {"obj_detection": {str(i): [0, 0, 1 - i / 10, 1] for i in range(5)}},
    }
    # 12 tokens hold the first name and " dog"; 16 then do not hold the third name, and hold a further " dog"
    kept = [one.name for one in read(meta, num_detections=4)]
    assert kept == ["a long name of a thing", "dog"]
    kept = read(meta, num_detections=5)
    assert [one.box[2] for one in kept] == [1.0, 0.9] and CONFIG.replace(num_detections=5).num_detection_tokens == 15
    kept = read(meta, num_detections=6)
    assert [one.box[2] for one in kept] == [1.0, 0.9, pytest.approx(0.7)]
    many = objects(*([0, 0, 1, 1 - i / 100] for i in range(50)))
    assert [one.name for one in read(many, num_detections=10)] == ["dog"] * 7
    short = {**many, "words": {str(i): "a1" for i in range(50)}}
    short["boxes"] = {"ocr_detection": many["boxes"]["obj_detection"]}
    assert len(read(short, num_detections=10)) == 10


@pytest.mark.parametrize(
    ("box", "row", "column", "size"),
    [
        ([0, 0, 1, 1], 4, 4, 0),
        ([0, 0.5, 1, 1], 6, 4, 0),
        ([0, 0, 0.3, 1], 4, 1, 1),
        ([0, 0.75, 0.5, 1.0], 7, 2, 2),
        ([0.9, 0.0, 1.0, 0.2], 0, 7, 3),
        ([0.0, 0.9, 0.1, 1.0], 7, 0, 4),
        ([0.5, 0.49, 0.5, 0.51], 4, 4, 5),
        ([1.0, 1.0, 1.0, 1.0], 7, 7, 5),
        # each class of size ends at 2^-1.5 of the one before
        ([0, 0, 0.3536, 1], 4, 1, 0),
        ([0, 0, 0.125, 1], 4, 0, 2),
        ([0, 0, 0.0442, 1], 4, 0, 2),
        ([0, 0, 0.0441, 1], 4, 0, 3),
        ([0, 0, 0.0157, 1], 4, 0, 3),
        ([0, 0, 0.0056, 1], 4, 0, 4),
        ([0, 0, 0.0055, 1], 4, 0, 5),
    ],
)
def test_places_and_sizes_are_coarse(box, row, column, size):
    (one,) = read(objects(box))
    facts = one.facts()
    assert facts.shape == (4, 6) and facts.dtype == np.uint8
    assert (facts[:, [ROW, COLUMN, SIZE]] == [row, column, size]).all()


@pytest.mark.parametrize(("score", "expected"), [(None, 0), (0.0, 1), (0.49, 1), (0.5, 2), (0.79, 2), (0.8, 3), (1, 3)])
def test_a_confidence_is_one_of_three_or_not_known(score, expected):
    (one,) = read(objects([0, 0, 1, 1] if score is None else [0, 0, 1, 1, score]))
    assert (one.facts()[:, CONFIDENCE] == expected).all()


def test_tokens_carry_the_facts_of_their_detection():
    meta = {
        "instances": {"0": 0},
        "words": {"7": "go"},
        "boxes": {"obj_detection": {"0": [0.5, 0.5, 1, 1, 0.9]}, "ocr_detection": {"7": [0, 0, 0.25, 0.25, 0.6]}},
    }
    one = finder()
    found = one.find({}, meta, NAMES)
    both = one.collate([found, [], found[1:]])
    assert both.ids.shape == (3, 48) and both.ids.dtype == torch.int64
    assert both.facts.shape == (3, 48, 6) and both.facts.dtype == torch.uint8
    assert texts_of(both) == " dog go" and texts_of(both, 1) == "" and texts_of(both, 2) == " go"
    assert both.facts[0, :7, KIND].tolist() == [0] * 4 + [1] * 3
    assert both.facts[0, :7, PART].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert both.facts[0, :7, ROW].tolist() == [6] * 4 + [1] * 3
    assert both.facts[0, :7, CONFIDENCE].tolist() == [3] * 4 + [2] * 3
    assert (both.ids[0, 7:] == CONFIG.pad_id).all() and not both.facts[0, 7:].any()
    assert (both.facts.amax((0, 1)) < torch.tensor(FACT_VALUES)).all()
    # the others of a batch change nothing, and an image without detections is like no labels
    alone, none = one.collate([found[1:]]), Detections.none(1, 48, CONFIG.pad_id)
    assert torch.equal(alone.ids[0], both.ids[2]) and torch.equal(alone.facts[0], both.facts[2])
    assert torch.equal(none.ids[0], both.ids[1]) and torch.equal(none.facts[0], both.facts[1])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Dining Table", "dining table"),
        ("car_(automobile)", "car automobile"),
        ("TV/Monitor", "tv/monitor"),
        (" \n", ""),
        ("?...", ""),
        ("\ud800", ""),
        ("a\x00b", "a b"),
    ],
)
def test_class_names_are_cleaned(text, name):
    assert clean_name(text) == name


@pytest.mark.parametrize(
    ("text", "word"), [("$5.99", "$5.99"), ("  STOP\tnow ", "stop now"), ("St. John's!", "st. john's!"), ("&", "")]
)
def test_words_keep_their_marks(text, word):
    assert clean_name(text, is_word=True) == word


def test_odd_names_and_names_of_endless_length_are_read():
    meta = objects([0, 0, 1, 1]) | {"words": {"0": "!", "1": "\ud800\ud800", "2": "ab" * 10**6}}
    meta["boxes"]["ocr_detection"] = {i: [0, 0, 0.5, 0.5] for i in "012"}
    meta["instances"]["1"] = 3
    meta["boxes"]["obj_detection"]["1"] = [0, 0, 1, 1]
    first, second = read(meta)
    assert first.name == "dog" and LETTERS.decode(second.tokens) == " abababa"


# where a box comes from


def plane_of(*regions: tuple[int, int, int, int, int]) -> np.ndarray:
    """A map of 20 x 40 pixels; a region is id, left, top, right, bottom."""
    plane = np.full((20, 40), 255, np.uint8)
    for i, left, top, right, bottom in regions:
        plane[top:bottom, left:right] = i
    return plane


def test_without_a_box_the_pixels_of_the_map_give_the_place():
    plane = plane_of((0, 0, 0, 10, 5), (7, 20, 10, 40, 20), (254, 39, 0, 40, 1))
    plane[9, 39] = 7
    meta = {"instances": {"0": 0, "7": 1, "254": 0, "9": 0}}
    found = read(meta, {"obj_detection": plane})
    # the object 9 has neither a box nor a pixel
    assert [(one.name, one.box, one.score) for one in found] == [
        ("traffic light", (0.5, 0.45, 1, 1), None),
        ("dog", (0, 0, 0.25, 0.25), None),
        ("dog", (0.975, 0, 1, 0.05), None),
    ]
    # a stored box counts more than the pixels, which other boxes may cover
    meta["boxes"] = {"obj_detection": {"0": [0, 0, 1, 1, 0.9], "9": [0, 0, 0.1, 0.1, 0.9]}}
    found = read(meta, {"obj_detection": plane})
    assert [one.box for one in found if one.score] == [(0, 0, 1, 1), (0, 0, 0.1, 0.1)] and len(found) == 4


def test_an_id_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="id 3 of its obj_detection map has no entry in 'instances'"):
        read({"instances": {"0": 0}}, {"obj_detection": plane_of((0, 0, 0, 9, 9), (3, 9, 9, 19, 19))})
    with pytest.raises(ValueError, match="id 0 of its ocr_detection map has no entry in 'words'"):
        read({}, {"ocr_detection": plane_of((0, 0, 0, 9, 9))})
    # a map that is not read as text is not looked at
    assert read({}, {"ocr_detection": plane_of((0, 0, 0, 9, 9))}, expert_text=("obj_detection",)) == []


def test_scenes_have_the_boxes_of_their_maps():
    one = DetectionFinder(CONFIG, LETTERS)
    for seed in range(8):
        scene = render_scene(seed, 32, 64)
        found = one.find(scene.planes, scene.meta, {"obj_detection": OBJECT_CLASSES})
        words = [word for word in scene.meta["words"].values() if any(word == d.name for d in found)]
        assert found and all(d.score == 1.0 for d in found)
        assert len(words) == len(scene.meta["words"])
        for detection in found:
            if detection.expert == "ocr_detection":
                # words are painted by no other box: their boxes are those of the pixels
                i = next(i for i, word in scene.meta["words"].items() if word == detection.name)
                rows, columns = np.nonzero(scene.planes["ocr_detection"] == int(i))
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert detection.box == pytest.approx([edge / 64 for edge in edges], abs=1e-4)


# augmentation


def test_a_crop_and_a_flip_move_a_box():
    box = [0.5, 0.25, 0.75, 0.5]
    (one,) = read(objects(box), params=AugmentParams(window=(0.5, 0.0, 1.0, 0.5)))
    assert one.box == (0.0, 0.5, 0.5, 1.0)
    (one,) = read(objects(box), params=AugmentParams(flip=True))
    assert one.box == (0.25, 0.25, 0.5, 0.5)
    (one,) = read(objects(box), params=AugmentParams(window=(0.5, 0.0, 1.0, 0.5), flip=True))
    assert one.box == (0.5, 0.5, 1.0, 1.0)
    assert read(objects(box), params=AugmentParams()) == read(objects(box))


def test_a_box_of_which_less_than_a_quarter_is_seen_is_dropped():
    for right, kept in ((0.26, 1), (0.24, 0)):
        found = read(objects([0, 0.1, 1, 0.9]), params=AugmentParams(window=(0.0, 0.0, right, 1.0)))
        assert len(found) == kept
    # the size is that of the part in the crop
    (one,) = read(objects([0, 0, 1, 1]), params=AugmentParams(window=(0.5, 0.5, 1.0, 1.0)))
    assert one.box == (0, 0, 1, 1)
    # a box without an extent is kept where its place is
    for x, kept in ((0.6, 1), (0.4, 0)):
        assert len(read(objects([x, 0, x, 1]), params=AugmentParams(window=(0.5, 0.0, 1.0, 1.0)))) == kept


def test_the_order_is_that_of_the_cropped_image():
    meta = objects([0, 0, 0.6, 1], [0.6, 0, 1, 1])
    assert [one.box[0] for one in read(meta)] == [0, 0.6]
    first, second = read(meta, params=AugmentParams(window=(0.4, 0.0, 1.0, 1.0)))
    assert first.box == pytest.approx((1 / 3, 0, 1, 1)) and second.box == pytest.approx((0, 0, 1 / 3, 1))


def test_boxes_move_as_the_pixels_of_maps_do():
    """Each rectangle of a map, augmented by the pipeline, lies in the box that `move_box` gives."""
    side, count = 96, 48
    config = CONFIG.replace(experts=("obj_detection",), label_size=side)
    file = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 40)).save(file, "JPEG")
    strong, rng = AugmentConfig(min_area=0.4, flip=0.5, num_ops=2), np.random.default_rng(0)
    params = [draw_params(strong, rng) for _ in range(count)]
    assert sum(one.warps for one in params) > 10 and sum(one.flip for one in params) > 10
    boxes = []
    for _ in params:
        left, top = rng.integers(10, 40, 2)
        width, height = rng.integers(16, 40, 2)
        boxes.append((left, top, left + width, top + height))
    planes = []
    for left, top, right, bottom in boxes:
        planes.append(np.full((side, side), 255, np.uint8))
        planes[-1][top:bottom, left:right] = 0
    pipeline = ImagePipeline(config, batch_size=count, augmented=True, threads=1)
    _, maps = pipeline([file.getvalue()] * count, [{"obj_detection": plane} for plane in planes], params)
    compared = 0
    for box, one, moved in zip(boxes, params, maps["obj_detection"][:, 0].numpy(), strict=True):
        part, share = one.move_box(tuple(edge / side for edge in box))
        edges, (rows, columns) = np.array(part) * side, np.nonzero(moved == 0)
        if share < 0.3:
            continue
        # the corners of a warped box may be cut off, so that the pixels reach less far
        assert (edges[:2] < [columns.min() + 2, rows.min() + 2]).all()
        assert (edges[2:] > [columns.max() - 1, rows.max() - 1]).all()
        if one.warps and share < 0.95:
            continue
        compared += 1
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(edges, seen, atol=2.5)
    assert compared > 25


# into batches


def labels(**meta) -> ExpertLabels:
    return ExpertLabels({}, objects([0, 0, 1, 1, 0.9]) | meta, NAMES, "some labels")


def pixels(count: int) -> torch.Tensor:
    return torch.zeros(count, 3, 48, 48, dtype=torch.uint8)


def test_labels_become_the_detections_of_a_batch():
    batch = batch_of_pixels(pixels(3), CONFIG, [labels(), None, labels(instances={"0": 1})], tokenizer=LETTERS)
    assert [texts_of(batch.detections, b) for b in range(3)] == [" dog", "", " traffic"]
    # a name is cut at a token, and each letter is one: the rest of "traffic light"
    assert batch.detections.ids.shape == (3, CONFIG.num_detection_tokens)
    # a model that reads no maps reads the text all the same
    text_alone = CONFIG.replace(experts=())
    batch = batch_of_pixels(pixels(1), text_alone, [labels()], tokenizer=LETTERS)
    assert texts_of(batch.detections) == " dog" and not batch.labels


def test_without_labels_there_are_no_detections():
    for given in (None, [None, None]):
        batch = batch_of_pixels(pixels(2), CONFIG, given)
        assert (batch.detections.ids == CONFIG.pad_id).all() and not batch.detections.facts.any()
        assert batch.detections.ids.shape == (2, CONFIG.num_detection_tokens)
    assert batch_of_pixels(pixels(1), prismer_tiny(**SIZES), [labels()]).detections is None


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (
            {"boxes": {"obj_detection": {"0": [0, 0, 2, 1]}}},
            "some labels cannot be used: box 0 of obj_detection is not",
        ),
        ({"instances": {"0": 9}}, "some labels cannot be used: object 0 is of class 9"),
        ({"words": {"0": 3}}, "some labels cannot be used: word 0 is 3"),
    ],
)
def test_labels_that_do_not_fit_are_one_sentence(meta, message):
    with pytest.raises(ValueError, match=message):
        batch_of_pixels(pixels(1), CONFIG, [labels(**meta)], tokenizer=LETTERS)


def test_a_missing_tokenizer_is_one_sentence():
    with pytest.raises(ValueError, match="reads the detections of obj_detection, ocr_detection as text"):
        batch_of_pixels(pixels(1), CONFIG, [labels()])


def write(folder) -> ShardDataset:
    """Twelve samples: the even ones without any map."""
    file = io.BytesIO()
    Image.new("RGB", (60, 50), (200, 10, 10)).save(file, "JPEG")
    with ShardWriter(folder, classes=NAMES, source="tests") as writer:
        for i in range(12):
            plane = np.full((24, 24), 255, np.uint8)
            plane[2 : 2 + i, 2:20] = 0
            meta = {"instances": {"0": i % 2}, "size": [50, 60], "captions": ["A thing"]}
            if i % 2 == 0:
                meta["boxes"] = {"obj_detection": {"0": [0.1, 0.1, 0.9, 0.9, 0.7]}}
            writer.write(Sample(f"s{i:02d}", file.getvalue(), {"obj_detection": plane} if i % 2 else {}, meta))
    return ShardDataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ShardDataset:
    return write(tmp_path_factory.mktemp("detections") / "data")


def load(dataset: ShardDataset, **changes) -> Loader:
    options = dict(config=CONFIG, batch_size=4, semantics=Semantics.spelling(), tokenizer=LETTERS, seed=3, threads=1)
    return Loader(dataset, **(options | changes))


def found_in(batches: list[Batch]) -> dict[str, tuple[list[int], list[list[int]]]]:
    return {
        key: (batch.images.detections.ids[b].tolist(), batch.images.detections.facts[b].tolist())
        for batch in batches
        for b, key in enumerate(batch.keys)
    }


def test_a_loader_reads_detections_with_and_without_maps(dataset):
    batches = list(load(dataset, training=False).epoch(0))
    found = found_in(batches)
    assert len(found) == 12
    for key, (ids, facts) in found.items():
        even = int(key[1:]) % 2 == 0
        assert LETTERS.decode(ids) == (" dog" if even else " traffic")
        assert facts[0][CONFIDENCE] == (2 if even else 0)
    assert (
        list(load(dataset, training=False, config=prismer_tiny(**SIZES), tokenizer=None).epoch(0))[0].images.detections
        is None
    )
    with pytest.raises(ValueError, match="no tokenizer was given"):
        load(dataset, tokenizer=None)


def test_detections_do_not_depend_on_processes_and_follow_the_augmentation(dataset):
    strong = AugmentConfig(min_area=0.3, flip=0.5)
    whole = found_in(list(load(dataset, augment=strong).epoch(1)))
    ranks = [found_in(list(load(dataset, augment=strong, batch_size=2, rank=r, world=2).epoch(1))) for r in range(2)]
    assert whole == {**ranks[0], **ranks[1]}
    plain = found_in(list(load(dataset).epoch(1)))
    assert set(whole) == set(plain) and sum(whole[key] != plain[key] for key in whole) > 4
    assert plain == found_in(list(load(dataset).epoch(2)))


def test_dropped_labels_drop_the_text_too(dataset):
    lost = kept = 0
    loader = load(dataset, drop_labels=0.5)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            for b, key in enumerate(batch.keys):
                is_read = texts_of(batch.images.detections, b) != ""
                lost, kept = lost + (not is_read), kept + is_read
                if int(key[1:]) % 2:
                    assert is_read == bool((batch.images.labels["obj_detection"][b] != 255).any())
    assert lost > 8 and kept > 8


@pytest.mark.filterwarnings("ignore:skipping sample")
def test_a_sample_with_a_wrong_box_is_skipped(tmp_path):
    with ShardWriter(tmp_path / "data", classes=NAMES, source="tests") as writer:
        file = io.BytesIO()
        Image.new("RGB", (40, 40)).save(file, "JPEG")
        for i in range(4):
            box = [0, 0, 1, 1] if i else [0, 0, 1]
            writer.write(Sample(f"s{i}", file.getvalue(), {}, objects(box)))
    loader = load(ShardDataset(tmp_path / "data"), batch_size=2, training=False)
    assert sorted(found_in(list(loader.epoch(0)))) == ["s1", "s2", "s3"]
    (skipped,) = loader.skipped
    assert "box 0 of obj_detection is not left, top, right, bottom" in skipped.reason
