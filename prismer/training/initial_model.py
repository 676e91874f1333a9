"""Where a training run starts from: a model, or a preset, whose towers ship with the package or come from the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prismer.config import PRESETS, PrismerConfig, preset
from prismer.dataloading.semantics.features import TABLE_FILES
from prismer.errors import InputError
from prismer.model import Prismer
from prismer.shipped import shipped_folder
from prismer.tokenizer import Tokenizer
from prismer.weights.backbones import from_preset, is_preset
from prismer.weights.catalogue import PUBLISHED_MODELS
from prismer.weights.folder import check_checksums, source_config
from prismer.weights.locate import find_folder
from prismer.weights.tensors import read_tensors

TOWERS = "tiny-towers"


def initial_config(source: str, expert_text: Sequence[str] | None = None) -> PrismerConfig:
    """The architecture of a preset or a model.

    Args:
        source, expert_text: as in `build_initial_model`.

    Raises:
        ValueError: if `source` is neither.
    """
    config = _own_config(source)
    return config if expert_text is None else config.replace(expert_text=tuple(expert_text))


def _own_config(source: str) -> PrismerConfig:
    if _is_model(source):
        return source_config(source)
    if source.partition("-")[0] not in PRESETS:
        raise InputError(
            f"{source!r} is neither a model nor a preset; presets are {', '.join(PRESETS)}, and `prismer models list` "
            f"names models"
        )
    return preset(source)


def _is_model(source: str) -> bool:
    """Whether `source` names a model with weights: a path, a released checkpoint or an id of the hub."""
    return Path(source).exists() or source in PUBLISHED_MODELS or "/" in source


def semantics_folder(semantics: str, model: str) -> Path | None:
    """The folder of the table of features that a run reads; None if there is none.

    Args:
        semantics, model: settings of the run. Without the first, the table of the initial model's folder is taken.
    """
    if semantics:
        return Path(semantics)
    folder = find_folder(model) if _is_model(model) else None
    return folder if folder is not None and (folder / TABLE_FILES[0]).is_file() else None


def build_initial_model(
    source: str,
    image_size: int = 0,
    seed: int = 0,
    expert_text: Sequence[str] | None = None,
    model_class: type[Prismer] = Prismer,
) -> Prismer:
    """The model that training starts from.

    Args:
        source: a model, as in `Prismer.from_pretrained`; or a preset, which is built anew: "tiny" around the towers
            that ship with the package, "base", "large" and "huge" around CLIP and RoBERTa. Each also exists with "-z".
        image_size: RGB side in px; 0 keeps the model's own.
        seed: of the new parts.
        expert_text: experts whose detections the decoder reads as text; None keeps the model's own.
        model_class: what is built.

    Raises:
        ValueError: if there is no such model, or it comes without towers or tokenizer.
    """
    config = initial_config(source, expert_text)
    text: dict[str, Any] = {} if expert_text is None else {"expert_text": tuple(expert_text)}
    if _is_model(source):
        model = model_class.from_pretrained(source, image_size=image_size or None, dtype=torch.float32, **text)
        if model.tokenizer is None:
            raise InputError(f"the model in {source} has no tokenizer; save it with one")
        return model
    if is_preset(source):
        return from_preset(model_class, source, image_size=image_size or None, seed=seed, **text)
    towers = shipped_folder(TOWERS)
    if image_size:
        config = config.replace(image_size=image_size)
    torch.manual_seed(seed)
    model = model_class(config, Tokenizer.from_folder(towers))
    own = model.state_dict()
    check_checksums(towers / "towers.safetensors")
    tensors = read_tensors(towers / "towers.safetensors")
    misfit = sorted(key for key, tensor in tensors.items() if key not in own or own[key].shape != tensor.shape)
    if misfit:
        raise InputError(f"the shipped towers do not fit preset {source!r} (first: {misfit[0]}); pack them again")
    model.load_state_dict(tensors, strict=False)
    return model
