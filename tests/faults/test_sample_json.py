"""Proves that a sample with any JSON is used whole, or skipped and named.

python -m pytest tests/faults/test_sample_json.py
"""

import io
import json
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from prismer.config import prismer_tiny
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store import writer as shard_writer
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.sample_json import meta_problems
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.dataloading.views.contact_sheet import contact_sheet
from prismer.texts import ChooseTexts, choose_captions, choose_class, choose_joint, choose_questions, collate
from prismer.tokenizer import Tokenizer
from prismer.training.text_statistics import count_texts
from tests.faults.anything import cases, dump, mutated

CONFIG = prismer_tiny(image_size=32, label_size=16)
CLASSES = {"seg": ["ground", "sky"], "obj_detection": ["cube", "cone"], "class": ["cat", "dog"]}
WHOLE = {
    "image_id": 9,
    "domain": "in-domain",
    "captions": ["a cube", "two cones"],
    "questions": [
        {
            "question": "what?",
            "answers": [{"answer": "cube", "weight": 0.6}, {"answer": "cone", "weight": 0.4}],
            "kind": "shape",
            "raw_answers": ["cube", "cube", ""],
            "question_id": 7,
            "question_type": "what",
            "answer_type": "other",
        },
        {"question": "how many?", "answers": [], "kind": "count"},
    ],
    "class": 1,
    "instances": {"0": 1, "1": 0},
    "words": {"0": "stop"},
    "size": [20, 30],
    "source": "made up",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a cube", "two cones", "what?", "how many?"], 300)


def make_sample(key: str, meta: dict) -> Sample:
    file = io.BytesIO()
    Image.fromarray(np.arange(1800, dtype=np.uint8).reshape(20, 30, 3)).save(file, "JPEG")
    ids = np.full((16, 16), 255, np.uint8)
    ids[:2], ids[2:4] = 0, 1
    words = np.where(ids == 1, 255, ids).astype(np.uint8)
    labels = {"depth": ids, "seg": ids, "obj_detection": ids, "ocr_detection": words}
    return Sample(key, file.getvalue(), labels, meta)


def choosers(tokenizer: Tokenizer) -> tuple[ChooseTexts, ...]:
    room = CONFIG.max_positions
    captions = partial(choose_captions, tokenizer, "a picture of", 2, room)
    questions = partial(choose_questions, tokenizer, 3, room)
    return (
        captions,
        questions,
        partial(choose_joint, {"captions": captions, "questions": questions}),
        partial(choose_class, tokenizer, CLASSES["class"], room),
    )


@cases(500)
@given(meta=mutated(WHOLE))
def test_what_fits_the_schema_can_be_used(tokenizer, meta):
    """Every reader of a sample's JSON accepts what fits the schema; a task may still miss a field."""
    meta = json.loads(dump(meta))
    problems = meta_problems(meta, CLASSES)
    assert all(text.isprintable() and len(text) < 200 for text in problems)
    if problems:
        return
    texts = []
    for choose in choosers(tokenizer):
        try:
            texts += choose(meta, np.random.default_rng(0))
        except ValueError as error:
            assert "choose a task that fits" in str(error) or "too long" in str(error)
    if texts:
        batch = collate([texts])
        assert batch.weights.isfinite().all() and (batch.weights >= 0).all()
    contact_sheet([make_sample("key", meta)], CLASSES)


@cases(12)
@given(metas=mutated([WHOLE] * 25, most=30))
def test_every_sample_is_used_or_named(tmp_path_factory, tokenizer, metas):
    """Of 25 samples from other writers, the loader, the check and the survey name the same ones."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        # the writer takes only a dict, which here wraps any JSON value
        patch.setattr(shard_writer, "to_json", lambda value: dump(value["envelope"] if "envelope" in value else value))
        patch.setattr("os.fsync", lambda handle: None)
        with ShardWriter(folder, classes=CLASSES, source="x", samples_per_shard=10) as writer:
            for i, meta in enumerate(metas):
                writer.write(make_sample(f"key-{i}", {"envelope": meta}))
    dataset = ShardDataset(folder)
    bad = {f"key-{i}" for i, meta in enumerate(metas) if faulty(json.loads(dump(meta)))}
    report = check_dataset(folder, progress=False)
    assert {problem.key for problem in report.problems} == bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = Loader(dataset, config=CONFIG, batch_size=4, semantics=Semantics.spelling(), training=False)
        keys = [key for batch in loader.epoch(0) for key in batch.keys]
    assert sorted([*keys, *(skipped.key for skipped in loader.skipped)]) == sorted(
        f"key-{i}" for i in range(len(metas))
    )
    assert {skipped.key for skipped in loader.skipped} == bad
    assert all(skipped.reason.isprintable() for skipped in loader.skipped)
    assert len(count_texts(dataset).skipped) <= len(bad)


def faulty(meta: object) -> bool:
    """Whether a sample of `make_sample` with this JSON cannot be used; its maps need entries for ids 0 and 1."""
    if meta_problems(meta, CLASSES):
        return True
    wrong_size = meta.get("size", [20, 30]) != [20, 30]
    return wrong_size or not {"0", "1"} <= set(meta.get("instances", {})) or "0" not in meta.get("words", {})
