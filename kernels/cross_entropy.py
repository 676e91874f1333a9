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
    W or b too, reduction "sum" or "mean"        3 units, all in the forward pass; the backward pass scales in place,
        on a GPU, or a chunk that holds R V      and does not even read the gradients where the factor is 1
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
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels import dispatch
from prismer.kernels.cases import KernelCase

_REDUCTIONS = ("none", "sum", "mean")
_CHUNK_ELEMENTS = 2**21
# logits of a chunk of vocabulary: in fp32 they stay in the cache of a CPU, and exp costs what it computes, not moves
_ROW_CHUNK_ELEMENTS = 2**23
# logits of a chunk of rows, each row whole: 166 rows of RoBERTa's vocabulary, fewer would wait for W from memory
_BLOCK_ROWS = 2048
_BUFFER_BYTES = 2**27
# dz of a chunk of rows on a GPU: 1280 rows of RoBERTa's vocabulary in bf16


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


# Triton


@triton.jit
def _logits(p_x, p_weight, p_bias, o_row, m_row, o_col, m_col, D, depth,
            BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of logits in fp32; `depth` is D, or 0 where no row of the tile counts."""
    o_d = tl.arange(0, BD)
    p_a = p_x + o_row[:, None] * D + o_d[None, :]
    p_b = p_weight + o_col[None, :] * D + o_d[:, None]
    b_z = tl.zeros((BR, BV), tl.float32)
    for d in range(0, depth, BD):
        m_d = o_d < D - d
        b_x = tl.load(p_a + d, mask=m_row[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(p_b + d, mask=m_d[:, None] & m_col[None, :], other=0.0)
        b_z = tl.dot(b_x, b_weight, b_z, input_precision=PRECISION)
    return b_z + tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _statistics_kernel(
    p_x, p_weight, p_bias, p_labels, p_top, p_sum, p_target, p_total, p_z,
    R, D, V, stride_z, ignore_index,
    STORE: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows and TILES tiles of the vocabulary, whose partial statistics have a row of their own.

    Rows that are ignored are masked rather than packed away: packed texts leave few of them, the products that follow
    are of a fixed size in any case, and a block that has no other rows skips its products.
    """
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_split = tl.program_id(1).to(tl.int64)
    m_in = o_row < R
    b_label = tl.load(p_labels + o_row, mask=m_in, other=ignore_index)
    m_row = b_label != ignore_index
    b_top = tl.full((BR,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BR,), tl.float32)
    b_target = tl.zeros((BR,), tl.float32)
    b_total = tl.zeros((BR,), tl.float32)
    first = i_split * TILES
    last = tl.minimum(first + TILES, tl.cdiv(V, BV))
    last = tl.where(tl.max(m_row.to(tl.int32), 0) > 0, last, first)
    for i in range(first, last):
        o_col = i * BV + tl.arange(0, BV)
        m_col = o_col < V
        b_z = _logits(
            p_x, p_weight, p_bias, o_row, m_row, o_col, m_col, D, D, BR, BV, BD, PRECISION
        )
        if STORE:
            # the gradient sees the rounded logits: with statistics of others, p_y - 1 would not vanish when p_y is 1
            b_low = b_z.to(p_z.dtype.element_ty)
            tl.store(p_z + o_row[:, None] * stride_z + o_col[None, :], b_low, mask=m_in[:, None])
            b_z = b_low.to(tl.float32)
        b_target += tl.sum(tl.where(o_col[None, :] == b_label[:, None], b_z, 0.0), 1)
        b_total += tl.sum(tl.where(m_col[None, :], b_z, 0.0), 1)
        b_z = tl.where(m_col[None, :], b_z, float("-inf"))
        b_higher = tl.maximum(b_top, tl.max(b_z, 1))
        b_sum = b_sum * tl.exp(b_top - b_higher) + tl.sum(tl.exp(b_z - b_higher[:, None]), 1)
        b_top = b_higher
    o = i_split * R + o_row
    tl.store(p_top + o, b_top, mask=m_in)
    tl.store(p_sum + o, b_sum, mask=m_in)
    tl.store(p_target + o, b_target, mask=m_in)
    tl.store(p_total + o, b_total, mask=m_in)


@triton.jit
def _combine_kernel(
    p_top, p_sum, p_target, p_total, p_labels, p_losses, p_row_top, p_log_sum,
    R, V, splits, smoothing, ignore_index,
    BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Losses and statistics of whole rows from those of the splits, in a fixed order; ignored rows are zeros."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_split = tl.arange(0, BS)
    m_in = o_row < R
    o = o_split[:, None] * R + o_row[None, :]
    m = (o_split < splits)[:, None] & m_in[None, :]
    m_row = tl.load(p_labels + o_row, mask=m_in, other=ignore_index) != ignore_index
    b_tops = tl.load(p_top + o, mask=m, other=float("-inf"))
    b_top = tl.max(b_tops, 0)
    b_top = tl.where(m_row, b_top, 0.0)
    b_sum = tl.sum(tl.load(p_sum + o, mask=m, other=0.0) * tl.exp(b_tops - b_top[None, :]), 0)
    b_log_sum = tl.where(m_row, tl.log(tl.where(m_row, b_sum, 1.0)), 0.0)
    b_target = tl.sum(tl.load(p_target + o, mask=m, other=0.0), 0)
    b_mean = tl.sum(tl.load(p_total + o, mask=m, other=0.0), 0) / V
    # differences first: large logits cancel before they are added to what is small
    b_loss = b_log_sum + (1 - smoothing) * (b_top - b_target) + smoothing * (b_top - b_mean)
    tl.store(p_losses + o_row, tl.where(m_row, b_loss, 0.0), mask=m_in)
    tl.store(p_row_top + o_row, b_top, mask=m_in)
    tl.store(p_log_sum + o_row, b_log_sum, mask=m_in)


@triton.jit
def _dz_kernel(
    p_x, p_weight, p_bias, p_labels, p_top, p_log_sum, p_factor, p_z, p_dbias,
    R, D, V, stride_z, smoothing, ignore_index,
    AGAIN: tl.constexpr, HAS_FACTOR: tl.constexpr, SUM_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of dz, from logits formed AGAIN or from those in p_z, in their place; columns beyond V are zeros."""
    i_block = tl.program_id(0).to(tl.int64)
    o_row = i_block * BR + tl.arange(0, BR)
    o_col = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    m_in, m_col = o_row < R, o_col < V
    b_label = tl.load(p_labels + o_row, mask=m_in, other=ignore_index)
    m_row = b_label != ignore_index
    p_tile = p_z + o_row[:, None] * stride_z + o_col[None, :]
    if AGAIN:
        depth = tl.where(tl.max(m_row.to(tl.int32), 0) > 0, D, 0)
        b_z = _logits(
            p_x, p_weight, p_bias, o_row, m_row, o_col, m_col, D, depth, BR, BV, BD, PRECISION
        )
    else:
        b_z = tl.load(p_tile, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_top = tl.load(p_top + o_row, mask=m_row, other=0.0)
    b_log_sum = tl.load(p_log_sum + o_row, mask=m_row, other=0.0)
    b_dz = tl.exp((b_z - b_top[:, None]) - b_log_sum[:, None]) - smoothing / V
    b_dz = tl.where(o_col[None, :] == b_label[:, None], b_dz - (1 - smoothing), b_dz)
    if HAS_FACTOR:
        b_dz *= tl.load(p_factor + o_row, mask=m_row, other=0.0)[:, None]
    b_dz = tl.where(m_row[:, None] & m_col[None, :], b_dz, 0.0)
    tl.store(p_tile, b_dz.to(p_z.dtype.element_ty), mask=m_in[:, None])
    if SUM_BIAS:
        tl.store(p_dbias + i_block * V + o_col, tl.sum(b_dz, 0), mask=m_col)


@triton.jit
def _scale_kernel(p_gradient, p_factor, N, BLOCK: tl.constexpr):
    """gradient *= factor, a number on the device; where it is 1, nothing is read or written."""
    b_factor = tl.load(p_factor).to(tl.float32)
    if b_factor != 1.0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_gradient = tl.load(p_gradient + o, mask=o < N, other=0.0).to(tl.float32)
        tl.store(
            p_gradient + o, (b_gradient * b_factor).to(p_gradient.dtype.element_ty), mask=o < N
        )


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile shapes, the same for any number of rows, so that a row's loss does not depend on its batch."""
    if dtype == torch.float32:
        return dict(BR=64, BV=64, BD=32, num_warps=4, num_stages=3)
    return dict(BR=128, BV=128, BD=64, num_warps=8, num_stages=3)


def _split_tiles(BV: int) -> int:
    """Tiles of a program of the statistics: 1024 entries of the vocabulary, 50 splits of RoBERTa's."""
    return 1024 // BV


def _precision(dtype: torch.dtype) -> str:
    """What torch.mm does with fp32, the fused products do too."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _statistics_triton(x, weight, bias, labels, smoothing, ignore_index, losses, stats, z) -> None:
    """Losses and statistics of some rows; with `z`, a buffer for their logits, these are left there."""
    (R, D), V = x.shape, weight.shape[0]
    tiles = _tiles(x.dtype)
    each = _split_tiles(tiles["BV"])
    splits = triton.cdiv(V, each * tiles["BV"])
    partial = torch.empty(4, splits, R, dtype=torch.float32, device=x.device)
    _statistics_kernel[(triton.cdiv(R, tiles["BR"]), splits)](
        x, weight, bias, labels, *partial, z, R, D, V, 0 if z is None else z.stride(0), ignore_index,
        STORE=z is not None, TILES=each, PRECISION=_precision(x.dtype), **tiles,
    )  # fmt: skip
    _combine_kernel[(triton.cdiv(R, 32),)](
        *partial, labels, losses, *stats, R, V, splits, smoothing, ignore_index,
        BR=32, BS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip


def _dz_triton(x, weight, bias, labels, stats, factor, smoothing, ignore_index, again, z, dbias) -> None:
    """Fill the buffer `z` with dz of some rows, from the logits there or `again` from x, and add to `dbias`."""
    (R, D), V = x.shape, weight.shape[0]
    tiles = _tiles(x.dtype)
    grid = triton.cdiv(R, tiles["BR"]), triton.cdiv(V, tiles["BV"])
    sums = None
    if dbias is not None:
        sums = torch.empty(grid[0], V, dtype=torch.float32, device=x.device)
    _dz_kernel[grid](
        x, weight, bias, labels, *stats, factor, z, sums, R, D, V, z.stride(0), smoothing, ignore_index,
        AGAIN=again, HAS_FACTOR=factor is not None, SUM_BIAS=dbias is not None, PRECISION=_precision(x.dtype), **tiles,
    )  # fmt: skip
    if dbias is not None:
        dbias += sums.sum(0)


def _gradients_triton(
    x, weight, bias, labels, factor, smoothing, ignore_index, losses, stats, again, needs
):
    """dx, dweight and dbias as `needs` says, by chunks of rows; unless `again`, losses and statistics on the way."""
    (R, D), V = x.shape, weight.shape[0]
    tiles = _tiles(x.dtype)
    width = triton.cdiv(V, tiles["BV"]) * tiles["BV"]
    limit = _BUFFER_BYTES // (width * x.element_size())
    rows_each = max(limit // tiles["BR"], 1) * tiles["BR"]
    buffer = x.new_empty(min(R, rows_each), width)
    dx = x.new_empty(x.shape) if needs[0] else None
    dbias = torch.zeros(V, dtype=torch.float32, device=x.device) if needs[2] else None
    dweight = None
    if needs[1]:
        single = R <= rows_each
        dweight = x.new_empty(V, D) if single else x.new_zeros(V, D, dtype=torch.float32)
        # the product reads every row: whatever stands in an ignored one must not reach it
        x_kept = x.masked_fill((labels == ignore_index)[:, None], 0)
    for rows in _pieces(R, rows_each):
        part, z = (x[rows], weight, bias, labels[rows]), buffer[: rows.stop - rows.start]
        part_stats = stats[:, rows]
        if not again:
            _statistics_triton(*part, smoothing, ignore_index, losses[rows], part_stats, z)
        part_factor = None if factor is None else factor[rows]
        _dz_triton(*part, part_stats, part_factor, smoothing, ignore_index, again, z, dbias)
        dz = z[:, :V]
        if needs[0]:
            torch.mm(dz, weight, out=dx[rows])
        if needs[1] and single:
            torch.mm(dz.t(), x_kept, out=dweight)
        elif needs[1]:
            _add_product(dweight, dz.t(), x_kept[rows])
    return dx, dweight, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total`, fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # torch's product of bf16 on a CPU knows no other result than bf16
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# torch


def _pieces(count: int, limit: int) -> list[slice]:
    """Cut `count` things evenly into pieces of at most `limit`."""
    if not count:
        return []
    pieces = -(-count // limit)
    size = -(-count // pieces)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


class _Scratch:
    """Memory for one chunk of logits, in fp32 (float64 for float64) and where it differs in the dtype of the product."""

    def __init__(self, x: Tensor, size: int):
        self.wide = x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))
        self.low = self.wide if self.wide.dtype == x.dtype else x.new_empty(size)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The product may be rounded to the dtype of x; the bias and everything after it is not."""
        shape = x.shape[0], weight.shape[0]
        low, wide = (t[: shape[0] * shape[1]].view(shape) for t in (self.low, self.wide))
        torch.mm(x, weight.t(), out=low)
        return torch.add(low, bias.to(wide.dtype), out=wide)

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
    row_blocks = _pieces(R, min(_BLOCK_ROWS, _CHUNK_ELEMENTS))
    BR = row_blocks[0].stop if R else 1
    BV = max(_CHUNK_ELEMENTS // BR, 1)
    scratch = _Scratch(x, BR * min(BV, V))
    top = scratch.wide.new_full((R,), -torch.inf)
    exp_sum, picked, total = (torch.zeros_like(top) for _ in range(3))
    for columns in _pieces(V, BV):
        for rows in row_blocks:
            z = scratch.logits(x[rows], weight[columns], bias[columns])
            local, inside = _column(targets[rows], columns)
            picked[rows] += z.gather(1, local)[:, 0].mul_(inside)
            total[rows] += z.sum(1)
            higher = torch.maximum(top[rows], z.amax(1))
            exp_sum[rows] *= (top[rows] - higher).exp_()
            exp_sum[rows] += z.sub_(higher[:, None]).exp_().sum(1)
            top[rows] = higher
    log_sum = exp_sum.log_()
    # differences first: large logits cancel before they are added to what is small
    losses = log_sum + (1 - smoothing) * (top - picked) + smoothing * (top - total / V)
    return losses, torch.stack((top, log_sum))


def _backward_torch(x, weight, bias, targets, stats, factor, smoothing, needs):
    """dx, dweight and dbias as `needs` says, with the chunks of `_statistics_torch`; every row counts."""
    (R, D), V = x.shape, weight.shape[0]
    row_blocks = _pieces(R, min(_BLOCK_ROWS, _CHUNK_ELEMENTS))
    BR = row_blocks[0].stop if R else 1
    BV = max(_CHUNK_ELEMENTS // BR, 1)
    scratch = _Scratch(x, BR * min(BV, V))
    compute = stats.dtype
    dx = x.new_zeros(x.shape, dtype=compute) if needs[0] else None
    dweight = x.new_empty(weight.shape) if needs[1] else None
    dbias = stats.new_zeros(V) if needs[2] else None
    for columns in _pieces(V, BV):
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
            if needs[0] and dz.dtype == compute:
                dx[rows].addmm_(dz, w)
            elif needs[0]:
                dx[rows] += dz @ w
            if sum_of_blocks is not None:
                sum_of_blocks += dz.t() @ x[rows]
            elif needs[1]:
                torch.mm(dz.t(), x[rows], out=dweight[columns])
        if sum_of_blocks is not None:
            dweight[columns] = sum_of_blocks
    return dx, dweight, dbias


def _form_torch(x, weight, bias, targets, factor, smoothing, needs):
    """Losses, statistics and gradients by chunks of rows, the logits formed once; every row counts."""
    (R, D), V = x.shape, weight.shape[0]
    chunks = _pieces(R, max(_ROW_CHUNK_ELEMENTS // V, 1))
    scratch = _Scratch(x, (chunks[0].stop if R else 0) * V)
    stats = scratch.wide.new_empty(2, R)
    losses = scratch.wide.new_empty(R)
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = dbias = None
    if needs[1]:
        single = len(chunks) == 1
        dweight = x.new_empty(V, D) if single else stats.new_zeros(V, D)
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
            torch.mm(dz, weight, out=dx[rows])
        if needs[1] and single:
            torch.mm(dz.t(), x[rows], out=dweight)
        elif needs[1]:
            _add_product(dweight, dz.t(), x[rows])
    return losses, stats, (dx, dweight, dbias)


# the registered ops


def supports(backend: str, x: Tensor) -> str | None:
    """None if `backend` serves rows like those of `x`, else the reason why not."""
    if backend == "triton" and x.dtype == torch.float64:
        return "triton cross_entropy computes in fp32, and x is float64"
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


def _forward(
    x, weight, bias, labels, factor, smoothing, ignore_index, reduce, form_x, form_weight, form_bias
):
    x, weight, bias, labels = (t.contiguous() for t in (x, weight, bias, labels))
    outputs = _forward_fake(
        x, weight, bias, labels, factor, smoothing, ignore_index, reduce, form_x, form_weight, form_bias
    )  # fmt: skip
    _, stats, *gradients = outputs
    factor = None if factor is None else factor.to(stats.dtype).contiguous()
    needs = form_x, form_weight, form_bias
    losses = stats.new_zeros(x.shape[0])
    backend = dispatch.choose("cross_entropy", x.device, lambda name: supports(name, x))
    if backend == "torch":
        rows, x_rows, targets, factor_rows = _packed(x, labels, factor, ignore_index)
        if any(needs):
            found, found_stats, formed = _form_torch(
                x_rows, weight, bias, targets, factor_rows, smoothing, needs
            )
        else:
            found, found_stats = _statistics_torch(x_rows, weight, bias, targets, smoothing)
            formed = None, None, None
        losses[rows] = found
        stats.zero_()[:, rows] = found_stats
        gradients = _placed(formed, gradients, rows)
    elif x.shape[0]:
        arguments = (x, weight, bias, labels)
        if any(needs):
            formed = _gradients_triton(
                *arguments, factor, smoothing, ignore_index, losses, stats, False, needs
            )
            gradients = _placed(formed, gradients)
        else:
            _statistics_triton(*arguments, smoothing, ignore_index, losses, stats, None)
    else:
        gradients = [t.zero_() for t in gradients]
    losses.masked_fill_(labels == ignore_index, 0)
    if not reduce:
        return losses, stats, *gradients
    if factor is not None:
        losses = (losses * factor).masked_fill_(labels == ignore_index, 0)
    return losses.sum(), stats, *gradients


def _placed(formed, outputs, rows: Tensor | None = None) -> list[Tensor]:
    """What was formed, in the dtypes of `outputs`; dx of the `rows` that count among zeros."""
    placed = []
    for value, output in zip(formed, outputs, strict=True):
        if value is None:
            placed.append(output)
        elif rows is not None and value is formed[0]:
            output = output.zero_()
            output[rows] = value.to(output.dtype)
            placed.append(output)
        else:
            placed.append(value.to(output.dtype))
    return placed


def _forward_fake(
    x, weight, bias, labels, factor, smoothing, ignore_index, reduce, form_x, form_weight, form_bias
):
    compute = torch.promote_types(x.dtype, torch.float32)
    value = x.new_empty(() if reduce else x.shape[:1], dtype=compute)
    gradients = _gradients_fake(x, weight, bias, form_x, form_weight, form_bias)
    return value, x.new_empty((2, x.shape[0]), dtype=compute), *gradients


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
    needs = need_x, need_weight, need_bias
    outputs = _gradients_fake(x, weight, bias, *needs)
    backend = dispatch.choose("cross_entropy", x.device, lambda name: supports(name, x))
    if backend == "torch":
        rows, x_rows, targets, factor = _packed(x, labels, dlosses, ignore_index)
        formed = _backward_torch(
            x_rows, weight, bias, targets, stats[:, rows], factor, smoothing, needs
        )
        return tuple(_placed(formed, outputs, rows))
    if not x.shape[0]:
        return tuple(t.zero_() for t in outputs)
    formed = _gradients_triton(
        x, weight, bias, labels, dlosses, smoothing, ignore_index, None, stats, True, needs
    )
    return tuple(_placed(formed, outputs))


def _backward_fake(
    dlosses, stats, x, weight, bias, labels, smoothing, ignore_index, need_x, need_weight, need_bias
):
    return _gradients_fake(x, weight, bias, need_x, need_weight, need_bias)


def _scale_in_place(gradient, factor) -> None:
    backend = dispatch.choose(
        "cross_entropy", gradient.device, lambda name: supports(name, gradient)
    )
    if backend == "triton":
        N = gradient.numel()
        _scale_kernel[(triton.cdiv(N, 4096),)](gradient, factor, N, BLOCK=4096, num_warps=8)
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
    """A gradient of the scalar times that of the scalar: the saved tensor itself, unless it is wanted again."""
    # another tensor over the same memory: autograd copies a gradient that someone else still holds
    gradient = gradient.clone() if _graph_is_kept() else gradient.detach()
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
    return *(t if needed else None for t, needed in zip(gradients, needs, strict=True)), *(None,) * 8


dispatch.register_backward("linear_cross_entropy", _setup_context, _autograd)


# the public function


def _formed_in_forward(x: Tensor, V: int, reduce: bool, needs: tuple[bool, bool, bool]) -> bool:
    """Are the gradients that are needed formed together with the loss, so that its logits exist once?"""
    if needs == (True, False, False):
        return True
    # on a CPU a dW that is summed over many chunks of rows costs more memory, and W's way from it, than one unit
    return any(needs) and reduce and (x.is_cuda or x.shape[0] * V <= _ROW_CHUNK_ELEMENTS)


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
    bias: Tensor,
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
        bias: (V,), any floating dtype; it is added in fp32.
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
    _check(x, weight, bias, labels, label_smoothing, reduction, row_weights)
    if dispatch.asked() == "reference":
        return linear_cross_entropy_reference(
            x, weight, bias, labels, label_smoothing=label_smoothing, ignore_index=ignore_index,
            reduction=reduction, row_weights=row_weights,
        )  # fmt: skip
    reduce = reduction != "none"
    factor = row_weights if reduce else None
    if reduction == "mean":
        share = 1 / (labels != ignore_index).sum().clamp(min=1)
        factor = share.expand(labels.shape) if factor is None else factor * share
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x, weight, bias))
    form = needs if _formed_in_forward(x, weight.shape[0], reduce, needs) else (False,) * 3
    value, *_ = _linear_cross_entropy(
        x, weight, bias, labels, factor, label_smoothing, ignore_index, reduce, *form
    )
    if not reduce and row_weights is not None:
        # an ignored row's loss is 0, whatever its weight
        value = (value * row_weights).masked_fill(labels == ignore_index, 0)
    return value


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: BASE and LARGE, eight images with three texts of 40 tokens each."""
    cases = []
    for model, R, D, V in (("BASE", 960, 768, 50265), ("LARGE", 960, 1024, 50265)):
        tiles = _tiles(torch.bfloat16)
        warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
        each, rows = _split_tiles(tiles["BV"]), triton.cdiv(R, tiles["BR"])
        splits = triton.cdiv(V, each * tiles["BV"])
        bf16, fp32, i32 = "*bf16", "*fp32", "i32"
        inputs = dict(p_x=bf16, p_weight=bf16, p_bias=bf16, p_labels="*i64")
        sizes = dict(R=i32, D=i32, V=i32, stride_z=i32)
        read = (R + V) * D * 2 + V * 2 + 8 * R
        shape = f"{model}, {R} x {D} x {V}"
        partial = dict(p_top=fp32, p_sum=fp32, p_target=fp32, p_total=fp32)
        for store in (False, True):
            cases.append(KernelCase(
                name=f"{model} cross_entropy statistics" + " and logits" * store, kernel=_statistics_kernel, shape=shape,
                signature=inputs | partial | sizes | dict(ignore_index=i32) | (dict(p_z=bf16) if store else {}),
                constants=dict(STORE=store, TILES=each, PRECISION="ieee", **tiles) | ({} if store else dict(p_z=None)),
                divisible=("R", "D", "stride_z"), num_warps=warps, num_stages=stages,
                flops=2 * R * D * V, bytes=read + 16 * splits * R + store * 2 * R * V, dot=True,
            ))  # fmt: skip
        for again in (False, True):
            cases.append(KernelCase(
                name=f"{model} cross_entropy dz" + " from x" * again, kernel=_dz_kernel, shape=shape,
                signature=inputs | dict(p_top=fp32, p_log_sum=fp32, p_factor=fp32, p_z=bf16, p_dbias=fp32) | sizes
                | dict(smoothing="fp32", ignore_index=i32),
                constants=dict(AGAIN=again, HAS_FACTOR=True, SUM_BIAS=True, PRECISION="ieee", **tiles),
                divisible=("R", "D", "stride_z"), num_warps=warps, num_stages=stages,
                flops=2 * R * D * V if again else 7 * R * V,
                bytes=(read if again else 2 * R * V + 8 * R) + 2 * R * V + 12 * R + 4 * rows * V, dot=again,
            ))  # fmt: skip
        cases.append(KernelCase(
            name=f"{model} cross_entropy combine", kernel=_combine_kernel, shape=shape,
            signature=partial | dict(
                p_labels="*i64", p_losses=fp32, p_row_top=fp32, p_log_sum=fp32, R=i32, V=i32, splits=i32,
                smoothing="fp32", ignore_index=i32,
            ),
            constants=dict(BR=32, BS=triton.next_power_of_2(splits)), divisible=("R",), num_warps=4,
            flops=8 * splits * R, bytes=16 * splits * R + 20 * R,
        ))  # fmt: skip
        cases.append(KernelCase(
            name=f"{model} cross_entropy scale", kernel=_scale_kernel, shape=f"{model}, {V} x {D}",
            signature=dict(p_gradient=bf16, p_factor=fp32, N=i32), constants=dict(BLOCK=4096), divisible=("N",),
            num_warps=8, flops=V * D, bytes=4 * V * D,
        ))  # fmt: skip
    return cases
