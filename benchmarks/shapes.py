"""Prismer's real shapes, for every benchmark and ledger test (Prismer, arXiv:2303.02506, section 3)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of one preset at one resolution.

    Attributes:
        name: preset and image size in pixels.
        width, heads, layers: of the image encoder; the head size is 64 in encoder and decoder.
        tokens: number of image tokens N, the 64 latents included.
        expert_tokens: number of tokens that the six experts give the resampler.
        text_width, text_heads, text_layers: of the decoder.
    """

    name: str
    width: int
    heads: int
    layers: int
    tokens: int
    expert_tokens: int
    text_width: int
    text_heads: int
    text_layers: int


_BASE = dict(width=768, heads=12, layers=12, expert_tokens=1176, text_width=768, text_heads=12, text_layers=12)
_LARGE = dict(width=1024, heads=16, layers=24, expert_tokens=1536, text_width=1024, text_heads=16, text_layers=24)

MODELS = (
    Model(name="BASE-224", tokens=260, **_BASE),
    Model(name="BASE-480", tokens=964, **_BASE),
    Model(name="LARGE-224", tokens=320, **_LARGE),
    Model(name="LARGE-480", tokens=1220, **_LARGE),
)
BASE_480 = MODELS[1]

NUM_LATENTS = 64
RESAMPLER_HEADS = 8
VOCABULARY = 50265
TEXT_TOKENS = 20
# 32 captions of 30 tokens: a pre-training micro-batch
LOSS_ROWS = 960
