"""What `prismer info` tells: a model's size, this machine, the versions that matter, and the kernels that can run."""

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from prismer import __version__
from prismer.config import PrismerConfig, preset
from prismer.freezing import FREEZE_MODES, freeze
from prismer.kernels.dispatch import backends
from prismer.model import Prismer
from prismer.shipped import SHIPPED_MODELS, shipped_folder
from prismer.weights.folder import folder_config
from prismer.weights.locate import CONFIG

PACKAGES = (
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
"""Distributions whose versions decide what runs; a star stands for what differs by CUDA version."""

# Linux's names of the instructions that speed up matrix products, with the common ones
_CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}


def report(model: str) -> str:
    """Everything as one text.

    Args:
        model: a model folder, a shipped model or a preset.

    Raises:
        ValueError: if there is no such model or its config is not one.
    """
    config = read_config(model)
    sections = {
        f"model {model}": {field.name: _show(config, field.name) for field in dataclasses.fields(config)},
        "parameters": {name: f"{count:,}" for name, count in count_parameters(config).items()},
        "machine": machine(),
        "versions": versions(),
        "kernels": kernels(),
    }
    return "\n\n".join(_table(title, rows) for title, rows in sections.items())


def read_config(model: str) -> PrismerConfig:
    """The config of a model folder, a shipped model or a preset.

    Raises:
        ValueError: if there is no such model or its config is not one.
    """
    folder = Path(model)
    if not folder.is_dir() and model in SHIPPED_MODELS and (shipped_folder(model) / CONFIG).is_file():
        folder = shipped_folder(model)
    if not folder.is_dir():
        if "/" in model:
            raise ValueError(f"no model folder {model}; give a folder or a preset such as base or large-z")
        return preset(model)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; give a model folder or a preset such as base or large-z")
    return folder_config(folder)


def count_parameters(config: PrismerConfig) -> dict[str, int]:
    """Parameters in all, of the two halves, and trainable in each freeze mode; no memory is taken for them."""
    with torch.device("meta"):
        model = Prismer(config)
    counts = {"total": _count(model), "encoder": _count(model.encoder), "decoder": _count(model.decoder)}
    return counts | {f"trainable, {mode}": freeze(model, mode)[0] for mode in FREEZE_MODES}


def machine() -> dict[str, str]:
    """Processor and GPUs."""
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


def versions() -> dict[str, str]:
    """Versions of this library and of `PACKAGES`, read without importing them."""
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    rows = {"prismer": __version__}
    for name in PACKAGES:
        stem = name.removesuffix("*")
        found = [f"{v} ({n})" if name != stem else v for n, v in installed.items() if _same(n, stem, name != stem)]
        rows[stem.removesuffix("-cuda")] = ", ".join(found) or "not installed"
    return rows | {"CUDA of torch": torch.version.cuda or "none"}


def kernels() -> dict[str, str]:
    """Each op's implementations: usable, or why not."""
    rows: dict[str, str] = {}
    for row in backends():
        rows[f"{row.op}, {row.backend}"] = "usable" if row.usable else row.reason
    return rows


def _same(name: str | None, wanted: str, prefix: bool) -> bool:
    # the index treats case, "-" and "_" alike
    name, wanted = (text.lower().replace("_", "-") for text in (name or "", wanted))
    return name.startswith(wanted) if prefix else name == wanted


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _show(config: PrismerConfig, name: str) -> str:
    value = getattr(config, name)
    return (", ".join(value) or "none") if isinstance(value, tuple) else repr(value) if value == "" else str(value)


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
