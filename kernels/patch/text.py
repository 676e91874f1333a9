"""Rules for post-norm layers of transformers: BERT, RoBERTa and their copies, BLIP's text model, Q-Formers of BLIP-2.

Encoders and decoders, with or without cross-attention. Fused are the projections and attention, residual + norm, and
the MLP with the residual and norm behind it. Calls that run the original forward are listed in towers.py.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.patch.layers import (
    BLIP2,
    add_norm,
    apply_linears,
    apply_mlp,
    merge_heads,
    reason_activation,
    reason_weights_are_read,
    sdpa_attention,
    split_heads,
    transformers_class,
    wants_weights,
)
from prismer.kernels.patch.rules import Rule, reason_wrong_class

# residual, norm and feed-forward


def _residual_norm_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    return add_norm(self.dropout(self.dense(hidden_states)), input_tensor, self.LayerNorm)[0]


def _feed_forward(intermediate: str, output: str) -> Callable:
    """The `feed_forward_chunk` of a layer, given the names of its two parts: MLP, dropout, residual and norm."""

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        first, second = getattr(self, intermediate), getattr(self, output)
        y = apply_mlp(attention_output, first.dense, first.intermediate_act_fn, second.dense)
        return add_norm(second.dropout(y), attention_output, second.LayerNorm)[0]

    return feed_forward_chunk


def _check_feed_forward(intermediate: str, classes: Mapping[str, str], module: nn.Module) -> str | None:
    return reason_wrong_class(module, classes) or reason_activation(f"{intermediate}.intermediate_act_fn", module)


# attention


def _bert_attention_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if self.config._attn_implementation != "sdpa" or past_key_values is not None:
        return NotImplemented
    kwargs.pop("encoder_hidden_states", None)
    return _bert_attend(self, hidden_states, None, attention_mask, self.dropout.p, kwargs), None


def _bert_cross_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if self.config._attn_implementation != "sdpa" or past_key_values is not None:
        return NotImplemented
    return _bert_attend(self, hidden_states, encoder_hidden_states, attention_mask, self.dropout.p, kwargs), None


def _qformer_attention_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if self.config._attn_implementation != "sdpa":
        return NotImplemented
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    return _bert_attend(self, hidden_states, encoder_hidden_states, mask, self.attention_dropout, kwargs), None


def _bert_attend(
    self: Any, x: Tensor, context: Tensor | None, mask: Tensor | None, dropout: float, options: Mapping[str, Any]
) -> Tensor:
    q, k, v = _bert_projections(self, x, context)
    attended = sdpa_attention(self, q, k, v, mask=mask, scale=self.scaling, dropout=dropout, options=options)
    return attended.flatten(2)


def _bert_projections(self: Any, x: Tensor, context: Tensor | None) -> Iterator[Tensor]:
    if context is None:
        parts = apply_linears(x, self.query, self.key, self.value)
    else:
        parts = [*apply_linears(x, self.query), *apply_linears(context, self.key, self.value)]
    return (split_heads(t, head_dim=self.attention_head_size) for t in parts)


def _blip_text_attention_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    drops = self.dropout.training and self.dropout.p > 0
    if past_key_values is not None or drops or wants_weights(kwargs):
        return NotImplemented
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    q, k, v = _bert_projections(self, hidden_states, encoder_hidden_states)
    if mask is None:
        out = attention(q, k, v)
    else:
        # BLIP adds the mask to the scores, whatever its values are
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device, q.dtype))
    return merge_heads(out), None


# the rules

_QKV = ("query", "key", "value")
_BERT = (
    ("bert", "Bert"),
    ("roberta", "Roberta"),
    ("xlm_roberta", "XLMRoberta"),
    ("camembert", "Camembert"),
    ("electra", "Electra"),
)
_QFORMERS = tuple((family, f"{name}QFormer") for family, name in BLIP2)


def _layer_rules(family: str, name: str, file: str | None = None) -> Iterator[Rule]:
    """Residual + norm, and the feed-forward, of the layers that start with `name`."""
    for part in ("SelfOutput", "Output"):
        target, norm = transformers_class(family, name + part, file), ("LayerNorm",)
        yield Rule("layer_norm", target, {"forward": _residual_norm_forward}, reads=norm, covers=norm)
    # a Q-Former's queries have a feed-forward of their own
    suffix = "_query" if name.endswith("QFormer") else ""
    first, second = f"intermediate{suffix}", f"output{suffix}"
    classes = {
        first: transformers_class(family, f"{name}Intermediate", file),
        second: transformers_class(family, f"{name}Output", file),
    }
    yield Rule(
        "mlp",
        transformers_class(family, f"{name}Layer", file),
        {f"feed_forward_chunk{suffix}": _feed_forward(first, second)},
        partial(_check_feed_forward, first, classes),
        reads=(f"{first}.dense", f"{second}.dense", f"{second}.LayerNorm"),
        covers=(first, second),
    )


def _text_rules() -> Iterator[Rule]:
    for family, name in (*_BERT, *_QFORMERS):
        yield from _layer_rules(family, name)
    yield from _layer_rules("blip", "BlipText", "blip_text")
    attentions: list[tuple[str, str, Callable]] = [
        (family, f"{name}SelfAttention", _bert_attention_forward) for family, name in _BERT
    ]
    attentions += [(family, f"{name}CrossAttention", _bert_cross_forward) for family, name in _BERT]
    attentions += [(family, f"{name}MultiHeadAttention", _qformer_attention_forward) for family, name in _QFORMERS]
    for family, name, forward in attentions:
        yield Rule("attention", transformers_class(family, name), {"forward": forward}, reads=_QKV)
    yield Rule(
        "attention",
        transformers_class("blip", "BlipTextSelfAttention", "blip_text"),
        {"forward": _blip_text_attention_forward},
        reason_weights_are_read,
        reads=_QKV,
    )


RULES = tuple(_text_rules())
