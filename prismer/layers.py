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
            y, *_ = torch.native_batch_norm(*self.inputs, None, None, True, 0.0, self.eps)
            self.formed = y.relu_()
        return self.formed


class _BatchNormReLU(torch.autograd.Function):
    """Batch norm of a batch by its own statistics, and ReLU, of which the input alone is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, again):
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
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


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics span the micro-batches of all ranks, on any device and backend.

    The published system used per-GPU statistics of 2-8 images; with these, n processes train as one does at the same
    global batch. torch's SyncBatchNorm refuses CPU tensors. Running statistics stay fp32 whatever the weights' dtype.
    """

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # a bf16 running mean stops moving once its step falls under 2^-8 of its value
        self.running_mean = self.running_mean.float()
        self.running_var = self.running_var.float()
        return self

    def relu(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """relu(self(x)), and a function that forms it again, so that nobody needs to keep it; None where it cannot."""
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        trains = self.training and torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not (alone and trains) or torch.compiler.is_compiling():
            return F.relu(self(x)), None
        self.num_batches_tracked += 1
        weight, bias = self.weight.float(), self.bias.float()
        again = _NormedReLU(x, weight, bias, self.eps)
        y = _BatchNormReLU.apply(
            x, weight, bias, self.running_mean, self.running_var, self.momentum, self.eps, again
        )
        return y, again

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        if self.training:
            self.num_batches_tracked += 1
        weight, bias = self.weight.float(), self.bias.float()
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or world == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
            )
        # every rank holds the same number of images, so means of means are exact
        x32 = x.float()
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
