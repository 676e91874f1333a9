"""One gradient for a word table that is both embedding and output matrix.

Autograd forms one gradient of the whole table for each use and adds them. The head's comes first and waits. At the end
of the decoder's backward pass, while all activations of the encoder are alive, the embedding adds a second one, zero
except for the few rows of the text. For RoBERTa's 50,265 rows of 768 in fp32, each gradient takes 154 MB. Here both
uses go through one node, which adds those few rows to the head's gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.dispatch import is_partitioned, on_host


class _EmbedTied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.pad_id, ctx.rows = pad_id, table.shape[0]
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, dhead: Tensor | None) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        if drows is None:
            return dhead, None, None
        D = drows.shape[-1]
        if dhead is None:
            dhead = drows.new_zeros(ctx.rows, D)
        drows = drows.masked_fill((ids == ctx.pad_id)[..., None], 0)
        # in place: the head's gradient was made for this node, and nothing else holds it
        return dhead.index_add_(0, ids.flatten(), drows.reshape(-1, D)), None, None


def embed_tied(embedding: nn.Embedding, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a table, and the table for a head that forms its gradient anew, as `linear_cross_entropy` does.

    Both share one gradient in eager training on a CPU. On other devices, and under ZeRO-3, autograd adds two: on a GPU
    the second one is small beside the activations, and torch sums it in a fixed order.

    Args:
        embedding: its table is (V, D); the row of its `padding_idx` gets no gradient from the look-up.
        ids: int64 of any shape.

    Returns:
        (..., D) rows and the (V, D) table.
    """
    if type(embedding) is not nn.Embedding:
        # wrapped, by PEFT for example: it has to be called
        return embedding(ids), embedding.weight
    # reading `embedding.weight` would make ZeRO-3 gather it
    (table,) = embedding.parameters()
    if table.requires_grad and torch.is_grad_enabled() and on_host(table) and not is_partitioned(table):
        return _EmbedTied.apply(table, ids, embedding.padding_idx)
    # in this order: after its own forward pass ZeRO-3 releases the table, and for the head it must be gathered
    return embedding(ids), embedding.weight
