"""Id maps to features, and instance rows: pytest benchmarks/test_label_map.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import contenders_on, refuse_if_worse, time_contenders
from prismer.kernels.label_map import label_map

SHAPES = {"BASE B2": (2, 56), "LARGE B2": (2, 64), "BASE B8": (8, 56)}
SIDE, IDS = 224, 20


def regions(B):
    """Maps of some twenty regions, as a segmentation gives."""
    centres = torch.rand(B, IDS, 2) * SIDE
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).float()
    distance = (grid[None, :, :, None] - centres[:, None, None]).square().sum(-1)
    return distance.argmin(-1).to(torch.uint8)


def paint(ids, rows, features, size):
    """What the published system does on the host: a mask and a scatter for each id, 64 channels, then the resize."""
    B, h, w = ids.shape
    out = torch.zeros(B, features.shape[1], h, w, dtype=features.dtype, device=ids.device)
    for b in range(B):
        for i in ids[b].unique().tolist():
            out[b][:, ids[b] == i] = features[rows[b, i]][:, None]
    return F.interpolate(out, (size, size), mode="bilinear", align_corners=True)


def gather(ids, rows, features, size):
    """The same without the loop: one gather at full resolution, then the resize."""
    batch = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
    full = features[rows[batch, ids.long()]].permute(0, 3, 1, 2)
    return F.interpolate(full, (size, size), mode="bilinear", align_corners=True)


def calls(B, size):
    rows = torch.randint(0, 133, (B, 256))
    functions = dict(ours=label_map, eager=paint, gather=gather)
    return contenders_on([regions(B), rows, torch.randn(133, 64), size], functions)


@pytest.mark.parametrize("shape", SHAPES)
def test_label_map(benchmark, shape, dtype, part, everything, compiled):
    B, size = SHAPES[shape]
    if B == 8 and part == "forward+backward" and not everything:
        pytest.skip("the gradient of painting takes seconds a round on a CPU; --full runs it")
    refuse_if_worse(calls(1, size), dtype, part)
    time_contenders(
        benchmark,
        compiled(calls(B, size)(dtype), False),
        room="label_map",
        shape=shape,
        dtype=dtype,
        part=part,
        bytes_moved=B * (size * size * 64 * dtype.itemsize + 4 * size * size),
        seconds=0.7,
    )
