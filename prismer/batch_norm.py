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


def _moments(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance (C,) of a map (B, C, h, w) where torch's own batch norm forms them badly, or None.

    On a CPU it adds the pixels of a channels-last fp32 map one after another in fp32, where it sums others in float64.
    In a map of large even regions, as the experts' are, that moved the mean by 1e-4 of a standard deviation, at BASE's
    sizes the stems' outputs by 1.2e-5 instead of 2e-6; ReLUs near zero turned, which is 1e-3 of a gradient. The sums
    here are pairwise.
    """
    turned = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not (x.is_cpu and x.dtype == torch.float32 and turned):
        return None
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.sum(0) / len(rows)
    return mean, (rows - mean).square_().sum(0) / len(rows)


class _NormedReLU:
    """relu of a batch norm by its batch's statistics, formed again from the input: once for both who need it.

    The convolution that follows takes it first, then the norm's own backward pass, which lets it go.

    Attributes:
        moments: the statistics, if the forward pass has formed them itself.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        self.inputs, self.eps = (x.detach(), weight.detach(), bias.detach()), eps
        self.formed: Tensor | None = None
        self.moments: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> Tensor:
        if self.formed is None:
            # torch's own statistics are the same to the last bit, and there are none to average
            known, stats = self.moments is not None, self.moments or (None, None)
            y, *_ = torch.native_batch_norm(*self.inputs, *stats, not known, 0.0, self.eps)
            self.formed = y.relu_()
        return self.formed


class _BatchNormReLU(torch.autograd.Function):
    """Batch norm of a batch by its own statistics, and ReLU, of which the input alone is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, again):
        again.moments = _moments(x)
        if again.moments is None:
            y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        else:
            mean, variance = again.moments
            count = x.numel() // x.shape[1]
            running_mean.lerp_(mean, momentum)
            running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / max(1, count - 1))
            y, *_ = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
            rstd = (variance + eps).rsqrt()
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
        grads = torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, ctx.eps, needs)
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
        y = _BatchNormReLU.apply(x, weight, bias, self.running_mean, self.running_var, self.momentum, self.eps, again)
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
