"""Asks a model about items, batch by batch: reads, decodes and labels their images, and names what cannot be read."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from prismer.asking.items import Item, Items, result_fields
from prismer.batch import ImageBatch
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.feed.decoder import ImageDecoder
from prismer.dataloading.feed.image_batch import ExpertLabels, batch_of_pixels
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.sources.one_pass import submit_ahead, wanted_parts
from prismer.errors import InputError
from prismer.inference import Answer, Candidates
from prismer.model import Prismer

# Images that are read and decoded together, at least. More of them take the model's cores less often, and their encoded
# bytes take more memory.
_CHUNK = 32
# chunks that are read at a time, and ahead of the model
_READERS = 3
# chunks that are decoded on a GPU while the model works on one
_DECODED_AHEAD = 2
Made = TypeVar("Made")
# place of a line in its part -> its item, and what is written about it
_Rows = dict[int, tuple[Item, dict]]


@dataclass
class _Image:
    """One image of a part, and what is asked about it.

    Attributes:
        lines: (place in the part, item) of each line that asks about this image.
        data: the encoded image.
        pixels: (3, R, R) uint8.
        labels: that the item brings.
    """

    lines: list[tuple[int, Item]]
    data: bytes = b""
    pixels: Tensor | None = None
    labels: ExpertLabels | None = None


@dataclass
class _Chunk:
    """Images of one part that are read, or asked about, together.

    Attributes:
        part: number of the part.
        is_last: whether no chunk of this part follows.
        images: those that can be used, as far as is known.
        faults: (place in the part, item, reason) of each line without a result.
    """

    part: int
    is_last: bool
    images: list[_Image]
    faults: list[tuple[int, Item, str]] = field(default_factory=list)

    def drop(self, reasons: dict[int, str]) -> None:
        """Move images to the faults: place in `images` -> reason."""
        for place, reason in reasons.items():
            self.faults += [(i, item, reason) for i, item in self.images[place].lines]
        self.images = [image for place, image in enumerate(self.images) if place not in reasons]


class Asker:
    """Reads, decodes and asks, chunk by chunk."""

    def __init__(
        self,
        model: Prismer,
        task: str,
        choices: Sequence[str] | None,
        top: int,
        labeller: Labeller | None,
        semantics: Semantics | None,
        batch_size: int,
        options: dict[str, Any],
    ):
        self.model, self.task, self.top, self.labeller = model, task, top, labeller
        self.semantics, self.batch_size, self.options = semantics, batch_size, options
        self.brings_labels = labeller is None and bool(model.config.label_experts)
        self.choices = None
        if choices is not None:
            build = Candidates.classes if task == "classify" else Candidates.answers
            self.choices = build(model.tokenizer, list(choices))
        self.decoder = ImageDecoder(model.config.image_size, batch_size=max(batch_size, _CHUNK), device=model.device)

    def parts(
        self, items: Items, part_size: int, missing: Collection[int], bar: tqdm
    ) -> Iterator[tuple[int, list[tuple[Item, dict]]]]:
        """The number of each missing part, with its items and their rows."""
        rows: _Rows = {}
        waiting: list[_Image] = []
        cores = os.cpu_count() or 1
        pools = ThreadPoolExecutor(1), ThreadPoolExecutor(min(_READERS, cores)), ThreadPoolExecutor(min(8, cores))
        with pools[0] as preparing, pools[1] as readers, pools[2] as decoders:

            def decode(read: tuple[_Chunk, Future[None]]) -> _Chunk:
                chunk, future = read
                future.result()
                self._decode(chunk, decoders)
                return chunk

            # one thread reads a whole chunk: each change of threads takes the interpreter lock from the model
            read = submit_ahead(readers, self._read, self._chunks(items, part_size, missing), _READERS)
            if self.model.device.type == "cpu":
                # Beside a model on a CPU, decoding would take the model's cores. That costs more than its own time:
                # threads of the model that wait for a preempted one keep spinning.
                decoded = map(decode, read)
            else:
                decoded = (future.result() for _, future in submit_ahead(preparing, decode, read, _DECODED_AHEAD))
            for chunk in decoded:
                rows |= _fault_rows(chunk)
                bar.update(len(chunk.faults))
                # Images that were dropped are made up for by later ones of the part: a batch of a small model takes the
                # same time with seven images as with eight.
                waiting += chunk.images
                while len(waiting) >= self.batch_size or (waiting and chunk.is_last):
                    batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                    answered = self._rows(_Chunk(chunk.part, chunk.is_last, batch))
                    rows |= answered
                    bar.update(len(answered))
                if chunk.is_last:
                    yield chunk.part, [rows[i] for i in range(len(rows))]
                    rows = {}

    def _chunks(self, items: Items, part_size: int, missing: Collection[int]) -> Iterator[_Chunk]:
        for number, part in wanted_parts(items, part_size, missing):
            images: dict[object, _Image] = {}
            for i, item in enumerate(part):
                place = item.record.image
                # an image is read once for all lines of the part that ask about it
                key = (place, item.labels) if place is not None and not item.fault else i
                images.setdefault(key, _Image([])).lines.append((i, item))
            waiting = list(images.values())
            size = max(self.batch_size, _CHUNK)
            while waiting:
                chunk, waiting = waiting[:size], waiting[size:]
                yield _Chunk(number, not waiting, chunk)

    def _read(self, chunk: _Chunk) -> None:
        """Read the images of a chunk, and the labels that they bring."""
        faults = {}
        for place, image in enumerate(chunk.images):
            item = image.lines[0][1]
            try:
                image.data = item.read()
                image.labels = item.read_labels() if self.brings_labels else None
            except InputError as error:
                faults[place] = str(error)
        chunk.drop(faults)

    def _decode(self, chunk: _Chunk, decoders: ThreadPoolExecutor) -> None:
        """Decode the images of a chunk that were read."""
        if not chunk.images:
            return
        faults = {}
        for place, pixels in enumerate(self.decoder([image.data for image in chunk.images], decoders)):
            if isinstance(pixels, Tensor):
                chunk.images[place].pixels = pixels
            else:
                faults[place] = str(pixels)
            if self.labeller is None:
                chunk.images[place].data = b""
        chunk.drop(faults)

    def _rows(self, chunk: _Chunk) -> _Rows:
        """The rows of each line of each image."""
        rows: _Rows = {}
        # `_ask` may drop images
        answers = self._ask(chunk)
        for image, results in zip(chunk.images, answers, strict=True):
            for (i, item), result in zip(image.lines, results, strict=True):
                rows[i] = item, {**item.row, **result_fields(self.task, result, self.top)}
        return rows | _fault_rows(chunk)

    def _ask(self, chunk: _Chunk) -> list[list[str]] | list[list[Answer]]:
        """The results of each line of each image; images whose labels cannot be used leave the chunk."""
        if self.labeller is not None and chunk.images:
            labels = _try_each(chunk, lambda images: self.labeller([image.data for image in images]))
            for image, label in zip(chunk.images, labels or [], strict=True):
                image.labels = label
        batch = _try_each(chunk, self._batch) if chunk.images else None
        if batch is None:
            return []
        lines = [image.lines for image in chunk.images]
        if self.task == "answer":
            questions = [[item.question for _, item in group] for group in lines]
            return self.model.answer(batch, questions, self.choices, **self.options)
        if self.task == "caption":
            results = self.model.caption(batch, **self.options)
        else:
            results = self.model.classify(batch, self.choices, **self.options)
        return [[result] * len(group) for result, group in zip(results, lines, strict=True)]

    def _batch(self, images: list[_Image]) -> ImageBatch:
        pixels = torch.stack([image.pixels for image in images])
        labels = [image.labels for image in images]
        return batch_of_pixels(pixels, self.model.config, labels, self.semantics, self.model.tokenizer)


def _fault_rows(chunk: _Chunk) -> _Rows:
    return {i: (item, {**item.row, "skipped": reason}) for i, item, reason in chunk.faults}


def _try_each(chunk: _Chunk, make: Callable[[list[_Image]], Made]) -> Made | None:
    """`make` of all images; if it refuses some, they leave the chunk with its reason. None if no image is left."""
    try:
        return make(chunk.images)
    except InputError:
        reasons = {}
        for place, image in enumerate(chunk.images):
            try:
                make([image])
            except InputError as error:
                reasons[place] = str(error)
        if not reasons:
            raise
        chunk.drop(reasons)
    return make(chunk.images) if chunk.images else None
