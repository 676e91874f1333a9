"""The small trainable and frozen parts that vision and text share: attention, MLP, adaptor, batch norm, activations.

Everything computes in the dtype of its weights; layer and batch norm keep their statistics in fp32.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LayerNorm = nn.LayerNorm
# torch's kernel takes bf16 and fp32 alike, with fp32 statistics inside


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x) ** 2, the activation of adaptors and resampler."""
    return F.relu(x).square()


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "squared_relu": squared_relu}


class MLP(nn.Module):
    """c_proj(activation(c_fc(x))): (..., D) -> (..., D), with the key names of CLIP."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Adaptor(nn.Module):
    """The residual bottleneck-free MLP that adapts a frozen layer (Prismer, section 3.2).

    Vision (`late=False`): x + up(relu(down(norm(x)))^2). Text (`late=True`): norm(x + up(relu(down(x))^2)).
    Both D -> D -> D with biases, no gate.
    """

    def __init__(self, width: int, *, late: bool):
        super().__init__()
        self.norm = LayerNorm(width)
        self.down = nn.Linear(width, width)
        self.up = nn.Linear(width, width)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        if self.late:
            return self.norm(x + self.up(squared_relu(self.down(x))))
        return x + self.up(squared_relu(self.down(self.norm(x))))


class PackedAttention(nn.Module):
    """Multi-head attention with query, key and value in one matrix: the keys of `nn.MultiheadAttention`, batch first.

    No mask, no dropout: what the vision side uses.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections, zero biases (the framework's default for attention)."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, N, D) queries; context: (B, M, D) keys and values, `x` itself if None. Returns (B, N, D)."""
        width = x.shape[-1]
        if context is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
            k, v = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h k) -> b h n k", h=self.heads) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(out, "b h n k -> b n (h k)"))


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
