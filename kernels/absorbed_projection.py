"""Products for attention that takes one matrix for the keys and values of all heads, without projecting it.

Where queries are few and keys many, W_k goes to the queries, q_h . (W_k,h x_n) = (W_k,h^T q_h) . x_n, and W_v behind
the sum over the keys, sum_n p_n W_v,h x_n = W_v,h (sum_n p_n x_n): an absorbed query is as wide as x. Source:
associativity. The rooms are `resampler_attention.py` and `cross_attention.py`. Rows are (images * queries, width);
absorbed ones lie (H, rows, width of x), so that each head is one product with its slice of a weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prismer.kernels import matmul


def absorb(rows: Tensor, weight: Tensor, H: int, scale: float) -> Tensor:
    """(R, D) rows of H heads, each times its (K, E) slice of `weight` (D, E), times `scale` -> (H, R, E)."""
    heads, slices = rows.unflatten(1, (H, -1)).transpose(0, 1), weight.unflatten(0, (H, -1))
    a = rows.new_empty(H, rows.shape[0], weight.shape[1])
    return torch.baddbmm(a, heads, slices, beta=0, alpha=scale)


def release(a: Tensor, weight: Tensor, scale: float) -> Tensor:
    """The transpose of `absorb`: (H, R, E), each head times its slice of `weight` (D, E), transposed -> (R, D)."""
    H, R, _ = a.shape
    slices = weight.unflatten(0, (H, -1)).mT
    heads = torch.baddbmm(a.new_empty(H, R, slices.shape[2]), a, slices, beta=0, alpha=scale)
    return heads.transpose(0, 1).reshape(R, weight.shape[0])


def absorb_weight(rows: Tensor, a: Tensor, scale: float, out: Tensor) -> None:
    """The weight's gradient of `absorb`: (R, D) rows of H heads and (H, R, E) -> `out` (D, E)."""
    H = a.shape[0]
    heads, out = rows.unflatten(1, (H, -1)).permute(1, 2, 0), out.unflatten(0, (H, -1))
    torch.baddbmm(out, heads, a, beta=0, alpha=scale, out=out)


def steps(x: Tensor) -> Iterator[slice]:
    """The images of `x` (B, ...): on the CPU one at a time, so that its scores stay in the cache; elsewhere all."""
    B = x.shape[0]
    step = 1 if x.device.type == "cpu" else max(B, 1)
    return (slice(i, min(i + step, B)) for i in range(0, B, step))


def rows_of_images(a: Tensor, B: int, images: slice) -> Tensor:
    """(H, B * M, E) -> contiguous (n, H * M, E) of some images."""
    H, R, E = a.shape
    return a.view(H, B, R // B, E)[:, images].transpose(0, 1).reshape(-1, H * (R // B), E)


def store_rows(total: Tensor, a: Tensor, B: int, images: slice) -> None:
    """The way back: (n, H * M, E) of some images into `a` (H, B * M, E)."""
    H, R, E = a.shape
    a.view(H, B, R // B, E)[:, images] = total.view(-1, H, R // B, E).transpose(0, 1)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.bmm` of (n, ., .) images, of one image on the fastest library."""
    if len(a) == 1 and matmul.on_onednn(a):
        result = matmul.mm(a[0], b[0])[None]
        return result if out is None else out.copy_(result)
    return torch.bmm(a, b, out=out)
