"""Rules for perceiver resamplers and the cross-attention to them, of transformers, flamingo-pytorch and open_flamingo.

A resampler is replaced as a whole: its layers share their inputs, which are then normalised once instead of in every
layer, a residual sum belongs to the norm that follows it, and of the inputs one tensor is kept for the backward pass,
however many layers there are. A resampler that has to be kept still has its norms and attentions replaced if they fit.

What a patched `forward` is not made for (inputs of another dtype than the weights, options that only the original
knows) runs the original forward of the same module.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.patch.core import Rule, own_class, qualified_name, unlike
from prismer.kernels.patch.resampler_projections import resampler_projections
from prismer.kernels.patch.rms_norm import add_rms_norm, rms_norm
from prismer.kernels.resampler_attention import standardise

_LUCIDRAINS = ("flamingo_pytorch.flamingo_pytorch", "open_flamingo.src.helpers")
_IDEFICS = "transformers.models.idefics.perceiver"
_IDEFICS2 = "transformers.models.idefics2.modeling_idefics2"


# what all of them are made of


def _fused_takes(module: nn.Module, *tensors: Tensor) -> bool:
    """Whether these inputs are such as the fused forward is made for."""
    weight = next(module.parameters())
    return all(
        isinstance(t, Tensor) and (t.dtype, t.device) == (weight.dtype, weight.device) and t.numel() for t in tensors
    )


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * K) -> (B, H, N, K)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H * K)."""
    return x.transpose(1, 2).flatten(2)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return linears(x, [(layer.weight, layer.bias)])[0]


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def _add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def _resample(latents: Tensor, x: Tensor, layers, media_norm, latents_norm, attend, mlp_norm, feed_forward, final):
    """The stack of pre-norm layers of a Flamingo-like resampler.

    Args:
        latents: (M, D).
        x: (B, L, D) inputs.
        layers: pairs of attention and feed-forward modules.
        media_norm, latents_norm: attention module -> its layer norm of the inputs and of the latents.
        attend: (attention module, normalised latents, standardised inputs) -> (B, M, D).
        mlp_norm, feed_forward: feed-forward module -> its layer norm; and (module, normalised latents) -> (B, M, D).
        final: the last layer norm.

    Returns:
        (B, M, D).
    """
    x_hat = standardise(x, media_norm(layers[0][0]).eps)
    z, update = latents.expand(len(x), -1, -1).contiguous(), None
    for attn, ff in layers:
        norm = latents_norm(attn)
        y, z = (_norm(z, norm), z) if update is None else _add_norm(update, z, norm)
        y, z = _add_norm(attend(attn, y, x_hat), z, mlp_norm(ff))
        update = feed_forward(ff, y)
    return _add_norm(update, z, final)[0]


# why a module is kept


def _unlike(module: nn.Module, kinds: dict[str, str | tuple[str, ...]]) -> str | None:
    """None if the sub-modules named are of the classes given and plain, else the reason."""
    reason = unlike(module, kinds)
    if reason is not None:
        return reason
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and child.bias is not None:
            return f"its {name} has a bias, and this family has none"
        if isinstance(child, nn.GELU) and child.approximate != "none":
            return f"its {name} is the {child.approximate} approximation, and the fused one is exact"
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) > 1:
        return f"its parameters are of {len(dtypes)} dtypes, and the fused forward takes one"
    return None


_LINEAR, _LAYER_NORM = qualified_name(nn.Linear), qualified_name(nn.LayerNorm)


# flamingo-pytorch and open_flamingo: packed keys and values, no biases

_LUCID_ATTENTION = dict(norm_media=_LAYER_NORM, norm_latents=_LAYER_NORM, to_q=_LINEAR, to_kv=_LINEAR, to_out=_LINEAR)
_LUCID_FF = {"0": _LAYER_NORM, "1": _LINEAR, "2": qualified_name(nn.GELU), "3": _LINEAR}


def _lucid_attend(attn: nn.Module, y: Tensor, x_hat: Tensor) -> Tensor:
    media, H = attn.norm_media, attn.heads
    q, k, v = resampler_projections(y, x_hat, media.weight, media.bias, attn.to_q.weight, attn.to_kv.weight, None)
    out = attention(_heads(q, H), _heads(k, H), _heads(v, H), scale=attn.scale)
    return _linear(_merge(out), attn.to_out)


def _lucid_attention_forward(self, x, latents):
    if not _fused_takes(self, x, latents) or x.shape[:-2] != latents.shape[:-2] or x.dim() != 4:
        return self.prismer_class.forward(self, x, latents)
    y = _norm(latents.flatten(0, 1), self.norm_latents)
    out = _lucid_attend(self, y, standardise(x.flatten(0, 1), self.norm_media.eps))
    return out.view(latents.shape)


def _lucid_resample(self, x: Tensor) -> Tensor:
    """(B, T, L, D) -> (B, T, M, D)."""
    out = _resample(
        self.latents,
        x.flatten(0, 1),
        self.layers,
        media_norm=lambda attn: attn.norm_media,
        latents_norm=lambda attn: attn.norm_latents,
        attend=_lucid_attend,
        mlp_norm=lambda ff: ff[0],
        feed_forward=lambda ff, y: mlp(y, ff[1].weight, None, ff[3].weight, None, activation="gelu"),
        final=self.norm,
    )
    return out.view(*x.shape[:2], *self.latents.shape)


def _flamingo_pytorch_forward(self, x):
    if not _fused_takes(self, x) or x.dim() not in (3, 4):
        return self.prismer_class.forward(self, x)
    x = x.unsqueeze(1) if x.dim() == 3 else x
    return _lucid_resample(self, x + self.media_pos_emb[: x.shape[1]])


def _open_flamingo_forward(self, x):
    if not _fused_takes(self, x) or x.dim() != 5:
        return self.prismer_class.forward(self, x)
    if self.frame_embs is not None:
        x = x + self.frame_embs[: x.shape[2], None]
    x = x.flatten(2, 3)
    if self.media_time_embs is not None:
        x = x + self.media_time_embs[: x.shape[1]]
    return _lucid_resample(self, x)


def _check_lucid(package: str):
    def check(module):
        if not len(module.layers):
            return "it has no layers"
        kinds = {"norm": _LAYER_NORM}
        for i in range(len(module.layers)):
            kinds[f"layers.{i}.0"] = f"{package}.PerceiverAttention"
            kinds |= {f"layers.{i}.0.{name}": kind for name, kind in _LUCID_ATTENTION.items()}
            kinds[f"layers.{i}.1"] = qualified_name(nn.Sequential)
            kinds |= {f"layers.{i}.1.{name}": kind for name, kind in _LUCID_FF.items()}
        reason = _unlike(module, kinds)
        if reason is not None:
            return reason
        for i, (_, ff) in enumerate(module.layers):
            if len(ff) != len(_LUCID_FF):
                return f"its layers.{i}.1 has {len(ff)} parts, not a norm, two products and an activation"
        return _one_eps(attn.norm_media.eps for attn, _ in module.layers)

    return check


def _one_eps(found) -> str | None:
    if len(set(found)) > 1:
        return "its layers normalise the inputs with different eps, and the fused forward does so once"
    return None


# the language model's cross-attention to the resampled media


def _seen(self, media_locations: Tensor, T: int, m: int, N: int, cached: bool) -> tuple[Tensor, Tensor]:
    """(B, N, T * m), which media latents a token sees; and (B, N), whether a medium came before it."""
    if cached:
        text_time = media_locations.count_nonzero(dim=1)[:, None].expand(-1, N)
    else:
        text_time = media_locations.cumsum(-1)
    media_time = torch.arange(1, T + 1, device=text_time.device).repeat_interleave(m)
    compare = torch.eq if self.only_attend_immediate_media else torch.ge
    return compare(text_time[..., None], media_time), text_time > 0


def _cross_attention_forward(self, x, media, media_locations=None, use_cached_media=None):
    short = media_locations is not None and not use_cached_media and media_locations.shape != x.shape[:2]
    if not _fused_takes(self, x, media) or short:
        # flamingo-pytorch has no fourth argument
        more = () if use_cached_media is None else (use_cached_media,)
        return self.prismer_class.forward(self, x, media, media_locations, *more)
    _, T, m, _ = media.shape
    H = self.heads
    q = _heads(_linear(_norm(x, self.norm), self.to_q), H)
    k, v = (_heads(t, H) for t in _linear(media.flatten(1, 2), self.to_kv).chunk(2, -1))
    if media_locations is None:
        return _linear(_merge(attention(q, k, v, scale=self.scale)), self.to_out)
    seen, after_media = _seen(self, media_locations, T, m, x.shape[1], bool(use_cached_media))
    # a token that sees nothing takes the mean of all values in the original, whatever its query is
    nothing = ~seen.any(-1)
    q = q.masked_fill(nothing[:, None, :, None], 0.0)
    mask = (seen | nothing[..., None])[:, None]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
    out = _merge(out)
    if self.only_attend_immediate_media:
        out = out.masked_fill(~after_media[..., None], 0.0)
    return _linear(out, self.to_out)


# IDEFICS


def _idefics_attend(attn: nn.Module, y: Tensor, x_hat: Tensor) -> Tensor:
    norm, H = attn.context_layer_norm, attn.n_heads
    q, k, v = resampler_projections(
        y, x_hat, norm.weight, norm.bias, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
    )
    if attn.qk_layer_norms:
        q = _norm(q.unflatten(2, (H, -1)), attn.q_layer_norm).flatten(2)
        k = _norm(k.unflatten(2, (H, -1)), attn.k_layer_norm).flatten(2)
    out = attention(_heads(q, H), _heads(k, H), _heads(v, H), scale=attn.qk_scale)
    return _linear(_merge(out), attn.output_proj)


def _idefics_attention_forward(self, context, latents):
    if not _fused_takes(self, context, latents) or context.dim() != 3 or latents.dim() != 3:
        return self.prismer_class.forward(self, context, latents)
    y = _norm(latents, self.latents_layer_norm)
    return _idefics_attend(self, y, standardise(context, self.context_layer_norm.eps))


def _idefics_forward(self, context):
    if not _fused_takes(self, context) or context.dim() != 3:
        return self.prismer_class.forward(self, context)
    return _resample(
        self.latents,
        context,
        self.blocks,
        media_norm=lambda attn: attn.context_layer_norm,
        latents_norm=lambda attn: attn.latents_layer_norm,
        attend=_idefics_attend,
        mlp_norm=lambda ff: ff.ln,
        # relu keeps its own output, which is what the next product keeps too
        feed_forward=lambda ff, y: _linear(torch.relu(_linear(y, ff.fc)), ff.c_proj),
        final=self.layer_norm,
    )


def _idefics_attention_kinds(attn: nn.Module) -> dict[str, str]:
    norms = ["context_layer_norm", "latents_layer_norm"]
    norms += ["q_layer_norm", "k_layer_norm"] if attn.qk_layer_norms else []
    products = "q_proj", "k_proj", "v_proj", "output_proj"
    return dict.fromkeys(norms, _LAYER_NORM) | dict.fromkeys(products, _LINEAR)


def _check_idefics(module):
    if not len(module.blocks):
        return "it has no blocks"
    kinds = {"layer_norm": _LAYER_NORM}
    for i, (attn, _) in enumerate(module.blocks):
        kinds[f"blocks.{i}.0"] = f"{_IDEFICS}.IdeficsPerceiverAttention"
        kinds[f"blocks.{i}.1"] = f"{_IDEFICS}.IdeficsMLP"
        if qualified_name(own_class(attn)) == kinds[f"blocks.{i}.0"]:
            names = _idefics_attention_kinds(attn)
            kinds |= {f"blocks.{i}.0.{name}": kind for name, kind in names.items()}
        kinds |= {f"blocks.{i}.1.fc": _LINEAR, f"blocks.{i}.1.c_proj": _LINEAR}
        kinds |= {f"blocks.{i}.1.ln": _LAYER_NORM, f"blocks.{i}.1.act": qualified_name(nn.ReLU)}
    return _unlike(module, kinds) or _one_eps(attn.context_layer_norm.eps for attn, _ in module.blocks)


# Idefics2: RMS norms, fewer heads of keys than of queries, a mask, a gated feed-forward


def _idefics2_attend(attn: nn.Module, y: Tensor, x_hat: Tensor, norm: nn.Module, key_mask: Tensor | None) -> Tensor:
    (B, M, _), H, K = y.shape, attn.num_key_value_heads, attn.head_dim
    q, k, v = resampler_projections(
        y, x_hat, norm.weight, None, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
    )
    # the G queries that share a head of keys are so many more rows of one head: nothing is repeated
    G = attn.num_key_value_groups
    q = q.view(B, M, H, G, K).permute(0, 2, 3, 1, 4).reshape(B, H, G * M, K)
    out = attention(q, _heads(k, H), _heads(v, H), key_mask=key_mask, scale=attn.scaling)
    out = out.unflatten(2, (G, M)).permute(0, 3, 1, 2, 4).reshape(B, M, H * G * K)
    return _linear(out, attn.o_proj)


def _idefics2_forward(self, context=None, attention_mask=None, **options):
    if (
        options
        or not _fused_takes(self, context)
        or context.dim() != 3
        or attention_mask is None
        or attention_mask.shape != context.shape[:2]
        # the fused op would drop other weights than torch does for the same seed
        or (self.training and any(layer.self_attn.attention_dropout for layer in self.layers))
    ):
        return self.prismer_class.forward(self, context, attention_mask, **options)
    z = self.latents.expand(len(context), -1, -1).contiguous()
    key_mask = nn.functional.pad(attention_mask.bool(), (0, z.shape[1]), value=True)
    x_hat = rms_norm(context, None, self.rms_norm_eps)
    update = None
    for layer in self.layers:
        norm, after, gated = layer.input_latents_norm, layer.post_attention_layernorm, layer.mlp
        if update is None:
            y = rms_norm(z, norm.weight, norm.variance_epsilon)
        else:
            y, z = add_rms_norm(update, z, norm.weight, norm.variance_epsilon)
        update = _idefics2_attend(layer.self_attn, y, x_hat, layer.input_context_norm, key_mask)
        y, z = add_rms_norm(update, z, after.weight, after.variance_epsilon)
        gate, up = linears(y, [(gated.gate_proj.weight, None), (gated.up_proj.weight, None)])
        update = _linear(gated.act_fn(gate) * up, gated.down_proj)
    return add_rms_norm(update, z, self.norm.weight, self.norm.variance_epsilon)[0]


def _check_idefics2(module):
    norm = f"{_IDEFICS2}.Idefics2RMSNorm"
    norms = "input_latents_norm", "input_context_norm", "post_attention_layernorm"
    products = [f"self_attn.{name}_proj" for name in "qkvo"]
    products += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    kinds = {"norm": norm}
    for i in range(len(module.layers)):
        kinds[f"layers.{i}"] = f"{_IDEFICS2}.Idefics2PerceiverLayer"
        kinds[f"layers.{i}.self_attn"] = f"{_IDEFICS2}.Idefics2PerceiverAttention"
        kinds[f"layers.{i}.mlp"] = f"{_IDEFICS2}.Idefics2MLP"
        kinds |= {f"layers.{i}.{name}": norm for name in norms}
        kinds |= {f"layers.{i}.{name}": _LINEAR for name in products}
    reason = _unlike(module, kinds)
    eps = [module.rms_norm_eps, *(layer.input_context_norm.variance_epsilon for layer in module.layers)]
    return reason or _one_eps(eps)


def _check_plain(kinds):
    return lambda module: _unlike(module, kinds(module) if callable(kinds) else kinds)


_RULES = (
    *(
        Rule("resampler", f"{package}.PerceiverResampler", {"forward": forward}, _check_lucid(package), ("norm",))
        for package, forward in zip(_LUCIDRAINS, (_flamingo_pytorch_forward, _open_flamingo_forward), strict=True)
    ),
    *(
        Rule(
            "attention",
            f"{package}.PerceiverAttention",
            {"forward": _lucid_attention_forward},
            _check_plain(_LUCID_ATTENTION),
            tuple(_LUCID_ATTENTION),
        )
        for package in _LUCIDRAINS
    ),
    *(
        Rule(
            "attention",
            f"{package}.MaskedCrossAttention",
            {"forward": _cross_attention_forward},
            _check_plain({}),
            ("norm", "to_q", "to_kv", "to_out"),
        )
        for package in _LUCIDRAINS
    ),
    Rule(
        "resampler",
        f"{_IDEFICS}.IdeficsPerceiverResampler",
        {"forward": _idefics_forward},
        _check_idefics,
        ("layer_norm",),
    ),
    Rule(
        "attention",
        f"{_IDEFICS}.IdeficsPerceiverAttention",
        {"forward": _idefics_attention_forward},
        _check_plain(_idefics_attention_kinds),
        ("q_proj", "k_proj", "v_proj", "output_proj"),
    ),
    Rule(
        "resampler",
        f"{_IDEFICS2}.Idefics2PerceiverResampler",
        {"forward": _idefics2_forward},
        _check_idefics2,
        ("layers.0.self_attn.q_proj",),
    ),
)
RULES = tuple(replace(rule, one_dtype=True) for rule in _RULES)
