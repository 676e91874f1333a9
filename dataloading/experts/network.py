"""What every expert network is to the labelling engine: a card, `load`, and `predict` on batches of one fixed size.

The engine decodes an image once and resizes it for each network; a network turns uint8 pixels into the label maps of
the catalogue (prismer/experts.py). Normalisation is the network's own, on its own device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.experts import EXPERTS

if TYPE_CHECKING:
    from prismer.dataloading.experts.weights import Package


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a network before it is loaded.

    Attributes:
        name: of the network itself; a stand-in never bears the name of what it stands in for.
        expert: the catalogue's expert whose maps it makes.
        about: one sentence: what it is and how it makes the map.
        licence: of the weights.
        trained_on: the training data, "none" if nothing was learned.
        weights: where they come from by default: a hub id ("Intel/dpt-hybrid-midas"), "fetched" (`prismer experts
            fetch` takes them from package registries), "shipped" (in this package) or "none".
        side: images arrive as (side, side).
        keep_aspect: whether an image is fitted into that square, top left, and padded with grey 114; otherwise it is
            stretched to it.
        reads: experts whose findings it looks at; they come first when they are asked for too.
        needs: those of `reads` without which it cannot work.
    """

    name: str
    expert: str
    about: str
    licence: str
    trained_on: str
    weights: str
    side: int
    keep_aspect: bool = False
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass
class Images:
    """One batch as a network gets it.

    Attributes:
        pixels: (B, 3, side, side) uint8 RGB on the network's device.
        sizes: (height, width) in pixels of the part that shows each image, at the top left; the rest is padding.
        label_size: side of the maps to make.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    label_size: int

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass
class Found:
    """What one expert says about one image.

    Attributes:
        plane: uint8 (label_size, label_size), or with a third axis of 3 for normals; it shows the whole image,
            stretched to the square.
        instances: objects: id in the map -> class index.
        words: words: id in the map -> text in lower case.
        boxes: objects and words: id -> (left, top, right, bottom, score), corners as fractions of the image.
    """

    plane: np.ndarray
    instances: dict[int, int] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)
    boxes: dict[int, tuple[float, float, float, float, float]] = field(default_factory=dict)


class MissingWeights(RuntimeError):
    """The weights of a network are not on this machine; the message is one sentence with the command that gets them."""


class Network(ABC):
    """An expert network, loaded.

    Attributes:
        card: what it is.
        package, convert: what `prismer experts fetch` gets for it, and how that becomes its folder (see weights.py);
            None for networks whose weights are in no registry.
        classes: class names that the ids of segmentation maps and of `Found.instances` refer to; [] for others.
        version: names the weights: a few letters that change when they change; kept with every dataset.
    """

    card: ClassVar[Card]
    package: ClassVar["Package | None"] = None
    convert: ClassVar[Callable[[dict[str, Path], Path], None] | None] = None
    classes: list[str] = []
    version: str = ""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Network":
        """Read the weights.

        Args:
            source: a local folder (or a hub id, where the network comes from the hub); None takes the card's.

        Raises:
            MissingWeights: if they are not here.
            ValueError: if `source` holds something else.
        """

    def follow(self, network: "Network") -> None:  # noqa: B027 - most networks need not know
        """Called once, before the first batch, with each network whose expert is in `card.reads`."""

    @abstractmethod
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """Label a batch.

        Args:
            images: at the card's size.
            known: expert -> what was found in these images, for the experts that came before.

        Returns:
            One Found per image; equal images give equal results whatever else is in the batch, up to rounding.
        """


def intensities(maps: Tensor, images: Images, expert: str) -> list[Found]:
    """Maps of numbers in [0, 1] as uint8 planes: padding cut, bilinear with aligned corners, x 255 truncated.

    Args:
        maps: (B, planes, h, w) floating point; h, w in proportion to the images' side, padding included.
        images: the batch they were made from.
        expert: depth, normal or edge.
    """
    scale_h, scale_w = (s / images.pixels.shape[2] for s in maps.shape[2:])
    found = []
    for one, (height, width) in zip(maps.float(), images.sizes, strict=True):
        part = one[:, : max(1, round(height * scale_h)), : max(1, round(width * scale_w))]
        size = (images.label_size, images.label_size)
        square = F.interpolate(part[None], size, mode="bilinear", align_corners=True)[0]
        # interpolated ones may fall short of 1 by a rounding
        plane = (square.clamp(0, 1) * 255 + 1e-3).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        found.append(Found(np.ascontiguousarray(plane if EXPERTS[expert].planes == 3 else plane[..., 0])))
    return found


def min_max(maps: Tensor) -> Tensor:
    """Each map of (B, planes, h, w) scaled to [0, 1] over all of its pixels; a constant one becomes 0."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
