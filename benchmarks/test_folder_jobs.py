"""A folder of images captioned by a job, against the bare model: pytest benchmarks/test_folder_jobs.py --benchmark-only

The bare model reads the same images in the same batches, decoded in memory before the clock starts. The job, `ask_all`
on a folder of JPEGs in the page cache, also reads, decodes and writes. Both run in turn in one process, with all cores.
The report is the seconds of the bare model / the seconds of the job, round by round, for the shipped tiny model. Its
images take a few milliseconds each, so reading and decoding weigh as much as they ever can.
"""

import io
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness import DEVICE, synchronize
from prismer.asking.items import image_items
from prismer.asking.job import BATCH_SIZES, ask_all
from prismer.dataloading.feed.image_batch import image_batch
from prismer.dataloading.scenes.dataset import render_scene
from prismer.model import Prismer

COUNT, ROUNDS = 512, 5
# the default of the job
BATCH = BATCH_SIZES[DEVICE.type]
# every so many images one is broken, as in folders from the web
BROKEN_EVERY = 25


def write_images(folder: Path, width: int, height: int, broken: bool) -> list[Path]:
    """Enlarged renderings with camera noise, as JPEGs of quality 90; returns the whole ones."""
    folder.mkdir()
    whole, rng = [], np.random.default_rng(0)
    scenes = [Image.fromarray(render_scene(seed, 128, 32).rgb).resize((width, height), 3) for seed in range(16)]
    for i in range(COUNT):
        noise = rng.integers(-8, 9, (height, width, 3))
        pixels = np.clip(np.asarray(scenes[i % 16]).astype(int) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        path, data = folder / f"{i:05}.jpg", file.getvalue()
        is_broken = broken and i % BROKEN_EVERY == 0
        path.write_bytes(data[: len(data) // 2] if is_broken else data)
        whole += [] if is_broken else [path]
    return whole


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "some-broken"])
@pytest.mark.parametrize("side", [(128, 128), (640, 480)], ids=["128", "640x480"])
def test_folder_job(benchmark, tmp_path, side, broken):
    model = Prismer.from_pretrained("tiny", device=DEVICE, dtype="auto")
    whole = write_images(tmp_path / "images", *side, broken)
    batches = [image_batch(whole[i : i + BATCH], model.config) for i in range(0, len(whole), BATCH)]
    bare: list[float] = []

    def ask_bare() -> list[str]:
        captions = [text for batch in batches for text in model.caption(batch)]
        synchronize()
        return captions

    def setup() -> None:
        for path in tmp_path.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        begin = time.perf_counter()
        captions.append(ask_bare())
        bare.append(time.perf_counter() - begin)

    def ask_folder() -> None:
        items = image_items([tmp_path / "images"])
        report = ask_all(model, items, tmp_path / "out", "caption", progress=False)
        assert report.lines == COUNT and report.skipped == COUNT - len(whole)

    captions: list[list[str]] = []
    benchmark.pedantic(ask_folder, setup=setup, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    # the first of each was the warm-up
    ratios = [a / b for a, b in zip(bare[1:], benchmark.stats.stats.data, strict=True)]
    speed = COUNT / statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info.update(speed_of_bare=[round(ratio, 3) for ratio in ratios], images_per_s=round(speed, 1))
    print(f"\n{side[0]} x {side[1]}: {statistics.median(ratios):.3f} of the bare model's speed, {speed:.0f} images/s")
