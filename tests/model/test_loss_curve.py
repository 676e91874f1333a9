"""Proves that training a tiny model on the fused ops has the same loss curve as on their references in plain PyTorch.

python -m pytest tests/model/test_loss_curve.py -s     # 20 steps; add -m slow for 200

Only the order of summation differs, so that the curves differ by rounding.
"""

import pytest
import torch

from prismer.batch import IGNORE_INDEX, Batch, ImageBatch, TextBatch
from prismer.config import prismer_tiny
from prismer.freezing import freeze
from prismer.kernels.dispatch import use_backend
from prismer.model import Prismer

CONFIG = prismer_tiny(
    experts=("normal", "seg", "obj_detection"),
    image_size=32,
    label_size=32,
    vision_width=64,
    vision_depth=2,
    resampler_depth=1,
    text_width=64,
    text_depth=2,
    text_mlp_width=128,
    vocab_size=60,
)


def batches(number: int) -> list[Batch]:
    """Three batches again and again, small enough to be memorised; one text is padded."""
    g = torch.Generator().manual_seed(3)

    def draw(high, *shape, low=0, dtype=torch.uint8):
        return torch.randint(low, high, shape, generator=g, dtype=dtype)

    pool = []
    for _ in range(3):
        images = ImageBatch.without_labels(draw(256, 2, 3, 32, 32), CONFIG.experts, CONFIG.label_size)
        images.labels = {name: draw(256, *x.shape) for name, x in images.labels.items()}
        images.features = torch.randn(4, 64, generator=g)
        images.rows = {name: draw(4, *x.shape, dtype=torch.int64) for name, x in images.rows.items()}
        ids = draw(CONFIG.vocab_size, 2, 2, 8, low=3, dtype=torch.int64)
        ids[..., 0], ids[1, 1, 5:] = CONFIG.bos_id, CONFIG.pad_id
        labels = ids.masked_fill(ids == CONFIG.pad_id, IGNORE_INDEX)
        texts = TextBatch(ids=ids, labels=labels, weights=torch.tensor([[1.0, 0.7], [0.5, 1.0]]))
        pool.append(Batch(images=images, texts=texts, keys=[], meta=[]))
    return [pool[i % len(pool)] for i in range(number)]


def curve(backend: str | None, mode: str, steps: int) -> torch.Tensor:
    """The loss of each step."""
    torch.manual_seed(1)
    model = Prismer(CONFIG).train()
    freeze(model, mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    with use_backend(backend):
        for batch in batches(steps):
            loss = model(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def compare(mode: str, steps: int, within: float) -> None:
    """Check that both curves fall, and that their relative difference stays below `within`."""
    fused, plain = curve(None, mode, steps), curve("reference", mode, steps)
    difference = ((fused - plain).abs() / plain).max().item()
    print(f"\n{mode}: {plain[0]:.3f} -> {plain[-1]:.3f} in {steps} steps, at most {difference:.2g} apart")
    assert fused[-3:].mean() < 0.8 * fused[:3].mean()
    assert difference < within


@pytest.mark.parametrize("mode", ("freeze_lang_vision", "none"))
def test_fused_ops_keep_the_loss_curve(mode):
    compare(mode, 20, within=1e-5)


@pytest.mark.slow
def test_fused_ops_keep_the_loss_curve_for_200_steps():
    compare("freeze_lang_vision", 200, within=0.02)
