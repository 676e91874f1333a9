"""Some steps on the same batches under ZeRO-3 and in plain PyTorch, on every rank; test_zero.py launches this script.

torchrun --nproc_per_node 2 zero_against_plain.py MODEL_FOLDER SMALL_MODEL OUT.json

SMALL_MODEL of -1 leaves small parameters gathered, as the shipped settings do, in two micro-batches to a step. The
model is trained as it is, and as one that reads detections as text.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from prismer.batch import FACT_VALUES, Batch, Detections, ImageBatch
from prismer.config import PrismerConfig
from prismer.experts import TEXT_EXPERTS
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.texts import collate
from prismer.training import zero
from prismer.training.config import TrainConfig

STEPS, IMAGES = 5, 8
# shard, gather and release every parameter, however small, as those of large models are
SHARD_EVERYTHING = dict.fromkeys(
    (
        "stage3_param_persistence_threshold",
        "stage3_max_reuse_distance",
        "stage3_max_live_parameters",
        "stage3_prefetch_bucket_size",
    ),
    0,
)


def make_batch(config: PrismerConfig, step: int, images: slice) -> Batch:
    """Part of a global batch of captions and shorter questions."""
    draw = torch.Generator().manual_seed(step)
    side = config.image_size
    rgb = torch.randint(0, 256, (IMAGES, 3, side, side), generator=draw, dtype=torch.uint8)
    batch = ImageBatch.without_labels(rgb, config.experts, config.label_size)
    for label in batch.labels.values():
        label.copy_(torch.randint(0, 256, label.shape, generator=draw, dtype=torch.uint8))
    batch.features = torch.randn(5, 64, generator=draw)
    for name in batch.rows:
        batch.rows[name] = torch.randint(0, 5, (IMAGES, 256), generator=draw)
        batch.rows[name] = batch.rows[name][images]
    batch.labels = {name: label[images] for name, label in batch.labels.items()}
    batch.rgb = rgb[images]
    groups = []
    for _ in range(IMAGES):
        rows = [torch.randint(3, config.vocab_size, (n,), generator=draw).tolist() for n in (9, 4, 5)]
        groups.append([([0, *ids], [-100, *ids], 1.0) for ids in rows])
    if config.expert_text:
        found = Detections.none(IMAGES, config.num_detection_tokens, config.pad_id)
        for i in range(IMAGES):
            found.ids[i, : 3 * i] = torch.randint(3, config.vocab_size, (3 * i,), generator=draw)
        for column, values in enumerate(FACT_VALUES):
            found.facts[..., column] = torch.randint(0, values, found.ids.shape, generator=draw)
        batch.detections = Detections(found.ids[images], found.facts[images])
    return Batch(images=batch, texts=collate(groups[images], split=1), keys=[], meta=[])


def load(folder: str, expert_text: tuple[str, ...]) -> Prismer:
    return Prismer.from_pretrained(folder, expert_text=expert_text)


def train_sharded(
    folder: str, expert_text: tuple[str, ...], settings: TrainConfig, gathered: bool
) -> tuple[list[float], bool, Prismer]:
    """Losses, whether hooks are left, and the trained model."""
    rank, world, parts = dist.get_rank(), dist.get_world_size(), settings.accumulation
    part = IMAGES // world // parts
    sharded = load(folder, expert_text).train()
    freeze(sharded, settings.freeze)
    section = dict(stage=3, memory_efficient_linear=False, **({} if gathered else SHARD_EVERYTHING))
    engine = zero.build_engine(sharded, settings, dict(zero_optimization=section), "fp32")
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(parts):
            first = (micro * world + rank) * part
            loss = engine(make_batch(sharded.config, step, slice(first, first + part)))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / parts
        dist.all_reduce(total)
        losses.append(float(total) / world)
        if step == 1:
            # as evaluation does between two steps
            zero.copy_weights(engine, load(folder, expert_text))
    has_hooks = any(module._forward_pre_hooks for module in sharded.encoder.modules())
    weights = load(folder, expert_text)
    zero.copy_weights(engine, weights)
    return losses, has_hooks, weights


def train_plain(folder: str, expert_text: tuple[str, ...], settings: TrainConfig) -> tuple[list[float], Prismer]:
    """Losses and the trained model."""
    plain = load(folder, expert_text).train()
    freeze(plain, settings.freeze)
    optimizer = zero.build_optimizer(plain, settings)
    expected, parts = [], settings.accumulation
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(parts):
            images = slice(micro * IMAGES // parts, (micro + 1) * IMAGES // parts)
            loss = plain(make_batch(plain.config, step, images)) / parts
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        expected.append(total)
    return expected, plain


def main() -> None:
    """Write to OUT.json, of each of both models: losses, and for each weight its difference and its change."""
    folder, small, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    zero.start_distributed()
    zero.SMALL_MODEL = small
    rank, gathered = dist.get_rank(), small < 0
    settings = TrainConfig(
        batch_size=IMAGES, accumulation=2 if gathered else 1, learning_rate=3e-3, gradient_clipping=1.0
    )
    models = {"maps": (), "text": TEXT_EXPERTS}
    found = {name: train_sharded(folder, texts, settings, gathered) for name, texts in models.items()}
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return

    reports = {}
    for name, texts in models.items():
        losses, has_hooks, weights = found[name]
        expected, plain = train_plain(folder, texts, settings)
        first = load(folder, texts).state_dict()
        report = {"losses": losses, "expected": expected, "hooks": has_hooks, "difference": {}, "step": {}}
        for key, value in plain.state_dict().items():
            if value.is_floating_point():
                report["difference"][key] = float((weights.state_dict()[key] - value).abs().max())
                report["step"][key] = float((value - first[key]).abs().max())
        reports[name] = report
    out.write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
