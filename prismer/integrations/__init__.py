"""Adapters for other people's programs; nothing in the library imports them."""

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval, which must be installed, finds through the entry point of this package."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="prismer", simple_class_path="prismer.integrations.lmms_eval.PrismerForLmmsEval")
