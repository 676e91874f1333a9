"""Linear + label-smoothed cross entropy over a large vocabulary, without the (R, V) logits.

    z = x W^T + b
    loss = lse(z) - (1 - e) z_y - e mean_v(z_v)
    dz = softmax(z) - (1 - e) 1_y - e / V

This is 0.9 * (-log p_y) + 0.1 * mean_v(-log p_v) for e = 0.1, the loss of Prismer
(arXiv:2303.02506). Rows go through in chunks: no logits exist beyond those of one chunk. With
trainable `weight` or `bias` the backward pass forms them again; with frozen ones `dx` is finished
in the forward pass, up to the factor of each row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prismer.kernels.dispatch import backend_for

_CHUNK_ELEMENTS = 2**24
# logits at a time, 64 MiB in fp32: 333 rows of RoBERTa's vocabulary, an efficient matrix product


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64); shapes as in `linear_cross_entropy`."""
    compute = _compute_dtype(x)
    z = F.linear(x.to(compute), weight.to(compute), bias.to(compute))
    ignored = labels == ignore_index
    z_y = z.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = z.logsumexp(1) - (1 - label_smoothing) * z_y - label_smoothing * z.mean(1)
    return losses.masked_fill(ignored, 0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(rows: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Split row numbers evenly, so that a chunk's logits stay within _CHUNK_ELEMENTS."""
    if not rows.numel():
        return ()
    limit = max(_CHUNK_ELEMENTS // vocabulary, 1)
    count = -(-rows.numel() // limit)
    return rows.split(-(-rows.numel() // count))


def _rows_to_do(labels: Tensor, ignore_index: int) -> Tensor:
    """Numbers of the rows that matter; on a GPU all: to count them would wait for the device."""
    if labels.device.type == "cpu":
        return (labels != ignore_index).nonzero()[:, 0]
    return torch.arange(labels.numel(), device=labels.device)


def _centred_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits of a chunk minus each row's largest, which cancels in the loss and in its gradient."""
    # the product may come out in bf16; the bias and everything after it is fp32
    z = F.linear(x, weight).to(_compute_dtype(x))
    z += bias.to(z.dtype)
    z -= z.amax(1, keepdim=True)
    return z


def _to_dz(z: Tensor, log_sum: Tensor, target: Tensor, smoothing: float, factor: Tensor) -> Tensor:
    """Turn centred logits into their gradient, in place; `factor` (rows,) is that of the losses."""
    dz = z.sub_(log_sum[:, None]).exp_()
    # p_y - 1 is formed here, before any rounding to the dtype of the weights
    dz.sub_(smoothing / z.shape[1])
    dz.scatter_add_(1, target[:, None], torch.full_like(dz[:, :1], smoothing - 1))
    return dz.mul_(factor[:, None])


class LinearCrossEntropyFunction(torch.autograd.Function):
    """`linear_cross_entropy` with its gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        smoothing: float,
        ignore_index: int,
        train: bool,
    ) -> Tensor:
        compute = _compute_dtype(x)
        losses = torch.zeros(x.shape[0], dtype=compute, device=x.device)
        log_sums = torch.zeros_like(losses)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.again = train and (needs_weight or needs_bias)
        dx = torch.zeros_like(x) if train and needs_x and not ctx.again else None

        for rows in _chunks(_rows_to_do(labels, ignore_index), weight.shape[0]):
            z = _centred_logits(x[rows], weight, bias)
            label = labels[rows]
            kept = label != ignore_index
            target = label.masked_fill(~kept, 0)
            picked, mean = z.gather(1, target[:, None])[:, 0], z.mean(1)
            if dx is None:
                log_sum = z.exp_().sum(1).log_()
            else:
                log_sum = z.logsumexp(1)
                dx[rows] = (
                    _to_dz(z, log_sum, target, smoothing, kept.to(compute)).to(x.dtype) @ weight
                )
            losses[rows] = (log_sum - (1 - smoothing) * picked - smoothing * mean).masked_fill_(
                ~kept, 0
            )
            log_sums[rows] = log_sum

        if ctx.again:
            # the parameters themselves: ZeRO-3 would keep a saved view gathered until backward
            ctx.save_for_backward(x, weight, bias, labels, log_sums)
        else:
            ctx.save_for_backward(dx)
        ctx.smoothing, ctx.ignore_index = smoothing, ignore_index
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses: Tensor):
        if not ctx.again:
            (dx,) = ctx.saved_tensors
            dx = (dx * dlosses[:, None]).to(dx.dtype) if ctx.needs_input_grad[0] else None
            return dx, None, None, None, None, None, None

        x, weight, bias, labels, log_sums = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        compute = log_sums.dtype
        dx = torch.zeros_like(x) if needs_x else None
        dweight = torch.zeros_like(weight, dtype=compute) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=compute) if needs_bias else None
        for rows in _chunks(_rows_to_do(labels, ctx.ignore_index), weight.shape[0]):
            x_rows, label = x[rows], labels[rows]
            kept = label != ctx.ignore_index
            factor = dlosses[rows].masked_fill(~kept, 0).to(compute)
            target = label.masked_fill(~kept, 0)
            dz = _to_dz(
                _centred_logits(x_rows, weight, bias), log_sums[rows], target, ctx.smoothing, factor
            )
            if needs_bias:
                dbias += dz.sum(0)
            if needs_x:
                dx[rows] = dz.to(x.dtype) @ weight
            if needs_weight:
                # summed over chunks in fp32: a bf16 sum over thousands of rows drifts
                dweight.addmm_(dz.t(), x_rows.to(compute))
        dweight = dweight.to(weight.dtype) if needs_weight else None
        dbias = dbias.to(bias.dtype) if needs_bias else None
        return dx, dweight, dbias, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """Label-smoothed cross entropy of `x @ weight.T + bias`, one loss per row, nothing averaged.

    Args:
        x: (R, D), any floating dtype.
        weight: (V, D), the dtype of `x`.
        bias: (V,), any floating dtype; it is added in fp32.
        labels: (R,) int64 in [0, V), or `ignore_index`, whose rows give 0 and no gradient.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1).
        ignore_index: the label of a row that takes no part.

    Returns:
        (R,) losses, fp32 (float64 for float64 `x`). Any gradient per row may flow back.

    Raises:
        ValueError: if a shape, dtype or setting does not fit.
    """
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.shape[1] != weight.shape[1]
        or bias.shape != weight.shape[:1]
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} "
            f"do not fit; pass (R, D), (V, D) and (V,)"
        )
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; "
            f"pass int64 of shape ({x.shape[0]},)"
        )
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}; cast one so that both are the same float"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    if backend_for("cross_entropy", x.device) == "reference":
        return linear_cross_entropy_reference(
            x, weight, bias, labels, label_smoothing=label_smoothing, ignore_index=ignore_index
        )
    return LinearCrossEntropyFunction.apply(
        x, weight, bias, labels, label_smoothing, ignore_index, torch.is_grad_enabled()
    )
