"""Expert label -> patch tokens: the convolution stems, and the bicubic resize of positions.

Source: Prismer, arXiv:2303.02506, section 3.2; sizes and resizes are those of the released code (docs/architecture.md).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.batch import ImageBatch
from prismer.batch_norm import GlobalBatchNorm2d, norm_relu_conv
from prismer.experts import EXPERTS
from prismer.kernels.label_map import label_map

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_constants: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _clip_constants(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's mean and standard deviation (3, 1, 1); copied to a GPU once, since the host waits for such a copy."""
    # in a trace they become constants of the graph, and must not outlive it
    lasting = type(rgb) is Tensor and not torch.compiler.is_compiling()
    if lasting and rgb.device in _constants:
        return _constants[rgb.device]
    # a tensor made in inference mode could not be used in training
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    if lasting:
        _constants[rgb.device] = mean, std
    return mean, std


def normalise_rgb(rgb: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, h, w) uint8 -> the same shape in `dtype`, channels last, with CLIP's mean and standard deviation."""
    mean, std = _clip_constants(rgb)
    return (_as_floats(rgb) / 255).sub_(mean).div_(std).to(dtype)


def normalise_low_level(label: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, s, s) uint8 -> [-1, 1] in `dtype`: min-max per sample, jointly over channels; a constant map is -1.

    The result is channels last.
    """
    x = _as_floats(label) / 255
    low, high = torch.aminmax(x.flatten(1), dim=1, keepdim=True)
    span = (high - low).add_(1e-6)
    return x.sub_(low[..., None, None]).mul_(2).div_(span[..., None, None]).sub_(1).to(dtype)


def _as_floats(pixels: Tensor) -> Tensor:
    # channels last from here on, as label_map's features are: convolutions need no copy, and the tokens (B, N, D) are a
    # view of the last map
    return pixels.to(torch.float32, memory_format=torch.channels_last)


class ExpertStem(nn.Module):
    """Four 3x3 convolutions with batch norm and ReLU, then a 1x1: (B, planes, s, s) uint8 -> (B, D, g, g).

    Low-level labels are resized to s*16/patch px and halved four times; ids become 64 features per pixel at s*4/patch
    px and are halved twice. Resizes are bilinear with align_corners=True. Maps are channels last.

    It is no leaf for ZeRO-3: none of its inputs needs a gradient, and then DeepSpeed 0.19.8 reduces a leaf too early.
    """

    def __init__(self, expert: str, width: int, patch_size: int, label_size: int):
        super().__init__()
        self.is_ids = EXPERTS[expert].is_ids
        self.size = label_size * (4 if self.is_ids else 16) // patch_size
        strides = (2, 2, 1, 1) if self.is_ids else (2, 2, 2, 2)
        channels = (EXPERTS[expert].channels, width // 8, width // 4, width // 2, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=strides[i], padding=1, bias=False) for i in range(4)
        )
        self.norms = nn.ModuleList(GlobalBatchNorm2d(c) for c in channels[1:])
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, label: Tensor, rows: Tensor | None, features: Tensor) -> Tensor:
        """label: (B, planes, s, s) uint8; rows: (B, 256) and features: (F, 64) for ids. Returns (B, D, g, g)."""
        return run_stems([self], [(label, rows, features)])[0]

    def layers(self) -> list[tuple[GlobalBatchNorm2d, nn.Conv2d]]:
        """The four norms, each with the convolution after its ReLU."""
        return list(zip(self.norms, (*self.convs[1:], self.project), strict=True))

    def expand(self, label: Tensor, rows: Tensor | None, features: Tensor) -> Tensor:
        """(B, channels, size, size): the features of ids, or intensities in [-1, 1]."""
        dtype = self.project.weight.dtype
        if self.is_ids:
            return label_map(label[:, 0], rows, features.to(dtype), self.size)
        x = normalise_low_level(label, dtype)
        if x.shape[-1] == self.size:
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=True)


class Stems(nn.ModuleDict):
    """The stems of RGB ("rgb") and of all experts, by name; as a whole it runs those of the experts."""

    def forward(self, images: ImageBatch, experts: Sequence[str]) -> list[Tensor]:
        """The maps (B, D, g, g) of `experts`, in their order."""
        stems = [self[expert] for expert in experts]
        labels = [(images.labels[expert], images.rows.get(expert), images.features) for expert in experts]
        return run_stems(stems, labels)


def run_stems(stems: Sequence[ExpertStem], labels: Sequence[tuple[Tensor, Tensor | None, Tensor]]) -> Sequence[Tensor]:
    """The maps of several stems, which run side by side: the layers of one depth share a node and its messages."""
    maps: Sequence[Tensor] = [stem.convs[0](stem.expand(*label)) for stem, label in zip(stems, labels, strict=True)]
    for layers in zip(*(stem.layers() for stem in stems), strict=True):
        maps = norm_relu_conv(layers, maps)
    return maps


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A (g*g, D) positional table bicubically resized to (grid*grid, D): align_corners False, no antialias."""
    side = round(table.shape[0] ** 0.5)
    if side == grid:
        return table
    if torch.are_deterministic_algorithms_enabled():
        # on a GPU the gradient of the resize is added in any order, and torch refuses it; the resize is a product, too
        one_hot = torch.eye(side * side, device=table.device).view(1, -1, side, side)
        weights = F.interpolate(one_hot, size=(grid, grid), mode="bicubic", align_corners=False)
        return weights[0].flatten(1).mT.to(table.dtype) @ table
    image = table.T.reshape(1, -1, side, side)
    resized = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T
