"""Batch norm for the expert stems: statistics over all ranks, and an op that keeps half of what torch would keep.

The layers that other models share with Prismer are in prismer/kernels/modules.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prismer.kernels.layer_state import has_foreign_hooks


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on every rank's statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> Tensor:
        dx = dtotal.contiguous().clone()
        dist.all_reduce(dx)
        return dx


def _pairwise_moments(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance (C,) of a map (B, C, h, w) whose own batch norm in torch is inaccurate; None for other maps.

    On a CPU torch adds the pixels of a channels-last fp32 map one after another in fp32; other maps it sums in float64.
    For maps with large even regions, such as the experts', this moved the mean by 1e-4 of a standard deviation. At
    BASE's sizes the error of the stems' outputs was 1.2e-5 instead of 2e-6, and ReLUs near zero flipped, each of which
    changes a gradient by 1e-3. The sums here are pairwise.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not (x.is_cpu and x.dtype == torch.float32 and channels_last):
        return None
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    mean = pixels.sum(0) / len(pixels)
    return mean, (pixels - mean).square_().sum(0) / len(pixels)


def _norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    eps: float,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """relu of a batch norm by the batch's statistics; returns it with the mean and 1 / standard deviation if torch's.

    Args:
        moments: the statistics if `_pairwise_moments` formed them; else torch forms them, alike at every call.
        running: running mean and variance to update.
    """
    if moments is None:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        return y.relu_(), mean, rstd
    mean, variance = moments
    if running[0] is not None:
        count = x.numel() // x.shape[1]
        running[0].lerp_(mean, momentum)
        running[1].mul_(1 - momentum).add_(variance, alpha=momentum * count / max(1, count - 1))
    y, *_ = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
    return y.relu_(), mean, None


class _NormReLUConv(torch.autograd.Function):
    """conv(relu(batch_norm(x))) of a training batch; `x` is kept, and the backward pass forms the ReLU's output again.

    The ReLU needs its output for its own gradient, and the convolution needs it for that of `kernel`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        kernel: Tensor,
        running: tuple[Tensor, Tensor],
        momentum: float,
        eps: float,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        moments = _pairwise_moments(x)
        a, mean, rstd = _norm_relu(x, weight, bias, moments, eps, running, momentum)
        rstd = (moments[1] + eps).rsqrt() if rstd is None else rstd
        ctx.save_for_backward(x, weight, bias, kernel, mean, rstd, None if moments is None else moments[1])
        ctx.eps, ctx.stride, ctx.padding = eps, stride, padding
        return F.conv2d(a, kernel, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kernel, mean, rstd, variance = ctx.saved_tensors
        a, *_ = _norm_relu(x, weight, bias, None if variance is None else (mean, variance), ctx.eps)
        *needs_norm, needs_kernel = ctx.needs_input_grad[:4]
        # stride, padding, dilation, whether transposed, output padding, groups
        geometry = (ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
        needs = (any(needs_norm), needs_kernel, False)
        da, dkernel, _ = torch.ops.aten.convolution_backward(dy, a, kernel, None, *geometry, needs)
        grads = (None, None, None)
        if da is not None:
            da = torch.ops.aten.threshold_backward(da, a, 0)
            grads = torch.ops.aten.native_batch_norm_backward(
                da, x, weight, None, None, mean, rstd, True, ctx.eps, needs_norm
            )
        grads = (gradient if needed else None for gradient, needed in zip(grads, needs_norm, strict=True))
        return *grads, dkernel, None, None, None, None, None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics span the micro-batches of all ranks, on any device and backend.

    The published system used the statistics of each GPU's 2 to 8 images; with these, n processes train like one
    process with the same global batch. torch's SyncBatchNorm refuses CPU tensors. Running statistics are at least fp32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GlobalBatchNorm2d":
        super()._apply(fn, recurse)
        # a bf16 running mean stops moving once its step falls under 2^-8 of its value
        self.running_mean = _at_least_fp32(self.running_mean)
        self.running_var = _at_least_fp32(self.running_var)
        return self

    def relu_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """conv(relu(self(x))); in eager training in one process, only `x` is kept for the backward pass."""
        alone = _world_size() == 1 and not torch.compiler.is_compiling()
        # a changed convolution must be called; hooks that only gather its weight need not run
        plain = type(conv) is nn.Conv2d and not has_foreign_hooks(conv)
        if not (self.training and alone and plain):
            return conv(F.relu(self(x)))
        self.num_batches_tracked += 1
        return _NormReLUConv.apply(
            x,
            _at_least_fp32(self.weight),
            _at_least_fp32(self.bias),
            conv.weight,
            (self.running_mean, self.running_var),
            self.momentum,
            self.eps,
            conv.stride,
            conv.padding,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        if self.training:
            self.num_batches_tracked += 1
        weight, bias = _at_least_fp32(self.weight), _at_least_fp32(self.bias)
        world = _world_size()
        if not self.training or world == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
            )
        # every rank holds the same number of images, so means of means are exact
        x32 = _at_least_fp32(x)
        count = world * x.numel() // x.shape[1]
        own = x32.mean((0, 2, 3))
        mean = _SumOverRanks.apply(own) / world
        spread = (x32 - own[:, None, None]).square().mean((0, 2, 3)) + (own - mean).square()
        variance = _SumOverRanks.apply(spread) / world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt() * weight
        shift = bias - mean * scale
        return (x32 * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
