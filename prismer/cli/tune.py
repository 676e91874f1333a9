"""`prismer tune`: measure which implementation of each op is the fastest on this machine, and keep the answer."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.options import add_device_option, pick_device, positive
from prismer.cli.printing import is_watched
from prismer.errors import InputError

if TYPE_CHECKING:
    import torch

    from prismer.kernels.tuning.tables import Table

# rows of the printed table
_MOST_ROWS = 30


def add_tune_command(commands: argparse._SubParsersAction) -> None:
    """Add tune to the commands of `prismer`."""
    tune = commands.add_parser("tune", help="measure which implementation of each op is the fastest on this machine")
    tune.add_argument("--model", default="base", metavar="MODEL", help="model folder or preset (default base)")
    tune.add_argument("--batch", type=positive, default=8, metavar="N", help="images of a training step (default 8)")
    tune.add_argument("--image-size", type=positive, metavar="PX", help="side of the RGB input (default: the model's)")
    tune.add_argument(
        "--seconds", type=positive, default=60, metavar="S", help="time to spend on timing, about (default 60)"
    )
    tune.add_argument("--out", type=Path, metavar="FILE", help="write the table here (default: where it is looked up)")
    tune.add_argument("--compile", action="store_true", help="compile the Triton kernels on all cores first (GPU)")
    add_device_option(tune)
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from prismer.costs.info import model_config
    from prismer.costs.tuned_calls import Progress, measure_calls
    from prismer.files import write_atomically
    from prismer.kernels import tuning
    from prismer.kernels.tuning.tables import machine, user_path

    config = model_config(args.model)
    if args.image_size is not None:
        config = config.replace(image_size=args.image_size)
    device = pick_device(args.device)
    if args.compile:
        _compile_kernels(device)
    before = tuning.table(device.type)
    # a file that was put aside, or one that ships, is not the user's own
    own = before if Path(before.source) == user_path(machine(device.type)) else None
    steps = measure_calls(config, batch=args.batch, device=device, seconds=args.seconds, before=own)
    table = None
    with tqdm(desc="tune", unit="call", disable=not is_watched()) as bar:
        for step in steps:
            if isinstance(step, Progress):
                bar.total = step.total
                bar.set_postfix_str(step.call, refresh=False)
                bar.update(step.done - bar.n)
            else:
                table = step
    assert table is not None
    path = args.out or user_path(table.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, table.to_json().encode())
    print(_report(table))
    print(f"{len(table.entries)} choices of {table.digest} -> {path}", file=sys.stderr)


def _compile_kernels(device: "torch.device") -> None:
    """Compile every Triton kernel for this GPU, one process a core; the calls then find them in Triton's cache."""
    import torch

    from prismer.kernels.aot.cases import all_cases
    from prismer.kernels.aot.compile import compile_cases

    if device.type != "cuda":
        raise InputError("--compile compiles Triton kernels for a GPU, and the device is a CPU; leave it out")
    major, minor = torch.cuda.get_device_capability(device)
    compile_cases(all_cases([]), [10 * major + minor], os.cpu_count() or 1)


def _report(table: "Table") -> str:
    """What the measurement changed, the largest gains first, and what it left as it was."""
    from prismer.costs.tuned_calls import describe

    changed = sorted((e for e in table.entries if e.prior and e.choice != e.prior), key=lambda e: -e.gain)
    rows = [("call", "was", "is", "times as fast")]
    rows += [(describe(e.key), e.prior, e.choice, f"{e.gain:.2f}") for e in changed[:_MOST_ROWS]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(changed) > _MOST_ROWS:
        lines.append(f"and {len(changed) - _MOST_ROWS} more with smaller gains")
    lines.append(f"{len(table.entries) - len(changed)} of {len(table.entries)} calls keep the implementation they had")
    return "\n".join(lines if changed else lines[-1:])
