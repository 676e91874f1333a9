"""Triton kernels of linear + cross entropy: the loss, its statistics, and dz by chunks of rows.

`statistics` computes the loss with no logits in memory. `gradients` has one buffer of (rows, V rounded up to tiles)
numbers in the dtype of x. It holds logits, then dz in their place, from which torch's products compute dx and dweight.
All sums are in a fixed order, the tiles that a row sees do not depend on its batch, and fp32 is multiplied as torch is
set to multiply it.

For tiles of BR x BV x BD, Rb = ceil(R / BR) blocks of rows, Vb = ceil(V / BV) tiles and S = ceil(V / 1024) splits,
where every row counts, in numbers of s bytes and a bias of w bytes (labels of 8):
    statistics  FLOPs 2 (Rb BR)(Vb BV)(ceil(D / BD) BD) issued; read (R Vb + V Rb) D s + Rb V w + 8 S R,
                written 16 S R; combine reads 16 S R + 8 R and writes 12 R; with logits in memory s R Vb BV written too
    dz          again from x: FLOPs and reads of x, W and bias as above; from logits: s R Vb BV read, and V w not;
                both: 16 R Vb read (12 R Vb of statistics and factor, 8 R Vb of labels), s R Vb BV written,
                4 Rb V for the bias
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.launch import Constants, Prepared, cdiv, input_precision, kept, launch, next_power_of_2

# dz of a chunk of rows: 1280 rows of RoBERTa's vocabulary in bf16
_BUFFER_BYTES = 2**27


def pieces(count: int, limit: int) -> list[slice]:
    """Cut `count` things evenly into pieces of at most `limit`."""
    if not count:
        return []
    pieces = -(-count // limit)
    size = -(-count // pieces)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


@triton.jit
def _logits(
    p_x,
    p_weight,
    p_bias,
    o_row,
    m_row,
    o_col,
    m_col,
    D,
    depth,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
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


@triton.jit(do_not_specialize=["R", "ignore_index"])
def _statistics_kernel(
    p_x,
    p_weight,
    p_bias,
    p_labels,
    p_partial,
    p_z,
    R,
    D,
    V,
    stride_z,
    ignore_index,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """One program: the four partial statistics of a block of rows and TILES tiles of the vocabulary, in p_partial
    (4, splits, R): the largest logit, the sum of exponentials, the logit of the label, the sum of logits.

    Ignored rows are masked, not packed away: packed texts leave few of them, the products that follow have a fixed size
    in any case, and a block without other rows skips its products.
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
        b_z = _logits(p_x, p_weight, p_bias, o_row, m_row, o_col, m_col, D, D, PRECISION, BR, BV, BD)
        if STORE:
            # the gradient reads the rounded logits: only their own statistics make p_y - 1 vanish where p_y is 1
            b_low = b_z.to(p_z.dtype.element_ty)
            tl.store(p_z + o_row[:, None] * stride_z + o_col[None, :], b_low, mask=m_in[:, None])
            b_z = b_low.to(tl.float32)
        b_target += tl.sum(tl.where(o_col[None, :] == b_label[:, None], b_z, 0.0), 1)
        b_total += tl.sum(tl.where(m_col[None, :], b_z, 0.0), 1)
        b_z = tl.where(m_col[None, :], b_z, float("-inf"))
        b_higher = tl.maximum(b_top, tl.max(b_z, 1))
        # while all logits so far are -inf, the differences would be NaN
        b_base = tl.where(b_higher == float("-inf"), 0.0, b_higher)
        b_sum = b_sum * tl.exp(b_top - b_base) + tl.sum(tl.exp(b_z - b_base[:, None]), 1)
        b_top = b_higher
    each = tl.num_programs(1).to(tl.int64) * R
    o = i_split * R + o_row
    tl.store(p_partial + o, b_top, mask=m_in)
    tl.store(p_partial + each + o, b_sum, mask=m_in)
    tl.store(p_partial + 2 * each + o, b_target, mask=m_in)
    tl.store(p_partial + 3 * each + o, b_total, mask=m_in)


@triton.jit(do_not_specialize=["R", "V", "splits", "stride_stats", "ignore_index"])
def _combine_kernel(
    p_partial,
    p_labels,
    p_losses,
    p_stats,
    R,
    V,
    splits,
    stride_stats,
    smoothing,
    ignore_index,
    BR: tl.constexpr,
    BS: tl.constexpr,
):
    """Losses and statistics of whole rows from those of the splits, in a fixed order; ignored rows are zeros."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_split = tl.arange(0, BS)
    m_in = o_row < R
    o = o_split[:, None] * R + o_row[None, :]
    m = (o_split < splits)[:, None] & m_in[None, :]
    m_row = tl.load(p_labels + o_row, mask=m_in, other=ignore_index) != ignore_index
    each = splits.to(tl.int64) * R
    b_tops = tl.load(p_partial + o, mask=m & m_row[None, :], other=float("-inf"))
    b_top = tl.where(m_row, tl.max(b_tops, 0), 0.0)
    b_sum = tl.sum(tl.load(p_partial + each + o, mask=m, other=0.0) * tl.exp(b_tops - b_top[None, :]), 0)
    b_log_sum = tl.where(m_row, tl.log(tl.where(m_row, b_sum, 1.0)), 0.0)
    b_target = tl.sum(tl.load(p_partial + 2 * each + o, mask=m, other=0.0), 0)
    b_mean = tl.sum(tl.load(p_partial + 3 * each + o, mask=m, other=0.0), 0) / V
    # differences first: large logits cancel before they are added to what is small
    b_spread = tl.where(smoothing > 0, smoothing * (b_top - b_mean), 0.0)
    b_loss = b_log_sum + (1 - smoothing) * (b_top - b_target) + b_spread
    tl.store(p_losses + o_row, tl.where(m_row, b_loss, 0.0), mask=m_in)
    if p_stats is not None:
        tl.store(p_stats + o_row, b_top, mask=m_in)
        tl.store(p_stats + stride_stats + o_row, b_log_sum, mask=m_in)


@triton.jit(do_not_specialize=["R", "stride_stats", "ignore_index"])
def _dz_kernel(
    p_x,
    p_weight,
    p_bias,
    p_labels,
    p_stats,
    p_factor,
    p_z,
    p_dbias,
    R,
    D,
    V,
    stride_z,
    stride_stats,
    smoothing,
    ignore_index,
    AGAIN: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """A tile of dz, from logits computed AGAIN or in place of those in p_z; columns beyond V are zeros."""
    i_block = tl.program_id(0).to(tl.int64)
    o_row = i_block * BR + tl.arange(0, BR)
    o_col = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    m_in, m_col = o_row < R, o_col < V
    b_label = tl.load(p_labels + o_row, mask=m_in, other=ignore_index)
    m_row = b_label != ignore_index
    p_tile = p_z + o_row[:, None] * stride_z + o_col[None, :]
    if AGAIN:
        depth = tl.where(tl.max(m_row.to(tl.int32), 0) > 0, D, 0)
        b_z = _logits(p_x, p_weight, p_bias, o_row, m_row, o_col, m_col, D, depth, PRECISION, BR, BV, BD)
    else:
        b_z = tl.load(p_tile, mask=m_row[:, None], other=0.0).to(tl.float32)
    # an ignored row's probabilities are 0
    b_top = tl.load(p_stats + o_row, mask=m_row, other=float("inf"))
    b_log_sum = tl.load(p_stats + stride_stats + o_row, mask=m_row, other=0.0)
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
        tl.store(p_gradient + o, (b_gradient * b_factor).to(p_gradient.dtype.element_ty), mask=o < N)


def _tiles(dtype: torch.dtype, dot: bool = True) -> dict[str, int]:
    """Tile shapes, the same for any number of rows, so that a row's loss does not depend on its batch."""
    if dtype == torch.float32:
        return dict(BR=64, BV=64, BD=32, num_warps=4, num_stages=3)
    if not dot:
        return dict(BR=64, BV=64, BD=32, num_warps=4, num_stages=3)
    # with tiles of 128 x 128 the statistics would need more registers than there are
    return dict(BR=128, BV=64, BD=64, num_warps=8, num_stages=3)


def _split_tiles(BV: int) -> int:
    """Tiles of a program of the statistics: 1024 entries of the vocabulary, 50 splits of RoBERTa's."""
    return 1024 // BV


def statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    smoothing: float,
    ignore_index: int,
    losses: Tensor,
    stats: Tensor,
    z: Tensor | None,
) -> None:
    """Losses and statistics of some rows; their logits are stored in the buffer `z` if it is given."""
    (R, D), V = x.shape, weight.shape[0]
    splits, constants, combining = _constants(x.dtype, V, z is not None, input_precision(x.dtype))
    partial = x.new_empty((4, splits, R), dtype=torch.float32)
    sizes = R, D, V, 0 if z is None else z.stride(0), ignore_index
    pointers, grid = (x, weight, bias, labels, partial, z), (cdiv(R, constants["BR"]), splits)
    launch(_statistics_kernel, grid, pointers, sizes, constants)
    sizes = R, V, splits, stats.stride(0), float(smoothing), ignore_index
    launch(_combine_kernel, (cdiv(R, 32),), (partial, labels, losses, stats), sizes, combining)


def prepare(
    x: Tensor, weight: Tensor, smoothing: float, ignore_index: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What computes the losses of x, weight, bias and labels like these, contiguous and not empty."""
    (R, D), V = x.shape, weight.shape[0]
    splits, constants, combining = _constants(x.dtype, V, False, input_precision(x.dtype))
    grid, sizes = (cdiv(R, constants["BR"]), splits), (R, D, V, 0, ignore_index)
    add_up = Prepared(_statistics_kernel, grid, sizes, constants)
    combine = Prepared(_combine_kernel, (cdiv(R, 32),), (R, V, splits, R, float(smoothing), ignore_index), combining)
    shape = 4, splits, R

    def losses_of(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        losses, partial = x.new_empty(R, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
        add_up(x, weight, bias, labels, partial, None)
        # without a gradient nobody reads the statistics
        combine(partial, labels, losses, None)
        return losses

    return losses_of


@functools.lru_cache(maxsize=1024)
def _constants(dtype: torch.dtype, V: int, store: bool, precision: str) -> tuple[int, Constants, Constants]:
    """Splits of the vocabulary, and the constants of both kernels of the statistics."""
    tiles = _tiles(dtype)
    each = _split_tiles(tiles["BV"])
    splits = cdiv(V, each * tiles["BV"])
    combining = kept(BR=32, BS=next_power_of_2(splits), num_warps=4)
    return splits, kept(STORE=store, PRECISION=precision, TILES=each, **tiles), combining


def _dz(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    stats: Tensor,
    factor: Tensor | None,
    smoothing: float,
    ignore_index: int,
    again: bool,
    z: Tensor,
    dbias: Tensor | None,
) -> None:
    """Fill the buffer `z` with dz of some rows, from the logits there or `again` from x, and add to `dbias`."""
    (R, D), V = x.shape, weight.shape[0]
    tiles = _tiles(x.dtype, dot=again)
    grid = cdiv(R, tiles["BR"]), cdiv(V, tiles["BV"])
    sums = None
    if dbias is not None:
        sums = torch.empty(grid[0], V, dtype=torch.float32, device=x.device)
    sizes = R, D, V, z.stride(0), stats.stride(0), float(smoothing), ignore_index
    flags = dict(AGAIN=again, HAS_FACTOR=factor is not None, SUM_BIAS=dbias is not None)
    flags["PRECISION"] = input_precision(x.dtype)
    launch(_dz_kernel, grid, (x, weight, bias, labels, stats, factor, z, sums), sizes, flags | tiles)
    if dbias is not None:
        dbias += sums.sum(0)


def gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    smoothing: float,
    ignore_index: int,
    losses: Tensor | None,
    stats: Tensor,
    again: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias as `needs` says, by chunks of rows; unless `again`, losses and statistics too."""
    (R, D), V = x.shape, weight.shape[0]
    tiles = _tiles(x.dtype)
    width = cdiv(V, tiles["BV"]) * tiles["BV"]
    limit = _BUFFER_BYTES // (width * x.element_size())
    rows_each = max(limit // tiles["BR"], 1) * tiles["BR"]
    buffer = x.new_empty(min(R, rows_each), width)
    dx = torch.empty_like(x) if needs[0] else None
    dbias = torch.zeros(V, dtype=torch.float32, device=x.device) if needs[2] else None
    dweight = None
    if needs[1]:
        single = 0 < R <= rows_each
        dweight = x.new_empty(V, D) if single else x.new_zeros(V, D, dtype=torch.float32)
        # the product reads every row, and must not see the contents of an ignored one
        x_kept = x.masked_fill((labels == ignore_index)[:, None], 0)
    for rows in pieces(R, rows_each):
        part, z = (x[rows], weight, bias, labels[rows]), buffer[: rows.stop - rows.start]
        part_stats = stats[:, rows]
        if not again:
            statistics(*part, smoothing, ignore_index, losses[rows], part_stats, z)
        part_factor = None if factor is None else factor[rows]
        _dz(*part, part_stats, part_factor, smoothing, ignore_index, again, z, dbias)
        dz = z[:, :V]
        if needs[0]:
            torch.mm(dz, weight, out=dx[rows])
        if needs[1] and single:
            torch.mm(dz.t(), x_kept, out=dweight)
        elif needs[1]:
            add_product(dweight, dz.t(), x_kept[rows])
    return dx, dweight, dbias


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a number on the device."""
    N = gradient.numel()
    if N:
        launch(_scale_kernel, (cdiv(N, 4096),), (gradient, factor), (N,), dict(BLOCK=4096, num_warps=8))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total`, fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # on a CPU torch multiplies bf16 to bf16 alone
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: BASE and LARGE, eight images with three texts of 40 tokens each."""
    cases = []
    bf16, fp32, i64 = "*bf16", "*fp32", "*i64"
    for model, R, D, V in (("BASE", 960, 768, 50265), ("LARGE", 960, 1024, 50265)):
        inputs, settings = (bf16, bf16, bf16, i64), (0.1, -100)
        tiles = _tiles(torch.bfloat16)
        each, width = _split_tiles(tiles["BV"]), cdiv(V, tiles["BV"]) * tiles["BV"]
        splits = cdiv(V, each * tiles["BV"])
        read = (R + V) * D * 2 + V * 2 + 8 * R
        case = functools.partial(KernelCase.of_launch, shape=f"{model}, {R} x {D} x {V}")
        cases += [
            case(
                f"{model} cross_entropy statistics" + " and logits" * store,
                _statistics_kernel,
                (*inputs, fp32, bf16 if store else None, R, D, V, width * store, -100),
                dict(STORE=store, PRECISION="ieee", TILES=each, **tiles),
                flops=2 * R * D * V,
                bytes=read + 16 * splits * R + store * 2 * R * V,
                dot=True,
            )
            for store in (False, True)
        ]
        for again in (False, True):
            tiles = _tiles(torch.bfloat16, dot=again)
            sums = 4 * cdiv(R, tiles["BR"]) * V
            cases.append(
                case(
                    f"{model} cross_entropy dz" + " from x" * again,
                    _dz_kernel,
                    (*inputs, fp32, fp32, bf16, fp32, R, D, V, width, R, *settings),
                    dict(AGAIN=again, HAS_FACTOR=True, SUM_BIAS=True, PRECISION="ieee", **tiles),
                    flops=2 * R * D * V if again else 7 * R * V,
                    bytes=(read if again else 2 * R * V + 8 * R) + 2 * R * V + 12 * R + sums,
                    dot=again,
                )
            )
        cases += [
            case(
                f"{model} cross_entropy combine",
                _combine_kernel,
                (fp32, i64, fp32, fp32, R, V, splits, R, *settings),
                dict(BR=32, BS=next_power_of_2(splits), num_warps=4),
                flops=8 * splits * R,
                bytes=16 * splits * R + 20 * R,
                # rows are contiguous here, and their number is not compiled in
                vector_loads=False,
            ),
            KernelCase.of_launch(
                f"{model} cross_entropy scale",
                _scale_kernel,
                (bf16, fp32, V * D),
                dict(BLOCK=4096, num_warps=8),
                shape=f"{model}, {V} x {D}",
                flops=V * D,
                bytes=4 * V * D,
            ),
        ]
    return cases
