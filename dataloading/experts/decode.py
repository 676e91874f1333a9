"""Encoded images -> the square pixels that each network reads, with one decode per image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prismer.dataloading.feed import dali

# fills the square around an image that keeps its proportions
GREY = 114


@dataclass(frozen=True, order=True)
class Geometry:
    """How an image becomes a square.

    Attributes:
        side: of the square in pixels.
        keep_aspect: whether the image keeps its proportions, at the top left of the square, with padding around it;
            otherwise it is stretched.
    """

    side: int
    keep_aspect: bool = False


class ExpertPipeline:
    """Decodes batches and resizes them to each geometry.

    Args:
        geometries: at least one.
        batch_size: the largest batch.
        threads: CPU threads of DALI.
        device: "cpu", or a CUDA device, which then decodes the images and holds the pixels.
    """

    def __init__(
        self, geometries: set[Geometry], *, batch_size: int, threads: int = 2, device: str | torch.device = "cpu"
    ):
        self.geometries = sorted(geometries)
        self.device = torch.device(device)
        self._graph = dali.Graph(self._define, batch_size=batch_size, threads=threads, device=device)

    def __call__(self, images: list[bytes]) -> dict[Geometry, tuple[Tensor, list[tuple[int, int]]]]:
        """Decode one batch.

        Args:
            images: B encoded images.

        Returns:
            geometry -> (B, 3, side, side) uint8 RGB on the device, and for each image (height, width) of the part that
            shows it.

        Raises:
            UndecodableImages: if DALI fails on some images; the pipeline stays usable.
        """
        outputs = iter(self._graph.run({"image": dali.image_feed(images)}))
        made = {}
        for geometry in self.geometries:
            pixels, shapes = next(outputs), next(outputs)
            made[geometry] = pixels, [(int(h), int(w)) for h, w, _ in shapes.tolist()]
        return made

    def _define(self) -> tuple:
        from nvidia.dali import fn

        rgb = dali.decode(self.device)
        outputs = []
        for geometry in self.geometries:
            side = geometry.side
            if geometry.keep_aspect:
                pixels = dali.resize(rgb, side, mode="not_larger")
                padded = fn.pad(pixels, axes=[0, 1], shape=[side, side], fill_value=GREY)
            else:
                pixels = padded = dali.resize(rgb, side)
            outputs += [dali.planes_first(padded), pixels.shape()]
        return tuple(outputs)
