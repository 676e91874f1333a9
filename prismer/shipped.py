"""The folders of weights and tokenizers that ship with the package, under prismer/assets/."""

from importlib import resources
from pathlib import Path

# models that can be loaded by name
SHIPPED_MODELS = ("tiny",)


def shipped_folder(name: str) -> Path:
    """The folder of `name` in prismer/assets/; it need not exist."""
    return Path(str(resources.files("prismer"))) / "assets" / name


def model_folder(source: str) -> Path:
    """The folder of a model: `source` itself, or the folder of the shipped model of that name."""
    return shipped_folder(source) if source in SHIPPED_MODELS and not Path(source).is_dir() else Path(source)
