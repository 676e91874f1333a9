"""Prismer with the published module tree, in plain torch and transformers, to compare with.

Nothing here comes from the library. `state_dict()` has the published names. The forward pass is written from the
formulas (arXiv:2303.02506), without regard to speed: labels come expanded to 64 channels, and nothing is cached or
fused. RoBERTa's layers are those of transformers.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from transformers import RobertaConfig
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfOutput

PLANES = {"depth": 1, "normal": 3, "seg": 64, "edge": 1, "obj_detection": 64, "ocr_detection": 64}
LOW_LEVEL = ("depth", "normal", "edge")


class Activation(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        if self.kind == "gelu":
            return 0.5 * x * (1 + torch.erf(x / 2**0.5))
        return torch.where(x > 0, x, torch.zeros_like(x)) ** 2


def feed_forward(width, kind):
    layers = [("c_fc", nn.Linear(width, 4 * width)), ("act", Activation(kind))]
    return nn.Sequential(OrderedDict([*layers, ("c_proj", nn.Linear(4 * width, width))]))


class Bottleneck(nn.Module):
    """The residual adaptor; its norm comes first on the vision side and last on the text side."""

    def __init__(self, width, late):
        super().__init__()
        self.adaptor = nn.Module()
        self.adaptor.down_proj, self.adaptor.up_proj = (nn.Linear(width, width), nn.Linear(width, width))
        self.adaptor_ln = nn.LayerNorm(width)
        self.late = late

    def forward(self, x):
        y = x if self.late else self.adaptor_ln(x)
        y = x + self.adaptor.up_proj(torch.relu(self.adaptor.down_proj(y)).square())
        return self.adaptor_ln(y) if self.late else y


class ClipBlock(nn.Module):
    def __init__(self, width, heads, kind):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = feed_forward(width, kind)


class ResamplerBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2, self.ln_ff = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = feed_forward(width, "squared_relu")

    def forward(self, z, x):
        q = self.ln_1(z)
        kv = torch.cat([q, self.ln_2(x)], dim=1)
        z = z + self.attn(q, kv, kv, need_weights=False)[0]
        return z + self.mlp(self.ln_ff(z))


def stem(expert, width, patch, label_size):
    scale = 16 if expert in LOW_LEVEL else 4
    side = label_size * scale // patch
    strides = (2, 2, 2, 2) if expert in LOW_LEVEL else (2, 2, 1, 1)
    layers = [nn.Upsample(size=(side, side), mode="bilinear", align_corners=True)]
    channels = [PLANES[expert], width // 8, width // 4, width // 2, width]
    for i in range(4):
        layers.append(nn.Conv2d(channels[i], channels[i + 1], 3, strides[i], 1, bias=False))
        layers += [nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1, bias=False))


def bicubic(table, side):
    old = round(len(table) ** 0.5)
    if old == side:
        return table
    image = table.view(old, old, -1).permute(2, 0, 1)[None]
    return F.interpolate(image, (side, side), mode="bicubic")[0].flatten(1).T


class Vision(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, p = c.vision_width, c.patch_size
        self.c = c
        self.conv1 = nn.ModuleDict({"rgb": nn.Conv2d(3, D, p, p, bias=False)})
        self.conv1.update({name: stem(name, D, p, c.label_size) for name in c.experts})
        self.positional_embedding = nn.Parameter(torch.zeros(c.grid**2, D))
        if "obj_detection" in c.experts:
            self.instance_embedding = nn.Parameter(torch.zeros(c.num_instances, D))
        self.ln_pre, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            nn.ModuleList([ClipBlock(D, c.vision_heads, c.vision_activation), Bottleneck(D, late=False)])
            for _ in range(c.vision_depth)
        )
        if c.experts:
            self.resampler = nn.Module()
            self.resampler.latents = nn.Parameter(torch.zeros(c.num_latents, D))
            self.resampler.perceiver_blocks = nn.ModuleList(
                ResamplerBlock(D, c.resampler_heads) for _ in range(c.resampler_depth)
            )

    def forward(self, rgb, labels, instances, row_of_instance):
        """rgb (B, 3, h, w) normalised; labels (B, planes, s, s) normalised or features; instances (B, s, s) ids."""
        x = self.conv1["rgb"](rgb).flatten(2).mT + self.positional_embedding
        if self.c.experts:
            tokens = []
            for name in reversed(self.c.experts):
                y = self.conv1[name](labels[name])
                side = y.shape[-1]
                y = y.flatten(2).mT
                if name == "obj_detection":
                    ids = F.interpolate(instances[:, None].float(), (side, side)).flatten(1).long()
                    y = y + self.instance_embedding[row_of_instance[ids]]
                tokens.append(y + bicubic(self.positional_embedding, side))
            z = self.resampler.latents.expand(len(rgb), -1, -1)
            for block in self.resampler.perceiver_blocks:
                z = block(z, torch.cat(tokens, 1))
            x = torch.cat([x, z], dim=1)
        x = self.ln_pre(x)
        for block, adaptor in self.transformer.resblocks:
            y = block.ln_1(x)
            x = adaptor(x + block.attn(y, y, y, need_weights=False)[0])
            x = x + block.mlp(block.ln_2(x))
        return self.ln_post(x)


class Cross(nn.Module):
    def __init__(self, config, context_width):
        super().__init__()
        H = config.hidden_size
        self.self, self.heads = nn.Module(), config.num_attention_heads
        self.self.query = nn.Linear(H, H)
        self.self.key, self.self.value = nn.Linear(context_width, H), nn.Linear(context_width, H)
        self.output = RobertaSelfOutput(config)

    def forward(self, h, context):
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = (split(self.self.query(h)), split(self.self.key(context)), split(self.self.value(context)))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.output((weights @ v).transpose(1, 2).flatten(2), h)


class Text(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, self.pad_id = c.text_width, c.pad_id
        config = RobertaConfig(
            vocab_size=c.vocab_size,
            hidden_size=H,
            num_hidden_layers=c.text_depth,
            num_attention_heads=c.text_heads,
            intermediate_size=c.text_mlp_width,
            layer_norm_eps=1e-5,
            is_decoder=True,
            attn_implementation="eager",
        )
        self.roberta = nn.Module()
        e = self.roberta.embeddings = nn.Module()
        e.register_buffer("position_ids", torch.arange(c.max_positions)[None])
        e.word_embeddings = nn.Embedding(c.vocab_size, H)
        e.position_embeddings = nn.Embedding(c.max_positions, H)
        e.token_type_embeddings = nn.Embedding(1, H)
        e.LayerNorm = nn.LayerNorm(H)
        self.roberta.encoder = nn.Module()
        self.roberta.encoder.layer = nn.ModuleList(
            nn.ModuleList([RobertaLayer(config), Cross(config, c.vision_width), Bottleneck(H, late=True)])
            for _ in range(c.text_depth)
        )
        self.roberta.encoder.output_layer = RobertaLayer(config)
        self.lm_head = nn.Module()
        self.lm_head.dense, self.lm_head.layer_norm = nn.Linear(H, H), nn.LayerNorm(H)
        self.lm_head.decoder = nn.Linear(H, c.vocab_size)
        # tied, and the bias has two names
        self.lm_head.decoder.weight, self.lm_head.bias = (e.word_embeddings.weight, self.lm_head.decoder.bias)

    def forward(self, ids, context):
        """(B, T) ids and (B, N, D) context -> (B, T, V) logits."""
        T, keep = ids.shape[1], ids != self.pad_id
        e = self.roberta.embeddings
        positions = keep.cumsum(1) * keep + self.pad_id
        h = e.word_embeddings(ids) + e.token_type_embeddings.weight[0] + e.position_embeddings(positions)
        h = e.LayerNorm(h)
        seen = keep[:, None] & torch.ones(T, T).tril().bool()
        mask = torch.zeros(seen.shape, dtype=h.dtype).masked_fill(~seen, torch.finfo(h.dtype).min)[:, None]
        for layer, cross, adaptor in self.roberta.encoder.layer:
            h = adaptor(cross(layer.attention(h, attention_mask=mask)[0], context))
            h = layer.output(layer.intermediate(h), h)
        last = self.roberta.encoder.output_layer
        h = last.attention(h, attention_mask=mask)[0]
        h = last.output(last.intermediate(h), h)
        return self.lm_head.decoder(self.lm_head.layer_norm(F.gelu(self.lm_head.dense(h))))


class PlainPrismer(nn.Module):
    """`expert_encoder.*` and `text_decoder.*`."""

    def __init__(self, config):
        super().__init__()
        self.expert_encoder, self.text_decoder = Vision(config), Text(config)


def randomise(module, seed=0, std=0.2):
    """Weights so large that a forgotten bias, norm or table shows; tensors of the same shape differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, mean, std):
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    with torch.no_grad():
        for name, tensor in module.named_parameters():
            # wide matrices get smaller weights, so that sums stay in bounds
            spread = std if tensor.dim() < 2 or "embedding" in name else min(std, 1.5 * tensor[0].numel() ** -0.5)
            is_scale = tensor.dim() == 1 and name.endswith("weight")
            draw(tensor, 1.0 if is_scale else 0.0, spread)
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                draw(tensor, 0.0, std)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
    return module.eval().requires_grad_(False)
