"""Weights on disk: model folders, published checkpoints, the hub, positional tables of another resolution."""

import logging
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prismer.config import PrismerConfig
from prismer.files import (
    CHECKSUMS,
    earlier_folder,
    find_damage,
    new_folder,
    write_atomically,
    write_checksums,
    write_json,
)
from prismer.precision import inference_dtype
from prismer.shipped import SHIPPED_MODELS, shipped_folder
from prismer.stems import resize_positions
from prismer.tensor_files import read_shapes, save_tensors
from prismer.tokenizer import Tokenizer
from prismer.weights.load_report import Misfit, Report
from prismer.weights.published import BIN, is_official, official_config, to_ours

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
POSITIONS = "encoder.positional_embedding"
ANSWERS = "answers.json"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")

ROBERTA_VOCABULARY = 50265
# a published checkpoint brings no tokenizer: its is RoBERTa's
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")
_PARTS = ("encoder", "decoder", "expert_encoder", "text_decoder")
# ours, and those of published checkpoints
_STEM = re.compile(r"encoder\.stems\.(\w+)\.(convs|norms|project)\.")

_log = logging.getLogger(__name__)


def save_pretrained(model, folder: str | Path, answers: Sequence[str] | None = None) -> None:
    """Write `model` so that `from_pretrained` loads it; an interrupted save leaves the old folder as it was.

    Args:
        answers: what the model chooses from when it is asked without a list.

    Raises:
        ValueError: if its towers are int8, or `folder` is a file, or holds other things than a model.
        OSError: with the name of a file, if the disk is full or broken; nothing is left of the attempt.
    """
    state = model.state_dict()
    if any(tensor.dtype == torch.int8 for tensor in state.values()):
        raise ValueError(
            "the model's towers are int8, which no model folder holds; keep the folder that it was loaded from"
        )
    _refuse_others(Path(folder))
    with new_folder(folder) as aside:
        crc = save_tensors(state, aside / WEIGHTS)
        write_description(model, aside)
        if answers is not None:
            write_json(aside / ANSWERS, list(answers))
        write_checksums(aside, {WEIGHTS: crc})


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that is no model's: a save replaces all that it holds.

    Raises:
        ValueError: which names something that would be lost.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {CONFIG, WEIGHTS}:
        raise ValueError(
            f"{folder} is no model folder, and holds {min(names)} and the like, which a save would delete; "
            f"give a new folder"
        )


def write_description(model, folder: Path) -> None:
    """Write what a model folder holds besides weights: config and tokenizer."""
    write_atomically(folder / CONFIG, model.config.to_json().encode())
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def from_pretrained(
    source: str | Path,
    *,
    image_size: int | None = None,
    experts: Sequence[str] | None = None,
    config: PrismerConfig | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    on_report: Callable[[Report], object] | None = None,
):
    """Load a model.

    Args:
        source: one of
            a folder with config.json and model.safetensors, as `save_pretrained` writes it;
            "tiny", the model that ships with the package;
            a published checkpoint: its folder or its file, pytorch_model.bin;
            "owner/name" on the Hugging Face hub, with a folder inside if the model lies in one
            ("owner/name/folder"). The hub is asked only for what is no path here, and only for the files needed.
        image_size: RGB side to use instead of the stored one; the positional table is resized bicubically.
        experts: the experts that the model must have; None takes those that it has.
        config: of a published checkpoint that is of no preset's sizes; else it is read off the tensors.
        device: where the weights go.
        dtype: as what; "auto" for the faster of bf16 and fp32; None for the stored one, bf16 excepted on a processor
            that is faster in fp32. A dtype that was not asked for and is not the stored one is told in a warning.
        on_report: called with the loading report; by default it is logged (level INFO) if there is something to tell.

    Raises:
        ValueError: if the files are not there or broken, the tensors do not fit the config (`Misfit`, with the table
            of them), or the experts are others.
    """
    from prismer.model import Prismer

    folder, weights = _locate(source)
    if config is None and folder is not None and (folder / CONFIG).is_file():
        config = PrismerConfig.from_file(folder / CONFIG)
    if config is not None and weights.suffix == ".safetensors":
        # before anything of the config's sizes is built
        check_sizes(config, read_shapes(weights), source=str(weights))
    tokenizer = None
    if folder is not None and has_tokenizer(folder):
        tokenizer = Tokenizer.from_folder(folder)
    check_checksums(weights)
    tensors, ignored = _without_wrappers(read_tensors(weights)), []
    if is_official(tensors):
        config = config or official_config(tensors, source=str(weights))
        tensors, ignored = to_ours(tensors, source=str(weights))
        if tokenizer is None and config.vocab_size == ROBERTA_VOCABULARY:
            tokenizer = Tokenizer.roberta()
    elif config is None:
        raise ValueError(f"{weights.parent} has no {CONFIG}; export the model again with `prismer export`")
    if experts is not None and set(experts) != set(config.experts):
        raise ValueError(_other_experts(str(weights), config.experts, experts))
    if image_size is not None:
        config = config.replace(image_size=image_size)

    check_sizes(config, {key: tensor.shape for key, tensor in tensors.items()}, source=str(weights))
    # no memory is filled twice: the tensors are the first that the weights hold
    with torch.device("meta"):
        model = Prismer(config, tokenizer)
    # what the model has no place for is told by the table of a `Misfit`
    _check_dtypes({key: tensors[key] for key in model.state_dict() if key in tensors}, source=str(weights))
    stored = tensors[POSITIONS].dtype if POSITIONS in tensors else torch.float32
    dtype, why = inference_dtype(dtype, stored, config, torch.device(device))
    if why:
        warnings.warn(why, stacklevel=3)
    model = model.to(dtype=dtype).to_empty(device=device)
    report = load_tensors(model, tensors, source=str(weights), ignored=ignored)
    if on_report is not None:
        on_report(report)
    elif not report.plain:
        _log.info("%s", report)
    return model.eval()


def check_sizes(config: PrismerConfig, shapes: Mapping[str, torch.Size], source: str) -> None:
    """Refuse a config of more layers, or of much larger ones, than the tensors are for: it would be built in vain.

    Args:
        shapes: of tensors by our names, or by the published ones, which are not looked at.

    Raises:
        ValueError: if such a size of `config` is not that of the tensors.
    """
    if is_official(shapes):
        return
    for field, stored in _stored_sizes(shapes).items():
        asked = getattr(config, field)
        # what differs a little is told by the table of a `Misfit`, tensor by tensor
        if asked > _MOST_TIMES * max(stored, _LITTLE):
            raise ValueError(
                f"{source} does not fit the config: {field} is {asked}, and its tensors are for {stored}; "
                f"use the {CONFIG} that was saved beside these weights"
            )


_MOST_TIMES, _LITTLE = 4, 16
# how much larger than stored a model may be that is built for the sake of the table alone


def _stored_sizes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """The sizes that tensors tell by their shapes and numbers, as fields of PrismerConfig; 0 for an absent stack."""
    sizes = {}
    for field, stack in _STACKS.items():
        pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
        sizes[field] = len({m[1] for key in shapes if (m := pattern.match(key))})
    for field, (key, axis) in _AXES.items():
        if len(shapes.get(key, ())) > axis:
            sizes[field] = shapes[key][axis]
    return sizes


_STACKS = {
    "vision_depth": "encoder.blocks",
    "resampler_depth": "encoder.resampler.blocks",
    "text_depth": "decoder.layers",
}
_AXES = {
    "vision_width": ("encoder.stems.rgb.weight", 0),
    "patch_size": ("encoder.stems.rgb.weight", 2),
    "num_latents": ("encoder.resampler.latents", 0),
    "num_instances": ("encoder.instance_embedding", 0),
    "text_width": ("decoder.embeddings.word.weight", 1),
    "vocab_size": ("decoder.embeddings.word.weight", 0),
    "max_positions": ("decoder.embeddings.position.weight", 0),
    "text_mlp_width": ("decoder.extra.mlp.intermediate.weight", 0),
}


def _check_dtypes(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse whole and complex numbers where weights should be: without their scales they are other weights.

    Raises:
        ValueError: which names the first such tensor.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith(".num_batches_tracked"):
            raise ValueError(
                f"{source} holds {key} as {tensor.dtype}, and weights are floating-point numbers; if they were "
                f"quantised, apply their scales first"
            )


def folder_config(folder: str | Path) -> PrismerConfig:
    """The architecture of a model folder, compared with its weights where they lie beside it.

    Raises:
        ValueError: if a file is damaged, or the two do not fit each other.
    """
    folder = Path(folder)
    config = PrismerConfig.from_file(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        check_sizes(config, read_shapes(folder / WEIGHTS), source=str(folder / WEIGHTS))
    return config


def check_checksums(weights: Path) -> None:
    """Refuse a file of weights that is not the one that was written; warn of a config beside it that was edited.

    The tokenizer looks after its own files.

    Raises:
        ValueError: if the file is damaged.
    """
    folder = weights.parent
    if not (folder / CHECKSUMS).is_file():
        _log.info("%s holds no checksums; a damaged file in it would not be noticed", folder)
    if find_damage(folder, (weights.name,)):
        raise ValueError(
            f"{weights} is damaged: its checksum is not the one in {CHECKSUMS}; copy or export it again, "
            f"or delete {CHECKSUMS} if you changed it yourself"
        )
    if find_damage(folder, (CONFIG,)):
        # people may edit it: the prefix and length of captions, dropout
        warnings.warn(
            f"{folder / CONFIG} was changed since the model was written; if that was not you, restore it", stacklevel=4
        )


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in the model: DataParallel, torch.compile and trainers put "module." or so before all."""
    prefix = os.path.commonprefix(list(tensors)).rpartition(".")[0]
    if not prefix or prefix.partition(".")[0] in _PARTS:
        return tensors
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items()}


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds tokenizer files."""
    return any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def _locate(source: str | Path) -> tuple[Path | None, Path]:
    """The folder whose config and tokenizer count, or None for a single published file; and the file of weights."""
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise ValueError(
            f"the model is {source!r:.60}; give a folder, a file, owner/name on the hub, or {SHIPPED_MODELS[0]}"
        )
    path = Path(source)
    if path.is_file():
        return (path.parent if path.name == WEIGHTS else None), path
    if path.is_dir():
        return path, _weights_in(path)
    if str(source) in SHIPPED_MODELS:
        path = shipped_folder(str(source))
        return path, _weights_in(path)
    if _HUB_ID.fullmatch(str(source)) and not path.parent.is_dir():
        path = _download(str(source))
        return path, _weights_in(path)
    if earlier := earlier_folder(path):
        raise ValueError(
            f"the last save of {source} was interrupted, and the earlier model lies in {earlier}; "
            f"rename that to {path.name}"
        )
    raise ValueError(
        f"no model folder {source}; give a folder written by `prismer export`, a published checkpoint, "
        f"owner/name on the hub, or {' or '.join(SHIPPED_MODELS)}"
    )


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS, BIN):
        if (folder / name).is_file():
            # a model folder of which only the weights arrived is told apart from a published checkpoint by its tensors
            return folder / name
    name = WEIGHTS if (folder / CONFIG).is_file() else CONFIG
    raise ValueError(f"{folder} has no {name}; export the model again with `prismer export`")


def _download(source: str) -> Path:
    """The folder on this machine that holds a hub model's files; asked of the hub only as far as they are not here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    owner, name, *inside = source.split("/")
    prefix = "".join(f"{part}/" for part in inside)
    files = [CONFIG, WEIGHTS, *TOKENIZER_FILES, ANSWERS, CHECKSUMS]
    if inside:
        # the published checkpoints are folders of one repository
        files.append(BIN)
    try:
        root = snapshot_download(f"{owner}/{name}", allow_patterns=[prefix + file for file in files])
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(
            f"there is no folder {source}, and {owner}/{name} cannot be had from the hub ({reason}); "
            "check the name and the connection, or give a folder"
        ) from None
    folder = Path(root, *inside)
    if not any((folder / file).is_file() for file in (WEIGHTS, BIN)):
        raise ValueError(
            f"{owner}/{name} on the hub holds no {prefix}{WEIGHTS}; name the folder in it, as owner/name/folder"
        )
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; nothing in it is executed.

    Raises:
        ValueError: if the file is cut, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); export it again") from None
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
        raise ValueError(f"{path} is not a whole file of tensors ({reason}); get it again") from None
    if damaged:
        raise ValueError(f"{path} is damaged (the checksum of {damaged}); get it again")
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise ValueError(f"{path} does not hold tensors by name; give a file that holds a state dict alone")
    return found


def load_tensors(model, tensors: dict[str, Tensor], source: str, ignored: Sequence[str] = ()) -> Report:
    """Fill every tensor of `model`; the positional table may come from another resolution.

    Counters of batch norms that are missing start at 0: they have no effect.

    Args:
        tensors: by our names, of any floating dtype.
        source: names them in the report.
        ignored: tensors already left out, for the report.

    Returns:
        What was found, with nothing missing, unexpected or misshapen.

    Raises:
        Misfit: a ValueError with the table of what is missing, unexpected or misshapen; `model` is as it was.
    """
    tensors = dict(tensors)
    own = model.state_dict()
    loaded = len(set(own) & set(tensors))
    for key in own:
        norm, _, name = key.rpartition(".")
        # of a norm that is there; where all of it is missing, so is the counter
        if name == "num_batches_tracked" and key not in tensors and f"{norm}.weight" in tensors:
            tensors[key] = torch.zeros_like(own[key])
    resized = {}
    table = tensors.get(POSITIONS)
    if table is not None and table.shape != own[POSITIONS].shape and _is_table(table, own[POSITIONS]):
        resized[POSITIONS] = (table.shape, own[POSITIONS].shape)
        tensors[POSITIONS] = resize_positions(table.float(), model.config.grid)
    report = Report(
        source=source,
        loaded=loaded,
        missing={k: own[k].shape for k in own if k not in tensors},
        unexpected={k: t.shape for k, t in tensors.items() if k not in own},
        misfit={k: (t.shape, own[k].shape) for k, t in tensors.items() if k in own and own[k].shape != t.shape},
        resized=resized,
        ignored=tuple(ignored),
    )
    if not report.fits:
        stored = _stems_in(tensors)
        if stored != set(model.config.experts):
            raise Misfit(_other_experts(source, sorted(stored), model.config.experts), report)
        raise Misfit(
            f"{source} does not fit the config; use the config.json that was saved beside these weights", report
        )
    with torch.no_grad():
        model.load_state_dict(tensors, strict=True)
    return report


def _is_table(table: Tensor, own: Tensor) -> bool:
    """Whether a positional table is one of a square grid, of the model's width."""
    return table.dim() == 2 and table.shape[1] == own.shape[1] and round(table.shape[0] ** 0.5) ** 2 == len(table)


def _stems_in(tensors: dict[str, Tensor]) -> set[str]:
    return {m[1] for key in tensors if (m := _STEM.match(key))}


def _other_experts(source: str, stored: Sequence[str], asked: Sequence[str]) -> str:
    has = f"the experts {', '.join(stored)}" if stored else "no experts"
    wants = ", ".join(asked) or "none"
    new = ", ".join(name for name in asked if name not in stored)
    train = f"; parts for {new} must be trained: start from Prismer.from_backbones(..., experts=...)" if new else ""
    return (
        f"{source} has {has}, but asked for {'are' if asked else 'is'} {wants}: a model works with the experts "
        f"that it was trained with; set experts to {list(stored)}{train}"
    )
