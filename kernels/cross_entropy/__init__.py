"""Linear + label-smoothed cross entropy over a large vocabulary, without the (R, V) logits.

    z = x W^T + b
    loss = lse(z) - (1 - e) z_y - e mean_v(z_v)
    dz = softmax(z) - (1 - e) 1_y - e / V,   dx = dz W,   dW = dz^T x,   db = sum over rows of dz

This is 0.9 * (-log p_y) + 0.1 * mean_v(-log p_v) for e = 0.1, the loss of Prismer (arXiv:2303.02506). dz is computed in
fp32, p_y - 1 included, and rounded once.

Logits that are not finite are treated as in torch's cross_entropy. A logit of -inf, from a bias of -inf that forbids an
entry or pads the vocabulary, has p_v = 0. With e = 0 it adds nothing to the loss or to any gradient. If it belongs to
the target, or if e > 0, the loss of its row is inf, and dz by the formula above stays finite. A row with +inf or NaN,
or with nothing but -inf, has a loss and a gradient of NaN. fp16 logits beyond 65504 become infinite when they are
rounded. A row that is ignored may hold anything. To smooth over the allowed entries alone, forbid the others by -1e4.

Autograd saves the inputs themselves and each row's largest logit and log sum; or the finished gradients, if the forward
pass computes them.

One unit is the 2 R D V FLOPs of a product with W. What trains, and where its gradient is computed:
    nothing (no_grad)                            1 unit
    x alone, any reduction                       2 units, all in the forward pass; the backward pass scales dx
    W or b too, reduction "sum" or "mean":       3 units, all in the forward pass; the backward pass scales in place,
        on a GPU; in fp32; where R V is small    and does not even read the gradients where the factor is 1
    W or b too, otherwise                        1 unit forward, 3 backward: the logits are computed again

Extra memory, for numbers of s bytes, beyond what is returned or saved:
    torch, logits once      a chunk of rows: (4 + s) bytes for each of 2^23 logits at most (4 where x is fp32)
    torch, logits again     a chunk of vocabulary: (4 + s) bytes for each of 2^21 logits at most, and 4 R D for dx;
                            a chunk's rows of W see all of x, so that no copy of dW is summed over chunks
    triton                  statistics: 16 R bytes for every 1024 entries of the vocabulary. For a gradient,
                            dz of a chunk of rows, 128 MiB at most: all rows of a step; more rows than that need 4 V D
                            bytes to sum dW in fp32
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.checks import described
from prismer.kernels.cross_entropy import torch_backend, triton_backend
from prismer.kernels.dispatch import TORCH, TRITON, Op, runs_directly
from prismer.kernels.launch import fp32_precision

_REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    reduction: str = "none",
    row_weights: Tensor | None = None,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64); shapes as in `linear_cross_entropy`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    ignored = labels == ignore_index
    x = x.masked_fill(ignored[:, None], 0)
    log_p = F.linear(x.to(compute), weight.to(compute), bias.to(compute)).log_softmax(1)
    losses = -(1 - label_smoothing) * log_p.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    if label_smoothing:
        losses = losses - label_smoothing * log_p.mean(1)
    if row_weights is not None:
        losses = losses * row_weights.masked_fill(ignored, 0)
    losses = losses.masked_fill(ignored, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum().clamp(min=1)


OP = Op(
    name="linear_cross_entropy",
    reference=linear_cross_entropy_reference,
    backends=(TRITON, TORCH),
    depends=fp32_precision,
)


# the registered ops


def _rows_to_do(labels: Tensor, ignore_index: int) -> Tensor:
    """Indices of the rows that count; on a GPU all rows, since counting them would wait for the device."""
    if labels.device.type == "cpu":
        return (labels != ignore_index).nonzero()[:, 0]
    return torch.arange(labels.numel(), device=labels.device)


def _packed(
    x: Tensor, labels: Tensor, factor: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The rows that count: their indices, x, targets, factor. On a GPU all rows stay, and ignored ones are zeros."""
    rows = _rows_to_do(labels, ignore_index)
    if labels.device.type == "cpu":
        return rows, x[rows], labels[rows], None if factor is None else factor[rows]
    ignored = labels == ignore_index
    factor = (~ignored).to(torch.float32) if factor is None else factor.masked_fill(ignored, 0)
    return rows, x.masked_fill(ignored[:, None], 0), labels.masked_fill(ignored, 0), factor


def _placed(formed: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...], rows: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of `inputs`, empty where there is none; dx of `rows` is put among rows of zeros."""
    dx, dweight, dbias = (
        t.new_empty(0) if value is None else value.to(t.dtype) for value, t in zip(formed, inputs, strict=True)
    )
    if rows is not None and formed[0] is not None:
        dx = torch.zeros_like(inputs[0]).index_copy_(0, rows, dx)
    return dx, dweight, dbias


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    smoothing: float,
    ignore_index: int,
    reduce: bool,
    form_x: bool,
    form_weight: bool,
    form_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, needs = OP.choose(x), (form_x, form_weight, form_bias)
    if not any(needs):
        value, stats = _value(backend, x, weight, bias, labels, factor, smoothing, ignore_index, reduce)
        return value, stats, *_placed((None, None, None), (x, weight, bias), None)
    x, weight, bias, labels = (t.contiguous() for t in (x, weight, bias, labels))
    stats, losses = _buffers(x)
    factor, rows = None if factor is None else factor.to(stats.dtype).contiguous(), None
    if backend == "torch":
        rows, x_rows, targets, factor_rows = _packed(x, labels, factor, ignore_index)
        part = x_rows, weight, bias, targets
        losses[rows], stats[:, rows], formed = torch_backend.form(*part, factor_rows, smoothing, needs)
        losses.masked_fill_(labels == ignore_index, 0)
    else:
        formed = triton_backend.gradients(
            x, weight, bias, labels, factor, smoothing, ignore_index, losses, stats, False, needs
        )
    gradients = _placed(formed, (x, weight, bias), rows)
    return _reduced(losses, labels, factor, ignore_index, reduce), stats, *gradients


def _value(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    smoothing: float,
    ignore_index: int,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """Losses or their sum, and the statistics, without a gradient."""
    x, weight, bias, labels = x.contiguous(), weight.contiguous(), bias.contiguous(), labels.contiguous()
    if backend == "torch":
        stats, losses = _buffers(x)
        rows, x_rows, targets, _ = _packed(x, labels, None, ignore_index)
        losses[rows], stats[:, rows] = torch_backend.statistics(x_rows, weight, bias, targets, smoothing)
        losses.masked_fill_(labels == ignore_index, 0)
    else:
        # the kernels write every row
        R = x.shape[0]
        stats, losses = x.new_empty((2, R), dtype=torch.float32), x.new_empty(R, dtype=torch.float32)
        if R:
            triton_backend.statistics(x, weight, bias, labels, smoothing, ignore_index, losses, stats, None)
    factor = None if factor is None else factor.to(stats.dtype)
    return _reduced(losses, labels, factor, ignore_index, reduce), stats


def _buffers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for the statistics (2, R) and the losses (R,)."""
    stats = x.new_zeros((2, x.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))
    return stats, torch.zeros_like(stats[0])


def _reduced(losses: Tensor, labels: Tensor, factor: Tensor | None, ignore_index: int, reduce: bool) -> Tensor:
    if not reduce:
        return losses
    if factor is not None:
        # an ignored row's loss is 0, whatever its factor
        losses = (losses * factor).masked_fill_(labels == ignore_index, 0)
    return losses.sum()


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, reduce: bool, form_x: bool, form_weight: bool, form_bias: bool
) -> tuple[Tensor, ...]:
    compute = torch.promote_types(x.dtype, torch.float32)
    value = x.new_empty(() if reduce else x.shape[:1], dtype=compute)
    stats = x.new_empty((2, x.shape[0]), dtype=compute)
    return value, stats, *_backward_fake(x, weight, bias, form_x, form_weight, form_bias)


def _backward(
    dlosses: Tensor,
    stats: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    smoothing: float,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, labels = (t.contiguous() for t in (x, weight, bias, labels))
    dlosses = dlosses.to(stats.dtype).contiguous()
    needs, rows = (need_x, need_weight, need_bias), None
    backend = OP.choose(x)
    if backend == "torch":
        rows, x_rows, targets, factor = _packed(x, labels, dlosses, ignore_index)
        part = x_rows, weight, bias, targets
        formed = torch_backend.backward(*part, stats[:, rows], factor, smoothing, needs)
    else:
        formed = triton_backend.gradients(
            x, weight, bias, labels, dlosses, smoothing, ignore_index, None, stats, True, needs
        )
    return _placed(formed, (x, weight, bias), rows)


def _backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape if needed else 0) for t, needed in ((x, need_x), (weight, need_weight), (bias, need_bias))
    )


def _scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    backend = OP.choose(gradient)
    if backend == "triton":
        triton_backend.scale(gradient, factor)
        # as torch's own operators do when they change a tensor
        torch.autograd.graph.increment_version(gradient)
    elif gradient.is_cuda or factor.item() != 1:
        gradient.mul_(factor)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, factor, smoothing, ignore_index, reduce, *form = inputs
    _, stats, *gradients = output
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.formed, ctx.reduce = any(form), reduce
    if ctx.formed:
        ctx.save_for_backward(*gradients)
    else:
        # the parameters themselves: ZeRO-3 would keep a saved view gathered until backward
        ctx.save_for_backward(x, weight, bias, labels, stats, factor)
        ctx.smoothing, ctx.ignore_index = smoothing, ignore_index


def _graph_is_kept() -> bool:
    """May there be another backward pass (retain_graph)? True if torch cannot tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else tell()


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times the gradient of the loss: in place, unless the saved tensor is needed again."""
    if type(gradient) is not Tensor or _graph_is_kept():
        # a compiler traces with subclasses, and finds by itself which memory is free
        return (gradient * factor).to(gradient.dtype)
    # a new tensor over the same memory: autograd copies a gradient that something else still holds
    gradient = gradient.detach()
    _scale_(gradient, factor)
    return gradient


def _autograd(ctx: Any, dvalue: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative; drop create_graph=True")
    needs = ctx.needs_input_grad[:3]
    if not ctx.formed:
        x, weight, bias, labels, stats, factor = ctx.saved_tensors
        if ctx.reduce:
            dvalue = dvalue.expand(x.shape[0]) if factor is None else dvalue * factor
        return _linear_cross_entropy_backward(
            dvalue, stats, x, weight, bias, labels, ctx.smoothing, ctx.ignore_index, *needs
        )
    if ctx.reduce:
        return tuple(_scaled(t, dvalue) if needed else None for t, needed in zip(ctx.saved_tensors, needs, strict=True))
    dx = ctx.saved_tensors[0]
    # dx of an ignored row is 0, whatever the gradient of its loss is
    return ((dx * dvalue[:, None]).to(dx.dtype).masked_fill_(dx == 0, 0),)


_linear_cross_entropy = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_linear_cross_entropy_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")
_scale_ = OP.register(_scale_in_place, fake=lambda: None, suffix="_scale_", mutates=("gradient",))


# the public function


def _formed_in_forward(x: Tensor, V: int, reduce: bool, needs: tuple[bool, bool, bool]) -> bool:
    """Are the needed gradients computed together with the loss, so that its logits are computed once?"""
    if needs == (True, False, False):
        return True
    # a low-precision dW needs a copy in fp32 for sums over chunks of rows: on a CPU it is larger than the logits
    in_place = x.dtype in (torch.float32, torch.float64) or x.shape[0] * V <= torch_backend.ROW_CHUNK_ELEMENTS
    return any(needs) and reduce and (x.is_cuda or in_place)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    reduction: str,
    row_weights: Tensor | None,
) -> None:
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.shape[1] != weight.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or not weight.shape[0]
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} "
            f"do not fit; pass (R, D), (V, D) and (V,), V at least 1"
        )
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"labels are {described(labels)}; pass int64 of shape ({x.shape[0]},)")
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; cast one so that both are the same float")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype}; pass floats")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose {', '.join(_REDUCTIONS)}")
    if row_weights is not None:
        if not row_weights.is_floating_point() or row_weights.shape != x.shape[:1]:
            raise ValueError(f"row_weights are {described(row_weights)}; pass floats of shape ({x.shape[0]},)")
        if row_weights.requires_grad:
            raise ValueError("row_weights require grad and get none; pass row_weights.detach()")


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Callable:
    """What runs a call on x, weight, bias, labels and row_weights."""
    _check(x, weight, bias, labels, label_smoothing, reduction, row_weights)
    if OP.route(x) == "reference":
        settings = dict(label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
        return lambda x, weight, bias, labels, row_weights: linear_cross_entropy_reference(
            x, weight, _given(bias, weight), labels, row_weights=row_weights, **settings
        )
    reduce = reduction != "none"
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
    form = needs if _formed_in_forward(x, weight.shape[0], reduce, needs) else (False,) * 3
    options: tuple = label_smoothing, ignore_index, reduce
    forward: Callable = _linear_cross_entropy
    if runs_directly(x, weight, bias, labels, row_weights):
        backend = OP.choose(x)
        dense = all(t is None or t.is_contiguous() for t in (x, weight, bias, labels))
        if backend == "triton" and reduction == "none" and row_weights is None and x.numel() and dense:
            losses = triton_backend.prepare(x, weight, label_smoothing, ignore_index)
            return lambda x, weight, bias, labels, _: losses(x, weight, _given(bias, weight), labels)
        forward = functools.partial(_value, backend)
    else:
        options += form

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, row_weights: Tensor | None) -> Tensor:
        factor = row_weights if reduce else None
        if reduction == "mean":
            compute = torch.promote_types(x.dtype, torch.float32)
            share = 1 / (labels != ignore_index).sum().clamp(min=1).to(compute)
            factor = share.expand(labels.shape) if factor is None else factor.to(compute) * share
        value = forward(x, weight, _given(bias, weight), labels, factor, *options)[0]
        if not reduce and row_weights is not None:
            # an ignored row's loss is 0, whatever its weight
            value = (value * row_weights).masked_fill(labels == ignore_index, 0)
        return value

    return run


def _given(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[:1]) if bias is None else bias


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    reduction: str = "none",
    row_weights: Tensor | None = None,
) -> Tensor:
    """Label-smoothed cross entropy of `x @ weight.T + bias`.

    To train, ask for the sum or the mean here: the gradients can then be computed with the loss, and the logits once.
    With "none" any gradient per row may flow back, and the logits are computed again (unless x alone trains). The
    docstring of the module has the FLOPs and the memory of each.

    Args:
        x: (R, D), any floating dtype.
        weight: (V, D), the dtype of `x`.
        bias: (V,), any floating dtype, added in fp32; or None, as in most causal language models.
        labels: (R,) int64 in [0, V), or `ignore_index`, whose rows give 0 and no gradient.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1).
        ignore_index: the label of a row that takes no part.
        reduction: "none", "sum" over rows, or "mean": the sum divided by the number of rows that count.
        row_weights: (R,) floats that multiply the losses of the rows before the reduction; they get no gradient.

    Returns:
        (R,) losses, or with "sum" or "mean" one number, 0 if no row counts; fp32 (float64 for float64 `x`).

    Raises:
        ValueError: if a shape, dtype or setting does not fit.
        RuntimeError: in the backward pass, if a second derivative is asked for.
    """
    tensors = x, weight, bias, labels, row_weights
    return OP.resolve(_plan, tensors, label_smoothing, ignore_index, reduction)(*tensors)
