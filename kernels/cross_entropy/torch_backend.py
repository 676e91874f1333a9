"""Linear + cross entropy, composed of torch's operators, a chunk of logits at a time."""

import torch
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.cross_entropy.triton_backend import add_product, pieces
from prismer.kernels.dispatch import TORCH, Backend, Op

# logits of a chunk of vocabulary: in fp32 they stay in the cache of a CPU, so that exp is not bound by memory
_CHUNK_ELEMENTS = 2**21
# logits of a chunk of rows, each row whole: 166 rows of RoBERTa's vocabulary. With fewer, reading W would take longest
ROW_CHUNK_ELEMENTS = 2**23
_BLOCK_ROWS = 2048

NATIVE = Backend(name="native", devices=("cpu",), float64=False)
# a part of this backend: the statistics of one chunk of logits
STATISTICS = Op(name="logit_statistics", reference=None, backends=(NATIVE, TORCH))


class _Scratch:
    """Memory for one chunk of logits, in fp32 (float64 for float64), and in the dtype of the product."""

    def __init__(self, x: Tensor, rows: int, columns: int) -> None:
        # oneDNN cannot write a product to given memory
        self.in_place = matmul.torch_multiplies(x[:rows], columns)
        size = rows * columns if self.in_place else 0
        self.wide = x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))
        self.low = self.wide if self.wide.dtype == x.dtype else x.new_empty(size)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x weight^T, in the dtype of x."""
        if not self.in_place:
            return matmul.linear(x, weight)
        shape = x.shape[0], weight.shape[0]
        return torch.mm(x, weight.t(), out=self.low[: shape[0] * shape[1]].view(shape))

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The product may be rounded to the dtype of x; the bias and everything after it is not."""
        low = self.product(x, weight)
        if low.dtype == self.wide.dtype:
            return low.add_(bias)
        return self.wide[: low.numel()].view(low.shape).copy_(low).add_(bias)

    def rounded(self, dz: Tensor) -> Tensor:
        """`dz`, which stands in the memory of the logits, in the dtype of the product."""
        if self.low is self.wide:
            return dz
        return self.low[: dz.numel()].view(dz.shape).copy_(dz)


def _column(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each row's target is within a chunk of columns, and whether it is there at all."""
    local = targets - columns.start
    inside = (local >= 0) & (local < columns.stop - columns.start)
    return local.masked_fill_(~inside, 0)[:, None], inside


def _subtract_targets(dz: Tensor, targets: Tensor, columns: slice, smoothing: float, V: int) -> Tensor:
    """From probabilities to dz, in place: p_y - 1 is computed here, before any rounding."""
    local, inside = _column(targets, columns)
    dz -= smoothing / V
    return dz.scatter_add_(1, local, (inside.to(dz.dtype) * (smoothing - 1))[:, None])


def statistics(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and (2, R) statistics by chunks of the vocabulary; every row counts."""
    R, V = x.shape[0], weight.shape[0]
    row_blocks = pieces(R, min(_BLOCK_ROWS, _CHUNK_ELEMENTS))
    BR = row_blocks[0].stop if R else 1
    BV = max(_CHUNK_ELEMENTS // BR, 1)
    scratch = _Scratch(x, BR, min(BV, V))
    state = scratch.wide.new_zeros(R, 4)
    state[:, 0] = -torch.inf
    backend = STATISTICS.choose(x)
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
    losses = log_sum + (1 - smoothing) * (top - picked)
    if smoothing:  # 0 times infinity would be NaN
        losses += smoothing * (top - total / V)
    return losses, torch.stack((top, log_sum))


def _add_statistics(z: Tensor | None, targets: Tensor, columns: slice, state: Tensor) -> None:
    """Take a chunk of logits, which it overwrites, into (R, 4): largest, sum of exp(z - largest), target's, sum."""
    top, exp_sum, picked, total = state.unbind(1)
    local, inside = _column(targets, columns)
    picked += z.gather(1, local)[:, 0].masked_fill_(~inside, 0)
    total += z.sum(1)
    higher = torch.maximum(top, z.amax(1))
    # while all logits so far are -inf, the differences would be NaN
    base = higher.masked_fill(higher == -torch.inf, 0)
    exp_sum *= (top - base).exp_()
    exp_sum += z.sub_(base[:, None]).exp_().sum(1)
    top.copy_(higher)


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    stats: Tensor,
    factor: Tensor,
    smoothing: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias as `needs` says, with the chunks of `statistics`; every row counts."""
    R, V = x.shape[0], weight.shape[0]
    row_blocks = pieces(R, min(_BLOCK_ROWS, _CHUNK_ELEMENTS))
    BR = row_blocks[0].stop if R else 1
    BV = max(_CHUNK_ELEMENTS // BR, 1)
    scratch = _Scratch(x, BR, min(BV, V))
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
                dx[rows] += matmul.mm(dz, w)
            if sum_of_blocks is not None:
                sum_of_blocks += matmul.mm(dz.t(), x[rows])
            elif needs[1]:
                dweight[columns] = matmul.mm(dz.t(), x[rows])
        if sum_of_blocks is not None:
            dweight[columns] = sum_of_blocks
    return dx, dweight, dbias


def form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    factor: Tensor | None,
    smoothing: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Losses, statistics and gradients by chunks of rows, the logits computed once; every row counts."""
    (R, D), V = x.shape, weight.shape[0]
    chunks = pieces(R, max(ROW_CHUNK_ELEMENTS // V, 1))
    scratch = _Scratch(x, chunks[0].stop if R else 0, V)
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
        picked = z.gather(1, targets[rows, None])[:, 0]
        mean = z.mean(1) if smoothing else 0.0
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
            dx[rows] = matmul.mm(dz, weight)
        if needs[1] and single:
            dweight = matmul.mm(dz.t(), x[rows])
        elif needs[1]:
            add_product(dweight, dz.t(), x[rows])
    return losses, stats, (dx, dweight, dbias)
