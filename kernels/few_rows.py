"""A linear layer of few rows, whose time is that of reading its weights: beams, the nodes of a trie, single tokens.

    y = x W^T + bias                                                      W in the dtype of x
    y_rn = t_r s_n (sum over d of x8_rd W8_nd) + bias_n                   W in int8, with a scale s_n for each output
    t_r = max_d |x_rd| / 127,  x8 = round(x / t)

On a CPU the native kernel serves up to 64 rows. It reads each weight once, from where the parameter lies, on all
threads; no library packs the weights first. Sums are in fp32, and exact in 32 bits for int8. A row has the same bits
alone, in a batch and on any number of threads. AVX512-BF16 multiplies pairs of bf16, AVX512-VNNI four bytes at a time.
Source of the int8 scheme: LLM.int8(), arXiv:2208.07339, without its outlier columns.

For inference alone: the native kernel has no gradient. Legend: R rows, K inputs, N outputs.
Traffic: N K weights of s bytes once; x and y are small beside them. FLOPs: 2 R K N.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.checks import check_like, described
from prismer.kernels.dispatch import PLAIN, TORCH, Backend, Op, on_host, runs_directly
from prismer.kernels.machine import native_missing

# the native kernel's limits: rows, and the width up to which sums of int8 products fit into 32 bits
MOST_ROWS = 64
_MOST_BYTES = 65536
# Smaller products are torch's. In fp32 its library is faster while the weights stay in the second-level cache; in 16
# bits a call of oneDNN costs more than such a product.
_LEAST_WEIGHTS = {torch.float32: 2**19, torch.bfloat16: 2**12, torch.float16: 2**12}

_STEPS = 127
_TINY = torch.finfo(torch.float32).tiny


def few_rows_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """The definition, fp32 inside (float64 for float64); int8 sums are exact. Arguments as in `few_rows_linear`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(compute)
    if scale is None:
        return F.linear(x.to(compute), weight.to(compute), bias).to(x.dtype)
    x8, steps = _quantised(x)
    y = (x8.double() @ weight.double().T).to(compute) * scale.to(compute) * steps.to(compute)
    return (y if bias is None else y + bias).to(x.dtype)


def _native_refuses(x: Tensor, weight: Tensor) -> str | None:
    """`x` is (R, K)."""
    if x.shape[0] > MOST_ROWS:
        return f"native few_rows_linear serves up to {MOST_ROWS} rows, and the call has more"
    if not _dense(weight) or not x.shape[1]:
        return "native few_rows_linear serves weights with a dense last dimension"
    if weight.dtype == torch.int8 and weight.shape[1] > _MOST_BYTES:
        return f"native few_rows_linear serves int8 weights of up to {_MOST_BYTES} inputs"
    return None


OP = Op(
    name="few_rows_linear",
    reference=few_rows_linear_reference,
    backends=(Backend(name="native", devices=("cpu",), float64=False, refuses=_native_refuses), TORCH),
)


def few_rows_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the native kernel runs x weight^T faster than torch, for x (..., K) and weight (N, K).

    Only a call without a gradient, eager, on a CPU, that nothing watches: a compiler, a counter, or who asks for a
    backend gets torch's own operators.
    """
    # first, so that a compiler does not guard on the sizes
    return (
        on_host(x)
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and x.dtype in _LEAST_WEIGHTS
        and weight.dtype == x.dtype
        and weight.numel() >= _LEAST_WEIGHTS[x.dtype]
        and type(weight) in PLAIN
        and _dense(weight)
        and weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and _built()
    )


@functools.cache
def _built() -> bool:
    return native_missing() is None and hasattr(torch.ops.prismer_native, "few_rows_linear")


def _dense(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] == 1


# native


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    x = x if _dense(x) else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    return torch.ops.prismer_native.few_rows_linear(x, weight, scale, bias)


def product_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`few_rows_linear` of a call that `few_rows_serves`, without the checks, which would cost as much as a product."""
    if x.dim() == 2:
        return _native(x, weight, bias, None)
    return _native(x.reshape(-1, x.shape[-1]), weight, bias, None).view(*x.shape[:-1], weight.shape[0])


# torch


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in int8, and the fp32 step of each row (R, 1)."""
    steps = x.abs().amax(1, keepdim=True).float().div_(_STEPS).clamp_(min=_TINY)
    return (x / steps).round_().to(torch.int8), steps


def _int8_torch(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    x8, steps = _quantised(x)
    y = torch._int_mm(x8, weight.T).float().mul_(scale)
    y = y.mul_(steps) if bias is None else torch.addcmul(bias, y, steps)
    return y.to(x.dtype)


# the registered op


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if scale is None else _int8_torch(x, weight, bias, scale)


_FORWARD: dict[str, Callable] = {"native": _native, "torch": _torch}


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return _FORWARD[OP.choose(x, weight)](x, weight, bias, scale)


def _forward_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_few_rows_linear = OP.register(_forward, fake=_forward_fake)


# the public function


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, dense: bool) -> Callable:
    """`dense`: the weight has a dense last dimension, on which the choice depends."""
    int8 = weight.dtype == torch.int8
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x is {described(x)}; pass floats of shape (..., K)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not (int8 or weight.dtype == x.dtype):
        raise ValueError(f"weight is {described(weight)}; pass {x.dtype}, like x, or int8, of shape (N, {x.shape[-1]})")
    if int8 != (scale is not None):
        raise ValueError(f"weight is {weight.dtype}; pass a scale with int8 weights, and none with others")
    N = weight.shape[:1]
    check_like("bias", bias, N, "the scale of int8 weights" if int8 else "x", torch.float32 if int8 else x.dtype)
    check_like("scale", scale, N, "the sums of int8 products", torch.float32)
    forward: Callable = _few_rows_linear
    if OP.route(x) == "reference":
        forward = few_rows_linear_reference
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        if int8:
            raise ValueError("int8 products have no gradient; call them under torch.no_grad()")
        return lambda x, weight, bias, scale: F.linear(x, weight, bias)
    rows, shape = (-1, x.shape[-1]), (*x.shape[:-1], *N)
    if forward is _few_rows_linear and runs_directly(x, weight, bias, scale):
        forward = _FORWARD[OP.choose(x.reshape(rows), weight)]
    return lambda x, weight, bias, scale: forward(x.reshape(rows), weight, bias, scale).view(shape)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x weight^T + bias, fastest for up to 64 rows; more rows are torch's.

    A product that needs a gradient is torch's, too.

    Args:
        x: (..., K), any floating dtype.
        weight: (N, K), in the dtype of `x` with any strides, or int8.
        bias: (N,) or None, in the dtype of `x`; beside int8 weights in fp32.
        scale: (N,) fp32, of int8 weights alone: what a step of each output's weights is worth.

    Returns:
        (..., N) in the dtype of `x`.

    Raises:
        ValueError: if a shape or dtype does not fit, or int8 weights are to have a gradient.
    """
    # the choice depends on the layout of the weight, which is not part of a plan's key
    dense = weight.dim() > 0 and _dense(weight)
    return OP.resolve(_plan, (x, weight, bias, scale), dense)(x, weight, bias, scale)
