"""Steps of the fused forwards of several families: linears, norms, heads, activations, attention of transformers."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.layer_state import has_hooks
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.patch.gated_mlp import gated_mlp
from prismer.kernels.patch.rms_norm import add_rms_norm
from prismer.kernels.patch.rules import qualified_name, reason_wrong_class

_ACTIVATIONS = {
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "torch.nn.modules.activation.GELU": "gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.ReLUSquaredActivation": "squared_relu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    # its name before transformers 5
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
}
_SILUS = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
BLIP2 = (("blip_2", "Blip2"), ("instructblip", "InstructBlip"))


def transformers_class(family: str, name: str, file: str | None = None) -> str:
    """The full name of a class of transformers."""
    return f"transformers.models.{family}.modeling_{file or family}.{name}"


# linears, norms and heads


def apply_linears(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """`layer(x)` of each layer, by one fused op."""
    return linears(x, [(layer.weight, layer.bias) for layer in layers])


def apply_mlp(x: Tensor, fc: nn.Linear, activation: object, proj: nn.Linear) -> Tensor:
    """`proj(activation(fc(x)))` by the fused op."""
    name: Any = activation_of(activation)
    return mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=name)


def apply_gated_mlp(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """`down(silu(gate(x)) * up(x))` by the fused op."""
    return gated_mlp(x, gate.weight, gate.bias, up.weight, up.bias, down.weight, down.bias)


def apply_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm(x)` by the fused op."""
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def add_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """`norm(x + residual)` and the sum itself, for a layer norm or an RMS norm."""
    if hasattr(norm, "variance_epsilon"):
        return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def split_heads(x: Tensor, *, num_heads: int = -1, head_dim: int = -1) -> Tensor:
    """(B, N, H * K) -> (B, H, N, K), for a given H or K."""
    return x.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H * K)."""
    return x.transpose(1, 2).flatten(2)


# activations


def activation_of(module: object) -> str | None:
    """The fused op's name for an activation; None if the op does not have it."""
    approximate = getattr(module, "approximate", "none")
    if approximate != "none":
        return "gelu_tanh" if type(module) is nn.GELU and approximate == "tanh" else None
    return _ACTIVATIONS.get(qualified_name(type(module)))


def reason_activation(name: str, module: nn.Module) -> str | None:
    """Keep an MLP whose activation, called `name` inside the module, the fused op does not have."""
    activation = module
    for part in name.split("."):
        activation = getattr(activation, part)
    if activation_of(activation) is None:
        # functions as well as modules serve as activations
        is_module = isinstance(activation, nn.Module)
        shown = repr(activation) if is_module else getattr(activation, "__name__", repr(activation))
        return (
            f"its activation {shown} has no fused op; "
            "the fused ones are QuickGELU, GELU, its tanh approximation, and squared ReLU"
        )
    return None


def reason_not_swiglu(name: str, module: nn.Module) -> str | None:
    """Keep a gated MLP whose activation, the attribute `name`, is not SiLU."""
    activation = getattr(module, name)
    if qualified_name(type(activation)) not in _SILUS:
        return f"its gate has the activation {activation!r}, and the fused gated MLP has SiLU"
    return None


# attention of transformers


def sdpa_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention as transformers defines it for attn_implementation="sdpa", by the fused op where it serves the call.

    Args:
        module: the attention module, of which transformers reads `is_causal`.
        q, k, v: (B, H, N, K), (B, H, L, K), (B, H, L, K).
        mask: what transformers passes as `attention_mask`.
        dropout: in training.
        options: what else transformers passes to its attention function.

    Returns:
        (B, N, H, K).
    """
    dropout = dropout if module.training else 0.0
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    N = q.shape[2]
    causal = bool(causal and mask is None and N > 1)
    key_mask = _key_mask(mask, q.shape[0])
    is_served = (
        not dropout
        and q.shape[0] == k.shape[0]
        and (mask is None or key_mask is not None)
        and not (causal and k.shape[2] != N)
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
    )
    if is_served:
        return attention(q, k, v, causal=causal, key_mask=key_mask, scale=scale).transpose(1, 2)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, q, k, v, mask, dropout=dropout, scaling=scale, **options)[0]


def _key_mask(mask: Tensor | None, batch: int) -> Tensor | None:
    """(B, L), if a bool mask (B, 1, N, L) is the same for every query by its strides; else None."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[2] != 1 and mask.stride(2) != 0:
        return None
    return mask[:, 0, 0, :].expand(batch, -1)


def wants_weights(options: Mapping[str, Any]) -> bool:
    """Whether the caller of BLIP's attention asks for attention weights.

    Other families switch to attn_implementation="eager" for them, BLIP has one implementation for both.
    """
    if options.get("output_attentions"):
        return True
    collector = sys.modules["transformers.utils.output_capturing"]._active_collector.get()
    return collector is not None and any("attentions" in key for key in collector)


def reason_weights_are_read(module: nn.Module) -> str | None:
    """Keep a BLIP attention whose hooks may read attention weights, or whose dropout is not torch's."""
    if has_hooks(module):
        return "it has hooks, which may read the attention weights that the fused op does not compute"
    # the fused forward reads `training` and `p` of this class
    return reason_wrong_class(module, {"dropout": qualified_name(nn.Dropout)})
