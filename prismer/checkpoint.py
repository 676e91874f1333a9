"""Weights on disk: safetensors folders, positional tables of another resolution, and shipped models."""

import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prismer.config import PrismerConfig
from prismer.stems import resize_positions
from prismer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
POSITIONS = "encoder.positional_embedding"
SHIPPED = ("tiny",)


def save_pretrained(model, folder: str | Path) -> None:
    """Write `model` so that `from_pretrained` loads it; an interrupted save leaves the old folder as it was."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(model.config.to_json())
        # safetensors makes files for their owner alone
        os.chmod(aside / WEIGHTS, (aside / CONFIG).stat().st_mode)
        if model.tokenizer is not None:
            model.tokenizer.save(aside)
        os.chmod(aside, 0o755)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, folder: Path) -> None:
    """Put the finished folder `aside` in the place of `folder`; the old one goes only after the new one is there."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)


def shipped_folder(name: str) -> Path:
    """Where the package keeps the model `name`."""
    return Path(str(resources.files("prismer"))) / "assets" / name


def from_pretrained(source: str | Path, *, image_size: int | None = None, device: str = "cpu", dtype=None):
    """Load a model folder.

    Args:
        source: a folder with config.json and model.safetensors, or "tiny", the model that ships with the package.
        image_size: RGB side to use instead of the stored one; the positional table is resized bicubically.
        device, dtype: where and as what the weights go; the stored dtype if None.

    Raises:
        ValueError: if the folder lacks a file, a file is broken, or the tensors do not fit the config.
    """
    from prismer.model import Prismer

    folder = Path(source)
    if not folder.is_dir() and str(source) in SHIPPED:
        folder = shipped_folder(str(source))
    if not folder.is_dir():
        raise ValueError(
            f"no model folder {source}; give a folder written by `prismer export` or {' or '.join(SHIPPED)}"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; export the model again with `prismer export`")
    config = PrismerConfig.from_file(folder / CONFIG)
    if image_size is not None:
        config = config.replace(image_size=image_size)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file ({error}); export it again") from None
    model = Prismer(config, tokenizer)
    load_tensors(model, tensors, source=str(folder / WEIGHTS))
    if dtype is None:
        dtype = tensors[POSITIONS].dtype
    return model.to(device=device, dtype=dtype).eval()


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds tokenizer files."""
    return any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def load_tensors(model, tensors: dict[str, Tensor], source: str) -> None:
    """Fill every tensor of `model`; the positional table may come from another resolution.

    Raises:
        ValueError: naming the first missing, unexpected or misshapen tensors.
    """
    tensors = dict(tensors)
    own = model.state_dict()
    if POSITIONS in tensors and tensors[POSITIONS].shape != own[POSITIONS].shape:
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS].float(), model.config.grid)
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    misfit = sorted(k for k in set(own) & set(tensors) if own[k].shape != tensors[k].shape)
    problems = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misfit)):
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if problems:
        raise ValueError(
            f"{source} does not fit the config: tensors {'; '.join(problems)}; "
            "use the config.json that was saved beside these weights"
        )
    with torch.no_grad():
        model.load_state_dict(tensors, strict=True)
