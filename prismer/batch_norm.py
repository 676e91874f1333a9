"""Batch norm for the expert stems: statistics over all ranks, and an op that keeps half of what torch would keep.

The layers that other models share with Prismer are in prismer/kernels/modules.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def _torch_is_exact(x: Tensor) -> bool:
    """Whether torch's own batch norm of a map (B, C, h, w) has accurate statistics.

    On a CPU torch adds the pixels of a channels-last fp32 map one after another in fp32; other maps it sums in float64.
    For maps with large even regions, such as the experts', this moved the mean by 1e-4 of a standard deviation. At
    BASE's sizes the error of the stems' outputs was 1.2e-5 instead of 2e-6, and ReLUs near zero flipped, each of which
    changes a gradient by 1e-3. `_own_moments` sums in pairs.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return not (x.is_cpu and x.dtype == torch.float32 and channels_last)


def _own_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of a map (B, C, h, w), at least in fp32, of this rank's images."""
    pixels = _at_least_fp32(x).permute(0, 2, 3, 1).flatten(0, 2)
    mean = pixels.mean(0)
    return mean, (pixels - mean).square_().mean(0)


def _moments_of_all_ranks(maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance (C,) of each map, of the images of all ranks; every rank holds the same number of them."""
    own = [_own_moments(x) for x in maps]
    world = _world_size()
    if world == 1:
        return own
    # one message for all maps: a row for each rank
    joined = torch.cat([moment for pair in own for moment in pair])
    ranks = joined.new_zeros(world, len(joined))
    ranks[dist.get_rank()] = joined
    dist.all_reduce(ranks)
    parts = ranks.split([len(moment) for pair in own for moment in pair], dim=1)
    found = []
    for means, variances in zip(parts[::2], parts[1::2], strict=True):
        mean = means.mean(0)
        found.append((mean, (variances + (means - mean).square()).mean(0)))
    return found


def _norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    eps: float,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu of a batch norm by the batch's statistics; returns it with the moments, or torch's mean and 1 / deviation.

    Args:
        moments: mean and variance; None if torch forms the statistics, alike at every call.
        running: running mean and variance that torch updates if it forms the statistics.
    """
    if moments is None:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        return y.relu_(), mean, rstd
    y, *_ = torch.native_batch_norm(x, weight, bias, *moments, False, 0.0, eps)
    return y.relu_(), *moments


def _update_running(norms: Sequence["GlobalBatchNorm2d"], moments: Sequence[tuple], counts: Sequence[int]) -> None:
    """Move the running statistics towards those of a batch of `counts` pixels."""
    means, variances = zip(*moments, strict=True)
    momentum = norms[0].momentum
    torch._foreach_lerp_([norm.running_mean for norm in norms], means, momentum)
    torch._foreach_mul_([norm.running_var for norm in norms], 1 - momentum)
    for norm, variance, count in zip(norms, variances, counts, strict=True):
        norm.running_var.add_(variance, alpha=momentum * count / max(1, count - 1))


class _NormReLUConvs(torch.autograd.Function):
    """conv(relu(batch_norm(x))) of several training maps; the backward pass forms the ReLUs' outputs again.

    Only the maps are kept. A ReLU would keep its output for its own gradient, and a convolution for that of its kernel.
    In several processes there is one message forward and one backward, whatever the number of maps.
    """

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[tuple["GlobalBatchNorm2d", nn.Conv2d]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """`tensors`: map, weight, bias and kernel of each layer."""
        norms, maps = [norm for norm, _ in layers], tensors[::4]
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        world = _world_size()
        ctx.torch_forms = world == 1 and all(map(_torch_is_exact, maps))
        moments: Sequence = [None] * len(maps) if ctx.torch_forms else _moments_of_all_ranks(maps)
        if not ctx.torch_forms:
            _update_running(norms, moments, [world * x.numel() // x.shape[1] for x in maps])
        weights, biases = _cast_together(tensors[1::4], torch.float32), _cast_together(tensors[2::4], torch.float32)
        outputs, saved = [], []
        for i, (norm, conv) in enumerate(layers):
            x, kernel = tensors[4 * i], tensors[4 * i + 3]
            affine, running = (weights[i], biases[i]), (norm.running_mean, norm.running_var)
            a, *pair = _norm_relu(x, *affine, moments[i], norm.eps, running, norm.momentum)
            outputs.append(F.conv2d(a, kernel, None, conv.stride, conv.padding))
            saved += [x, *affine, kernel, *pair]
        ctx.save_for_backward(*saved)
        ctx.dtype = tensors[1].dtype
        ctx.layers = [(norm.eps, conv.stride, conv.padding) for norm, conv in layers]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        world, saved = _world_size(), ctx.saved_tensors
        rstds = saved[5::6]
        if not ctx.torch_forms:
            rstds = torch._foreach_add(rstds, [eps for eps, _, _ in ctx.layers])
            torch._foreach_rsqrt_(rstds)
        grads: list[Tensor | None] = [None]
        # layers whose sums over the ranks are still to come
        waiting: list[tuple] = []
        for i, (eps, stride, padding) in enumerate(ctx.layers):
            x, weight, bias, kernel, mean, variance = saved[6 * i : 6 * i + 6]
            rstd = rstds[i]
            *needs_norm, needs_kernel = ctx.needs_input_grad[1 + 4 * i : 5 + 4 * i]
            a, *_ = _norm_relu(x, weight, bias, None if ctx.torch_forms else (mean, variance), eps)
            # stride, padding, dilation, whether transposed, output padding, groups
            geometry = (stride, padding, (1, 1), False, (0, 0), 1)
            needs = (any(needs_norm), needs_kernel, False)
            da, dkernel, _ = torch.ops.aten.convolution_backward(dys[i], a, kernel, None, *geometry, needs)
            dx = dweight = dbias = None
            if da is not None:
                da = torch.ops.aten.threshold_backward(da, a, 0)
                if world == 1:
                    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                        da, x, weight, None, None, mean, rstd, True, eps, needs_norm
                    )
                else:
                    dbias = da.sum((0, 2, 3), dtype=mean.dtype)
                    dweight = _standardised(x, mean, rstd).mul_(da).sum((0, 2, 3))
                    if needs_norm[0]:
                        waiting.append((len(grads), da, x, mean, rstd, weight, torch.stack((dbias, dweight))))
            grads += [dx, dweight if needs_norm[1] else None, dbias if needs_norm[2] else None, dkernel]
        affine = [i for i, gradient in enumerate(grads) if gradient is not None and i % 4 in (2, 3)]
        for i, gradient in zip(affine, _cast_together([grads[i] for i in affine], ctx.dtype), strict=True):
            grads[i] = gradient
        for place, dx in _input_gradients(waiting, world):
            grads[place] = dx
        return tuple(grads)


def _cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Vectors in `dtype`, or in float64 if they are, cast by one operator."""
    if all(tensor.dtype in (dtype, torch.float64) for tensor in tensors):
        return tensors
    return torch.cat(list(tensors)).to(dtype).split([len(tensor) for tensor in tensors])


def _standardised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (_at_least_fp32(x) - mean[:, None, None]).mul_(rstd[:, None, None])


def _input_gradients(waiting: list[tuple], world: int) -> Iterator[tuple[int, Tensor]]:
    """The gradients of maps whose statistics span all ranks, from the sums of this rank: one message for all.

    Args:
        waiting: for each map: the place of its gradient, which is returned with it; the gradient of the norm's output,
            the map, mean, 1 / deviation, weight, and the sums (2, C) of the gradients of bias and weight.
    """
    if not waiting:
        return
    own = [sums for *_, sums in waiting]
    total = torch.cat(own, dim=1)
    dist.all_reduce(total)
    parts = total.split([sums.shape[1] for sums in own], dim=1)
    for (place, da, x, mean, rstd, weight, _), sums in zip(waiting, parts, strict=True):
        dmean, dscale = (sums / (world * x.numel() // x.shape[1]))[..., None, None]
        dx = _standardised(x, mean, rstd).mul_(dscale).add_(dmean).neg_().add_(da)
        yield place, dx.mul_((weight * rstd)[:, None, None]).to(x.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# whether this rank does by itself what no other rank does, see `without_other_ranks`
_is_alone = False


@contextmanager
def without_other_ranks() -> Iterator[None]:
    """In the block the statistics are those of this rank: what one rank does by itself must not wait for the others."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def _world_size() -> int:
    if _is_alone:
        return 1
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


def norm_relu_conv(layers: Sequence[tuple[GlobalBatchNorm2d, nn.Conv2d]], maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """conv(relu(norm(x))) of several maps, each with layers of its own; eager training keeps only the maps."""
    # a changed convolution must be called; hooks that only gather its weight need not run
    plain = all(type(conv) is nn.Conv2d and not has_foreign_hooks(conv) for _, conv in layers)
    if not (plain and layers[0][0].training) or torch.compiler.is_compiling():
        return [conv(F.relu(norm(x))) for (norm, conv), x in zip(layers, maps, strict=True)]
    tensors = [
        tensor
        for (norm, conv), x in zip(layers, maps, strict=True)
        for tensor in (x, norm.weight, norm.bias, conv.weight)
    ]
    return _NormReLUConvs.apply(layers, *tensors)
