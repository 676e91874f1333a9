"""Products for attention that uses one matrix as the keys and values of all heads, without projecting it.

Where queries are few and keys many, W_k moves to the queries, q_h . (W_k,h x_n) = (W_k,h^T q_h) . x_n, and W_v moves
behind the sum over the keys, sum_n p_n W_v,h x_n = W_v,h (sum_n p_n x_n). Both follow from associativity. A query that
has absorbed W_k is as wide as x. Used by `resampler_attention` and `cross_attention`.

Shapes: B images of M queries are R = B * M rows; D is the width of the H heads side by side, K = D / H that of one, E
that of x. Absorbed rows lie (H, R, E), so that each head is one product with its slice of a weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prismer.kernels import matmul

# numbers of a tensor that stays in a core's cache beside two others: 512 kB in fp32
_CACHED = 2**17


def heads_to_context(rows: Tensor, weight: Tensor, num_heads: int, scale: float) -> Tensor:
    """(R, D) -> (H, R, E): each head of the rows, times its (K, E) slice of `weight` (D, E), times `scale`."""
    heads, slices = rows.unflatten(1, (num_heads, -1)).transpose(0, 1), weight.unflatten(0, (num_heads, -1))
    out = rows.new_empty(num_heads, rows.shape[0], weight.shape[1])
    return torch.baddbmm(out, heads, slices, beta=0, alpha=scale)


def context_to_heads(absorbed: Tensor, weight: Tensor, scale: float) -> Tensor:
    """(H, R, E) -> (R, D): each head, times its slice of `weight` (D, E) transposed, times `scale`."""
    H, R, _ = absorbed.shape
    slices = weight.unflatten(0, (H, -1)).mT
    heads = torch.baddbmm(absorbed.new_empty(H, R, slices.shape[2]), absorbed, slices, beta=0, alpha=scale)
    return heads.transpose(0, 1).reshape(R, weight.shape[0])


def weight_gradient(rows: Tensor, absorbed: Tensor, scale: float, out: Tensor) -> None:
    """Fill `out` (D, E) with the weight's gradient of either product, from (R, D) rows and (H, R, E) absorbed ones."""
    H = absorbed.shape[0]
    heads, out = rows.unflatten(1, (H, -1)).permute(1, 2, 0), out.unflatten(0, (H, -1))
    torch.baddbmm(out, heads, absorbed, beta=0, alpha=scale, out=out)


def image_slices(x: Tensor, numbers: int) -> Iterator[slice]:
    """The images of `x` (B, ...) in steps: on a CPU so few that their scores stay in the cache; else all.

    Args:
        numbers: the largest tensor that one image makes, such as its scores, has so many.
    """
    B = x.shape[0]
    step = max(1, _CACHED // max(1, numbers) if x.device.type == "cpu" else B)
    return (slice(i, min(i + step, B)) for i in range(0, B, step))


def take_images(absorbed: Tensor, B: int, images: slice) -> Tensor:
    """(H, B * M, E) -> contiguous (n, H * M, E) of some images."""
    H, R, E = absorbed.shape
    return absorbed.view(H, B, R // B, E)[:, images].transpose(0, 1).reshape(-1, H * (R // B), E)


def put_images(rows: Tensor, absorbed: Tensor, B: int, images: slice) -> None:
    """The way back: copy (n, H * M, E) of some images into `absorbed` (H, B * M, E)."""
    H, R, E = absorbed.shape
    absorbed.view(H, B, R // B, E)[:, images] = rows.view(-1, H, R // B, E).transpose(0, 1)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.bmm` of n images; a single image is multiplied by the fastest library."""
    if len(a) == 1 and not matmul.torch_multiplies(a, b.shape[2]):
        result = matmul.mm(a[0], b[0])[None]
        return result if out is None else out.copy_(result)
    return torch.bmm(a, b, out=out)
