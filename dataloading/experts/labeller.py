"""Images in memory -> the labels of the experts. The labelling job, the commands and the API all use this class.

labeller = Labeller.load("all")
labels = labeller(["photo.jpg"])
model.caption("photo.jpg", labels=labels)
"""

import io
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from prismer.dataloading.experts.catalogue import load_networks
from prismer.dataloading.experts.decode import ExpertPipeline, Geometry
from prismer.dataloading.experts.network import ExpertOutput, Images, Network
from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.feed.load_image import ImageSource, from_array
from prismer.dataloading.feed.rgb import to_jpeg, to_rgb
from prismer.errors import InputError, MachineError
from prismer.experts import EXPERTS
from prismer.reading import read_bytes

_BATCH_SIZES = {"cpu": 4, "cuda": 32}
DecodedBatch = dict[Geometry, tuple[torch.Tensor, list[tuple[int, int]]]]


class Labeller:
    """Loaded networks that label images on one device.

    Args:
        networks: the loaded networks, at most one for each expert, each one after its inputs.
        label_size: side of the maps in pixels.
        device: the device of the networks.
        batch_size: the largest batch; None is 4 on a CPU and 32 on a GPU. After a network runs out of GPU memory, its
            batches are half as large.
        threads: CPU threads that decode.

    Attributes:
        classes: "seg" and "obj_detection" -> class names, for the loaded experts.
        about: notes to store with the maps: networks, versions of the weights, licences, training sets.
        seconds: name of a network -> seconds spent in it so far; "decoding" -> seconds spent on decoding.
        images: number of images labelled so far.

    Raises:
        ValueError: if there is no network, or two networks for one expert.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        *,
        label_size: int = 224,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
        threads: int = 2,
    ):
        infos = [network.info for network in networks]
        experts = [info.expert for info in infos]
        if not networks or len(set(experts)) < len(experts):
            raise InputError(f"the networks make {experts or 'nothing'}; give one for each expert")
        if label_size < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(f"label_size is {label_size}, batch_size {batch_size}; both must be at least 1")
        self.networks, self.label_size = list(networks), label_size
        self.device = torch.device(device)
        self.batch_size = batch_size or _BATCH_SIZES[self.device.type]
        for i, network in enumerate(self.networks):
            for earlier in self.networks[:i]:
                if earlier.info.expert in network.info.inputs:
                    network.attach_input(earlier)
        self.classes = {
            network.info.expert: network.classes
            for network in self.networks
            if EXPERTS[network.info.expert].has_classes
        }
        self.about = {
            "label_size": label_size,
            "experts": {
                network.info.expert: {
                    "network": network.info.name,
                    "version": network.version,
                    "licence": network.info.licence,
                    "trained_on": network.info.trained_on,
                }
                for network in sorted(self.networks, key=lambda network: network.info.expert)
            },
        }
        self.seconds: Counter = Counter()
        self.images = 0
        self._limits = dict.fromkeys((info.name for info in infos), self.batch_size)
        geometries = {Geometry(info.side, info.keep_aspect) for info in infos}
        self._pipeline = ExpertPipeline(geometries, batch_size=self.batch_size, threads=threads, device=self.device)

    @classmethod
    def load(
        cls, experts: str | Sequence[str] = "all", device: str | torch.device = "cpu", **options: Any
    ) -> "Labeller":
        """Load a labeller; a warning names the experts whose weights are missing.

        Args:
            experts: see `catalogue.parse_requests`.
            device: where the networks run.
            options: further arguments of `Labeller`.

        Raises:
            MissingWeights: if no network can be loaded.
            ValueError: if an expert or network is unknown.
        """
        networks, missing = load_networks(experts, device)
        for sentence in missing:
            warnings.warn(sentence, stacklevel=2)
        return cls(networks, device=device, **options)

    def __call__(self, images: Sequence[ImageSource]) -> list[ExpertLabels]:
        """Label images.

        Args:
            images: any number of images, see `prismer.dataloading.feed.load_image.ImageSource`.

        Returns:
            The labels of each image.

        Raises:
            ValueError: if an image cannot be read as a whole.
        """
        labels = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            labels += self.label(self.decode([_jpeg(image) for image in part]))
        return labels

    def decode(self, jpegs: list[bytes]) -> DecodedBatch:
        """Decode at most `batch_size` upright RGB JPEGs, once for all networks.

        Raises:
            UndecodableImages: if some images cannot be decoded.
        """
        begin = time.perf_counter()
        decoded = self._pipeline(jpegs)
        self.seconds["decoding"] += time.perf_counter() - begin
        return decoded

    @torch.inference_mode()
    def label(self, decoded: DecodedBatch) -> list[ExpertLabels]:
        """The labels of a decoded batch.

        Raises:
            RuntimeError: if a single image does not fit into the GPU's memory.
        """
        outputs: dict[str, list[ExpertOutput]] = {}
        for network in self.networks:
            info = network.info
            pixels, sizes = decoded[Geometry(info.side, info.keep_aspect)]
            begin = time.perf_counter()
            outputs[info.expert] = self._predict(network, pixels, sizes, outputs)
            self.seconds[info.name] += time.perf_counter() - begin
        self.images += len(sizes)
        return [
            ExpertLabels(*_planes_and_meta({name: batch[i] for name, batch in outputs.items()}), self.classes)
            for i in range(len(sizes))
        ]

    def speeds(self) -> dict[str, float]:
        """Images per second of the decoder and of each network, each on its own."""
        return {name: self.images / seconds for name, seconds in self.seconds.items() if seconds}

    def _predict(
        self,
        network: Network,
        pixels: torch.Tensor,
        sizes: list[tuple[int, int]],
        earlier: dict[str, list[ExpertOutput]],
    ) -> list[ExpertOutput]:
        """The outputs of one network, made in parts that fit into the memory."""
        outputs: list[ExpertOutput] = []
        while len(outputs) < len(sizes):
            limit = self._limits[network.info.name]
            part = slice(len(outputs), len(outputs) + limit)
            images = Images(pixels[part], sizes[part], self.label_size)
            try:
                with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                    outputs += network.predict(images, {name: batch[part] for name, batch in earlier.items()})
            except torch.OutOfMemoryError:
                if limit == 1:
                    raise MachineError(
                        f"{network.info.name} does not fit into the memory of {self.device} with a single image; "
                        f"leave {network.info.expert} out or use a larger device"
                    ) from None
                self._limits[network.info.name] = limit // 2
                torch.cuda.empty_cache()
        return outputs


def _jpeg(image: ImageSource) -> bytes:
    if isinstance(image, Image.Image | np.ndarray | torch.Tensor):
        if not isinstance(image, Image.Image):
            image = from_array(image)
        file = io.BytesIO()
        # full colour resolution, to lose as little as a JPEG can
        to_rgb(ImageOps.exif_transpose(image), "the image").save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()
    name = f"the image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        return to_jpeg(image if isinstance(image, bytes) else read_bytes(image))[0]
    except ValueError as error:
        raise InputError(f"{name} cannot be labelled: {error}") from None


def _planes_and_meta(outputs: dict[str, ExpertOutput]) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Maps, and tables and boxes, in the form in which a sample of a dataset stores them."""
    planes = {name: output.plane for name, output in outputs.items()}
    meta: dict[str, dict] = {}
    for name, expert in EXPERTS.items():
        if name in outputs and expert.table:
            meta[expert.table] = {str(i): entry for i, entry in outputs[name].table.items()}
    boxes = {
        name: {str(i): [round(float(x), 4) for x in box] for i, box in output.boxes.items()}
        for name, output in outputs.items()
        if output.boxes
    }
    if boxes:
        meta["boxes"] = boxes
    return planes, meta
