"""Label map: uint8 ids -> 64 numbers per pixel -> bilinear resize, never at full resolution.

    out[b, :, i, j] = sum over 4 taps of w_tap * features[rows[b, ids[b, y_tap, x_tap]]]
    dfeatures[f] = sum over pixels and taps whose row is f of w_tap * dy[b, :, i, j]

The resize keeps corners (`align_corners=True`): output i samples source i * (h - 1) / (size - 1). Only the four taps of
each output are read, a quarter of a 224 px map at size 56, and the 64-channel map at full size never exists. Where the
four taps name one row, `native` and `triton` return that row, not a sum with weights that add up to nearly 1.
Source: Prismer, arXiv:2303.02506, section 3.2.

`rows` maps the ids of each image to rows of one table of features, for each kind of label:
    segmentation  ids are classes of one table: rows[b, id] = first + id, the same in every image
    objects       ids are instances, numbered in each image anew: rows[b, id] = first + class of instance id of image b
    words         ids are words read in image b: rows[b, id] = the row of that word among the words of the batch
The background, 255, is an id like any other: its row holds the features of "nothing here". Crop and flip are not fused:
the loader applies both, to image and labels alike, before it hands over the ids.

If an entry of `rows` is outside the table, `native` and `torch` raise on the CPU. On a GPU, where raising would wait
for the device, `native` and `triton` read nothing and write NaN, and such a tap adds to no gradient.

Traffic of the Triton kernels, for P = B * size * size pixels, E of which blend, C <= 64 numbers of s bytes each:
    forward   reads 36 P (4 ids of 1 byte and their rows of 8) + C s (P + 3 E), writes C s P
    backward  a program owns 64 rows of the table and a part of the pixels, which it takes 32 at a time. It multiplies a
              (64, 32) matrix of weights by the (32, 64) of dy where a pixel names one of its rows, and skips a tile
              where none does. With N such tiles of T pixels, summed over programs: 2 * 64 * 32 * 64 N FLOPs;
              reads 36 P for every 64 rows of the table + C s T, writes 4 C F for each of G parts, which are then read
              and added up in order, and 4 C F (if G is 1, only the last). No atomics and no sort. G is at most 64, and
              G F C at most 4 M, by shapes alone.
Above 64 numbers per row, ids and rows are read once for every 64.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.checks import described
from prismer.kernels.dispatch import NATIVE, TORCH, Backend, Op, runs_directly
from prismer.kernels.launch import Constants, cdiv, kept, launch, next_power_of_2


def label_map_reference(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    """The definition: expand every pixel, then resize. Shapes as in `label_map`."""
    batch = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
    expanded = features[rows[batch, ids.long()]].permute(0, 3, 1, 2)  # (B, C, h, w)
    if ids.shape[1:] == (size, size):
        return expanded
    return F.interpolate(expanded, (size, size), mode="bilinear", align_corners=True)


def _too_large(like: Tensor, ids: Tensor, size: int) -> str | None:
    if max(size * max(ids.shape[1:]), ids.shape[0] * size * size) >= 2**31:
        return "triton label_map counts pixels in 32 bits, and these are too many"
    return None


TRITON = Backend(name="triton", devices=("cuda",), float64=False, refuses=_too_large)
OP = Op(name="label_map", reference=label_map_reference, backends=(NATIVE, TRITON, TORCH))


# Triton


@triton.jit
def _tap(i, source, steps):
    """Where output i reads along one axis: two positions, equal at a whole pixel, and the weight of the second."""
    # integers are exact, whatever the sizes; an fp32 position could be just below a whole pixel
    scaled = i * (source - 1)
    low = scaled // steps
    rest = scaled - low * steps
    return low, low + (rest > 0).to(tl.int32), rest.to(tl.float32) / steps


@triton.jit
def _row(p_ids, p_rows, o_image, o_id, m_pixel, F):
    """The row of one tap of each pixel; -1 if the table has no such row."""
    b_id = tl.load(p_ids + o_id, mask=m_pixel, other=0).to(tl.int32)
    b_row = tl.load(p_rows + o_image * 256 + b_id, mask=m_pixel, other=-1)
    return tl.where((b_row >= 0) & (b_row < F), b_row, -1)


@triton.jit
def _taps(p_ids, p_rows, o_pixel, m_pixel, h, w, F, size, steps):
    """The rows of the four taps of pixels o_pixel of (B, size, size), and the weights of the second line and column."""
    o_image = (o_pixel // (size * size)).to(tl.int64)
    low_y, high_y, b_y = _tap(o_pixel // size % size, h, steps)
    low_x, high_x, b_x = _tap(o_pixel % size, w, steps)
    o_top = (o_image * h + low_y) * w
    o_bottom = (o_image * h + high_y) * w
    b_00 = _row(p_ids, p_rows, o_image, o_top + low_x, m_pixel, F)
    b_01 = _row(p_ids, p_rows, o_image, o_top + high_x, m_pixel, F)
    b_10 = _row(p_ids, p_rows, o_image, o_bottom + low_x, m_pixel, F)
    b_11 = _row(p_ids, p_rows, o_image, o_bottom + high_x, m_pixel, F)
    return b_00, b_01, b_10, b_11, b_y, b_x


@triton.jit
def _load_rows(p_features, b_row, o_col, m_wanted, m_col, C):
    """(BP, BC) features in fp32; NaN for a row that the table does not have."""
    m = (m_wanted & (b_row >= 0))[:, None] & m_col[None, :]
    o = b_row[:, None] * C + o_col[None, :]
    return tl.load(p_features + o, mask=m, other=float("nan")).to(tl.float32)


# sizes of maps and images cost no variants: only rows of C numbers are read as vectors
_SIZES = ["P", "h", "w", "F", "size", "steps", "tiles"]


@triton.jit(do_not_specialize=_SIZES[:-1])
def _forward_kernel(p_ids, p_rows, p_features, p_out, P, h, w, F, C, size, steps, BP: tl.constexpr, BC: tl.constexpr):
    o_pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    o_col = tl.program_id(1) * BC + tl.arange(0, BC)
    m_pixel, m_col = o_pixel < P, o_col < C
    b_00, b_01, b_10, b_11, b_y, b_x = _taps(p_ids, p_rows, o_pixel, m_pixel, h, w, F, size, steps)
    # most pixels lie inside one region of a label map: nothing to read twice, nothing to blend
    m_blend = m_pixel & ((b_00 != b_01) | (b_00 != b_10) | (b_00 != b_11))
    b_out = _load_rows(p_features, b_00, o_col, m_pixel, m_col, C)
    b_blend = ((1 - b_y) * (1 - b_x))[:, None] * b_out
    b_blend += ((1 - b_y) * b_x)[:, None] * _load_rows(p_features, b_01, o_col, m_blend, m_col, C)
    b_blend += (b_y * (1 - b_x))[:, None] * _load_rows(p_features, b_10, o_col, m_blend, m_col, C)
    b_blend += (b_y * b_x)[:, None] * _load_rows(p_features, b_11, o_col, m_blend, m_col, C)
    b_out = tl.where(m_blend[:, None], b_blend, b_out)
    o = o_pixel.to(tl.int64)[:, None] * C + o_col[None, :]
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m_pixel[:, None] & m_col[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    p_dy,
    p_ids,
    p_rows,
    p_partial,
    P,
    h,
    w,
    F,
    C,
    size,
    steps,
    tiles,
    BF: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Program (f, c, g) sums its BF rows and BC columns over `tiles` tiles of BP pixels, part g of them all."""
    i_part = tl.program_id(2)
    o_row = tl.program_id(0) * BF + tl.arange(0, BF)
    o_col = tl.program_id(1) * BC + tl.arange(0, BC)
    m_col = o_col < C
    b_sum = tl.zeros((BF, BC), tl.float32)
    for i in range(tiles):
        o_pixel = (i_part * tiles + i) * BP + tl.arange(0, BP)
        m_pixel = o_pixel < P
        b_00, b_01, b_10, b_11, b_y, b_x = _taps(p_ids, p_rows, o_pixel, m_pixel, h, w, F, size, steps)
        # an image names few rows, so most tiles hold no row of this program and are skipped
        first = tl.program_id(0) * BF
        m_mine = (b_00 >= first) & (b_00 < first + BF)
        m_mine |= (b_01 >= first) & (b_01 < first + BF)
        m_mine |= (b_10 >= first) & (b_10 < first + BF)
        m_mine |= (b_11 >= first) & (b_11 < first + BF)
        if tl.max(m_mine.to(tl.int32), 0) > 0:
            # a sum over pixels that share a row is a product with the matrix of their weights
            w_00, w_01 = (1 - b_y) * (1 - b_x), (1 - b_y) * b_x
            w_10, w_11 = b_y * (1 - b_x), b_y * b_x
            b_weight = tl.where(o_row[:, None] == b_00[None, :], w_00[None, :], 0.0)
            b_weight += tl.where(o_row[:, None] == b_01[None, :], w_01[None, :], 0.0)
            b_weight += tl.where(o_row[:, None] == b_10[None, :], w_10[None, :], 0.0)
            b_weight += tl.where(o_row[:, None] == b_11[None, :], w_11[None, :], 0.0)
            o = o_pixel.to(tl.int64)[:, None] * C + o_col[None, :]
            b_dy = tl.load(p_dy + o, mask=m_pixel[:, None] & m_col[None, :], other=0.0)
            b_sum = tl.dot(b_weight, b_dy.to(tl.float32), b_sum, input_precision="ieee")
    o = (i_part.to(tl.int64) * F + o_row[:, None]) * C + o_col[None, :]
    tl.store(p_partial + o, b_sum, mask=(o_row < F)[:, None] & m_col[None, :])


@triton.jit(do_not_specialize=["G"])
def _sum_parts_kernel(p_partial, p_sum, G, N, BG: tl.constexpr, BN: tl.constexpr):
    """The sum of G parts of N numbers, in a fixed order."""
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    b_sum = tl.zeros((BG, BN), tl.float32)
    for i in range(0, G, BG):
        o_part = (i + tl.arange(0, BG)).to(tl.int64)
        m = (o_part < G)[:, None] & (o < N)[None, :]
        b_sum += tl.load(p_partial + o_part[:, None] * N + o[None, :], mask=m, other=0.0)
    tl.store(p_sum + o, tl.sum(b_sum, 0), mask=o < N)


# a product in fp32 runs on the ordinary units and keeps its operands in registers: 79 here on sm_90, but all 255 and
# spills with 64 pixels and 4 warps
_BACKWARD_TILES = dict(BF=64, BP=32, num_warps=8)
_SUM_TILES = dict(BG=8, BN=128)
_MAX_PARTS = 64


def _columns(C: int) -> int:
    return min(64, max(16, next_power_of_2(C)))


def _parts(P: int, F: int, C: int) -> tuple[int, int]:
    """Parts G of the pixels and tiles of each: from the shapes alone, so that sums are the same anywhere."""
    tiles = cdiv(P, _BACKWARD_TILES["BP"])
    parts = max(1, min(_MAX_PARTS, 2**22 // (F * C)))
    each = cdiv(tiles, parts)
    return cdiv(tiles, each), each


@functools.cache
def _forward_tiles(C: int) -> Constants:
    return kept(BP=32, BC=_columns(C))


def _forward_triton(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    out, tiles = _forward_fake(ids, features, size), _forward_tiles(features.shape[1])
    if out.numel():
        (B, h, w), (F, C) = ids.shape, features.shape
        P = B * size * size
        numbers, grid = (P, h, w, F, C, size, max(size - 1, 1)), (cdiv(P, tiles["BP"]), cdiv(C, tiles["BC"]))
        launch(_forward_kernel, grid, (ids, rows, features, out), numbers, tiles)
    return out


def _backward_triton(dy: Tensor, ids: Tensor, rows: Tensor, dfeatures: Tensor) -> None:
    (B, h, w), size, (F, C) = ids.shape, dy.shape[1], dfeatures.shape
    P, BC = B * size * size, _columns(C)
    G, tiles = _parts(P, F, C)
    partial = dfeatures if G == 1 else dfeatures.new_empty(G, F, C)
    grid = (cdiv(F, _BACKWARD_TILES["BF"]), cdiv(C, BC), G)
    numbers = P, h, w, F, C, size, max(size - 1, 1), tiles
    launch(_backward_kernel, grid, (dy, ids, rows, partial), numbers, dict(BC=BC, **_BACKWARD_TILES))
    if G > 1:
        sum_parts(partial, dfeatures)


def sum_parts(partial: Tensor, total: Tensor) -> None:
    """Sum G parts (G, ...) in fp32 into `total`, in a fixed order."""
    N = total.numel()
    launch(_sum_parts_kernel, (cdiv(N, _SUM_TILES["BN"]),), (partial, total), (len(partial), N), _SUM_TILES)


# torch


def _axis_taps(source: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions (2, size) int64 and weights (2, size) of the two taps along one axis."""
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
    y, weight_y = _axis_taps(h, size, dtype, ids.device)
    x, weight_x = _axis_taps(w, size, dtype, ids.device)
    position = y.t()[:, None, :, None] * w + x.t()[None, :, None, :]  # (size, size, 2, 2)
    weight = weight_y.t()[:, None, :, None] * weight_x.t()[None, :, None, :]
    index = rows.gather(1, ids.flatten(1).index_select(1, position.reshape(-1)).long())
    return index.reshape(-1, 4), weight.reshape(-1, 4).repeat(B, 1)


def _forward_torch(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    """The weighted sum of taps as an embedding bag, which reads the taps without storing them."""
    compute = torch.promote_types(features.dtype, torch.float32)
    index, weight = _gather_plan(ids, rows, size, compute)
    # embedding_bag has a fast path for contiguous tables alone
    table = features.to(compute).contiguous()
    out = F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
    return out.to(features.dtype).view(ids.shape[0], size, size, features.shape[1])


def _backward_torch(dy: Tensor, ids: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    compute = torch.promote_types(dy.dtype, torch.float32)
    C = dy.shape[3]
    index, weight = _gather_plan(ids, rows, dy.shape[1], compute)
    dy_rows = dy.reshape(-1, C).to(compute)
    dfeatures = torch.zeros(num_rows, C, dtype=compute, device=dy.device)
    for tap in range(index.shape[1]):
        # sums in a fixed order on every device; index_add uses atomics on CUDA
        dfeatures += torch.ops.aten.embedding_dense_backward(
            dy_rows * weight[:, tap, None], index[:, tap].contiguous(), num_rows, -1, False
        )
    return dfeatures


# the registered ops


def _forward(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    return _forward_on(OP.choose(features, ids, size), ids, rows, features, size)


def _forward_on(backend: str, ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    ids, rows, features = ids.contiguous(), rows.contiguous(), features.contiguous()
    if backend == "native":
        return torch.ops.prismer_native.label_map(ids, rows, features, size)
    return (_forward_triton if backend == "triton" else _forward_torch)(ids, rows, features, size)


def _forward_fake(ids: Tensor, features: Tensor, size: int) -> Tensor:
    return features.new_empty(ids.shape[0], size, size, features.shape[1])


def _backward(dy: Tensor, ids: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    dy, ids, rows = dy.contiguous(), ids.contiguous(), rows.contiguous()
    backend = OP.choose(dy, ids, dy.shape[1])
    if backend == "native":
        return torch.ops.prismer_native.label_map_backward(dy, ids, rows, num_rows)
    if backend == "triton":
        dfeatures = _backward_fake(dy, num_rows)
        if not dy.numel():
            return dfeatures.zero_()
        if num_rows:
            _backward_triton(dy, ids, rows, dfeatures)
        return dfeatures
    return _backward_torch(dy, ids, rows, num_rows)


def _backward_fake(dy: Tensor, num_rows: int) -> Tensor:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    return dy.new_empty(num_rows, dy.shape[3], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, rows, features, _ = inputs
    ctx.num_rows, ctx.dtype = features.shape[0], features.dtype
    ctx.save_for_backward(ids, rows)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dfeatures = _label_map_backward(dy, *ctx.saved_tensors, ctx.num_rows)
    return None, None, dfeatures.to(ctx.dtype)


_label_map = OP.register(_forward, fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
_label_map_backward = OP.register(_backward, fake=_backward_fake, suffix="_backward")


# the public function


def _plan(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Callable:
    if ids.dtype != torch.uint8 or ids.dim() != 3:
        raise ValueError(f"ids are {described(ids)}; pass uint8 of shape (B, h, w)")
    if rows.dtype != torch.int64 or rows.shape != (ids.shape[0], 256):
        raise ValueError(f"rows are {described(rows)}; pass int64 of shape ({ids.shape[0]}, 256)")
    if not features.is_floating_point() or features.dim() != 2:
        raise ValueError(f"features are {described(features)}; pass floats of shape (F, C)")
    if size < 1 or ids.shape[1] < 1 or ids.shape[2] < 1:
        raise ValueError(f"cannot resize a map of {tuple(ids.shape[1:])} to side {size}; both need at least one pixel")
    if not ids.device == rows.device == features.device:
        raise ValueError(
            f"ids, rows and features are on {ids.device}, {rows.device} and {features.device}; move them to one device"
        )
    if OP.route(features) == "reference":
        return label_map_reference
    forward: Callable = _label_map
    if runs_directly(ids, rows, features):
        forward = functools.partial(_forward_on, OP.choose(features, ids, size))
    # (B, size, size, C) in memory: channels_last, as the convolution that follows wants it
    return lambda ids, rows, features, size: forward(ids, rows, features, size).permute(0, 3, 1, 2)


def label_map(ids: Tensor, rows: Tensor, features: Tensor, size: int) -> Tensor:
    """Look up each pixel's features and resize bilinearly with `align_corners=True`.

    The host does not wait for the device. `size == h == w` is a plain lookup. Autograd saves ids and rows if `features`
    require a gradient, which is summed in a fixed order.

    Args:
        ids: (B, h, w) uint8, the stored map; 255 is background by convention of the tables.
        rows: (B, 256) int64: for each id, its row of `features`; every entry within the table.
        features: (F, C), any floating dtype, C is 64 in Prismer; may require a gradient.
        size: side of the output in pixels.

    Returns:
        (B, C, size, size) in the dtype of `features`, channels_last in memory; summed in fp32 (float64 for float64).

    Raises:
        ValueError: if a shape, dtype or device does not fit.
        RuntimeError: on the CPU, if `rows` name a row that `features` do not have (on a GPU: NaN).
    """
    return OP.resolve(_plan, (ids, rows, features), size)(ids, rows, features, size)


def kernel_cases() -> list[KernelCase]:
    """What is compiled ahead of time: BASE and LARGE, 8 images, a table of 320 rows."""
    cases = []
    bf16, fp32, u8, i64 = "*bf16", "*fp32", "*u8", "*i64"
    B, side, C, F = 8, 224, 64, 320
    for model, size in (("BASE", 56), ("LARGE", 64)):
        P, BC = B * size * size, _columns(C)
        G, tiles = _parts(P, F, C)
        sizes = P, side, side, F, C, size, size - 1
        shape = f"{model}, {B} maps of {side} px, {size} x {size} x {C} each, {F} rows"
        read = 4 * P + B * 256 * 8
        cases += [
            KernelCase.of_launch(
                f"{model} label_map forward",
                _forward_kernel,
                (u8, i64, bf16, bf16, *sizes),
                dict(BP=32, BC=BC),
                shape=shape,
                bytes=read + F * C * 2 + P * C * 2,
                flops=P * C * 7,
            ),
            KernelCase.of_launch(
                f"{model} label_map backward",
                _backward_kernel,
                (bf16, u8, i64, fp32, *sizes, tiles),
                dict(BC=BC, **_BACKWARD_TILES),
                shape=shape,
                bytes=read + P * C * 2 + G * F * C * 4,
                flops=P * C * 8,
            ),
            KernelCase.of_launch(
                f"{model} label_map sum of parts",
                _sum_parts_kernel,
                (fp32, fp32, G, F * C),
                _SUM_TILES,
                shape=f"{G} x {F * C}",
                bytes=4 * (G + 1) * F * C,
                flops=G * F * C,
                vector_loads=False,
            ),
        ]
    return cases
