"""`python -m prismer.ablations list|run|report`: the ablations of Prismer's paper; docs/ablations.md explains them."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prismer.cli.streams import discard
from prismer.errors import InputError, MachineError, shown

if TYPE_CHECKING:
    from prismer.ablations.experiment import Experiment, Job

_RESULTS = Path("runs/ablations/results")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        0 on success; 2, with one sentence on stderr, if the user has to change something; 1 if a run failed; 128 +
        signal number if stopped.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # a reader such as `head` has seen enough
        discard(sys.stdout)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (InputError, MachineError) as error:
        print(f"prismer.ablations: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m prismer.ablations", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    listing = commands.add_parser("list", help="findings, and what each variant changes")
    listing.add_argument("names", nargs="*", metavar="NAME", help="findings or variants (default: all)")
    listing.add_argument(
        "--model", default="tiny", metavar="PRESET", help="whose parameters are counted (default tiny)"
    )
    listing.set_defaults(run=_list)

    run = commands.add_parser("run", help="train what is missing; run the command again to go on")
    run.add_argument("names", nargs="+", metavar="NAME", help="findings, variants, or all; with the baseline of each")
    run.add_argument("--seeds", default="0,1,2", metavar="N,N", help="default 0,1,2")
    run.add_argument("--recipe", default="embedded", help="embedded (rendered scenes) or paper (in two stages)")
    run.add_argument("--model", default="tiny", metavar="PRESET", help="whose towers are used (default tiny)")
    run.add_argument("--data", default="data/scenes", metavar="DIR", help="as train.py's (default data/scenes)")
    run.add_argument("--finetune-data", default="", metavar="DIR", help="dataset of fine-tuning (default: --data)")
    run.add_argument("--steps", type=int, default=0, metavar="N", help="of joint training (default 500 for embedded)")
    run.add_argument("--pretrain-steps", type=int, default=0, metavar="N", help="of pre-training (default as --steps)")
    run.add_argument("--finetune-steps", type=int, default=0, metavar="N", help="of fine-tuning (default as --steps)")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every run, as in zero3.json"
    )
    run.add_argument("--config", default="zero3.json", metavar="JSON", help="DeepSpeed JSON (default zero3.json)")
    run.add_argument(
        "--launcher",
        default=f"{shlex.quote(sys.executable)} -m",
        metavar="WORDS",
        help="what starts a Python module, e.g. 'torchrun --nproc_per_node 8 -m' (default: this Python)",
    )
    run.add_argument("--runs", type=Path, default=Path("runs/ablations"), metavar="DIR", help="default runs/ablations")
    run.add_argument("--results", type=Path, metavar="DIR", help="results to keep (default: results/ in --runs)")
    run.add_argument("--dry-run", action="store_true", help="list the runs that are missing, and start none")
    run.set_defaults(run=_run)

    report = commands.add_parser("report", help="tables, plots, and a verdict for each claim")
    report.add_argument("--results", type=Path, default=_RESULTS, metavar="DIR", help=f"default {_RESULTS}")
    report.add_argument("--plots", type=Path, metavar="DIR", help="folder of the plots (default: plots/ in --results)")
    report.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the marks of this page")
    report.set_defaults(run=_report)

    stage = commands.add_parser("stage", help="one run, in a process of its own; `run` starts it")
    stage.add_argument("job", type=Path, metavar="JOB.json")
    stage.add_argument("config", metavar="CONFIG.json")
    # of launchers
    stage.add_argument("--local_rank", help=argparse.SUPPRESS)
    stage.set_defaults(run=_stage)
    return parser


def _list(arguments: argparse.Namespace) -> None:
    from prismer.ablations.catalogue import select
    from prismer.training.initial_model import initial_config

    config = initial_config(arguments.model)
    for finding, variants in select(arguments.names or ["all"]):
        print(f"\n{finding.name}: {finding.text}")
        for claim in finding.claims:
            print(f"  asks whether {claim.text}")
        for variant in variants:
            trains, parameters = _count(variant.name, config)
            print(f"  {variant.name:<26} {trains / 1e6:8.2f} of {parameters / 1e6:8.2f} M train   {variant.change}")


def _count(name: str, config: Any) -> tuple[int, int]:
    """Trainable and all parameters of a variant, in the freeze mode of the stage at which it begins."""
    import torch

    from prismer.ablations.catalogue import FINE_TUNING, find_variant
    from prismer.ablations.networks import variant_class
    from prismer.freezing import freeze

    variant = find_variant(name)
    with torch.device("meta"):
        model = variant_class(variant)(config)
    usual = "freeze_vision" if variant.begins == FINE_TUNING else "freeze_lang_vision"
    return freeze(model, variant.settings.get("freeze", usual))


def _run(arguments: argparse.Namespace) -> int:
    from prismer.ablations.catalogue import select
    from prismer.ablations.experiment import all_jobs
    from prismer.training.initial_model import initial_config

    chosen = select(arguments.names)
    experiment, seeds = _experiment(arguments), _seeds(arguments.seeds)
    results = arguments.results or arguments.runs / "results"
    config = initial_config(experiment.model)
    jobs = all_jobs(experiment, config, chosen, seeds, arguments.runs, results)
    if not arguments.dry_run:
        for job in jobs:
            job.check(arguments.config)
        experiment.store(results)
    missing = list({job.result: job for wanted in jobs for job in wanted.needed()}.values())
    print(f"{len(missing)} runs are missing for {len(jobs)} results in {results}", flush=True)
    if arguments.dry_run:
        print("".join(f"{job.title}\n" for job in missing), end="")
        return 0
    count, failed = 0, set()
    for wanted in jobs:
        # asked again for each: a run may serve several
        for job in wanted.needed():
            if job.result in failed:
                break
            count += 1
            print(f"[{count}/{len(missing)}] {job.title}", flush=True)
            code = _launch(job, arguments.launcher, arguments.config)
            if code >= 128:
                return code
            if code:
                failed.add(job.result)
                log = job.folder.with_name(f"{job.folder.name}.log")
                last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
                print(f"prismer.ablations: {job.title} ended with code {code} ({last}), see {log}", file=sys.stderr)
                # a diverged variant must not stop the others, but a first run that fails shows a wrong setting
                if len(failed) == count:
                    return 1
                break
    return 1 if failed else 0


def _experiment(arguments: argparse.Namespace) -> "Experiment":
    from prismer.ablations.experiment import FINETUNE, JOINT, PRETRAIN, Experiment

    steps = arguments.steps or (500 if arguments.recipe == "embedded" else 0)
    settings = {}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set is {shown(pair)}; give NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            # a word without quotes
            settings[name] = value
    return Experiment(
        recipe=arguments.recipe,
        model=arguments.model,
        data=arguments.data,
        finetune_data=arguments.finetune_data,
        steps={
            JOINT: steps,
            PRETRAIN: arguments.pretrain_steps or steps,
            FINETUNE: arguments.finetune_steps or steps,
        },
        settings=settings,
    )


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise InputError(f"--seeds is {shown(text)}; give whole numbers with commas, such as 0,1,2") from None


def _launch(job: "Job", launcher: str, config: str) -> int:
    """Start a job and wait for it; a signal to this process stops the job, which saves."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    file = job.folder.with_name(f"{job.folder.name}.job.json")
    file.write_text(job.to_json())
    command = [*shlex.split(launcher), "prismer.ablations", "stage", str(file), config]
    with open(job.folder.with_name(f"{job.folder.name}.log"), "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stopped[0] if stopped else code


def _report(arguments: argparse.Namespace) -> None:
    from prismer.ablations.experiment import Experiment
    from prismer.ablations.report import write_report
    from prismer.training.initial_model import initial_config

    experiment = Experiment.load(arguments.results)
    plots = arguments.plots or arguments.results / "plots"
    print(write_report(experiment, initial_config(experiment.model), arguments.results, plots, arguments.page))


def _stage(arguments: argparse.Namespace) -> NoReturn:
    from prismer.ablations.experiment import Job
    from prismer.ablations.stage import run_job

    try:
        code = run_job(Job.from_json(arguments.job.read_text()), arguments.config)
    except (InputError, MachineError) as error:
        print(f"prismer.ablations: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of the process group may abort the interpreter and hide the exit code
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
