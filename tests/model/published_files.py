"""Published files with random tensors, and the plain model that each belongs to (plain_published.py)."""

import pytest
import torch

from prismer.batch import ImageBatch
from prismer.config import PRESETS, PrismerConfig
from prismer.experts import EXPERTS
from prismer.stems import CLIP_MEAN, CLIP_STD
from tests.model.plain_published import LOW_LEVEL, PlainPrismer, randomise
from tests.model.teacher_forcing import logits_of
from tests.model.test_published_keys import published_keys
from tests.model.twins import assert_close

SMALL = dict(
    image_size=80,
    label_size=224,
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    resampler_depth=4,
    resampler_heads=4,
    text_width=24,
    text_depth=3,
    text_heads=2,
    text_mlp_width=96,
    vocab_size=50,
)


TEXT, VISION = "text_decoder.", "expert_encoder."


WORD, MATRIX = f"{TEXT}roberta.embeddings.word_embeddings.weight", f"{TEXT}lm_head.decoder.weight"


def small(**changes) -> PrismerConfig:
    return PrismerConfig(**{**SMALL, "name": "small", **changes})


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """The architecture of the test files is one that is known by its sizes, like BASE."""
    monkeypatch.setitem(PRESETS, "small", small)
    monkeypatch.setitem(PRESETS, "small14", lambda **changes: small(**{"name": "small14", "patch_size": 14, **changes}))


def write(path, config, seed=0, change=lambda tensors: None):
    """A published file with random tensors, and the plain model that it belongs to."""
    plain = randomise(PlainPrismer(config), seed)
    tensors = dict(plain.state_dict())
    change(tensors)
    path.parent.mkdir(exist_ok=True)
    torch.save(tensors, path)
    return plain


def inputs(config, seed=1, batch=2):
    """An ImageBatch, and the same as the plain model reads it."""
    g = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), generator=g, dtype=torch.uint8)
    labels, rows, plain = {}, {}, {}
    features = torch.randn(9, 64, generator=g)
    for name in config.experts:
        shape = (batch, EXPERTS[name].planes, config.label_size, config.label_size)
        ids = EXPERTS[name].is_ids
        labels[name] = torch.randint(0, 6 if ids else 250, shape, generator=g, dtype=torch.uint8)
        if ids:
            rows[name] = torch.randint(0, 9, (batch, 256), generator=g)
            picked = [features[rows[name][b]][labels[name][b, 0].long()] for b in range(batch)]
            plain[name] = torch.stack(picked).permute(0, 3, 1, 2)
        else:
            assert name in LOW_LEVEL
            x = labels[name].double().flatten(1) / 255
            low, high = x.min(1).values[:, None], x.max(1).values[:, None]
            plain[name] = (2 * (x - low) / (high - low + 1e-6) - 1).view(shape)
    instance_rows = torch.randint(0, 128, (256,), generator=g)
    images = ImageBatch(rgb=rgb, labels=labels, rows=rows, features=features, instance_rows=instance_rows)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    objects = labels["obj_detection"][:, 0] if "obj_detection" in labels else None
    return images, ((rgb / 255 - mean) / std, plain, objects, instance_rows)


def draw_ids(config, seed=2, shape=(2, 9)):
    """Token ids: one row with pads at its end, one with pads in between, as questions have them."""
    ids = torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = config.bos_id
    ids[0, 6:], ids[1, 3:5] = config.pad_id, config.pad_id
    return ids


def compare(model, plain, seed=1):
    """Context and logits of ours and of the plain model, in fp32 and, without its roundings, in float64.

    Batch norms of ours stay fp32, so that with experts there is no float64.
    """
    config = model.config
    images, (rgb, labels, objects, rows) = inputs(config, seed)
    ids = draw_ids(config)
    for dtype, relative in ((torch.float32, 1e-5), (torch.float64, 1e-6))[: 1 if config.experts else 2]:
        model, plain = model.to(dtype), plain.to(dtype)
        with torch.no_grad():
            ours = model.encode(images)
            theirs = plain.expert_encoder(rgb.to(dtype), {k: v.to(dtype) for k, v in labels.items()}, objects, rows)
            assert_close("context", ours, theirs, relative)
            assert_close("logits", logits_of(model.decoder, ids, ours), plain.text_decoder(ids, theirs), relative)
    plain.float()


def published_with(config):
    """The table, whose instance rows go with the objects."""
    table = published_keys(config)
    if "obj_detection" not in config.experts:
        table.pop(f"{VISION}instance_embedding", None)
    return table


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]
