"""Batch norm whose statistics span all ranks: what the expert stems train with (spec 1.3).

The layers that the model shares with others are in prismer/kernels/modules.py.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


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
