"""Check and measure everything that needs a GPU, in one command of under ten minutes.

    python scripts/gpu_check.py --out gpu-check              on one GPU; the folder gets results.jsonl and summary.json
    python scripts/gpu_check.py --report gpu-check           a Markdown page from the results of a run
    python scripts/gpu_check.py --device cpu --quick --out D every stage on stand-ins and tiny shapes, in a minute

It needs torch >= 2.11 with CUDA, Triton >= 3.6, numpy, einops and a checkout of this repository. It uses nvcc, the
other dependencies of the package and compute-sanitizer where they are. Each stage runs in a process of its own, within
its own budget of seconds: a stage that crashes is recorded with its traceback, one that overruns is stopped, and the
next one starts. Results are written after each stage. A run that was stopped continues with what is missing.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.gpu_stages.processes import in_processes  # noqa: E402 (after the path)
from scripts.gpu_stages.report import page, summarise  # noqa: E402 (after the path)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage is told.

    Attributes:
        device: "cuda", or "cpu" for stand-ins.
        quick: tiny shapes and one repeat.
        folder: of the results.
        seconds: that the stage may take.
        workers: processes that a stage may run at a time.
    """

    device: str
    quick: bool
    folder: Path
    seconds: float
    workers: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the check.

    Attributes:
        name: in the results.
        run: takes a `Context` and gives records, dicts that JSON can hold.
        seconds: its budget on a GPU.
        about: one line for --help and the report.
    """

    name: str
    run: Callable[[Context], Iterator[dict]]
    seconds: float
    about: str


def _stage(name: str, place: str, seconds: float, about: str) -> Stage:
    """A stage of scripts/gpu_stages, imported when it runs: this file must not import torch."""
    module, function = place.split(".")

    def run(context: Context) -> Iterator[dict]:
        yield from getattr(importlib.import_module(f"scripts.gpu_stages.{module}"), function)(context)

    return Stage(name=name, run=run, seconds=seconds, about=about)


# the budgets add up to nine and three quarter minutes
STAGES = (
    _stage("machine", "machine.describe", 30, "versions, and the most that a copy and a product reach here"),
    _stage("compile", "machine.compile_all", 120, "every Triton kernel on all cores, the CUDA extension beside it"),
    _stage("ops", "ops.check", 110, "every op against float64: gradients, repeats, a side stream, capture and replay"),
    _stage("model", "models.compare", 40, "the whole model against the definitions"),
    _stage("syncs", "models.forbid_syncs", 20, "no wait for the device in a training step or a beam step"),
    _stage("backends", "timing.compare_backends", 80, "every backend at the shapes of the model, batches 1 to 32"),
    _stage("tune", "tune.measure_choices", 35, "the measured choices, as a table for kernels/tuned/"),
    _stage("tiles", "timing.sweep_tiles", 50, "block shapes of products and attention"),
    _stage("beam", "models.time_beam_step", 20, "a beam step, launched one by one and captured"),
    _stage("jobs", "models.time_jobs", 40, "encoding and training steps of BASE and LARGE against plain PyTorch"),
    _stage("sanitizer", "ops.sanitize", 40, "compute-sanitizer on small calls"),
)


class Results:
    """The records of a run, in results.jsonl. Each save writes the whole file aside and renames it.

    Args:
        folder: is made if it is missing.
        key: of what was run where; records of another key are dropped.
    """

    def __init__(self, folder: Path, key: dict, again: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.records = [] if again else _read(self.path)
        if not self.records or self.records[0].get("key") != key:
            self.records = [dict(stage="run", kind="run", key=key, date=time.strftime("%Y-%m-%d %H:%M:%S"))]

    def done(self, stage: str) -> bool:
        """Has a stage been finished?"""
        return any(r["kind"] == "stage" and r["stage"] == stage and r["status"] == "done" for r in self.records)

    def replace(self, stage: str, records: list[dict]) -> None:
        """Put the records of a stage in the place of older ones, and save."""
        self.records = [r for r in self.records if r["stage"] != stage] + records
        for name, text in (
            (self.path, "".join(json.dumps(record) + "\n" for record in self.records)),
            (self.path.with_name("summary.json"), json.dumps(summarise(self.records), indent=1)),
        ):
            aside = name.with_suffix(".part")
            aside.write_text(text)
            aside.replace(name)


def _read(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        print(f"{path} is damaged: starting again", flush=True)
        return []


def run_key(device: str, quick: bool) -> dict:
    """What makes two runs comparable: the device asked for, the versions and the sources of the kernels."""
    sources = hashlib.sha256()
    for path in sorted(p for folder in ("kernels", "csrc", "prismer") for p in (ROOT / folder).rglob("*.[pch]*")):
        if path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
            sources.update(path.read_bytes())
    versions = {}
    for package in ("torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return dict(device=device, quick=quick, **versions, sources=sources.hexdigest()[:16])


def run_stages(
    stages: Sequence[Stage], *, device: str, quick: bool, folder: Path, again: bool = False, minutes: float = 9.75
) -> int:
    """Run what is missing in `folder`, and save after each stage; returns how many stages did not end well.

    Args:
        stages: in order.
        device, quick, folder: as in `Context`.
        again: start from nothing, whatever the folder holds.
        minutes: the most that all of it takes; a stage gets its budget or what is left.
    """
    results = Results(folder, run_key(device, quick), again)
    end = time.monotonic() + 60 * minutes
    workers = min(len(os.sched_getaffinity(0)), 12)
    bad = 0
    for stage in stages:
        if results.done(stage.name):
            print(f"{stage.name:<10} is done already", flush=True)
            continue
        seconds = min(stage.seconds, end - time.monotonic())
        start, records, status = time.monotonic(), [], dict(status="overran")
        if seconds > 0:
            context = Context(device=device, quick=quick, folder=folder, seconds=seconds, workers=workers)
            for _, kind, value in in_processes({stage.name: lambda s=stage, c=context: s.run(c)}, 1, seconds):
                if kind == "record":
                    records.append(dict(stage=stage.name, **{"kind": "fact", **value}))
                else:
                    status = dict(status=kind, **(dict(traceback=value) if value else {}))
        taken = round(time.monotonic() - start, 2)
        records.append(dict(stage=stage.name, kind="stage", seconds=taken, budget=stage.seconds, **status))
        results.replace(stage.name, records)
        wrong = sum(not record.get("ok", True) for record in records)
        bad += status["status"] != "done" or wrong > 0
        note = f", {wrong} checks failed" if wrong else ""
        print(f"{stage.name:<10} {status['status']} after {taken:.0f} s: {len(records) - 1} records{note}", flush=True)
        if "traceback" in status:
            print("    " + status["traceback"].strip().splitlines()[-1], flush=True)
    return bad


def _parser() -> argparse.ArgumentParser:
    about = "\n".join(f"  {stage.name:<10} {stage.seconds:>4.0f} s  {stage.about}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="python scripts/gpu_check.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=f"stages, with the most seconds that each takes on a GPU:\n{about}",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the results (gpu-check)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: stand-ins, no measurement")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one repeat")
    parser.add_argument("--stages", default="", help="only these, by commas")
    parser.add_argument("--again", action="store_true", help="start again, whatever the folder holds")
    parser.add_argument("--minutes", type=float, default=9.75, help="the most that all stages take (9.75)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="print a Markdown page of the results and exit")
    # what compute-sanitizer runs
    parser.add_argument("--small-calls", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run, or report; returns the exit status: 1 if a stage or a check failed."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.report:
        records = _read(options.report / "results.jsonl")
        if not records:
            parser.error(
                f"{options.report} holds no results.jsonl; run python scripts/gpu_check.py --out {options.report}"
            )
        print(page(records))
        return 0
    wanted = [name for name in options.stages.split(",") if name]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"no stage is called {', '.join(sorted(unknown))}; choose {', '.join(s.name for s in STAGES)}")
    if options.device == "cpu":
        # Triton reads it when a kernel is decorated
        os.environ["TRITON_INTERPRET"] = "1"
    if options.small_calls:
        importlib.import_module("scripts.gpu_stages.ops").run_small_calls(options.device)
        return 0
    # one import for all stages, which are forked: nothing here may touch CUDA
    importlib.import_module("torch")
    stages = [stage for stage in STAGES if not wanted or stage.name in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bad = run_stages(
        stages,
        device=options.device,
        quick=options.quick,
        folder=options.out,
        again=options.again,
        minutes=options.minutes,
    )
    print(f"{options.out / 'results.jsonl'}; python scripts/gpu_check.py --report {options.out} prints the page")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
