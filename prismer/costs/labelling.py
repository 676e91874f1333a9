"""How long a labelling job takes: the costs that a finished job has measured, scaled to other numbers.

A process of a job does three things at the same time: threads read and check images, one thread decodes, and the main
thread runs the networks, packs and writes. The busiest of the three decides its rate. Processes share nothing but the
storage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prismer.dataloading.experts.job import REPORT_FILE
from prismer.dataloading.experts.job_costs import ALL, DECODE, PACK, READ, WRITE
from prismer.errors import InputError, listed
from prismer.experts import EXPERTS
from prismer.reading import read_json

_STAGES = (READ, DECODE, PACK, WRITE, ALL)
_HOW = "label some images (prismer label FOLDER --out DIR) and give DIR/report.json"


@dataclass(frozen=True)
class LabelCosts:
    """What an image costs one process, as a job has measured it.

    Attributes:
        device: name of the device that ran the networks; "CPU (...)" for a CPU.
        images: number of images that were measured.
        processes: number of processes of the job.
        cores: CPU cores that a process could use.
        workers: threads that read.
        networks: expert -> name of its network.
        seconds: stage or expert -> seconds for an image. READ is summed over the threads, ALL is the time that passed.
        bytes_read, bytes_written: bytes for an image.
    """

    device: str
    images: int
    processes: int
    cores: int
    workers: int
    networks: dict[str, str]
    seconds: dict[str, float]
    bytes_read: float
    bytes_written: float

    @property
    def on_cpu(self) -> bool:
        """Whether the networks ran on a CPU."""
        return self.device.startswith("CPU")

    def lanes(self, experts: Sequence[str]) -> dict[str, float]:
        """What a process does at the same time -> seconds for an image, with the networks of some experts."""
        main = sum(self.seconds[name] for name in (*experts, PACK, WRITE))
        return {
            "reading": self.seconds[READ] / self.workers,
            "decoding": self.seconds[DECODE],
            "networks, packing and writing": main,
        }

    @property
    def overhead(self) -> float:
        """The time that passed in the measured job, as a multiple of its busiest lane."""
        return max(1.0, self.seconds[ALL] / max(self.lanes(list(self.networks)).values()))


@dataclass(frozen=True)
class Forecast:
    """A job on a number of devices.

    Attributes:
        devices: number of GPUs, or of processes on a CPU.
        rate: images per second of all together.
        bottleneck: what limits the rate.
    """

    devices: int
    rate: float
    bottleneck: str


def read_costs(path: Path, experts: Sequence[str]) -> LabelCosts:
    """The costs in the report of a finished job; where it ran in several settings, those of the most images.

    Args:
        path: `report.json`, or the folder that holds it.
        experts: the experts whose costs are asked for.

    Raises:
        ValueError: if there is no such report, or it has no costs of one of these experts.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    entries = read_json(file, dict, _HOW).get("costs")
    if not entries:
        raise InputError(f"{file} holds no costs; {_HOW}")
    try:
        found = [_checked(entry) for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"the costs in {file} are damaged ({error!r}); {_HOW}") from None
    costs = next((one for one in found if set(experts) <= set(one.networks)), None)
    if costs is None:
        lacking = [name for name in experts if not any(name in one.networks for one in found)] or experts
        raise InputError(
            f"{file} has no costs of {listed(lacking)}; label some images with --experts {','.join(experts)}"
        )
    return costs


def _checked(entry: dict) -> LabelCosts:
    images, networks = int(entry["images"]), dict(entry["networks"])
    names = (*_STAGES, *networks)
    seconds = {name: float(entry["seconds"][name]) / images for name in names}
    counts = {name: int(entry[name]) for name in ("processes", "cores", "workers")}
    if images < 1 or min(counts.values()) < 1 or not set(networks) <= set(EXPERTS):
        raise InputError("a count below 1, or an unknown expert")
    if not all(math.isfinite(value) and value >= 0 for value in seconds.values()) or not seconds[ALL]:
        raise InputError("seconds that no clock shows")
    sizes = {name: int(entry[name]) / images for name in ("bytes_read", "bytes_written")}
    return LabelCosts(device=str(entry["device"]), images=images, networks=networks, seconds=seconds, **counts, **sizes)


def forecast(costs: LabelCosts, experts: Sequence[str], devices: int, storage: float | None = None) -> Forecast:
    """The rate of a job, and what limits it.

    Args:
        costs: measured costs of a process; every device has one.
        experts: the experts that label.
        devices: number of GPUs, or of processes on a CPU.
        storage: bytes per second that all processes together can read and write; None for no limit.
    """
    lanes = costs.lanes(experts)
    busiest = max(lanes, key=lanes.__getitem__)
    rate = devices / (lanes[busiest] * costs.overhead)
    if storage is not None and rate * (costs.bytes_read + costs.bytes_written) > storage:
        return Forecast(devices, storage / (costs.bytes_read + costs.bytes_written), "storage bandwidth")
    if busiest == "reading":
        return Forecast(devices, rate, "reading the source")
    if busiest == "decoding":
        return Forecast(devices, rate, "decoding on the host" if costs.on_cpu else "decoding on the host and the GPU")
    slowest = max((*experts, PACK, WRITE), key=costs.seconds.__getitem__)
    named = {PACK: "packing the maps", WRITE: "writing the shards"}
    return Forecast(devices, rate, named.get(slowest) or f"{slowest} ({costs.networks[slowest]})")
