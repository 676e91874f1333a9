"""Proves that a mixture draws its datasets in exact proportions, never mixes up their ids, and resumes bit for bit.

python -m pytest tests/data/test_mixture.py
"""

import io
import pickle
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.config import prismer_tiny
from prismer.dataloading.feed.augment import AugmentConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.feed.order import choose_order
from prismer.dataloading.mixture.dataset import MixedDataset, merge_classes
from prismer.dataloading.mixture.order import EvenPattern, MixedOrder
from prismer.dataloading.mixture.parts import join_places, parse_parts, slots_of
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import CorruptSample, Sample, ShardDataset, ShardWriter

CONFIG = prismer_tiny(image_size=32, label_size=16)
SEMANTICS = Semantics.spelling()
COUNTS = {"street": 23, "sea": 9, "room": 14}
CLASSES = {
    "street": {"seg": ["car", "sky", "tree"], "obj_detection": ["car", "dog"], "class": ["city", "village"]},
    # the same names under other ids, and new ones
    "sea": {"seg": ["water", "sky"], "obj_detection": ["ship", "dog", "car"], "class": ["beach", "city"]},
    "room": {"seg": ["car"], "obj_detection": ["chair"]},
}


def make_sample(name: str, i: int) -> Sample:
    """The i-th sample of a dataset; every dataset has the same keys."""
    rng = np.random.default_rng([len(name), i])
    tables = CLASSES[name]
    jpeg = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(jpeg, "JPEG")
    labels = {
        "depth": rng.integers(0, 255, (8, 8), dtype=np.uint8),
        "seg": rng.choice([*range(len(tables["seg"])), 255], (8, 8)).astype(np.uint8),
        "obj_detection": rng.choice([0, 1, 255], (8, 8)).astype(np.uint8),
    }
    meta = {
        "captions": [f"{name} {i} {j}" for j in range(4)],
        "instances": {"0": i % len(tables["obj_detection"]), "1": len(tables["obj_detection"]) - 1},
        "size": [16, 16],
    }
    if "class" in tables:
        meta["class"] = i % 2
    return Sample(f"sample-{i:03d}", jpeg.getvalue(), labels, meta)


def write(folder, name: str, count: int, change=lambda sample: None) -> ShardDataset:
    with ShardWriter(folder / name, classes=CLASSES[name], source=name, samples_per_shard=5) as writer:
        for i in range(count):
            sample = make_sample(name, i)
            change(sample)
            writer.write(sample)
    return ShardDataset(folder / name)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[ShardDataset]:
    folder = tmp_path_factory.mktemp("mixture")
    return [write(folder, name, count) for name, count in COUNTS.items()]


@pytest.fixture
def mixed(parts) -> MixedDataset:
    return MixedDataset(parts, list(COUNTS))


class Sizes:
    """A dataset of which only the number of samples is known."""

    classes: dict = {}

    def __init__(self, count: int, shards: int = 1, is_remote: bool = False):
        self.place, self.is_remote, self.fetched = f"{count} samples", is_remote, []
        ends = [count * s // shards for s in range(shards + 1)]
        self.starts, self.shards = ends, [f"shard-{s:06d}.tar" for s in range(shards)]

    def __len__(self) -> int:
        return self.starts[-1]

    def prefetch(self, shards):
        self.fetched += shards


def mixed_order(sizes: list[int], slots: list[int | None], **options) -> MixedOrder:
    dataset = MixedDataset([Sizes(size, max(1, size // 2)) for size in sizes], [str(k) for k in range(len(sizes))])
    return MixedOrder(dataset, slots, **{"seed": 3, "global_batch": 8, **options})


def visits(order: MixedOrder, epochs: int, batch: int) -> list[tuple[int, int, int]]:
    """(dataset, its sample, visit) of everything that a run reads in its first epochs, an incomplete batch left out."""
    found, begins = [], order.dataset.begins
    for epoch in map(order.epoch, range(epochs)):
        for position in range(len(epoch) // batch * batch):
            index, visit = epoch[position]
            k = sum(begin <= index for begin in begins) - 1
            found.append((k, index - begins[k], visit))
    return found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("data/coco", [("data/coco", None)]),
        # a single dataset is taken as it stands
        ("coco:2014", [("coco:2014", None)]),
        ("a,b:0.2, c/", [("a", None), ("b", "0.2"), ("c/", None)]),
        ("s3://bucket/x:.25,gs://y/z", [("s3://bucket/x", "0.25"), ("gs://y/z", None)]),
        ("https://h:8080/x:0.2,b", [("https://h:8080/x", "0.2"), ("b", None)]),
        ("https://h:8080/x,b", [("https://h:8080/x", None), ("b", None)]),
        ("https://h:8080,b", [("https://h:8080", None), ("b", None)]),
        ("https://h:8080:3,b:1", [("https://h:8080", "3"), ("b", "1")]),
        ("s3://bucket:0.5,b", [("s3://bucket", "0.5"), ("b", None)]),
        ("a:x,b:1e-2,c:", [("a:x", None), ("b:1e-2", None), ("c:", None)]),
    ],
)
def test_a_number_behind_the_last_colon_is_a_weight(data, expected):
    found = [(part.place, part.weight) for part in parse_parts(data)]
    assert found == [(place, weight and Fraction(weight)) for place, weight in expected]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a,,b", "holds an empty place; name a folder between two commas"),
        ("a,:0.2", "holds an empty place"),
        ("a,b,a/", "names a twice; name each dataset once"),
        ("a,b:-0.2", "b has the weight -0.2; give a share above 0"),
        ("a:0,b:1", "a has the weight 0; give a share above 0"),
        ("a,b:0.0009", "b has a share of 0.0009; the smallest is 0.001"),
        ("a:2000,b:1", "b has a share of 0.0004.*; the smallest is 0.001"),
        ("a,b:0.7,c:0.3", "add up to 1, which leaves nothing for a; give less than 1 in all, or give every dataset a"),
    ],
)
def test_wrong_weights_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_parts(data)


def test_a_name_is_as_long_as_it_takes():
    names = [part.name for part in parse_parts("data/coco/,old/coco,vg:0.1,s3://b/cc,coco2")]
    assert names == ["data/coco", "old/coco", "vg", "cc", "coco2"]
    assert [part.name for part in parse_parts("coco,a/coco")] == ["coco", "a/coco"]


def test_a_list_names_the_same_datasets():
    assert join_places(["a", "b:0.2"]) == "a,b:0.2"
    with pytest.raises(ValueError, match="data holds 'a,b', and commas separate datasets"):
        join_places(["a,b", "c"])
    with pytest.raises(ValueError, match="data holds 3; it must be a list of texts"):
        join_places(["a", 3])


@pytest.mark.parametrize(
    ("data", "slots", "rounded"),
    [
        ("a,b", [None, None], False),
        ("a,b:0.2,c", [None, 200, None], False),
        ("a,b:0.33333", [None, 333], True),
        ("a:1,b:1,c:2", [250, 250, 500], False),
        # 333.3 three times: the slot that is left goes to the first
        ("a:1,b:1,c:1", [334, 333, 333], True),
        ("a:0.2,b:0.8", [200, 800], False),
    ],
)
def test_weights_are_whole_thousandths(data, slots, rounded):
    assert slots_of(parse_parts(data)) == (slots, rounded)


@pytest.mark.parametrize("counts", [[1], [5, 5], [1, 999], [7, 1, 3], [200, 2, 498, 300], [1, 1, 1, 1, 1]])
def test_a_pattern_is_evenly_spread(counts):
    """The definition: elements sorted by their places, written down in fractions."""
    places = sorted((Fraction(2 * j + 1, 2 * n), k) for k, n in enumerate(counts) for j in range(n))
    pattern, passed = EvenPattern(counts), [0] * len(counts)
    for slot, (_, kind) in enumerate(places):
        assert pattern.before(slot) == passed and pattern.at(slot) == (kind, passed[kind])
        later = [2 * n + count for n, count in zip(counts, passed, strict=True)]
        assert pattern.before(slot + 2 * sum(counts)) == later
        assert pattern.at(slot + 2 * sum(counts)) == (kind, later[kind])
        passed[kind] += 1
        # at any slot each kind has its share, give or take
        assert all(abs(n - count * (slot + 1) / sum(counts)) <= 1.5 for n, count in zip(passed, counts, strict=True))


@pytest.mark.parametrize(
    ("sizes", "slots"),
    [([450, 90, 700], [None, 203, None]), ([120, 3000, 77], [500, 333, 167]), ([50, 60], [1, 999])],
)
@pytest.mark.parametrize("kind", ["random", "blocks"])
def test_any_thousand_samples_hold_the_weights_exactly(sizes, slots, kind):
    """Across epochs too: a run reads whole batches of 12, and no epoch ends within one."""
    order = mixed_order(sizes, slots, kind=kind, global_batch=12)
    assert len(order) % 12 == 0
    found = [k for k, _, _ in visits(order, 3, 12)]
    assert len(found) == 3 * len(order)
    for k, count in enumerate(slots):
        before = np.cumsum([0, *(kind == k for kind in found)])
        windows = before[1000:] - before[:-1000]
        if count is not None:
            assert (windows == count).all()
        else:
            share = (1000 - sum(filter(None, slots))) * sizes[k] / sum(sizes[n] for n in (0, 2))
            assert abs(windows - share).max() <= 2


def test_without_weights_every_sample_comes_once_in_an_epoch():
    sizes = [700, 31, 269]
    order = mixed_order(sizes, [None] * 3)
    assert len(order) == 1000
    for epoch in (0, 1, 7):
        found = [order.epoch(epoch)[position] for position in range(1000)]
        assert sorted(index for index, _ in found) == list(range(1000))
        assert {visit for _, visit in found} == {epoch}
        # and evenly spread: every hundred samples have their share of each dataset
        kinds = np.searchsorted([700, 731], [index for index, _ in found], side="right")
        for begin in range(901):
            counts = np.bincount(kinds[begin : begin + 100], minlength=3)
            assert abs(counts - np.array(sizes) / 10).max() <= 2
    assert [order.epoch(0)[p] for p in range(9)] != [order.epoch(1)[p] for p in range(9)]


@pytest.mark.parametrize("slots", [[None, 300, None], [400, 300, 300]])
@pytest.mark.parametrize("kind", ["random", "blocks"])
def test_each_dataset_passes_through_its_own_order_again_and_again(slots, kind):
    """A sample comes again only after all others of its dataset; the pass is the key of the draws."""
    sizes = [90, 20, 50]
    order = mixed_order(sizes, slots, kind=kind)
    found = visits(order, 4, 8)
    for k, size in enumerate(sizes):
        own = [(i, visit) for dataset, i, visit in found if dataset == k]
        # three datasets read from the 64 shards of one
        expected = choose_order(Sizes(size, size // 2), seed=3 + k, kind=kind, global_batch=1, shards=21)
        passes = map(expected.epoch, range(len(own) // size + 1))
        assert own == [tuple(one[p]) for one in passes for p in range(size)][: len(own)]
    assert len(set(found)) == len(found)


def test_an_epoch_passes_once_through_the_datasets_without_a_weight():
    order = mixed_order([90, 20, 50], [None, 300, None], global_batch=8)
    # 140 samples are 70 %
    assert len(order) == 200
    counts = Counter((k, i) for k, i, _ in visits(order, 1, 8))
    assert {counts[k, i] for k, size in ((0, 90), (2, 50)) for i in range(size)} == {1}
    assert sum(counts[1, i] for i in range(20)) == 60
    assert (
        order.line() == "an epoch is 200 samples: 0 45.0% (1.00 passes), 1 30.0% (3.00 passes), 2 25.0% (1.00 passes)"
    )


def test_with_all_weights_an_epoch_is_as_long_as_all_datasets():
    assert len(mixed_order([90, 20, 50], [100, 800, 100], global_batch=7)) == 161


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="0 samples holds no samples; leave it out of the mixture"):
        mixed_order([5, 0], [None, None])


def test_the_next_shards_of_every_dataset_are_fetched():
    # each reads from 21 shards at a time
    datasets = [Sizes(200, 100), Sizes(403, 200, is_remote=True), Sizes(100, 50)]
    mixture = MixedDataset(datasets, ["a", "b", "c"])
    assert mixture.is_remote and len(mixture.shards) == 350 and mixture.shards[101] == "b/shard-000001.tar"
    order = MixedOrder(mixture, [None, 800, None], seed=0, kind="blocks", global_batch=20).epoch(0)
    for begin in range(0, len(order), 10):
        read = {mixture.shard_of(order[position].index) for position in range(begin, begin + 10)}
        ahead = order.shards_ahead(range(begin, begin + 10), 128)
        assert read <= set(ahead) and len(set(ahead)) == len(ahead) <= 128
        assert len(order.shards_ahead(range(begin, begin + 10), 5)) == 5
        # one of each dataset comes first
        assert {mixture.shards[shard][0] for shard in ahead[:3]} == {"a", "b", "c"}
    mixture.prefetch([0, 99, 100, 299, 300, 349])
    assert [dataset.fetched for dataset in datasets] == [[0, 99], [0, 199], [0, 49]]


def test_a_mixture_reads_like_one_dataset(parts, mixed):
    assert len(mixed) == 46 and mixed.place == ", ".join(str(part.folder) for part in parts)
    assert mixed.starts == [0, 5, 10, 15, 20, 23, 28, 32, 37, 42, 46]
    for i, (part, own) in enumerate((one, n) for one in parts for n in range(len(one))):
        sample, expected = mixed[i], part[own]
        assert sample.key == expected.key == mixed.key(i) and sample.jpeg == expected.jpeg
        assert mixed[i - len(mixed)].jpeg == expected.jpeg
        name = part.folder.name
        assert mixed.shards[mixed.shard_of(i)] == f"{name}/{part.shards[part.shard_of(own)]}"
        assert mixed.meta(i) == sample.meta
    with pytest.raises(IndexError, match="sample 46 of a mixture of 46"):
        mixed[46]
    assert pickle.loads(pickle.dumps(mixed))[30].meta == mixed[30].meta


def test_ids_are_merged_by_name(parts, mixed):
    assert mixed.classes == {
        "seg": ["car", "sky", "tree", "water"],
        "obj_detection": ["car", "dog", "ship", "chair"],
        "class": ["city", "village", "beach"],
    }
    names = np.array([*mixed.classes["seg"], *[""] * 251, "-"])
    for part, begin in zip(parts, accumulate(COUNTS.values(), initial=0), strict=False):
        own = np.array([*part.classes["seg"], *[""] * (255 - len(part.classes["seg"])), "-"])
        for i in range(len(part)):
            sample, expected = mixed[begin + i], part[i]
            assert (names[sample.labels["seg"]] == own[expected.labels["seg"]]).all()
            assert (sample.labels["obj_detection"] == expected.labels["obj_detection"]).all()
            for number, index in expected.meta["instances"].items():
                name = part.classes["obj_detection"][index]
                assert mixed.classes["obj_detection"][sample.meta["instances"][number]] == name
            if "class" in expected.meta:
                name = part.classes["class"][expected.meta["class"]]
                assert mixed.classes["class"][sample.meta["class"]] == name


def test_a_map_holds_no_more_than_255_merged_classes():
    tables = [{"seg": [f"a{i}" for i in range(200)]}, {"seg": [f"a{i}" for i in range(100, 255)]}]
    assert len(merge_classes(tables, ["x", "y"])["seg"]) == 255
    tables[1]["seg"].append("b")
    with pytest.raises(ValueError, match="the seg classes of x, y are 256 different names, and a uint8 map holds at"):
        merge_classes(tables, ["x", "y"])
    # classes of objects are no pixels
    assert len(merge_classes([{"obj_detection": table["seg"]} for table in tables], ["x", "y"])["obj_detection"]) == 256


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sample: sample.labels["seg"].__setitem__((0, 0), 3), "its seg map has class 3, the class table has 2"),
        (lambda sample: sample.meta["instances"].update({"0": 3}), "object 0 is of class 3, the class table has 3"),
        (lambda sample: sample.meta["instances"].update({"0": True}), "object 0 is of class True; expected an index"),
        (lambda sample: sample.meta.update({"class": 2}), "its class is 2, the class table has 2 names"),
        (lambda sample: sample.meta.update({"class": -1}), "its class is -1; expected a name or an index"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipping sample")
def test_an_id_outside_its_own_table_is_refused(parts, tmp_path, change, reason):
    """The merged table has an entry of this number, of another dataset; the sample is skipped, under its dataset."""
    broken = write(tmp_path, "sea", 3, lambda sample: change(sample) if sample.key == "sample-001" else None)
    mixed = MixedDataset([parts[0], broken], ["street", "sea"])
    with pytest.raises(ValueError, match=reason):
        mixed[24]
    loader = make_loader(mixed, [None, None], batch_size=26)
    (keys,) = [batch.keys for batch in loader.epoch(0)]
    assert len(keys) == 26
    (skipped,) = loader.skipped
    assert (skipped.shard, skipped.key) == ("sea/shard-000000.tar", "sample-001") and reason in skipped.reason


def test_a_class_name_stays(parts, tmp_path):
    named = write(tmp_path, "sea", 2, lambda sample: sample.meta.update({"class": "beach"}))
    assert MixedDataset([parts[0], named], ["street", "sea"])[23].meta["class"] == "beach"


def test_a_damaged_shard_is_named_with_its_dataset(parts, tmp_path):
    broken = write(tmp_path, "sea", 9)
    path = tmp_path / "sea" / broken.shards[1]
    path.write_bytes(path.read_bytes()[:1000])
    mixed = MixedDataset([parts[0], broken], ["street", "sea"])
    with pytest.raises(CorruptSample, match="sample sample-006 of sea/shard-000001.tar cannot be read: the tar ends"):
        mixed[23 + 6]


def choose(meta: dict, rng: np.random.Generator) -> list:
    picked = rng.choice(len(meta["captions"]), 2, replace=False)
    return [([0, 10 + int(j), 2], [0, 10 + int(j), 2], 0.5) for j in picked]


def make_loader(dataset: MixedDataset, slots: list[int | None], kind: str = "auto", **changes) -> Loader:
    """A loader of a mixture; the global batch is 12 unless a test has another."""
    options = dict(batch_size=12, texts=choose, group_size=2, augment=AugmentConfig(), seed=7, drop_labels=0.2)
    options |= changes
    batch = options["batch_size"] * options.get("world", 1)
    order = MixedOrder(dataset, slots, seed=7, kind=kind, global_batch=batch)
    return Loader(dataset, config=CONFIG, semantics=SEMANTICS, order=order, **options)


def tensors_of(batch, b: int) -> dict:
    """All tensors of a sample, with the features of each pixel in place of ids, whose numbers depend on the batch."""
    images = batch.images
    found = {"rgb": images.rgb[b]}
    for expert, planes in images.labels.items():
        rows = images.rows.get(expert)
        found[expert] = planes[b] if rows is None else images.features[rows[b][planes[b].long()]]
    if batch.texts is not None:
        found |= {"ids": batch.texts.ids[b], "labels": batch.texts.labels[b], "weights": batch.texts.weights[b]}
    return found


def samples_of(batches) -> list[dict]:
    return [tensors_of(batch, b) | {"key": key} for batch in batches for b, key in enumerate(batch.keys)]


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [sample["key"] for sample in found] == [sample["key"] for sample in expected]
    for one, other in zip(found, expected, strict=True):
        assert all(name == "key" or torch.equal(one[name], other[name]) for name in one), one["key"]


def global_batches(mixed, slots, kind, world: int, epoch: int, start: int = 0) -> list[dict]:
    """The samples of all ranks from a step of an epoch on, batch after batch."""
    ranks = [
        make_loader(mixed, slots, kind, batch_size=12 // world, rank=rank, world=world).epoch(epoch, start)
        for rank in range(world)
    ]
    return [sample for step in zip(*ranks, strict=True) for sample in samples_of(step)]


@pytest.mark.parametrize("kind", ["random", "blocks"])
@pytest.mark.parametrize("slots", [[None, None, None], [None, 350, None], [200, 300, 500]])
def test_a_mixture_resumes_at_another_number_of_processes(mixed, slots, kind):
    """One, two and three processes see the same batches bit for bit, from any step on."""
    whole = [global_batches(mixed, slots, kind, 1, epoch) for epoch in (0, 1)]
    assert len(whole[0]) == len(whole[1]) >= 36
    assert_same(global_batches(mixed, slots, kind, 2, 0), whole[0])
    assert_same(global_batches(mixed, slots, kind, 3, 0, start=2), whole[0][24:])
    assert_same(global_batches(mixed, slots, kind, 2, 1, start=1), whole[1][12:])
    assert [sample["key"] for sample in whole[0]] != [sample["key"] for sample in whole[1]]


def test_a_sample_means_the_same_in_a_mixture(parts, mixed):
    """Every pixel has the features of its class name, as in the dataset alone."""

    def read(dataset) -> list[dict]:
        return samples_of(
            Loader(dataset, config=CONFIG, semantics=SEMANTICS, batch_size=7, training=False).epoch(0),
        )

    assert_same(read(mixed), [sample for part in parts for sample in read(part)])


def test_a_sample_that_comes_again_has_other_draws(mixed):
    loader = make_loader(mixed, [None, 600, None], drop_labels=0.0)
    found: dict[tuple, list] = {}
    for batch in loader.epoch(0):
        for b, meta in enumerate(batch.meta):
            found.setdefault(tuple(meta["captions"]), []).append(batch.images.rgb[b])
    again = [images for captions, images in found.items() if captions[0].startswith("sea")]
    assert len(again) == COUNTS["sea"]
    assert all(len(images) > 1 and not torch.equal(*images[:2]) for images in again)
