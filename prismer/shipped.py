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
