"""Proves the translation between our tensor names and the published ones in both directions, with shapes, for the whole
key table (docs/architecture.md). Run: pytest tests/model/test_published_keys.py"""

import pytest
import torch

from prismer.config import ALL_EXPERTS, preset
from prismer.model import Prismer
from prismer.weights.names import IGNORED, from_published, to_published

NUM_KEYS = {"base": 843, "base-z": 635, "large": 1443, "large-z": 1235, "huge": 1587, "huge-z": 1379}


def published_keys(config) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a published checkpoint, written from the key table alone."""
    D, H, V = config.vision_width, config.text_width, config.vocab_size
    keys: dict[str, tuple[int, ...]] = {}

    def pair(prefix: str, *shape: int) -> None:
        keys[f"{prefix}.weight"], keys[f"{prefix}.bias"] = shape, shape[:1]

    v = "expert_encoder."
    keys[v + "positional_embedding"] = (config.grid**2, D)
    keys[v + "conv1.rgb.weight"] = (D, 3, config.patch_size, config.patch_size)
    for e in config.experts:
        first = {"depth": 1, "edge": 1, "normal": 3}.get(e, 64)
        widths = [first, D // 8, D // 4, D // 2, D]
        for j in range(4):
            keys[f"{v}conv1.{e}.{1 + 3 * j}.weight"] = (widths[j + 1], widths[j], 3, 3)
            pair(f"{v}conv1.{e}.{2 + 3 * j}", widths[j + 1])
            for name in ("running_mean", "running_var"):
                keys[f"{v}conv1.{e}.{2 + 3 * j}.{name}"] = (widths[j + 1],)
            keys[f"{v}conv1.{e}.{2 + 3 * j}.num_batches_tracked"] = ()
        keys[f"{v}conv1.{e}.13.weight"] = (D, D, 1, 1)

    def attention(prefix: str) -> None:
        keys[f"{prefix}.attn.in_proj_weight"], keys[f"{prefix}.attn.in_proj_bias"] = (3 * D, D), (3 * D,)
        pair(f"{prefix}.attn.out_proj", D, D)
        pair(f"{prefix}.mlp.c_fc", 4 * D, D)
        pair(f"{prefix}.mlp.c_proj", D, 4 * D)

    for i in range(config.vision_depth):
        block = f"{v}transformer.resblocks.{i}"
        attention(f"{block}.0")
        pair(f"{block}.0.ln_1", D)
        pair(f"{block}.0.ln_2", D)
        pair(f"{block}.1.adaptor.down_proj", D, D)
        pair(f"{block}.1.adaptor.up_proj", D, D)
        pair(f"{block}.1.adaptor_ln", D)
    if config.experts:
        keys[v + "instance_embedding"] = (128, D)
        keys[v + "resampler.latents"] = (64, D)
        for j in range(4):
            block = f"{v}resampler.perceiver_blocks.{j}"
            attention(block)
            for name in ("ln_1", "ln_2", "ln_ff"):
                pair(f"{block}.{name}", D)
    pair(v + "ln_pre", D)
    pair(v + "ln_post", D)

    t = "text_decoder."
    keys[IGNORED] = (1, 514)
    keys[t + "roberta.embeddings.word_embeddings.weight"] = (V, H)
    keys[t + "roberta.embeddings.position_embeddings.weight"] = (514, H)
    keys[t + "roberta.embeddings.token_type_embeddings.weight"] = (1, H)
    pair(t + "roberta.embeddings.LayerNorm", H)

    def roberta_layer(prefix: str) -> None:
        for name in ("query", "key", "value"):
            pair(f"{prefix}.attention.self.{name}", H, H)
        pair(f"{prefix}.attention.output.dense", H, H)
        pair(f"{prefix}.attention.output.LayerNorm", H)
        pair(f"{prefix}.intermediate.dense", 4 * H, H)
        pair(f"{prefix}.output.dense", H, 4 * H)
        pair(f"{prefix}.output.LayerNorm", H)

    for i in range(config.text_depth):
        layer = f"{t}roberta.encoder.layer.{i}"
        roberta_layer(f"{layer}.0")
        pair(f"{layer}.1.self.query", H, H)
        pair(f"{layer}.1.self.key", H, D)
        pair(f"{layer}.1.self.value", H, D)
        pair(f"{layer}.1.output.dense", H, H)
        pair(f"{layer}.1.output.LayerNorm", H)
        pair(f"{layer}.2.adaptor.down_proj", H, H)
        pair(f"{layer}.2.adaptor.up_proj", H, H)
        pair(f"{layer}.2.adaptor_ln", H)
    roberta_layer(f"{t}roberta.encoder.output_layer")
    pair(t + "lm_head.dense", H, H)
    pair(t + "lm_head.layer_norm", H)
    keys[t + "lm_head.bias"] = (V,)
    pair(t + "lm_head.decoder", V, H)
    return keys


@pytest.mark.parametrize("name", NUM_KEYS)
def test_names_and_shapes_are_those_of_the_key_table(name):
    config = preset(name)
    table = published_keys(config)
    assert len(table) == NUM_KEYS[name]
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in Prismer(config).state_dict().items()}
    written = {theirs: shape for key, shape in ours.items() for theirs in to_published(key)}
    assert written == {key: shape for key, shape in table.items() if key != IGNORED}
    read = {from_published(key): shape for key, shape in table.items() if key != IGNORED}
    assert read == ours


def test_the_positional_table_at_480_px_has_900_rows():
    config = preset("base", image_size=480)
    assert published_keys(config)["expert_encoder.positional_embedding"] == (900, 768)


def test_names_of_other_models_are_not_translated():
    assert from_published(IGNORED) is None
    assert from_published("visual.proj") is None
    with pytest.raises(KeyError, match="no tensor of Prismer"):
        to_published("encoder.blocks.0.attn.in_proj_weight.more")


def test_every_expert_has_its_own_names():
    names = [to_published(f"encoder.stems.{e}.project.weight")[0] for e in ALL_EXPERTS]
    assert len(set(names)) == len(ALL_EXPERTS)
