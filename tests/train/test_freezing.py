"""Proves that the four freeze modes freeze the inherited towers, whole, and nothing else.

Run: pytest tests/train/test_freezing.py
"""

import pytest
import torch

from prismer.config import prismer_tiny
from prismer.freezing import FREEZE_MODES, freeze
from prismer.model import Prismer

CLIP = ("ln_1.", "attn.", "ln_2.", "mlp.")
ROBERTA = ("attention.", "mlp.")


@pytest.fixture(scope="module")
def model():
    return Prismer(prismer_tiny(vision_depth=2, text_depth=3))


def inherited(name: str, towers: str, parts: tuple[str, ...]) -> bool:
    """Whether `name` is `towers`.INDEX.PART..., independently of the module tree."""
    head, _, rest = name.partition(towers + ".")
    return not head and bool(rest) and rest.partition(".")[2].startswith(parts)


@pytest.mark.parametrize("mode", FREEZE_MODES)
def test_a_mode_freezes_its_towers(model, mode):
    trainable, total = freeze(model, mode)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = set()
    if mode in ("freeze_vision", "freeze_lang_vision"):
        expected |= {n for n, _ in model.named_parameters() if inherited(n, "encoder.blocks", CLIP)}
    if mode in ("freeze_lang", "freeze_lang_vision"):
        expected |= {n for n, _ in model.named_parameters() if inherited(n, "decoder.layers", ROBERTA)}
    assert frozen == expected
    # 12 tensors per CLIP block, 16 per RoBERTa layer
    assert len(frozen) == 2 * 12 * ("vision" in mode) + 3 * 16 * ("lang" in mode)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - trainable == sum(dict(model.named_parameters())[name].numel() for name in frozen)


def test_the_other_parts_always_train(model):
    freeze(model, "freeze_lang_vision")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = (
        "encoder.stems.rgb",
        "encoder.stems.depth",
        "encoder.positional_embedding",
        "encoder.instance_embedding",
        "encoder.resampler",
        "encoder.ln_pre",
        "encoder.ln_post",
        "encoder.blocks.0.adaptor",
        "decoder.extra",
        "decoder.embeddings.word",
        "decoder.layers.0.cross",
        "decoder.layers.0.adaptor",
        "decoder.head",
    )
    for part in parts:
        assert any(name.startswith(part) for name in trains), part


def test_a_later_mode_replaces_an_earlier_one(model):
    freeze(model, "freeze_lang_vision")
    trainable, total = freeze(model, "none")
    assert trainable == total


def test_an_unknown_mode_is_refused(model):
    with pytest.raises(ValueError, match="unknown freeze mode 'all'; choose from none"):
        freeze(torch.nn.Module(), "all")
