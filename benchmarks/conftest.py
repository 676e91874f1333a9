"""Reports a benchmark session: a table on the terminal, and a CSV and a plot in benchmarks/results/."""

import csv
import dataclasses
import os
import platform
import time
from pathlib import Path

import pytest
import torch

from benchmarks import whole_jobs
from benchmarks.harness import DEVICE, MEASUREMENTS, OURS, PEERS, Contender, Measurement

RESULTS = Path(__file__).with_name("results")
STARTED = time.monotonic()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=RESULTS, help="folder for the CSV and the plot")
    parser.addoption("--full", action="store_true", help="every shape and dtype with every contender: hours")
    parser.addoption("--dtype", choices=DTYPES, help="of whole jobs; default: fp32 on a CPU, bf16 on a GPU")
    minutes = 10.0 if DEVICE.type == "cuda" else float("inf")
    parser.addoption("--minutes", type=float, default=minutes, help="then no benchmark starts (10 on a GPU)")


def pytest_configure(config):
    if config.getoption("--dtype"):
        whole_jobs.DTYPE = DTYPES[config.getoption("--dtype")]


def pytest_runtest_setup(item):
    if time.monotonic() - STARTED > 60 * item.config.getoption("--minutes") and not item.config.getoption("--full"):
        pytest.skip("the time of --minutes is spent")


@pytest.fixture
def full(request) -> bool:
    """Whether --full is given: then everything is timed."""
    return request.config.getoption("--full")


@pytest.fixture
def everything(full) -> bool:
    """Whether to time every shape: on a GPU always, on a CPU with --full, since it takes half an hour there."""
    return DEVICE.type == "cuda" or full


@pytest.fixture
def compiled(full):
    """Add eager under torch.compile to the contenders, without --full at a representative shape alone.

    A compilation takes longer than all that a GPU then has to time.
    """

    def add(calls: dict[str, Contender], representative: bool) -> dict[str, Contender]:
        if full or representative:
            eager = calls["eager"]
            torch.compiler.reset()
            calls["compile"] = Contender(run=torch.compile(eager.run), inputs=eager.inputs)
        return calls

    return add


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def dtype(request, full) -> torch.dtype:
    skip_slow_dtype(request.param, full)
    return request.param


def skip_slow_dtype(dtype: torch.dtype, full: bool) -> None:
    """Skip fp32 on a GPU without --full: nobody trains or asks a model in fp32 there."""
    if DEVICE.type == "cuda" and dtype == torch.float32 and not full:
        pytest.skip("on a GPU bf16, to keep the run under ten minutes: --full has fp32")


@pytest.fixture(params=("forward", "forward+backward"))
def part(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)


def machine() -> dict[str, str]:
    """The device, the date and the version of torch: the conditions of the measurements."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
        flags = [f for f in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f in cpuinfo.split()]
        cores = len(os.sched_getaffinity(0))
        name = f"{names[0] if names else platform.machine()}, {cores} cores, {' '.join(flags)}"
    return dict(device=name, date=time.strftime("%Y-%m-%d"), torch=torch.__version__)


def pytest_terminal_summary(terminalreporter, config):
    if not MEASUREMENTS:
        return
    folder = config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if DEVICE.type == "cuda" else "cpu"
    write_csv(MEASUREMENTS, folder / f"{kind}.csv")
    plot(MEASUREMENTS, folder / f"{kind}.png")
    terminalreporter.section(
        "contender / ours: median [quartiles], time of ours, peak memory of ours against eager or the baseline"
    )
    for line in table(MEASUREMENTS):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"written: {folder / kind}.csv and .png")


def write_csv(rows: list[Measurement], path: Path) -> None:
    """Write to a temporary file and rename it, so that an interrupted run leaves the old results."""
    aside = path.with_suffix(".part")
    with aside.open("w", newline="") as file:
        columns = [f.name for f in dataclasses.fields(Measurement)] + list(machine())
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}
            writer.writerow({**values, **machine()})
    aside.replace(path)


def groups(rows: list[Measurement]) -> dict[tuple, dict[str, Measurement]]:
    """(room, shape, dtype, part) -> the measurements of this comparison by name of the contender."""
    found: dict[tuple, dict[str, Measurement]] = {}
    for row in rows:
        found.setdefault((row.room, row.shape, row.dtype, row.part), {})[row.contender] = row
    return found


def table(rows: list[Measurement]) -> list[str]:
    """One line for each comparison; whole jobs have a second line with counts."""
    lines = []
    for (room, shape, dtype, part), by_name in groups(rows).items():
        ours = by_name[OURS]
        ratios = "  ".join(
            f"{name} {row.ratio:.2f} [{row.low:.2f} {row.high:.2f}]" for name, row in by_name.items() if name != OURS
        )
        peer = next(by_name[name] for name in PEERS if name in by_name)
        memory = f"{ours.peak_mb:.1f} / {peer.peak_mb:.1f} MB"
        lines.append(f"{room:<20} {shape:<26} {dtype:<9} {part:<17} {ours.milliseconds:8.3f} ms  {memory:<20} {ratios}")
        if ours.ops:
            counts = "; ".join(
                f"{name} {row.flops / 1e9:.1f} GF, {row.tflop_per_s * 1e3:.1f} GF/s, {row.ops} operators, "
                f"{row.matrix_share:.0%} in products"
                for name, row in by_name.items()
            )
            lines.append(f"{'':<20} {counts}")
    return lines


def plot(rows: list[Measurement], path: Path) -> None:
    """Draw a bar for each comparison: how many times faster than its peer, with quartiles, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(key, by_name[p]) for key, by_name in groups(rows).items() for p in PEERS if p in by_name]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.19 * len(found)), layout="constrained")
    colours = {"float32": "#4477aa", "bfloat16": "#ee6677"}
    for y, ((_, _, dtype, part), row) in enumerate(found):
        spread = [[max(row.ratio - row.low, 0)], [max(row.high - row.ratio, 0)]]
        axes.barh(
            y,
            row.ratio - 1,
            left=1,
            xerr=spread,
            height=0.75,
            color=colours.get(dtype, "grey"),
            alpha=0.6 if part in ("forward+backward", "step") else 1.0,
            error_kw=dict(lw=0.8),
        )
    axes.set_yticks(range(len(found)), [" ".join((k[0], k[1], k[3])) for k, _ in found], fontsize=6)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("times faster than eager PyTorch, whole jobs than the baseline (median and quartiles of rounds)")
    marks = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
    axes.legend(marks, colours, loc="lower right", fontsize=7)
    note = machine()
    axes.set_title(f"{note['device']}; torch {note['torch']}; {note['date']}", fontsize=8)
    aside = path.with_suffix(".part")
    figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)
    aside.replace(path)
