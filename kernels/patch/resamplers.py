"""Rules for perceiver resamplers and the cross-attention to them, of transformers, flamingo-pytorch and open_flamingo.

A resampler is replaced as a whole. Its layers share their inputs, so the inputs are normalised once instead of in
every layer, and autograd saves one tensor of them for all layers. Each residual sum is fused with the norm that
follows it. If a resampler has to be kept, its norms and attentions are still replaced where they fit.

Calls that a fused forward does not support (inputs of another dtype than the weights, options that only the original
has) run the original forward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.patch.layers import add_norm, apply_linears, apply_mlp, apply_norm, merge_heads, split_heads
from prismer.kernels.patch.resampler_projections import resampler_projections
from prismer.kernels.patch.rms_norm import add_rms_norm, rms_norm
from prismer.kernels.patch.rules import Rule, qualified_name, reason_wrong_class, unpatched_class
from prismer.kernels.resampler_attention import standardise

_LINEAR, _LAYER_NORM = qualified_name(nn.Linear), qualified_name(nn.LayerNorm)


# what all resamplers share


def _is_supported(module: nn.Module, *tensors: object) -> bool:
    """Whether these inputs are tensors, not empty, with the dtype and device of the weights."""
    weight = next(module.parameters())
    return all(
        isinstance(t, Tensor) and (t.dtype, t.device) == (weight.dtype, weight.device) and t.numel() for t in tensors
    )


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return apply_linears(x, layer)[0]


def _resample(
    latents: Tensor,
    x: Tensor,
    eps: float,
    layers: Iterable[tuple[nn.LayerNorm, Callable, nn.LayerNorm, Callable]],
    final_norm: nn.LayerNorm,
) -> Tensor:
    """Run the pre-norm layers of a Flamingo-like resampler.

    Args:
        latents: (M, D).
        x: (B, L, D), the inputs.
        eps: of the norms of the inputs.
        layers: of each, its norm of the latents; its attention, (normalised latents, standardised inputs) -> (B, M, D);
            its norm before the feed-forward; its feed-forward, normalised latents -> (B, M, D).
        final_norm: comes after the last layer.

    Returns:
        (B, M, D).
    """
    x_hat = standardise(x, eps)
    z = latents.expand(len(x), -1, -1).contiguous()
    update: Any = None
    for latents_norm, attend, mlp_norm, feed_forward in layers:
        y, z = (apply_norm(z, latents_norm), z) if update is None else add_norm(update, z, latents_norm)
        y, z = add_norm(attend(y, x_hat), z, mlp_norm)
        update = feed_forward(y)
    return add_norm(update, z, final_norm)[0]


def _reason_other_layers(module: nn.Module, classes: Mapping[str, str]) -> str | None:
    """Keep a module unless its sub-modules have the classes given, no biases, exact GELUs and one dtype."""
    reason = reason_wrong_class(module, classes)
    if reason is not None:
        return reason
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and child.bias is not None:
            return f"its {name} has a bias, and the fused forward has none"
        if isinstance(child, nn.GELU) and child.approximate != "none":
            return f"its {name} is the {child.approximate} approximation, and the fused one is exact"
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) > 1:
        return f"its parameters are of {len(dtypes)} dtypes, and the fused forward takes one"
    return None


def _reason_several_eps(found: Iterable[float]) -> str | None:
    if len(set(found)) > 1:
        return "its layers normalise the inputs with different eps, and the fused forward normalises them once"
    return None


def _check_layers(classes: Mapping[str, str]) -> Callable[[nn.Module], str | None]:
    return lambda module: _reason_other_layers(module, classes)


# flamingo-pytorch and open_flamingo: packed keys and values, no biases

_FLAMINGO_ATTENTION = dict(
    norm_media=_LAYER_NORM, norm_latents=_LAYER_NORM, to_q=_LINEAR, to_kv=_LINEAR, to_out=_LINEAR
)
_FLAMINGO_FEED_FORWARD = {"0": _LAYER_NORM, "1": _LINEAR, "2": qualified_name(nn.GELU), "3": _LINEAR}


def _flamingo_attend(attn: Any, y: Tensor, x_hat: Tensor) -> Tensor:
    media = attn.norm_media
    parts = resampler_projections(y, x_hat, media.weight, media.bias, attn.to_q.weight, attn.to_kv.weight, None)
    q, k, v = (split_heads(t, num_heads=attn.heads) for t in parts)
    return _linear(merge_heads(attention(q, k, v, scale=attn.scale)), attn.to_out)


def _flamingo_attention_forward(self: Any, x: Tensor, latents: Tensor) -> Tensor:
    if not _is_supported(self, x, latents) or x.shape[:-2] != latents.shape[:-2] or x.dim() != 4:
        return NotImplemented
    y = apply_norm(latents.flatten(0, 1), self.norm_latents)
    out = _flamingo_attend(self, y, standardise(x.flatten(0, 1), self.norm_media.eps))
    return out.view(latents.shape)


def _flamingo_feed_forward(ff: Any, y: Tensor) -> Tensor:
    return apply_mlp(y, ff[1], ff[2], ff[3])


def _flamingo_resample(self: Any, x: Tensor) -> Tensor:
    """(B, T, L, D) -> (B, T, M, D)."""
    layers = [
        (attn.norm_latents, partial(_flamingo_attend, attn), ff[0], partial(_flamingo_feed_forward, ff))
        for attn, ff in self.layers
    ]
    eps = self.layers[0][0].norm_media.eps
    out = _resample(self.latents, x.flatten(0, 1), eps, layers, self.norm)
    return out.view(*x.shape[:2], *self.latents.shape)


def _flamingo_pytorch_forward(self: Any, x: Tensor) -> Tensor:
    if not _is_supported(self, x) or x.dim() not in (3, 4):
        return NotImplemented
    x = x.unsqueeze(1) if x.dim() == 3 else x
    return _flamingo_resample(self, x + self.media_pos_emb[: x.shape[1]])


def _open_flamingo_forward(self: Any, x: Tensor) -> Tensor:
    if not _is_supported(self, x) or x.dim() != 5:
        return NotImplemented
    if self.frame_embs is not None:
        x = x + self.frame_embs[: x.shape[2], None]
    x = x.flatten(2, 3)
    if self.media_time_embs is not None:
        x = x + self.media_time_embs[: x.shape[1]]
    return _flamingo_resample(self, x)


def _check_flamingo(package: str) -> Callable[[nn.Module], str | None]:
    def check(module: Any) -> str | None:
        if not len(module.layers):
            return "it has no layers"
        classes = {"norm": _LAYER_NORM}
        for i in range(len(module.layers)):
            classes[f"layers.{i}.0"] = f"{package}.PerceiverAttention"
            classes |= {f"layers.{i}.0.{name}": kind for name, kind in _FLAMINGO_ATTENTION.items()}
            classes[f"layers.{i}.1"] = qualified_name(nn.Sequential)
            classes |= {f"layers.{i}.1.{name}": kind for name, kind in _FLAMINGO_FEED_FORWARD.items()}
        reason = _reason_other_layers(module, classes)
        if reason is not None:
            return reason
        for i, (_, ff) in enumerate(module.layers):
            if len(ff) != len(_FLAMINGO_FEED_FORWARD):
                return f"its layers.{i}.1 has {len(ff)} parts, not a norm, two linears and an activation"
        return _reason_several_eps(attn.norm_media.eps for attn, _ in module.layers)

    return check


# the language model's cross-attention to the resampled media


def _visible_media(
    self: Any, media_locations: Tensor, T: int, M: int, N: int, is_cached: bool
) -> tuple[Tensor, Tensor]:
    """Which media latents each token sees, (B, N, T * M), and whether a medium comes before the token, (B, N)."""
    if is_cached:
        text_time = media_locations.count_nonzero(dim=1)[:, None].expand(-1, N)
    else:
        text_time = media_locations.cumsum(-1)
    media_time = torch.arange(1, T + 1, device=text_time.device).repeat_interleave(M)
    compare = torch.eq if self.only_attend_immediate_media else torch.ge
    return compare(text_time[..., None], media_time), text_time > 0


def _cross_attention_forward(
    self: Any, x: Tensor, media: Tensor, media_locations: Tensor | None = None, use_cached_media: bool | None = None
) -> Tensor:
    fits = media_locations is None or use_cached_media or media_locations.shape == x.shape[:2]
    if not _is_supported(self, x, media) or not fits:
        return NotImplemented
    _, T, M, _ = media.shape
    q = split_heads(_linear(apply_norm(x, self.norm), self.to_q), num_heads=self.heads)
    k, v = (split_heads(t, num_heads=self.heads) for t in _linear(media.flatten(1, 2), self.to_kv).chunk(2, -1))
    if media_locations is None:
        return _linear(merge_heads(attention(q, k, v, scale=self.scale)), self.to_out)
    visible, after_media = _visible_media(self, media_locations, T, M, x.shape[1], bool(use_cached_media))
    # in the original, a token that sees nothing takes the mean of all values: attention with a query of zeros
    sees_nothing = ~visible.any(-1)
    q = q.masked_fill(sees_nothing[:, None, :, None], 0.0)
    mask = (visible | sees_nothing[..., None])[:, None]
    out = merge_heads(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale))
    if self.only_attend_immediate_media:
        out = out.masked_fill(~after_media[..., None], 0.0)
    return _linear(out, self.to_out)


def _flamingo_rules() -> Iterator[Rule]:
    for package, forward in (
        ("flamingo_pytorch.flamingo_pytorch", _flamingo_pytorch_forward),
        ("open_flamingo.src.helpers", _open_flamingo_forward),
    ):
        target, check = f"{package}.PerceiverResampler", _check_flamingo(package)
        yield Rule("resampler", target, {"forward": forward}, check, reads=("norm",))
        target, check = f"{package}.PerceiverAttention", _check_layers(_FLAMINGO_ATTENTION)
        yield Rule("attention", target, {"forward": _flamingo_attention_forward}, check, tuple(_FLAMINGO_ATTENTION))
        target, reads = f"{package}.MaskedCrossAttention", ("norm", "to_q", "to_kv", "to_out")
        yield Rule("attention", target, {"forward": _cross_attention_forward}, _check_layers({}), reads)


# IDEFICS

_IDEFICS = "transformers.models.idefics.perceiver"


def _idefics_attend(attn: Any, y: Tensor, x_hat: Tensor) -> Tensor:
    norm, H = attn.context_layer_norm, attn.n_heads
    q, k, v = resampler_projections(
        y, x_hat, norm.weight, norm.bias, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
    )
    if attn.qk_layer_norms:
        q = apply_norm(q.unflatten(2, (H, -1)), attn.q_layer_norm).flatten(2)
        k = apply_norm(k.unflatten(2, (H, -1)), attn.k_layer_norm).flatten(2)
    q, k, v = (split_heads(t, num_heads=H) for t in (q, k, v))
    return _linear(merge_heads(attention(q, k, v, scale=attn.qk_scale)), attn.output_proj)


def _idefics_attention_forward(self: Any, context: Tensor, latents: Tensor) -> Tensor:
    if not _is_supported(self, context, latents) or context.dim() != 3 or latents.dim() != 3:
        return NotImplemented
    y = apply_norm(latents, self.latents_layer_norm)
    return _idefics_attend(self, y, standardise(context, self.context_layer_norm.eps))


def _idefics_feed_forward(ff: Any, y: Tensor) -> Tensor:
    # autograd saves one tensor for relu and the product after it
    return _linear(torch.relu(_linear(y, ff.fc)), ff.c_proj)


def _idefics_forward(self: Any, context: Tensor) -> Tensor:
    if not _is_supported(self, context) or context.dim() != 3:
        return NotImplemented
    layers = [
        (attn.latents_layer_norm, partial(_idefics_attend, attn), ff.ln, partial(_idefics_feed_forward, ff))
        for attn, ff in self.blocks
    ]
    return _resample(self.latents, context, self.blocks[0][0].context_layer_norm.eps, layers, self.layer_norm)


def _idefics_attention_classes(attn: Any) -> dict[str, str]:
    norms = ["context_layer_norm", "latents_layer_norm"]
    norms += ["q_layer_norm", "k_layer_norm"] if attn.qk_layer_norms else []
    linears = "q_proj", "k_proj", "v_proj", "output_proj"
    return dict.fromkeys(norms, _LAYER_NORM) | dict.fromkeys(linears, _LINEAR)


def _check_idefics_attention(attn: Any) -> str | None:
    return _reason_other_layers(attn, _idefics_attention_classes(attn))


def _check_idefics(module: Any) -> str | None:
    if not len(module.blocks):
        return "it has no blocks"
    classes = {"layer_norm": _LAYER_NORM}
    for i, (attn, _) in enumerate(module.blocks):
        classes[f"blocks.{i}.0"] = f"{_IDEFICS}.IdeficsPerceiverAttention"
        classes[f"blocks.{i}.1"] = f"{_IDEFICS}.IdeficsMLP"
        # another class need not have the attributes that are read next
        if qualified_name(unpatched_class(attn)) == classes[f"blocks.{i}.0"]:
            classes |= {f"blocks.{i}.0.{name}": kind for name, kind in _idefics_attention_classes(attn).items()}
        classes |= {f"blocks.{i}.1.fc": _LINEAR, f"blocks.{i}.1.c_proj": _LINEAR}
        classes |= {f"blocks.{i}.1.ln": _LAYER_NORM, f"blocks.{i}.1.act": qualified_name(nn.ReLU)}
    return _reason_other_layers(module, classes) or _reason_several_eps(
        attn.context_layer_norm.eps for attn, _ in module.blocks
    )


def _idefics_rules() -> Iterator[Rule]:
    target = f"{_IDEFICS}.IdeficsPerceiverResampler"
    yield Rule("resampler", target, {"forward": _idefics_forward}, _check_idefics, reads=("layer_norm",))
    target, reads = f"{_IDEFICS}.IdeficsPerceiverAttention", ("q_proj", "k_proj", "v_proj", "output_proj")
    yield Rule("attention", target, {"forward": _idefics_attention_forward}, _check_idefics_attention, reads)


# Idefics2: RMS norms, fewer heads of keys than of queries, a mask, a gated feed-forward

_IDEFICS2 = "transformers.models.idefics2.modeling_idefics2"


def _idefics2_attend(attn: Any, y: Tensor, x_hat: Tensor, norm: Any, key_mask: Tensor) -> Tensor:
    (B, M, _), H, K = y.shape, attn.num_key_value_heads, attn.head_dim
    q, k, v = resampler_projections(
        y, x_hat, norm.weight, None, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
    )
    # G query heads share a key head: as further rows of one head, they need no copies of the keys
    G = attn.num_key_value_groups
    q = q.view(B, M, H, G, K).permute(0, 2, 3, 1, 4).reshape(B, H, G * M, K)
    k, v = (split_heads(t, num_heads=H) for t in (k, v))
    out = attention(q, k, v, key_mask=key_mask, scale=attn.scaling)
    out = out.unflatten(2, (G, M)).permute(0, 3, 1, 2, 4).reshape(B, M, H * G * K)
    return _linear(out, attn.o_proj)


def _idefics2_forward(self: Any, context: Any = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    if (
        options
        or not _is_supported(self, context)
        or context.dim() != 3
        or attention_mask is None
        or attention_mask.shape != context.shape[:2]
        # the fused op would drop other weights than torch does for the same seed
        or (self.training and any(layer.self_attn.attention_dropout for layer in self.layers))
    ):
        return NotImplemented
    z = self.latents.expand(len(context), -1, -1).contiguous()
    key_mask = nn.functional.pad(attention_mask.bool(), (0, z.shape[1]), value=True)
    x_hat = rms_norm(context, None, self.rms_norm_eps)
    update: Any = None
    for layer in self.layers:
        norm, after, gated = layer.input_latents_norm, layer.post_attention_layernorm, layer.mlp
        if update is None:
            y = rms_norm(z, norm.weight, norm.variance_epsilon)
        else:
            y, z = add_rms_norm(update, z, norm.weight, norm.variance_epsilon)
        update = _idefics2_attend(layer.self_attn, y, x_hat, layer.input_context_norm, key_mask)
        y, z = add_rms_norm(update, z, after.weight, after.variance_epsilon)
        gate, up = apply_linears(y, gated.gate_proj, gated.up_proj)
        update = _linear(gated.act_fn(gate) * up, gated.down_proj)
    return add_rms_norm(update, z, self.norm.weight, self.norm.variance_epsilon)[0]


def _check_idefics2(module: Any) -> str | None:
    norm = f"{_IDEFICS2}.Idefics2RMSNorm"
    norms = "input_latents_norm", "input_context_norm", "post_attention_layernorm"
    products = [f"self_attn.{name}_proj" for name in "qkvo"]
    products += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    classes = {"norm": norm}
    for i in range(len(module.layers)):
        classes[f"layers.{i}"] = f"{_IDEFICS2}.Idefics2PerceiverLayer"
        classes[f"layers.{i}.self_attn"] = f"{_IDEFICS2}.Idefics2PerceiverAttention"
        classes[f"layers.{i}.mlp"] = f"{_IDEFICS2}.Idefics2MLP"
        classes |= {f"layers.{i}.{name}": norm for name in norms}
        classes |= {f"layers.{i}.{name}": _LINEAR for name in products}
    reason = _reason_other_layers(module, classes)
    eps = [module.rms_norm_eps, *(layer.input_context_norm.variance_epsilon for layer in module.layers)]
    return reason or _reason_several_eps(eps)


def _idefics2_rule() -> Rule:
    target, reads = f"{_IDEFICS2}.Idefics2PerceiverResampler", ("layers.0.self_attn.q_proj",)
    return Rule("resampler", target, {"forward": _idefics2_forward}, _check_idefics2, reads)


_RULES = (*_flamingo_rules(), *_idefics_rules(), _idefics2_rule())
# a resampler takes one dtype, of norms too
RULES = tuple(replace(rule, one_dtype=True) for rule in _RULES)
