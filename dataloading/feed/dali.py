"""DALI graphs that survive broken images, and the decoding and resizing that the trainer and the experts share.

A graph is fed from outside and keeps nothing from batch to batch. One broken image makes DALI fail the whole batch and
invalidates its pipeline object. `Graph.run` then decodes the images one by one to find the broken ones, and builds a
new object.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prismer.errors import InputError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode


class UndecodableImages(InputError):
    """Some images of a batch do not decode.

    Attributes:
        reasons: position in the batch -> why.
    """

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return "; ".join(f"image {i}: {reason}" for i, reason in sorted(self.reasons.items()))


class Graph:
    """A DALI graph.

    Args:
        define: makes the graph; its inputs are external sources with the names of the feeds.
        batch_size: of the largest batch.
        threads: CPU threads of DALI.
        device: "cpu", or a CUDA device that decodes and holds the outputs.

    Attributes:
        stream: what outputs are copied on; None on a CPU.
    """

    def __init__(
        self, define: Callable[[], tuple], *, batch_size: int, threads: int = 2, device: str | torch.device = "cpu"
    ):
        self.define, self.batch_size, self.threads = define, batch_size, threads
        self.device = torch.device(device)
        # its own stream: waiting for the copies below must not wait for the model's kernels
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pipeline = self._build(batch_size)
        self._shown = None

    def run(self, feeds: dict[str, list[np.ndarray]]) -> list[Tensor]:
        """The outputs for one batch, in the order of the graph, as tensors that DALI never reuses.

        Args:
            feeds: input -> one array per image; "image" is the encoded bytes.

        Raises:
            UndecodableImages: if DALI fails on some images; the graph stays usable.
        """
        outputs = self._outputs(feeds)
        with torch.cuda.stream(self.stream):
            # copies: DALI reuses a buffer once it is released, even if kernels have yet to read it
            tensors = [torch.from_dlpack(output.as_tensor()).clone() for output in outputs]
            if self.stream is not None:
                self.stream.synchronize()
        return tensors

    def run_views(self, feeds: dict[str, list[np.ndarray]]) -> list[Tensor]:
        """The only output of a graph on the CPU, image by image, in any sizes; valid until the next call.

        Args:
            feeds: as above.

        Raises:
            UndecodableImages: as above.
        """
        self._shown = None
        (self._shown,) = self._outputs(feeds)
        return [torch.from_dlpack(self._shown[i]) for i in range(len(self._shown))]

    def _outputs(self, feeds: dict[str, list[np.ndarray]]) -> tuple:
        try:
            return self._run(self._pipeline, feeds)
        except RuntimeError as error:
            # after an error DALI's pipeline object is no longer valid
            self._pipeline = self._build(self.batch_size)
            reasons = self._find_undecodable(feeds)
            if not reasons:
                raise
            raise UndecodableImages(reasons) from error

    def _build(self, batch_size: int) -> "Pipeline":
        # not at the top: importing DALI takes seconds
        from nvidia.dali import pipeline_def

        device_id = None
        if self.device.type == "cuda":
            device_id = self.device.index
            if device_id is None:
                device_id = torch.cuda.current_device()
        # on a CPU the dynamic executor allocates new memory for each batch: its pages cost a third of the decoding
        executor = {"exec_dynamic": False} if self.device.type == "cpu" else {}
        return pipeline_def(self.define, enable_conditionals=True)(
            batch_size=batch_size, num_threads=self.threads, device_id=device_id, prefetch_queue_depth=1, **executor
        )

    def _run(self, pipeline: "Pipeline", feeds: dict[str, list[np.ndarray]]) -> tuple:
        for name, arrays in feeds.items():
            pipeline.feed_input(name, arrays)
        return pipeline.run()

    def _find_undecodable(self, feeds: dict[str, list[np.ndarray]]) -> dict[int, str]:
        reasons, single = {}, self._build(1)
        for i in range(len(feeds["image"])):
            try:
                self._run(single, {name: arrays[i : i + 1] for name, arrays in feeds.items()})
            except RuntimeError as error:
                reasons[i] = _reason(error)
                single = self._build(1)
        return reasons


def image_feed(images: list[bytes]) -> list[np.ndarray]:
    """Encoded images as the feed of the input "image"."""
    return [np.frombuffer(image, np.uint8) for image in images]


def decode(device: torch.device) -> "DataNode":
    """Inside a graph: the input "image" decoded to (h, w, 3) uint8 RGB, upright, on the device.

    Takes JPEG, PNG, BMP, WebP and TIFF; grey and CMYK become RGB.
    """
    from nvidia.dali import fn, types

    image = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
    kind = "mixed" if device.type == "cuda" else "cpu"
    return fn.decoders.image(image, device=kind, output_type=types.RGB)


def resize(rgb: "DataNode", side: int, **options: Any) -> "DataNode":
    """Inside a graph: RGB pixels resized to (side, side); `options` are those of DALI's resize."""
    from nvidia.dali import fn, types

    # cubic with antialias equals Pillow's BICUBIC to the bit
    return fn.resize(rgb, size=[side, side], interp_type=types.INTERP_CUBIC, antialias=True, **options)


def planes_first(pixels: "DataNode") -> "DataNode":
    """Inside a graph: (h, w, planes) as (planes, h, w)."""
    from nvidia.dali import fn

    return fn.transpose(pixels, perm=[2, 0, 1])


def _reason(error: Exception) -> str:
    # DALI's message is a page long; the decoder's own words, if any, follow "encountered:"
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines()]
    words = next((line for line in lines if line), str(error).strip().splitlines()[0])
    if words.startswith("Failed to decode sample"):
        return "the image does not decode; it is damaged or cut short"
    return f"the image does not decode ({words})"
