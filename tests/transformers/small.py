"""A small random model of both libraries, and batches for it."""

import torch

from prismer.batch import Batch, Detections, ImageBatch
from prismer.config import PrismerConfig, prismer_tiny
from prismer.experts import EXPERTS
from prismer.model import Prismer
from prismer.texts import collate
from prismer.transformers import PrismerForConditionalGeneration
from prismer.transformers.inputs import tensors_of

IMAGES = 3


def small_config(**changes) -> PrismerConfig:
    """A Prismer with a map of each kind, whose decoder also reads objects as text."""
    sizes = dict(
        experts=("normal", "seg", "obj_detection"),
        expert_text=("obj_detection",),
        num_detections=2,
        image_size=32,
        label_size=32,
        vision_width=32,
        vision_depth=1,
        vision_heads=2,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=3,
        text_width=32,
        text_depth=2,
        text_heads=2,
        text_mlp_width=48,
        vocab_size=300,
        max_positions=40,
    )
    return prismer_tiny(**{**sizes, **changes})


def small_pair(**changes) -> tuple[Prismer, PrismerForConditionalGeneration]:
    """A random model, in training mode, and the model of transformers that shares its modules."""
    ours = Prismer(small_config(**changes)).train()
    return ours, PrismerForConditionalGeneration.from_prismer(ours)


def draw_batch(config: PrismerConfig, seed: int = 0) -> Batch:
    """Images with maps, tables and detections, and a text of another length for each; the last is a question."""
    draw = torch.Generator().manual_seed(seed)
    side = config.image_size
    rgb = torch.randint(0, 256, (IMAGES, 3, side, side), generator=draw, dtype=torch.uint8)
    images = ImageBatch.without_labels(rgb, config.experts, config.label_size)
    images.features = torch.randn(9, 64, generator=draw)
    for name, label in images.labels.items():
        label.copy_(torch.randint(0, 256, label.shape, generator=draw, dtype=torch.uint8))
        if EXPERTS[name].is_ids:
            images.rows[name] = torch.randint(0, 9, (IMAGES, 256), generator=draw)
    images.instance_rows = torch.randint(0, config.num_instances, (256,), generator=draw)
    if config.expert_text:
        images.detections = Detections.none(IMAGES, config.num_detection_tokens, config.pad_id)
        images.detections.ids[0, :4] = torch.randint(3, config.vocab_size, (4,), generator=draw)
        images.detections.facts[0, :4, 1:] = torch.randint(0, 4, (4, 5), generator=draw, dtype=torch.uint8)
    groups = []
    for length in (9, 3, 5):
        ids = torch.randint(3, config.vocab_size, (length,), generator=draw).tolist()
        groups.append([([0, *ids, 2], [-100, -100, *ids[1:], 2], 1.0)])
    ids, labels, _ = groups[2][0]
    groups[2] = [([*ids[:3], 1, *ids[3:]], [-100] * 4 + ids[3:], 0.5)]
    return Batch(images=images, texts=collate(groups), keys=[], meta=[])


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    """What `draw_batch` drew, as a model of transformers takes it."""
    ids = batch.texts.ids[:, 0]
    lengths = torch.tensor([11, 5, 8])
    return dict(
        **tensors_of(batch.images),
        instance_rows=batch.images.instance_rows,
        input_ids=ids,
        attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        labels=batch.texts.labels[:, 0],
        text_weights=batch.texts.weights[:, 0],
    )
