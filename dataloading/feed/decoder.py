"""Encoded images of any format -> square RGB pixels, many at a time: DALI for what it reads as `load_image` does.

A model that is asked about a folder must say what it says about each image alone. On a CPU the pixels are therefore
those of `load_image`. DALI decodes upright RGB JPEGs, which nearly all photos are, with the same libjpeg-turbo; and
`load_image` resizes them. It reads the rest itself: JPEGs that are cut short; other formats, where DALI ignores
transparency and cuts 16 bits; and JPEGs of many times the model's size, which it decodes at a smaller scale in a third
of the time. On a GPU, DALI decodes whole JPEGs of any size and resizes them, with roundings of its own.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prismer.dataloading.feed import dali
from prismer.dataloading.feed.load_image import load_image, shrink_on_decode
from prismer.dataloading.feed.rgb import orientation
from prismer.errors import InputError

# zeros that may follow the end mark of a JPEG
_MAX_PADDING = 64


class ImageDecoder:
    """Decodes batches of images; a broken image costs no other image its pixels.

    Args:
        size: side of the results, px.
        batch_size: of the largest batch.
        threads: CPU threads of DALI.
        device: where DALI decodes: "cpu" or a CUDA device.
    """

    def __init__(self, size: int, *, batch_size: int, threads: int = 2, device: str | torch.device = "cpu"):
        self.size, self.device = size, torch.device(device)
        self._graph = dali.Graph(self._define, batch_size=batch_size, threads=threads, device=device)

    def __call__(self, images: Sequence[bytes], pool: ThreadPoolExecutor) -> list[Tensor | InputError]:
        """Decode one batch.

        Args:
            images: encoded images.
            pool: threads for what DALI does not read.

        Returns:
            For each image (3, size, size) uint8 on the CPU, or why it has no pixels.
        """
        for_dali = [i for i, plain in enumerate(pool.map(self._is_for_dali, images)) if plain]
        decoded: dict[int, Tensor | InputError] = {}
        while for_dali:
            try:
                pixels = self._run([images[i] for i in for_dali], pool)
            except dali.UndecodableImages as error:
                # `load_image` may read them all the same, and if not, it has the reason
                for_dali = [i for place, i in enumerate(for_dali) if place not in error.reasons]
            else:
                decoded = dict(zip(for_dali, pixels, strict=True))
                break
        rest = [i for i in range(len(images)) if i not in decoded]
        others = dict(zip(rest, pool.map(self._load, (images[i] for i in rest)), strict=True))
        return [decoded[i] if i in decoded else others[i] for i in range(len(images))]

    def _is_for_dali(self, data: bytes) -> bool:
        # without its end mark a JPEG is most likely cut short: DALI would fail the whole batch, and print why
        if not data[-_MAX_PADDING:].rstrip(b"\0").endswith(b"\xff\xd9"):
            return False
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.format != "JPEG" or image.mode != "RGB" or orientation(image) != 1:
                    return False
                return self.device.type == "cuda" or not shrink_on_decode(image, self.size)
        except Exception:  # decoders raise nearly anything on damaged bytes
            return False

    def _load(self, data: bytes | np.ndarray) -> Tensor | InputError:
        try:
            return load_image(data, self.size)
        except InputError as error:
            return error
        except MemoryError:
            return InputError("the image does not fit into memory")

    def _run(self, images: list[bytes], pool: ThreadPoolExecutor) -> list[Tensor | InputError]:
        feeds = {"image": dali.image_feed(images)}
        if self.device.type == "cuda":
            return list(self._graph.run(feeds)[0].cpu())
        # DALI's resize rounds in another way
        return list(pool.map(self._load, [pixels.numpy() for pixels in self._graph.run_views(feeds)]))

    def _define(self) -> tuple:
        rgb = dali.decode(self.device)
        return (dali.planes_first(dali.resize(rgb, self.size)) if self.device.type == "cuda" else rgb,)
