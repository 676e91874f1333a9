"""Rules for transformer towers: layer norms, feed-forwards and attention of torch, open_clip and transformers.

| family | what is fused |
|---|---|
| torch `nn.LayerNorm`, open_clip `LayerNorm`, `LayerNormFp32` | the norm |
| torch `nn.MultiheadAttention` (open_clip and others) | projections and attention, where no weights are asked for |
| open_clip `ResidualAttentionBlock`, with or without layer scale | first residual + norm, and the MLP |
| transformers CLIP, MetaCLIP 2, SigLIP 1 and 2, BLIP, BLIP-2, InstructBLIP | attention, residual + norm, MLP |
| transformers ViT, DeiT, DINOv2 | attention, MLP |

Post-norm layers (BERT, RoBERTa, ...) are in `patch_text.py`. Kept, since no fused op computes it: an MLP whose
activation is neither QuickGELU, exact GELU nor squared ReLU (SigLIP's is the tanh approximation of GELU), a gated MLP,
packed attention with `bias_k` or `add_zero_attn`.

What only a call knows is decided by the call; each of these runs the module's own forward, and gives its numbers:
    attention weights are asked for (`need_weights`, attn_implementation="eager", BLIP's output_attentions)
    another attention implementation is configured ("flash_attention_2", "flex_attention", ...)
    keys and values come from, or go to, a cache (generation)
    `nn.MultiheadAttention` gets both a mask of queries and keys and one of padding, or nested or unbatched input
    attention dropout is active in it, or in BLIP's: the fused op drops other weights for the same seed than torch does
Between the fused projections, torch's `scaled_dot_product_attention` takes masks that differ from query to query, such
as causal with padding, and active dropout. Dropout of hidden states is torch's own, and drops the same elements.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.layer_state import has_hooks
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.patch.core import Rule, qualified_name, unlike

_ACTIVATIONS = {
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "torch.nn.modules.activation.GELU": "gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.ReLUSquaredActivation": "squared_relu",
}
_DROPOUT = {"dropout": qualified_name(nn.Dropout)}
# what an attention reads of a dropout that it does not call holds for this class alone


def weights_of(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear inside a module."""
    layer = module.get_submodule(name)
    return layer.weight, layer.bias


# layer norms


def _layer_norm_forward(self, x):
    return layer_norm(x, self.weight, self.bias, self.eps)


def _check_layer_norm(module):
    if len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} dimensions, the fused one the last alone"
    if module.normalized_shape[0] > 65536:
        return f"it normalises {module.normalized_shape[0]} numbers, the fused one 65536 at most"
    return None


def _pre_norm_forward(self, hidden_states, attention_mask=None, **kwargs):
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
    norm = self.layer_norm2
    normed, hidden_states = add_layer_norm(attended, hidden_states, norm.weight, norm.bias, norm.eps)
    return hidden_states + self.mlp(normed)


# feed-forwards


def activation_of(module: Callable) -> str | None:
    """What the fused op calls an activation; None if it has none like it."""
    if getattr(module, "approximate", "none") != "none":
        return None
    return _ACTIVATIONS.get(qualified_name(type(module)))


def check_activation(name: str, module: nn.Module) -> str | None:
    """Keep an MLP whose activation, `name` inside the module, has no fused op."""
    act = module
    for part in name.split("."):
        act = getattr(act, part)
    if activation_of(act) is None:
        shown = repr(act) if isinstance(act, nn.Module) else getattr(act, "__name__", repr(act))
        return f"its activation {shown} has no fused op; QuickGELU, exact GELU and squared ReLU have"
    return None


def _mlp_forward(self, hidden_states):
    fc1, fc2 = self.fc1, self.fc2
    return mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=activation_of(self.activation_fn))


def _block_forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
    crosses = hasattr(self, "ln_1_kv")
    k_x, v_x = (self.ln_1_kv(t) if crosses and t is not None else None for t in (k_x, v_x))
    attended = self.ls_1(self.attention(q_x=self.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask))
    norm, fc, proj = self.ln_2, self.mlp.c_fc, self.mlp.c_proj
    y, x = add_layer_norm(attended, q_x, norm.weight, norm.bias, norm.eps)
    act = activation_of(self.mlp.gelu)
    return x + self.ls_2(mlp(y, fc.weight, fc.bias, proj.weight, proj.bias, activation=act))


def _check_block(module):
    names = [name for name, _ in module.mlp.named_children()]
    if type(module.mlp) is not nn.Sequential or names != ["c_fc", "gelu", "c_proj"]:
        return "its mlp is not c_fc, gelu, c_proj"
    return check_activation("mlp.gelu", module)


# nn.MultiheadAttention


def _packed_forward(
    self,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    if (
        need_weights
        or query.dim() != 3
        or query.is_nested
        or (is_causal and (attn_mask is None or query.shape != key.shape))
        or (attn_mask is not None and key_padding_mask is not None)
        or (key_padding_mask is not None and key_padding_mask.dtype != torch.bool)
        or (self.training and self.dropout > 0)
    ):
        return self.prismer_class.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    q, k, v = (_tokens(t, self.num_heads, self.batch_first) for t in _packed_projections(self, query, key, value))
    # torch takes `is_causal` for a promise about attn_mask, and so is it here
    if attn_mask is None or is_causal:
        seen = None if key_padding_mask is None else ~key_padding_mask
        out = attention(q, k, v, causal=attn_mask is not None, key_mask=seen)
    else:
        if attn_mask.dtype == torch.bool:  # here True is what may not be seen
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask, float("-inf"))
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(*q.shape[:3], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
    return linears(out.flatten(2), [(self.out_proj.weight, self.out_proj.bias)])[0], None


def _packed_projections(self, query, key, value):
    D, bias = self.embed_dim, self.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if not self._qkv_same_embed_dim:
        layers = list(zip((self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases, strict=True))
    elif key is query and value is query:
        return linears(query, [(self.in_proj_weight, bias)])[0].chunk(3, dim=-1)
    else:
        layers = list(zip(self.in_proj_weight.split(D), biases, strict=True))
    if key is value:
        return *linears(query, layers[:1]), *linears(key, layers[1:])
    return [linears(x, [layer])[0] for x, layer in zip((query, key, value), layers, strict=True)]


def _tokens(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """(B, N, D), or (N, B, D) -> (B, H, N, K)."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _check_packed(module):
    if module.bias_k is not None or module.add_zero_attn:
        return "it has bias_k or add_zero_attn, which the fused attention has not"
    return None


# attention of transformers


def attend(module, q, k, v, mask, scale, dropout, options) -> Tensor:
    """Attention as attn_implementation="sdpa" defines it: (B, N, H, K)."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    N = q.shape[2]
    causal = bool(causal and mask is None and N > 1)
    seen = _key_mask(mask, q.shape[0])
    ours = (
        q.shape[0] == k.shape[0]
        and (mask is None or seen is not None)
        and not (causal and k.shape[2] != N)
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
    )
    if ours and not dropout:
        return attention(q, k, v, causal=causal, key_mask=seen, scale=scale).transpose(1, 2)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, q, k, v, mask, dropout=dropout, scaling=scale, **options)[0]


def _key_mask(mask: Tensor | None, batch: int) -> Tensor | None:
    """(B, L), where a bool mask (B, 1, N, L) is the same for every query by its strides; else None."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[2] != 1 and mask.stride(2) != 0:
        return None
    return mask[:, 0, 0, :].expand(batch, -1)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, D) -> (B, H, N, K)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _vision_attention(dropout: str, scale: str, out: str, takes_options: bool = True) -> Callable:
    """Self-attention with q_proj, k_proj, v_proj and an output projection."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.config._attn_implementation != "sdpa":
            return self.prismer_class.forward(self, hidden_states, attention_mask, **kwargs)
        layers = [weights_of(self, name) for name in ("q_proj", "k_proj", "v_proj")]
        q, k, v = (heads(t, self.head_dim) for t in linears(hidden_states, layers))
        drop = getattr(self, dropout) if self.training else 0.0
        options = kwargs if takes_options else {"is_causal": self.is_causal}
        attended = attend(self, q, k, v, attention_mask, getattr(self, scale), drop, options)
        return getattr(self, out)(attended.flatten(2)), None

    return forward


def _blip2_attention_forward(self, hidden_states, **kwargs):
    if self.config._attn_implementation != "sdpa":
        return self.prismer_class.forward(self, hidden_states, **kwargs)
    q, k, v = _packed_qkv(self, hidden_states)
    drop = self.attention_dropout if self.training else 0.0
    return self.projection(attend(self, q, k, v, None, self.scale, drop, kwargs).flatten(2)), None


def _packed_qkv(self, x):
    (packed,) = linears(x, [(self.qkv.weight, self.qkv.bias)])
    return (heads(t, self.head_dim) for t in packed.chunk(3, dim=-1))


def _blip_attention_forward(self, hidden_states, **kwargs):
    if weights_wanted(kwargs) or (self.dropout.training and self.dropout.p > 0):
        return self.prismer_class.forward(self, hidden_states, **kwargs)
    q, k, v = _packed_qkv(self, hidden_states)
    out = attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
    return self.projection(out), None


def weights_wanted(options) -> bool:
    """Whether output_attentions was asked for: BLIP's attention has no other implementation that would say so."""
    if options.get("output_attentions"):
        return True
    collector = sys.modules["transformers.utils.output_capturing"]._active_collector.get()
    return collector is not None and any("attentions" in key for key in collector)


def check_unheard(module):
    """Keep an attention that somebody listens to."""
    if has_hooks(module):
        return "it has hooks, which may read the attention weights that the fused one does not form"
    return unlike(module, _DROPOUT)


# the rules


def of(family: str, name: str, file: str | None = None) -> str:
    """The full name of a class of transformers."""
    return f"transformers.models.{family}.modeling_{file or family}.{name}"


_QKV = ("q_proj", "k_proj", "v_proj")
_CLIP = [("clip", "CLIP"), ("metaclip_2", "MetaClip2"), ("siglip", "Siglip"), ("siglip2", "Siglip2")]
_VIT = [("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2")]
BLIP2 = [("blip_2", "Blip2"), ("instructblip", "InstructBlip")]


def _torch_rules():
    norms = (
        "torch.nn.modules.normalization.LayerNorm",
        "open_clip.transformer.LayerNorm",
        "open_clip.transformer.LayerNormFp32",
    )
    yield from (Rule("layer_norm", name, {"forward": _layer_norm_forward}, _check_layer_norm) for name in norms)
    yield Rule(
        "attention",
        "torch.nn.modules.activation.MultiheadAttention",
        {"forward": _packed_forward},
        _check_packed,
        children=("out_proj",),
    )
    yield Rule(
        "mlp",
        "open_clip.transformer.ResidualAttentionBlock",
        {"forward": _block_forward},
        _check_block,
        children=("ln_2", "mlp.c_fc", "mlp.c_proj"),
        covers=("ln_2", "mlp"),
    )


def _vision_rules():
    clip = _vision_attention("dropout", "scale", "out_proj")
    siglip = _vision_attention("dropout", "scale", "out_proj", takes_options=False)
    vit = _vision_attention("attention_dropout", "scaling", "o_proj")
    for family, name in [*_CLIP, *_VIT, ("blip", "Blip"), *BLIP2]:
        check = partial(check_activation, "activation_fn")
        target = of(family, f"{name}MLP")
        yield Rule("mlp", target, {"forward": _mlp_forward}, check, children=("fc1", "fc2"))
    for family, name in [*_CLIP, *_VIT]:
        forward = siglip if family.startswith("siglip") else clip if (family, name) in _CLIP else vit
        target = of(family, f"{name}Attention")
        yield Rule("attention", target, {"forward": forward}, children=_QKV, covers=_QKV)
    for family, name in [*_CLIP, ("blip", "Blip"), *BLIP2]:
        target = of(family, f"{name}EncoderLayer")
        norm = ("layer_norm2",)
        yield Rule("layer_norm", target, {"forward": _pre_norm_forward}, children=norm, covers=norm)
    for family, name in BLIP2:
        target = of(family, f"{name}Attention")
        yield Rule("attention", target, {"forward": _blip2_attention_forward}, children=("qkv",), covers=("qkv",))
    target = of("blip", "BlipAttention")
    yield Rule(
        "attention",
        target,
        {"forward": _blip_attention_forward},
        check_unheard,
        children=("qkv",),
        covers=("qkv", "dropout"),
    )


RULES = (*_torch_rules(), *_vision_rules())
