"""Proves that batches depend on (seed, epoch, step) alone, and that no broken sample stops a run or enters a batch.

python -m pytest tests/data/test_loader.py
"""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.batch import IGNORE_INDEX, Batch
from prismer.config import prismer_tiny
from prismer.dataloading.feed.augment import AugmentConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.feed.order import BlockOrder, Order, Visit
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter

CONFIG = prismer_tiny(image_size=48, label_size=32)
CLASSES = {"seg": ["cube", "sky", "ground"], "obj_detection": ["sphere", "cube"]}
SEMANTICS = Semantics.spelling()
COUNT = 37


def make_sample(i: int, **changes) -> Sample:
    rng = np.random.default_rng(i)
    pixels = np.kron(rng.integers(0, 255, (5, 6, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG")
    labels = {
        "depth": rng.integers(0, 255, (24, 24), dtype=np.uint8),
        "normal": rng.integers(1, 255, (24, 24, 3), dtype=np.uint8),
        "seg": rng.integers(0, 3, (24, 24), dtype=np.uint8),
        "edge": rng.integers(0, 255, (24, 24), dtype=np.uint8),
        "obj_detection": rng.choice([0, 1, 255], (24, 24)).astype(np.uint8),
        "ocr_detection": rng.choice([0, 255], (24, 24)).astype(np.uint8),
    }
    meta = {
        "captions": [f"caption {i} {j}" for j in range(4)],
        "instances": {"0": i % 2, "1": 1},
        "words": {"0": ["stop", "taxi", "zoo"][i % 3]},
        "size": [50, 60],
    }
    return Sample(f"sample-{i:03d}", jpeg.getvalue(), {**labels}, meta | changes)


def write(folder, samples) -> ShardDataset:
    with ShardWriter(folder, classes=CLASSES, source="tests", samples_per_shard=10) as writer:
        for sample in samples:
            writer.write(sample)
    return ShardDataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ShardDataset:
    return write(tmp_path_factory.mktemp("data") / "whole", map(make_sample, range(COUNT)))


def broken_samples() -> dict[int, tuple[Sample, str]]:
    """Samples with the right checksums and broken contents, each with a part of the reason."""
    cases: dict[int, tuple[Sample, str]] = {}
    for i, (cut, reason) in {
        3: (lambda jpeg: jpeg[: len(jpeg) // 2], "does not decode"),
        11: (lambda jpeg: b"\xff\xd8" + b"not an image" * 50, "does not decode"),
        12: (lambda jpeg: jpeg[:4], "does not decode"),
    }.items():
        sample = make_sample(i)
        sample.jpeg = cut(sample.jpeg)
        cases[i] = sample, reason
    no_class = make_sample(20)
    no_class.labels["seg"] = np.full((24, 24), 7, np.uint8)
    cases[20] = no_class, "class 7"
    cases[21] = make_sample(21, instances={}), "'instances'"
    cases[29] = make_sample(29, size="large"), "its size"
    return cases


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> ShardDataset:
    cases = broken_samples()
    samples = (cases[i][0] if i in cases else make_sample(i) for i in range(COUNT))
    return write(tmp_path_factory.mktemp("data") / "broken", samples)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"captions": ' + b"[" * 100_000, "does not parse"),
        (b"[1, 2]", "a list, not an object"),
        (b'{"captions": ["\xff"]}', "does not parse"),
        (b'{"captions": ["a \\ud800 cube"]}', "caption 0 is 'a"),
        (b'{"captions": [NaN]}', "caption 0 is nan"),
        (b'{"size": [1, ' + b"9" * 5000 + b"]}", "does not parse"),
    ],
    ids=["nested", "no-object", "no-utf8", "surrogate", "nan", "digits"],
)
@pytest.mark.filterwarnings("ignore:skipping sample")
def test_samples_with_malformed_json_are_skipped(tmp_path, monkeypatch, text, reason):
    """The JSON has the right checksum, but this library's writer refuses it."""
    from prismer.dataloading.store import writer as shard_writer

    honest = shard_writer.to_json
    monkeypatch.setattr(shard_writer, "to_json", lambda value: text if "odd" in value else honest(value))
    dataset = write(tmp_path / "data", [make_sample(0, odd=True), *map(make_sample, range(1, 9))])
    loader = make_loader(dataset)
    keys = [key for batch in loader.epoch(0) for key in batch.keys]
    assert len(keys) == 8 and "sample-000" not in keys
    (skipped,) = loader.skipped
    assert skipped.key == "sample-000" and reason in skipped.reason


def choose(meta: dict, rng: np.random.Generator) -> list:
    """The last digits of two captions, as tokens."""
    picked = rng.choice(len(meta["captions"]), 2, replace=False)
    ids = [[0, 10 + int(meta["captions"][j][-1]), 2] for j in picked]
    return [(text, text, 0.5) for text in ids]


def make_loader(dataset: ShardDataset, **changes) -> Loader:
    defaults = dict(
        config=CONFIG, batch_size=8, texts=choose, group_size=2, semantics=SEMANTICS, augment=AugmentConfig(), seed=7
    )
    return Loader(dataset, **(defaults | changes))


def samples_of(batch: Batch) -> list[dict]:
    """All tensors of each sample, with features in place of rows, which depend on the batch."""
    images, texts = batch.images, batch.texts
    out = []
    for b, key in enumerate(batch.keys):
        parts = {"key": key, "rgb": images.rgb[b], **{n: map_[b] for n, map_ in images.labels.items()}}
        for name, rows in images.rows.items():
            parts[f"{name} features"] = images.features[rows[b]]
        if texts is not None:
            parts |= {"ids": texts.ids[b], "labels": texts.labels[b], "weights": texts.weights[b]}
        out.append(parts)
    return out


def assert_same(a: list[dict], b: list[dict]):
    assert [s["key"] for s in a] == [s["key"] for s in b]
    for x, y in zip(a, b, strict=True):
        for name in x:
            same = x[name] == y[name] if name == "key" else torch.equal(x[name], y[name])
            assert same, f"{name} of {x['key']} differs"


def test_two_ranks_see_the_global_batches_of_one(dataset):
    """Two processes of batch 8 and one of batch 16 agree bit for bit in order, augmentation, texts, dropped labels."""
    whole = list(make_loader(dataset, batch_size=16, drop_labels=0.3).epoch(2))
    ranks = [
        list(make_loader(dataset, rank=rank, world=2, drop_labels=0.3, threads=1 + rank).epoch(2)) for rank in range(2)
    ]
    assert len(whole) == COUNT // 16 == len(ranks[0]) == len(ranks[1])
    for step, batch in enumerate(whole):
        assert_same(samples_of(batch), samples_of(ranks[0][step]) + samples_of(ranks[1][step]))


def test_resume_in_the_middle_of_an_epoch(dataset):
    loader = make_loader(dataset)
    assert loader.steps_per_epoch == 4
    whole = [samples_of(batch) for batch in loader.epoch(1)]
    resumed = [samples_of(batch) for batch in make_loader(dataset).epoch(1, start_step=2)]
    assert len(whole) == 4 and len(resumed) == 2
    for a, b in zip(whole[2:], resumed, strict=True):
        assert_same(a, b)
    assert list(loader.epoch(1, start_step=4)) == []
    with pytest.raises(ValueError, match="start_step is 5"):
        loader.epoch(1, start_step=5)


def test_epochs_and_seeds_differ(dataset):
    def keys_and_first(seed: int, epoch: int):
        batches = list(make_loader(dataset, seed=seed).epoch(epoch))
        keys = [key for batch in batches for key in batch.keys]
        by_key = {sample["key"]: sample["rgb"] for batch in batches for sample in samples_of(batch)}
        return keys, by_key

    (a, first), (b, second), (c, _) = (keys_and_first(*key) for key in ((0, 0), (0, 1), (1, 0)))
    assert len(set(a)) == 32 and a != b and a != c
    common = set(first) & set(second)
    assert common and not any(torch.equal(first[key], second[key]) for key in common)


def test_a_batch_holds_the_tensors_and_features_of_its_samples(dataset):
    (batch, *_) = make_loader(dataset).epoch(0)
    images = batch.images
    assert images.rgb.shape == (8, 3, 48, 48) and images.rgb.dtype == torch.uint8
    assert {name: tuple(map_.shape) for name, map_ in images.labels.items()} == {
        name: (8, 3 if name == "normal" else 1, 32, 32) for name in CONFIG.experts
    }
    assert images.instance_rows is None
    # background, five class names and the three words that the samples hold
    assert images.features.shape == (9, 64) and images.features.dtype == torch.float32
    for b, meta in enumerate(batch.meta):
        assert batch.keys[b].endswith(meta["captions"][0].split()[1].zfill(3))
        texts = {
            ("seg", 1): "sky",
            ("obj_detection", 0): CLASSES["obj_detection"][meta["instances"]["0"]],
            ("ocr_detection", 0): meta["words"]["0"],
        }
        for (expert, i), text in texts.items():
            row = images.features[images.rows[expert][b, i]].numpy()
            assert np.array_equal(row, SEMANTICS.rows([text])[0]), (expert, text)
        assert not images.features[images.rows["seg"][b, 255]].any()
    assert batch.texts.ids.shape == (8, 2, 3) and (batch.texts.weights == 0.5).all()


def test_groups_have_one_size(dataset):
    """A mean over B x G is the same number on every rank only if G is."""
    texts = make_loader(dataset, group_size=5).epoch(0)
    batch = next(texts).texts
    texts.close()
    assert batch.ids.shape == (8, 5, 3)
    assert not batch.weights[:, 2:].any() and (batch.labels[:, 2:] == IGNORE_INDEX).all()
    assert (batch.ids[:, 2:, 0] == CONFIG.bos_id).all() and (batch.ids[:, 2:, 1:] == CONFIG.pad_id).all()
    (batch, *_) = make_loader(dataset, texts=None).epoch(0)
    assert batch.texts is None


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_sample_once(dataset, world):
    keys, steps = [], []
    for rank in range(world):
        loader = make_loader(dataset, augment=None, training=False, batch_size=5, rank=rank, world=world)
        batches = list(loader.epoch(0))
        assert len(batches) == loader.steps_per_epoch
        steps.append(len(batches))
        keys += [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"sample-{i:03d}" for i in range(COUNT)]
    # 37 = 2 x 15 + 5 + 2 + 0: no sample is left for the last rank
    assert steps == ([8] if world == 1 else [3, 3, 2])


def test_evaluation_does_not_change_from_epoch_to_epoch(dataset):
    loader = make_loader(dataset, augment=None, training=False, texts=None)
    first, second = ([s for batch in loader.epoch(e) for s in samples_of(batch)] for e in (0, 5))
    assert_same(first, second)
    pixels = Image.open(io.BytesIO(make_sample(0).jpeg)).resize((48, 48), Image.BICUBIC)
    difference = first[0]["rgb"].permute(1, 2, 0).numpy().astype(int) - np.asarray(pixels)
    assert np.abs(difference).max() <= 1


def test_labels_are_dropped_as_often_as_asked(dataset):
    loader = make_loader(dataset, drop_labels=0.5, augment=None, texts=None)
    blank = {}
    for epoch in range(5):
        for batch in loader.epoch(epoch):
            for sample in samples_of(batch):
                dropped = [not sample["depth"].any(), not sample["normal"].any()]
                dropped += [bool((sample[name] == 255).all()) for name in ("seg", "ocr_detection")]
                # a sample loses all its maps, or none
                assert len(set(dropped)) == 1
                blank[epoch, sample["key"]] = dropped[0]
    assert 0.35 < np.mean(list(blank.values())) < 0.65
    assert any(blank[0, key] != blank[1, key] for (_, key) in blank if (0, key) in blank and (1, key) in blank)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:skipping sample")
def test_broken_samples_are_skipped_and_reported(broken, training):
    bad = {f"sample-{i:03d}": reason for i, (_, reason) in broken_samples().items()}
    loader = make_loader(broken, training=training, augment=AugmentConfig() if training else None)
    batches = list(loader.epoch(0)) + list(loader.epoch(1))
    keys = [key for batch in batches for key in batch.keys]
    assert not set(keys) & set(bad)
    assert {s.key for s in loader.skipped} == set(bad) and len(loader.skipped) == len(bad)
    for skipped in loader.skipped:
        assert bad[skipped.key] in skipped.reason
        assert skipped.shard == f"shard-{int(skipped.key[-3:]) // 10:06d}.tar"
    if training:
        assert all(len(batch.keys) == 8 == len(batch.images.rgb) for batch in batches)
    else:
        assert sorted(keys) == sorted(2 * [f"sample-{i:03d}" for i in range(COUNT) if f"sample-{i:03d}" not in bad])


@pytest.mark.filterwarnings("ignore:skipping sample")
def test_broken_samples_change_nothing_else(dataset, broken):
    """The next good sample of the order takes the place of a broken one; all other places stay the same."""
    bad = {f"sample-{i:03d}" for i in broken_samples()}
    sound = [s for batch in make_loader(dataset).epoch(0) for s in samples_of(batch)]
    got = [s for batch in make_loader(broken).epoch(0) for s in samples_of(batch)]
    assert len(sound) == len(got) == 32
    assert_same(
        [s for s in sound if s["key"] not in bad], [g for s, g in zip(sound, got, strict=True) if s["key"] not in bad]
    )
    for i, sample in enumerate(sound[:-8]):
        if sample["key"] in bad:
            replacement = next(s for s in sound[i:] if s["key"] not in bad)
            assert_same([replacement], [got[i]])
    # two ranks agree with one on every replacement
    ranks = [list(make_loader(broken, batch_size=4, rank=r, world=2).epoch(0)) for r in range(2)]
    halves = [s for pair in zip(*ranks, strict=True) for batch in pair for s in samples_of(batch)]
    assert_same(got, halves)


@pytest.mark.filterwarnings("ignore:skipping sample")
def test_a_damaged_shard_is_skipped(tmp_path):
    dataset = write(tmp_path / "data", map(make_sample, range(COUNT)))
    path = tmp_path / "data" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(make_sample(14).jpeg) + 300] ^= 1
    path.write_bytes(data)
    (tmp_path / "data" / "shard-000003.tar").unlink()
    loader = make_loader(dataset, training=False, augment=None)
    keys = [key for batch in loader.epoch(0) for key in batch.keys]
    assert len(keys) == 30 - 1 and len(set(keys)) == 29
    reasons = {s.shard: s.reason for s in loader.skipped}
    assert len(loader.skipped) == 8 and "checksum" in reasons["shard-000001.tar"]
    assert "cannot be opened" in reasons["shard-000003.tar"]


def test_the_first_skip_warns(broken):
    with pytest.warns(UserWarning, match=r"skipping sample sample-0\d\d of shard-00000\d.tar") as caught:
        list(make_loader(broken).epoch(0))
    said = [str(warning.message) for warning in caught]
    assert len([text for text in said if "skipping sample" in text]) == 1, said


@pytest.mark.filterwarnings("ignore:skipping sample")
def test_a_dataset_without_readable_samples_is_an_error(dataset):
    def refuse(meta, rng):
        raise ValueError("a sample has no 'questions'")

    with pytest.raises(RuntimeError, match="no readable sample among 37 in a row; .*no 'questions'"):
        list(make_loader(dataset, texts=refuse).epoch(0))


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prismer-loader"]


def test_closing_early_ends_the_thread(dataset):
    loader = make_loader(dataset, prefetch=1)
    batches = loader.epoch(0)
    assert not loader_threads()
    first = next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()
    # the loader works on
    assert_same(samples_of(next(loader.epoch(0))), samples_of(first))


def test_batches_are_prepared_ahead(dataset):
    """While the consumer holds one batch, `prefetch` more batches are made, and not more."""
    seen = []

    def choose_and_note(meta, rng):
        seen.append(meta)
        return choose(meta, rng)

    batches = make_loader(dataset, texts=choose_and_note, batch_size=4, prefetch=2, threads=1).epoch(0)
    next(batches)
    deadline = threading.Event()
    for _ in range(100):
        if len(seen) >= 4 * 5:
            break
        deadline.wait(0.05)
    deadline.wait(0.3)
    # one batch is taken, two wait, the thread holds one, and the samples of one are read
    assert len(seen) == 4 * 5
    batches.close()


def test_errors_reach_the_consumer(dataset):
    def fail(meta, rng):
        raise KeyError("a bug in the task")

    batches = make_loader(dataset, texts=fail).epoch(0)
    with pytest.raises(KeyError, match="a bug in the task"):
        next(batches)
    assert not loader_threads()


def test_a_group_too_small_is_named(dataset):
    with pytest.raises(ValueError, match="2 texts were chosen for an image, group_size is 1"):
        next(make_loader(dataset, group_size=1).epoch(0))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=19, world=2), "an epoch has 37 samples, one global batch 38"),
        (dict(rank=2, world=2), "rank is 2 of 2"),
        (dict(drop_labels=2.0), "drop_labels is 2.0"),
        (dict(training=False), "neither augments"),
        (dict(prefetch=0), "prefetch is 0"),
    ],
)
def test_loader_refuses_wrong_arguments(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(dataset, **changes)


def test_a_model_without_experts_gets_no_labels(dataset):
    (batch, *_) = make_loader(dataset, config=CONFIG.replace(experts=())).epoch(0)
    assert batch.images.labels == {} and batch.images.rows == {}
    assert batch.images.features.shape == (1, 64)


def blocks(dataset: ShardDataset) -> Order:
    return BlockOrder(dataset.starts, 7, global_batch=12, shards=3, lanes=3)


def global_batches(dataset: ShardDataset, world: int, micro_batches: int = 1, start: int = 0):
    """The samples of each global batch of 12 from step `start` on, as `world` processes read them."""
    size = 12 // world // micro_batches
    options = dict(batch_size=size, world=world, threads=1, order=blocks(dataset), drop_labels=0.3)
    ranks = [make_loader(dataset, rank=rank, **options).epoch(2, start * micro_batches) for rank in range(world)]
    parts = [s for batches in zip(*ranks, strict=True) for batch in batches for s in samples_of(batch)]
    return [parts[begin : begin + 12] for begin in range(0, len(parts), 12)]


def test_the_loader_reads_in_the_order_that_it_is_given(dataset):
    order = blocks(dataset).epoch(2)
    keys = [sample["key"] for batch in global_batches(dataset, 1) for sample in batch]
    assert keys == [f"sample-{order[position].index:03d}" for position in range(36)]


@pytest.mark.parametrize("world, micro_batches", [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_a_block_order_resumes_at_another_world_size(dataset, world, micro_batches):
    whole = global_batches(dataset, 1)
    resumed = global_batches(dataset, world, micro_batches, start=1)
    assert len(whole) == 3 and len(resumed) == 2
    for before, after in zip(whole[1:], resumed, strict=True):
        assert_same(before, after)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.filterwarnings("ignore:skipping sample")
def test_the_next_sample_of_a_block_order_replaces_a_broken_one(dataset, broken, world):
    bad = {f"sample-{i:03d}" for i in broken_samples()}
    order = blocks(dataset).epoch(2)
    keys = [f"sample-{order[position].index:03d}" for position in range(COUNT)]
    expected = [next(key for key in keys[position:] + keys if key not in bad) for position in range(36)]
    assert [s["key"] for batch in global_batches(broken, world) for s in batch] == expected


class Repeated:
    """Samples 27 to 20 of a dataset, twice in each epoch, with other draws at each visit."""

    def __len__(self) -> int:
        return 16

    def epoch(self, epoch: int) -> "Repeated":
        return self

    def __getitem__(self, position: int) -> Visit:
        return Visit(27 - position % 8, position // 8)


def test_the_order_decides_the_length_of_an_epoch_and_the_draws(dataset):
    loader = make_loader(dataset, order=Repeated())
    assert loader.steps_per_epoch == 2
    first, second = map(samples_of, loader.epoch(0))
    assert [s["key"] for s in first] == [s["key"] for s in second] == [f"sample-{i:03d}" for i in range(27, 19, -1)]
    assert not any(torch.equal(a["rgb"], b["rgb"]) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a["ids"], b["ids"]) for a, b in zip(first, second, strict=True))
    assert_same(first, samples_of(next(loader.epoch(3))))
    assert_same(second, samples_of(next(make_loader(dataset, order=Repeated()).epoch(5, start_step=1))))
    evaluation = make_loader(dataset, order=Repeated(), training=False, augment=None, batch_size=5)
    assert [len(batch.keys) for batch in evaluation.epoch(0)] == [5, 5, 5, 1]
    with pytest.raises(ValueError, match="an epoch has 16 samples, one global batch 24"):
        make_loader(dataset, world=3, order=Repeated())


@pytest.mark.filterwarnings("ignore:skipping sample")
def test_behind_the_end_of_an_order_comes_its_first_sample(broken):
    """Samples 21 and 20, the last two of the order, are broken."""
    first, second = map(samples_of, make_loader(broken, order=Repeated()).epoch(0))
    assert_same(first[6:], [second[0]] * 2)
    assert_same(second[6:], [first[0]] * 2)


class Bucket(ShardDataset):
    """A dataset that notes what it is asked to fetch, and refuses samples of other shards."""

    def __init__(self, place):
        super().__init__(place)
        self.is_remote, self.asked = True, []

    def prefetch(self, shards):
        self.asked.append(list(shards))

    def __getitem__(self, i):
        assert any(self.shard_of(i) in shards for shards in self.asked), "the shard was not asked for"
        return super().__getitem__(i)


@pytest.mark.parametrize("order", [None, blocks])
@pytest.mark.parametrize("training", [True, False])
def test_the_loader_asks_a_remote_dataset_for_shards_before_it_reads_them(dataset, training, order):
    bucket = Bucket(dataset.folder)
    augment = AugmentConfig() if training else None
    order = order and order(bucket)
    loader = make_loader(bucket, batch_size=4, training=training, augment=augment, order=order)
    assert sum(len(batch.keys) for batch in loader.epoch(0)) == (36 if training else COUNT)
    assert len(bucket.asked) == loader.steps_per_epoch
    assert {shard for shards in bucket.asked for shard in shards} == {0, 1, 2, 3}
