"""Linear + label-smoothed cross entropy over a large vocabulary, without the (R, V) logits.

    z = x W^T + b
    loss = lse(z) - (1 - e) z_y - e mean_v(z_v)
    dz = softmax(z) - (1 - e) 1_y - e / V,   dx = dz W,   dW = dz^T x,   db = sum over rows of dz

This is 0.9 * (-log p_y) + 0.1 * mean_v(-log p_v) for e = 0.1, the loss of Prismer (arXiv:2303.02506). dz is formed in
fp32, p_y - 1 included, and rounded once. Saved for the backward pass: the inputs themselves, and each row's largest
logit and log sum; or the finished gradients, where they are formed in the forward pass.

One unit is the 2 R D V FLOPs of a product with W. What is trained, and where its gradient is formed:
    nothing (no_grad)                            1 unit
    x alone, any reduction                       2 units, all in the forward pass; the backward pass scales dx
    W or b too, reduction "sum" or "mean":       3 units, all in the forward pass; the backward pass scales in place,
        on a GPU; in fp32; where R V is small    and does not even read the gradients where the factor is 1
    W or b too, otherwise                        1 unit forward, 3 backward: the logits are formed again

Extra memory, for numbers of s bytes, beyond what is returned or saved:
    torch, logits once      a chunk of rows: (4 + s) bytes for each of 2^23 logits at most (4 where x is fp32)
    torch, logits again     a chunk of vocabulary: (4 + s) bytes for each of 2^21 logits at most, and 4 R D for dx;
                            a chunk's rows of W see all of x, so that no copy of dW is summed over chunks
    triton                  statistics: 16 R bytes for every 1024 entries of the vocabulary. Where a gradient is formed,
                            dz of a chunk of rows, 128 MiB at most: all rows of a step; more rows than that need 4 V D
                            bytes to sum dW in fp32
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import cross_entropy_triton, dispatch, products
from prismer.kernels.cross_entropy_triton import add_product, pieces

_REDUCTIONS = ("none", "sum", "mean")
_CHUNK_ELEMENTS = 2**21
# logits of a chunk of vocabulary: in fp32 they stay in the cache of a CPU, and exp costs what it computes, not moves
_ROW_CHUNK_ELEMENTS = 2**23
# logits of a chunk of rows, each row whole: 166 rows of RoBERTa's vocabulary; fewer would wait for W from memory
_BLOCK_ROWS = 2048


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
    z = F.linear(x.to(compute), weight.to(compute), bias.to(compute))
    ignored = labels == ignore_index
    z_y = z.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = z.logsumexp(1) - (1 - label_smoothing) * z_y - label_smoothing * z.mean(1)
    if row_weights is not None:
        losses = losses * row_weights
    losses = losses.masked_fill(ignored, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum().clamp(min=1)


# torch


class _Scratch:
    """Memory for one chunk of logits, in fp32 (float64 for float64), and in the dtype of the product."""

    def __init__(self, x: Tensor, size: int):
        if products.on_onednn(x):
            # it gives no product into memory that is there
            size = 0
        self.wide = x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))
        self.low = self.wide if self.wide.dtype == x.dtype else x.new_empty(size)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x weight^T, in the dtype of x."""
        if products.on_onednn(x):
            return products.linear(x, weight)
        shape = x.shape[0], weight.shape[0]
        return torch.mm(x, weight.t(), out=self.low[: shape[0] * shape[1]].view(shape))

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The product may be rounded to the dtype of x; the bias and everything after it is not."""
        low = self.product(x, weight)
        if low.dtype == self.wide.dtype:
            return low.add_(bias)
        return self.wide[: low.numel()].view(low.shape).copy_(low).add_(bias)

    def rounded(self, dz: Tensor) -> Tensor:
        """`dz`, made in place of the logits, in the dtype of the product."""
        if self.low is self.wide:
            return dz
        return self.low[: dz.numel()].view(dz.shape).copy_(dz)


def _column(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each row's target is within a chunk of columns, and whether it is there at all."""
    local = targets - columns.start
    inside = (local >= 0) & (local < columns.stop - columns.start)
    return local.masked_fill_(~inside, 0)[:, None], inside


def _subtract_targets(
    dz: Tensor, targets: Tensor, columns: slice, smoothing: float, V: int
) -> Tensor:
    """From probabilities to dz, in place: p_y - 1 is formed here, before any rounding."""
    local, inside = _column(targets, columns)
    dz -= smoothing / V
    return dz.scatter_add_(1, local, (inside.to(dz.dtype) * (smoothing - 1))[:, None])


def _statistics_torch(x, weight, bias, targets, smoothing):
    """Losses and (2, R) statistics by chunks of the vocabulary; every row counts."""
    R, V = x.shape[0], weight.shape[0]
    row_blocks = pieces(R, min(_BLOCK_ROWS, _CHUNK_ELEMENTS))
    BR = row_blocks[0].stop if R else 1
    BV = max(_CHUNK_ELEMENTS // BR, 1)
    scratch = _Scratch(x, BR * min(BV, V))
    state = scratch.wide.new_zeros(R, 4)
    state[:, 0] = -torch.inf
    backend = dispatch.choose("logit_statistics", x.device, lambda name: supports(name, x))
    for columns in pieces(V, BV):
        for rows in row_blocks:
            part = bias[columns], targets[rows], columns, state[rows]
            if backend == "native":
                z = scratch.product(x[rows], weight[columns])
                torch.ops.prismer_native.logit_statistics(z, *part[:2], columns.start, part[3])
            else:
                _add_statistics(scratch.logits(x[rows], weight[columns], part[0]), *part[1:])
    top, exp_sum, picked, total = state.unbind(1)
    log_sum = exp_sum.log()
    # differences first: large logits cancel before they are added to what is small
    losses = log_sum + (1 - smoothing) * (top - picked) + smoothing * (top - total / V)
    return losses, torch.stack((top, log_sum))


def _add_statistics(z, targets, columns, state) -> None:
    """Take a chunk of logits, which it overwrites, into (R, 4): largest, sum of exp(z - largest), target's, sum."""
    top, exp_sum, picked, total = state.unbind(1)
    local, inside = _column(targets, columns)
    picked += z.gather(1, local)[:, 0].mul_(inside)
    total += z.sum(1)
    higher = torch.maximum(top, z.amax(1))
    exp_sum *= (top - higher).exp_()
    exp_sum += z.sub_(higher[:, None]).exp_().sum(1)
    top.copy_(higher)


def _backward_torch(x, weight, bias, targets, stats, factor, smoothing, needs):
    """dx, dweight and dbias as `needs` says, with the chunks of `_statistics_torch`; every row counts."""
    R, V = x.shape[0], weight.shape[0]
    row_blocks = pieces(R, min(_BLOCK_ROWS, _CHUNK_ELEMENTS))
    BR = row_blocks[0].stop if R else 1
    BV = max(_CHUNK_ELEMENTS // BR, 1)
    scratch = _Scratch(x, BR * min(BV, V))
    compute = stats.dtype
    dx = x.new_zeros(x.shape, dtype=compute) if needs[0] else None
    dweight = x.new_empty(weight.shape) if needs[1] else None
    dbias = stats.new_zeros(V) if needs[2] else None
    for columns in pieces(V, BV):
        w = weight[columns]
        sum_of_blocks = None
        if needs[1] and len(row_blocks) != 1:
            # a bf16 sum over many blocks of rows would drift
            sum_of_blocks = stats.new_zeros(w.shape)
        for rows in row_blocks:
            z = scratch.logits(x[rows], w, bias[columns])
            p = z.sub_(stats[0, rows, None]).sub_(stats[1, rows, None]).exp_()
            wide = _subtract_targets(p, targets[rows], columns, smoothing, V)
            wide *= factor[rows, None]
            if needs[2]:
                dbias[columns] += wide.sum(0)
            dz = scratch.rounded(wide)
            if needs[0]:
                dx[rows] += products.mm(dz, w)
            if sum_of_blocks is not None:
                sum_of_blocks += products.mm(dz.t(), x[rows])
            elif needs[1]:
                dweight[columns] = products.mm(dz.t(), x[rows])
        if sum_of_blocks is not None:
            dweight[columns] = sum_of_blocks
    return dx, dweight, dbias


def _form_torch(x, weight, bias, targets, factor, smoothing, needs):
    """Losses, statistics and gradients by chunks of rows, the logits formed once; every row counts."""
    (R, D), V = x.shape, weight.shape[0]
    chunks = pieces(R, max(_ROW_CHUNK_ELEMENTS // V, 1))
    scratch = _Scratch(x, (chunks[0].stop if R else 0) * V)
    stats = scratch.wide.new_empty(2, R)
    losses = scratch.wide.new_empty(R)
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = dbias = None
    if needs[1]:
        single = len(chunks) == 1
        dweight = None if single else stats.new_zeros(V, D)
    if needs[2]:
        dbias = stats.new_zeros(V)
    for rows in chunks:
        z = scratch.logits(x[rows], weight, bias)
        top = z.amax(1)
        z -= top[:, None]
        picked, mean = z.gather(1, targets[rows, None])[:, 0], z.mean(1)
        exp_sum = z.exp_().sum(1)
        stats[0, rows], stats[1, rows] = top, exp_sum.log()
        losses[rows] = stats[1, rows] - (1 - smoothing) * picked - smoothing * mean
        z *= (1 / exp_sum)[:, None]
        wide = _subtract_targets(z, targets[rows], slice(0, V), smoothing, V)
        if factor is not None:
            wide *= factor[rows, None]
        if needs[2]:
            dbias += wide.sum(0)
        dz = scratch.rounded(wide)
        if needs[0]:
            dx[rows] = products.mm(dz, weight)
        if needs[1] and single:
            dweight = products.mm(dz.t(), x[rows])
        elif needs[1]:
            add_product(dweight, dz.t(), x[rows])
    return losses, stats, (dx, dweight, dbias)


# the registered ops


def supports(backend: str, x: Tensor) -> str | None:
    """None if `backend` serves rows like those of `x`, else the reason why not."""
    if backend in ("native", "triton") and x.dtype == torch.float64:
        return f"{backend} cross_entropy computes in fp32, and x is float64"
    return None


def _rows_to_do(labels: Tensor, ignore_index: int) -> Tensor:
    """Numbers of the rows that count; on a GPU all: to count them would wait for the device."""
    if labels.device.type == "cpu":
        return (labels != ignore_index).nonzero()[:, 0]
    return torch.arange(labels.numel(), device=labels.device)


def _packed(x, labels, factor, ignore_index):
    """The rows that count: their numbers, x, targets, factor. Where all must stay, ignored ones are zeros."""
    rows = _rows_to_do(labels, ignore_index)
    if labels.device.type == "cpu":
        return rows, x[rows], labels[rows], None if factor is None else factor[rows]
    ignored = labels == ignore_index
    factor = (~ignored).to(torch.float32) if factor is None else factor.masked_fill(ignored, 0)
    return rows, x.masked_fill(ignored[:, None], 0), labels.masked_fill(ignored, 0), factor


def _placed(formed, inputs, rows: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of `inputs`, and empty where none was formed; dx of the `rows` done among zeros."""
    dx, dweight, dbias = (
        t.new_empty(0) if value is None else value.to(t.dtype)
        for value, t in zip(formed, inputs, strict=True)
    )
    if rows is not None and formed[0] is not None:
        dx = torch.zeros_like(inputs[0]).index_copy_(0, rows, dx)
    return dx, dweight, dbias


def _forward(
    x, weight, bias, labels, factor, smoothing, ignore_index, reduce, form_x, form_weight, form_bias
):
    x, weight, bias, labels = (t.contiguous() for t in (x, weight, bias, labels))
    needs, formed, rows = (form_x, form_weight, form_bias), (None, None, None), None
    stats = x.new_zeros((2, x.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))
    losses = torch.zeros_like(stats[0])
    factor = None if factor is None else factor.to(stats.dtype).contiguous()
    backend = dispatch.choose("cross_entropy", x.device, lambda name: supports(name, x))
    if backend == "torch":
        rows, x_rows, targets, factor_rows = _packed(x, labels, factor, ignore_index)
        part = x_rows, weight, bias, targets
        if any(needs):
            losses[rows], stats[:, rows], formed = _form_torch(*part, factor_rows, smoothing, needs)
        else:
            losses[rows], stats[:, rows] = _statistics_torch(*part, smoothing)
        losses.masked_fill_(labels == ignore_index, 0)
    elif any(needs):
        formed = cross_entropy_triton.gradients(
            x, weight, bias, labels, factor, smoothing, ignore_index, losses, stats, False, needs
        )
    elif x.shape[0]:
        cross_entropy_triton.statistics(
            x, weight, bias, labels, smoothing, ignore_index, losses, stats, None
        )
    gradients = _placed(formed, (x, weight, bias), rows)
    if not reduce:
        return losses, stats, *gradients
    if factor is not None:
        # an ignored row's loss is 0, whatever its factor
        losses = (losses * factor).masked_fill_(labels == ignore_index, 0)
    return losses.sum(), stats, *gradients


def _forward_fake(
    x, weight, bias, labels, factor, smoothing, ignore_index, reduce, form_x, form_weight, form_bias
):
    compute = torch.promote_types(x.dtype, torch.float32)
    value = x.new_empty(() if reduce else x.shape[:1], dtype=compute)
    stats = x.new_empty((2, x.shape[0]), dtype=compute)
    return value, stats, *_gradients_fake(x, weight, bias, form_x, form_weight, form_bias)


def _gradients_fake(x, weight, bias, need_x, need_weight, need_bias):
    return tuple(
        t.new_empty(t.shape if needed else 0)
        for t, needed in ((x, need_x), (weight, need_weight), (bias, need_bias))
    )


def _backward(
    dlosses, stats, x, weight, bias, labels, smoothing, ignore_index, need_x, need_weight, need_bias
):
    x, weight, bias, labels = (t.contiguous() for t in (x, weight, bias, labels))
    dlosses = dlosses.to(stats.dtype).contiguous()
    needs, rows = (need_x, need_weight, need_bias), None
    backend = dispatch.choose("cross_entropy", x.device, lambda name: supports(name, x))
    if backend == "torch":
        rows, x_rows, targets, factor = _packed(x, labels, dlosses, ignore_index)
        part = x_rows, weight, bias, targets
        formed = _backward_torch(*part, stats[:, rows], factor, smoothing, needs)
    else:
        formed = cross_entropy_triton.gradients(
            x, weight, bias, labels, dlosses, smoothing, ignore_index, None, stats, True, needs
        )
    return _placed(formed, (x, weight, bias), rows)


def _backward_fake(
    dlosses, stats, x, weight, bias, labels, smoothing, ignore_index, need_x, need_weight, need_bias
):
    return _gradients_fake(x, weight, bias, need_x, need_weight, need_bias)


def _scale_in_place(gradient, factor) -> None:
    backend = dispatch.choose(
        "cross_entropy", gradient.device, lambda name: supports(name, gradient)
    )
    if backend == "triton":
        cross_entropy_triton.scale(gradient, factor)
        # what torch's own operators do when they change a tensor
        torch.autograd.graph.increment_version(gradient)
    elif gradient.is_cuda or factor.item() != 1:
        gradient.mul_(factor)


_linear_cross_entropy = dispatch.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor bias, Tensor labels, Tensor? factor, float smoothing,"
    " int ignore_index, bool reduce, bool form_x, bool form_weight, bool form_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_linear_cross_entropy_backward = dispatch.define(
    "linear_cross_entropy_backward(Tensor dlosses, Tensor stats, Tensor x, Tensor weight, Tensor bias, Tensor labels,"
    " float smoothing, int ignore_index, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_scale_ = dispatch.define(
    "linear_cross_entropy_scale_(Tensor(a!) gradient, Tensor factor) -> ()",
    _scale_in_place,
    lambda gradient, factor: None,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, labels, factor, smoothing, ignore_index, reduce, *form = inputs
    _, stats, *gradients = output
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)
    if not any(ctx.needs_input_grad):
        return
    ctx.formed, ctx.reduce = any(form), reduce
    if ctx.formed:
        ctx.save_for_backward(*gradients)
    else:
        # the parameters themselves: ZeRO-3 would keep a saved view gathered until backward
        ctx.save_for_backward(x, weight, bias, labels, stats, factor)
        ctx.smoothing, ctx.ignore_index = smoothing, ignore_index


def _graph_is_kept() -> bool:
    """May this backward pass come again (retain_graph)? If torch cannot tell, it may."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else tell()


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient of the scalar times that of the scalar: in place, unless the saved tensor is wanted again."""
    if type(gradient) is not Tensor or _graph_is_kept():
        # a compiler traces with subclasses, and sees better for itself whose memory is free
        return (gradient * factor).to(gradient.dtype)
    # another tensor over the same memory: autograd copies a gradient that someone else still holds
    gradient = gradient.detach()
    _scale_(gradient, factor)
    return gradient


def _autograd(ctx, dvalue, *_):
    if dvalue is None:
        return (None,) * 11
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative; drop create_graph=True")
    needs = ctx.needs_input_grad[:3]
    if not ctx.formed:
        x, weight, bias, labels, stats, factor = ctx.saved_tensors
        if ctx.reduce:
            dvalue = dvalue.expand(x.shape[0]) if factor is None else dvalue * factor
        gradients = _linear_cross_entropy_backward(
            dvalue, stats, x, weight, bias, labels, ctx.smoothing, ctx.ignore_index, *needs
        )
    elif ctx.reduce:
        gradients = [
            _scaled(t, dvalue) if needed else None
            for t, needed in zip(ctx.saved_tensors, needs, strict=True)
        ]
    else:
        dx = ctx.saved_tensors[0]
        # an ignored row's dx is 0, whatever comes from above
        gradients = (dx * dvalue[:, None]).to(dx.dtype).masked_fill_(dx == 0, 0), None, None
    return *(t if needed else None for t, needed in zip(gradients, needs, strict=True)), *(
        None,
    ) * 8


dispatch.register_backward("linear_cross_entropy", _setup_context, _autograd)


# the public function


def _formed_in_forward(x: Tensor, V: int, reduce: bool, needs: tuple[bool, bool, bool]) -> bool:
    """Are the gradients that are needed formed together with the loss, so that its logits exist once?"""
    if needs == (True, False, False):
        return True
    # summed over chunks of rows, a low-precision dW needs a copy in fp32: on a CPU larger than the logits once were
    in_place = x.dtype in (torch.float32, torch.float64) or x.shape[0] * V <= _ROW_CHUNK_ELEMENTS
    return any(needs) and reduce and (x.is_cuda or in_place)


def _check(x, weight, bias, labels, label_smoothing, reduction, row_weights) -> None:
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.shape[1] != weight.shape[1]
        or bias.shape != weight.shape[:1]
        or not weight.shape[0]
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} "
            f"do not fit; pass (R, D), (V, D) and (V,), V at least 1"
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
    if not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype}; pass floats")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose {', '.join(_REDUCTIONS)}")
    if row_weights is not None:
        if not row_weights.is_floating_point() or row_weights.shape != x.shape[:1]:
            raise ValueError(
                f"row_weights are {row_weights.dtype} of shape {tuple(row_weights.shape)}; "
                f"pass floats of shape ({x.shape[0]},)"
            )
        if row_weights.requires_grad:
            raise ValueError("row_weights require grad and get none; pass row_weights.detach()")


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

    To train, ask for the sum or the mean here: then the gradients can be formed with the loss, from logits that are
    formed once. With "none" any gradient per row may flow back, and the logits are formed again (not if x alone is
    trained). The module's docstring has the FLOPs and the memory of each.

    Args:
        x: (R, D), any floating dtype.
        weight: (V, D), the dtype of `x`.
        bias: (V,), any floating dtype, added in fp32; or None, as in most causal language models.
        labels: (R,) int64 in [0, V), or `ignore_index`, whose rows give 0 and no gradient.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1).
        ignore_index: the label of a row that takes no part.
        reduction: "none", "sum" over rows, or "mean": the sum divided by the number of rows that count.
        row_weights: (R,) floats, by which the losses of rows are multiplied first; no gradient flows into them.

    Returns:
        (R,) losses, or with "sum" or "mean" one number, 0 if no row counts; fp32 (float64 for float64 `x`).

    Raises:
        ValueError: if a shape, dtype or setting does not fit.
        RuntimeError: in the backward pass, if a second derivative is asked for.
    """
    if bias is None:
        bias = weight.new_zeros(weight.shape[:1])
    _check(x, weight, bias, labels, label_smoothing, reduction, row_weights)
    if dispatch.asked() == "reference":
        return linear_cross_entropy_reference(
            x, weight, bias, labels, label_smoothing=label_smoothing, ignore_index=ignore_index,
            reduction=reduction, row_weights=row_weights,
        )  # fmt: skip
    reduce = reduction != "none"
    factor = row_weights if reduce else None
    if reduction == "mean":
        compute = torch.promote_types(x.dtype, torch.float32)
        share = 1 / (labels != ignore_index).sum().clamp(min=1).to(compute)
        factor = share.expand(labels.shape) if factor is None else factor.to(compute) * share
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x, weight, bias))
    form = needs if _formed_in_forward(x, weight.shape[0], reduce, needs) else (False,) * 3
    value, *_ = _linear_cross_entropy(
        x, weight, bias, labels, factor, label_smoothing, ignore_index, reduce, *form
    )
    if not reduce and row_weights is not None:
        # an ignored row's loss is 0, whatever its weight
        value = (value * row_weights).masked_fill(labels == ignore_index, 0)
    return value


kernel_cases = cross_entropy_triton.kernel_cases
