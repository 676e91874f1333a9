"""Rules for transformer towers: layer norms, feed-forwards and attention of torch, open_clip and transformers.

| family | what is fused |
|---|---|
| torch `nn.LayerNorm`, open_clip `LayerNorm`, `LayerNormFp32` | the norm |
| torch `nn.MultiheadAttention` (open_clip and others) | projections and attention, if no weights are asked for |
| open_clip `ResidualAttentionBlock`, with or without layer scale | first residual + norm, and the MLP |
| transformers CLIP, MetaCLIP 2, SigLIP 1 and 2, BLIP, BLIP-2, InstructBLIP | attention, residual + norm, MLP |
| the towers of Idefics2, Idefics3 and SmolVLM | attention, residual + norm, MLP |
| transformers ViT, DeiT, DINOv2 | attention, MLP |

Post-norm layers (BERT, RoBERTa, ...) are in text.py, Qwen's towers in qwen_vl.py, and DINOv3, InternViT and SAM in
vision.py.

Modules that have no fused op are kept: an MLP whose activation is neither QuickGELU, GELU, its tanh approximation nor
squared ReLU, packed attention with `bias_k` or `add_zero_attn`.

Some calls run the original forward of a replaced module:
    attention weights are asked for (`need_weights`, attn_implementation="eager", BLIP's output_attentions)
    another attention implementation is configured ("flash_attention_2", "flex_attention", ...)
    a cache holds or receives keys and values (generation)
    `nn.MultiheadAttention` gets both an attention mask and a padding mask, or nested or unbatched input
    attention dropout is active in `nn.MultiheadAttention` or BLIP: the fused op draws other numbers than torch
Elsewhere, between fused projections, torch's `scaled_dot_product_attention` takes masks that differ between queries
(such as causal with padding) and active dropout. Dropout of hidden states is torch's own and drops the same elements.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.linear import linears
from prismer.kernels.patch.layers import (
    BLIP2,
    add_norm,
    apply_linears,
    apply_mlp,
    apply_norm,
    merge_heads,
    reason_activation,
    reason_weights_are_read,
    sdpa_attention,
    split_heads,
    transformers_class,
    wants_weights,
)
from prismer.kernels.patch.rules import LAYER_NORMS, Rule, reason_many_dimensions

# layer norms


def _layer_norm_forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return apply_norm(x, self)


def _check_layer_norm(module: Any) -> str | None:
    reason = reason_many_dimensions("it", module)
    if reason is None and module.normalized_shape[0] > 65536:
        return f"it normalises {module.normalized_shape[0]} numbers, and the fused norm at most 65536"
    return reason


def _pre_norm_forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """An encoder layer of transformers: its second residual sum and norm are one op."""
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
    normed, hidden_states = add_norm(attended, hidden_states, self.layer_norm2)
    return hidden_states + self.mlp(normed)


# feed-forwards


def _mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return apply_mlp(hidden_states, self.fc1, self.activation_fn, self.fc2)


def _open_clip_block_forward(
    self: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    is_cross = hasattr(self, "ln_1_kv")
    k_x, v_x = (self.ln_1_kv(t) if is_cross and t is not None else None for t in (k_x, v_x))
    attended = self.ls_1(self.attention(q_x=self.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask))
    y, x = add_norm(attended, q_x, self.ln_2)
    return x + self.ls_2(apply_mlp(y, self.mlp.c_fc, self.mlp.gelu, self.mlp.c_proj))


def _check_open_clip_block(module: Any) -> str | None:
    names = [name for name, _ in module.mlp.named_children()]
    if type(module.mlp) is not nn.Sequential or names != ["c_fc", "gelu", "c_proj"]:
        return "its mlp is not c_fc, gelu, c_proj"
    return reason_activation("mlp.gelu", module)


# nn.MultiheadAttention


def _multihead_forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if (
        need_weights
        or query.dim() != 3
        or query.is_nested
        or (is_causal and (attn_mask is None or query.shape != key.shape))
        or (attn_mask is not None and key_padding_mask is not None)
        or (key_padding_mask is not None and key_padding_mask.dtype != torch.bool)
        or (self.training and self.dropout > 0)
    ):
        return NotImplemented
    q, k, v = (
        split_heads(t if self.batch_first else t.transpose(0, 1), num_heads=self.num_heads)
        for t in _multihead_projections(self, query, key, value)
    )
    # torch trusts `is_causal` as a description of attn_mask, and so does this forward
    if attn_mask is None or is_causal:
        key_mask = None if key_padding_mask is None else ~key_padding_mask
        out = attention(q, k, v, causal=attn_mask is not None, key_mask=key_mask)
    else:
        # True hides a key from nn.MultiheadAttention and shows it to scaled_dot_product_attention
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask, float("-inf"))
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(*q.shape[:3], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
    return apply_linears(out.flatten(2), self.out_proj)[0], None


def _multihead_projections(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    bias = self.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if not self._qkv_same_embed_dim:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    elif key is query and value is query:
        return linears(query, [(self.in_proj_weight, bias)])[0].chunk(3, dim=-1)
    else:
        weights = self.in_proj_weight.split(self.embed_dim)
    layers = list(zip(weights, biases, strict=True))
    if key is value:
        return *linears(query, layers[:1]), *linears(key, layers[1:])
    return tuple(linears(x, [layer])[0] for x, layer in zip((query, key, value), layers, strict=True))


def _check_multihead(module: Any) -> str | None:
    if module.bias_k is not None or module.add_zero_attn:
        return "it has bias_k or add_zero_attn, which the fused attention does not have"
    return None


# attention of transformers


def _vision_attention(dropout: str, scale: str, out: str, takes_options: bool = True) -> Callable:
    """The forward of a self-attention with q_proj, k_proj and v_proj.

    Args:
        dropout, scale, out: names of its attributes for dropout, scale and output projection.
        takes_options: whether the original passes its keyword arguments on; SigLIP ignores them.
    """

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if self.config._attn_implementation != "sdpa":
            return NotImplemented
        parts = apply_linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(t, head_dim=self.head_dim) for t in parts)
        attended = sdpa_attention(
            *(self, q, k, v),
            mask=attention_mask,
            scale=getattr(self, scale),
            dropout=getattr(self, dropout),
            options=kwargs if takes_options else {"is_causal": self.is_causal},
        )
        return getattr(self, out)(attended.flatten(2)), None

    return forward


def _blip2_attention_forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    if self.config._attn_implementation != "sdpa":
        return NotImplemented
    q, k, v = _packed_qkv(self, hidden_states)
    attended = sdpa_attention(
        self, q, k, v, mask=None, scale=self.scale, dropout=self.attention_dropout, options=kwargs
    )
    return self.projection(attended.flatten(2)), None


def _blip_attention_forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    if wants_weights(kwargs) or (self.dropout.training and self.dropout.p > 0):
        return NotImplemented
    q, k, v = _packed_qkv(self, hidden_states)
    return self.projection(merge_heads(attention(q, k, v, scale=self.scale))), None


def _packed_qkv(self: Any, x: Tensor) -> Iterator[Tensor]:
    return (split_heads(t, head_dim=self.head_dim) for t in apply_linears(x, self.qkv)[0].chunk(3, dim=-1))


# the rules

_QKV = ("q_proj", "k_proj", "v_proj")
_CLIP = (("clip", "CLIP"), ("metaclip_2", "MetaClip2"), ("siglip", "Siglip"), ("siglip2", "Siglip2"))
_VIT = (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2"))
_IDEFICS = (("idefics2", "Idefics2"), ("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
_BLIP = (("blip", "Blip"), *BLIP2)


def _torch_rules() -> Iterator[Rule]:
    for name in LAYER_NORMS:
        yield Rule("layer_norm", name, {"forward": _layer_norm_forward}, _check_layer_norm)
    yield Rule(
        "attention",
        "torch.nn.modules.activation.MultiheadAttention",
        {"forward": _multihead_forward},
        _check_multihead,
        reads=("out_proj",),
    )
    yield Rule(
        "mlp",
        "open_clip.transformer.ResidualAttentionBlock",
        {"forward": _open_clip_block_forward},
        _check_open_clip_block,
        reads=("ln_2", "mlp.c_fc", "mlp.c_proj"),
        covers=("ln_2", "mlp"),
    )


def _vision_rules() -> Iterator[Rule]:
    clip = _vision_attention("dropout", "scale", "out_proj")
    siglip = _vision_attention("dropout", "scale", "out_proj", takes_options=False)
    vit = _vision_attention("attention_dropout", "scaling", "o_proj")
    check_mlp = partial(reason_activation, "activation_fn")
    idefics = tuple((family, f"{name}Vision") for family, name in _IDEFICS)
    for family, name in (*_CLIP, *_VIT, *_BLIP, *idefics):
        target = transformers_class(family, f"{name}MLP")
        yield Rule("mlp", target, {"forward": _mlp_forward}, check_mlp, reads=("fc1", "fc2"))
    for family, name in (*_CLIP, *_VIT, *idefics):
        forward = (
            siglip
            if family.startswith("siglip") or (family, name) in idefics
            else clip
            if (family, name) in _CLIP
            else vit
        )
        target = transformers_class(family, f"{name}Attention")
        yield Rule("attention", target, {"forward": forward}, reads=_QKV, covers=_QKV)
    for family, name in (*_CLIP, *_BLIP, *_IDEFICS):
        target, norm = transformers_class(family, f"{name}EncoderLayer"), ("layer_norm2",)
        yield Rule("layer_norm", target, {"forward": _pre_norm_forward}, reads=norm, covers=norm)
    for family, name in BLIP2:
        target = transformers_class(family, f"{name}Attention")
        yield Rule("attention", target, {"forward": _blip2_attention_forward}, reads=("qkv",), covers=("qkv",))
    yield Rule(
        "attention",
        transformers_class("blip", "BlipAttention"),
        {"forward": _blip_attention_forward},
        reason_weights_are_read,
        reads=("qkv",),
        covers=("qkv", "dropout"),
    )


RULES = (*_torch_rules(), *_vision_rules())
