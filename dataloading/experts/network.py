"""The interface of an expert network: `NetworkInfo`, `load`, and `predict` on batches of one fixed size.

The labeller decodes an image once and resizes it for each network. A network normalises the uint8 pixels on its own
device and turns them into the label maps that prismer/experts.py describes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.experts.weights import Package

# mean and standard deviation of ImageNet's RGB pixels in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """What is known about a network before its weights are loaded.

    Attributes:
        name: the network's own name. A stand-in never bears the name of the network it replaces.
        expert: the expert whose maps it makes, a key of EXPERTS.
        summary: what the network is and how it makes the map, in one sentence.
        licence: licence of the weights.
        trained_on: the training data; "none" if nothing was learned.
        weights: where the weights come from by default: a hub id such as "Intel/dpt-hybrid-midas"; "fetched" (`prismer
            experts fetch` downloads them); "package" (a Python dependency contains them); "folder" (the user names
            one); or "none".
        side: the side in pixels of the square images that the network reads.
        keep_aspect: whether an image keeps its proportions. If so, it lies at the top left of the square, and the rest
            is padded with grey 114. If not, it is stretched to the square.
        inputs: the experts whose outputs the network reads. Their networks run first if they are loaded too.
        inputs_required: whether the network cannot work without its `inputs`.
    """

    name: str
    expert: str
    summary: str
    licence: str
    trained_on: str
    weights: str
    side: int
    keep_aspect: bool = False
    inputs: tuple[str, ...] = ()
    inputs_required: bool = False


@dataclass
class Images:
    """One batch as a network reads it.

    Attributes:
        pixels: (B, 3, side, side) uint8 RGB on the network's device.
        sizes: for each image (height, width) in pixels of the part that shows it, at the top left; the rest is padding.
        label_size: side in pixels of the maps to make.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    label_size: int

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass
class ExpertOutput:
    """What one expert says about one image.

    Attributes:
        plane: the map: uint8 (label_size, label_size), with a third axis of 3 for normals. It shows the whole image,
            stretched to the square.
        table: id in the map -> class index of an object, or lower-case text of a word; empty for other experts.
        boxes: id in the map -> (left, top, right, bottom, score) of an object or word, edges as fractions of the image.
    """

    plane: np.ndarray
    table: dict[int, int | str] = field(default_factory=dict)
    boxes: dict[int, tuple[float, float, float, float, float]] = field(default_factory=dict)


class Network(ABC):
    """A loaded expert network.

    Attributes:
        info: what is known about the network without its weights.
        package: what `prismer experts fetch` downloads for it; None if no registry has the weights.
        classes: the class names that the ids of a segmentation map or the table of objects refer to; [] for others.
        version: a few letters that change whenever the weights change; stored with every dataset.
    """

    info: ClassVar[NetworkInfo]
    package: ClassVar[Package | None] = None
    classes: list[str] = []
    version: str = ""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Network":
        """Read the weights.

        Args:
            source: a local folder, or a hub id if the network comes from the hub; None is `info.weights`.

        Raises:
            MissingWeights: if the weights are not on this machine.
            ValueError: if `source` holds something else.
        """

    def attach_input(self, network: "Network") -> None:  # noqa: B027 - most networks need nothing from their inputs
        """Called once for each loaded network whose expert is in `info.inputs`, before the first batch."""

    @abstractmethod
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        """Label a batch.

        Args:
            images: a batch at the network's size.
            earlier: expert -> its outputs for these images, for the experts that ran before.

        Returns:
            One output for each image. It does not depend on the rest of the batch, up to rounding.
        """


def normalise_pixels(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, 3, h, w) uint8 -> fp32: scaled to [0, 1], less `mean`, divided by `std`, for each channel."""
    mean, std = (torch.tensor(value, device=pixels.device)[:, None, None] for value in (mean, std))
    return (pixels / 255 - mean) / std


def intensity_outputs(maps: Tensor, images: Images) -> list[ExpertOutput]:
    """Convert maps of numbers in [0, 1] to uint8: cut off the padding, resize, multiply by 255 and truncate.

    Args:
        maps: (B, 1 or 3, h, w) floating point; it shows the whole square, padding included, at any resolution.
        images: the batch from which the maps were made.
    """
    scale_h, scale_w = (side / images.pixels.shape[2] for side in maps.shape[2:])
    outputs = []
    for one, (height, width) in zip(maps.float(), images.sizes, strict=True):
        part = one[:, : max(1, round(height * scale_h)), : max(1, round(width * scale_w))]
        size = (images.label_size, images.label_size)
        square = F.interpolate(part[None], size, mode="bilinear", align_corners=True)[0]
        # interpolation may turn a 1 into slightly less than 1
        plane = (square.clamp(0, 1) * 255 + 1e-3).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        outputs.append(ExpertOutput(np.ascontiguousarray(plane if len(one) == 3 else plane[..., 0])))
    return outputs


def min_max(maps: Tensor) -> Tensor:
    """Scale each map of (B, planes, h, w) to [0, 1] over all its pixels; a constant map becomes 0."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
