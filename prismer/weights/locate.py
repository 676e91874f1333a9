"""Where the files of a model are, on this machine or on the Hugging Face hub, and what they are called."""

import os
import re
from pathlib import Path

from prismer.errors import InputError
from prismer.files import CHECKSUMS, earlier_folder
from prismer.shipped import SHIPPED_MODELS, shipped_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# what a model was trained to choose from when it is asked without a list
ANSWERS = "answers.json"
# the one file of a published checkpoint
PUBLISHED_WEIGHTS = "pytorch_model.bin"

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds tokenizer files."""
    return any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def locate(source: str | Path) -> tuple[Path | None, Path]:
    """Find a model, and download it if it is on the hub alone; `source` as in `from_pretrained`.

    Returns:
        The folder of its config and tokenizer, None for a single published file; and the file of its weights.

    Raises:
        ValueError: if there is no such model.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise InputError(
            f"the model is {source!r:.60}; give a folder, a file, owner/name on the hub, or {SHIPPED_MODELS[0]}"
        )
    path = Path(source)
    if path.is_file():
        return (path.parent if path.name == WEIGHTS else None), path
    if path.is_dir():
        folder = path
    elif str(source) in SHIPPED_MODELS:
        folder = shipped_folder(str(source))
    elif _HUB_ID.fullmatch(str(source)) and not path.parent.is_dir():
        folder = _download(str(source))
    elif earlier := earlier_folder(path):
        raise InputError(
            f"the last save of {source} was interrupted, and the earlier model lies in {earlier}; "
            f"rename that to {path.name}"
        )
    else:
        raise InputError(
            f"no model folder {source}; give a folder written by `prismer export`, a published checkpoint, "
            f"owner/name on the hub, or {' or '.join(SHIPPED_MODELS)}"
        )
    return folder, _weights_in(folder)


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS, PUBLISHED_WEIGHTS):
        if (folder / name).is_file():
            # whether it is a published checkpoint or a model folder that lost its config is told by the tensors' names
            return folder / name
    name = WEIGHTS if (folder / CONFIG).is_file() else CONFIG
    raise InputError(f"{folder} has no {name}; export the model again with `prismer export`")


def _download(source: str) -> Path:
    """The local folder of a hub model; only what is not here yet is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    owner, name, *inside = source.split("/")
    prefix = "".join(f"{part}/" for part in inside)
    files = [CONFIG, WEIGHTS, *_TOKENIZER_FILES, ANSWERS, CHECKSUMS]
    if inside:
        # the published checkpoints are folders of one repository
        files.append(PUBLISHED_WEIGHTS)
    try:
        root = snapshot_download(f"{owner}/{name}", allow_patterns=[prefix + file for file in files])
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(
            f"there is no folder {source}, and {owner}/{name} cannot be had from the hub ({reason}); "
            "check the name and the connection, or give a folder"
        ) from None
    folder = Path(root, *inside)
    if not any((folder / file).is_file() for file in (WEIGHTS, PUBLISHED_WEIGHTS)):
        raise InputError(
            f"{owner}/{name} on the hub holds no {prefix}{WEIGHTS}; name the folder in it, as owner/name/folder"
        )
    return folder
