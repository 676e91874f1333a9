"""Rules for post-norm layers of transformers: BERT, RoBERTa and their copies, BLIP's text, Q-Formers of BLIP-2.

Encoders and decoders, with cross-attention. Fused are the projections and attention, residual + norm, and the MLP with
the residual and norm behind it. When a call runs the module's own forward is said in `patch_towers.py`.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.attention import attention
from prismer.kernels.layer_norm import add_layer_norm
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.patch.core import Rule, unlike
from prismer.kernels.patch.towers import (
    BLIP2,
    activation_of,
    attend,
    check_activation,
    check_unheard,
    heads,
    of,
    weights_of,
    weights_wanted,
)

_QKV = ("query", "key", "value")
_BERT = [
    ("bert", "Bert"),
    ("roberta", "Roberta"),
    ("xlm_roberta", "XLMRoberta"),
    ("camembert", "Camembert"),
    ("electra", "Electra"),
]


def _residual_norm_forward(self, hidden_states, input_tensor):
    hidden_states = self.dropout(self.dense(hidden_states))
    norm = self.LayerNorm
    return add_layer_norm(hidden_states, input_tensor, norm.weight, norm.bias, norm.eps)[0]


def _feed_forward(intermediate: str, output: str) -> Callable:
    """The chunk of a post-norm layer: MLP, dropout, residual and norm."""

    def feed_forward_chunk(self, attention_output):
        first, second = getattr(self, intermediate), getattr(self, output)
        fc, proj, norm = first.dense, second.dense, second.LayerNorm
        act = activation_of(first.intermediate_act_fn)
        y = mlp(attention_output, fc.weight, fc.bias, proj.weight, proj.bias, activation=act)
        return add_layer_norm(second.dropout(y), attention_output, norm.weight, norm.bias, norm.eps)[0]

    return feed_forward_chunk


def _check_feed_forward(intermediate: str, kinds: dict[str, str], module):
    return unlike(module, kinds) or check_activation(f"{intermediate}.intermediate_act_fn", module)


def _bert_attention_forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
    """BertSelfAttention and its copies; a cross-attention's signature is `_bert_cross_forward`'s."""
    if self.config._attn_implementation != "sdpa" or past_key_values is not None:
        return self.prismer_class.forward(self, hidden_states, attention_mask, past_key_values, **kwargs)
    kwargs.pop("encoder_hidden_states", None)
    drop = self.dropout.p if self.training else 0.0
    return _bert_attend(self, hidden_states, None, attention_mask, drop, kwargs), None


def _bert_cross_forward(
    self, hidden_states, encoder_hidden_states=None, attention_mask=None, past_key_values=None, **kwargs
):
    if self.config._attn_implementation != "sdpa" or past_key_values is not None:
        return self.prismer_class.forward(
            self, hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs
        )
    drop = self.dropout.p if self.training else 0.0
    return _bert_attend(self, hidden_states, encoder_hidden_states, attention_mask, drop, kwargs), None


def _qformer_attention_forward(
    self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
):
    if self.config._attn_implementation != "sdpa":
        return self.prismer_class.forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
        )
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    drop = self.attention_dropout if self.training else 0.0
    return _bert_attend(self, hidden_states, encoder_hidden_states, mask, drop, kwargs), None


def _bert_attend(self, x, context, mask, dropout, options) -> Tensor:
    q, k, v = _bert_projections(self, x, context)
    return attend(self, q, k, v, mask, self.scaling, dropout, options).flatten(2)


def _bert_projections(self, x, context):
    q, k, v = (weights_of(self, name) for name in ("query", "key", "value"))
    parts = linears(x, [q, k, v]) if context is None else [*linears(x, [q]), *linears(context, [k, v])]
    return (heads(t, self.attention_head_size) for t in parts)


def _blip_text_attention_forward(
    self,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    past_key_values=None,
    **kwargs,
):
    drops = self.dropout.training and self.dropout.p > 0
    if past_key_values is not None or drops or weights_wanted(kwargs):
        return self.prismer_class.forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            **kwargs,
        )
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    q, k, v = _bert_projections(self, hidden_states, encoder_hidden_states)
    if mask is None:
        out = attention(q, k, v)
    else:  # added to the scores, whatever is in it
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device, q.dtype))
    return out.transpose(1, 2).flatten(2), None


# the rules


def _text_rules():
    qformers = [(family, f"{name}QFormer", None) for family, name in BLIP2]
    families = [(family, name, None) for family, name in _BERT] + [("blip", "BlipText", "blip_text"), *qformers]
    for family, name, file in families:
        for kind in ("SelfOutput", "Output"):
            target = of(family, name + kind, file=file)
            yield Rule(
                "layer_norm",
                target,
                {"forward": _residual_norm_forward},
                children=("LayerNorm",),
                covers=("LayerNorm",),
            )
        first, second = ("intermediate", "output") if "QFormer" not in name else ("intermediate_query", "output_query")
        target = of(family, f"{name}Layer", file=file)
        kinds = {first: of(family, f"{name}Intermediate", file=file), second: of(family, f"{name}Output", file=file)}
        yield Rule(
            "mlp",
            target,
            {"feed_forward_chunk" + first.removeprefix("intermediate"): _feed_forward(first, second)},
            partial(_check_feed_forward, first, kinds),
            children=(f"{first}.dense", f"{second}.dense", f"{second}.LayerNorm"),
            covers=(first, second),
        )
    attentions = [(of(family, f"{name}SelfAttention"), _bert_attention_forward, None) for family, name in _BERT]
    attentions += [(of(family, f"{name}CrossAttention"), _bert_cross_forward, None) for family, name in _BERT]
    attentions += [
        (of(family, f"{name}MultiHeadAttention"), _qformer_attention_forward, None) for family, name, _ in qformers
    ]
    attentions += [(of("blip", "BlipTextSelfAttention", file="blip_text"), _blip_text_attention_forward, check_unheard)]
    for target, forward, check in attentions:
        options = {"check": check} if check else {}
        yield Rule("attention", target, {"forward": forward}, children=_QKV, **options)


RULES = tuple(_text_rules())
