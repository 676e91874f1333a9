"""Proves that a text has the same 64 numbers on every machine, that words stay apart, and that ids are checked.

python -m pytest tests/data/test_semantic_features.py
"""

import json

import numpy as np
import pytest

from prismer.config import prismer_base, prismer_tiny
from prismer.dataloading.semantics.features import FeatureTables, Semantics, write_table

WORDS = (
    "stop stops shop ship bank bar park bike boat book bus cafe cake city club door exit farm film fish food free "
    "zoo cube sphere cone cylinder sign ground sky person traffic traffic-light a aa ab ba abc cba school schoolbus"
).split()


def test_spelling_is_pinned():
    # models were trained on these numbers: they may never change
    row = Semantics.spelling().rows(["stop"])[0]
    assert row[:8] == pytest.approx([1.3484, 1.3484, 0.26968, -0.26968, 1.3484, 0.26968, -0.26968, 1.3484], abs=1e-6)


def test_spelling_separates_words():
    semantics = Semantics.spelling()
    rows = semantics.rows(WORDS)
    assert rows.shape == (len(WORDS), 64) and rows.dtype == np.float32
    assert np.square(rows).mean(1) == pytest.approx(np.ones(len(WORDS)), abs=1e-5)
    cosine = rows @ rows.T / 64 - np.eye(len(WORDS))
    worst = np.unravel_index(cosine.argmax(), cosine.shape)
    assert cosine.max() < 0.95, f"{WORDS[worst[0]]} and {WORDS[worst[1]]} are too near"
    assert np.abs(np.median(cosine)) < 0.1
    near = {(a, b): cosine[WORDS.index(a), WORDS.index(b)] for a, b in [("stop", "stops"), ("bar", "bank")]}
    # words with the same beginning are nearer than words with the same letters elsewhere
    assert near["stop", "stops"] > 0.6 and near["bar", "bank"] > 0.3
    assert cosine[WORDS.index("abc"), WORDS.index("cba")] < near["stop", "stops"]
    assert not semantics.background.any()


def test_spelling_ignores_case_and_blanks_and_reads_any_letters():
    semantics = Semantics.spelling()
    a, b, c, umlaut, empty = semantics.rows(["Traffic  Light ", "traffic light", "trafficlight", "größe", ""])
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.isfinite(umlaut).all() and np.isfinite(empty).all()
    assert semantics.rows([]).shape == (0, 64)


def test_a_written_table_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    features, background = rng.normal(size=(3, 64)), rng.normal(size=64)
    write_table(tmp_path, ["person", "Traffic light", "stop"], features, background)
    semantics = Semantics.for_config(prismer_base(), tmp_path)
    assert semantics.rows(["stop", "traffic light"]) == pytest.approx(np.float32(features[[2, 1]]))
    assert semantics.background == pytest.approx(np.float32(background))
    with pytest.raises(ValueError, match="'zebra' is not in the semantics table in .* `prismer semantics add"):
        semantics.rows(["stop", "zebra"])
    assert not list(tmp_path.glob("*.partial"))


def test_a_damaged_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no semantics table"):
        Semantics.from_table(tmp_path)
    with pytest.raises(ValueError, match="name the folder"):
        Semantics.for_config(prismer_base())
    with pytest.raises(ValueError, match="do not fit 2 names"):
        write_table(tmp_path, ["a", "b"], np.zeros((3, 64)), np.zeros(64))
    with pytest.raises(ValueError, match="case or blanks"):
        write_table(tmp_path, ["a", "A"], np.zeros((2, 64)), np.zeros(64))
    write_table(tmp_path, ["a", "b"], np.zeros((2, 64)), np.zeros(64))
    (tmp_path / "semantics.json").write_text(json.dumps(["a"]))
    with pytest.raises(ValueError, match="for 1 names"):
        Semantics.from_table(tmp_path)
    (tmp_path / "semantics.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a list"):
        Semantics.from_table(tmp_path)
    (tmp_path / "semantics.safetensors").write_bytes(b"garbage" * 10)
    with pytest.raises(ValueError, match="is damaged"):
        Semantics.from_table(tmp_path)


CLASSES = {"seg": ["cube", "sky"], "obj_detection": ["sphere", "cube"]}


def maps(**planes: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array([values], np.uint8) for name, values in planes.items()}


def test_every_id_finds_the_features_of_its_text():
    semantics = Semantics.spelling()
    tables = FeatureTables(prismer_tiny(), CLASSES, semantics)
    labels = maps(seg=[0, 1, 255], obj_detection=[3, 0, 255], ocr_detection=[0, 7, 255])
    first = {"instances": {"0": 0, "3": 1}, "words": {"0": "stop", "7": "taxi"}}
    second = {"instances": {"0": 1, "3": 1}, "words": {"0": "taxi", "7": "zoo", "9": "unused"}}
    rows, features = tables.collate([tables.look_up(labels, meta) for meta in (first, second)])
    assert {name: table.shape for name, table in rows.items()} == dict.fromkeys(
        ("seg", "obj_detection", "ocr_detection"), (2, 256)
    )
    assert all(table.dtype == np.int64 and not table[:, 255].any() for table in rows.values())
    # background, four class names, and each word of the batch once
    assert features.shape == (1 + 4 + 3, 64) and features.dtype == np.float32
    assert np.array_equal(features[0], semantics.background)
    for b, expected in enumerate(
        [
            dict(seg=["cube", "sky"], obj_detection=["cube", "sphere"], ocr_detection=["stop", "taxi"]),
            dict(seg=["cube", "sky"], obj_detection=["cube", "cube"], ocr_detection=["taxi", "zoo"]),
        ]
    ):
        for expert, texts in expected.items():
            ids = labels[expert][0, :2]
            assert np.array_equal(features[rows[expert][b, ids]], semantics.rows(texts)), (b, expert)


def test_a_sample_without_labels_is_background():
    tables = FeatureTables(prismer_tiny(experts=("depth", "ocr_detection")), CLASSES, Semantics.spelling())
    rows, features = tables.collate([tables.look_up({}, {})])
    assert list(rows) == ["ocr_detection"] and not rows["ocr_detection"].any() and len(features) == 1
    # maps of experts that the model lacks are ignored
    tables.look_up(maps(seg=[99]), {})


def test_words_without_features_are_background(tmp_path):
    rng = np.random.default_rng(0)
    names = ["cube", "sky", "sphere", "stop"]
    write_table(tmp_path, names, rng.normal(size=(4, 64)), rng.normal(size=64))
    semantics = Semantics.from_table(tmp_path)
    tables = FeatureTables(prismer_tiny(), CLASSES, semantics)
    labels = maps(seg=[0, 1, 255, 255], ocr_detection=[0, 1, 2, 3])
    meta = {"words": {"0": "Stop", "1": "zebra", "2": "qux", "3": "Zebra "}}
    with pytest.warns(UserWarning, match=r"as background: 'qux' \(1\), 'zebra' \(2\); .* add ") as seen:
        meanings = [tables.look_up(labels, meta)]
        # words of another sample are only counted
        meanings.append(tables.look_up(labels, {"words": dict.fromkeys("0123", "new")}))
    assert len(seen) == 1
    assert semantics.unknown_words == {"zebra": 2, "qux": 1, "new": 4}
    rows, features = tables.collate(meanings)
    assert len(features) == 1 + 4 + 1
    assert np.array_equal(features[rows["ocr_detection"][0, 0]], semantics.rows(["stop"])[0])
    assert not rows["ocr_detection"][0, 1:4].any() and not rows["ocr_detection"][1].any()
    assert np.array_equal(features[rows["seg"][1, [0, 1]]], semantics.rows(["cube", "sky"]))
    # a class without features is an error
    with pytest.raises(ValueError, match="'cone' is not in the semantics table"):
        FeatureTables(prismer_tiny(), {"seg": ["cube", "cone"]}, semantics)


@pytest.mark.parametrize(
    "labels, meta, message",
    [
        (dict(seg=[2]), {}, "class 2, the class table has 2"),
        (dict(obj_detection=[4]), {"instances": {"0": 1}}, "id 4 .* 'instances'"),
        (dict(obj_detection=[0]), {"instances": {"0": 5}}, "class 5"),
        (dict(obj_detection=[0]), {"instances": {"0": "cube"}}, "id 0"),
        (dict(obj_detection=[0]), {"instances": [1]}, "id 0"),
        (dict(obj_detection=[0]), {}, "id 0"),
        (dict(ocr_detection=[1]), {"words": {"0": "stop"}}, "id 1 .* 'words'"),
        (dict(ocr_detection=[0]), {"words": {"0": None}}, "id 0"),
    ],
)
def test_unknown_ids_are_refused(labels, meta, message):
    tables = FeatureTables(prismer_tiny(), CLASSES, Semantics.spelling())
    with pytest.raises(ValueError, match=message):
        tables.look_up(maps(**labels), meta)


@pytest.mark.parametrize("experts", [(), ("depth", "edge")])
def test_a_model_without_maps_of_ids_needs_no_table(experts):
    """Otherwise base-z could not be trained without a table that it never reads."""
    config = prismer_base(experts=experts, expert_text=("obj_detection",))
    assert not Semantics.for_config(config).background.any()
    with pytest.raises(ValueError, match="reads a table"):
        Semantics.for_config(prismer_base(experts=(*experts, "seg")))
