"""Encoded images of any format -> square RGB pixels, many at a time.

A model that is asked about a folder must say what it says about each image alone. On a CPU the pixels are therefore
those of `load_image`, which threads call. DALI has no part in that: it decodes with the same libjpeg-turbo, rounds in
another way when it resizes, and takes longer for small images. On a GPU, DALI decodes upright RGB JPEGs, which nearly
all photos are, and resizes them, with roundings of its own; `load_image` reads the rest: other formats, where DALI
ignores transparency and cuts 16 bits, and JPEGs that are cut short.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from prismer.dataloading.feed import dali
from prismer.dataloading.feed.load_image import load_image
from prismer.dataloading.feed.rgb import orientation
from prismer.errors import InputError

# zeros that may follow the end mark of a JPEG
_MAX_PADDING = 64


class ImageDecoder:
    """Decodes batches of images; a broken image costs no other image its pixels.

    Args:
        size: side of the results, px.
        batch_size: of the largest batch.
        device: the model's; on a CUDA device DALI decodes.
    """

    def __init__(self, size: int, *, batch_size: int, device: str | torch.device = "cpu"):
        self.size, self.device = size, torch.device(device)
        self._graph = None
        if self.device.type == "cuda":
            self._graph = dali.Graph(self._define, batch_size=batch_size, device=device)

    def __call__(self, images: Sequence[bytes], pool: ThreadPoolExecutor) -> list[Tensor | InputError]:
        """Decode one batch.

        Args:
            images: encoded images.
            pool: threads for what DALI does not read.

        Returns:
            For each image (3, size, size) uint8 on the CPU, or why it has no pixels.
        """
        decoded = self._decode_by_dali(self._graph, images, pool) if self._graph is not None else {}
        rest = [i for i in range(len(images)) if i not in decoded]
        others = dict(zip(rest, pool.map(self._load, (images[i] for i in rest)), strict=True))
        return [decoded[i] if i in decoded else others[i] for i in range(len(images))]

    def _load(self, data: bytes) -> Tensor | InputError:
        try:
            return load_image(data, self.size)
        except InputError as error:
            return error
        except MemoryError:
            return InputError("the image does not fit into memory")

    def _decode_by_dali(
        self, graph: dali.Graph, images: Sequence[bytes], pool: ThreadPoolExecutor
    ) -> dict[int, Tensor]:
        """Position -> pixels of the images that DALI decodes."""
        places = [i for i, plain in enumerate(pool.map(_is_for_dali, images)) if plain]
        while places:
            try:
                pixels = graph.run({"image": dali.image_feed([images[i] for i in places])})[0].cpu()
            except dali.UndecodableImages as error:
                # `load_image` may read them all the same, and if not, it has the reason
                places = [i for place, i in enumerate(places) if place not in error.reasons]
            else:
                return dict(zip(places, pixels, strict=True))
        return {}

    def _define(self) -> tuple:
        return (dali.planes_first(dali.resize(dali.decode(self.device), self.size)),)


def _is_for_dali(data: bytes) -> bool:
    # without its end mark a JPEG is most likely cut short: DALI would fail the whole batch, and print why
    if not data[-_MAX_PADDING:].rstrip(b"\0").endswith(b"\xff\xd9"):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1
    except Exception:  # decoders raise nearly anything on damaged bytes
        return False
