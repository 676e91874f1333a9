"""Photos in memory -> what the experts say about them: the one path of the labelling job, the commands and the API.

labeller = Labeller.load("all")
labels = labeller(["photo.jpg"])
model.caption("photo.jpg", labels=labels)
"""

import io
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image, ImageOps

from prismer.dataloading.experts.catalogue import load_networks
from prismer.dataloading.experts.decode import ExpertPipeline, Geometry
from prismer.dataloading.experts.network import Found, Images, Network
from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.feed.load_image import ImageSource, from_array
from prismer.dataloading.feed.rgb import to_jpeg, to_rgb
from prismer.reading import read_bytes

_BATCH = {"cpu": 4, "cuda": 32}
Decoded = dict[Geometry, tuple[torch.Tensor, list[tuple[int, int]]]]


class Labeller:
    """Networks at work on one device.

    Args:
        networks: loaded, each for another expert, after those that it reads.
        label_size: side of the maps, px.
        device: where the networks are.
        batch_size: of the largest batch; None takes 4 on a CPU and 32 on a GPU. A network that runs out of the GPU's
            memory gets half as many at a time from then on.
        threads: CPU threads that decode.

    Attributes:
        classes: "seg" and "obj_detection" -> class names, for the experts at work.
        about: what to note beside the maps: networks, versions of the weights, licences, training sets.
        seconds: name of a network -> time spent in it so far; "decoding" for the pictures.
        images: labelled so far.

    Raises:
        ValueError: if there is no network, or two for one expert.
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
        cards = [network.card for network in networks]
        experts = [card.expert for card in cards]
        if not networks or len(set(experts)) < len(experts):
            raise ValueError(f"the networks make {experts or 'nothing'}; give one for each expert")
        if label_size < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"label_size is {label_size}, batch_size {batch_size}; both must be at least 1")
        self.networks, self.label_size = list(networks), label_size
        self.device = torch.device(device)
        self.batch_size = batch_size or _BATCH[self.device.type]
        for i, network in enumerate(self.networks):
            for earlier in self.networks[:i]:
                if earlier.card.expert in network.card.reads:
                    network.follow(earlier)
        self.classes = {
            network.card.expert: network.classes
            for network in self.networks
            if network.card.expert in ("seg", "obj_detection")
        }
        self.about = {
            "label_size": label_size,
            "experts": {
                network.card.expert: {
                    "network": network.card.name,
                    "version": network.version,
                    "licence": network.card.licence,
                    "trained_on": network.card.trained_on,
                }
                for network in sorted(self.networks, key=lambda network: network.card.expert)
            },
        }
        self.seconds: Counter = Counter()
        self.images = 0
        self._limits = dict.fromkeys((card.name for card in cards), self.batch_size)
        geometries = {Geometry(card.side, card.keep_aspect) for card in cards}
        self._pipeline = ExpertPipeline(geometries, batch_size=self.batch_size, threads=threads, device=self.device)

    @classmethod
    def load(cls, experts: str | Sequence[str] = "all", device: str | torch.device = "cpu", **options) -> "Labeller":
        """A labeller for the experts asked for (see `catalogue.choose`); those without weights are named in a warning.

        Raises:
            MissingWeights: if none of them can be loaded.
            ValueError: if one is unknown.
        """
        networks, missing = load_networks(experts, device)
        for sentence in missing:
            warnings.warn(sentence, stacklevel=2)
        return cls(networks, device=device, **options)

    def __call__(self, images: Sequence[ImageSource]) -> list[ExpertLabels]:
        """What the experts say about pictures.

        Args:
            images: any number of what `prismer.dataloading.feed.load_image.load_image` opens.

        Returns:
            One ExpertLabels for each.

        Raises:
            ValueError: if one is not a picture that can be read whole.
        """
        labels = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            labels += self.label(self.decode([_jpeg(image) for image in part]))
        return labels

    def decode(self, jpegs: list[bytes]) -> Decoded:
        """Upright RGB JPEGs, at most `batch_size`, as every network reads them: one decode each.

        Raises:
            UndecodableImages: if some do not decode.
        """
        begin = time.perf_counter()
        decoded = self._pipeline(jpegs)
        self.seconds["decoding"] += time.perf_counter() - begin
        return decoded

    @torch.inference_mode()
    def label(self, decoded: Decoded) -> list[ExpertLabels]:
        """The maps and tables of a decoded batch.

        Raises:
            RuntimeError: if one image alone does not fit into the GPU's memory.
        """
        known: dict[str, list[Found]] = {}
        for network in self.networks:
            card = network.card
            pixels, sizes = decoded[Geometry(card.side, card.keep_aspect)]
            begin = time.perf_counter()
            known[card.expert] = self._in_parts(network, pixels, sizes, known)
            self.seconds[card.name] += time.perf_counter() - begin
        self.images += len(sizes)
        return [
            ExpertLabels(*_as_sample({name: found[i] for name, found in known.items()}), self.classes)
            for i in range(len(sizes))
        ]

    def speeds(self) -> dict[str, float]:
        """Images per second of the decoder and of each network, each taken alone."""
        return {name: self.images / seconds for name, seconds in self.seconds.items() if seconds}

    def _in_parts(
        self, network: Network, pixels: torch.Tensor, sizes: list[tuple[int, int]], known: dict[str, list[Found]]
    ) -> list[Found]:
        found: list[Found] = []
        while len(found) < len(sizes):
            limit = self._limits[network.card.name]
            part = slice(len(found), len(found) + limit)
            images = Images(pixels[part], sizes[part], self.label_size)
            earlier = {name: entries[part] for name, entries in known.items()}
            try:
                with self._precision():
                    found += network.predict(images, earlier)
            except torch.OutOfMemoryError:
                if limit == 1:
                    raise RuntimeError(
                        f"{network.card.name} does not fit into the memory of {self.device} with a single image; "
                        f"leave {network.card.expert} out or use a larger device"
                    ) from None
                self._limits[network.card.name] = limit // 2
                torch.cuda.empty_cache()
        return found

    def _precision(self):
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()


def _jpeg(image: ImageSource) -> bytes:
    if isinstance(image, Image.Image | np.ndarray | torch.Tensor):
        if not isinstance(image, Image.Image):
            image = from_array(image)
        file = io.BytesIO()
        # as exact as a JPEG can be: full colour resolution
        to_rgb(ImageOps.exif_transpose(image), "the image").save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()
    name = f"the image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        return to_jpeg(image if isinstance(image, bytes) else read_bytes(image))[0]
    except ValueError as error:
        raise ValueError(f"{name} cannot be labelled: {error}") from None


def _as_sample(found: dict[str, Found]) -> tuple[dict, dict]:
    """Planes and tables as a sample of a dataset keeps them."""
    planes = {name: one.plane for name, one in found.items()}
    meta: dict[str, dict] = {}
    if "obj_detection" in found:
        meta["instances"] = {str(i): c for i, c in found["obj_detection"].instances.items()}
    if "ocr_detection" in found:
        meta["words"] = {str(i): word for i, word in found["ocr_detection"].words.items()}
    boxes = {
        name: {str(i): [round(float(x), 4) for x in box] for i, box in one.boxes.items()}
        for name, one in found.items()
        if one.boxes
    }
    if boxes:
        meta["boxes"] = boxes
    return planes, meta
