"""What labelling costs: seconds and bytes of each stage, measured by every process of a job.

Each process keeps one file in the folder `costs` of the job, so that its figures outlive it. The report of the
finished job adds them up, and `prismer plan --label` reads the report.
"""

import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prismer.dataloading.experts.labeller import Labeller
from prismer.errors import InputError
from prismer.reading import parse_json
from prismer.storage.output import list_files, read_files, write_file
from prismer.storage.places import inside

COSTS = "costs"
# the stages besides the experts: READ is summed over the threads that read, ALL is the time that passed
READ, DECODE, PACK, WRITE, ALL = "read", "decode", "pack", "write", "all"
# what one process has measured, besides its setting
_SUMS = ("images", "bytes_read", "bytes_written")


class JobCosts:
    """The costs of one process. Several threads may measure at the same time.

    Args:
        place: the dataset folder of the job, or its URL.
        labeller: the experts; what it has labelled before does not count.
        workers: threads that read.
        world: number of processes of the job.
    """

    def __init__(self, place: str | Path, labeller: Labeller, workers: int, world: int):
        self._labeller = labeller
        self._before, self._images_before = Counter(labeller.seconds), labeller.images
        self._seconds: Counter = Counter()
        self._lock = threading.Lock()
        self._place, self._name = place, f"{COSTS}/{uuid.uuid4().hex}.json"
        self.bytes_read = self.bytes_written = 0
        self._mark = time.perf_counter()
        self._setting = {
            "device": _device_name(labeller.device),
            "cores": len(os.sched_getaffinity(0)),
            "processes": world,
            "workers": workers,
            "threads": torch.get_num_threads(),
            "batch_size": labeller.batch_size,
            "label_size": labeller.label_size,
            "networks": {network.info.expert: network.info.name for network in labeller.networks},
        }

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to a stage, also if the block fails."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            with self._lock:
                self._seconds[stage] += spent

    def add_bytes(self, count: int) -> None:
        """Count bytes of the source."""
        with self._lock:
            self.bytes_read += count

    def start(self) -> None:
        """Begin to count the time that passes, which every `save` takes up."""
        self._mark = time.perf_counter()

    def save(self) -> None:
        """Write the figures of this process to its file, if it has labelled any image."""
        now = time.perf_counter()
        self._seconds[ALL] += now - self._mark
        self._mark = now
        images = self._labeller.images - self._images_before
        if not images:
            return
        spent = Counter(self._labeller.seconds)
        spent.subtract(self._before)
        seconds = {READ: self._seconds[READ], DECODE: spent["decoding"]}
        seconds |= {expert: spent[name] for expert, name in self._setting["networks"].items()}
        seconds |= {stage: self._seconds[stage] for stage in (PACK, WRITE, ALL)}
        sums = dict(zip(_SUMS, (images, self.bytes_read, self.bytes_written), strict=True))
        write_file(self._place, self._name, json.dumps({**self._setting, **sums, "seconds": seconds}).encode())


def total_costs(place: str | Path) -> list[dict[str, Any]]:
    """The costs of all processes of a job: one entry for each setting, that of the most images first.

    A damaged file is left out: the costs are no part of the dataset.
    """
    totals: dict[str, dict[str, Any]] = {}
    folder = inside(place, COSTS)
    for name, data in read_files(folder, [name for name in list_files(folder) if name.endswith(".json")]):
        try:
            one = parse_json(data or b"", name)
            seconds = one.pop("seconds")
            sums = {name: one.pop(name) for name in _SUMS}
            total = totals.setdefault(
                json.dumps(one, sort_keys=True), {**one, **dict.fromkeys(_SUMS, 0), "seconds": {}}
            )
            for name in _SUMS:
                total[name] += sums[name]
            for stage, spent in seconds.items():
                total["seconds"][stage] = round(total["seconds"].get(stage, 0.0) + spent, 6)
        except (InputError, KeyError, TypeError, AttributeError):
            continue
    return sorted(totals.values(), key=lambda total: -total["images"])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0]})" if names and names[0] else "CPU"
