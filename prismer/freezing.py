"""Which parameters train in each stage, by module and not by name (Prismer, arXiv:2303.02506, section 3.3).

At most the inherited towers are frozen: the CLIP blocks and the RoBERTa layers. Adaptors, cross-attention, the extra
text layer, embeddings, LM head, every stem (CLIP's patch convolution, too), positional table, ln_pre, ln_post,
resampler and instance table train in every mode.
"""

from typing import TYPE_CHECKING

from prismer.errors import InputError

if TYPE_CHECKING:
    # training configs need the names of the modes alone, and are read before the model's code is imported
    from prismer.network import PrismerNetwork

FREEZE_MODES = ("none", "freeze_lang", "freeze_vision", "freeze_lang_vision")


def freeze(model: "PrismerNetwork", mode: str) -> tuple[int, int]:
    """Set `requires_grad` of every parameter for `mode`, one of FREEZE_MODES.

    Returns:
        Number of trainable and of all parameters; a tied matrix counts once.

    Raises:
        ValueError: if there is no such mode.
    """
    if mode not in FREEZE_MODES:
        raise InputError(f"unknown freeze mode {mode!r}; choose from {', '.join(FREEZE_MODES)}")
    model.requires_grad_(True)
    vision = model.encoder.blocks if mode in ("freeze_vision", "freeze_lang_vision") else ()
    text = model.decoder.layers if mode in ("freeze_lang", "freeze_lang_vision") else ()
    for block in (*vision, *text):
        for module in block.pretrained:
            module.requires_grad_(False)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
