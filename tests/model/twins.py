"""The same weights in models of other libraries: open_clip's towers, and transformers' RoBERTa as our decoder.

What differs between these models and Prismer, and what is done about it:
- open_clip's tower has a class token; its key is masked, so that patch tokens do not see it.
- Prismer's blocks have adaptors. On the vision side they are zeroed. On the text side a zeroed sub-layer is not the
  identity, since its norm comes after the residual. So cross-attention and adaptor are either removed, or added to
  transformers' model: its layers have the cross-attention, and a hook applies the adaptor, written in plain torch.
- Prismer's last text layer has no cross-attention; transformers' model has one layer more, without cross-attention.
- transformers projects image tokens of the text width alone; its key and value layers are replaced by wider ones.
"""

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from transformers import RobertaConfig, RobertaForCausalLM

from prismer.config import PrismerConfig
from prismer.model import Prismer
from prismer.text import TextDecoder
from prismer.weights.names import from_clip, to_published
from tests.model.plain_published import randomise


def assert_close(name, ours, theirs, relative=1e-5):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= relative, f"{name} is off by {error:.2g} of its largest entry, allowed {relative:.2g}"


TOWERS = {
    "B16": dict(patch_size=16, image_size=224, width=768, layers=2, heads=12, quick=True),
    "L14": dict(patch_size=14, image_size=112, width=1024, layers=2, heads=16, quick=True),
    "H14": dict(patch_size=14, image_size=112, width=1280, layers=2, heads=16, quick=False),
    "odd": dict(patch_size=8, image_size=60, width=96, layers=5, heads=3, quick=False),
}


def build_towers(name, dtype=torch.float32):
    """open_clip's tower, and our model with the same weights and no experts."""
    tower = dict(TOWERS[name])
    quick = tower.pop("quick")
    activation = open_clip.transformer.QuickGELU if quick else nn.GELU
    theirs = open_clip.transformer.VisionTransformer(**tower, mlp_ratio=4.0, output_dim=16, act_layer=activation)
    theirs = randomise(theirs).to(dtype)
    config = PrismerConfig(
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        vision_width=tower["width"],
        vision_depth=tower["layers"],
        vision_heads=tower["heads"],
        vision_activation="quick_gelu" if quick else "gelu",
        experts=(),
        text_width=16,
        text_depth=1,
        text_heads=2,
        text_mlp_width=16,
        vocab_size=20,
    )
    ours = Prismer(config).eval().to(dtype)
    own = ours.state_dict()
    for key, tensor in theirs.state_dict(prefix="visual.").items():
        name = from_clip(key)
        if name is not None:
            own[name].copy_(tensor[1:] if name == "encoder.positional_embedding" else tensor)
    return ours, theirs


def open_clip_tokens(visual, images):
    """Patch tokens of open_clip's tower as if there were no class token: the one difference to Prismer's encoder.

    The tower runs as it is; its attention is masked so that no query sees the class token's key.
    """
    x = visual._embeds(images)
    mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    mask[:, 0] = float("-inf")
    return visual.ln_post(visual.transformer(x, attn_mask=mask))[:, 1:]


def encode_without_adaptors(model, images):
    """Our encoder's blocks, adaptors zeroed, on normalised pixels."""
    for block in model.encoder.blocks:
        torch.nn.init.zeros_(block.adaptor.up.weight)
        torch.nn.init.zeros_(block.adaptor.up.bias)
    encoder = model.encoder
    x = encoder.ln_pre(encoder.stems["rgb"](images).flatten(2).mT + encoder.positional_embedding)
    for block in encoder.blocks:
        x = block(x)
    return encoder.ln_post(x)


DECODERS = {
    "base": dict(text_width=768, text_depth=2, text_heads=12, text_mlp_width=3072, vision_width=768, vocab_size=2000),
    "huge": dict(text_width=256, text_depth=3, text_heads=4, text_mlp_width=512, vision_width=320, vocab_size=300),
    "odd": dict(text_width=24, text_depth=4, text_heads=2, text_mlp_width=40, vision_width=40, vocab_size=29),
}


class NoCrossAttention(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states, None


def build_decoders(name, dtype=torch.float32, cross=True, seed=0):
    """Our decoder, and transformers' model of one layer more with the same weights, `cross` with what is new."""
    sizes = DECODERS[name]
    config = PrismerConfig(**sizes, vision_heads=8, max_positions=40, resampler_heads=8)
    ours = randomise(TextDecoder(config), seed)
    # ends come now and then, pads never: transformers counts no position for a pad that a model writes
    ours.head.bias[config.eos_id] += 1.5
    ours.head.bias[config.pad_id] -= 40.0
    depth = config.text_depth
    theirs = RobertaForCausalLM(
        RobertaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            num_hidden_layers=depth + 1,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_mlp_width,
            is_decoder=True,
            max_position_embeddings=config.max_positions,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            add_cross_attention=cross,
        )
    ).eval()
    layers = theirs.roberta.encoder.layer
    for layer, our_layer in zip(layers if cross else (), ours.layers, strict=False):
        attention = layer.crossattention
        for part in ("key", "value"):
            setattr(attention.self, part, nn.Linear(config.vision_width, config.text_width))
        attention.register_forward_hook(plain_adaptor(our_layer.adaptor))
    if cross:
        layers[-1].crossattention = NoCrossAttention()
    else:
        for layer in ours.layers:
            layer.cross.forward = lambda x, *_: x
            layer.adaptor.forward = lambda x: x
    own = theirs.state_dict()
    filled = set()
    for key, tensor in ours.state_dict().items():
        if ".adaptor." in key or (".cross." in key and not cross):
            continue
        for name in to_published(f"decoder.{key}"):
            name = name.removeprefix("text_decoder.").replace("output_layer.", f"layer.{depth}.0.")
            name = name.replace(".1.self.", ".crossattention.self.").replace(".1.output.", ".crossattention.output.")
            for i in range(depth + 1):
                name = name.replace(f"layer.{i}.0.", f"layer.{i}.").replace(f"{i}.0.", f"{i}.")
                name = name.replace(f"layer.{i}.1.", f"layer.{i}.")
            own[name].copy_(tensor)
            filled.add(name)
    assert filled == set(own), set(own) ^ filled
    return ours.to(dtype), theirs.to(dtype).requires_grad_(False)


def plain_adaptor(module):
    """A hook that applies our adaptor, in plain torch, to what transformers' cross-attention gives."""
    down, up, norm = module.down, module.up, module.norm

    def hook(_, __, output):
        x = output[0]
        h = torch.relu(x @ down.weight.T + down.bias) ** 2
        return F.layer_norm(x + (h @ up.weight.T + up.bias), x.shape[-1:], norm.weight, norm.bias), output[1]

    return hook


def ids_of(config, rows=2, length=11):
    ids = torch.randint(3, config.vocab_size, (rows, length))
    ids[:, 0] = config.bos_id
    # one text ends early, one has its pads in between, as a question and its answer do
    ids[0, 7:], ids[1, 4:6] = config.pad_id, config.pad_id
    return ids


def theirs_logits(model, ids, context=None):
    return model(ids, attention_mask=ids.ne(1).long(), encoder_hidden_states=context).logits
