"""TextDecoder: RoBERTa made causal, with cross-attention and a late-norm adaptor in every layer.

Source: Prismer, arXiv:2303.02506, section 3.2.

Self-attention is a callable, `attend(layer, q, k, v)`. Training passes a causal mask, beam search and answer ranking
pass caches, and all three run the same layers. R rows of text belong to B images in order, G = R / B rows to each; the
queries of an image's rows are packed into one longer query, so that its keys and values are never repeated. Training
computes no padding: its layers see the tokens of all texts as one row, and a `Packing` says where each token is.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prismer.batch import Detections, Packing, TextBatch, shifted
from prismer.config import PrismerConfig
from prismer.detections import DetectionTokens, start_copying
from prismer.errors import InputError
from prismer.kernels.activation import bias_activation
from prismer.kernels.attention import attention
from prismer.kernels.cross_attention import cross_attention
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.layer_state import is_plain_layer
from prismer.kernels.linear import linears
from prismer.kernels.modules import MLP, Adaptor, LayerNorm, MultiheadAttention, apply_linear
from prismer.look_up import look_up
from prismer.tied_embedding import embed_tied

# (layer index, q, k, v), each (R, H, Q, K) -> (R, H, Q, K)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# for one layer's cross-attention keys and values of L context tokens, (B, H, L, K) each; with detections among the
# tokens also which of them are seen, (B, L) bool
KeysValues = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def position_ids(ids: Tensor, pad_id: int) -> Tensor:
    """RoBERTa's positions: pads are at `pad_id`, the first real token at pad_id + 1; pads in between do not count."""
    keep = ids.ne(pad_id)
    return torch.where(keep, keep.cumsum(-1) + pad_id, pad_id)


def causal_attend(keep: Tensor, dropout: float = 0.0) -> Attend:
    """Self-attention of whole rows: causal, and no key outside `keep` (R, T); position 0 must be kept."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, key_mask=keep, dropout=dropout)

    return attend


def packed_attend(keeps: list[Tensor], packing: Packing, dropout: float = 0.0) -> Attend:
    """Self-attention of packed texts: each text attends causally to itself.

    Args:
        keeps: (B, G, T) bool of each part of the texts, the real tokens.
        packing: of the texts; queries, keys and values are those of its tokens.
    """
    attends = [causal_attend(keep.flatten(0, 1), dropout) for keep in keeps]
    sizes = [keep.numel() for keep in keeps]

    def attend(layer: int, *heads: Tensor) -> Tensor:
        rows, H, _, K = heads[0].shape
        flat = tuple(x.transpose(1, 2).reshape(-1, H * K) for x in heads)
        if packing.slots is not None:
            flat = look_up(packing.slots, packing.tokens, *flat)
        # the gradient of a split is a copy
        parts = [flat] if len(keeps) == 1 else zip(*(x.split(sizes) for x in flat), strict=True)
        pieces = []
        for keep, one, part in zip(keeps, attends, parts, strict=True):
            own = one(layer, *(x.view(-1, keep.shape[2], H, K).transpose(1, 2) for x in part))
            pieces.append(own.transpose(1, 2).reshape(-1, H * K))
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if packing.slots is not None:
            (out,) = look_up(packing.tokens, packing.slots, out)
        return out.view(rows, -1, H, K).transpose(1, 2)

    return attend


class Dropout(nn.Dropout):
    """`nn.Dropout` as one operator; torch's own takes four on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return torch.native_dropout(x, self.p, True)[0]


# RoBERTa's names
_PROJECTIONS = ("query", "key", "value", "output")


class SelfAttention(MultiheadAttention):
    """RoBERTa's attention sub-layer: norm(x + drop(output(attend(q, k, v))))."""

    def __init__(self, config: PrismerConfig):
        super().__init__(config.text_width, config.text_heads, names=_PROJECTIONS)
        self.norm = LayerNorm(config.text_width)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, attend: Attend, asked: Tensor | None = None) -> Tensor:
        """x: (R, Q, D); with `asked` (n,) places in the flat (R, Q), the result of these alone, (1, n, D)."""
        heads = attend(layer, *self.project(x))
        if asked is not None:
            x = x.flatten(0, 1).index_select(0, asked)[None]
            heads = heads.transpose(1, 2).flatten(0, 1).index_select(0, asked)[None].transpose(1, 2)
        out = self.merge(heads)
        return self.norm.add(self.drop(out), x)[0]


class CrossAttention(MultiheadAttention):
    """Text queries over context tokens, with an output projection and norm of its own; no gate."""

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
        """(B, L, vision width) -> keys and values (B, H, L, K)."""
        if self._are_plain:
            parts = linears(context, [(layer.weight, layer.bias) for layer in (self.key, self.value)])
        else:
            parts = self.key(context), self.value(context)
        return tuple(self._heads(part) for part in parts)

    @property
    def _are_plain(self) -> bool:
        """Whether the weights of key and value may be read instead of calling them; LoRA's layers must be called."""
        return is_plain_layer(self.key) and is_plain_layer(self.value)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        key_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (R, Q, D).
            context: tokens (B, L, vision width), or their keys and values.
            key_mask: (B, L) bool, which tokens are seen; None is all, or what the keys and values say.
            packing: where the tokens of `x` are; without `rows`, R is a multiple of B.
        """
        if isinstance(context, Tensor) and not (key_mask is None and self._are_plain):
            context = self.project_context(context)
            context = context if key_mask is None else (*context, key_mask)
        shared = context if isinstance(context, Tensor) else context[0]
        B, (R, Q, D) = shared.shape[0], x.shape
        q = apply_linear(self.query, x)
        rows = None if packing is None else packing.rows
        if rows is not None:
            (q,) = look_up(rows.flatten(), packing.places, q.flatten(0, 1))
            q = q.view(*rows.shape, D)
        dropout = self.dropout if self.training else 0.0
        if isinstance(context, Tensor):
            key, value = self.key, self.value
            q = q.reshape(B, -1, D)
            out = cross_attention(
                q, context, key.weight, key.bias, value.weight, value.bias, self.num_heads, dropout=dropout
            )
        else:
            q = self._heads(q.reshape(B, -1, D))
            keys, values, *seen = context
            out = attention(q, keys, values, key_mask=seen[0] if seen else None, dropout=dropout)
            out = rearrange(out, "b h n k -> b n (h k)")
        if rows is not None:
            (out,) = look_up(packing.places, rows.flatten(), out.flatten(0, 1))
        out = apply_linear(self.output, out.reshape(R, Q, D))
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

    # ZeRO-3 gathers all parameters of the module at once, instead of layer by layer
    _z3_leaf = True

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.cross = CrossAttention(config)
        self.adaptor = Adaptor(config.text_width, late=True)
        self.mlp = PostNormMLP(config)

    @property
    def pretrained(self) -> tuple[nn.Module, ...]:
        """The modules inherited from RoBERTa, which `freeze_lang` freezes."""
        return self.attention, self.mlp

    def forward(
        self,
        x: Tensor,
        layer: int,
        attend: Attend,
        context: Tensor | KeysValues,
        key_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        x = self.attention(x, layer, attend)
        x = self.adaptor(self.cross(x, context, key_mask, packing))
        return self.mlp(x)


class ExtraLayer(nn.Module):
    """The plain RoBERTa layer after the stack: no cross-attention, no adaptor, always trained."""

    # ZeRO-3 gathers all parameters of the module at once, instead of layer by layer
    _z3_leaf = True

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.mlp = PostNormMLP(config)

    def forward(self, x: Tensor, layer: int, attend: Attend, asked: Tensor | None = None) -> Tensor:
        """`asked`: see SelfAttention; no later layer reads the other places."""
        return self.mlp(self.attention(x, layer, attend, asked))


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

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        """words: (R, Q, D) rows of the word table; positions: (R, Q). Returns (R, Q, D)."""
        x = words + self.token_type.weight[0] + self.position(positions)
        return self.dropout(self.norm(x))


class LMHead(nn.Module):
    """RoBERTa's head up to the tied matrix, norm(gelu(dense(x))); and its bias over the vocabulary."""

    # ZeRO-3 gathers all parameters of the module at once, instead of layer by layer
    _z3_leaf = True

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
    """Token ids, image tokens and detections -> training loss, hidden states or logits.

    The module docstring defines the rows.
    """

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.text_depth))
        self.extra = ExtraLayer(config)
        self.head = LMHead(config)
        self.apply(partial(_init_roberta, config.init_std))
        self.detections = DetectionTokens(config) if config.expert_text else None
        if self.detections is not None:
            for layer in self.layers:
                start_copying(layer.cross, self.detections)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the word table, tied."""
        return self.embeddings.word.weight

    @property
    def head_bias(self) -> Tensor:
        """(V,)."""
        return self.head.bias

    def project_context(self, context: Tensor, detections: Detections | None = None) -> list[KeysValues]:
        """Keys and values of every layer's cross-attention, once per image.

        Args:
            context: image tokens (B, N, vision width).
            detections: what experts found, for a model that reads it as text.
        """
        if self.detections is None:
            return [layer.cross.project_context(context) for layer in self.layers]
        detections = self._checked(detections, len(context))
        context, key_mask = self._join_detections(context, self.embeddings.word(detections.ids), detections)
        return [(*layer.cross.project_context(context), key_mask) for layer in self.layers]

    def _checked(self, detections: Detections | None, num_images: int) -> Detections:
        size = num_images, self.config.num_detection_tokens
        if detections is None or tuple(detections.ids.shape) != size:
            found = "missing" if detections is None else f"{tuple(detections.ids.shape)} tokens"
            raise InputError(
                f"the detections of {', '.join(self.config.expert_text)} are {found}, this model reads {size}; "
                f"give them, or Detections.none for images without any"
            )
        return detections

    def _join_detections(self, context: Tensor, words: Tensor, detections: Detections) -> tuple[Tensor, Tensor]:
        """Image tokens, then the detections (B, N + S, vision width); and which are seen, (B, N + S) bool."""
        seen = F.pad(detections.ids.ne(self.config.pad_id), (context.shape[1], 0), value=True)
        return torch.cat([context, self.detections(words, detections.facts, context)], dim=1), seen

    def run(self, ids: Tensor, positions: Tensor, attend: Attend, context: Tensor | list[KeysValues]) -> Tensor:
        """Hidden states of R rows of Q tokens.

        Args:
            ids, positions: (R, Q) int64.
            attend: self-attention of layer i = 0..depth (depth is the extra layer).
            context: `project_context` of B images, or image tokens (B, N, vision width); R is a multiple of B.

        Returns:
            (R, Q, D).
        """
        return self._run_layers(self.embeddings(self.embeddings.word(ids), positions), attend, context)

    def _run_layers(
        self,
        x: Tensor,
        attend: Attend,
        context: Tensor | list[KeysValues],
        key_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(R, Q, D), or (1, n, D) of the targets if the packing knows them."""
        for i, layer in enumerate(self.layers):
            own = context if isinstance(context, Tensor) else context[i]
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, i, attend, own, key_mask, packing, use_reentrant=False)
            else:
                x = layer(x, i, attend, own, key_mask, packing)
        return self.extra(x, len(self.layers), attend, None if packing is None else packing.targets)

    def transform(self, hidden: Tensor) -> Tensor:
        """Hidden states as the tied matrix takes them: (..., D) -> (..., D)."""
        return self.head(hidden)

    def logits(self, state: Tensor) -> Tensor:
        """Transformed hidden states (..., D) -> (..., V)."""
        return linears(state, [(self.head_weight, self.head_bias)])[0]

    def forward(self, texts: TextBatch, context: Tensor, detections: Detections | None = None) -> Tensor:
        """The training loss by teacher forcing: the mean over texts of weight * summed loss.

        The loss of a token is the cross entropy with label smoothing; a `<pad>` is neither key nor target.

        Args:
            texts: G texts for each of B images.
            context: image tokens (B, N, vision width).
            detections: what experts found, for a model that reads it as text.

        Returns:
            A scalar. ZeRO-3 loses gradients of a leaf module that returns several tensors.
        """
        config, parts = self.config, texts.parts()
        packing = texts.every_slot() if texts.packing is None else texts.packing

        def tokens(parts: list[Tensor]) -> Tensor:
            """(R, Q) of the tokens."""
            flat = torch.cat([part.flatten() for part in parts])
            flat = flat if packing.tokens is None else flat[packing.tokens]
            return flat.view(len(texts.ids) if packing.rows is None else 1, -1)

        # the tokens of all texts side by side: only attention knows where a text and an image end
        ids = tokens([ids for ids, _ in parts])
        positions = tokens([position_ids(ids, config.pad_id) for ids, _ in parts])
        keeps = [ids.ne(config.pad_id) for ids, _ in parts]
        attend = packed_attend(keeps, packing, config.dropout if self.training else 0.0)
        if self.detections is None:
            words, head_weight = embed_tied(self.embeddings.word, ids)
            key_mask = None
        else:
            detections = self._checked(detections, len(context))
            # one look-up of all words, so that the table gets one gradient
            both = torch.cat([ids.flatten(), detections.ids.flatten()])
            words, head_weight = embed_tied(self.embeddings.word, both)
            words, names = words.split([ids.numel(), detections.ids.numel()])
            words, names = words.view(*ids.shape, -1), names.view(*detections.ids.shape, -1)
            context, key_mask = self._join_detections(context, names, detections)
        hidden = self._run_layers(self.embeddings(words, positions), attend, context, key_mask, packing)

        targets = [shifted(labels) for _, labels in parts]
        shares = (texts.weights.float() / texts.weights.numel()).split([t.shape[1] for t in targets], dim=1)
        # each position weighs what its text does; one sum, so that its logits are formed once
        weights = [share[:, :, None].expand(t.shape) for share, t in zip(shares, targets, strict=True)]
        labels, weights = tokens(targets).flatten(), tokens(weights).flatten()
        if packing.targets is not None:
            labels, weights = labels[packing.targets], weights[packing.targets]
        return linear_cross_entropy(
            self.transform(hidden).flatten(0, 1),
            head_weight,
            self.head_bias,
            labels,
            label_smoothing=config.label_smoothing,
            reduction="sum",
            row_weights=weights,
        )


def _init_roberta(std: float, module: nn.Module) -> None:
    """N(0, std) matrices and zero biases, as RoBERTa's (std 0.02)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
