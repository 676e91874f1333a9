"""Layer norm over the last dimension, alone or of a residual sum, with fp32 statistics.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps)
    g = dy * weight,  xhat = (x - mean) * rstd
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat,  dbias = sum of dy

With a residual, `x` above is `total = x + residual`, rounded to its dtype. Autograd saves the statistics, not the
normalised input. A frozen affine costs neither memory nor a reduction. dweight and dbias are summed in a fixed order.
Source: Ba et al., arXiv:1607.06450; pre-norm in the encoder and post-norm in the decoder of Prismer, arXiv:2303.02506.

Compulsory traffic, for R rows of D numbers of s bytes (weights 2 D w bytes, statistics 8 R bytes):
    forward   2 R D s + 2 D w + 8 R;   with a residual 4 R D s + 2 D w + 8 R
    backward  3 R D s + D w + 8 R;     with dtotal 4 R D s + D w + 8 R
A trained affine adds 8 D bytes of partial sums, written and read, for each of P groups of rows, and 2 D w written.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.checks import check_floats, check_like, described
from prismer.kernels.dispatch import NATIVE, TORCH, TRITON, Example, Op, rows_and_width, runs_directly
from prismer.kernels.launch import Constants, Prepared, cdiv, kept, launch, next_power_of_2

_MAX_WIDTH = 65536
_FAST_ON_TORCH = (torch.float32, torch.bfloat16, torch.float16)
# up to so many numbers, torch's own operator in 16 bits is the faster one, since its call costs the host less; with a
# gradient, ours passes through two more functions of Python
_FEW, _FEW_WITH_GRADIENT = 2**16, 2**17


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `layer_norm`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(compute)
    centred = x32 - x32.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition of `add_layer_norm`."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def _host(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> bool:
    """Whether torch's own operator serves the call as well: it keeps the same, and costs the host less."""
    return (
        x.dtype in _FAST_ON_TORCH
        and x.dim() > 0
        and 0 < x.shape[-1] <= _MAX_WIDTH
        and (weight is None) == (bias is None)
        and (weight is None or (weight.dtype == bias.dtype == x.dtype))
    )


def _host_first(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> bool:
    if x.dtype == torch.float32:
        return True
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    return x.numel() <= (_FEW_WITH_GRADIENT if records else _FEW)


def _classify(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[int, ...]:
    """Rows, width, and 1 for a residual sum."""
    return *rows_and_width(x), int(residual is not None)


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    R, D, has_residual = shape
    x, residual = (torch.randn(R, D, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(D, device=device).to(dtype) for _ in range(2))
    if has_residual:
        return add_layer_norm, [x, residual, weight, bias]
    return layer_norm, [x, weight, bias]


OP = Op(
    name="layer_norm",
    reference=layer_norm_reference,
    backends=(NATIVE, TRITON, TORCH),
    vendor=True,
    host=_host,
    host_first=_host_first,
    classify=_classify,
    example=_example,
)


# Triton


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_y,
    p_total,
    p_mean,
    p_rstd,
    R,
    D,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_col = tl.arange(0, BD)
    m_row, m_col = o_row < R, o_col < D
    o, m = o_row[:, None] * D + o_col[None, :], m_row[:, None] & m_col[None, :]
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_x += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
        # normalise the rounded sum, which the next layer and the backward pass see
        b_total = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + o, b_total, mask=m)
        b_x = b_total.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / D
    b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)
    b_y = b_x * b_rstd[:, None]
    if HAS_WEIGHT:
        b_y *= tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)
    if p_mean is not None:
        tl.store(p_mean + o_row, b_mean, mask=m_row)
        tl.store(p_rstd + o_row, b_rstd, mask=m_row)


@triton.jit(do_not_specialize=["R", "blocks"])
def _backward_kernel(
    p_dy,
    p_dtotal,
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_dx,
    p_y,
    p_partial,
    R,
    D,
    blocks,
    HAS_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    STREAM: tl.constexpr,
    STORE_Y: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One program takes `blocks` blocks of rows and writes its partial sums to its own row.

    The sums are those for the AFFINE and of the gradient of the STREAM: dtotal if there is one, else dx. STORE_Y writes
    the output of the forward pass again.
    """
    i_group = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BD)
    m_col = o_col < D
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    if STORE_Y and HAS_BIAS:
        b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros((BD,), tl.float32)
    b_dbias = tl.zeros((BD,), tl.float32)
    b_dstream = tl.zeros((BD,), tl.float32)
    for i in range(blocks):
        o_row = (i_group * blocks + i) * BR + tl.arange(0, BR)
        m_row = o_row < R
        o, m = o_row[:, None] * D + o_col[None, :], m_row[:, None] & m_col[None, :]
        b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + o_row, mask=m_row, other=0.0)
        b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)
        b_xhat = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        b_xhat = tl.where(m, (b_xhat - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_g = b_dy
        if HAS_WEIGHT:
            b_g = b_dy * b_weight
        b_g1 = tl.sum(b_g, 1) / D
        b_g2 = tl.sum(b_g * b_xhat, 1) / D
        b_dx = b_rstd[:, None] * (b_g - b_g1[:, None] - b_xhat * b_g2[:, None])
        if HAS_TOTAL:
            b_dtotal = tl.load(p_dtotal + o, mask=m, other=0.0).to(tl.float32)
            b_dx += b_dtotal
            if STREAM:
                b_dstream += tl.sum(b_dtotal, 0)
        elif STREAM:
            b_dstream += tl.sum(tl.where(m, b_dx, 0.0), 0)
        if STORE_Y:
            b_y = b_xhat
            if HAS_WEIGHT:
                b_y = b_y * b_weight
            if HAS_BIAS:
                b_y += b_bias
            tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        if AFFINE:
            b_dweight += tl.sum(b_dy * b_xhat, 0)
            b_dbias += tl.sum(b_dy, 0)
    o = i_group * D + o_col
    each = tl.num_programs(0).to(tl.int64) * D
    if AFFINE:
        tl.store(p_partial + o, b_dweight, mask=m_col)
        tl.store(p_partial + each + o, b_dbias, mask=m_col)
    if STREAM:
        # behind those for the affine
        tl.store(p_partial + (2 * AFFINE) * each + o, b_dstream, mask=m_col)


@triton.jit(do_not_specialize=["P"])
def _sum_groups_kernel(p_partial, p_sum, p_second, p_third, P, D, BP: tl.constexpr, BD: tl.constexpr):
    """Column sums of (P, D) partial sums, in a fixed order; programs 1 and 2 of the second axis sum the next (P, D)."""
    p_partial += tl.program_id(1).to(tl.int64) * P * D
    o_col = tl.program_id(0) * BD + tl.arange(0, BD)
    b_sum = tl.zeros((BP, BD), tl.float32)
    for i in range(0, P, BP):
        o_group = i + tl.arange(0, BP)
        m = (o_group < P)[:, None] & (o_col < D)[None, :]
        b_sum += tl.load(p_partial + o_group[:, None] * D + o_col[None, :], mask=m, other=0.0)
    b_total = tl.sum(b_sum, 0)
    if tl.program_id(1) == 0:
        tl.store(p_sum + o_col, b_total.to(p_sum.dtype.element_ty), mask=o_col < D)
    if p_second is not None:
        if tl.program_id(1) == 1:
            tl.store(p_second + o_col, b_total.to(p_second.dtype.element_ty), mask=o_col < D)
    if p_third is not None:
        if tl.program_id(1) == 2:
            tl.store(p_third + o_col, b_total.to(p_third.dtype.element_ty), mask=o_col < D)


@functools.cache
def _tiles(D: int, backward: bool = False) -> dict[str, int]:
    """Rows of a block, and warps: one for every 256 numbers, so that each lane holds two 128-bit vectors of bf16.

    The backward pass takes twice as many rows: while a group sums one block, loads of the next ones are on their way.
    """
    BD = next_power_of_2(max(D, 16))
    return dict(BR=max(1, (2048 if backward else 1024) // BD), BD=BD, num_warps=min(max(BD // 256, 4), 16))


# row groups of a trained norm: four programs for each multiprocessor of an H100, and partial sums that stay in its L2
_MOST_GROUPS = 512
# 64 groups at a time, so that the sum of 512 waits for memory 8 times
_SUM_TILES = dict(BP=64, BD=32, num_warps=8)


def _groups(R: int, BR: int, most: int = _MOST_GROUPS) -> tuple[int, int]:
    """Row groups P, at most `most`, and row blocks of each: from R alone, so that sums are the same anywhere."""
    blocks = cdiv(R, BR)
    each = cdiv(blocks, most)
    return cdiv(blocks, each), each


def sum_groups(partial: Tensor, total: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> None:
    """Column sums of (P, D) partial sums in fp32, in a fixed order, into `total`; of (3, P, D) into the others too."""
    P, D = partial.shape[-2:]
    grid = cdiv(D, _SUM_TILES["BD"]), 1 + (second is not None) + (third is not None)
    launch(_sum_groups_kernel, grid, (partial, total, second, third), (P, D), _SUM_TILES)


@functools.lru_cache(maxsize=1024)
def _constants(D: int, residual: bool, weight: bool, bias: bool) -> Constants:
    """Of the forward pass."""
    return kept(HAS_RESIDUAL=residual, HAS_WEIGHT=weight, HAS_BIAS=bias, **_tiles(D))


def _forward_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, total = x.contiguous(), None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x)
    # allocations are a good part of what a short op costs the host: these are the cheapest forms
    R, D = x.shape
    y = torch.empty_like(x)
    mean, rstd = x.new_empty(R, dtype=torch.float32), x.new_empty(R, dtype=torch.float32)
    if R:
        constants = _constants(D, residual is not None, weight is not None, bias is not None)
        pointers = x, residual, weight, bias, y, total, mean, rstd
        launch(_forward_kernel, (cdiv(R, constants["BR"]),), pointers, (R, D, float(eps)), constants)
    return y, total, mean, rstd


def _backward_triton(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    stream: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Fill `outputs`: dx, dweight and dbias; the last two are empty if the affine needs no gradient.

    Fill `stream` with the column sums of dtotal, or of dx without it, and `y` with the output of the forward pass.
    """
    R, D = x.shape
    dx, *affine = outputs
    sums = [t for t in (*affine, stream) if t is not None and t.numel()]
    tiles = _tiles(D, backward=True)
    # without sums over rows every block is a program of its own
    P, blocks = _groups(R, tiles["BR"]) if sums else (cdiv(R, tiles["BR"]), 1)
    partial = torch.empty(len(sums), P, D, dtype=torch.float32, device=x.device) if sums else None
    given = _given(dtotal, weight, bias, len(sums) > 1, stream, y)
    pointers = dy, dtotal, x, weight, bias, mean, rstd, dx, y, partial
    launch(_backward_kernel, (P,), pointers, (R, D, blocks), given | tiles)
    if sums:
        sum_groups(partial, *sums)


def _given(dtotal: Any, weight: Any, bias: Any, affine: bool, stream: Any, y: Any) -> dict[str, bool]:
    """The flags of the backward pass, from arguments that are tensors or None."""
    flags = dict(HAS_TOTAL=dtotal is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None)
    return flags | dict(AFFINE=affine, STREAM=stream is not None, STORE_Y=y is not None)


def prepare_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable:
    """What runs `layer_norm` or `add_layer_norm` on Triton for tensors like these, contiguous and not empty.

    Without a residual it is a function of x, weight and bias.
    """
    D = x.shape[-1]
    R = x.numel() // D
    constants = _constants(D, residual is not None, weight is not None, bias is not None)
    run = Prepared(_forward_kernel, (cdiv(R, constants["BR"]),), (R, D, float(eps)), constants)

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = torch.empty_like(x)
        # without a gradient nobody reads the statistics
        run(x, None, weight, bias, y, None, None, None)
        return y

    def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y, total = torch.empty_like(x), torch.empty_like(x)
        run(x, residual, weight, bias, y, total, None, None)
        return y, total

    return normalise if residual is None else add_and_norm


# torch


def _aten_serves(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> bool:
    """Whether torch's own operator gives fp32 statistics; it does not in 16 bits on a CPU, nor for mixed dtypes."""
    wide = x.dtype in (torch.float32, torch.float64) or x.device.type == "cuda"
    return wide and all(t is None or t.dtype == x.dtype for t in (weight, bias))


def _forward_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x = x.contiguous()
    compute = torch.promote_types(x.dtype, torch.float32)
    total = None if residual is None else x + residual.contiguous()
    if _aten_serves(x, weight, bias):
        y, mean, rstd = torch.native_layer_norm(x if total is None else total, x.shape[1:], weight, bias, eps)
        return y, total, mean.view(-1), rstd.view(-1)
    x32 = (x if total is None else total).to(compute)
    mean = x32.mean(1)
    centred = x32 - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    y = centred.mul_(rstd[:, None])
    if weight is not None:
        y *= weight
    if bias is not None:
        y += bias
    return y.to(x.dtype), total, mean, rstd


def _backward_torch(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    compute = mean.dtype
    if _aten_serves(x, weight):
        mask = [True, affine, affine]
        column = mean[:, None], rstd[:, None]
        # the sums of a norm without a weight need one that changes nothing
        gamma = x.new_ones(x.shape[1]) if affine and weight is None else weight
        grads = torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[1:], *column, gamma, gamma, mask)
        dx, dweight, dbias = (mean.new_empty(0) if g is None else g for g in grads)
        return dx if dtotal is None else dx.add_(dtotal), dweight, dbias
    xhat = (x.to(compute) - mean[:, None]) * rstd[:, None]
    dy32 = dy.to(compute)
    if affine:
        dweight, dbias = (dy32 * xhat).sum(0), dy32.sum(0)
    else:
        dweight, dbias = mean.new_empty(0), mean.new_empty(0)
    g = dy32 if weight is None else dy32 * weight
    dx = g - g.mean(1)[:, None] - xhat * (g * xhat).mean(1)[:, None]
    dx *= rstd[:, None]
    if dtotal is not None:
        dx += dtotal
    return dx.to(x.dtype), dweight, dbias


# native


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = None if residual is None else residual.contiguous()
    return torch.ops.prismer_native.layer_norm(x.contiguous(), residual, weight, bias, eps)


# by backend: rows (R, D) -> the normalised rows, the sum (None or empty without a residual), mean and rstd
FORWARD: dict[str, Callable] = {"native": _forward_native, "triton": _forward_triton, "torch": _forward_torch}

# the registered ops


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = FORWARD[OP.choose(x, None, None, residual)](x, residual, weight, bias, eps)
    return y, x.new_empty(0) if total is None else total, mean, rstd


def _forward_fake(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[0], dtype=compute) for _ in range(2))
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, mean, rstd


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    backend = OP.choose(x, None, None, dtotal, gradient=True)
    if backend == "triton":
        outputs = _backward_fake(x, weight, mean, affine)
        if x.shape[0]:
            _backward_triton(dy, dtotal, x, weight, mean, rstd, outputs)
            return outputs
        return outputs[0], outputs[1].zero_(), outputs[2].zero_()
    if backend == "torch":
        dx, *sums = _backward_torch(dy, dtotal, x, weight, mean, rstd, affine)
    else:
        dx, *sums = torch.ops.prismer_native.layer_norm_backward(dy, dtotal, x, weight, mean, rstd, affine)
    # rounded once, here
    dtype = x.dtype if weight is None else weight.dtype
    return dx, *(part.to(dtype) for part in sums)


def backward_in_one_pass(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    affine: bool,
    stream: torch.dtype | None,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The backward pass for an op around a norm, which needs more of the same numbers; contiguous arguments.

    Returns:
        dx, dweight and dbias as the op returns them; the column sums of dtotal, or of dx without it, in the dtype
        `stream`; and the output of the forward pass if it is needed `again`. The last two are None if they are not
        asked for, or if the backend does not make them in the same pass.
    """
    if not x.shape[0] or OP.choose(x) != "triton":
        return *layer_norm_backward_op(dy, dtotal, x, weight, mean, rstd, affine), None, None
    outputs = _backward_fake(x, weight, mean, affine)
    sums = None if stream is None else x.new_empty(x.shape[1], dtype=stream)
    y = torch.empty_like(x) if again else None
    # the bias is read for the output alone
    _backward_triton(dy, dtotal, x, weight, mean, rstd, outputs, bias if again else None, sums, y)
    return *outputs, sums, y


def _backward_fake(x: Tensor, weight: Tensor | None, mean: Tensor, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if weight is None else weight.dtype
    dweight, dbias = (mean.new_empty(x.shape[1] if affine else 0, dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), dweight, dbias


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(*((total, mean, rstd) if residual is None else (mean, rstd)))
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)


def _autograd(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        # only the sum was used: its gradient passes through
        return dtotal, dtotal
    needs = ctx.needs_input_grad
    dx, dweight, dbias = layer_norm_backward_op(dy, dtotal, *ctx.saved_tensors, needs[2] or needs[3])
    return dx, dx, dweight, dbias.to(ctx.bias_dtype) if needs[3] else None


layer_norm_op = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
layer_norm_backward_op = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public functions


def _plan(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Callable:
    """What runs `add_layer_norm` on x, residual, weight and bias, or without a residual `layer_norm` on the others."""
    _check(x, residual, weight, bias)
    route = OP.route(x, weight, bias, residual)
    if route == "reference":
        return functools.partial(layer_norm_reference if residual is None else add_layer_norm_reference, eps=eps)
    if route == "host":
        return _plan_on_torch(x.shape[-1:], residual is not None, eps)
    forward: Callable = layer_norm_op
    if runs_directly(x, residual, weight, bias):
        backend = OP.choose(x, None, None, residual)
        dense = x.is_contiguous() and (residual is None or residual.is_contiguous())
        if backend == "triton" and x.numel() and dense:
            return prepare_norm(x, residual, weight, bias, eps)
        forward = FORWARD[backend]
    rows, shape = (-1, x.shape[-1]), x.shape
    if residual is None:
        return lambda x, weight, bias: forward(x.reshape(rows), None, weight, bias, eps)[0].view(shape)

    def add_and_norm(x: Tensor, residual: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor]:
        y, total, _, _ = forward(x.reshape(rows), residual.reshape(rows), *affine, eps)
        return y.view(shape), total.view(shape)

    return add_and_norm


def plan_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Callable:
    """What runs `layer_norm` on x, weight and bias."""
    return _plan(x, None, weight, bias, eps)


def _plan_on_torch(width: torch.Size, has_residual: bool, eps: float) -> Callable:
    # not F.layer_norm, which asks for a setting of cuDNN that the operator ignores
    if not has_residual:
        return lambda x, weight, bias: torch.layer_norm(x, width, weight, bias, eps)

    def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return torch.layer_norm(total, width, weight, bias, eps), total

    return add_and_norm


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() < 1 or not 1 <= x.shape[-1] <= _MAX_WIDTH:
        raise ValueError(f"x is {described(x)}; pass floats of shape (..., D), D from 1 to {_MAX_WIDTH}")
    check_floats("weight", weight, x.shape[-1:])
    check_floats("bias", bias, x.shape[-1:])
    check_like("residual", residual, x.shape, "x", x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of `x`, with fp32 statistics.

    Args:
        x: (..., D), fp32, bf16, fp16 or float64.
        weight, bias: (D,), any floating dtype, or None for 1 and 0.
        eps: added to the variance, not to its root.

    Returns:
        (..., D) in the dtype of `x`.

    Raises:
        ValueError: if a shape or dtype does not fit, or D exceeds 65536.
    """
    return OP.resolve(plan_norm, (x, weight, bias), eps)(x, weight, bias)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add, then normalise, in one pass: the end of one sub-layer and the beginning of the next.

    Args:
        x, residual: (..., D), of one dtype.
        weight, bias, eps: as in `layer_norm`.

    Returns:
        The normalised sum and the sum, both (..., D). A pre-norm block adds to the sum, a post-norm block drops it.

    Raises:
        ValueError: if a shape or dtype does not fit, or D exceeds 65536.
    """
    return OP.resolve(_plan, (x, residual, weight, bias), eps)(x, residual, weight, bias)


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: BASE and LARGE at 480 px, 8 images."""
    cases = []
    bf16, fp32 = "*bf16", "*fp32"
    for model, R, D in (("BASE", 8 * 964, 768), ("LARGE", 8 * 1220, 1024)):
        tiles, backward = _tiles(D), _tiles(D, backward=True)
        P, blocks = _groups(R, backward["BR"])
        rows = bf16, bf16, bf16, bf16, bf16, fp32, fp32, bf16
        case = functools.partial(KernelCase.of_launch, shape=f"{model} 480 px, 8 images, {R} x {D}")
        cases += [
            case(
                f"{model} layer_norm add forward",
                _forward_kernel,
                (bf16, bf16, bf16, bf16, bf16, bf16, fp32, fp32, R, D, 1e-5),
                dict(HAS_RESIDUAL=True, HAS_WEIGHT=True, HAS_BIAS=True, **tiles),
                bytes=4 * R * D * 2 + 2 * D * 2 + 8 * R,
                flops=9 * R * D,
            ),
            case(
                f"{model} layer_norm add forward, without statistics",
                _forward_kernel,
                (bf16, bf16, bf16, bf16, bf16, bf16, None, None, R, D, 1e-5),
                dict(HAS_RESIDUAL=True, HAS_WEIGHT=True, HAS_BIAS=True, **tiles),
                bytes=4 * R * D * 2 + 2 * D * 2,
                flops=9 * R * D,
            ),
            case(
                f"{model} layer_norm forward, without statistics",
                _forward_kernel,
                (bf16, None, bf16, bf16, bf16, None, None, None, R, D, 1e-5),
                dict(HAS_RESIDUAL=False, HAS_WEIGHT=True, HAS_BIAS=True, **tiles),
                bytes=2 * R * D * 2 + 2 * D * 2,
                flops=8 * R * D,
            ),
            case(
                f"{model} layer_norm of the resampler's inputs, without statistics",
                _forward_kernel,
                (bf16, None, None, None, bf16, None, None, None, R, D, 1e-5),
                dict(HAS_RESIDUAL=False, HAS_WEIGHT=False, HAS_BIAS=False, **tiles),
                bytes=2 * R * D * 2,
                flops=6 * R * D,
            ),
            case(
                f"{model} layer_norm backward, all sums and output",
                _backward_kernel,
                (*rows, bf16, fp32, R, D, blocks),
                _given(bf16, bf16, bf16, True, bf16, bf16) | backward,
                bytes=5 * R * D * 2 + 2 * D * 2 + 8 * R + 12 * P * D,
                flops=21 * R * D,
            ),
            case(
                f"{model} layer_norm backward, frozen",
                _backward_kernel,
                (*rows[:4], None, *rows[5:], None, None, R, D, 1),
                _given(bf16, bf16, None, False, None, None) | backward,
                bytes=4 * R * D * 2 + D * 2 + 8 * R,
                flops=14 * R * D,
            ),
            case(
                f"{model} layer_norm affine sums",
                _sum_groups_kernel,
                (fp32, bf16, bf16, bf16, P, D),
                _SUM_TILES,
                bytes=12 * P * D + 6 * D,
                flops=3 * P * D,
                vector_loads=False,
            ),
        ]
    return cases
