"""Label map: uint8 ids -> 64 numbers per pixel -> bilinear resize, never at full resolution.

    out[b, :, i, j] = sum over 4 taps of w_tap * features[rows[b, ids[b, y_tap, x_tap]]]

The resize keeps corners (`align_corners=True`): output i samples source i * (h - 1) / (size - 1).
Only the four taps of an output are read, a quarter of a 224 px map at size 56, and the 64-channel
map that they are taken from never exists. Source: Prismer, arXiv:2303.02506, section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.dispatch import backend_for, native_missing


def label_map_reference(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    """The definition: expand every pixel, then resize. Shapes as in `label_map`."""
    batch = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
    expanded = features[rows[batch, ids.long()]].permute(0, 3, 1, 2)  # (B, C, h, w)
    if ids.shape[1:] == (size, size):
        return expanded
    return F.interpolate(expanded, (size, size), mode="bilinear", align_corners=True)


def _taps(
    source: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions (2, size) int64 and weights (2, size) of the two taps along one axis."""
    # integers: exact whatever the sizes, where an fp32 position may land just below a whole pixel
    scaled = torch.arange(size, device=device) * (source - 1)
    steps = max(size - 1, 1)
    low = scaled.div(steps, rounding_mode="floor")
    upper = (scaled - low * steps).to(dtype) / steps
    return torch.stack((low, (low + 1).clamp_(max=source - 1))), torch.stack((1 - upper, upper))


def _gather_plan(ids: Tensor, rows: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and weights of each output pixel's taps, (B*size*size, 4), or 1 tap without a resize."""
    B, h, w = ids.shape
    if (h, w) == (size, size):
        index = rows.gather(1, ids.flatten(1).long())
        return index.reshape(-1, 1), torch.ones(index.numel(), 1, dtype=dtype, device=ids.device)
    y, weight_y = _taps(h, size, dtype, ids.device)
    x, weight_x = _taps(w, size, dtype, ids.device)
    position = y.t()[:, None, :, None] * w + x.t()[None, :, None, :]  # (size, size, 2, 2)
    weight = weight_y.t()[:, None, :, None] * weight_x.t()[None, :, None, :]
    index = rows.gather(1, ids.flatten(1).index_select(1, position.reshape(-1)).long())
    return index.reshape(-1, 4), weight.reshape(-1, 4).repeat(B, 1)


def _forward_torch(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    """The weighted sum of taps as an embedding bag, which reads the taps without storing them."""
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    index, weight = _gather_plan(ids, rows, size, compute)
    # contiguous, or it leaves its fast path
    table = features.to(compute).contiguous()
    out = F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
    return out.to(features.dtype).view(ids.shape[0], size, size, features.shape[1])


class LabelMapFunction(torch.autograd.Function):
    """`label_map` with its gradient: only `features` may require one."""

    @staticmethod
    def forward(
        ctx, ids: Tensor, rows: Tensor, features: Tensor, size: int, backend: str
    ) -> Tensor:
        ctx.save_for_backward(ids, rows)
        ctx.size, ctx.table = size, features.shape
        if backend == "native":
            out = torch.ops.prismer.label_map(ids, rows, features, size)
        else:
            out = _forward_torch(ids, rows, features, size)
        # (B, size, size, C) in memory: channels_last, as the convolution that follows wants it
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not ctx.needs_input_grad[2]:
            return None, None, None, None, None
        ids, rows = ctx.saved_tensors
        count, width = ctx.table
        compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
        index, weight = _gather_plan(ids, rows, ctx.size, compute)
        dy_rows = dy.permute(0, 2, 3, 1).reshape(-1, width).to(compute)
        dfeatures = torch.zeros(count, width, dtype=compute, device=dy.device)
        for tap in range(index.shape[1]):
            # adds up in a fixed order on every device, where index_add uses atomics on CUDA
            dfeatures += torch.ops.aten.embedding_dense_backward(
                dy_rows * weight[:, tap, None], index[:, tap].contiguous(), count, -1, False
            )
        return None, None, dfeatures.to(dy.dtype), None, None


def label_map(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    """Look up each pixel's features and resize bilinearly with `align_corners=True`.

    Waits for no device. `size == h == w` is a plain lookup.

    Args:
        ids: (B, h, w) uint8, the stored map; 255 is background by convention of the tables.
        rows: (B, 256) int64: for each id, its row of `features`; every entry within the table.
        features: (F, C), any floating dtype, C is 64 in Prismer; may require a gradient.
        size: side of the output in pixels.

    Returns:
        (B, C, size, size) in the dtype of `features`, channels_last in memory; summed in fp32
        (float64 for float64).

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    if ids.dtype != torch.uint8 or ids.dim() != 3:
        raise ValueError(
            f"ids are {ids.dtype} of shape {tuple(ids.shape)}; pass uint8 of shape (B, h, w)"
        )
    if rows.dtype != torch.int64 or rows.shape != (ids.shape[0], 256):
        raise ValueError(
            f"rows are {rows.dtype} of shape {tuple(rows.shape)}; "
            f"pass int64 of shape ({ids.shape[0]}, 256)"
        )
    if not features.is_floating_point() or features.dim() != 2:
        raise ValueError(
            f"features are {features.dtype} of shape {tuple(features.shape)}; "
            f"pass floats of shape (F, C)"
        )
    if size < 1 or ids.shape[1] < 1 or ids.shape[2] < 1:
        raise ValueError(
            f"cannot resize a map of {tuple(ids.shape[1:])} to side {size}; "
            f"both need at least one pixel"
        )
    if not ids.device == rows.device == features.device:
        raise ValueError(
            f"ids, rows and features are on {ids.device}, {rows.device} and {features.device}; "
            f"move them to one device"
        )
    backend = backend_for("label_map", ids.device)
    if backend == "reference":
        return label_map_reference(ids, rows, features, size)
    return LabelMapFunction.apply(ids, rows, features, size, backend)


if native_missing() is None:

    @torch.library.register_fake("prismer::label_map")
    def _(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
        return features.new_empty(ids.shape[0], size, size, features.shape[1])
