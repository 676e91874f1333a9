"""Encoded images and label maps -> uint8 tensors of one size: decode, crop, resize, flip, warp.

All random numbers come from outside (`AugmentParams`). DALI decodes, and on a GPU does the rest too. On a CPU, where
DALI's operators are slow, native ops follow the decoder (`native_pixels`) if they were built. The two differ by
rounding and in the crop. Native ops move the crop's edges to the nearest pixel edges, for image and maps alike, and
crop before they resize; DALI cuts through pixels, and its resize filter sees beyond the crop.

In DALI's graph the maps of a sample travel as one array of several channels, each value XOR the expert's `fill`: 0
then means "nothing here" for all of them, and one fill value serves every warp. Surface normals are turned together
with their pixels.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prismer.config import PrismerConfig
from prismer.dataloading.feed import dali, native_pixels
from prismer.dataloading.feed.augment import AugmentParams
from prismer.dataloading.store import native_ops
from prismer.dataloading.store.label_maps import resize_nearest
from prismer.errors import InputError
from prismer.experts import EXPERTS


class ImagePipeline:
    """Decodes and augments batches; keeps nothing from batch to batch.

    Args:
        config: gives the experts, the image size R and the label size L.
        batch_size: of the largest batch.
        augmented: whether calls come with `AugmentParams`; otherwise images and maps are only resized.
        threads: CPU threads of DALI's decoder, and as many of the native ops.
        device: "cpu", or a CUDA device that decodes and holds the outputs.

    Attributes:
        native: whether native ops follow the decoder.
        stream: CUDA stream on which the outputs are made; None on a CPU.
    """

    def __init__(
        self,
        config: PrismerConfig,
        *,
        batch_size: int,
        augmented: bool,
        threads: int = 2,
        device: str | torch.device = "cpu",
    ):
        self.experts = config.experts
        self.image_size, self.label_size = config.image_size, config.label_size
        self.augmented, self.device = augmented, torch.device(device)
        self.native = self.device.type == "cpu" and native_ops.is_built()
        self._graph = dali.Graph(
            partial(_decode_only, self.device) if self.native else self._define,
            batch_size=batch_size,
            threads=threads,
            device=device,
        )
        if self.native:
            # torch gets one thread in each: see Loader
            self._threads = threads
            self._pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
        self.stream = self._graph.stream

    def __call__(
        self, images: list[bytes], labels: list[dict[str, np.ndarray]], params: list[AugmentParams] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Process one batch.

        Args:
            images: B encoded images (JPEG, PNG, BMP, WebP, TIFF); grey and CMYK become RGB.
            labels: for each image, expert -> uint8 map (h, w) or (h, w, 3) of any size; maps may be missing.
            params: for each image its draws if `augmented`, else None.

        Returns:
            rgb (B, 3, R, R) uint8, and expert -> (B, planes, L, L) uint8; missing maps become the expert's `fill`.

        Raises:
            UndecodableImages: if DALI fails on some images; the pipeline stays usable.
        """
        if self.augmented != (params is not None):
            raise InputError("give augmentation parameters if the pipeline was made with augmented=True, else none")
        feeds = {"image": dali.image_feed(images)}
        if self.native:
            return self._run_native(self._graph.run_views(feeds), labels, params)
        if self.experts:
            feeds["maps"] = [_stack_maps(maps, self.experts) for maps in labels]
        if params is not None:
            feeds |= _parameter_feeds(params, self.image_size, self.label_size, bool(self.experts))
        rgb, *maps = self._graph.run(feeds)
        with torch.cuda.stream(self.stream):
            named = self._split_maps(maps[0]) if maps else {}
            if params is not None and "normal" in named:
                matrices = torch.from_numpy(np.stack([p.normal_matrix() for p in params]))
                named["normal"] = rotate_normals(named["normal"], matrices)
            if self.stream is not None:
                self.stream.synchronize()
        return rgb, named

    def _run_native(
        self, decoded: list[Tensor], labels: list[dict[str, np.ndarray]], params: list[AugmentParams] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        B, L = len(decoded), self.label_size
        rgb = torch.empty(B, 3, self.image_size, self.image_size, dtype=torch.uint8)
        named = {name: torch.empty(B, EXPERTS[name].planes, L, L, dtype=torch.uint8) for name in self.experts}
        if params is None:
            params = [AugmentParams()] * B

        def process(first: int) -> None:
            for b in range(first, B, self._threads):
                height, width = decoded[b].shape[:2]
                box = native_pixels.whole_pixels(params[b].window, height, width)
                native_pixels.augment_photo(decoded[b], box, params[b], rgb[b])
                window = box[0] / width, box[1] / height, box[2] / width, box[3] / height
                outputs = {name: maps[b] for name, maps in named.items()}
                native_pixels.augment_maps(labels[b], window, params[b], outputs)

        # a list, so that exceptions are raised
        list(self._pool.map(process, range(self._threads)))
        return rgb, named

    def _define(self) -> tuple:
        """The DALI graph; its inputs have the names of the feeds."""
        from nvidia.dali import fn, types
        from nvidia.dali.auto_aug import augmentations

        augmented, has_maps = self.augmented, bool(self.experts)
        rgb, maps = dali.decode(self.device), None
        if has_maps:
            maps = fn.external_source(name="maps", dtype=types.UINT8, layout="HWC")
        if has_maps and self.device.type == "cuda":
            maps = maps.gpu()
        window = {}
        if augmented:
            window = dict(
                roi_start=fn.external_source(name="start", dtype=types.FLOAT, ndim=1),
                roi_end=fn.external_source(name="end", dtype=types.FLOAT, ndim=1),
                roi_relative=True,
            )
        rgb = dali.resize(rgb, self.image_size, **window)
        if has_maps:
            label_side = [self.label_size] * 2
            maps = fn.resize(maps, size=label_side, interp_type=types.INTERP_NN, **window)
        if augmented:
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            rgb = fn.flip(rgb, horizontal=flip)
            # a branch runs only on the samples that need it
            if fn.external_source(name="autocontrast", dtype=types.BOOL, ndim=0):
                rgb = augmentations.auto_contrast(rgb)
            if fn.external_source(name="equalize", dtype=types.BOOL, ndim=0):
                rgb = fn.equalize(rgb)
            warps = fn.external_source(name="warps", dtype=types.BOOL, ndim=0)
            matrix = fn.external_source(name="matrix", dtype=types.FLOAT, ndim=2)
            if warps:
                rgb = fn.warp_affine(rgb, matrix=matrix, fill_value=0, interp_type=types.INTERP_LINEAR)
            if has_maps:
                maps = fn.flip(maps, horizontal=flip)
                matrix = fn.external_source(name="label_matrix", dtype=types.FLOAT, ndim=2)
                if warps:
                    maps = fn.warp_affine(maps, matrix=matrix, fill_value=0, interp_type=types.INTERP_NN)
        outputs = [rgb, maps] if has_maps else [rgb]
        return tuple(dali.planes_first(output) for output in outputs)

    def _split_maps(self, maps: Tensor) -> dict[str, Tensor]:
        named = {}
        for name, part in zip(self.experts, maps.split([EXPERTS[n].planes for n in self.experts], dim=1), strict=True):
            named[name] = part.bitwise_xor(EXPERTS[name].fill).contiguous()
        return named


def _decode_only(device: torch.device) -> tuple:
    return (dali.decode(device),)


def rotate_normals(maps: Tensor, matrices: Tensor) -> Tensor:
    """Turn the vectors of normal maps without moving their pixels.

    Args:
        maps: (B, 3, h, w) uint8, (n + 1) / 2 * 255 of unit vectors; pixels of three zeros are fill and stay.
        matrices: (B, 2, 2) on the CPU, applied to x and y; z stays, then the vector is scaled to length 1.

    Returns:
        (B, 3, h, w) uint8; maps whose matrix is the identity come back bit for bit.
    """
    which = (matrices != torch.eye(2, dtype=matrices.dtype)).any(2).any(1).nonzero()[:, 0]
    if not len(which):
        return maps
    matrix = matrices[which].float()[..., None, None].to(maps.device)
    which = which.to(maps.device)
    before = maps[which]
    x, y, z = (before.float() / 127.5 - 1).unbind(1)
    x, y = (matrix[:, i, 0] * x + matrix[:, i, 1] * y for i in range(2))
    scale = 127.5 * torch.rsqrt((x * x + y * y + z * z).clamp_min(1e-12))
    after = (torch.stack([x, y, z], dim=1) * scale[:, None] + 127.5).round().to(torch.uint8)
    maps = maps.clone()
    maps[which] = torch.where((before != 0).any(dim=1, keepdim=True), after, before)
    return maps


def _parameter_feeds(
    params: list[AugmentParams], image_size: int, label_size: int, has_maps: bool
) -> dict[str, list[np.ndarray]]:
    feeds = {
        "start": [np.float32(p.window[1::-1]) for p in params],
        "end": [np.float32(p.window[:1:-1]) for p in params],
        "flip": [np.int32(p.flip) for p in params],
        "autocontrast": [np.bool_(p.autocontrast) for p in params],
        "equalize": [np.bool_(p.equalize) for p in params],
        "warps": [np.bool_(p.warps) for p in params],
        "matrix": [p.pixel_matrix(image_size) for p in params],
    }
    if has_maps:
        feeds["label_matrix"] = [p.pixel_matrix(label_size) for p in params]
    return {name: [np.asarray(value) for value in values] for name, values in feeds.items()}


def _stack_maps(maps: dict[str, np.ndarray], experts: tuple[str, ...]) -> np.ndarray:
    """The maps of one sample as (h, w, channels) uint8; 0 is "nothing here"."""
    present = [maps[name] for name in experts if name in maps]
    height, width = (max((map_.shape[axis] for map_ in present), default=1) for axis in (0, 1))
    stack = np.zeros((height, width, sum(EXPERTS[name].planes for name in experts)), np.uint8)
    channel = 0
    for name in experts:
        expert = EXPERTS[name]
        if name in maps:
            map_ = maps[name].reshape(*maps[name].shape[:2], expert.planes)
            if map_.shape[:2] != (height, width):
                map_ = resize_nearest(map_, height, width)
            np.bitwise_xor(map_, expert.fill, out=stack[..., channel : channel + expert.planes])
        channel += expert.planes
    return stack
