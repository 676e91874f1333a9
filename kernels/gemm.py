"""Matrix products with prologue and epilogue, the building block of `mlp` and `adaptor`; this file registers no op.

    gemm              c = act(A W^T + bias) + residual,  and h = A W^T if `keep`
    gemm_derivative   dh = (dy W) act'(u),  u = h + bias,  and act(u) and the column sums of dh if asked for
    gemm_gradient     dW = dy^T A
`gemm` and `gemm_gradient` can square A as they load it.

Accumulation and epilogue are in fp32. fp32 inputs are multiplied as torch is set to. The order of summation
depends on K alone, so a row is the same in any batch. Programs take the tiles of C in groups of eight rows of tiles, so
that the parts of A and B that they share stay in the L2 cache.

Cost of (M, K) times (K, N) in s bytes, tiles BM x BN x BK:
    FLOPs     2 M N K; issued 2 ceil(M / BM) BM ceil(N / BN) BN ceil(K / BK) BK
    bytes     (M K + K N + M N) s compulsory; issued (M K ceil(N / BN) + K N ceil(M / BM) + M N) s
Add M N s for h read or written and for the residual read, and 2 M N s for act(u), which reads h again. For each row of
tiles, add N w for a bias of w bytes each, and 4 N for partial column sums, which are then read once, with 4 N written.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.activation import (
    activated,
    bias_activation_backward_op,
    bias_activation_op,
    derivative,
)
from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.launch import Constants, Prepared, cdiv, input_precision, kept, launch
from prismer.kernels.layer_norm import sum_groups

_GROUP = 8

# Triton


@triton.jit(do_not_specialize=["M", "K"])
def _gemm_kernel(
    p_a,
    p_b,
    p_bias,
    p_h,
    p_residual,
    p_c,
    p_activated,
    p_sums,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    STORE_ACTIVATED: tl.constexpr,
    SUMS: tl.constexpr,
    SQUARE_A: tl.constexpr,
    SQUARE_B: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of C; C, h, residual and activation are contiguous (M, N).

    EVEN_M and EVEN_K: that size is a multiple of 16, and the dimension is contiguous in an operand, whose loads can be
    vectors then. Either size can be a number of rows, which should not multiply variants where it makes no difference.
    """
    if EVEN_M:
        M = M // 16 * 16
    if EVEN_K:
        K = K // 16 * 16
    num_m, num_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i = tl.program_id(0)
    first = i // (GROUP * num_n) * GROUP
    rows = min(num_m - first, GROUP)
    i_m = first + i % (GROUP * num_n) % rows
    i_n = i % (GROUP * num_n) // rows
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    p_a += o_m[:, None] * stride_am + o_k.to(tl.int64)[None, :] * stride_ak
    p_b += o_k.to(tl.int64)[:, None] * stride_bk + o_n[None, :] * stride_bn

    b_c = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        m_k = o_k < K - k
        b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if SQUARE_A:
            b_a = b_a * b_a
        if SQUARE_B:
            b_b = b_b * b_b
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
        p_a += BK * stride_ak
        p_b += BK * stride_bk

    o, m = o_m[:, None] * N + o_n[None, :], m_m[:, None] & m_n[None, :]
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if DERIVATIVE:
        b_u = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_u += b_bias
        b_c *= derivative(b_u, ACTIVATION)
    else:
        if KEEP:
            tl.store(p_h + o, b_c.to(p_h.dtype.element_ty), mask=m)
        if HAS_BIAS:
            b_c += b_bias
        b_c = activated(b_c, ACTIVATION)
        if HAS_RESIDUAL:
            b_c += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
    if SUMS:
        # rows past the end are zero, since those of A are
        tl.store(p_sums + i_m.to(tl.int64) * N + o_n, tl.sum(b_c, 0).to(p_sums.dtype.element_ty), mask=m_n)
    tl.store(p_c + o, b_c.to(p_c.dtype.element_ty), mask=m)
    if STORE_ACTIVATED:
        # read h again, from the cache: holding it beside dh would spill registers
        b_u = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_u += b_bias
        tl.store(p_activated + o, activated(b_u, ACTIVATION).to(p_activated.dtype.element_ty), mask=m)


@functools.lru_cache(maxsize=1024)
def _tiles(M: int, N: int, dtype: torch.dtype, activated: bool = False) -> dict[str, int]:
    """Tile shapes. BK, which sets the order of summation, depends on the dtype alone.

    Eight warps leave an accumulator 32 or 64 registers a thread, so that no epilogue spills on any architecture.
    """
    if dtype == torch.float32:
        return dict(BM=64, BN=64, BK=32, num_warps=4, num_stages=3)
    # few large tiles would leave most of an H100 idle: four times as many small ones do not
    if cdiv(M, 128) * cdiv(N, 128) < 96:
        return dict(BM=64, BN=64, BK=64, num_warps=8, num_stages=4)
    # 64 registers for the accumulator would leave no room for two results of the epilogue
    return dict(BM=128, BN=64 if activated else 128, BK=64, num_warps=8, num_stages=3)


def _flags(
    given: tuple[bool, ...],
    numbers: tuple[int, ...],
    precision: str,
    activation: str,
    differentiate: bool,
    square_a: bool,
    square_b: bool,
) -> dict[str, Any]:
    """The constants of a launch beside its tiles; `given`: are there bias, h, residual, activation and sums?"""
    M, _, K, stride_am, stride_ak, stride_bk, _ = numbers
    bias, h, residual, activated, sums = given
    return dict(
        HAS_BIAS=bias,
        ACTIVATION=activation,
        KEEP=h and not differentiate,
        HAS_RESIDUAL=residual,
        DERIVATIVE=differentiate,
        STORE_ACTIVATED=activated,
        SUMS=sums,
        SQUARE_A=square_a,
        SQUARE_B=square_b,
        EVEN_M=stride_am == 1 and M % 16 == 0,
        EVEN_K=1 in (stride_ak, stride_bk) and K % 16 == 0,
        PRECISION=precision,
        GROUP=_GROUP,
    )


def _launch(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    h: Tensor | None = None,
    residual: Tensor | None = None,
    differentiate: bool = False,
    activated: Tensor | None = None,
    sums: torch.dtype | None = None,
    square_a: bool = False,
    square_b: bool = False,
    a_transposed: bool = False,
    b_transposed: bool = False,
) -> Tensor | None:
    """Run the kernel on `a` (M, K) and `b` (K, N), or on their transposes; returns the column sums if asked for."""
    M, N = a.shape[a_transposed], b.shape[not b_transposed]
    if not M or not N:
        return a.new_zeros(N, dtype=sums) if sums else None
    num_m, grid, numbers, constants = _settings(
        (*a.shape, *a.stride(), *b.shape, *b.stride()),
        a_transposed,
        b_transposed,
        (bias is not None, h is not None, residual is not None, activated is not None, sums is not None),
        a.dtype,
        activation,
        differentiate,
        square_a,
        square_b,
        input_precision(a.dtype),
    )
    total = partial = None if sums is None else a.new_empty(N, dtype=sums)
    # one row of tiles writes the total itself
    if sums is not None and num_m > 1:
        partial = torch.empty(num_m, N, dtype=torch.float32, device=a.device)
    launch(_gemm_kernel, grid, (a, b, bias, h, residual, c, activated, partial), numbers, constants)
    if partial is not total:
        sum_groups(partial, total)
    return total


@functools.lru_cache(maxsize=4096)
def _settings(
    sizes: tuple[int, ...],
    a_transposed: bool,
    b_transposed: bool,
    given: tuple[bool, ...],
    dtype: torch.dtype,
    activation: str,
    differentiate: bool,
    square_a: bool,
    square_b: bool,
    precision: str,
) -> tuple[int, tuple[int], tuple[int, ...], Constants]:
    """Rows of tiles, grid, numbers and constants of a launch, from shapes and strides of both factors."""
    a_shape, a_strides, b_shape, b_strides = (sizes[i : i + 2] for i in (0, 2, 4, 6))
    if a_transposed:
        a_shape, a_strides = a_shape[::-1], a_strides[::-1]
    if b_transposed:
        b_shape, b_strides = b_shape[::-1], b_strides[::-1]
    (M, K), N = a_shape, b_shape[1]
    numbers = M, N, K, *a_strides, *b_strides
    tiles = _tiles(M, N, dtype, given[3])
    num_m = cdiv(M, tiles["BM"])
    flags = _flags(given, numbers, precision, activation, differentiate, square_a, square_b)
    return num_m, (num_m * cdiv(N, tiles["BN"]),), numbers, kept(**flags, **tiles)


# for ops that consist of products: `backend` is "triton", or "torch" for torch's operators


def gemm(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    backend: str,
    activation: str = "none",
    keep: bool = False,
    residual: Tensor | None = None,
    square: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """act(a weight^T + bias) + residual, and the product alone (None unless `keep`).

    Args:
        a: (R, K), contiguous.
        weight: (N, K), as in `nn.Linear`, of the dtype of `a`.
        bias: (N,), any floating dtype, or None.
        backend: "triton" or "torch".
        activation: one of `activation.ACTIVATIONS`, "relu" or "none".
        residual: (R, N), contiguous.
        square: multiply a^2 instead, rounded to the dtype of `a`.
    """
    if backend == "triton":
        c = a.new_empty((a.shape[0], weight.shape[0]))
        h = torch.empty_like(c) if keep else None
        _launch(
            a, weight, c, bias=bias, activation=activation, h=h, residual=residual, square_a=square, b_transposed=True
        )
        return c, h
    h = None
    if square:
        a = a.square()
    if activation not in ("none", "relu"):
        h = matmul.linear(a, weight)
        c = bias_activation_op(h, bias, activation)
    else:
        if bias is None or bias.dtype == a.dtype:
            c = matmul.linear(a, weight, bias)
        else:
            c = matmul.linear(a, weight).add_(bias)
        if activation == "relu":
            c.relu_()
    if residual is not None:
        c += residual
    return c, h if keep else None


def prepare_gemm(
    shape: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    residual: bool = False,
    square: bool = False,
) -> Callable[..., Tensor]:
    """What computes act(a weight^T + bias) + residual on Triton, for tensors like these, none of them empty.

    Args:
        shape: of a contiguous `a` (..., K), and of the result but for its last dimension.
        weight, bias: as in `gemm`.
        activation, square: as in `gemm`.
        residual: there is one.

    Returns:
        A function of a, weight, bias and residual.
    """
    N, K = weight.shape
    sizes = math.prod(shape[:-1]), K, K, 1, N, K, *weight.stride()
    given, dtype = (bias is not None, False, residual, False, False), weight.dtype
    precision = input_precision(dtype)
    _, *launched = _settings(sizes, False, True, given, dtype, activation, False, square, False, precision)
    run, result = Prepared(_gemm_kernel, *launched), (*shape[:-1], N)

    def product(a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        # sizes one by one take two thirds of the time of a tuple
        c = a.new_empty(*result)
        run(a, weight, bias, None, residual, c, None, None)
        return c

    return product


def gemm_derivative(
    dy: Tensor,
    weight: Tensor,
    h: Tensor,
    bias: Tensor | None,
    *,
    backend: str,
    activation: str,
    activated: bool = False,
    sums: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh = (dy weight) act'(h + bias), act(h + bias) if `activated`, and the column sums of dh if `sums`, else empty.

    Args:
        dy: (R, N), contiguous.
        weight: (N, K), as in `nn.Linear`.
        h: (R, K), contiguous; bias: (K,) or None.
        sums: the dtype for the sums, which are computed in fp32.
    """
    if backend == "triton":
        dh = torch.empty_like(h)
        a = torch.empty_like(h) if activated else None
        dbias = _launch(
            dy, weight, dh, bias=bias, activation=activation, h=h, differentiate=True, activated=a, sums=sums
        )
        return dh, a if activated else dy.new_empty(0), dbias if sums else dy.new_empty(0)
    empty = dy.new_empty(0)
    dh, dbias = bias_activation_backward_op(matmul.mm(dy, weight), h, bias, activation, sums is not None)
    a = bias_activation_op(h, bias, activation) if activated else empty
    return dh, a, dbias.to(sums) if sums else empty


def gemm_gradient(dy: Tensor, a: Tensor, *, backend: str, square: bool = False) -> Tensor:
    """dy^T a, the gradient of a weight (N, K), in the dtype of `dy`; a^2 instead of a if `square`.

    Args:
        dy: (R, N), contiguous.
        a: (R, K), contiguous.
    """
    if backend == "triton":
        dweight = dy.new_empty((dy.shape[1], a.shape[1]))
        _launch(dy, a, dweight, a_transposed=True, square_b=square)
        return dweight
    return matmul.mm(dy.T, a.square() if square else a)


def gemm_case(
    name: str,
    M: int,
    N: int,
    K: int,
    *,
    shape: str,
    a_transposed: bool = False,
    b_transposed: bool = False,
    bias: bool = False,
    activation: str = "none",
    keep: bool = False,
    residual: bool = False,
    differentiate: bool = False,
    activated: bool = False,
    sums: bool = False,
    square_a: bool = False,
    square_b: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> KernelCase:
    """The case that `_launch` would run; a transposed operand has its columns contiguous."""
    tiles, s = _tiles(M, N, dtype, activated), dtype.itemsize
    given = bias, keep or differentiate, residual, activated, sums
    kind = "*bf16" if s == 2 else "*fp32"
    kinds = [kind if is_given else None for is_given in given[:4]]
    pointers = kind, kind, *kinds[:3], kind, kinds[3], "*fp32" if sums else None
    numbers = M, N, K, *((1, M) if a_transposed else (K, 1)), *((1, K) if b_transposed else (N, 1))
    extra = sum((keep or differentiate, residual, activated))
    return KernelCase.of_launch(
        name,
        _gemm_kernel,
        (*pointers, *numbers),
        _flags(given, numbers, input_precision(dtype), activation, differentiate, square_a, square_b) | tiles,
        shape=shape,
        dot=s == 2,
        flops=2 * M * N * K,
        bytes=s * (M * K + K * N + (1 + extra) * M * N + N * bias) + 4 * N * cdiv(M, tiles["BM"]) * sums,
    )


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time beside the products of `mlp` and `adaptor`: fp32, which has no tensor cores."""
    R, D, E = 8 * 260, 768, 3072
    shape = f"BASE 224 px, 8 images, {R} x {D} x {E}, fp32"
    fp32 = dict(shape=shape, dtype=torch.float32, bias=True, activation="quick_gelu")
    return [
        gemm_case("fp32 fc quick_gelu", R, E, D, b_transposed=True, keep=True, **fp32),
        gemm_case("fp32 dh", R, E, D, differentiate=True, activated=True, sums=True, **fp32),
    ]
