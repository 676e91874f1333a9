"""TextDecoder: RoBERTa made causal, with cross-attention and late-norm adaptors in every layer (spec 1.7).

Self-attention goes through a callable, `attend(layer, q, k, v)`, so that training (a causal mask), beam search and
answer ranking (caches) run the same layers. R rows of text belong to B images, G = R / B rows each, in order; the
queries of an image's rows are packed into one longer query, so keys and values of an image are never repeated.
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prismer.config import PrismerConfig
from prismer.kernels.activation import bias_activation
from prismer.kernels.attention import attention
from prismer.kernels.cross_attention import cross_attention
from prismer.kernels.layer_state import is_plain_layer
from prismer.kernels.linear import linears
from prismer.kernels.modules import MLP, Adaptor, LayerNorm, MultiheadAttention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q, k, v), each (R, H, Q, K) -> (R, H, Q, K)."""


def in_a_row(parts: list[Tensor]) -> Tensor:
    """(B, G, T) tensors, whose G and T may differ -> (B, all tokens of an image)."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def position_ids(ids: Tensor, pad_id: int) -> Tensor:
    """RoBERTa's positions: pads are at `pad_id`; the first real token at pad_id + 1, pads in between do not count."""
    keep = ids.ne(pad_id)
    return torch.where(keep, keep.cumsum(-1) + pad_id, pad_id)


def causal_attend(keep: Tensor, dropout: float = 0.0) -> Attend:
    """Self-attention of whole rows: causal, and no key outside `keep` (R, T); position 0 must be kept."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, key_mask=keep, dropout=dropout)

    return attend


def packed_attend(keeps: list[Tensor], dropout: float = 0.0) -> Attend:
    """Self-attention of rows that hold all texts of an image end to end: each text attends to itself, causally.

    Args:
        keeps: (B, G, T) bool, the real tokens of G texts; several of them lie behind one another in a row.
    """
    attends = [causal_attend(keep.flatten(0, 1), dropout) for keep in keeps]
    if len(keeps) == 1 and keeps[0].shape[1] == 1:
        # one text an image: there is nothing to take apart
        return attends[0]
    sizes = [keep.shape[1] * keep.shape[2] for keep in keeps]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for keep, one, *parts in zip(keeps, attends, *(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
            G = keep.shape[1]
            out = one(layer, *(rearrange(x, "b h (g t) k -> (b g) h t k", g=G) for x in parts))
            pieces.append(rearrange(out, "(b g) h t k -> b h (g t) k", g=G))
        return torch.cat(pieces, dim=2)

    return attend


class Dropout(nn.Dropout):
    """`nn.Dropout` as one operator, where torch's own are four on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return torch.native_dropout(x, self.p, True)[0]


_PROJECTIONS = ("query", "key", "value", "output")
# RoBERTa's names


class SelfAttention(MultiheadAttention):
    """RoBERTa's attention sub-layer: norm(x + drop(output(attend(q, k, v))))."""

    def __init__(self, config: PrismerConfig):
        super().__init__(config.text_width, config.text_heads, names=_PROJECTIONS)
        self.norm = LayerNorm(config.text_width)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """x: (R, Q, D)."""
        out = self.merge(attend(layer, *self.project(x)))
        return self.norm.add(self.drop(out), x)[0]


class CrossAttention(MultiheadAttention):
    """Text queries over image tokens, own dense and norm, no mask, no gate."""

    def __init__(self, config: PrismerConfig):
        super().__init__(
            config.text_width,
            config.text_heads,
            context_width=config.vision_width,
            names=_PROJECTIONS,
            dropout=config.dropout,
        )
        self.norm = LayerNorm(config.text_width)
        self.drop = Dropout(config.dropout)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, vision width) -> keys and values (B, H, N, K)."""
        pair = [(layer.weight, layer.bias) for layer in (self.key, self.value)]
        return tuple(self._heads(part) for part in linears(context, pair))

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x: (R, Q, D); context: image tokens (B, N, vision width), or what `project_context` made of them."""
        shared = context if isinstance(context, Tensor) else context[0]
        R, B = x.shape[0], shared.shape[0]
        (q,) = linears(x, [(self.query.weight, self.query.bias)])
        dropout = self.dropout if self.training else 0.0
        if isinstance(context, Tensor):
            key, value = self.key, self.value
            q = rearrange(q, "(b g) q d -> b (g q) d", b=B)
            out = cross_attention(
                q, context, key.weight, key.bias, value.weight, value.bias, self.num_heads, dropout=dropout
            )
        else:
            q = rearrange(q, "(b g) q (h k) -> b h (g q) k", b=B, h=self.num_heads)
            out = rearrange(attention(q, *context, dropout=dropout), "b h n k -> b n (h k)")
        (out,) = linears(rearrange(out, "b (g q) d -> (b g) q d", g=R // B), [(self.output.weight, self.output.bias)])
        return self.norm.add(self.drop(out), x)[0]


class PostNormMLP(MLP):
    """RoBERTa's feed-forward sub-layer: norm(x + drop(output(gelu(intermediate(x)))))."""

    def __init__(self, config: PrismerConfig):
        super().__init__(config.text_width, config.text_mlp_width, "gelu", names=("intermediate", "output"))
        self.norm = LayerNorm(config.text_width)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.add(self.drop(super().forward(x)), x)[0]


class DecoderLayer(nn.Module):
    """A RoBERTa layer with cross-attention and a late-norm adaptor between its halves."""

    _z3_leaf = True
    # ZeRO-3 gathers the block's parameters at once, instead of each layer's by hooks of its own

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.cross = CrossAttention(config)
        self.adaptor = Adaptor(config.text_width, late=True)
        self.mlp = PostNormMLP(config)

    @property
    def pretrained(self) -> tuple[nn.Module, ...]:
        """The modules that come from RoBERTa: what `freeze_lang` freezes."""
        return self.attention, self.mlp

    def forward(self, x: Tensor, layer: int, attend: Attend, context) -> Tensor:
        x = self.attention(x, layer, attend)
        x = self.adaptor(self.cross(x, context))
        return self.mlp(x)


class ExtraLayer(nn.Module):
    """The plain RoBERTa layer after the stack: no cross-attention, no adaptor, always trained."""

    _z3_leaf = True
    # ZeRO-3 gathers the block's parameters at once, instead of each layer's by hooks of its own

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.mlp = PostNormMLP(config)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        return self.mlp(self.attention(x, layer, attend))


class Embeddings(nn.Module):
    """Word + token type 0 + position, layer norm, dropout."""

    def __init__(self, config: PrismerConfig):
        super().__init__()
        width = config.text_width
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.max_positions, width, padding_idx=config.pad_id)
        self.token_type = nn.Embedding(1, width)
        self.norm = LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        """ids, positions: (R, Q); words: the rows of the word table, if they have been looked up. Returns (R, Q, D)."""
        words = self.word(ids) if words is None else words
        x = words + self.token_type.weight[0] + self.position(positions)
        return self.dropout(self.norm(x))


class LMHead(nn.Module):
    """RoBERTa's head up to the tied matrix: norm(gelu(dense(x))), and the bias over the vocabulary."""

    _z3_leaf = True
    # ZeRO-3 gathers the block's parameters at once, instead of each layer's by hooks of its own

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.dense = nn.Linear(config.text_width, config.text_width)
        self.norm = LayerNorm(config.text_width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain_layer(self.dense):
            return self.norm(bias_activation(self.dense(x), None, "gelu"))
        (h,) = linears(x, [(self.dense.weight, None)])
        return self.norm(bias_activation(h, self.dense.bias, "gelu"))


class TextDecoder(nn.Module):
    """ids and image tokens -> hidden states and logits; see the module's docstring for rows, images and `attend`."""

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.text_depth))
        self.extra = ExtraLayer(config)
        self.head = LMHead(config)
        self.apply(partial(_init_roberta, config.init_std))

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the word table, tied."""
        return self.embeddings.word.weight

    @property
    def head_bias(self) -> Tensor:
        """(V,)."""
        return self.head.bias

    def project_context(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer's cross-attention, once per image: (B, H, N, K) each."""
        return [layer.cross.project_context(context) for layer in self.layers]

    def run(
        self, ids: Tensor, positions: Tensor, attend: Attend, cross: list | Tensor, words: Tensor | None = None
    ) -> Tensor:
        """Hidden states of R rows of Q tokens.

        Args:
            ids, positions: (R, Q) int64.
            attend: self-attention of layer i = 0..depth (depth is the extra layer).
            cross: image tokens (B, N, vision width), or `project_context` of them; R is a multiple of B.
            words: (R, Q, D), the rows of the word table, if they have been looked up.

        Returns:
            (R, Q, D).
        """
        x = self.embeddings(ids, positions, words)
        for i, layer in enumerate(self.layers):
            context = cross if isinstance(cross, Tensor) else cross[i]
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, i, attend, context, use_reentrant=False)
            else:
                x = layer(x, i, attend, context)
        return self.extra(x, len(self.layers), attend)

    def transform(self, hidden: Tensor) -> Tensor:
        """The LM head up to (not including) the tied matrix: (..., D) -> (..., D)."""
        return self.head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return linears(self.transform(hidden), [(self.head_weight, self.head_bias)])[0]

    def forward(self, texts: list[Tensor], context: Tensor, words: Tensor | None = None) -> Tensor:
        """Teacher forcing.

        Args:
            texts: ids (B, G, T), one tensor or several whose G and T differ: long texts need not pad the short ones.
            context: image tokens (B, N, vision width).
            words: (B, tokens of an image, D), the rows of the word table, if they have been looked up.

        Returns:
            (B, tokens of an image, D): transformed hidden states, the tensors of `texts` behind one another, each
            flattened over (G, T). One tensor, since ZeRO-3 loses gradients of a leaf module that returns several.
        """
        pad = self.config.pad_id
        dropout = self.config.dropout if self.training else 0.0
        # all tokens of an image's texts in one row: only self-attention knows where a text ends
        ids = in_a_row(texts)
        positions = torch.cat([position_ids(part, pad).flatten(1) for part in texts], dim=1)
        attend = packed_attend([part.ne(pad) for part in texts], dropout)
        return self.transform(self.run(ids, positions, attend, context, words))


def _init_roberta(std: float, module: nn.Module) -> None:
    """N(0, std) matrices, zero biases (spec 1.8: std 0.02)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
