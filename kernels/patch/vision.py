"""Rules for DINOv3, InternViT, SAM, and the projectors of LLaVA and InternVL, of transformers.

| family | what is fused |
|---|---|
| DINOv3 | projections, rotary positions and attention; MLP, also the gated one |
| InternViT (`InternVLVision...`) | projections and attention, first residual + norm, MLP |
| SAM, SAM-HQ | projection and attention with relative positions, residual + norm, MLP |
| LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA, VipLLaVA, InternVL | the projector's MLP |

SAM adds to the score of query i and key j a number for their distance in rows, which is q_i . r(row i - row j), and one
for the columns. The original makes a tensor of these numbers, N x N for each head. Here they are more numbers of the
query, one for each row and each column, and the key of j has a 1 at its row and its column and zeros elsewhere. So
attention needs no N x N tensor, forward or backward. In windows, which are small, the tensor is made.

Kept are the attention of SAM's mask decoder, layer scale, and stochastic depth.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.attention import attention
from prismer.kernels.patch.layers import (
    add_norm,
    apply_gated_mlp,
    apply_linears,
    apply_mlp,
    reason_activation,
    reason_not_swiglu,
    sdpa_attention,
    split_heads,
    transformers_class,
)
from prismer.kernels.patch.rotary import rotary
from prismer.kernels.patch.rules import Rule

# feed-forwards


def _two_layers(fc: str, activation: str, proj: str) -> Callable:
    """The forward of an MLP, given the names of its parts."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return apply_mlp(hidden_states, getattr(self, fc), getattr(self, activation), getattr(self, proj))

    return forward


def _normed_projector_forward(norm: str) -> Callable:
    """The forward of a projector whose norm has this name."""

    def forward(self: Any, image_features: Tensor) -> Tensor:
        return apply_mlp(getattr(self, norm)(image_features), self.linear_1, self.act, self.linear_2)

    return forward


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    return apply_gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj)


# DINOv3


def _dinov3_attention_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if self.config._attn_implementation != "sdpa" or position_embeddings is None:
        return NotImplemented
    if any(t.requires_grad or t.dim() != 2 for t in position_embeddings):
        return NotImplemented
    cos, sin = position_embeddings
    q, k, v = apply_linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
    heads = (1, self.num_heads, self.head_dim)
    q, k = (rotary(t.unflatten(-1, heads), cos, sin).flatten(2) for t in (q, k))
    q, k, v = (split_heads(t, num_heads=self.num_heads) for t in (q, k, v))
    attended = sdpa_attention(
        self, q, k, v, mask=attention_mask, scale=self.scaling, dropout=self.dropout, options=kwargs
    )
    return self.o_proj(attended.flatten(2)), None


# InternViT


def _internvl_attention_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    if self.config._attn_implementation != "sdpa":
        return NotImplemented
    q, k, v = apply_linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (split_heads(t, num_heads=self.num_heads) for t in (self.q_norm(q), self.k_norm(k), v))
    options = {**kwargs, "is_causal": False}
    attended = sdpa_attention(
        self, q, k, v, mask=attention_mask, scale=self.scale, dropout=self.attention_dropout, options=options
    )
    return self.projection_dropout(self.projection_layer(attended.flatten(2))), None


def _internvl_layer_forward(self: Any, hidden_states: Tensor) -> Tensor:
    attended, _ = self.attention(self.layernorm_before(hidden_states))
    normed, hidden_states = add_norm(self.lambda_1 * attended, hidden_states, self.layernorm_after)
    return self.lambda_2 * self.dropout(self.mlp(normed)) + hidden_states


def _check_internvl_layer(module: Any) -> str | None:
    return "it has no layer scale" if module.lambda_1 is None or module.lambda_2 is None else None


# SAM

# longer queries and keys cost less than an N x N tensor from this many keys on, for each of their numbers
_LEAST_KEYS = 3


def _sam_attention_forward(
    self: Any, hidden_states: Tensor, output_attentions: bool | None = False
) -> tuple[Tensor, None]:
    if output_attentions:
        return NotImplemented
    B, height, width, D = hidden_states.shape
    heads = (3, self.num_attention_heads, D // self.num_attention_heads)
    qkv = apply_linears(hidden_states, self.qkv)[0].flatten(1, 2).unflatten(-1, heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if self.use_rel_pos:
        out = _attend_with_distances(self, q, k, v, height, width)
    else:
        out = attention(q, k, v)
    return self.proj(out.transpose(1, 2).reshape(B, height, width, D)), None


def _attend_with_distances(self: Any, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    """Attention of a grid, with SAM's relative positions: (B, H, height width, K) each."""
    K = q.shape[-1]
    grid = q.unflatten(2, (height, width))
    rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.get_rel_pos(height, height, self.rel_pos_h)).flatten(2, 3)
    columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.get_rel_pos(width, width, self.rel_pos_w)).flatten(2, 3)
    if height * width < _LEAST_KEYS * (K + height + width):
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    here = torch.arange(height * width, device=q.device)
    is_row = F.one_hot(here // width, height).to(k.dtype)
    is_column = F.one_hot(here % width, width).to(k.dtype)
    # kernels of attention want a head size that is a multiple of 8
    spare = -(K + height + width) % 8
    zeros = q.new_zeros(1, 1, 1, spare).expand(*q.shape[:3], spare)
    places = torch.cat((is_row, is_column, is_row.new_zeros(len(here), spare)), -1)
    q = torch.cat((q * K**-0.5, rows, columns, zeros), -1)
    k = torch.cat((k, places.expand(*k.shape[:2], -1, -1)), -1)
    v = F.pad(v, (0, height + width + spare))
    return attention(q, k, v, scale=1.0)[..., :K]


def _sam_layer_forward(self: Any, hidden_states: Tensor) -> Tensor:
    x, size = self.layer_norm1(hidden_states), self.window_size
    if size > 0:
        whole = x.shape[1:3]
        x, padded = self.window_partition(x, size)
    x, _ = self.attn(hidden_states=x)
    if size > 0:
        x = self.window_unpartition(x, size, padded, whole)
    normed, hidden_states = add_norm(x, hidden_states, self.layer_norm2)
    return hidden_states + self.mlp(normed)


# the rules

_LLAVAS = (
    ("llava", "Llava"),
    ("llava_next", "LlavaNext"),
    ("llava_next_video", "LlavaNextVideo"),
    ("llava_onevision", "LlavaOnevision"),
    ("video_llava", "VideoLlava"),
)
_NORMED_PROJECTORS = (
    ("vipllava", "VipLlavaMultiModalProjector", "projector_layernorm"),
    ("internvl", "InternVLMultiModalProjector", "layer_norm"),
)
_MLPS = (
    ("dinov3_vit", "DINOv3ViTMLP", ("up_proj", "act_fn", "down_proj")),
    ("internvl", "InternVLVisionMLP", ("fc1", "activation_fn", "fc2")),
    ("sam", "SamMLPBlock", ("lin1", "act", "lin2")),
    ("sam_hq", "SamHQMLPBlock", ("lin1", "act", "lin2")),
    *((family, f"{name}MultiModalProjector", ("linear_1", "act", "linear_2")) for family, name in _LLAVAS),
)
_QKV = ("q_proj", "k_proj", "v_proj")


def _mlp_rules() -> Iterator[Rule]:
    for family, name, (fc, activation, proj) in _MLPS:
        yield Rule(
            "mlp",
            transformers_class(family, name),
            {"forward": _two_layers(fc, activation, proj)},
            partial(reason_activation, activation),
            reads=(fc, proj),
        )
    for family, name, norm in _NORMED_PROJECTORS:
        yield Rule(
            "mlp",
            transformers_class(family, name),
            {"forward": _normed_projector_forward(norm)},
            partial(reason_activation, "act"),
            reads=("linear_1", "linear_2"),
            covers=("linear_1", "act", "linear_2"),
        )
    yield Rule(
        "mlp",
        transformers_class("dinov3_vit", "DINOv3ViTGatedMLP"),
        {"forward": _gated_forward},
        partial(reason_not_swiglu, "act_fn"),
        reads=("gate_proj", "up_proj", "down_proj"),
        one_dtype=True,
    )


def _vision_rules() -> Iterator[Rule]:
    for family, name, attend in (
        ("dinov3_vit", "DINOv3ViTAttention", _dinov3_attention_forward),
        ("internvl", "InternVLVisionAttention", _internvl_attention_forward),
    ):
        yield Rule("attention", transformers_class(family, name), {"forward": attend}, reads=_QKV, covers=_QKV)
    target, norm = transformers_class("internvl", "InternVLVisionLayer"), ("layernorm_after",)
    forward: dict[str, object] = {"forward": _internvl_layer_forward}
    yield Rule("layer_norm", target, forward, _check_internvl_layer, reads=norm, covers=norm, one_dtype=True)
    for family, name in (("sam", "Sam"), ("sam_hq", "SamHQ")):
        target = transformers_class(family, f"{name}VisionSdpaAttention")
        yield Rule("attention", target, {"forward": _sam_attention_forward}, reads=("qkv",), covers=("qkv",))
        target, norm = transformers_class(family, f"{name}VisionLayer"), ("layer_norm2",)
        yield Rule("layer_norm", target, {"forward": _sam_layer_forward}, reads=norm, covers=norm)


RULES = (*_mlp_rules(), *_vision_rules())
