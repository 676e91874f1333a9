"""One layer in each kind of module that `apply_to` replaces, for the tests that change it."""

import torch
from torch import nn

from tests.ops import resampler_families, tower_families
from tests.ops.patching import randomise

_BLOCK, _CLIP, _BERT = "transformer.resblocks.0", "text_model.encoder.layers.0", "encoder.layer.0"
LAYERS = {
    # name: family, name of the replaced module that holds the layer, name of the layer in it
    "open_clip mlp": ("open_clip-gelu", _BLOCK, "mlp.c_fc"),
    "clip mlp": ("clip", f"{_CLIP}.mlp", "fc2"),
    "clip attention": ("clip", f"{_CLIP}.self_attn", "k_proj"),
    "dinov2 mlp": ("dinov2", "encoder.layer.0.mlp", "fc1"),
    "vit attention": ("vit", "layers.0.attention", "q_proj"),
    "blip attention": ("blip", "vision_model.encoder.layers.0.self_attn", "qkv"),
    "blip2 attention": ("blip2-vision", "encoder.layers.0.self_attn", "qkv"),
    "bert mlp": ("bert-padded", _BERT, "intermediate.dense"),
    "bert attention": ("bert-padded", f"{_BERT}.attention.self", "value"),
    "blip text attention": ("blip-text", f"{_BERT}.crossattention.self", "query"),
    "qformer attention": ("qformer", f"{_BERT}.attention.attention", "query"),
    "qformer mlp": ("qformer", _BERT, "output_query.dense"),
    "idefics": ("idefics", "", "blocks.1.0.k_proj"),
    "idefics mlp": ("idefics", "", "blocks.0.1.fc"),
    "idefics2": ("idefics2-masked", "", "layers.1.mlp.up_proj"),
    "flamingo": ("flamingo-pytorch", "", "layers.0.0.to_q"),
}
NORMS = {
    "open_clip norm": ("open_clip-gelu", _BLOCK, "ln_2"),
    "clip norm": ("clip", _CLIP, "layer_norm2"),
    "bert norm": ("bert-padded", f"{_BERT}.attention.output", "LayerNorm"),
    "bert mlp's norm": ("bert-padded", _BERT, "output.LayerNorm"),
    "idefics norm": ("idefics", "", "blocks.1.0.context_layer_norm"),
    "flamingo norm": ("flamingo-pytorch", "", "layers.1.1.0"),
}


def build_with_layer(layer: str) -> tuple[nn.Module, dict, str, str]:
    """A model, its inputs, the name of the module that is replaced, and that of the layer in it."""
    family, holder, name = {**LAYERS, **NORMS}[layer]
    torch.manual_seed(0)
    if family in resampler_families.FAMILIES:
        return *resampler_families.build_resampler(family), holder, name
    build, inputs, _ = tower_families.FAMILIES[family]
    return randomise(build()), inputs(), holder, name


def full_name(holder: str, name: str) -> str:
    """The name of a layer in the model."""
    return f"{holder}.{name}".strip(".")
