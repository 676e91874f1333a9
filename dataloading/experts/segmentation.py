"""Segmentation experts: a class per pixel.

boxes-grabcut: no network; masks that GrabCut finds in the boxes of the object expert, for machines without weights.
mask2former-coco, mask2former-ade: Mask2Former of transformers with its 133 and 150 classes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.experts.boxes import rasterise
from prismer.dataloading.experts.network import Card, Found, Images, Network
from prismer.dataloading.experts.objects import COCO
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.experts import BACKGROUND


class BoxesGrabCut(Network):
    """The shape in each box, by colour alone, filled with the box's class.

    GrabCut (Rother et al., 2004) splits a box into a foreground and a background of similar colours each, starting
    from the surroundings of the box as background. Large boxes are filled first, so that small objects stay in front.
    Where there is hardly a background to learn from, or a cut leaves less than a fifth of its box (the object looks
    like what is around it), the ellipse in the box is filled instead.

    `follow` takes over the class names of the object network whose boxes arrive; until then they are COCO's 80.
    """

    card = Card(
        name="boxes-grabcut",
        expert="seg",
        about="masks that GrabCut finds in the detector's boxes; things only, a stand-in for panoptic segmentation",
        licence="Apache-2.0 (OpenCV)",
        trained_on="none",
        weights="none",
        side=224,
        reads=("obj_detection",),
        needs=("obj_detection",),
    )
    version = "boxes-grabcut-1"
    rounds = 3
    smallest = 0.2
    least_around = 1 / 8

    def __init__(self):
        self.classes = list(COCO)

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "BoxesGrabCut":
        """There is nothing to read.

        Raises:
            ValueError: if a source is named.
        """
        if source is not None:
            raise ValueError(f"boxes-grabcut has no weights, got {source}; ask for seg=boxes-grabcut")
        return cls()

    def follow(self, network: Network) -> None:
        """Call the classes as `network`, the object expert, calls them.

        Raises:
            ValueError: if it has more classes than a map has ids.
        """
        if network.card.expert != "obj_detection":
            return
        if len(network.classes) > BACKGROUND:
            raise ValueError(
                f"{network.card.name} has {len(network.classes)} classes, a segmentation map of its boxes holds "
                f"{BACKGROUND}; choose another network for seg, or a detector of fewer classes"
            )
        self.classes = list(network.classes)

    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`.

        Raises:
            ValueError: if the object expert has not run.
        """
        if "obj_detection" not in known:
            raise ValueError(
                "boxes-grabcut fills the boxes of the object expert, which did not run; ask for obj_detection too"
            )
        pixels = images.pixels.permute(0, 2, 3, 1).cpu().numpy()
        return [
            Found(self._fill(image, objects, images.label_size))
            for image, objects in zip(pixels, known["obj_detection"], strict=True)
        ]

    def _fill(self, image: np.ndarray, objects: Found, size: int) -> np.ndarray:
        import cv2

        plane = np.full((size, size), BACKGROUND, np.uint8)
        if not objects.boxes:
            return plane
        if image.shape[0] != size:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        ids = sorted(objects.boxes)
        boxes = rasterise(np.array([objects.boxes[i][:4] for i in ids]), size)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for number in np.argsort(-areas, kind="stable"):
            left, top, right, bottom = boxes[number].tolist()
            mask = self._cut(image, left, top, right, bottom)
            plane[top:bottom, left:right][mask] = objects.instances[ids[number]]
        return plane

    def _cut(self, image: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """The foreground of a box, bool (bottom - top, right - left)."""
        import cv2

        size, width, height = image.shape[0], right - left, bottom - top
        # as much around the box as in it is enough background, and faster than the whole image
        margin_x, margin_y = width // 2 + 4, height // 2 + 4
        x, y = max(0, left - margin_x), max(0, top - margin_y)
        part = image[y : min(size, bottom + margin_y), x : min(size, right + margin_x)]
        inside = (slice(top - y, bottom - y), slice(left - x, right - x))
        ellipse = np.zeros((height, width), np.uint8)
        middle = ((width - 1) / 2, (height - 1) / 2)
        cv2.ellipse(ellipse, (middle, (width, height), 0), 1, cv2.FILLED)
        labels = np.full(part.shape[:2], cv2.GC_BGD, np.uint8)
        labels[inside] = cv2.GC_PR_FGD
        if min(width, height) < 4 or (labels == cv2.GC_BGD).mean() < self.least_around:
            # too little to learn colours from: a few pixels, or a box that all but fills the image
            return ellipse.astype(bool)
        # some versions of OpenCV start the clusters from global random numbers
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(part[..., ::-1])
        cv2.grabCut(bgr, labels, None, *models, self.rounds, cv2.GC_INIT_WITH_MASK)
        mask = np.isin(labels[inside], (cv2.GC_FGD, cv2.GC_PR_FGD))
        return mask if mask.mean() >= self.smallest else ellipse.astype(bool)


class Mask2FormerCoco(Network):
    """Mask2Former; each pixel gets the class with the largest sum, over queries, of class times mask probability."""

    card = Card(
        name="mask2former-coco",
        expert="seg",
        about="Mask2Former with Swin-L (transformers), COCO panoptic's 80 things and 53 kinds of stuff",
        licence="MIT",
        trained_on="COCO panoptic (Swin-L: ImageNet-21k)",
        weights="facebook/mask2former-swin-large-coco-panoptic",
        side=480,
        keep_aspect=True,
    )
    # ImageNet's, RGB
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self.model = model.to(device)
        self.version = version
        names = model.config.id2label
        self.classes = [names[i] for i in range(len(names))]

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Mask2FormerCoco":
        """Read a folder or hub id of a Mask2Former; see `Network.load`."""
        name = "Mask2FormerForUniversalSegmentation"
        model, version = load_pretrained(name, cls.card, source, ("mask2former",))
        if len(model.config.id2label) > BACKGROUND:
            raise ValueError(
                f"{source} has {len(model.config.id2label)} classes, a segmentation map holds {BACKGROUND}; "
                f"take a checkpoint of fewer"
            )
        return cls(model, device, version)

    @torch.no_grad()
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        device = images.pixels.device
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        shown = torch.zeros_like(images.pixels[:, :1], dtype=torch.bool)
        for i, (height, width) in enumerate(images.sizes):
            shown[i, :, :height, :width] = True
        # the padding is zero after normalisation, as in training
        x = (images.pixels.float() / 255 - mean) / std * shown
        outputs = self.model(pixel_values=x)
        return [
            Found(semantic(classes.float(), masks.float(), self.card.side, size, images.label_size))
            for classes, masks, size in zip(
                outputs.class_queries_logits, outputs.masks_queries_logits, images.sizes, strict=True
            )
        ]


class Mask2FormerAde(Mask2FormerCoco):
    """The same with ADE20K's 150 classes."""

    card = Card(
        name="mask2former-ade",
        expert="seg",
        about="Mask2Former with Swin-L (transformers), ADE20K's 150 classes",
        licence="MIT",
        trained_on="ADE20K (Swin-L: ImageNet-21k)",
        weights="facebook/mask2former-swin-large-ade-panoptic",
        side=480,
        keep_aspect=True,
    )


def semantic(classes: Tensor, masks: Tensor, side: int, size: tuple[int, int], label_size: int) -> np.ndarray:
    """The class map of one image: argmax over classes of sum over queries of softmax(classes) * sigmoid(masks).

    Args:
        classes: (queries, classes + 1) logits, the last one "no object", which takes part in the softmax alone.
        masks: (queries, h, w) logits over the padded square.
        side: of that square in pixels.
        size: (height, width) in pixels of the part that shows the image.
        label_size: side of the map.

    Returns:
        uint8 (label_size, label_size); it shows the whole image.
    """
    # one bilinear step from the network's grid to the map: pixel centres of the map, where -1..1 is the square
    centre = (torch.arange(label_size, device=masks.device) + 0.5) / label_size
    y, x = (centre * (2 * length / side) - 1 for length in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    on_map = F.grid_sample(masks[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
    weights = classes.softmax(dim=-1)[:, :-1]
    # sums of close scores: not in bf16
    with torch.autocast(masks.device.type, enabled=False):
        scores = torch.einsum("qc,qhw->chw", weights.float(), on_map.float().sigmoid())
    return scores.argmax(dim=0).byte().cpu().numpy()


NETWORKS = (BoxesGrabCut, Mask2FormerCoco, Mask2FormerAde)
