"""Proves how many operators one training step of BASE issues, forward and backward, in bf16, with fused modules and
without: the host that issues them, not arithmetic, limits a fine-tuning batch of a few images.

Operators are counted on tensors without data, as they would be sent to a GPU (the Triton ops are opaque; views and
allocations launch nothing and do not count). Run: pytest tests/model/test_op_count.py -s
"""

import collections
import dataclasses

import pytest
import torch

from prismer.batch import Batch, ImageBatch, TextBatch
from prismer.config import preset
from prismer.costs.counting import CostCounter
from prismer.freezing import freeze
from prismer.kernels.dispatch import use_backend
from prismer.model import Prismer

LIMIT = 1110


def count_step(mode: str, side: int) -> collections.Counter[str]:
    """The operators of one step of BASE: two images, one text of 30 tokens each."""
    config = dataclasses.replace(preset("base"), image_size=side)
    with torch.device("meta"):
        model = Prismer(config).bfloat16().train()
        freeze(model, mode)
        rgb = torch.empty(2, 3, side, side, dtype=torch.uint8)
        ids = torch.empty(2, 1, 30, dtype=torch.int64)
        texts = TextBatch(ids=ids, labels=ids.clone(), weights=torch.empty(2, 1))
        batch = Batch(
            images=ImageBatch.without_labels(rgb, config.experts, config.label_size), texts=texts, keys=[], meta=[]
        )
        with CostCounter() as counter:
            model(batch).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient reached {missing[:3]}: the count is of half a step"
    return counter.issued


@pytest.mark.parametrize(
    ("mode", "side"), (("freeze_lang_vision", 224), ("freeze_vision", 480)), ids=("pretrain-224", "finetune-480")
)
def test_a_training_step_issues_few_operators(mode, side):
    with use_backend("triton"):
        fused = count_step(mode, side)
    with use_backend("reference"):
        plain = count_step(mode, side)
    print(f"\n{mode} {side} px: {fused.total()} operators fused, {plain.total()} in plain torch")
    print(fused.most_common(60))
    assert fused.total() < LIMIT
    # the count sees what fused ops replace: the definitions, including dropout's random numbers, are torch operators
    assert plain.total() > 2800 and not any(name.startswith("prismer::attention") for name in plain)
