"""The architecture of a Prismer as a config of transformers: the same settings in the same config.json."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from prismer.config import PrismerConfig as Architecture

_FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))


class PrismerConfig(PreTrainedConfig):
    """The settings of `prismer.PrismerConfig`, checked alike, and those that every config of transformers has.

    Raises:
        ValueError: if a setting contradicts another; the sentence names the setting and the remedy.
    """

    model_type = "prismer"
    attribute_map = {
        "hidden_size": "text_width",
        "num_hidden_layers": "text_depth",
        "num_attention_heads": "text_heads",
        "intermediate_size": "text_mlp_width",
        "max_position_embeddings": "max_positions",
        "bos_token_id": "bos_id",
        "pad_token_id": "pad_id",
        "eos_token_id": "eos_id",
    }

    def __init__(self, **settings: Any) -> None:
        own = {name: settings.pop(name) for name in _FIELDS if name in settings}
        for name, value in dataclasses.asdict(Architecture(**own)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        super().__init__(**settings)

    @classmethod
    def from_architecture(cls, architecture: Architecture, **settings: Any) -> "PrismerConfig":
        """The config of a `prismer.PrismerConfig`."""
        return cls(**dataclasses.asdict(architecture), **settings)

    @property
    def architecture(self) -> Architecture:
        """The settings as the modules take them, checked again."""
        return Architecture(**{name: getattr(self, name) for name in _FIELDS})

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: every setting of the architecture, the defaults too."""
        settings = super().to_diff_dict()
        return settings | {name: getattr(self, name) for name in _FIELDS}
