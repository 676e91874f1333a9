"""Tensors by name: out of files, checked against a config, and into a model."""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prismer.config import PrismerConfig
from prismer.detections import DetectionTokens
from prismer.errors import InputError
from prismer.network import PrismerNetwork
from prismer.stems import resize_positions
from prismer.weights.load_report import LoadReport, Misfit
from prismer.weights.locate import CONFIG
from prismer.weights.names import is_published

POSITIONS = "encoder.positional_embedding"
_DETECTIONS = "decoder.detections."

# the first words of our names and of the published ones
_PARTS = ("encoder", "decoder", "expert_encoder", "text_decoder")
_STEM = re.compile(r"encoder\.stems\.(\w+)\.(convs|norms|project)\.")
# sizes of a config -> the stack whose layers they count
_STACKS = {
    "vision_depth": "encoder.blocks",
    "resampler_depth": "encoder.resampler.blocks",
    "text_depth": "decoder.layers",
}
# sizes of a config -> the tensor and its axis that tell them
SIZE_AXES = {
    "vision_width": ("encoder.stems.rgb.weight", 0),
    "patch_size": ("encoder.stems.rgb.weight", 2),
    "num_latents": ("encoder.resampler.latents", 0),
    "num_instances": ("encoder.instance_embedding", 0),
    "text_width": ("decoder.embeddings.word.weight", 1),
    "vocab_size": ("decoder.embeddings.word.weight", 0),
    "max_positions": ("decoder.embeddings.position.weight", 0),
    "text_mlp_width": ("decoder.extra.mlp.intermediate.weight", 0),
}
# a model that does not fit is built for its table of misfits if no size exceeds so many times the stored one
_MOST_TIMES, _LITTLE = 4, 16


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; nothing in the file is executed.

    Raises:
        ValueError: if the file is cut, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); export it again") from None
    damaged = None
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # torch.load compares no checksums
                damaged = archive.testzip()
        # the pages of a zip are read as they are copied, so that memory holds the weights once
        if not damaged:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes that are no pickle end torch's reader in whatever way they lead it
        reason = str(error).strip().splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a whole file of tensors ({reason}); get it again") from None
    if damaged:
        raise InputError(f"{path} is damaged (the checksum of {damaged}); get it again")
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise InputError(f"{path} does not hold tensors by name; give a file that holds a state dict alone")
    return found


def without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefix that DataParallel, torch.compile and trainers put before all names."""
    prefix = os.path.commonprefix(list(tensors)).rpartition(".")[0]
    if not prefix or prefix.partition(".")[0] in _PARTS:
        return tensors
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items()}


def check_sizes(config: PrismerConfig, shapes: Mapping[str, torch.Size], source: str) -> None:
    """Refuse a config with many more or much larger layers than the tensors have, before such a model is built.

    Args:
        shapes: of tensors by our names; shapes by published names are not checked.
        source: names the file in the error.

    Raises:
        ValueError: if a size of `config` is far above that of the tensors.
    """
    if is_published(shapes):
        return
    for field, stored in stored_sizes(shapes).items():
        asked = getattr(config, field)
        # smaller differences end in the table of a `Misfit`, tensor by tensor
        if asked > _MOST_TIMES * max(stored, _LITTLE):
            raise InputError(
                f"{source} does not fit the config: {field} is {asked}, and its tensors are for {stored}; "
                f"use the {CONFIG} that was saved beside these weights"
            )


def stored_sizes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """The fields of PrismerConfig that names and shapes of tensors tell; 0 for an absent stack."""
    sizes = {}
    for field, stack in _STACKS.items():
        pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
        sizes[field] = len({m[1] for key in shapes if (m := pattern.match(key))})
    for field, (key, axis) in SIZE_AXES.items():
        if len(shapes.get(key, ())) > axis:
            sizes[field] = shapes[key][axis]
    return sizes


def stored_stems(names: Iterable[str]) -> set[str]:
    """The experts that tensors have stems for."""
    return {m[1] for name in names if (m := _STEM.match(name))}


def check_dtypes(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse integers and complex numbers as weights: quantised weights are meaningless without their scales.

    Raises:
        ValueError: which names the first such tensor.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith(".num_batches_tracked"):
            raise InputError(
                f"{source} holds {key} as {tensor.dtype}, and weights are floating-point numbers; if they were "
                f"quantised, apply their scales first"
            )


def fit_expert_text(tensors: dict[str, Tensor], config: PrismerConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a model with or without expert text, for a model with or without it.

    Returns:
        `tensors`, with new ones where parts that read detections are lacking (the caller's random numbers are not
        touched), and without those that `config` has no place for; and the names of the latter.
    """
    own = [key for key in tensors if key.startswith(_DETECTIONS)]
    if not config.expert_text:
        return {key: tensor for key, tensor in tensors.items() if key not in own}, own
    if own:
        return tensors, []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        new = DetectionTokens(config).state_dict(prefix=_DETECTIONS)
    return {**tensors, **new}, []


def load_tensors(
    model: PrismerNetwork,
    tensors: Mapping[str, Tensor],
    source: str,
    new: Iterable[str] = (),
    ignored: Sequence[str] = (),
) -> LoadReport:
    """Fill every tensor of `model`; the positional table is resized if it comes from another resolution.

    Missing counters of batch norms start at 0: they have no effect.

    Args:
        tensors: by our names, of any floating dtype.
        source: names them in the report.
        new: names of those that are not from the file, for the report.
        ignored: names of tensors that were left out before, for the report.

    Returns:
        What was found, with nothing missing, unexpected or of another shape.

    Raises:
        Misfit: a ValueError with the table of what is missing, unexpected or of another shape; `model` is unchanged.
    """
    tensors = dict(tensors)
    own = model.state_dict()
    loaded = len(set(own) & set(tensors) - set(new))
    for key in own:
        norm, _, name = key.rpartition(".")
        # only for a norm that is there; if all of it is missing, so is its counter
        if name == "num_batches_tracked" and key not in tensors and f"{norm}.weight" in tensors:
            tensors[key] = torch.zeros_like(own[key])
    resized = {}
    table = tensors.get(POSITIONS)
    if table is not None and table.shape != own[POSITIONS].shape and _is_square_table(table, own[POSITIONS].shape[1]):
        resized[POSITIONS] = (table.shape, own[POSITIONS].shape)
        tensors[POSITIONS] = resize_positions(table.float(), model.config.grid)
    report = LoadReport(
        source=source,
        loaded=loaded,
        missing={k: own[k].shape for k in own if k not in tensors},
        unexpected={k: t.shape for k, t in tensors.items() if k not in own},
        misfit={k: (t.shape, own[k].shape) for k, t in tensors.items() if k in own and own[k].shape != t.shape},
        resized=resized,
        new={k: own[k].shape for k in new},
        ignored=tuple(ignored),
    )
    if not report.fits:
        stored = stored_stems(tensors)
        if stored != set(model.config.experts):
            raise Misfit(other_experts(source, sorted(stored), model.config.experts), report)
        raise Misfit(
            f"{source} does not fit the config; use the config.json that was saved beside these weights", report
        )
    with torch.no_grad():
        model.load_state_dict(tensors, strict=True)
    return report


def _is_square_table(table: Tensor, width: int) -> bool:
    """Whether a positional table is that of a square grid, of the model's width."""
    return table.dim() == 2 and table.shape[1] == width and round(table.shape[0] ** 0.5) ** 2 == len(table)


def other_experts(source: str, stored: Sequence[str], asked: Sequence[str]) -> str:
    """The sentence that refuses a model because it was trained with other experts."""
    has = f"the experts {', '.join(stored)}" if stored else "no experts"
    wants = ", ".join(asked) or "none"
    new = ", ".join(name for name in asked if name not in stored)
    train = f"; parts for {new} must be trained: start from Prismer.from_backbones(..., experts=...)" if new else ""
    return (
        f"{source} has {has}, but asked for {'are' if asked else 'is'} {wants}: a model works with the experts "
        f"that it was trained with; set experts to {list(stored)}{train}"
    )
