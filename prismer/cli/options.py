"""Options of several commands, each declared once, and what their values open: a device, a model, expert networks."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.errors import InputError

if TYPE_CHECKING:
    import torch

    from prismer.dataloading.experts.labeller import Labeller
    from prismer.dataloading.semantics.features import Semantics
    from prismer.model import Prismer


def positive(text: str) -> int:
    """A whole number of at least 1, as the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_device_option(command: argparse.ArgumentParser) -> None:
    """Add --device, which `pick_device` reads."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def pick_device(name: str) -> "torch.device":
    """The torch device called `name`; "auto" is the GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and index) or not (index or "0").isdecimal():
        raise InputError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {name}: torch sees {torch.cuda.device_count()} GPUs; choose auto or cpu")
    return torch.device(name)


def add_semantics_option(command: argparse.ArgumentParser) -> None:
    """Add --semantics, which `load_model` reads."""
    command.add_argument(
        "--semantics",
        type=Path,
        metavar="FILE|FOLDER",
        help="table of features of class names and words (default: the model's or the run's own)",
    )


def load_model(
    source: str, device_name: str, *, precision: str = "auto", int8: bool = False, semantics: Path | None = None
) -> "tuple[Prismer, Semantics | None]":
    """Load a model for inference, and the features of the names in label maps.

    Args:
        source: what `Prismer.from_pretrained` takes.
        device_name: see `pick_device`.
        precision: "bf16", "fp32" or "auto", the faster of the two.
        int8: whether the frozen towers multiply in int8 (`prismer.quantise`).
        semantics: the folder of a table of features, or a file in it; None takes the table of the model's folder.

    Returns:
        Prismer in evaluation mode; and its Semantics, or None if the config names a table and there is none.

    Raises:
        ValueError: if there is no such device, the model cannot be loaded, is new, or reads no table, or a GPU is
            asked for int8.
    """
    import torch

    from prismer.dataloading.semantics.features import Semantics
    from prismer.kernels import tuning
    from prismer.model import Prismer
    from prismer.quantise import check_device, quantise
    from prismer.weights.backbones import is_preset
    from prismer.weights.folder import stored_semantics

    device = pick_device(device_name)
    if is_preset(source):
        raise InputError(
            f"{source} is a preset without trained weights; train it with train.py --model {source}, or take a model "
            f"of `prismer models list`"
        )
    if advice := tuning.advice(device.type):
        print(f"prismer: {advice}", file=sys.stderr)
    if int8:
        check_device(device)
    dtype = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = Prismer.from_pretrained(source, device=device, dtype=dtype)
    if int8:
        quantise(model)
    if semantics is None:
        return model, stored_semantics(model.config, model.folder)
    if model.config.semantics == "spelling":
        raise InputError(f"the model {source} spells class names and words and reads no table; leave --semantics out")
    return model, Semantics.from_table(table_folder(semantics))


def table_folder(given: Path | None) -> Path | None:
    """The folder of the table that --semantics names by the folder or by a file in it."""
    return given if given is None or given.is_dir() else given.parent


def add_experts_option(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add --experts, which `load_labeller` reads."""
    command.add_argument(
        "--experts",
        default=default,
        metavar="all|EXPERT[=NETWORK[@SOURCE]],...",
        help="expert networks that label the images, e.g. all, depth,seg or depth=dpt-hybrid@FOLDER; "
        "see `prismer experts list`",
    )


def load_labeller(asked: str, device_name: str, **options) -> "Labeller":
    """Load the expert networks that the value of --experts names; `options` are those of `Labeller.load`."""
    from prismer.dataloading.experts.labeller import Labeller

    names = [item.strip() for item in asked.split(",") if item.strip()]
    return Labeller.load(names, pick_device(device_name), **options)


def rank_and_world() -> tuple[int, int]:
    """Rank and number of processes, as torchrun and deepspeed set them in the environment."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise InputError(
            f"RANK is {os.environ.get('RANK')!r}, WORLD_SIZE {os.environ.get('WORLD_SIZE')!r}; both must be numbers"
        ) from None
    return rank, world


def processes_of_this_machine(rank: int, world: int) -> range:
    """The ranks on the machine of this one, as torchrun, deepspeed and Slurm number them: one machine after the other.

    Without the number of processes on a machine, it is this one alone.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    texts = [os.environ[name] for name in names if name in os.environ]
    local = os.environ.get("LOCAL_RANK", "0")
    if world == 1 or not texts or not (texts[0] + local).isdecimal():
        return range(rank, rank + 1)
    first = rank - int(local)
    return range(max(first, 0), min(first + int(texts[0]), world))


def device_of_process(name: str, world: int) -> str:
    """The value of --device for one of `world` processes: for "auto", each on a machine takes a GPU of its own."""
    if name != "auto" or world == 1:
        return name
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
