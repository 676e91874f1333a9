"""The architecture of a Prismer as one frozen dataclass, stored as JSON beside the weights; and the presets.

Sizes follow Prismer (arXiv:2303.02506): BASE is CLIP ViT-B/16 with RoBERTa-base, LARGE is CLIP ViT-L/14@336px with
RoBERTa-large, HUGE is OpenCLIP ViT-H/14 with RoBERTa-large. `tiny` is the demonstration that trains on a laptop.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismer.errors import InputError, listed, shown
from prismer.experts import EXPERTS, PAPER_EXPERTS, TEXT_EXPERTS
from prismer.reading import is_text, parse_json

ALL_EXPERTS = PAPER_EXPERTS
# patches in a row: attention over 65,536 patches takes 16 GB a head; the largest published model has 34 in a row
MAX_GRID = 256
_WIDTH = (65_536, "what the layer norms take")
_DEPTH = (1_024, "no model that trains is deeper")
_TABLE = (2**24, "float32 counts no further")
# the largest meaningful values, and why: larger ones come from a damaged file, and such a model would be built in vain
_MOST = {
    "vision_width": _WIDTH,
    "text_width": _WIDTH,
    "text_mlp_width": (4 * _WIDTH[0], "four times the largest width"),
    "vision_depth": _DEPTH,
    "resampler_depth": _DEPTH,
    "text_depth": _DEPTH,
    "label_size": (4_096, "maps are read whole"),
    "num_latents": (MAX_GRID**2, "as many as an image has patches"),
    "num_instances": (2**16, "a map has 256 ids"),
    "num_detections": (255, "a map has 255 ids"),
    "vocab_size": _TABLE,
    "max_positions": _TABLE,
}
# what names the architecture to transformers (prismer/transformers)
MODEL_TYPE = "prismer"
# what transformers writes into config.json beside it, and what nothing here depends on
_OF_TRANSFORMERS = ("architectures", "dtype", "transformers_version")
_RESTORE = "restore the file or export the model again"


@dataclass(frozen=True, kw_only=True)
class PrismerConfig:
    """Architecture of one Prismer; enough to rebuild the module tree.

    Attributes:
        name: of the preset, "custom" for other sizes.
        experts: expert labels that the model reads; () is PrismerZ, without resampler, expert stems and instance table.
        expert_text: experts whose detections the decoder reads as text, "obj_detection" and "ocr_detection" or one of
            them; independent of `experts`, whose maps the encoder reads.
        num_detections: the most detections of an image that are read as text.
        image_size: side of the RGB input, px; what remains after whole patches is dropped.
        label_size: side of every expert label, px, whatever the RGB resolution.
        patch_size: side of a patch, px.
        vision_width, vision_depth, vision_heads: of the image encoder.
        vision_activation: "quick_gelu" (OpenAI CLIP) or "gelu" (LAION ViT-H/14).
        resampler_depth, resampler_heads, num_latents: of the resampler.
        num_instances: rows of the instance table, which exists if obj_detection is an expert.
        text_width, text_depth, text_heads, text_mlp_width: of the decoder; the extra layer is not counted.
        vocab_size: token ids.
        max_positions: rows of the position table, of which RoBERTa uses all but the first pad_id + 1.
        bos_id, pad_id, eos_id: ids of `<s>`, `<pad>` and `</s>`.
        dropout: of the decoder alone: attention probabilities, sub-layer outputs, embeddings.
        label_smoothing: of the loss.
        init_std: of the decoder's new matrices; narrow decoders need more for the same gain.
        semantics: what turns class names and words into 64 numbers: "clip" (table of a CLIP text tower) or "spelling".
        caption_prefix: the prompt that captions start with; "" for pre-training weights.
        caption_max_length: tokens of a generated caption, `<s>` and prefix included.

    Raises:
        ValueError: if a field contradicts another; the sentence names the field and the remedy.
    """

    name: str = "custom"
    experts: tuple[str, ...] = ALL_EXPERTS
    expert_text: tuple[str, ...] = ()
    num_detections: int = 16

    image_size: int = 224
    label_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_activation: str = "quick_gelu"

    resampler_depth: int = 4
    resampler_heads: int = 8
    num_latents: int = 64
    num_instances: int = 128

    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_mlp_width: int = 3072
    vocab_size: int = 50265
    max_positions: int = 514
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2

    dropout: float = 0.1
    label_smoothing: float = 0.1
    init_std: float = 0.02
    semantics: str = "clip"
    caption_prefix: str = "A picture of"
    caption_max_length: int = 20

    def __post_init__(self) -> None:
        for name, known in (("experts", EXPERTS), ("expert_text", TEXT_EXPERTS)):
            experts = getattr(self, name)
            if not isinstance(experts, (list, tuple)):
                raise InputError(f"{name} is {shown(experts)}; give a list of names, [] for none")
            object.__setattr__(self, name, tuple(experts))
            for expert in experts:
                if not isinstance(expert, str) or expert not in known:
                    raise InputError(f"unknown expert {shown(expert)} in {name}; choose from {', '.join(known)}")
            if len(set(experts)) != len(experts):
                raise InputError(f"{name} lists one twice: {', '.join(experts)}; name each once")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int and abs(value) < 2**63:
                object.__setattr__(self, field.name, float(value))
            elif field.type in (int, float, str) and type(value) is not field.type:
                raise InputError(f"{field.name} is {shown(value)}; it must be {field.type.__name__}")
            elif field.type is int and value < (least := 0 if field.name.endswith("_id") else 1):
                raise InputError(f"{field.name} is {shown(value)}; it must be at least {least}")
            elif field.type is float and not math.isfinite(value):
                raise InputError(f"{field.name} is {value}; give a finite number")
            elif field.type is str and not is_text(value):
                raise InputError(f"{field.name} is {shown(value)}, which cannot be written as UTF-8; correct it")
        for name, (most, why) in _MOST.items():
            if getattr(self, name) > most:
                raise InputError(f"{name} is {shown(getattr(self, name))}; at most {most} ({why})")
        for width, heads in (
            ("vision_width", "vision_heads"),
            ("vision_width", "resampler_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise InputError(
                    f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}; "
                    f"change one so that each head has a whole width"
                )
        if self.vision_width % 8:
            raise InputError(
                f"vision_width {self.vision_width} is not divisible by 8, as the stems need; give a multiple"
            )
        if self.vision_activation not in ("quick_gelu", "gelu"):
            raise InputError(f"vision_activation is {shown(self.vision_activation)}; choose quick_gelu or gelu")
        if self.semantics not in ("clip", "spelling"):
            raise InputError(f"semantics is {shown(self.semantics)}; choose clip or spelling")
        if self.image_size < self.patch_size:
            raise InputError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.grid > MAX_GRID:
            raise InputError(
                f"image_size {self.image_size} makes {self.grid} x {self.grid} patches of {self.patch_size} px; "
                f"give at most {MAX_GRID * self.patch_size}"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.label_smoothing < 1:
            raise InputError("dropout and label_smoothing must lie in [0, 1)")
        if self.init_std <= 0:
            raise InputError(f"init_std is {self.init_std}; it must be above 0")
        if max(self.bos_id, self.pad_id, self.eos_id) >= self.vocab_size:
            raise InputError(f"bos_id, pad_id and eos_id must be below vocab_size {self.vocab_size}")
        if self.experts and self.label_grid < 1:
            raise InputError(f"label_size {self.label_size} is too small for patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Side of the RGB token grid."""
        return self.image_size // self.patch_size

    @property
    def label_grid(self) -> int:
        """Side of every expert's token grid: 14 at BASE, 16 at patch 14."""
        side = self.label_size * 16 // self.patch_size
        for _ in range(4):
            side = (side + 1) // 2
        return side

    @property
    def label_experts(self) -> tuple[str, ...]:
        """The experts whose labels the model reads, as maps or as text."""
        return tuple(name for name in EXPERTS if name in (*self.experts, *self.expert_text))

    @property
    def num_detection_tokens(self) -> int:
        """Tokens of the detections of an image, padding included: three for each detection."""
        return 3 * self.num_detections if self.expert_text else 0

    @property
    def num_context_tokens(self) -> int:
        """Tokens per image that the encoder returns: RGB tokens, then latents."""
        return self.grid**2 + (self.num_latents if self.experts else 0)

    def replace(self, **changes: Any) -> "PrismerConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The config as indented JSON, with the type of model that transformers asks for."""
        return json.dumps(dict(model_type=MODEL_TYPE, **dataclasses.asdict(self)), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> "PrismerConfig":
        """Read what `to_json` or transformers wrote; `source` names the file in errors."""
        values = parse_json(text, source, _RESTORE)
        if isinstance(values, dict):
            if values.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
                raise InputError(f"{source} is of another type of model; give the config of a Prismer")
            values = {name: value for name, value in values.items() if name not in _OF_TRANSFORMERS}
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            extra = type(values).__name__
            if isinstance(values, dict):
                extra = listed(set(values) - known)
            raise InputError(f"{source} holds unknown settings ({extra}); known are {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except ValueError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "PrismerConfig":
        """Read a `config.json`."""
        path = Path(path)
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            raise InputError(f"{path} is not text; {_RESTORE}") from None
        return cls.from_json(text, source=str(path))


def prismer_tiny(**changes: Any) -> PrismerConfig:
    """The embedded demonstration: rendered scenes at 128 px, its own small towers, trains on two CPU cores."""
    sizes = dict(
        name="tiny",
        image_size=128,
        label_size=64,
        patch_size=16,
        vision_width=128,
        vision_depth=6,
        vision_heads=4,
        resampler_depth=2,
        resampler_heads=4,
        num_latents=16,
        text_width=128,
        text_depth=4,
        text_heads=4,
        text_mlp_width=512,
        vocab_size=638,
        max_positions=82,
        dropout=0.0,
        init_std=0.05,
        semantics="spelling",
        caption_prefix="",
        caption_max_length=30,
    )
    return PrismerConfig(**sizes | changes)


def prismer_base(**changes: Any) -> PrismerConfig:
    """CLIP ViT-B/16 and RoBERTa-base."""
    return PrismerConfig(**dict(name="base") | changes)


def prismer_large(**changes: Any) -> PrismerConfig:
    """CLIP ViT-L/14@336px and RoBERTa-large."""
    sizes = dict(
        name="large",
        patch_size=14,
        vision_width=1024,
        vision_depth=24,
        vision_heads=16,
        text_width=1024,
        text_depth=24,
        text_heads=16,
        text_mlp_width=4096,
    )
    return PrismerConfig(**sizes | changes)


def prismer_huge(**changes: Any) -> PrismerConfig:
    """OpenCLIP ViT-H/14 (16 heads of 80, exact GELU, as it was trained) and RoBERTa-large."""
    sizes = dict(name="huge", vision_width=1280, vision_depth=32, vision_heads=16, vision_activation="gelu")
    return prismer_large(**sizes | changes)


PRESETS = {"tiny": prismer_tiny, "base": prismer_base, "large": prismer_large, "huge": prismer_huge}


def preset(name: str, **changes: Any) -> PrismerConfig:
    """The preset `name`; a "-z" at its end leaves the experts out, as in "base-z"."""
    size, _, suffix = name.partition("-")
    if size not in PRESETS or suffix not in ("", "z"):
        raise InputError(
            f"unknown preset {shown(name)}; choose from {', '.join(PRESETS)}, each also with -z (no experts)"
        )
    without_experts = dict(name=name, experts=()) if suffix else {}
    return PRESETS[size](**without_experts | changes)
