"""The baseline of test_dataloading.py: the published way to load labels, expanded to 64 channels per pixel on the host.

Written from a description of the computation (Prismer, arXiv:2303.02506, section 3.2), with torchvision and Pillow:
every image and label PNG is decoded at its full size, cropped, flipped, warped and resized; ids become (64, 224, 224)
fp32 maps, by one boolean mask per id and map. Operations of RandAugment that change nothing cost nothing here.
"""

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

LABEL_SIZE = 224
LOW_LEVEL = ("depth", "normal", "edge")
HIGH_LEVEL = ("seg_coco", "obj_detection", "ocr_detection")
BACKGROUND = 255
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SHEAR, _SHIFT, _ROTATION = 0.15, 0.165, 15
_OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "shift_x",
    "shift_y",
    "rotate",
    "autocontrast",
    "equalize",
    "brightness",
    "sharpness",
)


class PublishedDataset(Dataset):
    """One dictionary of tensors per image, for the default collation.

    Files: `<images>/<name>.jpg`, `<labels>/<expert>/<name>.png`, for objects a `.json` {instance: class} and for words
    a `.pt` {id: {"features", "text"}} beside the PNG.

    Args:
        images, labels: see above.
        names: of the images, without suffix.
        seg, objects: (classes, 64) fp32, features of the class tables.
        background: (64,) fp32.
        image_size: side R of the image.
        augment: crop of `min_area` to 1 of the area, flip and RandAugment; otherwise only resized.
        with_rgb, experts: the parts of a sample; all by default.

    A sample holds: rgb (3, R, R) fp32, normalised; depth, edge (1, 224, 224) and normal (3, 224, 224) fp32 in -1..1;
    seg_coco and ocr_detection (64, 224, 224) fp32; obj_detection {"label": (64, 224, 224) fp32, "instance":
    (1, 224, 224) int64}.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        names: list[str],
        *,
        seg: Tensor,
        objects: Tensor,
        background: Tensor,
        image_size: int,
        augment: bool,
        min_area: float = 0.5,
        with_rgb: bool = True,
        experts: tuple[str, ...] = (*LOW_LEVEL, *HIGH_LEVEL),
    ):
        self.images, self.labels, self.names = Path(images), Path(labels), names
        self.seg, self.objects, self.background = seg, objects, background
        self.image_size, self.augment, self.min_area = image_size, augment, min_area
        self.with_rgb, self.experts = with_rgb, experts

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict:
        name = self.names[i]
        image, maps, words = self._read(name)
        image, maps = self._resize(image, maps)
        if self.augment:
            image, maps = _rand_augment(image, maps)
        sample = {"rgb": TF.normalize(TF.to_tensor(image), MEAN, STD)} if self.with_rgb else {}
        for expert in self.experts:
            path = self.labels / expert / f"{name}.png"
            sample[expert] = self._tensors(expert, maps[expert], path, words)
        return sample

    def _read(self, name: str) -> tuple[Image.Image, dict[str, Image.Image], dict]:
        with Image.open(self.images / f"{name}.jpg") as file:
            # without RGB only the size of the image is used
            image = file.convert("RGB") if self.with_rgb else Image.new("1", file.size)
        maps, words = {}, {}
        for expert in self.experts:
            path = self.labels / expert / f"{name}.png"
            if expert == "ocr_detection":
                if not path.with_suffix(".pt").exists():
                    # the image has no words
                    maps[expert] = Image.new("L", image.size, BACKGROUND)
                    continue
                words = torch.load(path.with_suffix(".pt"), weights_only=True)
            with Image.open(path) as file:
                maps[expert] = file.convert("RGB" if expert == "normal" else "L")
        return image, maps, words

    def _tensors(self, expert: str, map_: Image.Image, path: Path, words: dict) -> Tensor | dict:
        if expert in LOW_LEVEL:
            x = TF.to_tensor(map_)
            low, high = x.min(), x.max()
            return 2 * (x - low) / (high - low + 1e-6) - 1
        ids = TF.pil_to_tensor(map_)
        if expert == "seg_coco":
            return expand(ids[0], self.seg, self.background)
        if expert == "ocr_detection":
            features = {i: word["features"] for i, word in words.items()}
            return expand(ids[0], features, self.background)
        classes = json.loads(path.with_suffix(".json").read_text())
        features = {int(i): self.objects[row] for i, row in classes.items()}
        return {"label": expand(ids[0], features, self.background), "instance": ids.long()}

    def _resize(self, image: Image.Image, maps: dict) -> tuple[Image.Image, dict]:
        width, height = image.size
        box = (0, 0, height, width)
        if self.augment:
            box = RandomResizedCrop.get_params(image, (self.min_area, 1.0), (3 / 4, 4 / 3))
        if self.with_rgb:
            image = TF.resized_crop(image, *box, [self.image_size] * 2, InterpolationMode.BICUBIC)
        maps = {
            expert: TF.resized_crop(map_, *box, [LABEL_SIZE] * 2, InterpolationMode.NEAREST)
            for expert, map_ in maps.items()
        }
        if self.augment and random.random() < 0.5:
            image, maps = TF.hflip(image), {expert: TF.hflip(map_) for expert, map_ in maps.items()}
        return image, maps


def expand(ids: Tensor, features: Tensor | dict[int, Tensor], background: Tensor) -> Tensor:
    """(h, w) uint8 ids -> (64, h, w) fp32: the features of each pixel, by one mask for every id in the map."""
    expanded = torch.empty(len(background), *ids.shape)
    for i in ids.unique().tolist():
        row = background if i == BACKGROUND else features[i]
        expanded[:, ids == i] = row[:, None]
    return expanded


def _rand_augment(image: Image.Image, maps: dict) -> tuple[Image.Image, dict]:
    for _ in range(2):
        op, sign = random.choice(_OPS), random.choice((-1, 1))
        if op == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif op == "equalize":
            image = ImageOps.equalize(image)
        elif op == "rotate":
            image = image.rotate(sign * _ROTATION, Image.Resampling.NEAREST)
            maps = {
                expert: map_.rotate(sign * _ROTATION, Image.Resampling.NEAREST, fillcolor=_fill(expert))
                for expert, map_ in maps.items()
            }
        elif op in ("shear_x", "shear_y", "shift_x", "shift_y"):
            image = _warp(image, op, sign, Image.Resampling.BILINEAR, (0, 0, 0))
            maps = {
                expert: _warp(map_, op, sign, Image.Resampling.NEAREST, _fill(expert)) for expert, map_ in maps.items()
            }
    return image, maps


def _warp(
    image: Image.Image, op: str, sign: int, resample: Image.Resampling, fill: int | tuple[int, int, int]
) -> Image.Image:
    # shifts are a share of each image's own side, so that labels stay aligned
    shift = sign * _SHIFT * image.width
    matrix = {
        "shear_x": (1, sign * _SHEAR, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * _SHEAR, 1, 0),
        "shift_x": (1, 0, shift, 0, 1, 0),
        "shift_y": (1, 0, 0, 0, 1, shift),
    }[op]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def _fill(expert: str) -> int | tuple[int, int, int]:
    return {"normal": (0, 0, 0)}.get(expert, BACKGROUND if expert in HIGH_LEVEL else 0)
