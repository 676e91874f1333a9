"""Where the files of a model are, on this machine or on the Hugging Face hub, and what they are called."""

import os
import re
from pathlib import Path

from prismer.dataloading.semantics.features import TABLE_FILES
from prismer.errors import InputError
from prismer.files import CHECKSUMS, earlier_folder
from prismer.shipped import SHIPPED_MODELS, shipped_folder
from prismer.storage.folders import fetch_folder
from prismer.storage.places import as_place, is_url, kept_folder
from prismer.weights.catalogue import PUBLISHED_MODELS
from prismer.weights.hub import HubModel, download, find

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# what a model was trained to choose from when it is asked without a list
ANSWERS = "answers.json"
CLASS_NAMES = "classes.json"
MODEL_CARD = "README.md"
# the one file of a published checkpoint
PUBLISHED_WEIGHTS = "pytorch_model.bin"

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
_WEIGHTS = (WEIGHTS, PUBLISHED_WEIGHTS)
_FILES = (CONFIG, *_TOKENIZER_FILES, ANSWERS, CLASS_NAMES, *TABLE_FILES, MODEL_CARD, CHECKSUMS)
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
    if is_url(source):
        return _fetch(source)
    path = as_place(source)
    if path.is_file():
        return (path.parent if path.name == WEIGHTS else None), path
    if path.is_dir():
        folder = path
    elif str(source) in SHIPPED_MODELS:
        folder = shipped_folder(str(source))
    elif model := _hub_model(source):
        folder = download(model)
    elif earlier := earlier_folder(path):
        raise InputError(
            f"the last save of {source} was interrupted, and the earlier model lies in {earlier}; "
            f"rename that to {path.name}"
        )
    else:
        raise InputError(
            f"no model folder {source}; give a folder written by `prismer export`, a published checkpoint, "
            f"owner/name on the hub, or a name of `prismer models list`"
        )
    return folder, _weights_in(folder)


def _fetch(url: str) -> tuple[Path, Path]:
    """The copies of a model folder in a bucket or on a server, and of its weights."""
    folder = fetch_folder(url, (*_FILES, *_WEIGHTS))
    if not any((folder / name).is_file() for name in (CONFIG, *_WEIGHTS)):
        raise InputError(f"no model at {url}; it holds no {CONFIG}, {' or '.join(_WEIGHTS)}")
    return folder, _weights_in(folder)


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            # whether it is a published checkpoint or a model folder that lost its config is told by the tensors' names
            return folder / name
    name = WEIGHTS if (folder / CONFIG).is_file() else CONFIG
    raise InputError(f"{folder} has no {name}; export the model again with `prismer export`")


def find_folder(source: str | Path) -> Path | None:
    """The folder of a model that is on this machine; None for any other, and the hub is not asked."""
    if is_url(source):
        path = kept_folder("models", source)
        return path if path.is_dir() else None
    path = as_place(source)
    if path.is_dir():
        return path
    if str(source) in SHIPPED_MODELS:
        return shipped_folder(str(source))
    model = _hub_model(source)
    return find(model) if model else None


def _hub_model(source: str | Path) -> HubModel | None:
    """The model of the hub that `source` names: a released checkpoint, owner/name or owner/name/folder."""
    name = str(source)
    if name in PUBLISHED_MODELS:
        name = PUBLISHED_MODELS[name].source
    elif not _HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        return None
    owner, repository, *inside = name.split("/")
    # published checkpoints are folders of one repository
    weights = _WEIGHTS if inside else (WEIGHTS,)
    return HubModel(f"{owner}/{repository}", "/".join(inside), (*_FILES, *weights), weights)
