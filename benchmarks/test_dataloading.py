"""The trainer's loader and its parts against label expansion on the host: samples per second of a core, upload bytes.

python -m pytest benchmarks/test_dataloading.py --benchmark-only

Every contender is a process. All are pinned to the same core, with one thread each for torch, OpenMP and DALI (the
worker of `workers=1` shares the core with its collator), and run in turn, round by round. The measure is the CPU time
of the core, workers included, which other load on the machine does not change. All read the same 32 images of 640 x
480: enlarged renderings with camera noise, as JPEGs of quality 90, with 2, 8 or 20 ids in each label map of that size.
The baseline reads JPEG, PNG, JSON and .pt files, ours a shard imported from them. Files are in the page cache; no texts
are loaded. --full adds more settings.
"""

import csv
import io
import itertools
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.conftest import machine
from benchmarks.loader_corpus import CLASSES, COUNT, HEIGHT, NAMES, WIDTH, write_corpus
from benchmarks.published_loader import HIGH_LEVEL, LABEL_SIZE, LOW_LEVEL, PublishedDataset
from prismer.config import PrismerConfig, prismer_base
from prismer.dataloading.feed.augment import AugmentConfig, draw_params
from prismer.dataloading.feed.image_pipeline import ImagePipeline
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import FeatureTables, Semantics
from prismer.dataloading.store.label_maps import pack_labels
from prismer.dataloading.store.shards import ShardDataset

BATCH = COUNT
# samples of the baseline in a round; its time per sample does not depend on the batch
PUBLISHED_BATCH = 2
ROUNDS = 5
AUGMENT = AugmentConfig(min_area=0.5)
CONTENDERS = ("ours", "workers=0", "workers=1")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement.

    Attributes:
        part: a key of PARTS.
        image_size: side of the image, px.
        labels_per_map: ids in each map.
    """

    part: str
    image_size: int
    labels_per_map: int


SETTINGS = [
    Setting(part="loader", image_size=224, labels_per_map=8),
    Setting(part="loader", image_size=480, labels_per_map=8),
    Setting(part="photo", image_size=480, labels_per_map=8),
    Setting(part="labels", image_size=224, labels_per_map=8),
]
# with --full alone: all of them take minutes on a CPU
ON_REQUEST = [
    Setting(part="loader", image_size=480, labels_per_map=2),
    Setting(part="loader", image_size=480, labels_per_map=20),
    Setting(part="photo", image_size=224, labels_per_map=8),
    Setting(part="labels", image_size=224, labels_per_map=2),
    Setting(part="labels", image_size=224, labels_per_map=20),
    Setting(part="packing", image_size=224, labels_per_map=8),
]
# a worker adds one copy of each batch, whatever is loaded: measured once
WITH_WORKER = Setting(part="loader", image_size=480, labels_per_map=8)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender in one setting: a line of dataloading.csv.

    Attributes:
        part, image_size, labels_per_map: of the Setting; "loader" is the whole loader, the other parts are parts of it.
        contender: one of CONTENDERS.
        samples_per_s: of one core, median of the rounds.
        ratio, low, high: median, first and third quartile of contender / ours in CPU seconds, round by round.
        wall_ms: median wall-clock time per sample, in which other processes may have used the core.
        upload_bytes: per sample, of all tensors of a batch of 32; 0 for the parts.
        encoded_bytes: the same if a GPU decodes, with the JPEG instead of its pixels; 0 for the baseline.
        rounds: that the medians are taken over.
    """

    part: str
    image_size: int
    labels_per_map: int
    contender: str
    samples_per_s: float
    ratio: float
    low: float
    high: float
    wall_ms: float
    upload_bytes: float
    encoded_bytes: float
    rounds: int


RESULTS: list[Result] = []


def published(folder: Path, setting: Setting) -> PublishedDataset:
    """The baseline's samples."""
    semantics = Semantics.spelling()
    return PublishedDataset(
        folder / "images",
        folder / f"labels-{setting.labels_per_map}",
        NAMES,
        seg=torch.from_numpy(semantics.rows(CLASSES["seg"])),
        objects=torch.from_numpy(semantics.rows(CLASSES["obj_detection"])),
        background=torch.from_numpy(semantics.background),
        image_size=setting.image_size,
        augment=True,
        min_area=AUGMENT.min_area,
    )


def config(setting: Setting, **changes: Any) -> PrismerConfig:
    return prismer_base(image_size=setting.image_size, label_size=LABEL_SIZE, **changes)


def ours(folder: Path, setting: Setting) -> Loader:
    """The trainer's loader, one thread in each of its pools."""
    return Loader(
        ShardDataset(folder / f"shards-{setting.labels_per_map}"),
        config=config(setting),
        batch_size=BATCH,
        semantics=Semantics.spelling(),
        augment=AUGMENT,
        threads=1,
    )


def some_of(samples: PublishedDataset) -> Callable[[], int]:
    """A round of the baseline without collation."""
    places = itertools.cycle(range(COUNT))
    return lambda: len([samples[i] for i in itertools.islice(places, PUBLISHED_BATCH)])


def whole_loader(contender: str, folder: Path, setting: Setting) -> Callable[[], int]:
    if contender == "ours":
        loader, epochs = ours(folder, setting), itertools.count()
        return lambda: sum(len(batch.images) for batch in loader.epoch(next(epochs)))
    samples = published(folder, setting)
    loader = DataLoader(
        samples,
        PUBLISHED_BATCH,
        # an epoch is a round, so that no worker runs ahead in the turn of another contender
        sampler=RandomSampler(samples, num_samples=PUBLISHED_BATCH),
        num_workers=int(contender == "workers=1"),
        persistent_workers=contender == "workers=1",
    )
    return lambda: sum(len(batch["rgb"]) for batch in loader)


def photos(contender: str, folder: Path, setting: Setting) -> Callable[[], int]:
    """JPEG -> cropped, flipped, augmented pixels: (B, 3, R, R) uint8 of ours, normalised fp32 of the baseline."""
    if contender != "ours":
        samples = published(folder, setting)
        samples.experts = ()
        return some_of(samples)
    pipeline = ImagePipeline(config(setting, experts=()), batch_size=BATCH, augmented=True, threads=1)
    jpegs = [(folder / f"images/{name}.jpg").read_bytes() for name in NAMES]
    rng = np.random.default_rng(0)

    def run() -> int:
        params = [draw_params(AUGMENT, rng, WIDTH / HEIGHT) for _ in jpegs]
        return len(pipeline(jpegs, [{}] * len(jpegs), params)[0])

    return run


def labels(contender: str, folder: Path, setting: Setting) -> Callable[[], int]:
    """Label files -> label tensors, without augmentation; ours reads the JPEG's bytes too."""
    if contender != "ours":
        samples = published(folder, setting)
        samples.augment = samples.with_rgb = False
        return some_of(samples)
    dataset = ShardDataset(folder / f"shards-{setting.labels_per_map}")
    tables = FeatureTables(config(setting), dataset.classes, Semantics.spelling())

    def run() -> int:
        samples = [dataset[i] for i in range(len(dataset))]
        tables.collate([tables.look_up(sample.labels, sample.meta) for sample in samples])
        maps = {name: np.stack([s.labels[name] for s in samples]) for name in samples[0].labels}
        return len(maps["seg"])

    return run


def packing(contender: str, folder: Path, setting: Setting) -> Callable[[], int]:
    """Label maps -> bytes to store: ours at 224 px, PNGs at the image's size."""
    if contender == "ours":
        dataset = ShardDataset(folder / f"shards-{setting.labels_per_map}")
        planes = [dataset[i].labels for i in range(len(dataset))]
        return lambda: len([pack_labels(maps) for maps in planes])
    experts = (*LOW_LEVEL, *HIGH_LEVEL)
    root = folder / f"labels-{setting.labels_per_map}"
    maps = [[Image.open(root / expert / f"{name}.png").copy() for expert in experts] for name in NAMES]
    places = itertools.cycle(maps)

    def run() -> int:
        for images in itertools.islice(places, PUBLISHED_BATCH):
            for image in images:
                image.save(io.BytesIO(), "PNG")
        return PUBLISHED_BATCH

    return run


PARTS = {"loader": whole_loader, "photo": photos, "labels": labels, "packing": packing}


def core_seconds() -> float:
    """CPU time of this process and its workers."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        # after the name, which may hold blanks: user and system time are fields 14 and 15 of proc(5)
        ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return seconds


def serve(pipe: Connection, contender: str, folder: Path, core: int) -> None:
    """Until told to stop: receive a setting, run a round, send CPU and wall-clock seconds per sample."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    rounds: dict[Setting, Callable[[], int]] = {}
    while (setting := pipe.recv()) is not None:
        if setting not in rounds:
            rounds[setting] = PARTS[setting.part](contender, folder, setting)
        before, start = core_seconds(), time.perf_counter()
        samples = rounds[setting]()
        wall = time.perf_counter() - start
        pipe.send(((core_seconds() - before) / samples, wall / samples))
    # ends the workers at once; at the exit of the interpreter it takes seconds
    rounds.clear()


@contextmanager
def processes(folder: Path) -> Iterator[dict[str, Callable[[Setting], tuple[float, float]]]]:
    """contender -> a function that makes it run one round, see `serve`."""
    context = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0))
    pipes, running = {}, []
    with pytest.MonkeyPatch.context() as patch:
        # inherited by the processes, which read it when they start
        patch.setenv("OMP_NUM_THREADS", "1")
        for contender in CONTENDERS:
            pipes[contender], theirs = context.Pipe()
            running.append(context.Process(target=serve, args=(theirs, contender, folder, core)))
            running[-1].start()
            # a process that fails then closes the last end, and `recv` raises
            theirs.close()

    def turn(contender: str, setting: Setting) -> tuple[float, float]:
        pipes[contender].send(setting)
        return pipes[contender].recv()

    try:
        yield {contender: partial(turn, contender) for contender in CONTENDERS}
    finally:
        for pipe, process in zip(pipes.values(), running, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join()


def nbytes(value: object) -> int:
    """Bytes of all tensors in nested dicts and dataclasses."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        value = vars(value)
    return sum(map(nbytes, value.values())) if isinstance(value, dict) else 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, request) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("corpus")
    full = request.config.getoption("--full")
    return folder, write_corpus(folder, (2, 8, 20) if full else (8,))


@pytest.fixture(scope="module")
def contenders(corpus):
    with processes(corpus[0]) as turns:
        yield turns


@pytest.fixture(scope="module", autouse=True)
def report(request, corpus):
    """Write and print the table after the last measurement."""
    yield
    if not RESULTS:
        return
    path = request.config.getoption("--results") / "dataloading.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)] + list(machine()))
        writer.writeheader()
        for result in RESULTS:
            values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(result).items()}
            writer.writerow({**values, **machine()})
    aside.replace(path)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nmean bytes of a file:", ", ".join(f"{name} {n}" for name, n in corpus[1].items()))
        for r in RESULTS:
            print(
                f"{r.part:<8} {r.image_size} px {r.labels_per_map:>2} ids  {r.contender:<10}"
                f"{r.samples_per_s:8.1f} samples/s  {r.ratio:6.1f} [{r.low:.1f} {r.high:.1f}] x ours"
                f"{r.upload_bytes:12.0f} B  {r.encoded_bytes:8.0f} B where a GPU decodes"
            )
        print(f"written: {path}")


@pytest.mark.parametrize(
    "setting", SETTINGS + ON_REQUEST, ids=lambda s: f"{s.part}-{s.image_size}px-{s.labels_per_map}ids"
)
def test_dataloading(benchmark, contenders, corpus, request, setting):
    """Upload bytes are exact and asserted; speeds depend on the machine and are reported."""
    if setting in ON_REQUEST and not request.config.getoption("--full"):
        pytest.skip("left out to keep the run short; --full includes it")
    names = [n for n in CONTENDERS if n != "workers=1" or setting == WITH_WORKER]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def run(*wanted: str) -> None:
        for name in wanted:
            times[name].append(contenders[name](setting))

    benchmark.pedantic(run, args=("ours",), setup=partial(run, *names[1:]), rounds=ROUNDS, warmup_rounds=1)
    sizes = dict.fromkeys(names, (0.0, 0.0))
    if setting.part == "loader":
        theirs, *own = upload_bytes(corpus[0], setting)
        sizes = {name: tuple(own) if name == "ours" else (theirs, 0.0) for name in names}
    for name in names:
        # the first round built the pipelines
        seconds, wall = zip(*times[name][1:], strict=True)
        ratios = [a / b for a, (b, _) in zip(seconds, times["ours"][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        RESULTS.append(
            Result(
                **asdict(setting),
                contender=name,
                samples_per_s=1 / statistics.median(seconds),
                ratio=middle,
                low=low,
                high=high,
                wall_ms=1e3 * statistics.median(wall),
                upload_bytes=sizes[name][0],
                encoded_bytes=sizes[name][1],
                rounds=ROUNDS,
            )
        )
        benchmark.extra_info[f"{name} / ours"] = round(middle, 2)


def upload_bytes(folder: Path, setting: Setting) -> tuple[float, float, float]:
    """Bytes per sample of the baseline's tensors, of our batch, and of ours with JPEGs for a GPU to decode."""
    R, L = setting.image_size, LABEL_SIZE
    theirs = nbytes(published(folder, setting)[0])
    assert theirs == 4 * (3 * R * R + (1 + 3 + 1 + 3 * 64) * L * L) + 8 * L * L
    loader = ours(folder, setting)
    images = next(loader.epoch(0)).images
    tables = (nbytes(images.rows) + nbytes(images.features)) / BATCH
    assert nbytes(images.labels) == BATCH * 8 * L * L and nbytes(images.rows) == BATCH * 3 * 256 * 8
    tensors = nbytes(images) / BATCH
    assert tensors == 3 * R * R + 8 * L * L + tables
    samples = [loader.dataset[i] for i in range(BATCH)]
    files = sum(len(s.jpeg) + sum(map_.nbytes for map_ in s.labels.values()) for s in samples)
    encoded = files / BATCH + tables
    # the labels shrink to 1/96 at any size; uint8 saves 3 of 4 bytes of the image
    assert 50 * (tensors - 3 * R * R) <= theirs - 4 * 3 * R * R
    assert 50 * (tensors if R == 224 else encoded) <= theirs
    return theirs, tensors, encoded
