"""Segmentation experts: a class for each pixel.

boxes-grabcut: masks that GrabCut finds in the boxes of the object expert, for machines without weights.
mask2former-coco, mask2former-ade: Mask2Former of the transformers library, with 133 and 150 classes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.dataloading.experts.boxes import to_pixels
from prismer.dataloading.experts.network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ExpertOutput,
    Images,
    Network,
    NetworkInfo,
    normalise_pixels,
)
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.errors import InputError
from prismer.experts import BACKGROUND


class BoxesGrabCut(Network):
    """Masks of the objects in boxes, cut out by colour and filled with the class of the box.

    GrabCut (Rother et al., 2004) splits a box into foreground and background by colour; it learns the background from
    the surroundings of the box. Large boxes are filled first, so that small objects lie in front. The ellipse in the
    box is filled instead if the box has too little background around it, or if the cut leaves too little of the box
    because the object looks like its surroundings.

    Attributes:
        rounds: of GrabCut.
        smallest: the smallest share of its box that a cut may leave.
        least_around: the smallest share of background from which GrabCut can learn.
    """

    info = NetworkInfo(
        name="boxes-grabcut",
        expert="seg",
        summary="masks that GrabCut finds in the detector's boxes; things only, a stand-in for panoptic segmentation",
        licence="Apache-2.0 (OpenCV)",
        trained_on="none",
        weights="none",
        side=224,
        inputs=("obj_detection",),
        inputs_required=True,
    )
    version = "boxes-grabcut-1"
    rounds = 3
    smallest = 0.2
    least_around = 1 / 8

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "BoxesGrabCut":
        if source is not None:
            raise InputError(f"boxes-grabcut has no weights, got {source}; ask for seg=boxes-grabcut")
        return cls()

    def attach_input(self, network: Network) -> None:
        """Take over the class names of the detector.

        Raises:
            ValueError: if it has more classes than a map has ids.
        """
        if len(network.classes) > BACKGROUND:
            raise InputError(
                f"{network.info.name} has {len(network.classes)} classes, a segmentation map holds {BACKGROUND}; "
                f"choose another network for seg, or a detector of fewer classes"
            )
        self.classes = list(network.classes)

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        if "obj_detection" not in earlier:
            raise InputError(
                "boxes-grabcut fills the boxes of the object expert, which did not run; ask for obj_detection too"
            )
        pixels = images.pixels.permute(0, 2, 3, 1).cpu().numpy()
        return [
            ExpertOutput(self._fill(image, objects, images.label_size))
            for image, objects in zip(pixels, earlier["obj_detection"], strict=True)
        ]

    def _fill(self, image: np.ndarray, objects: ExpertOutput, size: int) -> np.ndarray:
        import cv2

        plane = np.full((size, size), BACKGROUND, np.uint8)
        if not objects.boxes:
            return plane
        if image.shape[0] != size:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        ids = sorted(objects.boxes)
        boxes = to_pixels(np.array([objects.boxes[i][:4] for i in ids]), size)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for number in np.argsort(-areas, kind="stable"):
            left, top, right, bottom = boxes[number].tolist()
            mask = self._cut(image, left, top, right, bottom)
            plane[top:bottom, left:right][mask] = objects.table[ids[number]]
        return plane

    def _cut(self, image: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """The foreground of one box: bool (bottom - top, right - left)."""
        import cv2

        size, width, height = image.shape[0], right - left, bottom - top
        # a margin of half the box is enough background, and faster than the whole image
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
            # too few pixels to learn colours from, inside or around the box
            return ellipse.astype(bool)
        # some versions of OpenCV initialise the clusters from the global random numbers
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(part[..., ::-1])
        cv2.grabCut(bgr, labels, None, *models, self.rounds, cv2.GC_INIT_WITH_MASK)
        mask = np.isin(labels[inside], (cv2.GC_FGD, cv2.GC_PR_FGD))
        return mask if mask.mean() >= self.smallest else ellipse.astype(bool)


class Mask2FormerCoco(Network):
    """Mask2Former. A pixel gets the class with the largest sum, over queries, of class times mask probability."""

    info = NetworkInfo(
        name="mask2former-coco",
        expert="seg",
        summary="Mask2Former with Swin-L (transformers), COCO panoptic's 80 things and 53 kinds of stuff",
        licence="MIT",
        trained_on="COCO panoptic (Swin-L: ImageNet-21k)",
        weights="facebook/mask2former-swin-large-coco-panoptic",
        side=480,
        keep_aspect=True,
    )

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self.model = model.to(device)
        self.version = version
        names = model.config.id2label
        self.classes = [names[i] for i in range(len(names))]

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Mask2FormerCoco":
        name = "Mask2FormerForUniversalSegmentation"
        model, version = load_pretrained(name, cls.info, source, ("mask2former",))
        if len(model.config.id2label) > BACKGROUND:
            raise InputError(
                f"{source} has {len(model.config.id2label)} classes, a segmentation map holds {BACKGROUND}; "
                f"choose a checkpoint with fewer"
            )
        return cls(model, device, version)

    @torch.no_grad()
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        shown = torch.zeros_like(images.pixels[:, :1], dtype=torch.bool)
        for i, (height, width) in enumerate(images.sizes):
            shown[i, :, :height, :width] = True
        # the padding is zero after normalisation, as in training
        x = normalise_pixels(images.pixels, IMAGENET_MEAN, IMAGENET_STD) * shown
        outputs = self.model(pixel_values=x)
        return [
            ExpertOutput(semantic_map(classes.float(), masks.float(), self.info.side, size, images.label_size))
            for classes, masks, size in zip(
                outputs.class_queries_logits, outputs.masks_queries_logits, images.sizes, strict=True
            )
        ]


class Mask2FormerAde(Mask2FormerCoco):
    """Mask2Former with ADE20K's 150 classes."""

    info = NetworkInfo(
        name="mask2former-ade",
        expert="seg",
        summary="Mask2Former with Swin-L (transformers), ADE20K's 150 classes",
        licence="MIT",
        trained_on="ADE20K (Swin-L: ImageNet-21k)",
        weights="facebook/mask2former-swin-large-ade-panoptic",
        side=480,
        keep_aspect=True,
    )


def semantic_map(classes: Tensor, masks: Tensor, side: int, size: tuple[int, int], label_size: int) -> np.ndarray:
    """The class map of one image: argmax over classes of sum over queries of softmax(classes) * sigmoid(masks).

    Args:
        classes: (queries, classes + 1) logits. The last one is "no object", which only takes part in the softmax.
        masks: (queries, h, w) logits over the padded square.
        side: of that square in pixels.
        size: (height, width) in pixels of the part that shows the image.
        label_size: side of the map.

    Returns:
        uint8 (label_size, label_size); it shows the whole image.
    """
    # one bilinear step from the network's grid to the map: the map's pixel centres, where -1..1 is the padded square
    centre = (torch.arange(label_size, device=masks.device) + 0.5) / label_size
    y, x = (centre * (2 * length / side) - 1 for length in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    on_map = F.grid_sample(masks[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
    weights = classes.softmax(dim=-1)[:, :-1]
    # the scores of classes may be close: bf16 could not tell them apart
    with torch.autocast(masks.device.type, enabled=False):
        scores = torch.einsum("qc,qhw->chw", weights.float(), on_map.float().sigmoid())
    return scores.argmax(dim=0).byte().cpu().numpy()


NETWORKS = (BoxesGrabCut, Mask2FormerCoco, Mask2FormerAde)
