"""Where a training run starts from: a model folder, or the preset tiny with the towers that ship with the package."""

from pathlib import Path

import torch

from prismer.config import PRESETS, PrismerConfig, preset
from prismer.errors import InputError
from prismer.model import Prismer
from prismer.shipped import shipped_folder
from prismer.tokenizer import Tokenizer
from prismer.weights.folder import check_checksums, folder_config
from prismer.weights.locate import CONFIG
from prismer.weights.tensors import read_tensors

TOWERS = "tiny-towers"


def initial_config(source: str) -> PrismerConfig:
    """The architecture of a preset or a model folder.

    Raises:
        ValueError: if `source` is neither.
    """
    if (Path(source) / CONFIG).is_file():
        return folder_config(source)
    if source.partition("-")[0] not in PRESETS:
        raise InputError(f"{source!r} is neither a model folder nor a preset; presets are {', '.join(PRESETS)}")
    return preset(source)


def build_initial_model(source: str, image_size: int = 0, seed: int = 0) -> Prismer:
    """The model that training starts from.

    Args:
        source: a model folder, or "tiny" ("tiny-z"): new trainable parts around the shipped frozen towers.
        image_size: RGB side in px; 0 keeps the model's own.
        seed: of the new parts.

    Raises:
        ValueError: if there is no such model, or it comes without towers or tokenizer.
    """
    config = initial_config(source)
    if Path(source).is_dir():
        model = Prismer.from_pretrained(source, image_size=image_size or None, dtype=torch.float32)
        if model.tokenizer is None:
            raise InputError(f"the model in {source} has no tokenizer; save it with one")
        return model
    towers = shipped_folder(TOWERS)
    if not source.startswith("tiny") or not towers.is_dir():
        raise InputError(
            f"no pre-trained towers of preset {source!r} are at hand; give a model folder made from CLIP and RoBERTa"
        )
    if image_size:
        config = config.replace(image_size=image_size)
    torch.manual_seed(seed)
    model = Prismer(config, Tokenizer.from_folder(towers))
    own = model.state_dict()
    check_checksums(towers / "towers.safetensors")
    tensors = read_tensors(towers / "towers.safetensors")
    misfit = sorted(key for key, tensor in tensors.items() if key not in own or own[key].shape != tensor.shape)
    if misfit:
        raise InputError(f"the shipped towers do not fit preset {source!r} (first: {misfit[0]}); pack them again")
    model.load_state_dict(tensors, strict=False)
    return model
