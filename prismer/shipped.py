"""The folders of weights and tokenizers that ship with the package, under prismer/assets/."""

from importlib import resources
from pathlib import Path

SHIPPED_MODELS = ("tiny",)
"""Models that can be loaded by name."""


def shipped_folder(name: str) -> Path:
    """The folder of `name` in prismer/assets/; it need not exist."""
    return Path(str(resources.files("prismer"))) / "assets" / name
