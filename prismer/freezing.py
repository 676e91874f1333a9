"""Which parameters train in each stage, by module and not by name (Prismer, arXiv:2303.02506, section 3.3).

Frozen are at most the inherited towers: the CLIP blocks and the RoBERTa layers. Adaptors, cross-attention, the extra
text layer, embeddings, LM head, every stem (CLIP's patch convolution too), positional table, ln_pre, ln_post,
resampler and instance table train in every mode.
"""

from torch import nn

FREEZE_MODES = ("none", "freeze_lang", "freeze_vision", "freeze_lang_vision")


def frozen_modules(model: nn.Module, mode: str) -> list[nn.Module]:
    """The modules of a Prismer that `mode` freezes.

    Args:
        model: a Prismer; its vision blocks and decoder layers name what they inherited in `pretrained`.
        mode: one of FREEZE_MODES.

    Raises:
        ValueError: if `mode` is none of them.
    """
    if mode not in FREEZE_MODES:
        raise ValueError(f"unknown freeze mode {mode!r}; choose from {', '.join(FREEZE_MODES)}")
    blocks: list[nn.Module] = []
    if mode in ("freeze_vision", "freeze_lang_vision"):
        blocks += model.encoder.blocks
    if mode in ("freeze_lang", "freeze_lang_vision"):
        blocks += model.decoder.layers
    return [module for block in blocks for module in block.pretrained]


def freeze(model: nn.Module, mode: str) -> tuple[int, int]:
    """Set `requires_grad` of every parameter for `mode`.

    Returns:
        Number of trainable and of all parameters; a tied matrix counts once.
    """
    model.requires_grad_(True)
    for module in frozen_modules(model, mode):
        module.requires_grad_(False)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
