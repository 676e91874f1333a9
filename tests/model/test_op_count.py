"""Proves how many operators one training step of BASE issues, forward and backward, in bf16, with fused modules and
without, and how many launches its Triton kernels are: the host that issues them, not arithmetic, limits a fine-tuning
batch of a few images.

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
from prismer.kernels.dispatch import Op, as_if_watched, use_backend
from prismer.kernels.launch import counted
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
    ("mode", "side"),
    (("freeze_lang_vision", 224), pytest.param("freeze_vision", 480, marks=pytest.mark.long)),
    ids=("pretrain-224", "finetune-480"),
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


# ops for which a GPU's vendor has what is taken first: products, and attention, which is two launches there
VENDOR = ("mlp", "adaptor")


@pytest.mark.parametrize(("ours", "limit"), ((True, 770), (False, 450)), ids=("every-op-on-triton", "vendors-first"))
@pytest.mark.parametrize(
    ("mode", "side"), (("freeze_lang_vision", 224), ("freeze_vision", 480)), ids=("pretrain-224", "finetune-480")
)
def test_a_training_step_launches_few_kernels(mode, side, ours, limit, monkeypatch):
    """Ops that nothing watches run their implementations, whose launches are counted on the meta device."""
    if not ours:
        choose = Op.choose
        monkeypatch.setattr(
            Op,
            "choose",
            lambda self, *args, **options: "torch" if self.name in VENDOR else choose(self, *args, **options),
        )
    with use_backend("triton"), as_if_watched(False), counted() as launches:
        operators = count_step(mode, side)
    total = sum(n for kernel, n in launches.items() if ours or not kernel.startswith("attention."))
    print(f"\n{mode} {side} px: {total} launches of Triton, {operators.total()} operators of torch beside them")
    print(launches.most_common(40), operators.most_common(60), sep="\n")
    assert total < limit
