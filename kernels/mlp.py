"""The two-layer perceptron of a transformer block, with bias and activation inside the matrix products.

    h = x fc_weight^T,  a = act(h + fc_bias),  y = a proj_weight^T + proj_bias
    dh = (dy proj_weight) act'(h + fc_bias),  dx = dh fc_weight
    dfc_weight = dh^T x,  dproj_weight = dy^T a,  biases: the column sums of dh and dy

For R rows of D numbers of s bytes, hidden width E and output width O, and each product only where something trains:
    FLOPs     forward 2 R E (D + O);  backward 2 R E (O for dh + D for dx + D for dfc_weight + O for dproj_weight)
    saved     h, R E s, the product WITHOUT its bias; x, R D s, only if fc_weight trains; and the parameters themselves.
              h is not even written if nothing that needs it trains. a is never saved: it is computed again with dh.
    bytes     forward, compulsory: (R D + 2 R E + R O + D E + E O) s, and R E s more if h is saved
Source: the MLP of CLIP, arXiv:2103.00020 (quick_gelu), of RoBERTa, arXiv:1907.11692 (gelu), of SigLIP, arXiv:2303.15343
(gelu_tanh), and of the resampler of Prismer, arXiv:2303.02506 (squared_relu).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import matmul
from prismer.kernels.activation import (
    FORWARD,
    bias_activation_op,
    bias_activation_reference,
    check_activation,
    column_sums,
)
from prismer.kernels.activation import OP as ACTIVATION
from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.checks import check_linear, described
from prismer.kernels.dispatch import TORCH, TRITON, Example, Op, is_partitioned, rows_and_width, runs_directly
from prismer.kernels.gemm import gemm, gemm_case, gemm_derivative, gemm_gradient, prepare_gemm
from prismer.kernels.launch import fp32_precision


def mlp_reference(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    """The definition, fp32 inside (float64 for float64). Shapes as in `mlp`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x32, w1, b1, w2, b2 = (
        None if t is None else t.to(compute) for t in (x, fc_weight, fc_bias, proj_weight, proj_bias)
    )
    a = bias_activation_reference(F.linear(x32, w1), b1, activation)
    return F.linear(a, w2, b2).to(x.dtype)


def _host(x: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, activation: str) -> bool:
    """Whether torch's own layers serve the call as well: with GELU and a frozen second layer they save no more."""
    return (
        activation in ("gelu", "gelu_tanh")
        and not (torch.is_grad_enabled() and proj_weight.requires_grad)
        and all(bias is None or bias.dtype == x.dtype for bias in (fc_bias, proj_bias))
        and not is_partitioned(proj_weight)
    )


def _host_first(
    x: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, activation: str
) -> bool:
    return matmul.torch_multiplies(x, proj_weight.shape[1])


def _classify(
    x: Tensor,
    fc_bias: Tensor | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    activation: str = "",
) -> tuple[int, ...]:
    """Rows and width; hidden and output width too for the choice between the op and torch's own layers."""
    more = () if proj_weight is None else (proj_weight.shape[1], proj_weight.shape[0])
    return *rows_and_width(x), *more


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    R, D, E, outputs = (*shape, 4 * shape[1], shape[1])[:4]
    x, up, down = (torch.randn(s, device=device) for s in ((R, D), (E, D), (outputs, E)))
    biases = [torch.randn(n, device=device).to(dtype) for n in (E, outputs)]
    x, up, down = x.to(dtype).requires_grad_(), (up * D**-0.5).to(dtype), (down * E**-0.5).to(dtype)
    return functools.partial(mlp, activation="gelu"), [x, up, biases[0], down, biases[1]]


OP = Op(
    name="mlp",
    reference=mlp_reference,
    backends=(TRITON, TORCH),
    vendor=True,
    host=_host,
    host_first=_host_first,
    classify=_classify,
    example=_example,
    # how torch multiplies
    depends=lambda: (torch._C._get_mkldnn_enabled(), fp32_precision()),
)


# the registered ops


def _forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y, h = _forward_on(OP.choose(x), x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keep)
    return y, x.new_empty(0) if h is None else h


def _forward_on(
    backend: str,
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    a, h = gemm(x.contiguous(), fc_weight, fc_bias, backend=backend, activation=activation, keep=keep)
    return gemm(a, proj_weight, proj_bias, backend=backend)[0], h


def _forward_fake(x: Tensor, fc_weight: Tensor, proj_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    h = x.new_empty((x.shape[0], fc_weight.shape[0]) if keep else 0)
    return x.new_empty(x.shape[0], proj_weight.shape[0]), h


def _backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`needs`: of x, fc_weight, fc_bias, proj_weight, proj_bias."""
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = needs
    dy = dy.contiguous()
    backend = OP.choose(dy, gradient=True)
    dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias = (dy.new_empty(0) for _ in range(5))
    if need_x or need_fc_weight or need_fc_bias:
        dh, a, sums = gemm_derivative(
            dy,
            proj_weight,
            h,
            fc_bias,
            backend=backend,
            activation=activation,
            activated=need_proj_weight,
            sums=fc_bias.dtype if need_fc_bias else None,
        )
        if need_fc_bias:
            dfc_bias = sums
        if need_fc_weight:
            dfc_weight = gemm_gradient(dh, x.contiguous(), backend=backend)
        if need_x:
            dx, _ = gemm(dh, fc_weight.T, None, backend=backend)
    elif need_proj_weight:
        a = bias_activation_op(h, fc_bias, activation)
    if need_proj_weight:
        dproj_weight = gemm_gradient(dy, a, backend=backend)
    if need_proj_bias:
        dproj_bias = column_sums(dy, proj_bias.dtype, backend)
    return dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    fc_weight: Tensor | None,
    fc_bias: Tensor | None,
    proj_bias: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    R, outputs = dy.shape
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = needs
    return (
        dy.new_empty((R, fc_weight.shape[1]) if need_x else 0),
        dy.new_empty((h.shape[1], x.shape[1]) if need_fc_weight else 0),
        fc_bias.new_empty(fc_bias.shape) if need_fc_bias else dy.new_empty(0),
        dy.new_empty((outputs, h.shape[1]) if need_proj_weight else 0),
        proj_bias.new_empty(proj_bias.shape) if need_proj_bias else dy.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias, activation, _ = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    needs = ctx.needs_input_grad[:5]
    need_dh, need_h = any(needs[:3]), any(needs[:4])
    ctx.activation = activation
    ctx.save_for_backward(
        x if needs[1] else None,
        h if need_h else None,
        fc_weight if needs[0] else None,
        fc_bias if need_h else None,
        proj_weight if need_dh else None,
        proj_bias if needs[4] else None,
    )


def _autograd(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, ...]:
    return _mlp_backward(dy, *ctx.saved_tensors, ctx.activation, list(ctx.needs_input_grad[:5]))


_mlp = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_mlp_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _plan(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    partitioned: bool,
) -> Callable:
    """`partitioned`: of the second weight, on which the route depends."""
    check_activation(activation)
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x is {described(x)}; pass floats of shape (..., D)")
    check_linear("fc", fc_weight, fc_bias, x.shape[-1], x)
    check_linear("proj", proj_weight, proj_bias, fc_weight.shape[0], x)
    route = OP.route(x, fc_bias, proj_weight, proj_bias, activation)
    if route == "host":
        fc, proj = _products(x, fc_weight, fc_bias, proj_weight, proj_bias)
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return lambda x, up, up_bias, down, down_bias: proj(
            F.gelu(fc(x, up, up_bias), approximate=approximate), down, down_bias
        )
    if route == "reference":
        return functools.partial(mlp_reference, activation=activation)
    needs_h = (x, fc_weight, fc_bias, proj_weight)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in needs_h)
    forward: Callable = _mlp
    if runs_directly(x, fc_weight, fc_bias, proj_weight, proj_bias):
        backend = OP.choose(x)
        if backend == "triton" and x.numel() and x.is_contiguous():
            fc = prepare_gemm(x.shape, fc_weight, fc_bias, activation=activation)
            proj = prepare_gemm((*x.shape[:-1], fc_weight.shape[0]), proj_weight, proj_bias)
            return lambda x, up, up_bias, down, down_bias: proj(fc(x, up, up_bias), down, down_bias)
        if backend == "torch" and (proj_bias is None or proj_bias.dtype == x.dtype):
            forward = _torch_forward(x.reshape(-1, x.shape[-1]), fc_weight, proj_weight, proj_bias, activation)
        else:
            forward = functools.partial(_forward_on, backend)
    if x.dim() == 2:
        return lambda x, *parameters: forward(x, *parameters, activation, keep)[0]
    rows, shape = (-1, x.shape[-1]), (*x.shape[:-1], proj_weight.shape[0])
    return lambda x, *parameters: forward(x.reshape(rows), *parameters, activation, keep)[0].view(shape)


def _torch_forward(
    x: Tensor, fc_weight: Tensor, proj_weight: Tensor, proj_bias: Tensor | None, activation: str
) -> Callable:
    """`_forward_on` torch's operators for rows like `x` and a bias of its dtype, without a gradient."""
    fc, proj = _products(x, fc_weight, None, proj_weight, proj_bias)
    act = FORWARD[ACTIVATION.choose(x.new_empty(x.shape[0], fc_weight.shape[0]), activation)]

    def forward(
        x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, *_: Any
    ) -> tuple[Tensor, None]:
        return proj(act(fc(x, up, None), up_bias, activation), down, down_bias), None

    return forward


def _products(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None
) -> tuple[Callable, Callable]:
    """What multiplies by the first weight, and by the second."""
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, fc_weight, fc_bias))
    h = x.new_empty((*x.shape[:-1], fc_weight.shape[0])).requires_grad_(needs)
    return matmul.plan(x, fc_weight, fc_bias), matmul.plan(h, proj_weight, proj_bias)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str,
) -> Tensor:
    """proj(act(fc(x))), which saves the pre-activation alone and computes no gradient of frozen parameters.

    Args:
        x: (..., D), fp32, bf16, fp16 or float64.
        fc_weight, proj_weight: (E, D) and (O, E), as in `nn.Linear`, of the dtype of `x`.
        fc_bias, proj_bias: (E,) and (O,), any floating dtype, or None.
        activation: "quick_gelu", "gelu" (exact), "squared_relu" or "gelu_tanh" (the tanh approximation of GELU).

    Returns:
        (..., O) in the dtype of `x`.

    Raises:
        ValueError: if a shape, dtype or name does not fit.
    """
    tensors = x, fc_weight, fc_bias, proj_weight, proj_bias
    return OP.resolve(_plan, tensors, activation, is_partitioned(proj_weight))(*tensors)


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: every product of BASE and LARGE at 480 px, 8 images, and a decoder's."""
    cases = []
    for model, R, D, name in (
        ("BASE", 8 * 964, 768, "quick_gelu"),
        ("LARGE", 8 * 1220, 1024, "quick_gelu"),
        ("BASE decoder", 8 * 40, 768, "gelu"),
    ):
        E = 4 * D
        case = functools.partial(gemm_case, shape=f"{model}, 8 images, {R} x {D} x {E}")
        hidden = dict(bias=True, activation=name)
        cases += [
            case(f"{model} mlp fc {name}", R, E, D, b_transposed=True, keep=True, **hidden),
            case(f"{model} mlp proj", R, D, E, b_transposed=True, bias=True),
            case(f"{model} mlp dh", R, E, D, differentiate=True, activated=True, sums=True, **hidden),
            case(f"{model} mlp dx", R, D, E),
            case(f"{model} mlp dfc_weight", E, D, R, a_transposed=True),
            case(f"{model} mlp dproj_weight", D, E, R, a_transposed=True),
        ]
    return cases
