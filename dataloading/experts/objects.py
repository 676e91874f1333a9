"""Object experts: boxes with classes, painted into a map of ids with the nearer boxes in front (boxes.py).

nanodet-g (nanodet.py): a small convolutional detector of COCO's 80 classes.
rt-detr, d-fine: detectors of the transformers library, for COCO's 80 and Objects365's 365 classes.
owlv2: an open-vocabulary detector of the transformers library; a text file names its classes.
"""

from pathlib import Path

import torch
from torch import Tensor

from prismer.dataloading.experts.boxes import (
    clip_to_image,
    detections_output,
    non_max_suppression,
    to_corners,
    top_scores,
)
from prismer.dataloading.experts.nanodet import COCO, NanoDet
from prismer.dataloading.experts.network import ExpertOutput, Images, Network, NetworkInfo, normalise_pixels
from prismer.dataloading.experts.pretrained import from_hub, load_pretrained
from prismer.dataloading.experts.weights import file_version
from prismer.errors import InputError
from prismer.reading import read_lines


class RtDetr(Network):
    """RT-DETR. Each of its queries scores every class on its own, so that no suppression is needed."""

    info = NetworkInfo(
        name="rt-detr",
        expert="obj_detection",
        summary="RT-DETR with a ResNet-50 (transformers), COCO's 80 classes; boxes painted by depth",
        licence="Apache-2.0",
        trained_on="Objects365, then COCO",
        weights="PekingU/rtdetr_r50vd_coco_o365",
        side=640,
        inputs=("depth",),
    )
    model_types = ("rt_detr", "rt_detr_v2")
    threshold = 0.5

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self.model = model.to(device)
        self.version = version
        names = model.config.id2label
        self.classes = [names[i] for i in range(len(names))]

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "RtDetr":
        model, version = load_pretrained("AutoModelForObjectDetection", cls.info, source, cls.model_types)
        return cls(model, device, version)

    @torch.no_grad()
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        outputs = self.model(pixel_values=images.pixels.float() / 255)
        return self.read(outputs.logits.float(), outputs.pred_boxes.float(), images, earlier)

    def read(
        self, logits: Tensor, boxes: Tensor, images: Images, earlier: dict[str, list[ExpertOutput]]
    ) -> list[ExpertOutput]:
        """The best pairs of query and class of each image, at most as many as there are queries.

        Args:
            logits: (B, queries, classes).
            boxes: (B, queries, 4), centre x, centre y, width, height as fractions of the image.
            images, earlier: see `Network.predict`.
        """
        outputs = []
        for i in range(len(images)):
            scores = logits[i].sigmoid().flatten()
            best = top_scores(scores, self.threshold, logits.shape[1])
            query, class_id = best // logits.shape[2], best % logits.shape[2]
            box, shown = clip_to_image(to_corners(boxes[i][query]), boxes.new_ones(4))
            outputs.append(detections_output(box, scores[best][shown], class_id[shown], images, earlier, i))
        return outputs


class DFine(RtDetr):
    """D-FINE. It differs from RT-DETR in how it refines boxes, and knows the 365 classes of Objects365."""

    info = NetworkInfo(
        name="d-fine",
        expert="obj_detection",
        summary="D-FINE (transformers), the 365 classes of Objects365; boxes painted by depth",
        licence="Apache-2.0",
        trained_on="Objects365",
        weights="ustc-community/dfine-xlarge-obj365",
        side=640,
        inputs=("depth",),
    )
    model_types = ("d_fine",)


class Owlv2(Network):
    """OWLv2, which finds the objects that class names describe.

    The class names are the lines of `classes.txt` in the folder of the weights; without that file, COCO's 80.
    """

    info = NetworkInfo(
        name="owlv2",
        expert="obj_detection",
        summary="OWLv2 (transformers), an open-vocabulary detector; classes from classes.txt; boxes painted by depth",
        licence="Apache-2.0",
        trained_on="WebLI with pseudo-boxes, then Objects365 and Visual Genome",
        weights="google/owlv2-base-patch16-ensemble",
        side=960,
        keep_aspect=True,
        inputs=("depth",),
    )
    threshold = 0.25
    # CLIP's
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self, model: torch.nn.Module, queries: Tensor, classes: list[str], device: str | torch.device, version: str
    ):
        self.model, self.queries = model.to(device), queries.to(device)
        self.classes, self.version = classes, version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Owlv2":
        """Read a folder (with its tokenizer) or hub id, and embed the class names; see `Network.load`."""
        from transformers import AutoTokenizer

        model, version = load_pretrained("AutoModelForZeroShotObjectDetection", cls.info, source, ("owlv2",))
        side = model.config.vision_config.image_size
        if side != cls.info.side:
            raise InputError(
                f"{source} reads images of {side} px, owlv2 gets {cls.info.side} px; choose another checkpoint"
            )
        classes = list(COCO)
        class_file = None if source is None else Path(source) / "classes.txt"
        if class_file is not None and class_file.is_file():
            classes = _read_classes(class_file)
            version += f"-{file_version(class_file)[:6]}"
        tokenizer = from_hub(AutoTokenizer.from_pretrained, cls.info, source)
        tokens = tokenizer(
            [f"a photo of a {name}" for name in classes],
            padding="max_length",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad():
            queries = model.owlv2.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        return cls(model, queries, classes, device, version)

    @torch.no_grad()
    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        grid = self.model.image_embedder(normalise_pixels(images.pixels, self.mean, self.std))[0]
        cells = grid.flatten(1, 2)
        logits = self.model.class_predictor(cells, self.queries.expand(len(images), -1, -1))[0]
        boxes = self.model.box_predictor(cells, grid)
        return self.read(logits.float(), boxes.float(), images, earlier)

    def read(
        self, logits: Tensor, boxes: Tensor, images: Images, earlier: dict[str, list[ExpertOutput]]
    ) -> list[ExpertOutput]:
        """The best class of each cell of each image, after suppression.

        Args:
            logits: (B, cells, classes).
            boxes: (B, cells, 4), centre x, centre y, width, height as fractions of the padded square.
            images, earlier: see `Network.predict`.
        """
        outputs = []
        for i, (height, width) in enumerate(images.sizes):
            scores, class_id = logits[i].sigmoid().max(dim=1)
            best = top_scores(scores, self.threshold)
            size = torch.tensor([width, height, width, height], device=boxes.device)
            box, shown = clip_to_image(to_corners(boxes[i][best]) * self.info.side, size)
            best = best[shown]
            kept = non_max_suppression(box, scores[best], class_id[best])
            best = best[kept]
            outputs.append(detections_output(box[kept], scores[best], class_id[best], images, earlier, i))
        return outputs


def _read_classes(path: Path) -> list[str]:
    names = [name for line in read_lines(path) if (name := line.strip())]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"{path} has {len(names)} names, {len(set(names))} of them different; write each name once, one a line"
        )
    return names


NETWORKS = (NanoDet, RtDetr, DFine, Owlv2)
