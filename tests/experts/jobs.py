"""Labelling jobs in their own processes, for tests that kill and measure them.

The processes are forked from a server that has all modules imported, so that they start within milliseconds.
"""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from prismer.dataloading.experts.job import label_records
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.sources.image_folders import folder_records
from tests.experts.stand_ins import Brightness, Halves

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.experts.jobs", "nvidia.dali.fn", "nvidia.dali.auto_aug.augmentations"])


def write_photos(folder: Path, count: int, side: int = 40, seed: int = 0) -> Path:
    """Write JPEGs of random colours and proportions: photo-00000.jpg and so on."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = rng.integers(side // 2, side, 2)
        pixels = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"photo-{i:05d}.jpg", quality=90)
    return folder


class Slow(Brightness):
    """Brightness with a delay, so that a kill happens while it runs."""

    def predict(self, images, earlier):
        time.sleep(0.004)
        return super().predict(images, earlier)


def run_job(photos: Path, out: Path, rank: int = 0, world: int = 1, per_shard: int = 8, started=None):
    """Run one labelling job with two stand-in networks."""
    labeller = Labeller([Slow(), Halves()], label_size=32, batch_size=4, threads=1)
    if started is not None:
        started.set()
    return label_records(
        folder_records(photos),
        out,
        labeller,
        source="photos",
        samples_per_shard=per_shard,
        rank=rank,
        world=world,
        workers=2,
        progress=False,
    )


def run_watched(photos: Path, out: Path, sizes) -> None:
    """Run a job that puts (images labelled, resident bytes) into the queue `sizes`."""
    labeller = Labeller([Brightness(), Halves()], label_size=32, batch_size=16, threads=1)
    done = threading.Event()

    def watch():
        page = os.sysconf("SC_PAGE_SIZE")
        while not done.wait(0.05):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            sizes.put((labeller.images, resident))
        sizes.put(None)

    watcher = threading.Thread(target=watch)
    watcher.start()
    label_records(
        folder_records(photos), out, labeller, source="photos", samples_per_shard=500, workers=2, progress=False
    )
    done.set()
    watcher.join()


class Gate(Brightness):
    """Brightness that waits at one of its batches.

    Args:
        batch: the number of the batch, from 1.
        reached: an event, set when the batch has come.
        opened: the event to wait for.
    """

    def __init__(self, batch: int, reached, opened):
        self.left, self.reached, self.opened = batch, reached, opened

    def predict(self, images, earlier):
        self.left -= 1
        if not self.left:
            self.reached.set()
            self.opened.wait(60)
        return super().predict(images, earlier)


def run_gated(photos: Path, out: Path, rank: int, world: int, gate: tuple, reports) -> None:
    """Run one process of a job, one batch a shard, that waits at a `Gate`; put its report into the queue `reports`."""
    labeller = Labeller([Gate(*gate), Halves()], label_size=32, batch_size=4, threads=1)
    reports.put(
        label_records(
            folder_records(photos),
            out,
            labeller,
            source="photos",
            samples_per_shard=4,
            rank=rank,
            world=world,
            workers=2,
            progress=False,
        )
    )


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of each file of a dataset folder, less the costs in its report, which are measured."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if "report.json" in files:
        report = json.loads(files["report.json"])
        report.pop("costs", None)
        files["report.json"] = json.dumps(report).encode()
    return files
