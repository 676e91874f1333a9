"""`prismer plan --label`: the hours of a labelling job on so many GPUs, from the costs that a job has measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.errors import InputError, check_count, listed
from prismer.experts import EXPERTS, PAPER_EXPERTS

if TYPE_CHECKING:
    from prismer.costs.labelling import LabelCosts


def add_label_options(plan: argparse.ArgumentParser) -> None:
    """Add the options of `prismer plan --label`."""
    group = plan.add_argument_group("a labelling job")
    group.add_argument(
        "--label",
        metavar="MODEL|EXPERT,...",
        help="plan a labelling job: the experts that a model reads, such as base, or names of experts",
    )
    group.add_argument(
        "--seconds-per-image",
        type=Path,
        metavar="FILE",
        help="report.json of a finished labelling job, which holds what it has measured",
    )
    group.add_argument("--images", type=_number, default=10_000_000, metavar="N", help="images to label (default 10e6)")
    group.add_argument(
        "--storage",
        type=float,
        metavar="GB/S",
        help="what the storage reads and writes in a second for all processes together (default: no limit)",
    )


def _number(text: str) -> int:
    """A whole number, such as 10000000 or 10e6, as the `type` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(value)


def plan_labelling(args: argparse.Namespace, gpus: Sequence[int]) -> None:
    """Print the costs of an image and the hours of the job.

    Args:
        args: the options of `prismer plan`.
        gpus: the numbers of GPUs to plan for.

    Raises:
        ValueError: if a number is out of range, an expert is unknown, or there are no measured costs.
    """
    for number in gpus:
        check_count("--gpus", number)
    if args.storage is not None and not args.storage > 0:
        raise InputError(f"--storage is {args.storage}; it must be above 0")
    experts = _experts(args.label)
    if args.seconds_per_image is None:
        raise InputError(
            "no costs were given; label about a thousand images on the machine in question (prismer label FOLDER --out "
            "DIR) and name what the job measured with --seconds-per-image DIR/report.json"
        )
    from prismer.costs.labelling import read_costs

    costs = read_costs(args.seconds_per_image, experts)
    storage = None if args.storage is None else args.storage * 1e9
    print("\n".join(_costs(costs, experts)))
    print("\n".join(_hours(costs, experts, args.images, gpus, storage)))


def _experts(asked: str) -> list[str]:
    """The experts that a model reads, or those of a list."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if asked == "all":
        return list(PAPER_EXPERTS)
    if names and set(names) <= set(EXPERTS):
        return [name for name in EXPERTS if name in names]
    if len(names) != 1:
        unknown = [name for name in names if name not in EXPERTS]
        raise InputError(
            f"--label names {listed(unknown) or 'nothing'}; give a model, or choose from {', '.join(EXPERTS)}"
        )
    from prismer.costs.info import model_config

    experts = model_config(names[0]).label_experts
    if not experts:
        raise InputError(f"{names[0]} reads no experts; there is nothing to label")
    return list(experts)


def _costs(costs: "LabelCosts", experts: list[str]) -> list[str]:
    """What an image costs one process."""
    from prismer.costs.labelling import DECODE, PACK, READ, WRITE

    rows = [(f"reading ({costs.workers} threads)", costs.seconds[READ] / costs.workers)]
    rows += [("decoding", costs.seconds[DECODE])]
    rows += [(f"{name} ({costs.networks[name]})", costs.seconds[name]) for name in experts]
    rows += [("packing", costs.seconds[PACK]), ("writing", costs.seconds[WRITE])]
    width = max(len(name) for name, _ in rows)
    lanes = costs.lanes(experts)
    busiest = max(lanes, key=lanes.__getitem__)
    lines = [
        f"measured on {costs.device}: {costs.images:,} images, {costs.processes} processes, {costs.cores} CPU cores",
        "",
        f"{'an image in one process':<{width}}{'ms':>11}{'images/s':>11}",
    ]
    for name, seconds in rows:
        speed = f"{1 / seconds:11,.4g}" if seconds else f"{'-':>11}"
        lines.append(f"{name:<{width}}{seconds * 1e3:11,.4g}{speed}")
    return [
        *lines,
        "",
        "Reading, decoding, and the rest run at the same time.",
        f"Busiest: {busiest}, {lanes[busiest] * 1e3:,.4g} ms an image.",
        f"The measured job took {costs.overhead:.3g} times as long as its busiest part; the hours include this factor.",
        f"An image is {costs.bytes_read / 1e3:,.4g} kB to read and {costs.bytes_written / 1e3:,.4g} kB to write.",
        "",
    ]


def _hours(
    costs: "LabelCosts", experts: list[str], images: int, gpus: Sequence[int], storage: float | None
) -> list[str]:
    """The hours of the job on each number of devices."""
    from prismer.costs.labelling import forecast

    what = "processes" if costs.on_cpu else "GPUs"
    lines = [
        f"{images:,} images",
        f"{what:<9}{'images/s':>10}{'hours':>10}{'read GB/s':>11}{'write GB/s':>12}  bottleneck",
    ]
    for number in gpus:
        one = forecast(costs, experts, number, storage)
        read, written = (one.rate * size / 1e9 for size in (costs.bytes_read, costs.bytes_written))
        hours = images / one.rate / 3600
        lines.append(f"{number:<9}{one.rate:10,.4g}{hours:10,.4g}{read:11,.3g}{written:12,.3g}  {one.bottleneck}")
    if costs.on_cpu:
        lines += ["", "The costs are those of a CPU: they say nothing about a GPU. A process needs the measured cores."]
    elif storage is None:
        lines += ["", "No limit of the storage was given: compare its bandwidth with the columns read and write."]
    return lines
