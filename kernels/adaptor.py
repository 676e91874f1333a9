"""The adaptor of Prismer: a residual perceptron with squared ReLU and no bottleneck, with a norm before or after.

    early (late=False, vision)    u = LN(x);  r = relu(u down^T + down_bias);  y = x + r^2 up^T + up_bias
    late  (late=True, text)       u = x;      r as above;  total = x + r^2 up^T + up_bias;  y = LN(total)
    dt = dy (early), or dy through LN (late);  dr2 = dt up;  dh = dr2 * 2 r;  du = dh down;
    ddown = dh^T u,  dup = dt^T r^2,  biases: the column sums of dh and dt;  dx = dt + du (through LN if early)

The first product ends with bias and ReLU and stores r alone. The second product squares r as it loads it, and ends with
bias and residual. So Triton writes neither h nor r^2, and torch's operators drop r^2 at once. In the early order the
backward pass of LN adds dy to dx. Where LN runs on Triton, its backward pass sums the columns of dt too, and writes u
again.

Saved, for R rows of D numbers of s bytes, hidden width E (E = D in Prismer), beside the parameters themselves:
    early   r, R E s; x, which the stream holds anyway, R D s; mean and rstd of LN, 8 R. The normalised u is not saved:
            it is computed again, and only if down_weight trains.
    late    r, R E s; total, R D s, because it follows from neither x nor y; mean and rstd, 8 R; x, R D s, only if
            down_weight trains.
The less trains, the less is saved: in the early order nothing at all if only up_bias trains, in the late order no r if
only the norm trains. Plain torch saves r^2 as well, R E s, and in the early order u, R D s.

FLOPs of the products: forward 4 R D E; backward 2 R D E for each of dh, du, ddown and dup that is needed.
Bytes of the forward products, compulsory: (3 R D + 2 R E + 2 D E) s, and those of layer_norm.
Source: Prismer, arXiv:2303.02506, section 3.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import launch, layer_norm, matmul
from prismer.kernels.activation import column_sums
from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.checks import check_floats, check_linear, described
from prismer.kernels.dispatch import TORCH, TRITON, Op, runs_directly
from prismer.kernels.gemm import gemm, gemm_case, gemm_derivative, gemm_gradient, prepare_gemm
from prismer.kernels.layer_norm import backward_in_one_pass, layer_norm_op, layer_norm_reference


def adaptor_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    late: bool,
    eps: float = 1e-5,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `adaptor`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x32, gamma, beta, w1, b1, w2, b2 = (
        None if t is None else t.to(compute)
        for t in (x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias)
    )
    u = x32 if late else layer_norm_reference(x32, gamma, beta, eps)
    total = x32 + F.linear(F.relu(F.linear(u, w1, b1)).square(), w2, b2)
    return (layer_norm_reference(total, gamma, beta, eps) if late else total).to(x.dtype)


OP = Op(
    name="adaptor",
    reference=adaptor_reference,
    backends=(TRITON, TORCH),
    vendor=True,
    # how torch multiplies
    depends=lambda: (torch._C._get_mkldnn_enabled(), launch.fp32_precision()),
)


# the registered ops


def _forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    late: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias
    y, r, total, mean, rstd = _forward_on(OP.choose(x), layer_norm_op, x, *parameters, late, eps)
    return y, r, x.new_empty(0) if total is None else total, mean, rstd


def _forward_on(
    backend: str,
    norm: Callable,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    late: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """`norm` is the op of the norm or one of its implementations."""
    u = x = x.contiguous()
    total = None
    if not late:
        u, _, mean, rstd = norm(x, None, norm_weight, norm_bias, eps)
    r, _ = gemm(u, down_weight, down_bias, backend=backend, activation="relu")
    y, _ = gemm(r, up_weight, up_bias, backend=backend, residual=x, square=True)
    if late:
        total = y
        y, _, mean, rstd = norm(total, None, norm_weight, norm_bias, eps)
    return y, r, total, mean, rstd


def _forward_fake(x: Tensor, down_weight: Tensor, late: bool) -> tuple[Tensor, ...]:
    R, D = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(R, dtype=compute) for _ in range(2))
    total = x.new_empty((R, D) if late else 0)
    return x.new_empty(R, D), x.new_empty(R, down_weight.shape[0]), total, mean, rstd


def _backward(
    dy: Tensor,
    x: Tensor | None,
    r: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    late: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`needs`: of x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias."""
    need_x, need_gamma, need_beta, need_down, need_down_bias, need_up, need_up_bias = needs
    dy = dy.contiguous()
    backend = OP.choose(dy, gradient=True)
    dx, dgamma, dbeta, ddown, ddown_bias, dup, dup_bias = (dy.new_empty(0) for _ in range(7))
    affine = need_gamma or need_beta
    dt, u = dy, None
    # the column sums of dt: the backward pass of the norm reads or writes dt
    sums_of_dt, stream = None, up_bias.dtype if need_up_bias else None
    if late:
        norm = None, total, norm_weight, None, mean, rstd, affine, stream
        dt, dgamma, dbeta, sums_of_dt, _ = backward_in_one_pass(dy, *norm, again=False)
    need_u = need_x or (affine and not late)
    if need_u or need_down or need_down_bias:
        # relu(h)^2 has the derivative 2 relu(h), which is that of relu(r)^2 too
        dh, _, sums = gemm_derivative(
            dt,
            up_weight,
            r,
            None,
            backend=backend,
            activation="squared_relu",
            sums=down_bias.dtype if need_down_bias else None,
        )
        if need_down_bias:
            ddown_bias = sums
        if need_u:
            dx, _ = gemm(dh, down_weight.T, None, backend=backend, residual=dt if late else None)
            if not late:
                # from du and the dy of the residual to dx
                norm = dy, x.contiguous(), norm_weight, norm_bias, mean, rstd, affine, stream
                dx, dgamma, dbeta, sums_of_dt, u = backward_in_one_pass(dx, *norm, again=need_down)
        if need_down:
            if late:
                u = x.contiguous()
            elif u is None:
                u = layer_norm_op(x, None, norm_weight, norm_bias, eps)[0]
            ddown = gemm_gradient(dh, u, backend=backend)
    if need_up:
        dup = gemm_gradient(dt, r, backend=backend, square=True)
    if need_up_bias:
        dup_bias = column_sums(dt, up_bias.dtype, backend) if sums_of_dt is None else sums_of_dt
    return (
        dx if need_x else dy.new_empty(0),
        dgamma.to(norm_weight.dtype) if need_gamma else dy.new_empty(0),
        dbeta.to(norm_bias.dtype) if need_beta else dy.new_empty(0),
        ddown,
        ddown_bias,
        dup,
        dup_bias,
    )


def _backward_fake(
    dy: Tensor,
    r: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, _, _, need_down, _, need_up, _ = needs
    D, E = dy.shape[1], 0 if r is None else r.shape[1]
    dgamma, dbeta, ddown_bias, dup_bias = (
        t.new_empty(t.shape) if need else dy.new_empty(0)
        for t, need in zip((norm_weight, norm_bias, down_bias, up_bias), (*needs[1:3], needs[4], needs[6]), strict=True)
    )
    return (
        dy.new_empty(dy.shape if need_x else 0),
        dgamma,
        dbeta,
        dy.new_empty((E, D) if need_down else 0),
        ddown_bias,
        dy.new_empty((D, E) if need_up else 0),
        dup_bias,
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias, late, eps = inputs
    _, r, total, mean, rstd = output
    ctx.mark_non_differentiable(r, total, mean, rstd)
    need_x, need_gamma, need_beta, need_down, need_down_bias, need_up, need_up_bias = ctx.needs_input_grad[:7]
    affine = need_gamma or need_beta
    need_u = need_x or (affine and not late)
    need_dh = need_u or need_down or need_down_bias
    need_norm = late or need_u
    ctx.late, ctx.eps = late, eps
    ctx.save_for_backward(
        x if need_down or (need_u and not late) else None,
        r if need_dh or need_up else None,
        total if late else None,
        mean if need_norm else None,
        rstd if need_norm else None,
        # the early order computes u again for ddown; a bias tells the dtype of its gradient
        norm_weight if need_norm or need_down else None,
        norm_bias if need_beta or (need_down and not late) else None,
        down_weight if need_u else None,
        down_bias if need_down_bias else None,
        up_weight if need_dh else None,
        up_bias if need_up_bias else None,
    )


def _autograd(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor, ...]:
    return _adaptor_backward(dy, *ctx.saved_tensors, ctx.late, ctx.eps, list(ctx.needs_input_grad[:7]))


_adaptor = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_adaptor_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _plan(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    late: bool,
    eps: float,
) -> Callable:
    if not x.is_floating_point() or x.dim() < 1 or not 1 <= x.shape[-1] <= 65536:
        raise ValueError(f"x is {described(x)}; pass floats of shape (..., D), D from 1 to 65536")
    D = x.shape[-1]
    check_floats("norm_weight", norm_weight, (D,))
    check_floats("norm_bias", norm_bias, (D,))
    check_linear("down", down_weight, down_bias, D, x)
    check_linear("up", up_weight, up_bias, down_weight.shape[0], x, D)
    if OP.route(x) == "reference":
        return functools.partial(adaptor_reference, late=late, eps=eps)
    forward: Callable = _adaptor
    if runs_directly(x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias):
        norm_backend, backend = layer_norm.OP.choose(x, norm_weight, norm_bias), OP.choose(x)
        tensors = x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias
        if norm_backend == backend == "triton" and x.numel() and x.is_contiguous():
            return _triton_plan(*tensors, late, eps)
        alike = all(bias is None or bias.dtype == x.dtype for bias in (down_bias, up_bias))
        if backend == "torch" and alike and x.dim() > 1 and x.is_contiguous():
            return _torch_plan(*tensors, late, eps)
        forward = functools.partial(_forward_on, backend, layer_norm.FORWARD[norm_backend])
    if x.dim() == 2:
        return lambda *tensors: forward(*tensors, late, eps)[0]
    shape = x.shape
    return lambda x, *parameters: forward(x.reshape(-1, D), *parameters, late, eps)[0].view(shape)


def _triton_plan(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    late: bool,
    eps: float,
) -> Callable:
    """For a contiguous x that is not empty, without a gradient."""
    normalise = layer_norm.prepare_norm(x, None, norm_weight, norm_bias, eps)
    hidden = *x.shape[:-1], down_weight.shape[0]
    down = prepare_gemm(x.shape, down_weight, down_bias, activation="relu")
    up = prepare_gemm(hidden, up_weight, up_bias, residual=True, square=True)
    if late:
        return lambda x, g, b, w1, b1, w2, b2: normalise(up(down(x, w1, b1), w2, b2, x), g, b)
    return lambda x, g, b, w1, b1, w2, b2: up(down(normalise(x, g, b), w1, b1), w2, b2, x)


def _torch_plan(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    late: bool,
    eps: float,
) -> Callable:
    """For a contiguous x and biases of its dtype, without a gradient."""
    normalise = layer_norm.plan_norm(x, norm_weight, norm_bias, eps)
    down = matmul.plan(x, down_weight, down_bias)
    up = matmul.plan(x.new_empty((*x.shape[:-1], down_weight.shape[0])), up_weight, up_bias)
    if late:
        return lambda x, g, b, w1, b1, w2, b2: normalise(up(down(x, w1, b1).relu_().square_(), w2, b2).add_(x), g, b)
    return lambda x, g, b, w1, b1, w2, b2: up(down(normalise(x, g, b), w1, b1).relu_().square_(), w2, b2).add_(x)


def adaptor(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    late: bool,
    eps: float = 1e-5,
) -> Tensor:
    """x + up(relu(down(norm(x)))^2), or norm(x + up(relu(down(x))^2)) if `late`.

    Args:
        x: (..., D), fp32, bf16, fp16 or float64.
        norm_weight, norm_bias: (D,), any floating dtype, or None for 1 and 0.
        down_weight, up_weight: (E, D) and (D, E), as in `nn.Linear`, of the dtype of `x`.
        down_bias, up_bias: (E,) and (D,), any floating dtype, or None.
        late: norm after the residual sum instead of before the first product.
        eps: added to the variance, not to its root.

    Returns:
        (..., D) in the dtype of `x`.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    tensors = x, norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias
    return OP.resolve(_plan, tensors, late, eps)(*tensors)


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: every product of BASE and LARGE at 480 px, 8 images; the norm is layer_norm's."""
    cases = []
    for model, R, D in (("BASE", 8 * 964, 768), ("LARGE", 8 * 1220, 1024)):
        case = functools.partial(gemm_case, shape=f"{model} 480 px, 8 images, {R} x {D} x {D}")
        cases += [
            case(f"{model} adaptor down", R, D, D, b_transposed=True, bias=True, activation="relu"),
            case(f"{model} adaptor up", R, D, D, b_transposed=True, bias=True, residual=True, square_a=True),
            case(f"{model} adaptor dh", R, D, D, activation="squared_relu", differentiate=True, sums=True),
            case(f"{model} adaptor dx, late", R, D, D, residual=True),
            case(f"{model} adaptor ddown_weight", D, D, R, a_transposed=True),
            case(f"{model} adaptor dup_weight", D, D, R, a_transposed=True, square_b=True),
        ]
    return cases
