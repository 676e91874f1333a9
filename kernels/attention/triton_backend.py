"""Flash attention in Triton, forward and backward: kernels and launchers. The op's docstring has the maths.

Scores never reach memory. A program of the forward pass owns a block of queries, streams the keys through an online
softmax, and writes the output and the base-2 log-sum-exp of its rows. In the backward pass a program of the first
kernel owns a block of queries and computes delta = sum over K of dout * out, then dq. A program of the second kernel
owns a block of keys and computes dk and dv. Nothing is added atomically: a repeated call gives the same bits.

Head dims 96 and 160 are computed as 64 + 32 and 128 + 32, not padded to a power of two. fp32 is multiplied as torch is
set to multiply it.

Traffic, for B*H heads, N queries, L keys, head dim K and numbers of s bytes, in blocks of BM queries and BN keys,
rounded up; rows and keys beyond the end are multiplied but not read:
    forward   reads q once and, for each query block, K and V: (N + 2 L blocks_m) K s; writes (N s K + 4 N)
    dq        reads q, out, dout once, K and V for each query block: (3 N + 2 L blocks_m) K s + 4 N; writes N K s + 4 N
    dk, dv    reads K and V once, q and dout, lse and delta for each key block: (2 L + 2 N blocks_n) K s + 8 N blocks_n;
              writes 2 L K s
and L bytes of key mask wherever K is read, 8 bytes of seed a program. Dot FLOPs for each pair of blocks (BM, BN):
    forward 4 BM BN K,  dq 6 BM BN K,  dk and dv 8 BM BN K.
Causal: a query block reads the keys before its end, and a key block reads the queries from the block of its first key
on; no others are read or multiplied.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.attention.call import Call, Facts
from prismer.kernels.launch import Constants, Prepared, cdiv, input_precision, kept, launch

# head dim -> the two widths in which it is computed
HEAD_DIMS = {32: (32, 0), 64: (64, 0), 96: (64, 32), 128: (128, 0), 160: (128, 32)}

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(p, stride, o_row, m_row, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """A block of rows of a matrix whose last dimension is contiguous; zeros where a row is masked off."""
    o_col = FROM + tl.arange(0, WIDTH)
    return tl.load(p + o_row[:, None] * stride + o_col[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def _put_rows(p, stride, o_row, m_row, b, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """The way back: store a block of rows of a matrix whose last dimension is contiguous."""
    o_col = FROM + tl.arange(0, WIDTH)
    p_row = p + o_row[:, None] * stride + o_col[None, :]
    tl.store(p_row, b.to(p.dtype.element_ty), mask=m_row[:, None])


@triton.jit
def _above(r, threshold):
    """Compare the upper 24 bits of a draw with the threshold; in a byte, so that little moves between threads."""
    return ((r >> 8).to(tl.int32) >= threshold).to(tl.int8)


@triton.jit
def _kept(seed, i_bh, i_row, i_col, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Which probabilities of rows i_row.. and keys i_col.. (a multiple of 4) survive dropout.

    Four neighbouring keys share one call of Philox, whose counter is (key // 4, row, head, 0): the choice depends on
    the seed and the place alone, not on the blocks.
    """
    o_row = i_row + tl.arange(0, BM)[:, None]
    o_four = i_col // 4 + tl.arange(0, BN // 4)[None, :]
    r0, r1, r2, r3 = tl.philox(seed, o_four, o_row, i_bh, 0)
    r0, r1, r2, r3 = (_above(r0, threshold), _above(r1, threshold), _above(r2, threshold), _above(r3, threshold))
    b = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    return tl.reshape(b, (BM, BN)) != 0


# what varies with batch and text; strides decide whether loads are vectors
_SIZES = ["N", "L", "H", "blocks", "threshold"]


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_seed,
    p_out,
    p_lse,
    N,
    L,
    H,
    blocks,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    scale,
    threshold,
    unkept,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The output and the log-sum-exp of a block of queries, by an online softmax over the keys."""
    i_bh = tl.program_id(0) // blocks
    i_m = tl.program_id(0) % blocks * BM
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    m_m = i_m + o_m < N
    p_q += i_b * q_b + i_h * q_h + i_m.to(tl.int64) * q_n
    p_k += i_b * k_b + i_h * k_h
    p_v += i_b * v_b + i_h * v_h
    b_q1 = _rows(p_q, q_n, o_m, m_m, 0, K1)
    b_max = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_acc1 = tl.zeros((BM, K1), tl.float32)
    if K2:
        b_q2 = _rows(p_q, q_n, o_m, m_m, K1, K2)
        b_acc2 = tl.zeros((BM, K2), tl.float32)
    if DROPOUT:
        seed = tl.load(p_seed)
    end = L
    if CAUSAL:
        end = tl.minimum(L, i_m + BM)
    if MASKED:
        p_mask += i_b * L
    for start in range(0, end, BN):
        m_n = start + o_n < end
        b_s = tl.dot(b_q1, tl.trans(_rows(p_k, k_n, o_n, m_n, 0, K1)), input_precision=PRECISION)
        if K2:
            b_k2 = _rows(p_k, k_n, o_n, m_n, K1, K2)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
        seen = m_n
        if MASKED:
            seen = tl.load(p_mask + start + o_n, mask=m_n, other=0) != 0
        seen = seen[None, :]
        if CAUSAL:
            seen = seen & (start + o_n[None, :] <= i_m + o_m[:, None])
        b_s = tl.where(seen, b_s * (scale * _LOG2E), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # a row that has seen nothing yet: any finite base keeps its weights at zero
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_shrink = tl.exp2(b_max - b_base)
        b_max, b_sum = b_new, b_sum * b_shrink + tl.sum(b_p, 1)
        if DROPOUT:
            b_p = tl.where(_kept(seed, i_bh, i_m, start, threshold, BM, BN), b_p, 0.0)
        b_v1 = _rows(p_v, v_n, o_n, m_n, 0, K1)
        b_p = b_p.to(b_v1.dtype)
        b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_shrink[:, None], input_precision=PRECISION)
        if K2:
            b_v2 = _rows(p_v, v_n, o_n, m_n, K1, K2)
            b_acc2 = tl.dot(b_p, b_v2, b_acc2 * b_shrink[:, None], input_precision=PRECISION)
        p_k += BN * k_n
        p_v += BN * v_n
    nothing = b_sum == 0
    b_sum = tl.where(nothing, 1.0, b_sum)
    # plus infinity where no key is seen: with minus infinity, weights that are zero would become NaN
    b_lse = tl.where(nothing, float("inf"), b_max + tl.log2(b_sum))
    b_norm = unkept / b_sum
    if p_lse is not None:
        tl.store(p_lse + i_bh.to(tl.int64) * N + i_m + o_m, b_lse, mask=m_m)
    p_out += ((i_b * N + i_m) * H + i_h) * (K1 + K2)
    _put_rows(p_out, H * (K1 + K2), o_m, m_m, b_acc1 * b_norm[:, None], 0, K1)
    if K2:
        _put_rows(p_out, H * (K1 + K2), o_m, m_m, b_acc2 * b_norm[:, None], K1, K2)


@triton.jit(do_not_specialize=_SIZES)
def _queries_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_seed,
    p_out,
    p_lse,
    p_dout,
    p_dq,
    p_delta,
    N,
    L,
    H,
    blocks,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    scale,
    threshold,
    unkept,
    NEEDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """delta of a block of queries, which the keys kernel reads, and dq if it is needed."""
    i_bh = tl.program_id(0) // blocks
    i_m = tl.program_id(0) % blocks * BM
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m = tl.arange(0, BM)
    m_m = i_m + o_m < N
    stride = H * (K1 + K2)
    place = ((i_b * N + i_m) * H + i_h) * (K1 + K2)
    b_do1 = _rows(p_dout + place, stride, o_m, m_m, 0, K1)
    b_out1 = _rows(p_out + place, stride, o_m, m_m, 0, K1)
    b_delta = tl.sum(b_do1.to(tl.float32) * b_out1.to(tl.float32), 1)
    if K2:
        b_do2 = _rows(p_dout + place, stride, o_m, m_m, K1, K2)
        b_out2 = _rows(p_out + place, stride, o_m, m_m, K1, K2)
        b_delta += tl.sum(b_do2.to(tl.float32) * b_out2.to(tl.float32), 1)
    o_row = i_bh.to(tl.int64) * N + i_m + o_m
    tl.store(p_delta + o_row, b_delta, mask=m_m)
    if NEEDED:
        b_lse = tl.load(p_lse + o_row, mask=m_m, other=float("inf"))
        p_q += i_b * q_b + i_h * q_h + i_m.to(tl.int64) * q_n
        b_q1 = _rows(p_q, q_n, o_m, m_m, 0, K1)
        b_dq1 = tl.zeros((BM, K1), tl.float32)
        if K2:
            b_q2 = _rows(p_q, q_n, o_m, m_m, K1, K2)
            b_dq2 = tl.zeros((BM, K2), tl.float32)
        if DROPOUT:
            seed = tl.load(p_seed)
        end = L
        if CAUSAL:
            end = tl.minimum(L, i_m + BM)
        p_k += i_b * k_b + i_h * k_h
        p_v += i_b * v_b + i_h * v_h
        if MASKED:
            p_mask += i_b * L
        o_n = tl.arange(0, BN)
        for start in range(0, end, BN):
            m_n = start + o_n < end
            b_k1 = _rows(p_k, k_n, o_n, m_n, 0, K1)
            b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
            b_dp = tl.dot(b_do1, tl.trans(_rows(p_v, v_n, o_n, m_n, 0, K1)), input_precision=PRECISION)
            if K2:
                b_k2 = _rows(p_k, k_n, o_n, m_n, K1, K2)
                b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
                b_v2 = _rows(p_v, v_n, o_n, m_n, K1, K2)
                b_dp = tl.dot(b_do2, tl.trans(b_v2), b_dp, input_precision=PRECISION)
            seen = m_n
            if MASKED:
                seen = tl.load(p_mask + start + o_n, mask=m_n, other=0) != 0
            seen = seen[None, :]
            if CAUSAL:
                seen = seen & (start + o_n[None, :] <= i_m + o_m[:, None])
            b_p = tl.exp2(tl.where(seen, b_s * (scale * _LOG2E) - b_lse[:, None], float("-inf")))
            if DROPOUT:
                b_keep = _kept(seed, i_bh, i_m, start, threshold, BM, BN)
                b_dp = tl.where(b_keep, b_dp * unkept, 0.0)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k1.dtype)
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
            if K2:
                b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)
            p_k += BN * k_n
            p_v += BN * v_n
        _put_rows(p_dq + place, stride, o_m, m_m, b_dq1 * scale, 0, K1)
        if K2:
            _put_rows(p_dq + place, stride, o_m, m_m, b_dq2 * scale, K1, K2)


@triton.jit(do_not_specialize=_SIZES)
def _keys_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_seed,
    p_lse,
    p_delta,
    p_dout,
    p_dk,
    p_dv,
    N,
    L,
    H,
    blocks,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    scale,
    threshold,
    unkept,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk and dv of a block of keys. Scores are held transposed, (BN, BM)."""
    i_bh = tl.program_id(0) // blocks
    i_n = tl.program_id(0) % blocks * BN
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    m_n = i_n + o_n < L
    p_k += i_b * k_b + i_h * k_h + i_n.to(tl.int64) * k_n
    p_v += i_b * v_b + i_h * v_h + i_n.to(tl.int64) * v_n
    b_k1 = _rows(p_k, k_n, o_n, m_n, 0, K1)
    b_v1 = _rows(p_v, v_n, o_n, m_n, 0, K1)
    b_dk1 = tl.zeros((BN, K1), tl.float32)
    b_dv1 = tl.zeros((BN, K1), tl.float32)
    if K2:
        b_k2 = _rows(p_k, k_n, o_n, m_n, K1, K2)
        b_v2 = _rows(p_v, v_n, o_n, m_n, K1, K2)
        b_dk2 = tl.zeros((BN, K2), tl.float32)
        b_dv2 = tl.zeros((BN, K2), tl.float32)
    if DROPOUT:
        seed = tl.load(p_seed)
    seen_n = m_n
    if MASKED:
        seen_n = tl.load(p_mask + i_b * L + i_n + o_n, mask=m_n, other=0) != 0
    first = i_n * 0
    if CAUSAL:
        first = i_n // BM * BM
    stride = H * (K1 + K2)
    p_q += i_b * q_b + i_h * q_h + first.to(tl.int64) * q_n
    p_dout += ((i_b * N + first) * H + i_h) * (K1 + K2)
    p_lse += i_bh.to(tl.int64) * N
    p_delta += i_bh.to(tl.int64) * N
    for start in range(first, N, BM):
        m_m = start + o_m < N
        b_q1 = _rows(p_q, q_n, o_m, m_m, 0, K1)
        b_s = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
        b_do1 = _rows(p_dout, stride, o_m, m_m, 0, K1)
        b_dp = tl.dot(b_v1, tl.trans(b_do1), input_precision=PRECISION)
        if K2:
            b_q2 = _rows(p_q, q_n, o_m, m_m, K1, K2)
            b_s = tl.dot(b_k2, tl.trans(b_q2), b_s, input_precision=PRECISION)
            b_do2 = _rows(p_dout, stride, o_m, m_m, K1, K2)
            b_dp = tl.dot(b_v2, tl.trans(b_do2), b_dp, input_precision=PRECISION)
        b_lse = tl.load(p_lse + start + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + start + o_m, mask=m_m, other=0.0)
        seen = seen_n[:, None]
        if CAUSAL:
            seen = seen & (i_n + o_n[:, None] <= start + o_m[None, :])
        b_p = tl.exp2(tl.where(seen, b_s * (scale * _LOG2E) - b_lse[None, :], float("-inf")))
        b_dropped = b_p
        if DROPOUT:
            b_keep = tl.trans(_kept(seed, i_bh, start, i_n, threshold, BM, BN))
            b_dropped = tl.where(b_keep, b_p * unkept, 0.0)
            b_dp = tl.where(b_keep, b_dp * unkept, 0.0)
        b_dropped = b_dropped.to(b_do1.dtype)
        b_dv1 = tl.dot(b_dropped, b_do1, b_dv1, input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q1.dtype)
        b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
        if K2:
            b_dv2 = tl.dot(b_dropped, b_do2, b_dv2, input_precision=PRECISION)
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)
        p_q += BM * q_n
        p_dout += BM * stride
    place = ((i_b * L + i_n) * H + i_h) * (K1 + K2)
    _put_rows(p_dk + place, stride, o_n, m_n, b_dk1 * scale, 0, K1)
    _put_rows(p_dv + place, stride, o_n, m_n, b_dv1, 0, K1)
    if K2:
        _put_rows(p_dk + place, stride, o_n, m_n, b_dk2 * scale, K1, K2)
        _put_rows(p_dv + place, stride, o_n, m_n, b_dv2, K1, K2)


# launchers


def refuses(facts: Facts) -> str | None:
    """None if the kernels serve the call, else the reason why not."""
    if facts.head_dim not in HEAD_DIMS:
        return f"triton attention serves head dims {', '.join(map(str, HEAD_DIMS))}, not {facts.head_dim}"
    return None


def tiles(kernel: str, K: int, itemsize: int, N: int, L: int, dropout: bool) -> dict[str, int]:
    """Block shapes of `kernel` ("forward", "queries" or "keys"), for N queries and L keys.

    They depend on the shape of a sample, not on the batch: a sample alone gives the same bits. There are two sizes, for
    up to 16 tokens and for more: every further one would be compiled for some text.
    """
    BM, BN, num_warps, num_stages = _TILES[kernel, itemsize, dropout][K]
    BM, BN = (16 if n <= 16 else size for size, n in ((BM, N), (BN, L)))
    return dict(BM=BM, BN=BN, num_warps=num_warps, num_stages=num_stages)


# (kernel, bytes of a number, dropout) -> head dim -> BM, BN, warps, stages. Chosen by compiling: the largest of those
# tried that neither spill on sm_80, sm_90, sm_100 or sm_120 nor exceed the 99 KB of shared memory of sm_120. Where all
# of them spill, the one that spills least: head dim 160 with dropout in the forward and the keys kernel, and large
# heads in fp32, which no tensor core multiplies exactly
_TILES = {
    (kernel, itemsize, dropout): dict(zip(HEAD_DIMS, shapes, strict=True))
    for kernel, itemsize, dropout, shapes in (
        ("forward", 2, False, ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 1))),
        ("forward", 2, True, ((128, 64, 8, 3), (64, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2))),
        ("queries", 2, False, ((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2))),
        ("queries", 2, True, ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (16, 32, 4, 2))),
        ("keys", 2, False, ((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2))),
        ("keys", 2, True, ((32, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2), (32, 32, 8, 2), (16, 32, 4, 1))),
        *(
            (kernel, 4, dropout, ((32, 32, 8, 1),) * 5)
            for kernel in ("forward", "queries", "keys")
            for dropout in (False, True)
        ),
    )
}


@functools.lru_cache(maxsize=1024)
def _settings(
    kernel: str,
    H: int,
    N: int,
    L: int,
    K: int,
    itemsize: int,
    scale: float,
    dropout: float,
    causal: bool,
    masked: bool,
    precision: str,
    **flags: bool,
) -> tuple[int, tuple, tuple, Constants]:
    """Blocks of a head, the numbers before and after the strides, and the constants, to which `flags` belong."""
    shape = tiles(kernel, K, itemsize, N, L, dropout > 0)
    blocks = cdiv(L, shape["BN"]) if kernel == "keys" else cdiv(N, shape["BM"])
    options = dict(CAUSAL=causal, MASKED=masked, DROPOUT=dropout > 0, PRECISION=precision, **flags)
    constants = kept(K1=HEAD_DIMS[K][0], K2=HEAD_DIMS[K][1], **shape, **options)
    # a 24-bit draw below the threshold drops a weight; the factor scales the others
    return blocks, (N, L, H, blocks), (scale, round(dropout * 2**24), 1 / (1 - dropout)), constants


def _launch(kernel: triton.JITFunction, name: str, call: Call, *own: Tensor | None, **flags: bool) -> None:
    """Launch a kernel with the arguments that all three have, and its own."""
    grid, numbers, constants = _launch_settings(name, call, **flags)
    launch(kernel, grid, (call.q, call.k, call.v, _bytes(call.key_mask), call.seed, *own), numbers, constants)


def _launch_settings(name: str, call: Call, **flags: bool) -> tuple[tuple[int], tuple, Constants]:
    """Grid, numbers and constants."""
    q, k, v = call.q, call.k, call.v
    B, H, N, K = q.shape
    options = call.scale, call.dropout, call.causal, call.key_mask is not None, input_precision(q.dtype)
    blocks, first, last, constants = _settings(name, H, N, k.shape[2], K, q.element_size(), *options, **flags)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    return (blocks * B * H,), (*first, *strides, *last), constants


def _bytes(mask: Tensor | None) -> Tensor | None:
    # Triton reads bytes
    return None if mask is None else mask.view(torch.uint8)


def prepare(call: Call) -> Callable[..., Tensor]:
    """What runs the forward pass of calls like this one: a function of q, k, v, key_mask and seed.

    It returns (B, H, N, K) whose memory is (B, N, H, K). The call is not empty, and what `forward` asks for is dense.
    """
    run = Prepared(_forward_kernel, *_launch_settings("forward", call))
    _, H, N, K = shape = call.q.shape
    strides = N * H * K, K, H * K, 1

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seed: Tensor | None) -> Tensor:
        out = q.new_empty_strided(shape, strides)
        # without a gradient nobody reads lse
        run(q, k, v, _bytes(key_mask), seed, out, None)
        return out

    return attend


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill out (B, N, H, K) and lse (B, H, N); the last dimension of q, k and v and the mask are dense."""
    _launch(_forward_kernel, "forward", call, out, lse)


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor, grads: list[Tensor | None]) -> None:
    """Fill those of dq, dk and dv (B, tokens, H, K) that are not None; dout (B, N, H, K) is contiguous."""
    dq, dk, dv = grads
    delta = torch.empty_like(lse)
    _launch(_queries_kernel, "queries", call, out, lse, dout, dq, delta, NEEDED=dq is not None)
    if dk is not None:
        _launch(_keys_kernel, "keys", call, lse, delta, dout, dk, dv)


# what is compiled ahead of time


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: 8 images at 480 px, bf16, with views of packed projections."""
    cases = []
    for name, H, N, L, K, causal, dropout in (
        ("BASE self", 12, 964, 964, 64, False, 0.0),
        ("LARGE self", 16, 1220, 1220, 64, False, 0.0),
        ("BASE text, causal, padded, dropout", 12, 40, 40, 64, True, 0.1),
        ("BASE text to image, dropout", 12, 40, 964, 64, False, 0.1),
        ("BASE resampler", 8, 64, 1240, 96, False, 0.0),
        ("LARGE resampler", 8, 64, 1240, 128, False, 0.0),
        ("HUGE resampler", 8, 64, 1240, 160, False, 0.0),
        ("tiny self", 4, 64, 64, 32, False, 0.0),
    ):
        B, D, s = 8, H * K, 2
        strides = (3 * D * N, K, 3 * D) * 3
        bf16, fp32 = "*bf16", "*fp32"
        shared = bf16, bf16, bf16, "*u8" if causal else None, "*i64" if dropout else None
        pairs = B * H * (N * (N + 1) // 2 if causal else N * L)
        queries, keys, rows = B * N * D * s, B * L * D * s, B * H * N * 4
        small = B * L * causal + 8 * (dropout > 0)
        for part, kernel, own, flags, flops, nbytes in (
            ("forward", _forward_kernel, (bf16, fp32), {}, 4 * pairs * K, 2 * queries + 2 * keys + rows + small),
            (
                "queries",
                _queries_kernel,
                (bf16, fp32, bf16, bf16, fp32),
                dict(NEEDED=True),
                6 * pairs * K,
                4 * queries + 2 * keys + 2 * rows + small,
            ),
            (
                "keys",
                _keys_kernel,
                (fp32, fp32, bf16, bf16, bf16),
                {},
                8 * pairs * K,
                2 * queries + 4 * keys + 2 * rows + small,
            ),
        ):
            options = K**-0.5, dropout, causal, causal, "ieee"
            _, first, last, constants = _settings(part, H, N, L, K, s, *options, **flags)
            cases.append(
                KernelCase.of_launch(
                    f"{name} {part}",
                    kernel,
                    (*shared, *own, *first, *strides, *last),
                    constants,
                    shape=f"{B} x {H} heads, {N} queries, {L} keys, head dim {K}, bf16",
                    flops=flops,
                    bytes=nbytes,
                    dot=True,
                )
            )
    return cases
