"""Prismer in the classes of transformers: `import prismer.transformers` registers them with the Auto classes.

The model is the same one: same modules, same names of tensors, same numbers, one model folder for both libraries.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    RobertaTokenizer,
)

from prismer.transformers.config import PrismerConfig
from prismer.transformers.model import PrismerForConditionalGeneration, PrismerOutput
from prismer.transformers.processor import PrismerImageProcessor, PrismerProcessor

__all__ = [
    "PrismerConfig",
    "PrismerForConditionalGeneration",
    "PrismerImageProcessor",
    "PrismerOutput",
    "PrismerProcessor",
]

AutoConfig.register(PrismerConfig.model_type, PrismerConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForImageTextToText):
    _auto.register(PrismerConfig, PrismerForConditionalGeneration, exist_ok=True)
# it reads images with Pillow, whichever backend is asked for
_BACKENDS = {"torchvision": PrismerImageProcessor, "pil": PrismerImageProcessor}
AutoTokenizer.register(PrismerConfig, RobertaTokenizer, exist_ok=True)
AutoImageProcessor.register(PrismerConfig, image_processor_classes=_BACKENDS, exist_ok=True)
AutoProcessor.register(PrismerConfig, PrismerProcessor, exist_ok=True)
