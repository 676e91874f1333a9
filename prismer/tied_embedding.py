"""One gradient for a word table that is embedding and head at once.

Autograd forms a gradient of the whole table for each of its uses and adds them: the head's comes first and waits, and
at the end of the decoder's backward pass, while all of the encoder's activations are alive, the embedding adds a second
one that is zero but for the few rows of the text. With RoBERTa's 50,265 rows of 768 in fp32 each is 154 MB.
Here the table passes through one node to both uses, which adds those few rows into the head's gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.dispatch import is_partitioned, on_host


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, pad_id):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.pad_id, ctx.rows = pad_id, table.shape[0]
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, drows, dhead):
        (ids,) = ctx.saved_tensors
        if drows is None:
            return dhead, None, None
        D = drows.shape[-1]
        if dhead is None:
            dhead = drows.new_zeros(ctx.rows, D)
        drows = drows.masked_fill((ids == ctx.pad_id)[..., None], 0)
        # in place: the head's gradient was made for this node, and nothing else holds it
        return dhead.index_add_(0, ids.flatten(), drows.reshape(-1, D)), None, None


def look_up(embedding: nn.Embedding, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows of a table, and the table for a head that makes its gradient anew, as `linear_cross_entropy` does.

    Only in eager training on a CPU. Elsewhere, and where ZeRO-3 has partitioned the table, the embedding looks them up
    by itself: on a GPU the second gradient is small beside activations, and torch sums it in a fixed order.

    Args:
        embedding: its table is (V, D); the row of its `padding_idx` gets no gradient from the look-up.
        ids: int64 of any shape.

    Returns:
        (..., D) and (V, D), or None.
    """
    # not by its name, at which ZeRO-3 would gather it
    (table,) = embedding.parameters()
    if not (table.requires_grad and torch.is_grad_enabled() and on_host(table) and not is_partitioned(table)):
        return None
    return _LookUp.apply(table, ids, embedding.padding_idx)
