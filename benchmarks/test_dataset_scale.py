"""A dataset of 10,000 shards: the loader's speed beside that on one shard, and start-up and memory at 10 M samples.

python -m pytest benchmarks/test_dataset_scale.py --benchmark-only

The shards are hard links to a few tars, with keys and index files of their own: the files are in the page cache, so
that what is measured is the work per sample, not a disk. Speeds are CPU time between two batches in the middle of an
epoch, taken by turns in one process, with one thread in each pool of the loader. Memory and start-up are those of a
process of its own, beyond its imports. It takes some minutes, most of which make the datasets.
"""

import csv
import itertools
import json
import statistics
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from benchmarks.conftest import machine
from benchmarks.loader_corpus import CLASSES, COUNT, write_corpus
from benchmarks.many_shards import copy_shards
from benchmarks.published_loader import LABEL_SIZE
from prismer.config import prismer_base
from prismer.dataloading.feed.augment import AugmentConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.feed.order import choose_order
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset, ShardWriter
from tests.data.noise_shards import write_dataset

SHARDS = 10_000
# of a tar in the dataset whose speed is measured: ten batches, of which three are prepared ahead of the last measured
SAMPLES_PER_TAR = 10 * COUNT
FIRST, LAST = 2, 7
ROUNDS = 7
RESULTS: list[dict] = []


def repeat_corpus(folder: Path, tars: int) -> Path:
    """A dataset of `tars` shards that repeat the images of the loader's benchmark."""
    write_corpus(folder / "corpus", (8,))
    samples = ShardDataset(folder / "corpus/shards-8")
    with ShardWriter(folder / "tars", classes=CLASSES, source="benchmark", samples_per_shard=SAMPLES_PER_TAR) as writer:
        for i in range(tars * SAMPLES_PER_TAR):
            sample = samples[i % COUNT]
            sample.key = f"{i:06d}"
            writer.write(sample)
    return folder / "tars"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """One shard, and 10,000 of the same size."""
    folder = tmp_path_factory.mktemp("rate")
    tars = repeat_corpus(folder, 3)
    one = copy_shards(tars, 1, folder / "one", sidecars=False)
    return one, copy_shards(tars, SHARDS, folder / "many", sidecars=False)


@pytest.fixture(scope="module", autouse=True)
def report(request):
    """Write and print what was measured."""
    yield
    if not RESULTS:
        return
    path = request.config.getoption("--results") / "dataset_scale.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "setting", "value", "low", "high", "unit", *machine()])
        writer.writeheader()
        for result in RESULTS:
            values = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in result.items()}
            writer.writerow({**values, **machine()})
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for result in RESULTS:
            spread = f" [{result['low']:.4g} {result['high']:.4g}]" if "low" in result else ""
            print(f"{result['what']:<48}{result['setting']:<24}{result['value']:10.4g}{spread} {result['unit']}")
        print(f"written: {path}")


def note(what: str, setting: str, values: list[float], unit: str) -> None:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    spread = {"low": low, "high": high} if len(values) > 1 else {}
    RESULTS.append({"what": what, "setting": setting, "value": middle, **spread, "unit": unit})


@pytest.mark.parametrize("image_size", [224, 480])
def test_loader_rate(benchmark, folders, image_size):
    """Speeds depend on the machine and are reported."""
    one, many = map(ShardDataset, folders)
    orders = {
        "one shard": (one, "random"),
        f"{SHARDS} shards, random order": (many, "random"),
        f"{SHARDS} shards, blocks": (many, "blocks"),
    }
    loaders = {
        name: Loader(
            dataset,
            config=prismer_base(image_size=image_size, label_size=LABEL_SIZE),
            batch_size=COUNT,
            semantics=Semantics.spelling(),
            augment=AugmentConfig(min_area=0.5),
            threads=1,
            order=choose_order(dataset, seed=0, kind=kind, global_batch=COUNT),
        )
        for name, (dataset, kind) in orders.items()
    }
    first, *others = loaders
    epochs = itertools.count()
    rates: dict[str, list[float]] = {name: [] for name in loaders}

    def run(*names: str) -> None:
        for name in names:
            with closing(loaders[name].epoch(next(epochs))) as batches:
                for _ in itertools.islice(batches, FIRST):
                    pass
                start = time.process_time()
                count = sum(len(batch.images) for batch in itertools.islice(batches, LAST - FIRST))
                rates[name].append(count / (time.process_time() - start))

    benchmark.pedantic(run, args=others, setup=partial(run, first), rounds=ROUNDS, warmup_rounds=1)
    for name, values in rates.items():
        # the first round built the pipelines
        note(f"loader, {name}", f"{image_size} px", values[1:], "samples/s of a core")
        if name != first:
            ratios = [a / b for a, b in zip(values[1:], rates[first][1:], strict=True)]
            note(f"{name} / {first}", f"{image_size} px", ratios, "x")
            benchmark.extra_info[f"{name} / {first}"] = round(statistics.median(ratios), 3)


# memory of this process alone; what getrusage gives counts that of its parent
MEGABYTES = """
def megabytes(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024

"""
OPEN = """
import json, os, random, sys, time

from prismer.dataloading.store.check import _repeated_keys
from prismer.dataloading.store.shards import ShardDataset

before, found = megabytes("VmRSS"), {}
start = time.perf_counter()
dataset = ShardDataset(sys.argv[1])
found["start-up, s"] = time.perf_counter() - start
found["memory after start-up, MB"] = megabytes("VmRSS") - before
draw = random.Random(0)
start = time.perf_counter()
for _ in range(100_000):
    dataset.key(draw.randrange(len(dataset)))
found["a key at random, us"] = (time.perf_counter() - start) * 10
start = time.perf_counter()
for _ in range(5_000):
    dataset[draw.randrange(len(dataset))]
found["a small sample at random, us"] = (time.perf_counter() - start) * 200
found["memory after both, MB"] = megabytes("VmRSS") - before
found["open files"] = len(os.listdir("/proc/self/fd")) - 1
start = time.perf_counter()
assert dataset.find(dataset.key(len(dataset) - 1)) == len(dataset) - 1
found["the last of all keys found, s"] = time.perf_counter() - start
start = time.perf_counter()
assert _repeated_keys(dataset) == {}
found["all keys compared, s"] = time.perf_counter() - start
found["largest memory of that, MB"] = megabytes("VmHWM") - before
print(json.dumps(found))
"""

CHECK = """
import json, sys

from prismer.dataloading.store.check import check_dataset

before = megabytes("VmRSS")
report = check_dataset(sys.argv[1], progress=False, workers=2)
assert report.ok, report.lines()
print(json.dumps({"largest memory, MB": megabytes("VmHWM") - before}))
"""


def measured(script: str, folder: Path) -> dict[str, float]:
    """The numbers that a script prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEGABYTES + script, folder], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_ten_million_samples(benchmark, tmp_path):
    """Start-up under 2 s and 200 MB, and at most 64 shards open."""
    folder = copy_shards(
        write_dataset(tmp_path / "one", 1000, samples_per_shard=1000), SHARDS, tmp_path / "many", sidecars=False
    )
    found = benchmark.pedantic(measured, args=(OPEN, folder), rounds=1)
    for what, value in found.items():
        name, _, unit = what.partition(", ")
        note(name, "10,000,000 samples", [value], unit)
    note("index.bin", "10,000,000 samples", [(folder / "index.bin").stat().st_size / 2**20], "MB")
    assert found["start-up, s"] < 2
    assert found["memory after both, MB"] < 200
    # the tars, the table and the standard streams
    assert found["open files"] <= 64 + 1 + 3


def test_check_in_flat_memory(benchmark, tmp_path):
    """Ten times as many shards take no more memory, but for their lines in `index.json`."""
    source = write_dataset(tmp_path / "one", 2)
    counts = (SHARDS // 10, SHARDS)
    folders = [copy_shards(source, count, tmp_path / f"{count}", sidecars=True) for count in counts]
    few = measured(CHECK, folders[0])
    many = benchmark.pedantic(measured, args=(CHECK, folders[1]), rounds=1)
    for count, found in zip(counts, (few, many), strict=True):
        for what, value in found.items():
            name, _, unit = what.partition(", ")
            note(f"prismer data check, {name}", f"{count} shards", [value], unit)
    assert many["largest memory, MB"] - few["largest memory, MB"] < 50
