"""Triton kernels of the absorbed resampler attention, between the two products with the weights of the heads.

The absorbed queries a are (H, B * M, D); row q = h * M + m of image b is their row h * B * M + b * M + m. Keys come in
blocks of 64: first the blocks of the M latents, then those of the L inputs. Scores are never stored. A program computes
a tile of scores, takes the exponentials relative to the largest score of each row of the tile, and stores the largest
and the sum. A program that reads the tile multiplies it by

    factor[b, q, block] = exp(largest[b, q, block] - largest[b, q]) / sum of all exponentials of the row

so that probs * factor are the probabilities, rounded once. The padding of a block is stored as zeros: tiles are aligned
and are read without a mask. Every sum has a fixed order; there are no atomics.

Compulsory traffic of `attend` in bytes read and written, for numbers of s bytes, with Q = H M, NB blocks, W = 64 NB:
    scale   B Q D s + 4 D;                    B Q D s + 4 B Q
    scores  (2 B Q D + B (M + L) D) s + 4 B Q;    B Q W s + 8 B Q NB
    factor  8 B Q NB;                         4 B Q (NB + 1)
    mix     (B Q W + B (M + L) D) s + 4 D + 4 B Q (NB + 1);    B Q D s, and B Q D s more if P_x x_hat is saved
Products are padded to tiles: scores and mix take 2 B ceil(Q / BQ) BQ W ceil(D / BD) BD FLOPs each.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.launch import cdiv, input_precision, launch, next_power_of_2

# keys of a tile of probabilities: part of the layout of saved tensors
BLOCK = 64


def blocks_of(M: int, L: int) -> tuple[int, int]:
    """Blocks of the latents and of the inputs."""
    return cdiv(M, BLOCK), cdiv(L, BLOCK)


@triton.jit
def _row(o_q, i_image, B, M):
    """Rows of (H, B * M, D) of the absorbed queries o_q = h * M + m of an image."""
    return ((o_q // M).to(tl.int64) * B + i_image) * M + o_q % M


@triton.jit
def _tile(
    p_rows,
    o_row,
    m_row,
    p_keys,
    o_key,
    m_key,
    D,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """(BQ, BN) products of rows with keys, in fp32."""
    b_tile = tl.zeros((BQ, BN), tl.float32)
    for i in range(0, D, BD):
        o_col = i + tl.arange(0, BD)
        m_col = o_col < D
        b_rows = tl.load(p_rows + o_row[:, None] * D + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0)
        b_keys = tl.load(p_keys + o_key[None, :] * D + o_col[:, None], mask=m_key[None, :] & m_col[:, None], other=0.0)
        b_tile = tl.dot(b_rows, b_keys, b_tile, input_precision=PRECISION)
    return b_tile


@triton.jit(do_not_specialize=["R"])
def _scale_kernel(p_a, p_gamma, p_beta, p_scaled, p_offset, R, D, BR: tl.constexpr, BD: tl.constexpr):
    """a * gamma, and a . beta of every row."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = o_row < R
    b_offset = tl.zeros((BR,), tl.float32)
    for i in range(0, D, BD):
        o_col = i + tl.arange(0, BD)
        m_col = o_col < D
        o, m = o_row[:, None] * D + o_col[None, :], m_row[:, None] & m_col[None, :]
        b_a = tl.load(p_a + o, mask=m, other=0.0).to(tl.float32)
        b_gamma = tl.load(p_gamma + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + o_col, mask=m_col, other=0.0).to(tl.float32)
        tl.store(p_scaled + o, (b_a * b_gamma[None, :]).to(p_scaled.dtype.element_ty), mask=m)
        b_offset += tl.sum(b_a * b_beta[None, :], 1)
    tl.store(p_offset + o_row, b_offset, mask=m_row)


# rows and keys in any number; only the width decides whether loads are vectors
_SIZES = ["B", "M", "L", "Q", "NZ", "NB"]


@triton.jit(do_not_specialize=_SIZES)
def _scores_kernel(
    p_a,
    p_scaled,
    p_offset,
    p_query,
    p_x,
    p_probs,
    p_factor,
    p_max,
    p_sum,
    p_dprobs,
    B,
    M,
    L,
    D,
    Q,
    NZ,
    NB,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One tile: exponentials of scores with their largest and sum.

    Backward, the rows are dt in place of a, and what would be scores is the gradient of probabilities: it is stored
    with its sum over the tile, weighted with the probabilities.
    """
    i_block, i_image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    m_q = o_q < Q
    o_row = _row(o_q, i_image, B, M)
    if i_block < NZ:
        o_key = i_block * BN + tl.arange(0, BN)
        m_key = o_key < M
        b_tile = _tile(p_a, o_row, m_q, p_query + i_image * M * D, o_key, m_key, D, PRECISION, BQ, BN, BD)
    else:
        o_key = (i_block - NZ) * BN + tl.arange(0, BN)
        m_key = o_key < L
        b_tile = _tile(p_scaled, o_row, m_q, p_x + i_image * L * D, o_key, m_key, D, PRECISION, BQ, BN, BD)
        b_tile += tl.load(p_offset + o_row, mask=m_q, other=0.0)[:, None]
    o_stat = (i_image * Q + o_q) * NB + i_block
    o_tile = o_stat[:, None] * BN + tl.arange(0, BN)[None, :]
    if BACKWARD:
        # sum the rounded numbers from which dscores is computed, so that a confident row cancels exactly
        b_dprobs = b_tile.to(p_dprobs.dtype.element_ty)
        tl.store(p_dprobs + o_tile, b_dprobs, mask=m_q[:, None])
        b_probs = _probs(p_probs, p_factor, o_tile, o_stat, m_q)
        tl.store(p_sum + o_stat, tl.sum(b_probs * b_dprobs.to(tl.float32), 1), mask=m_q)
    else:
        b_tile = tl.where(m_key[None, :], b_tile, float("-inf"))
        b_max = tl.max(b_tile, 1)
        b_tile = tl.exp(b_tile - b_max[:, None])
        tl.store(p_probs + o_tile, b_tile.to(p_probs.dtype.element_ty), mask=m_q[:, None])
        tl.store(p_max + o_stat, b_max, mask=m_q)
        tl.store(p_sum + o_stat, tl.sum(b_tile, 1), mask=m_q)


@triton.jit
def _probs(p_probs, p_factor, o_tile, o_stat, m_q):
    """(BQ, BN) probabilities in fp32, zero where a block is padded."""
    b_probs = tl.load(p_probs + o_tile, mask=m_q[:, None], other=0.0).to(tl.float32)
    return b_probs * tl.load(p_factor + o_stat, mask=m_q, other=0.0)[:, None]


@triton.jit
def _dscores(p_probs, p_factor, p_dprobs, o_tile, o_stat, m_q, b_delta):
    """(BQ, BN) gradients of scores in fp32."""
    b_dprobs = tl.load(p_dprobs + o_tile, mask=m_q[:, None], other=0.0).to(tl.float32)
    return _probs(p_probs, p_factor, o_tile, o_stat, m_q) * (b_dprobs - b_delta[:, None])


@triton.jit
def _keys(p_keys, o_key, m_key, o_col, m_col, D):
    return tl.load(
        p_keys + o_key.to(tl.int64)[:, None] * D + o_col[None, :], mask=m_key[:, None] & m_col[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["R", "NZ", "NB"])
def _factor_kernel(p_max, p_sum, p_factor, p_share, R, NZ, NB, BR: tl.constexpr, BB: tl.constexpr):
    """The factors that make exponentials probabilities, tile by tile, and the share of the inputs in every row."""
    o_row, o_block = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BB)
    m_row = o_row < R
    o, m = o_row[:, None] * NB + o_block[None, :], m_row[:, None] & (o_block < NB)[None, :]
    b_max = tl.load(p_max + o, mask=m, other=float("-inf"))
    b_sum = tl.load(p_sum + o, mask=m, other=0.0)
    b_factor = tl.exp(b_max - tl.where(m_row, tl.max(b_max, 1), 0.0)[:, None])
    b_factor /= tl.where(m_row, tl.sum(b_factor * b_sum, 1), 1.0)[:, None]
    tl.store(p_factor + o, b_factor, mask=m)
    b_share = tl.sum(tl.where((o_block >= NZ)[None, :], b_factor * b_sum, 0.0), 1)
    tl.store(p_share + o_row, b_share, mask=m_row)


@triton.jit(do_not_specialize=_SIZES)
def _mix_kernel(
    p_probs,
    p_factor,
    p_dprobs,
    p_delta,
    p_query,
    p_x,
    p_gamma,
    p_beta,
    p_share,
    p_mixed,
    p_t,
    B,
    M,
    L,
    D,
    Q,
    NZ,
    NB,
    MODE: tl.constexpr,
    STORE_MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """t = gamma * (tiles_x x_hat) + beta * sum(tiles_x) + tiles_z query.

    MODE 0, forward: tiles are probabilities. MODE 1: tiles are gradients of scores, t is da, and their sums are stored
    as share. MODE 2: t of the forward pass again, from the saved mixed = tiles_x x_hat.
    """
    i_col, i_image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    o_col, o_n = i_col * BD + tl.arange(0, BD), tl.arange(0, BN)
    m_q, m_col = o_q < Q, o_col < D
    o_row = i_image * Q + o_q
    o_stat = o_row * NB
    o_out, m_out = o_row[:, None] * D + o_col[None, :], m_q[:, None] & m_col[None, :]
    p_query += i_image * M * D
    p_x += i_image * L * D
    if MODE == 1:
        b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)
        b_share = tl.zeros((BQ,), tl.float32)
    else:
        b_share = tl.load(p_share + o_row, mask=m_q, other=0.0)
    if MODE == 2:
        b_acc = tl.load(p_mixed + o_out, mask=m_out, other=0.0).to(tl.float32)
    else:
        b_acc = tl.zeros((BQ, BD), tl.float32)
        for i in range(NZ, NB):
            o_key = (i - NZ) * BN + o_n
            b_keys = _keys(p_x, o_key, o_key < L, o_col, m_col, D)
            o_tile = (o_stat + i)[:, None] * BN + o_n[None, :]
            if MODE == 0:
                b_tile = tl.load(p_probs + o_tile, mask=m_q[:, None], other=0.0)
                b_factor = tl.load(p_factor + o_stat + i, mask=m_q, other=0.0)
                b_acc += tl.dot(b_tile, b_keys, input_precision=PRECISION) * b_factor[:, None]
            else:
                b_dscores = _dscores(p_probs, p_factor, p_dprobs, o_tile, o_stat + i, m_q, b_delta)
                b_share += tl.sum(b_dscores, 1)
                b_acc = tl.dot(b_dscores.to(b_keys.dtype), b_keys, b_acc, input_precision=PRECISION)
        if MODE == 1:
            if i_col == 0:
                tl.store(p_share + o_row, b_share, mask=m_q)
        if STORE_MIXED:
            tl.store(p_mixed + o_out, b_acc.to(p_mixed.dtype.element_ty), mask=m_out)
    b_gamma = tl.load(p_gamma + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_beta = tl.load(p_beta + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_acc = b_acc * b_gamma[None, :] + b_share[:, None] * b_beta[None, :]
    for i in range(NZ):
        o_key = i * BN + o_n
        b_keys = _keys(p_query, o_key, o_key < M, o_col, m_col, D)
        o_tile = (o_stat + i)[:, None] * BN + o_n[None, :]
        if MODE == 1:
            b_dscores = _dscores(p_probs, p_factor, p_dprobs, o_tile, o_stat + i, m_q, b_delta)
            b_acc = tl.dot(b_dscores.to(b_keys.dtype), b_keys, b_acc, input_precision=PRECISION)
        else:
            b_tile = tl.load(p_probs + o_tile, mask=m_q[:, None], other=0.0)
            b_factor = tl.load(p_factor + o_stat + i, mask=m_q, other=0.0)
            b_acc += tl.dot(b_tile, b_keys, input_precision=PRECISION) * b_factor[:, None]
    o_t = _row(o_q, i_image, B, M)[:, None] * D + o_col[None, :]
    tl.store(p_t + o_t, b_acc.to(p_t.dtype.element_ty), mask=m_out)


@triton.jit
def _keys_tile(
    p_a,
    p_dt,
    p_probs,
    p_factor,
    p_dprobs,
    p_delta,
    i_image,
    i_block,
    o_col,
    B,
    M,
    D,
    Q,
    NB,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """(BN, BD) of dscores^T a + probs^T dt, summed over the absorbed queries of an image."""
    m_col = o_col < D
    b_acc = tl.zeros((BN, BD), tl.float32)
    for i in range(0, Q, BQ):
        o_q = i + tl.arange(0, BQ)
        m_q = o_q < Q
        o, m = _row(o_q, i_image, B, M)[:, None] * D + o_col[None, :], m_q[:, None] & m_col[None, :]
        b_a = tl.load(p_a + o, mask=m, other=0.0)
        b_dt = tl.load(p_dt + o, mask=m, other=0.0)
        b_delta = tl.load(p_delta + i_image * Q + o_q, mask=m_q, other=0.0)
        o_stat = (i_image * Q + o_q) * NB + i_block
        o_tile = o_stat[:, None] * BN + tl.arange(0, BN)[None, :]
        b_probs = _probs(p_probs, p_factor, o_tile, o_stat, m_q)
        b_dprobs = tl.load(p_dprobs + o_tile, mask=m_q[:, None], other=0.0).to(tl.float32)
        b_dscores = (b_probs * (b_dprobs - b_delta[:, None])).to(b_a.dtype)
        b_acc = tl.dot(tl.trans(b_dscores), b_a, b_acc, input_precision=PRECISION)
        b_acc = tl.dot(tl.trans(b_probs.to(b_a.dtype)), b_dt, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit(do_not_specialize=[*_SIZES, "first"])
def _keys_kernel(
    p_a,
    p_scaled_a,
    p_dt,
    p_scaled_dt,
    p_probs,
    p_factor,
    p_dprobs,
    p_delta,
    p_dquery,
    p_dx,
    B,
    M,
    L,
    D,
    Q,
    NZ,
    NB,
    first,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of the latents as keys and of x_hat, from block `first` on, so that either can be left out."""
    i_image, i_block = tl.program_id(2).to(tl.int64), tl.program_id(1) + first
    o_col = tl.program_id(0) * BD + tl.arange(0, BD)
    m_col = o_col < D
    if i_block < NZ:
        b_acc = _keys_tile(
            p_a,
            p_dt,
            p_probs,
            p_factor,
            p_dprobs,
            p_delta,
            i_image,
            i_block,
            o_col,
            B,
            M,
            D,
            Q,
            NB,
            PRECISION,
            BQ,
            BN,
            BD,
        )
        o_key = i_block * BN + tl.arange(0, BN)
        o, m = ((i_image * M + o_key)[:, None] * D + o_col[None, :], (o_key < M)[:, None] & m_col[None, :])
        tl.store(p_dquery + o, b_acc.to(p_dquery.dtype.element_ty), mask=m)
    else:
        b_acc = _keys_tile(
            p_scaled_a,
            p_scaled_dt,
            p_probs,
            p_factor,
            p_dprobs,
            p_delta,
            i_image,
            i_block,
            o_col,
            B,
            M,
            D,
            Q,
            NB,
            PRECISION,
            BQ,
            BN,
            BD,
        )
        o_key = (i_block - NZ) * BN + tl.arange(0, BN)
        o, m = ((i_image * L + o_key)[:, None] * D + o_col[None, :], (o_key < L)[:, None] & m_col[None, :])
        tl.store(p_dx + o, b_acc.to(p_dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["B", "M", "Q", "each"])
def _norm_kernel(
    p_a, p_dt, p_mixed_da, p_mixed, p_share_da, p_share, p_partial, B, M, D, Q, each, BR: tl.constexpr, BD: tl.constexpr
):
    """Partial sums of dgamma and dbeta over `each` blocks of absorbed queries of all images."""
    i_group = tl.program_id(1).to(tl.int64)
    o_col = tl.program_id(0) * BD + tl.arange(0, BD)
    m_col = o_col < D
    b_dgamma = tl.zeros((BD,), tl.float32)
    b_dbeta = tl.zeros((BD,), tl.float32)
    for i in range(each):
        o_all = (i_group * each + i) * BR + tl.arange(0, BR)
        m_row = o_all < B * Q
        m = m_row[:, None] & m_col[None, :]
        o_in = _row(o_all % Q, o_all // Q, B, M)[:, None] * D + o_col[None, :]
        o = o_all[:, None] * D + o_col[None, :]
        b_a = tl.load(p_a + o_in, mask=m, other=0.0).to(tl.float32)
        b_dt = tl.load(p_dt + o_in, mask=m, other=0.0).to(tl.float32)
        b_mixed_da = tl.load(p_mixed_da + o, mask=m, other=0.0).to(tl.float32)
        b_mixed = tl.load(p_mixed + o, mask=m, other=0.0).to(tl.float32)
        b_share_da = tl.load(p_share_da + o_all, mask=m_row, other=0.0)
        b_share = tl.load(p_share + o_all, mask=m_row, other=0.0)
        b_dgamma += tl.sum(b_a * b_mixed_da + b_dt * b_mixed, 0)
        b_dbeta += tl.sum(b_a * b_share_da[:, None] + b_dt * b_share[:, None], 0)
    o = i_group * D + o_col
    tl.store(p_partial + o, b_dgamma, mask=m_col)
    tl.store(p_partial + tl.num_programs(1).to(tl.int64) * D + o, b_dbeta, mask=m_col)


@functools.lru_cache(maxsize=1024)
def _tiles(kind: str, Q: int, D: int, itemsize: int) -> dict[str, int]:
    """Tile shapes: at most 99 KB of shared memory with the stages of the pipeline, no spills."""
    BD = min(64 if itemsize == 2 else 32, max(16, next_power_of_2(D)))
    BQ = min(128 if itemsize == 2 else 64, max(16, next_power_of_2(Q)))
    if kind == "factor":
        return dict(BR=16, num_warps=4, num_stages=1)
    if kind == "rows":
        return dict(BR=16, BD=min(128, max(16, next_power_of_2(D))), num_warps=4, num_stages=2)
    if kind == "keys":
        BQ = min(BQ, 64)
        return dict(BQ=BQ, BN=BLOCK, BD=BD, num_warps=4, num_stages=2)
    # four warps would spill: a mix holds two tiles, and products exact to fp32 keep their operands in registers
    num_warps = 8 if itemsize == 4 or kind == "mix" and BQ > 64 else 4
    return dict(BQ=BQ, BN=BLOCK, BD=BD, num_warps=num_warps, num_stages=3)


def _groups(R: int) -> tuple[int, int]:
    """Groups of rows, at most 64, that the gradient of the norm sums separately, and blocks of 16 rows of each."""
    blocks = cdiv(R, 16)
    each = cdiv(blocks, 64)
    return cdiv(blocks, each), each


def _sizes(query: Tensor, x_hat: Tensor, H: int) -> tuple[int, ...]:
    """B, M, L, D, Q, NZ, NB: the integers of most kernels."""
    (B, M, D), L = query.shape, x_hat.shape[1]
    NZ, NX = blocks_of(M, L)
    return B, M, L, D, H * M, NZ, NZ + NX


def _scale(a: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    H, R, D = a.shape
    scaled, offset = torch.empty_like(a), a.new_empty(H * R, dtype=torch.float32)
    tiles = _tiles("rows", R, D, a.element_size())
    launch(_scale_kernel, (cdiv(H * R, tiles["BR"]),), (a, gamma, beta, scaled, offset), (H * R, D), tiles)
    return scaled, offset


def _scores(sizes: tuple[int, ...], *pointers: Tensor | None) -> None:
    """Launch `_scores_kernel` with its pointers in order; with `dprobs`, the last one, it is the backward pass."""
    B, _, _, D, Q, _, NB = sizes
    tiles = _tiles("scores", Q, D, pointers[0].element_size())
    grid = NB, cdiv(Q, tiles["BQ"]), B
    flags = dict(BACKWARD=pointers[-1] is not None, PRECISION=input_precision(pointers[0].dtype))
    launch(_scores_kernel, grid, pointers, sizes, flags | tiles)


def _mix(mode: int, sizes: tuple[int, ...], *pointers: Tensor | None) -> None:
    """Launch `_mix_kernel` with its pointers in order; `mixed`, the last but one, is empty where it is not kept."""
    B, _, _, D, Q, _, _ = sizes
    *_, mixed, t = pointers
    tiles = _tiles("mix", Q, D, t.element_size())
    flags = dict(MODE=mode, STORE_MIXED=mode < 2 and mixed.numel() > 0, PRECISION=input_precision(t.dtype))
    grid = cdiv(D, tiles["BD"]), cdiv(Q, tiles["BQ"]), B
    launch(_mix_kernel, grid, pointers, sizes, flags | tiles)


def attend(
    a: Tensor, query: Tensor, x_hat: Tensor, gamma: Tensor, beta: Tensor, keep_mixed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Absorbed queries a (H, B * M, D) -> t of the same shape, probs, factor, share, mixed (empty if not kept)."""
    B, _, _, D, Q, NZ, NB = sizes = _sizes(query, x_hat, a.shape[0])
    scaled, offset = _scale(a, gamma, beta)
    probs = a.new_empty(B, Q, NB * BLOCK)
    largest, sums, factor = (a.new_empty(B, Q, NB, dtype=torch.float32) for _ in range(3))
    _scores(sizes, a, scaled, offset, query, x_hat, probs, None, largest, sums, None)
    t, mixed = torch.empty_like(a), a.new_empty(B if keep_mixed else 0, Q, D)
    share = sums.new_empty(B, Q)
    tiles = _tiles("factor", Q, D, a.element_size())
    pointers, numbers = (largest, sums, factor, share), (B * Q, NZ, NB)
    launch(_factor_kernel, (cdiv(B * Q, tiles["BR"]),), pointers, numbers, dict(BB=next_power_of_2(NB), **tiles))
    _mix(0, sizes, probs, factor, None, None, query, x_hat, gamma, beta, share, mixed, t)
    return t, probs, factor, share, mixed


def attend_backward(
    a: Tensor,
    dt: Tensor,
    query: Tensor,
    x_hat: Tensor,
    gamma: Tensor,
    beta: Tensor,
    probs: Tensor,
    factor: Tensor,
    share: Tensor,
    mixed: Tensor,
    needs: dict[str, bool],
    results: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradients of `attend`: fills those of query (its keys' part), x_hat and norm; returns da, and t again.

    Args:
        needs: which gradients are needed, by name.
        results: the gradients of query, x_hat, norm_weight and norm_bias to fill, and two that are not filled here.
    """
    B, M, L, D, Q, NZ, NB = sizes = _sizes(query, x_hat, a.shape[0])
    dquery, dx_hat, dgamma, dbeta, _, _ = results
    scaled_dt, offset = _scale(dt, gamma, beta)
    dprobs, sums = torch.empty_like(probs), torch.empty_like(factor)
    _scores(sizes, dt, scaled_dt, offset, query, x_hat, probs, factor, None, sums, dprobs)
    delta = sums.sum(2)
    da, t = torch.empty_like(a), torch.empty_like(a if needs["in_proj_weight"] else a[:0])
    if any(needs[name] for name in needs if name != "x_hat"):
        share_da, mixed_da = torch.empty_like(delta), a.new_empty(B if needs["norm"] else 0, Q, D)
        _mix(1, sizes, probs, factor, dprobs, delta, query, x_hat, gamma, beta, share_da, mixed_da, da)
    if needs["in_proj_weight"]:
        _mix(2, sizes, probs, factor, None, None, query, x_hat, gamma, beta, share, mixed, t)
    if needs["x_hat"] or needs["query"]:
        # without dx_hat the kernel does not read it
        scaled_a = _scale(a, gamma, beta)[0] if needs["x_hat"] else a
        first, last = 0 if needs["query"] else NZ, NB if needs["x_hat"] else NZ
        tiles = _tiles("keys", Q, D, a.element_size())
        if last > first:
            pointers = a, scaled_a, dt, scaled_dt, probs, factor, dprobs, delta, dquery, dx_hat
            constants = dict(PRECISION=input_precision(a.dtype), **tiles)
            grid = cdiv(D, tiles["BD"]), last - first, B
            launch(_keys_kernel, grid, pointers, (*sizes, first), constants)
    if needs["norm"]:
        groups, each = _groups(B * Q)
        partial = sums.new_empty(2, groups, D)
        tiles = _tiles("rows", Q, D, a.element_size())
        pointers = a, dt, mixed_da, mixed, share_da, share, partial
        launch(_norm_kernel, (cdiv(D, tiles["BD"]), groups), pointers, (B, M, D, Q, each), tiles)
        torch.sum(partial[0], 0, out=dgamma)
        torch.sum(partial[1], 0, out=dbeta)
    return da, t


def _cases(model: str, L: int, D: int) -> list[KernelCase]:
    """The cases of one model, with L inputs of width D."""
    B, M, H = 8, 64, 8
    Q, (NZ, NX) = H * M, blocks_of(M, L)
    NB, bf16, fp32 = NZ + NX, "*bf16", "*fp32"
    sizes = B, M, L, D, Q, NZ, NB
    rows, keys, number = B * Q * D * 2, B * (M + L) * D * 2, 4 * B * Q
    tiles, product = B * Q * NB * BLOCK * 2, 2 * B * Q * (M + L) * D
    groups, each = _groups(B * Q)
    scores_bytes = 2 * rows + keys + tiles + (1 + 2 * NB) * number
    mix_bytes = tiles + keys + 4 * D + (NB + 1) * number + 2 * rows
    again_bytes = tiles * NZ // NB + B * M * D * 2 + 4 * D + (NZ + 1) * number + 2 * rows

    def case(
        name: str, kernel: Any, kind: str, arguments: tuple, flags: dict, flops: int, nbytes: int, **options: bool
    ) -> KernelCase:
        return KernelCase.of_launch(
            f"{model} {name}",
            kernel,
            arguments,
            flags | _tiles(kind, Q, D, 2),
            shape=f"{model}, 8 images, 512 absorbed queries x {M + L} keys x {D}, bf16",
            flops=flops,
            bytes=nbytes,
            **options,
        )

    def scores(name: str, pointers: tuple, nbytes: int, backward: bool) -> KernelCase:
        arguments = bf16, bf16, fp32, bf16, bf16, bf16, *pointers, *sizes
        flags = dict(BACKWARD=backward, PRECISION="ieee")
        return case(name, _scores_kernel, "scores", arguments, flags, product, nbytes, dot=True)

    def mix(name: str, mode: int, flops: int, nbytes: int) -> KernelCase:
        gradients = (bf16, fp32) if mode == 1 else (None, None)
        arguments = bf16, fp32, *gradients, bf16, bf16, bf16, bf16, fp32, bf16, bf16, *sizes
        flags = dict(MODE=mode, STORE_MIXED=mode < 2, PRECISION="ieee")
        return case(name, _mix_kernel, "mix", arguments, flags, flops, nbytes, dot=True)

    scale_arguments = bf16, bf16, bf16, bf16, fp32, B * Q, D
    factor_arguments = fp32, fp32, fp32, fp32, B * Q, NZ, NB
    keys_arguments = bf16, bf16, bf16, bf16, bf16, fp32, bf16, fp32, bf16, bf16, *sizes, 0
    norm_arguments = bf16, bf16, bf16, bf16, fp32, fp32, fp32, B, M, D, Q, each
    blocks, keys_bytes = dict(BB=next_power_of_2(NB)), 4 * rows + 2 * tiles + (NB + 1) * number + keys
    factor = 6 * B * Q * NB, (3 * NB + 1) * number
    return [
        case("scale", _scale_kernel, "rows", scale_arguments, {}, 2 * rows, 2 * rows + 4 * D + number),
        scores("scores", (None, fp32, fp32, None), scores_bytes, False),
        scores("scores backward", (fp32, None, fp32, bf16), scores_bytes + tiles, True),
        case("factor", _factor_kernel, "factor", factor_arguments, blocks, *factor, vector_loads=False),
        mix("mix", 0, product, mix_bytes),
        mix("mix backward", 1, product, mix_bytes + tiles + number),
        mix("mix again", 2, 2 * B * Q * M * D, again_bytes),
        case("keys", _keys_kernel, "keys", keys_arguments, dict(PRECISION="ieee"), 2 * product, keys_bytes, dot=True),
        case("norm", _norm_kernel, "rows", norm_arguments, {}, 4 * rows, 4 * rows + 2 * number + 8 * groups * D),
    ]


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: BASE, LARGE and HUGE with six experts, 8 images, all gradients."""
    models = ("BASE", 1176, 768), ("LARGE", 1536, 1024), ("HUGE", 1536, 1280)
    return [case for model in models for case in _cases(*model)]
