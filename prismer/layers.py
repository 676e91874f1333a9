"""Batch norm whose statistics span all ranks: what the expert stems train with (spec 1.3).

The layers that the model shares with others are in prismer/kernels/modules.py.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on every rank's statistics."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, dtotal: Tensor) -> Tensor:
        dx = dtotal.contiguous().clone()
        dist.all_reduce(dx)
        return dx


_PIECE = 2**18
# numbers at a time, 1 MB in fp32: what a core's cache holds


def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.native_batch_norm` in training: y (B, C, h, w), and the batch's mean and 1 / standard deviation (C,).

    On a CPU that op adds the pixels of a channels-last fp32 map one after another in fp32, where it sums others in
    float64: at BASE's sizes the stems' outputs were off by 1.2e-5 instead of 2e-6, and ReLUs near zero turned, which
    is 1e-3 of a gradient. Here sums are pairwise within a piece and float64 between pieces.
    """
    turned = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not (x.is_cpu and x.dtype == torch.float32 and turned):
        return torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    count, C = rows.shape
    pieces = rows.split(max(1, _PIECE // C))
    mean = sum(piece.sum(0).double() for piece in pieces).div(count).float()
    variance = sum((piece - mean).square_().sum(0).double() for piece in pieces).div(count).float()
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
    y, *_ = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
    return y, mean, (variance + eps).rsqrt()


class _NormedReLU:
    """relu of a batch norm by its batch's statistics, formed again from the input: once for both who need it.

    The convolution that follows takes it first, then the norm's own backward pass, which lets it go.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        self.inputs, self.eps = (x.detach(), weight.detach(), bias.detach()), eps
        self.formed: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.formed is None:
            # the statistics too: the same to the last bit, and none to average
            y, *_ = _batch_norm(*self.inputs, None, None, 0.0, self.eps)
            self.formed = y.relu_()
        return self.formed


class _BatchNormReLU(torch.autograd.Function):
    """Batch norm of a batch by its own statistics, and ReLU, of which the input alone is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, again):
        y, mean, rstd = _batch_norm(x, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.again = eps, again
        return y.relu_()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        dy = torch.ops.aten.threshold_backward(dy, ctx.again(), 0)
        ctx.again.formed = None
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, rstd, True, ctx.eps, needs
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics span the micro-batches of all ranks, on any device and backend.

    The published system used per-GPU statistics of 2-8 images; with these, n processes train as one does at the same
    global batch. torch's SyncBatchNorm refuses CPU tensors. Running statistics are fp32 at least.
    """

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # a bf16 running mean stops moving once its step falls under 2^-8 of its value
        self.running_mean = _at_least_fp32(self.running_mean)
        self.running_var = _at_least_fp32(self.running_var)
        return self

    def relu(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """relu(self(x)), and a function that forms it again, so that nobody needs to keep it; None where it cannot."""
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if not (alone and self.training) or torch.compiler.is_compiling():
            return F.relu(self(x)), None
        self.num_batches_tracked += 1
        weight, bias = _at_least_fp32(self.weight), _at_least_fp32(self.bias)
        again = _NormedReLU(x, weight, bias, self.eps)
        y = _BatchNormReLU.apply(
            x, weight, bias, self.running_mean, self.running_var, self.momentum, self.eps, again
        )
        trains = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return y, again if trains else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        if self.training:
            self.num_batches_tracked += 1
        weight, bias = _at_least_fp32(self.weight), _at_least_fp32(self.bias)
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
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
