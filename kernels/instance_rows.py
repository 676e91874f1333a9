"""Instance rows: add to every token of a grid the row of the object that its cell shows, and its position.

    out[b, i * grid + j] = x[b, i * grid + j] + table[row] + positions[i * grid + j]
    row = rows[id], or id % F without `rows`;   id = ids[b, i * s // grid, j * s // grid]
    dx = dy,  dtable[r] = sum of dy over cells whose row is r,  dpositions = sum of dy over the batch

This is one pass instead of four (gather ids, gather rows, add, add). dx is dy itself, not a copy. dtable and dpositions
are summed in fp32 in a fixed order, without atomics. If an entry of `rows` is outside the table, `torch` raises on the
CPU. On a GPU, where raising would wait for the device, nothing is read, the cell becomes NaN, and it adds to no
gradient of the table.
Source: Prismer, arXiv:2303.02506, section 3.2 (instance embeddings of detected objects).

Traffic of the Triton kernels, for N = B * grid * grid cells of D numbers of s bytes and a table of F rows:
    forward   reads 2 N D s (3 N D s with positions) and, for every 128 columns, 9 N of ids and rows (N without `rows`);
              writes N D s
    backward  a program owns 16 rows and 32 columns of the table and a part of the cells, which it takes 128 at a time.
              It multiplies a (16, 128) matrix of zeros and ones by the (128, 32) of dy where a cell shows one of its
              rows, and skips a tile where none does. With M such tiles of T cells, summed over the blocks of rows:
              2 * 16 * 128 * 32 M FLOPs for every 32 columns; reads D s T and, for every 16 rows and 32 columns, 9 N
              (N); writes 4 F D for each of G parts of 2048 cells, which are then read and added up in order, and
              4 F D (if G is 1, only the last).
torch sums dpositions.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.checks import described
from prismer.kernels.dispatch import TORCH, Backend, Op, runs_directly
from prismer.kernels.label_map import sum_parts
from prismer.kernels.launch import Constants, cdiv, kept, launch


def _cell_rows(ids: Tensor, rows: Tensor | None, num_rows: int, grid: int) -> Tensor:
    """(B, grid * grid) row of each cell."""
    pick_y, pick_x = (torch.arange(grid, device=ids.device) * s // grid for s in ids.shape[1:])
    cells = ids[:, pick_y][:, :, pick_x].flatten(1).long()
    return cells % num_rows if rows is None else rows[cells]


def add_instance_rows_reference(
    x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, grid: int, positions: Tensor | None = None
) -> Tensor:
    """The definition, summed in fp32 (float64 for float64). Arguments as in `add_instance_rows`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    out = x.to(compute) + table[_cell_rows(ids, rows, len(table), grid)].to(compute)
    if positions is not None:
        out = out + positions.to(compute)
    return out.to(x.dtype)


def _too_large(x: Tensor) -> str | None:
    if x.shape[0] * x.shape[1] >= 2**31:
        return "triton instance_rows counts cells in 32 bits, and these are too many"
    return None


TRITON = Backend(name="triton", devices=("cuda",), float64=False, refuses=_too_large)
OP = Op(name="instance_rows", reference=add_instance_rows_reference, backends=(TRITON, TORCH))


# Triton


@triton.jit
def _rows_of_cells(p_ids, p_rows, o_cell, m_cell, s, F, grid, HAS_ROWS: tl.constexpr):
    """The row of each cell of (B, grid, grid); -1 if the table has no such row, or there is no such cell."""
    o_image = (o_cell // (grid * grid)).to(tl.int64)
    y = o_cell // grid % grid * s // grid
    x = o_cell % grid * s // grid
    b_row = tl.load(p_ids + (o_image * s + y) * s + x, mask=m_cell, other=0).to(tl.int64)
    if HAS_ROWS:
        b_row = tl.load(p_rows + b_row, mask=m_cell, other=-1)
    else:
        b_row = b_row % F
    return tl.where(m_cell & (b_row >= 0) & (b_row < F), b_row, -1)


@triton.jit(do_not_specialize=["N", "s", "F", "grid"])
def _forward_kernel(
    p_x,
    p_ids,
    p_table,
    p_rows,
    p_positions,
    p_out,
    N,
    s,
    F,
    D,
    grid,
    HAS_ROWS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_cell = tl.program_id(0) * BN + tl.arange(0, BN)
    o_col = tl.program_id(1) * BD + tl.arange(0, BD)
    m_cell, m_col = o_cell < N, o_col < D
    m = m_cell[:, None] & m_col[None, :]
    b_row = _rows_of_cells(p_ids, p_rows, o_cell, m_cell, s, F, grid, HAS_ROWS)
    o = o_cell.to(tl.int64)[:, None] * D + o_col[None, :]
    b_out = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    m_row = (b_row >= 0)[:, None] & m_col[None, :]
    o_table = b_row[:, None] * D + o_col[None, :]
    b_out += tl.load(p_table + o_table, mask=m_row, other=float("nan")).to(tl.float32)
    if HAS_POSITIONS:
        o_position = (o_cell % (grid * grid)).to(tl.int64)[:, None] * D + o_col[None, :]
        b_out += tl.load(p_positions + o_position, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "s", "F", "grid", "tiles"])
def _table_kernel(
    p_dy,
    p_ids,
    p_rows,
    p_dtable,
    N,
    s,
    F,
    D,
    grid,
    tiles,
    HAS_ROWS: tl.constexpr,
    BF: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Program (i, d, g) sums its BF rows and BD columns over `tiles` tiles of BN cells, part g of them all."""
    i_part = tl.program_id(2)
    first = tl.program_id(0) * BF
    o_row = first + tl.arange(0, BF)
    o_col = tl.program_id(1) * BD + tl.arange(0, BD)
    m_col = o_col < D
    b_sum = tl.zeros((BF, BD), tl.float32)
    for i in range(tiles):
        o_cell = (i_part * tiles + i) * BN + tl.arange(0, BN)
        m_cell = o_cell < N
        b_row = _rows_of_cells(p_ids, p_rows, o_cell, m_cell, s, F, grid, HAS_ROWS)
        m_mine = (b_row >= first) & (b_row < first + BF)
        if tl.max(m_mine.to(tl.int32), 0) > 0:
            o = o_cell.to(tl.int64)[:, None] * D + o_col[None, :]
            b_dy = tl.load(p_dy + o, mask=m_cell[:, None] & m_col[None, :], other=0.0)
            # zeros and ones, and so the products, are exact in every dtype; the sums are in fp32
            b_pick = (o_row[:, None] == b_row[None, :]).to(b_dy.dtype)
            b_sum = tl.dot(b_pick, b_dy, b_sum, input_precision="ieee")
    o = (i_part.to(tl.int64) * F + o_row)[:, None] * D + o_col[None, :]
    tl.store(p_dtable + o, b_sum, mask=(o_row < F)[:, None] & m_col[None, :])


_FORWARD_TILES = dict(BN=16, BD=128)
# small tiles of the table, so that 8 images give 192 programs at BASE, and many cells, whose ids are read at once
_TABLE_TILES = dict(BF=16, BN=128, BD=32)
# tiles of cells for one program; more cells are summed in parts
_MOST_TILES = 16


def _parts(N: int, F: int, D: int) -> tuple[int, int]:
    """Parts G of the cells and tiles of each: from the shapes alone, so that sums are the same anywhere."""
    tiles = cdiv(N, _TABLE_TILES["BN"])
    parts = max(1, min(cdiv(tiles, _MOST_TILES), 2**22 // (F * D)))
    each = cdiv(tiles, parts)
    return cdiv(tiles, each), each


@functools.cache
def _constants(rows: bool, positions: bool) -> Constants:
    """Of the forward pass."""
    return kept(HAS_ROWS=rows, HAS_POSITIONS=positions, **_FORWARD_TILES)


def _forward_triton(
    x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, positions: Tensor | None, grid: int
) -> Tensor:
    out = torch.empty_like(x)
    if out.numel():
        (B, cells, D), constants = x.shape, _constants(rows is not None, positions is not None)
        N, num_rows = B * cells, table.shape[0]
        program = cdiv(N, constants["BN"]), cdiv(D, constants["BD"])
        numbers = N, ids.shape[1], num_rows, D, grid
        launch(_forward_kernel, program, (x, ids, table, rows, positions, out), numbers, constants)
    return out


def _table_triton(dy: Tensor, ids: Tensor, rows: Tensor | None, num_rows: int, grid: int, dtable: Tensor) -> None:
    B, cells, D = dy.shape
    G, tiles = _parts(B * cells, num_rows, D)
    partial = dtable if G == 1 else dtable.new_empty(G, num_rows, D)
    program = cdiv(num_rows, _TABLE_TILES["BF"]), cdiv(D, _TABLE_TILES["BD"]), G
    numbers = B * cells, ids.shape[1], num_rows, D, grid, tiles
    constants = dict(HAS_ROWS=rows is not None, **_TABLE_TILES)
    launch(_table_kernel, program, (dy, ids, rows, partial), numbers, constants)
    if G > 1:
        sum_parts(partial, dtable)


# torch


def _forward_torch(
    x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, positions: Tensor | None, grid: int
) -> Tensor:
    index = _cell_rows(ids, rows, len(table), grid)
    compute = torch.promote_types(x.dtype, torch.float32)
    # x first, as in the definition, so that fp32 agrees with it bit for bit
    out = x.to(compute) + torch.embedding(table, index)
    if positions is not None:
        out += positions
    return out.to(x.dtype)


def _table_torch(dy: Tensor, ids: Tensor, rows: Tensor | None, num_rows: int, grid: int) -> Tensor:
    index = _cell_rows(ids, rows, num_rows, grid)
    compute = torch.promote_types(dy.dtype, torch.float32)
    # sums in a fixed order on every device; index_add uses atomics on CUDA
    return torch.ops.aten.embedding_dense_backward(dy.to(compute), index, num_rows, -1, False)


# the registered ops


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _forward(x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, positions: Tensor | None, grid: int) -> Tensor:
    return _forward_on(OP.choose(x), x, ids, table, rows, positions, grid)


def _forward_on(
    backend: str, x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, positions: Tensor | None, grid: int
) -> Tensor:
    forward: Callable = _forward_torch if backend == "torch" else _forward_triton
    return forward(*_contiguous(x, ids, table, rows, positions), grid)


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    dy: Tensor, ids: Tensor, rows: Tensor | None, num_rows: int, grid: int, table: bool, positions: bool
) -> tuple[Tensor, Tensor]:
    dy, ids, rows = _contiguous(dy, ids, rows)
    backend = OP.choose(dy)
    dtable, dpositions = _backward_fake(dy, num_rows, table, positions)
    if positions:
        # torch sums in a fixed order too, and in fp32
        torch.sum(dy, 0, dtype=dpositions.dtype, out=dpositions)
    if not dtable.numel():
        return dtable, dpositions
    if not dy.numel():
        return dtable.zero_(), dpositions
    if backend == "torch":
        return _table_torch(dy, ids, rows, num_rows, grid), dpositions
    _table_triton(dy, ids, rows, num_rows, grid, dtable)
    return dtable, dpositions


def _backward_fake(dy: Tensor, num_rows: int, table: bool, positions: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dtable = dy.new_empty((num_rows, dy.shape[2]) if table else (0,), dtype=dtype)
    dpositions = dy.new_empty(dy.shape[1:] if positions else (0,), dtype=dtype)
    return dtable, dpositions


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ids, table, rows, positions, grid = inputs
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
        ctx.num_rows, ctx.grid = table.shape[0], grid
        ctx.dtypes = table.dtype, None if positions is None else positions.dtype
        # the gradient of the positions needs dy alone
        ctx.save_for_backward(ids, rows)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if not (needs[2] or needs[4]):
        return (dy,)
    dtable, dpositions = _instance_rows_backward(dy, *ctx.saved_tensors, ctx.num_rows, ctx.grid, needs[2], needs[4])
    return dy, None, dtable.to(ctx.dtypes[0]), None, dpositions.to(ctx.dtypes[1]) if needs[4] else None


_instance_rows = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_instance_rows_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def add_instance_rows(
    x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, grid: int, positions: Tensor | None = None
) -> Tensor:
    """Add to each token the row of the object that its cell shows and, if given, the token's position.

    Args:
        x: (B, grid*grid, D), fp32, bf16, fp16 or float64; summed in fp32 (float64 for float64), rounded once.
        ids: (B, s, s) uint8 object ids, 255 the background (which has a row like any other id).
        table: (F, D) instance embeddings, any floating dtype.
        rows: (256,) int64 row of each id, every entry within the table, or None for the fixed default id % F.
        grid: cells per side; cell i shows pixel floor(i * s / grid).
        positions: (grid*grid, D), any floating dtype, or None.

    Returns:
        (B, grid*grid, D) in the dtype of `x`.

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    tensors = x, ids, table, rows, positions
    return OP.resolve(_plan, tensors, grid)(*tensors, grid)


def _plan(x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, positions: Tensor | None, grid: int) -> Callable:
    _check(x, ids, table, rows, grid, positions)
    if OP.route(x) == "reference":
        return lambda x, ids, table, rows, positions, grid: add_instance_rows_reference(
            x, ids, table, rows, grid, positions
        )
    if runs_directly(x, ids, table, rows, positions):
        return functools.partial(_forward_on, OP.choose(x))
    return _instance_rows


def _check(x: Tensor, ids: Tensor, table: Tensor, rows: Tensor | None, grid: int, positions: Tensor | None) -> None:
    cells = grid * grid
    if not x.is_floating_point() or x.dim() != 3 or grid < 1 or x.shape[1] != cells:
        raise ValueError(f"x is {described(x)}; pass floats of shape (B, {cells}, D) for a grid of {grid}")
    B, _, D = x.shape
    square = ids.dim() == 3 and len(ids) == B and ids.shape[1] == ids.shape[2] >= 1
    if ids.dtype != torch.uint8 or not square:
        raise ValueError(f"ids are {described(ids)}; pass uint8 of shape ({B}, s, s)")
    if not table.is_floating_point() or table.dim() != 2 or table.shape[1] != D or not table.shape[0]:
        raise ValueError(f"table is {described(table)}; pass floats of shape (F, {D}), F at least 1")
    if rows is not None and (rows.shape != (256,) or rows.dtype != torch.int64):
        raise ValueError(f"rows are {described(rows)}; pass int64 of shape (256,)")
    if positions is not None and (positions.shape != (cells, D) or not positions.is_floating_point()):
        raise ValueError(f"positions are {described(positions)}; pass floats of shape ({cells}, {D})")
    others = [tensor for tensor in (ids, table, rows, positions) if tensor is not None]
    if any(tensor.device != x.device for tensor in others):
        raise ValueError(
            f"x is on {x.device}, the others on {', '.join(str(t.device) for t in others)}; move them to one device"
        )


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: BASE and LARGE, 8 images at 224 px, 128 instances."""
    cases = []
    bf16, fp32, u8, i64 = "*bf16", "*fp32", "*u8", "*i64"
    B, side, num_rows = 8, 224, 128
    for model, grid, D in (("BASE", 14, 768), ("LARGE", 16, 1024)):
        N = B * grid * grid
        sizes = N, side, num_rows, D, grid
        shape = f"{model}, {B} maps of {side} px, {grid} x {grid} x {D} each, {num_rows} rows"
        cases += [
            KernelCase.of_launch(
                f"{model} instance_rows forward",
                _forward_kernel,
                (bf16, u8, bf16, i64, bf16, bf16, *sizes),
                dict(HAS_ROWS=True, HAS_POSITIONS=True, **_FORWARD_TILES),
                shape=shape,
                bytes=N + 2048 + 2 * D * (2 * N + num_rows + grid * grid),
                flops=2 * N * D,
            ),
            KernelCase.of_launch(
                f"{model} instance_rows table",
                _table_kernel,
                (bf16, u8, i64, fp32, *sizes, _parts(N, num_rows, D)[1]),
                dict(HAS_ROWS=True, **_TABLE_TILES),
                shape=shape,
                bytes=N + 2048 + 2 * N * D + 4 * num_rows * D,
                flops=N * D,
                dot=True,
            ),
        ]
    return cases
