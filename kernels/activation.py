"""Bias and activation in one pass, with the formulas that the matrix products share.

    quick_gelu(u) = u sigmoid(1.702 u)            derivative  s + 1.702 u s (1 - s),  s = sigmoid(1.702 u)
    gelu(u) = u Phi(u), exact, by erf             derivative  Phi(u) + u phi(u)
    squared_relu(u) = relu(u)^2                   derivative  2 relu(u)
    y = act(u),  u = h + bias,   dh = dy act'(u),  dbias = sum over rows of dh

u is computed in fp32 and never rounded. Autograd saves `h` and the bias, which is a parameter.
Sources: CLIP, arXiv:2103.00020 (quick_gelu); Hendrycks and Gimpel, arXiv:1606.08415; So et al., arXiv:2109.08668.

Traffic, issued, for R rows of D numbers of s bytes, a bias of w bytes each, blocks of BR rows in P groups:
    forward   2 R D s + ceil(R / BR) D w
    backward  3 R D s + P D w, and for a trained bias 4 P D bytes of partial sums, written and read, and the sums
              written; up to 512 rows P is 1, and the sums are written at once
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.checks import check_floats, described
from prismer.kernels.dispatch import TORCH, TRITON, Backend, Example, Op, rows_and_width, runs_directly
from prismer.kernels.launch import Constants, cdiv, kept, launch, next_power_of_2
from prismer.kernels.layer_norm import _groups, sum_groups

# `_classify` uses the places, which the tables of measured choices keep: append only
ACTIVATIONS = ("quick_gelu", "gelu", "squared_relu", "gelu_tanh")


def bias_activation_reference(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `bias_activation`."""
    compute = torch.promote_types(h.dtype, torch.float32)
    u = h.to(compute)
    if bias is not None:
        u = u + bias.to(compute)
    if activation == "quick_gelu":
        y = u * torch.sigmoid(1.702 * u)
    elif activation == "gelu":
        y = 0.5 * u * (1 + torch.erf(u * 0.5**0.5))
    elif activation == "gelu_tanh":
        y = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    else:
        y = F.relu(u).square()
    return y.to(h.dtype)


def _classify(h: Tensor, activation: str) -> tuple[int, ...]:
    """Rows, width, and the number of the activation."""
    return *rows_and_width(h), ACTIVATIONS.index(activation)


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    R, D, activation = shape
    h, bias = torch.randn(R, D, device=device).to(dtype), torch.randn(D, device=device).to(dtype)
    return bias_activation, [h.requires_grad_(), bias, ACTIVATIONS[activation]]


NATIVE = Backend(name="native", devices=("cpu",), float64=False)
OP = Op(
    name="bias_activation",
    reference=bias_activation_reference,
    backends=(NATIVE, TRITON, TORCH),
    classify=_classify,
    example=_example,
)


# Triton


@triton.jit
def activated(b_u, ACTIVATION: tl.constexpr):
    """act(u) of an fp32 block; the adaptor uses "relu", and a product without an activation uses "none"."""
    if ACTIVATION == "quick_gelu":
        b_y = b_u * tl.sigmoid(1.702 * b_u)
    elif ACTIVATION == "gelu":
        b_y = 0.5 * b_u * (1.0 + tl.erf(b_u * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(z) is 2 sigmoid(2 z), which does not cancel
        b_y = b_u * tl.sigmoid(b_u * (1.5957691216057308 + 0.07135481282640866 * b_u * b_u))
    elif ACTIVATION == "squared_relu":
        # a maximum would turn NaN into 0
        b_r = tl.where(b_u < 0, 0.0, b_u)
        b_y = b_r * b_r
    elif ACTIVATION == "relu":
        b_y = tl.where(b_u < 0, 0.0, b_u)
    else:
        tl.static_assert(ACTIVATION == "none")
        b_y = b_u
    return b_y


@triton.jit
def derivative(b_u, ACTIVATION: tl.constexpr):
    """act'(u) of an fp32 block."""
    if ACTIVATION == "quick_gelu":
        b_s = tl.sigmoid(1.702 * b_u)
        b_d = b_s + 1.702 * b_u * b_s * (1.0 - b_s)
    elif ACTIVATION == "gelu":
        b_phi = 0.3989422804014327 * tl.exp(-0.5 * b_u * b_u)
        b_d = 0.5 * (1.0 + tl.erf(b_u * 0.7071067811865476)) + b_u * b_phi
    elif ACTIVATION == "gelu_tanh":
        # beyond 10 the derivative is 0 or 1; a power of an infinity would give NaN
        b_n = tl.where(b_u < -10.0, -10.0, tl.where(b_u > 10.0, 10.0, b_u))
        b_s = tl.sigmoid(b_n * (1.5957691216057308 + 0.07135481282640866 * b_n * b_n))
        b_d = b_s + b_n * b_s * (1.0 - b_s) * (1.5957691216057308 + 0.21406443847922598 * b_n * b_n)
    else:
        tl.static_assert(ACTIVATION == "squared_relu")
        b_d = 2.0 * tl.where(b_u < 0, 0.0, b_u)
    return b_d


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    p_h, p_bias, p_y, R, D, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_col = tl.program_id(1) * BD + tl.arange(0, BD)
    m_col = o_col < D
    o, m = o_row[:, None] * D + o_col[None, :], (o_row < R)[:, None] & m_col[None, :]
    b_u = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_u += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o, activated(b_u, ACTIVATION).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["R", "blocks"])
def _backward_kernel(
    p_dy,
    p_h,
    p_bias,
    p_dh,
    p_dbias,
    R,
    D,
    blocks,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One program takes `blocks` blocks of rows and writes its partial column sums; "none" only sums dy."""
    i_group = tl.program_id(0).to(tl.int64)
    o_col = tl.program_id(1) * BD + tl.arange(0, BD)
    m_col = o_col < D
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    b_dbias = tl.zeros((BD,), tl.float32)
    for i in range(blocks):
        o_row = (i_group * blocks + i) * BR + tl.arange(0, BR)
        o, m = o_row[:, None] * D + o_col[None, :], (o_row < R)[:, None] & m_col[None, :]
        b_dh = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            b_u = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
            if HAS_BIAS:
                b_u += b_bias
            b_dh *= derivative(b_u, ACTIVATION)
            tl.store(p_dh + o, b_dh.to(p_dh.dtype.element_ty), mask=m)
        if SUMS:
            b_dbias += tl.sum(b_dh, 0)
    if SUMS:
        tl.store(p_dbias + i_group * D + o_col, b_dbias.to(p_dbias.dtype.element_ty), mask=m_col)


# row groups of the backward pass, each for 256 columns
_MOST_GROUPS = 256
# up to here one program takes all rows of its columns: 8 blocks one after another, the rows of eight images' latents
_FEW_ROWS = 512


@functools.cache
def _tiles(D: int) -> dict[str, int]:
    """2048 numbers a block: two 128-bit vectors of bf16 for each lane of four warps."""
    BD = min(next_power_of_2(max(D, 16)), 256)
    return dict(BR=2048 // BD, BD=BD, num_warps=4)


@functools.lru_cache(maxsize=1024)
def _backward_plan(R: int, D: int, sums: bool) -> tuple[dict[str, int], int, int]:
    """Tiles, row groups P and blocks of rows of each group, from the shape alone."""
    if sums and R <= _FEW_ROWS:
        # one launch in place of two: narrow blocks of columns keep enough programs busy
        tiles = dict(BR=64, BD=32, num_warps=4)
        return tiles, 1, cdiv(R, tiles["BR"])
    tiles = _tiles(D)
    # without sums over rows every block is a program of its own
    return tiles, *(_groups(R, tiles["BR"], _MOST_GROUPS) if sums else (cdiv(R, tiles["BR"]), 1))


@functools.lru_cache(maxsize=1024)
def _constants(D: int, bias: bool, activation: str) -> Constants:
    """Of the forward pass."""
    return kept(HAS_BIAS=bias, ACTIVATION=activation, **_tiles(D))


def _forward_triton(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    h = h.contiguous()
    y, (R, D) = torch.empty_like(h), h.shape
    if R:
        constants = _constants(D, bias is not None, activation)
        grid = cdiv(R, constants["BR"]), cdiv(D, constants["BD"])
        launch(_forward_kernel, grid, (h, bias, y), (R, D), constants)
    return y


def _backward_triton(
    dy: Tensor,
    h: Tensor | None,
    bias: Tensor | None,
    activation: str,
    sums: bool,
    dh: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    R, D = dy.shape
    tiles, P, blocks = _backward_plan(R, D, sums)
    total = dy.new_empty(D if sums else 0, dtype=dtype)
    # one group writes the total itself
    partial = torch.empty(P, D, dtype=torch.float32, device=dy.device) if sums and P > 1 else total
    flags = dict(HAS_BIAS=bias is not None, ACTIVATION=activation, SUMS=sums)
    pointers = dy, h, bias, dh, partial
    launch(_backward_kernel, (P, cdiv(D, tiles["BD"])), pointers, (R, D, blocks), flags | tiles)
    if sums and P > 1:
        sum_groups(partial, total)
    return total


# torch


def activate(u: Tensor, activation: str) -> Tensor:
    """act(u) in a new tensor, for `u` in the dtype to compute in."""
    if activation == "quick_gelu":
        return F.silu(1.702 * u, inplace=True).div_(1.702)
    if activation == "gelu":
        return F.gelu(u)
    if activation == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    return F.relu(u).square_()


def activate_backward(dy: Tensor, u: Tensor, activation: str) -> Tensor:
    """dy act'(u) in a new tensor, for both in the dtype to compute in."""
    if activation == "quick_gelu":
        return torch.ops.aten.silu_backward(dy, 1.702 * u)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, u)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dy, u, approximate="tanh")
    return F.relu(u).mul_(2).mul_(dy)


def _biased(h: Tensor, bias: Tensor | None) -> Tensor:
    u = h.to(torch.promote_types(h.dtype, torch.float32))
    if bias is None:
        return u
    bias = bias.to(u.dtype)
    return u + bias if u is h else u.add_(bias)


def _forward_torch(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate(_biased(h.contiguous(), bias), activation).to(h.dtype)


def _sums_torch(dh: Tensor) -> Tensor:
    # torch sums bf16 and fp16 in fp32 anyway, and on the CPU dtype= would first make a copy
    return dh.sum(0).to(torch.promote_types(dh.dtype, torch.float32))


def column_sums(dy: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Sum over the rows of a contiguous (R, D), in fp32, stored in `dtype`, for an op that runs on `backend`."""
    if backend != "triton":
        return _sums_torch(dy).to(dtype)
    if not dy.shape[0]:
        return dy.new_zeros(dy.shape[1], dtype=dtype)
    return _backward_triton(dy, None, None, "none", True, None, dtype)


# native


def _is_native(activation: str) -> bool:
    """Whether the native kernels have an activation: torch's own tanh GELU is vectorised too, and runs in its place."""
    return activation != "gelu_tanh"


def _forward_native(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if not _is_native(activation):
        return _forward_torch(h, bias, activation)
    return torch.ops.prismer_native.bias_activation(h.contiguous(), bias, activation)


# by backend, for rows (R, D)
FORWARD: dict[str, Callable[[Tensor, Tensor | None, str], Tensor]] = {
    "native": _forward_native,
    "triton": _forward_triton,
    "torch": _forward_torch,
}

# the registered ops


def _forward(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return FORWARD[OP.choose(h, activation)](h, bias, activation)


def _forward_fake(h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _backward(dy: Tensor, h: Tensor, bias: Tensor | None, activation: str, sums: bool) -> tuple[Tensor, Tensor]:
    dy, h = dy.contiguous(), h.contiguous()
    backend = OP.choose(h, activation, gradient=True)
    if backend == "triton":
        dh, dbias = _backward_fake(h, sums)
        if h.shape[0]:
            return dh, _backward_triton(dy, h, bias, activation, sums, dh)
        return dh, dbias.zero_()
    if backend == "native" and _is_native(activation):
        dh = torch.ops.prismer_native.bias_activation_backward(dy, h, bias, activation)
    else:
        u = _biased(h, bias)
        dh = activate_backward(dy.to(u.dtype), u, activation).to(h.dtype)
    return dh, _sums_torch(dh) if sums else _backward_fake(h, sums)[1]


def _backward_fake(h: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(h.dtype, torch.float32)
    return h.new_empty(h.shape), h.new_empty(h.shape[1] if sums else 0, dtype=compute)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h, bias, activation = inputs
    ctx.activation = activation
    ctx.dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(h, bias)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs_bias = ctx.needs_input_grad[1]
    dh, dbias = bias_activation_backward_op(dy, *ctx.saved_tensors, ctx.activation, needs_bias)
    return dh, dbias.to(ctx.dtype) if needs_bias else None


bias_activation_op = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
bias_activation_backward_op = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose {', '.join(ACTIVATIONS)}")


def _plan(h: Tensor, bias: Tensor | None, activation: str) -> Callable:
    check_activation(activation)
    if not h.is_floating_point() or h.dim() < 1 or h.shape[-1] < 1:
        raise ValueError(f"h is {described(h)}; pass floats of shape (..., D)")
    check_floats("bias", bias, h.shape[-1:])
    if OP.route(h, activation) == "reference":
        return bias_activation_reference
    forward = FORWARD[OP.choose(h, activation)] if runs_directly(h, bias) else bias_activation_op
    if h.dim() == 2:
        return forward
    rows, shape = (-1, h.shape[-1]), h.shape
    return lambda h, bias, activation: forward(h.reshape(rows), bias, activation).view(shape)


def bias_activation(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(h + bias) in one pass, computed in fp32.

    Args:
        h: (..., D), fp32, bf16, fp16 or float64.
        bias: (D,), any floating dtype, or None.
        activation: "quick_gelu", "gelu" (exact), "squared_relu" or "gelu_tanh" (the tanh approximation of GELU).

    Returns:
        (..., D) in the dtype of `h`.

    Raises:
        ValueError: if a shape, dtype or name does not fit.
    """
    return OP.resolve(_plan, (h, bias), activation)(h, bias, activation)


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: the hidden layer of BASE and LARGE at 480 px, 8 images."""
    cases = []
    bf16, fp32 = "*bf16", "*fp32"
    for model, R, D, name in (
        ("BASE", 8 * 964, 3072, "quick_gelu"),
        ("LARGE", 8 * 1220, 4096, "quick_gelu"),
        ("BASE decoder", 8 * 40, 3072, "gelu"),
        ("BASE resampler", 8 * 64, 3072, "squared_relu"),
    ):
        flags = dict(HAS_BIAS=True, ACTIVATION=name)
        tiles, P, blocks = _backward_plan(R, D, True)
        shape = f"{model}, 8 images, {R} x {D}"
        cases += [
            KernelCase.of_launch(
                f"{model} {name} forward",
                _forward_kernel,
                (bf16, bf16, bf16, R, D),
                flags | _tiles(D),
                shape=shape,
                bytes=2 * R * D * 2 + 2 * D,
                flops=8 * R * D,
            ),
            KernelCase.of_launch(
                f"{model} {name} backward",
                _backward_kernel,
                (bf16, bf16, bf16, bf16, fp32 if P > 1 else bf16, R, D, blocks),
                dict(SUMS=True, **flags, **tiles),
                shape=shape,
                bytes=3 * R * D * 2 + 2 * D + (4 * P * D if P > 1 else 2 * D),
                flops=12 * R * D,
            ),
        ]
    R, D = 8 * 964, 768
    tiles, P, blocks = _backward_plan(R, D, True)
    sums = KernelCase.of_launch(
        "BASE column sums",
        _backward_kernel,
        (bf16, None, None, None, fp32, R, D, blocks),
        dict(HAS_BIAS=False, ACTIVATION="none", SUMS=True, **tiles),
        shape=f"BASE 480 px, 8 images, {R} x {D}",
        bytes=R * D * 2 + 4 * P * D,
        flops=R * D,
    )
    return [*cases, sums]
