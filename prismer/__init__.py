"""Prismer, made fast and practical: a vision-language model that inherits frozen experts (arXiv:2303.02506).

Each public name is imported on first use, so that `import prismer` takes milliseconds and does not import torch.
"""

import importlib

__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "Prismer": "prismer.model",
    "PrismerConfig": "prismer.config",
    "preset": "prismer.config",
    "prismer_tiny": "prismer.config",
    "prismer_base": "prismer.config",
    "prismer_large": "prismer.config",
    "prismer_huge": "prismer.config",
    "Tokenizer": "prismer.tokenizer",
    "load_image": "prismer.dataloading.feed.load_image",
    "load_images": "prismer.dataloading.feed.load_image",
    "image_batch": "prismer.dataloading.feed.image_batch",
    "ExpertLabels": "prismer.dataloading.feed.image_batch",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'prismer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
