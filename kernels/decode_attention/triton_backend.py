"""Triton kernels of decode attention; `__init__.py` says what they compute, and has the legend.

Up to 256 shared keys, such as those of a prompt, a program takes one row and head, BQ queries, the shared keys and then
the listed slots, which it gathers by their numbers, and writes the output. More keys are split: a program takes 256 of
them, or in one more split all listed slots, and stores a maximum, a sum and an unnormalised output in fp32. A second
kernel combines the T = ceil(S / 256) + (A > 0) parts in order; T is 1 in the first case. Parts depend on S alone and BQ
on Q alone, so a row gives the same bits in any batch. Traffic, for numbers of s bytes, L listed slots over all queries
of all rows:
    split     reads R H Q K s T + 2 R H S K s ceil(Q / BQ) + R H S ceil(Q / BQ) of the mask (R H Q S if it differs by
              query) + 8 R H Q A + 2 H L K s; writes R H T Q (4 K + 8). If T is 1, it reads the
              queries twice and writes R H Q K s
    combine   reads R H T Q (4 K + 8), writes R H Q K s
    dots      4 K FLOPs for each of R H ceil(Q / BQ) BQ queries and each key, S rounded up to BN
So up to 64 queries read the K s bytes of a key once; attention on repeated keys reads them for each query.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.launch import Constants, Prepared, cdiv, input_precision, kept, launch, next_power_of_2

# keys and their values
Pair = tuple[Tensor, Tensor]
_LOG2_E = 1.4426950408889634


@triton.jit
def _raise_max(b_max, b_new):
    """The new maximum, the shift to subtract from scores, and the factor for sums under the old maximum."""
    b_new = tl.maximum(b_max, b_new)
    # before the first key the maximum is -inf, and -inf - -inf would be nan
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_shift, tl.exp2(b_max - b_shift)


@triton.jit
def _shared_keys(
    state,
    p_q,
    p_shared_k,
    p_shared_v,
    p_mask,
    base,
    shared_key,
    i_row,
    first,
    o_query,
    m_query,
    Q,
    S,
    scale,
    PER_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The state (maximum, sum, both parts of the output) after KEYS shared keys from `first` on."""
    b_max, b_sum, b_out1, b_out2 = state
    o_k1, o_k2 = tl.arange(0, K1), K1 + tl.arange(0, K2 if K2 > 0 else 16)
    m_k1, m_k2 = o_k1 < K, o_k2 < K
    b_q1 = tl.load(p_q + o_k1[None, :], mask=m_query[:, None] & m_k1[None, :], other=0.0)
    if K2 > 0:
        b_q2 = tl.load(p_q + o_k2[None, :], mask=m_query[:, None] & m_k2[None, :], other=0.0)
    for start in range(first, tl.minimum(S, first + KEYS), BN):
        o_key = start + tl.arange(0, BN)
        m_key = o_key < S
        o = base + o_key.to(tl.int64)[:, None] * shared_key
        m1 = m_key[:, None] & m_k1[None, :]
        b_k1 = tl.load(p_shared_k + o + o_k1[None, :], mask=m1, other=0.0)
        b_score = tl.dot(b_q1, b_k1.T, input_precision=PRECISION)
        if K2 > 0:
            m2 = m_key[:, None] & m_k2[None, :]
            b_k2 = tl.load(p_shared_k + o + o_k2[None, :], mask=m2, other=0.0)
            b_score = tl.dot(b_q2, b_k2.T, b_score, input_precision=PRECISION)
        if PER_QUERY:
            o_mask = (i_row * Q + o_query)[:, None] * S + o_key[None, :]
            m = m_query[:, None] & m_key[None, :]
            m = m & (tl.load(p_mask + o_mask, mask=m, other=0) != 0)
        else:
            m = (tl.load(p_mask + i_row * S + o_key, mask=m_key, other=0) != 0)[None, :]
        b_score = tl.where(m, b_score * scale, float("-inf"))
        b_max, b_shift, b_rescale = _raise_max(b_max, tl.max(b_score, 1))
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_sum = b_sum * b_rescale + tl.sum(b_weight, 1)
        b_v1 = tl.load(p_shared_v + o + o_k1[None, :], mask=m1, other=0.0)
        b_weight = b_weight.to(b_v1.dtype)
        b_out1 *= b_rescale[:, None]
        b_out1 = tl.dot(b_weight, b_v1, b_out1, input_precision=PRECISION)
        if K2 > 0:
            b_v2 = tl.load(p_shared_v + o + o_k2[None, :], mask=m2, other=0.0)
            b_out2 *= b_rescale[:, None]
            b_out2 = tl.dot(b_weight, b_v2, b_out2, input_precision=PRECISION)
    return b_max, b_sum, b_out1, b_out2


@triton.jit
def _listed_slots(
    state,
    p_q,
    p_suffix_k,
    p_suffix_v,
    p_ancestors,
    base,
    suffix_slot,
    m_query,
    M,
    A,
    scale,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
):
    """The state after the A slots that p_ancestors lists for each query."""
    b_max, b_sum, b_out1, b_out2 = state
    o_k1, o_k2 = tl.arange(0, K1), K1 + tl.arange(0, K2 if K2 > 0 else 16)
    m_k1, m_k2 = o_k1 < K, o_k2 < K
    b_q1 = tl.load(p_q + o_k1[None, :], mask=m_query[:, None] & m_k1[None, :], other=0.0)
    if K2 > 0:
        b_q2 = tl.load(p_q + o_k2[None, :], mask=m_query[:, None] & m_k2[None, :], other=0.0)
    for i in range(A):
        b_slot = tl.load(p_ancestors + i, mask=m_query, other=-1)
        m_slot = (b_slot >= 0) & (b_slot < M)
        o = base + b_slot[:, None] * suffix_slot
        m1 = m_slot[:, None] & m_k1[None, :]
        b_k1 = tl.load(p_suffix_k + o + o_k1[None, :], mask=m1, other=0.0)
        b_score = tl.sum(b_q1.to(tl.float32) * b_k1.to(tl.float32), 1)
        if K2 > 0:
            m2 = m_slot[:, None] & m_k2[None, :]
            b_k2 = tl.load(p_suffix_k + o + o_k2[None, :], mask=m2, other=0.0)
            b_score += tl.sum(b_q2.to(tl.float32) * b_k2.to(tl.float32), 1)
        b_score = tl.where(m_slot, b_score * scale, float("-inf"))
        b_max, b_shift, b_rescale = _raise_max(b_max, b_score)
        b_weight = tl.exp2(b_score - b_shift)
        b_sum = b_sum * b_rescale + b_weight
        b_v1 = tl.load(p_suffix_v + o + o_k1[None, :], mask=m1, other=0.0).to(tl.float32)
        b_out1 = b_out1 * b_rescale[:, None] + b_weight[:, None] * b_v1
        if K2 > 0:
            b_v2 = tl.load(p_suffix_v + o + o_k2[None, :], mask=m2, other=0.0).to(tl.float32)
            b_out2 = b_out2 * b_rescale[:, None] + b_weight[:, None] * b_v2
    return b_max, b_sum, b_out1, b_out2


@triton.jit(do_not_specialize=["H", "Q", "S", "M", "A", "splits"])
def _split_kernel(
    p_q,
    p_shared_k,
    p_shared_v,
    p_mask,
    p_suffix_k,
    p_suffix_v,
    p_ancestors,
    p_out,
    p_part,
    q_row,
    q_head,
    q_query,
    shared_row,
    shared_head,
    shared_key,
    suffix_row,
    suffix_head,
    suffix_slot,
    H,
    Q,
    S,
    M,
    A,
    splits,
    scale,
    WHOLE: tl.constexpr,
    PER_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (row and head, queries, part): KEYS shared keys, or all listed slots in the part after the last.

    WHOLE: the one part takes both and writes the output. Otherwise a part writes to p_part: outputs, maxima and sums.
    """
    i_both = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_both // H, i_both % H
    i_part = tl.program_id(2)
    o_query = tl.program_id(1) * BQ + tl.arange(0, BQ)
    m_query = o_query < Q
    # a head of 96 or 160 is 64 + 32 or 128 + 32 wide, and not padded to a power of two
    o_k1, o_k2 = tl.arange(0, K1), K1 + tl.arange(0, K2 if K2 > 0 else 16)
    m_k1, m_k2 = o_k1 < K, o_k2 < K
    p_q += i_row * q_row + i_head * q_head + o_query.to(tl.int64)[:, None] * q_query
    b_max = tl.full((BQ,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BQ,), tl.float32)
    b_out1 = tl.zeros((BQ, K1), tl.float32)
    # stands for nothing where a head has one part
    b_out2 = tl.zeros((BQ, K2 if K2 > 0 else 16), tl.float32)
    state = b_max, b_sum, b_out1, b_out2
    p_ancestors += (i_row * Q + o_query) * A
    shared = i_row * shared_row + i_head * shared_head
    suffix = i_row * suffix_row + i_head * suffix_head
    if WHOLE:
        state = _shared_keys(
            state,
            p_q,
            p_shared_k,
            p_shared_v,
            p_mask,
            shared,
            shared_key,
            i_row,
            i_part * KEYS,
            o_query,
            m_query,
            Q,
            S,
            scale,
            PER_QUERY,
            PRECISION,
            K,
            K1,
            K2,
            BN,
            KEYS,
        )
        state = _listed_slots(
            state, p_q, p_suffix_k, p_suffix_v, p_ancestors, suffix, suffix_slot, m_query, M, A, scale, K, K1, K2
        )
    elif i_part < splits:
        state = _shared_keys(
            state,
            p_q,
            p_shared_k,
            p_shared_v,
            p_mask,
            shared,
            shared_key,
            i_row,
            i_part * KEYS,
            o_query,
            m_query,
            Q,
            S,
            scale,
            PER_QUERY,
            PRECISION,
            K,
            K1,
            K2,
            BN,
            KEYS,
        )
    else:
        state = _listed_slots(
            state, p_q, p_suffix_k, p_suffix_v, p_ancestors, suffix, suffix_slot, m_query, M, A, scale, K, K1, K2
        )
    b_max, b_sum, b_out1, b_out2 = state

    m1 = m_query[:, None] & m_k1[None, :]
    if WHOLE:
        # a query that saw nothing: 0 / 1
        b_norm = 1 / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
        # the heads of a query lie side by side
        p_out += ((i_row * Q + o_query) * H + i_head)[:, None] * K
        tl.store(p_out + o_k1[None, :], (b_out1 * b_norm).to(p_out.dtype.element_ty), mask=m1)
        if K2 > 0:
            m2 = m_query[:, None] & m_k2[None, :]
            tl.store(p_out + o_k2[None, :], (b_out2 * b_norm).to(p_out.dtype.element_ty), mask=m2)
    else:
        N = tl.num_programs(0).to(tl.int64) * Q
        p_max = p_part + tl.num_programs(2) * N * K
        p_sum = p_max + tl.num_programs(2) * N
        o_part = i_part * N + i_both * Q + o_query
        p_part += o_part[:, None] * K
        tl.store(p_part + o_k1[None, :], b_out1, mask=m1)
        if K2 > 0:
            tl.store(p_part + o_k2[None, :], b_out2, mask=m_query[:, None] & m_k2[None, :])
        tl.store(p_max + o_part, b_max, mask=m_query)
        tl.store(p_sum + o_part, b_sum, mask=m_query)


@triton.jit(do_not_specialize=["N", "Q", "parts"])
def _combine_kernel(p_part, p_out, N, H, Q, parts, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """Merge the parts of BR of the N = R H Q queries, in order; the heads of a query lie side by side in the output."""
    p_max = p_part + parts.to(tl.int64) * N * K
    p_sum = p_max + parts.to(tl.int64) * N
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_col = tl.arange(0, BK)
    m_row = o_row < N
    m = m_row[:, None] & (o_col < K)[None, :]
    b_max = tl.full((BR,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BR,), tl.float32)
    b_out = tl.zeros((BR, BK), tl.float32)
    o = o_row
    for _ in range(parts):
        b_part_max = tl.load(p_max + o, mask=m_row, other=float("-inf"))
        b_max, b_shift, b_rescale = _raise_max(b_max, b_part_max)
        b_scale = tl.exp2(b_part_max - b_shift)
        b_sum = b_sum * b_rescale + tl.load(p_sum + o, mask=m_row, other=0.0) * b_scale
        b_part = tl.load(p_part + o[:, None] * K + o_col[None, :], mask=m, other=0.0)
        b_out = b_out * b_rescale[:, None] + b_part * b_scale[:, None]
        o += N
    # a query that saw nothing: 0 / 1
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    i_both = o_row // Q
    o_out = (i_both // H * Q + o_row % Q) * H + i_both % H
    tl.store(p_out + o_out[:, None] * K + o_col[None, :], b_out.to(p_out.dtype.element_ty), mask=m)


_KEYS = 256  # shared keys of a part


def _head_split(K: int) -> tuple[int, int]:
    """The widths of the two parts of a head, powers of two; the second is 0 where one part is not wider than two."""
    whole = max(16, next_power_of_2(K))
    rest = max(16, next_power_of_2(K - whole // 2)) if K > whole // 2 else 16
    return (whole // 2, rest) if whole // 2 >= 16 and whole // 2 + rest < whole else (whole, 0)


@functools.lru_cache(maxsize=1024)
def _tiles(Q: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Queries and keys of a tile, by the number of queries and the bytes of a head."""
    K1, K2 = _head_split(K)
    if dtype == torch.float32:
        # fp32 products keep their operands in registers
        return dict(K1=K1, K2=K2, BQ=16, BN=32 if K <= 64 else 16, num_warps=4, num_stages=2)
    # two sizes, for beams and for candidates: every further one would be compiled for some number of queries
    BQ = 16 if Q <= 16 else 64 if K <= 64 else 32
    # with 64 queries four warps would spill on sm_100
    num_warps = 8 if BQ == 64 else 4
    return dict(K1=K1, K2=K2, BQ=BQ, BN=64 if K <= 64 else 32, num_warps=num_warps, num_stages=2)


@functools.cache
def _combine_tiles(K: int) -> Constants:
    BK = next_power_of_2(K)
    return kept(K=K, BR=max(1, 1024 // BK), BK=BK, num_warps=4)


def _flags(whole: bool, per_query: bool, K: int, precision: str) -> dict[str, Any]:
    return dict(WHOLE=whole, PER_QUERY=per_query, PRECISION=precision, K=K, KEYS=_KEYS)


@functools.lru_cache(maxsize=1024)
def _constants(Q: int, K: int, dtype: torch.dtype, whole: bool, per_query: bool, precision: str) -> Constants:
    """Of the launch of `_split_kernel`."""
    return kept(**_flags(whole, per_query, K, precision), **_tiles(Q, K, dtype))


def _settings(
    q: Tensor, shared_k: Tensor, shared_mask: Tensor, suffix_k: Tensor, ancestors: Tensor
) -> tuple[int, tuple[int, ...], tuple, Constants]:
    """Parts that are combined, 0 if there is one alone; grid, numbers and constants of the launch."""
    R, H, Q, K = q.shape
    S, M, A = shared_k.shape[2], suffix_k.shape[2], ancestors.shape[2]
    splits = cdiv(S, _KEYS)
    whole = splits <= 1
    parts = 0 if whole else splits + (A > 0)
    strides = *q.stride()[:3], *shared_k.stride()[:3], *suffix_k.stride()[:3]
    sizes = H, Q, S, M, A, splits, K**-0.5 * _LOG2_E
    constants = _constants(Q, K, q.dtype, whole, shared_mask.shape[1] > 1, input_precision(q.dtype))
    return parts, (R * H, cdiv(Q, constants["BQ"]), parts or 1), (*strides, *sizes), constants


def prepare(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    shared_mask: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    ancestors: Tensor,
) -> Callable[..., Tensor] | None:
    """What runs calls like this one in one launch; None if they take two, or a copy.

    The result is (R, H, Q, K), whose memory is (R, Q, H, K).
    """
    parts, *launched = _settings(q, shared_k, shared_mask, suffix_k, ancestors)
    tensors = q, shared_k, shared_v, suffix_k, suffix_v
    dense = all(t.stride(-1) == 1 for t in tensors) and shared_mask.is_contiguous() and ancestors.is_contiguous()
    alike = shared_k.stride() == shared_v.stride() and suffix_k.stride() == suffix_v.stride()
    if parts or not (dense and alike and q.numel()):
        return None
    run = Prepared(_split_kernel, *launched)
    R, H, Q, K = shape = q.shape
    strides = Q * H * K, K, H * K, 1

    def attend(q: Tensor, *others: Tensor) -> Tensor:
        out = q.new_empty_strided(shape, strides)
        run(q, *others, out, None)
        return out

    return attend


def forward(q: Tensor, shared: Pair, shared_mask: Tensor, suffix: Pair, ancestors: Tensor, out: Tensor) -> None:
    (shared_k, shared_v), (suffix_k, suffix_v) = shared, suffix
    R, H, Q, K = q.shape
    parts, grid, numbers, constants = _settings(q, shared_k, shared_mask, suffix_k, ancestors)
    N = R * H * Q
    part = torch.empty(parts * N * (K + 2), dtype=torch.float32, device=q.device) if parts else None
    pointers = q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors, out, part
    launch(_split_kernel, grid, pointers, numbers, constants)
    if parts:
        tiles = _combine_tiles(K)
        launch(_combine_kernel, (cdiv(N, tiles["BR"]),), (part, out), (N, H, Q, parts), tiles)


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: 3 beams and 128 candidates at BASE and LARGE, and every head size."""
    cases = []
    fp32 = "*fp32"
    for model, R, H, K, Q, S, A, dtype in (
        ("BASE, 3 beams", 8, 12, 64, 3, 964, 20, torch.bfloat16),
        ("BASE, 3 beams, a prompt of 40", 8, 12, 64, 3, 40, 20, torch.bfloat16),
        ("BASE, 128 candidates", 8, 12, 64, 128, 964, 6, torch.bfloat16),
        ("LARGE, 3 beams", 8, 16, 64, 3, 1220, 20, torch.bfloat16),
        ("head of 32", 8, 12, 32, 128, 964, 6, torch.bfloat16),
        ("head of 96", 8, 12, 96, 128, 964, 6, torch.bfloat16),
        ("head of 128", 8, 12, 128, 128, 964, 6, torch.bfloat16),
        ("head of 160", 8, 12, 160, 128, 964, 6, torch.bfloat16),
        ("BASE in fp32, 128 candidates", 8, 12, 64, 128, 964, 6, torch.float32),
        ("head of 160 in fp32", 8, 12, 160, 128, 964, 6, torch.float32),
    ):
        given, size = ("*bf16", 2) if dtype == torch.bfloat16 else (fp32, 4)
        splits, N, M = cdiv(S, _KEYS), R * H * Q, Q * A
        whole = splits <= 1
        strides = [stride for rows in (Q, S, M) for stride in (H * rows * K, rows * K, K)]
        partial = 0 if whole else N * (splits + 1) * (4 * K + 8)
        shape = f"{model}, 8 rows, {H} heads of {K}, {Q} queries, {S} shared keys, {A} ancestors"
        cases.append(
            KernelCase.of_launch(
                f"{model} decode_attention split",
                _split_kernel,
                (given, given, given, "*i1", given, given, "*i64", given, None if whole else fp32)
                + (*strides, H, Q, S, M, A, splits, K**-0.5 * _LOG2_E),
                _flags(whole, False, K, "ieee") | _tiles(Q, K, dtype),
                shape=shape,
                bytes=size * K * (N + 2 * R * H * (S + M)) + R * S + 8 * R * Q * A + partial,
                flops=4 * N * K * (S + A),
                dot=dtype == torch.bfloat16,
            )
        )
        if not whole and ("BASE" in model or K == 160):
            cases.append(
                KernelCase.of_launch(
                    f"{model} decode_attention combine",
                    _combine_kernel,
                    (fp32, given, N, H, Q, splits + 1),
                    _combine_tiles(K),
                    shape=shape,
                    bytes=partial + size * N * K,
                    flops=4 * N * K * (splits + 1),
                )
            )
    return cases
