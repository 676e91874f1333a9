"""The folders of weights and tokenizers that ship with the package, and where downloaded ones are kept."""

import os
from importlib import resources
from pathlib import Path

# models that can be loaded by name
SHIPPED_MODELS = ("tiny",)


def shipped_folder(name: str) -> Path:
    """The folder of `name` in prismer/assets/; it need not exist."""
    return Path(str(resources.files("prismer"))) / "assets" / name


def cache_folder(kind: str) -> Path:
    """The folder of downloads of one kind: $PRISMER_HOME/KIND, by default ~/.cache/prismer/KIND."""
    home = os.environ.get("PRISMER_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home or Path(cache) / "prismer") / kind


def model_folder(source: str) -> Path:
    """The folder of a model: `source` itself, or the folder of the shipped model of that name."""
    return shipped_folder(source) if source in SHIPPED_MODELS and not Path(source).is_dir() else Path(source)
