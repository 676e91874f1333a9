"""The text of `prismer info`: a model's size, this machine, versions, and the kernels that can run here."""

import dataclasses
import fnmatch
import os
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from prismer import __version__
from prismer.config import PrismerConfig, preset
from prismer.errors import InputError
from prismer.freezing import FREEZE_MODES, freeze
from prismer.kernels import tuning
from prismer.kernels.dispatch import all_ops, asked, backends
from prismer.model import Prismer
from prismer.weights.catalogue import PUBLISHED_MODELS
from prismer.weights.folder import folder_config
from prismer.weights.locate import CONFIG, find_folder

# distributions whose versions decide what runs; a star stands for a part that differs by CUDA version
_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda*",
    "transformers",
    "open_clip_torch",
    "xformers",
    "flash-attn",
)

# instruction sets that speed up matrix products: Linux's name -> the usual name
_CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}


def info_text(model: str) -> str:
    """All sections of `prismer info` as one text.

    Args:
        model: a model folder, a shipped model or a preset.

    Raises:
        ValueError: if there is no such model, or its config is wrong.
    """
    config = model_config(model)
    sections = {
        f"model {model}": {field.name: _show(config, field.name) for field in dataclasses.fields(config)},
        "parameters": {name: f"{count:,}" for name, count in _count_parameters(config).items()},
        "machine": _machine(),
        "versions": _versions(),
        "kernels": _kernels(),
        "what runs": _choices(),
    }
    return "\n\n".join(_table(title, rows) for title, rows in sections.items())


def model_config(model: str) -> PrismerConfig:
    """The config of a model folder, a model by name or a preset; nothing is downloaded.

    Raises:
        ValueError: if there is no such model, or its config is wrong.
    """
    if model in PUBLISHED_MODELS and not Path(model).is_dir():
        entry = PUBLISHED_MODELS[model]
        return preset(entry.preset, image_size=entry.image_size)
    folder = find_folder(model)
    if folder is None:
        if "/" in model:
            raise InputError(f"no model folder {model}; give a folder or a preset such as base or large-z")
        return preset(model)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}; give a model folder or a preset such as base or large-z")
    return folder_config(folder)


def _count_parameters(config: PrismerConfig) -> dict[str, int]:
    """Parameters of the model, of its two halves, and trainable ones in each freeze mode; none is allocated."""
    with torch.device("meta"):
        model = Prismer(config)
    counts = {"total": _count(model), "encoder": _count(model.encoder), "decoder": _count(model.decoder)}
    return counts | {f"trainable, {mode}": freeze(model, mode)[0] for mode in FREEZE_MODES}


def _machine() -> dict[str, str]:
    """This machine's Python, processor and GPUs."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    flags = [name for flag, name in _CPU_FLAGS.items() if flag in words]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "CPU": f"{cores} cores usable, {torch.get_num_threads()} threads, {', '.join(flags) or 'flags unknown'}",
        "GPU": "none that torch can use",
    }
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        rows["GPU" if i == 0 else f"GPU {i}"] = (
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
            f"{', bf16' if found.major >= 8 else ''}"
        )
    return rows


def _versions() -> dict[str, str]:
    """Versions of this library and of the packages it depends on, read without importing them."""
    # case, "-" and "_" do not matter in names of packages
    installed = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in metadata.distributions()}
    rows = {"prismer": __version__}
    for pattern in _PACKAGES:
        names = fnmatch.filter(installed, pattern.replace("_", "-"))
        found = [f"{installed[name]} ({name})" if "*" in pattern else installed[name] for name in names]
        rows[pattern.removesuffix("-cuda*")] = ", ".join(found) or "not installed"
    return rows | {"CUDA of torch": torch.version.cuda or "none"}


def _kernels() -> dict[str, str]:
    """The backends of each op: "usable", or the reason why not."""
    return {f"{row.op}, {row.backend}": "usable" if row.usable else row.reason for row in backends()}


def _choices() -> dict[str, str]:
    """For each op what the prior takes, and what was measured as faster on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = tuning.table(device)
    source = f"{table.source} ({len(table.entries)} calls, {table.digest})" if table.entries else ""
    rows = {"measured choices": "; ".join(filter(None, (tuning.advice(device), source)))}
    for op in all_ops():
        usable = op.usable(device)
        prior = "torch's own operators where they do as well, else " if op.host and device == "cpu" else ""
        text = f"prior: {prior}{usable[0]}"
        entries = [entry for entry in table.entries if entry.op == op.name]
        counts = Counter(entry.choice for entry in entries)
        if entries:
            chosen = ", ".join(f"{choice} for {count} calls" for choice, count in counts.most_common())
            text += f"; measured: {chosen} (up to {max(entry.gain for entry in entries):.2f} times as fast)"
        if asked(op.name):
            text += f"; asked for: {asked(op.name)}"
        rows[op.name] = text
    return rows


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _show(config: PrismerConfig, name: str) -> str:
    value = getattr(config, name)
    return (", ".join(value) or "none") if isinstance(value, tuple) else repr(value) if value == "" else str(value)


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
