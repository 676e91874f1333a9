"""Shards -> batches: the samples in their order, their texts and tables, and the thread that works ahead of the model.

The order of an epoch (order.py) does not depend on the number of processes. A global batch is a slice of the order, and
each rank takes its part of the slice. Every random number is keyed by (seed, epoch, sample). One process of batch 16
and two of batch 8 therefore see the same global batches, and a run resumes at any (epoch, step) without a saved state.
"""

import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor

from prismer.batch import IGNORE_INDEX, Batch, ImageBatch
from prismer.config import PrismerConfig
from prismer.dataloading.feed.augment import AugmentConfig, AugmentParams, Draw, draw_params, keyed_rng
from prismer.dataloading.feed.dali import UndecodableImages
from prismer.dataloading.feed.detections import Detection, DetectionFinder
from prismer.dataloading.feed.image_pipeline import ImagePipeline
from prismer.dataloading.feed.order import EpochOrder, InOrder, Order, RandomOrder
from prismer.dataloading.feed.samples import Samples
from prismer.dataloading.scenes.rename import Rename
from prismer.dataloading.semantics.features import FeatureTables, Meanings, Semantics
from prismer.dataloading.store.sample_json import check_meta
from prismer.dataloading.store.shards import CorruptSample, Sample
from prismer.errors import InputError, MachineError
from prismer.texts import ChooseTexts, Text, collate
from prismer.tokenizer import Tokenizer

# in a shuffled order, this many bad samples in a row are a mistake in the set-up
_MAX_SKIPS_IN_A_ROW = 1000
# of a dataset in a bucket, the shards of this batch and of the next ones are fetched together, at most so many
_SHARDS_AHEAD = 128


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out.

    Attributes:
        shard, key: its name; key "" if unknown.
        reason: why.
    """

    shard: str
    key: str
    reason: str


@dataclass
class _Item:
    """One sample on its way into a batch.

    Attributes:
        index: position in the dataset.
        params: augmentation; None without.
        meanings: of the ids in its maps.
        detections: that the decoder reads as text.
        texts: chosen for it.
    """

    index: int
    sample: Sample
    params: AugmentParams | None
    meanings: Meanings
    detections: list[Detection]
    texts: list[Text]


class Loader:
    """Batches of a dataset for one rank.

    In training the incomplete last global batch of an epoch is left out, and the next readable sample of the order
    replaces an unreadable one. In evaluation unreadable samples are left out, and the last batch may be short.

    Args:
        dataset: the samples, and the class tables of their seg and obj_detection maps.
        config: of the model: experts as maps and as text, image and label size, token ids.
        batch_size: images per batch and rank.
        texts: chooses the texts of one image from its JSON (see prismer/texts.py); None for batches without texts.
        group_size: texts per image, G; texts of weight 0 fill shorter choices.
        split: texts of an image before those of another length (captions before questions), see TextBatch.
        semantics: features of class names and words.
        tokenizer: the model's own; only a model that reads detections as text needs it.
        augment: how training images are augmented; None only resizes them.
        seed: of all draws, and of the order that None stands for.
        rank, world: this process and the number of processes.
        training: see above.
        threads: CPU threads that decode, and as many that read.
        prefetch: batches prepared ahead.
        device: processes images and maps, and holds the batches.
        drop_labels: probability that a training sample loses all its maps and detections, so that the model also
            learns to work without experts.
        order: of the samples; None for a new permutation in every epoch of training, and for the order of the dataset
            in evaluation.
        rename: gives the classes and texts of a sample other names as it is read (scenes/rename.py); None for its own.
            A sample that loses its maps keeps its names, since nothing tells the model new ones.

    Attributes:
        steps_per_epoch: batches of this rank in an epoch.
        skipped: the samples left out so far, each once.
        reasons: position of each of them in the dataset -> why.

    Raises:
        ValueError: if an argument is out of range, an epoch of training is smaller than a global batch, a class name
            has no features, or the tokenizer is needed and not given.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        config: PrismerConfig,
        batch_size: int,
        texts: ChooseTexts | None = None,
        group_size: int = 1,
        split: int = 0,
        semantics: Semantics,
        tokenizer: Tokenizer | None = None,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        training: bool = True,
        threads: int = 2,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
        drop_labels: float = 0.0,
        order: Order | None = None,
        rename: Rename | None = None,
    ):
        for name, value in dict(
            batch_size=batch_size, group_size=group_size, threads=threads, prefetch=prefetch
        ).items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world:
            raise InputError(f"rank is {rank} of {world}; ranks count from 0")
        if not 0 <= drop_labels <= 1:
            raise InputError(f"drop_labels is {drop_labels}; it is a probability, give 0 to 1")
        if not training and (augment is not None or drop_labels):
            raise InputError("evaluation neither augments nor drops labels; leave augment and drop_labels out")
        if order is None:
            order = RandomOrder(dataset.starts, seed) if training else InOrder(dataset.starts)
        if training and len(order) < batch_size * world:
            raise InputError(
                f"an epoch has {len(order)} samples, one global batch {batch_size * world}; "
                f"lower the batch size or give more samples"
            )
        self.dataset, self.config, self.batch_size = dataset, config, batch_size
        self.texts, self.group_size, self.augment = texts, group_size, augment
        self.split, self.order, self.rename = split, order, rename
        self.seed, self.rank, self.world, self.training = seed, rank, world, training
        self.threads, self.prefetch, self.drop_labels = threads, prefetch, drop_labels
        self.device = torch.device(device)
        self.skipped: list[Skipped] = []
        self.steps_per_epoch = self._count_steps()

        self._tables = FeatureTables(config, dataset.classes, semantics)
        self._finder = DetectionFinder(config, tokenizer) if config.expert_text else None
        self.reasons: dict[int, str] = {}
        self._bad_lock = threading.Lock()
        # the pipeline serves one thread at a time, and an iterator that was left open may still work ahead
        self._turn = threading.Lock()
        self._pipeline = ImagePipeline(
            config, batch_size=batch_size, augmented=augment is not None, threads=threads, device=device
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `start_step` on, prepared by a thread that ends with the iterator.

        Raises:
            ValueError: if `start_step` is beyond the end of the epoch.
            ValueError: from the iterator, if more texts are chosen for an image than a group holds.
            RuntimeError: from the iterator, if 1000 samples in a row are unreadable.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise InputError(f"start_step is {start_step}; the epoch has steps 0 to {self.steps_per_epoch}")
        return self._epoch(epoch, start_step)

    def batches_of(self, ranges: Iterable[range]) -> Iterator[tuple[range, Batch | None]]:
        """A batch for each of several ranges of positions in the dataset, prepared ahead as those of an epoch.

        For evaluation only. A range holds at most `batch_size` positions.

        Yields:
            The range, and the batch of its readable samples, None without any; `reasons` has the other positions.
        """
        assert not self.training
        return self._work_ahead(partial(self._batches, 0, ranges))

    def _epoch(self, epoch: int, start_step: int) -> Iterator[Batch]:
        steps = map(self._positions, range(start_step, self.steps_per_epoch))
        with closing(self._work_ahead(partial(self._batches, epoch, steps))) as batches:
            for _, batch in batches:
                # an evaluation batch may have no readable sample
                if batch is not None:
                    yield batch

    def _count_steps(self) -> int:
        count, global_batch = len(self.order), self.batch_size * self.world
        if self.training:
            return count // global_batch
        # the last global batch may have no sample for this rank
        whole, rest = divmod(count, global_batch)
        return whole + (rest > self.rank * self.batch_size)

    def _batches(self, epoch: int, ranges: Iterable[range]) -> Iterator[tuple[range, Batch | None]]:
        order = self.order.epoch(epoch)
        find = partial(self._readable_item, order)
        with ThreadPoolExecutor(self.threads) as pool:

            def read(positions: range) -> tuple[range, list[Future[_Item | None]]]:
                if self.dataset.is_remote:
                    self.dataset.prefetch(order.shards_ahead(positions, _SHARDS_AHEAD))
                return positions, [pool.submit(find, position) for position in positions]

            # the samples of the next batch are read while DALI works on this one
            for (positions, found), _ in pairwise(chain(map(read, ranges), [None])):
                yield positions, self._batch([future.result() for future in found], positions, find)

    def _positions(self, step: int) -> range:
        """Positions of this rank's batch in the epoch's order."""
        begin = (step * self.world + self.rank) * self.batch_size
        return range(begin, min(begin + self.batch_size, len(self.order)))

    def _batch(self, found: list[_Item | None], positions: range, find: Callable[[int], _Item | None]) -> Batch | None:
        """The batch of the samples found at `positions`; None if an evaluation batch has no readable sample."""
        while True:
            items = [item for item in found if item is not None]
            if not items:
                return None
            try:
                with self._turn:
                    rgb, labels = self._pipeline(
                        [item.sample.jpeg for item in items],
                        [item.sample.labels for item in items],
                        None if self.augment is None else [item.params for item in items],
                    )
            except UndecodableImages as error:
                for i, reason in error.reasons.items():
                    self._skip(items[i].index, reason)
                found = [find(position) for position in positions]
            else:
                return self._assemble(items, rgb, labels)

    def _readable_item(self, order: EpochOrder, position: int) -> _Item | None:
        """The sample at `position`; in training, else the next readable one of the order."""
        reason = "they were skipped before"
        for offset in range(min(len(order), _MAX_SKIPS_IN_A_ROW) if self.training else 1):
            index, visit = order[(position + offset) % len(order)]
            if index in self.reasons:
                continue
            try:
                return self._item(index, visit)
            except ValueError as error:
                reason = str(error)
                self._skip(index, error)
        if not self.training:
            return None
        raise MachineError(f"no readable sample among {offset + 1} in a row; the last: {reason}")

    def _item(self, index: int, visit: int) -> _Item:
        sample = self.dataset[index]
        check_meta(sample.meta, self.dataset.classes)
        is_unlabelled = False
        if self.drop_labels:
            is_unlabelled = keyed_rng(Draw.LABELS, self.seed, visit, index).random() < self.drop_labels
        classes = self.dataset.classes
        if self.rename is not None and not is_unlabelled:
            rng = keyed_rng(Draw.NAMES, self.seed, visit, index)
            sample.meta, classes = self.rename(sample.meta, classes, rng)
        own_classes = None if classes is self.dataset.classes else classes
        meanings = self._tables.look_up(sample.labels, sample.meta, own_classes)
        texts = []
        if self.texts is not None:
            texts = self.texts(sample.meta, keyed_rng(Draw.TEXTS, self.seed, visit, index))
        params = None
        if self.augment is not None:
            rng = keyed_rng(Draw.AUGMENT, self.seed, visit, index)
            height, width = sample.meta.get("size", (1, 1))
            params = draw_params(self.augment, rng, width / height)
        detections = []
        if self._finder is not None:
            detections = self._finder.find(sample.labels, sample.meta, classes, params)
        if is_unlabelled:
            sample.labels, meanings, detections = {}, Meanings(), []
        return _Item(index, sample, params, meanings, detections, texts)

    def _assemble(self, items: list[_Item], rgb: Tensor, labels: dict[str, Tensor]) -> Batch:
        rows, features = self._tables.collate([item.meanings for item in items])
        texts = None
        if self.texts is not None:
            largest = max(len(item.texts) for item in items)
            if largest > self.group_size:
                raise InputError(
                    f"{largest} texts were chosen for an image, group_size is {self.group_size}; enlarge it"
                )
            # every group has the same size: the loss is a mean over B x G on every rank
            filler = ([self.config.bos_id], [IGNORE_INDEX], 0.0)
            groups = [item.texts + [filler] * (self.group_size - len(item.texts)) for item in items]
            texts = collate(groups, pad_id=self.config.pad_id, bos_id=self.config.bos_id, split=self.split)
        images = ImageBatch(
            rgb=rgb,
            labels=labels,
            rows={expert: torch.from_numpy(table) for expert, table in rows.items()},
            features=torch.from_numpy(features),
            detections=self._finder.collate([item.detections for item in items]) if self._finder else None,
        )
        keys, meta = [item.sample.key for item in items], [item.sample.meta for item in items]
        batch = Batch(images=images, texts=texts, keys=keys, meta=meta)
        if self.device.type == "cpu":
            return batch
        with torch.cuda.stream(self._pipeline.stream):
            batch = batch.to(self.device)
            self._pipeline.stream.synchronize()
        return batch

    def _skip(self, index: int, reason: str | ValueError) -> None:
        with self._bad_lock:
            if index in self.reasons:
                return
            if isinstance(reason, CorruptSample):
                skipped = Skipped(reason.shard, reason.key, reason.reason)
            else:
                shard = self.dataset.shards[self.dataset.shard_of(index)]
                skipped = Skipped(shard, self.dataset.key(index), str(reason))
            self.reasons[index] = skipped.reason
        if not self.skipped:
            warnings.warn(
                f"skipping sample {skipped.key} of {skipped.shard}: {skipped.reason}; others will be skipped "
                f"silently and listed in Loader.skipped",
                stacklevel=2,
            )
        self.skipped.append(skipped)

    def _work_ahead(
        self, produce: Callable[[], Iterator[tuple[range, Batch | None]]]
    ) -> Iterator[tuple[range, Batch | None]]:
        """Iterate `produce()` in a thread, at most `prefetch` batches ahead; closing the iterator ends the thread."""
        ready: queue.Queue = queue.Queue(self.prefetch)
        stop = threading.Event()
        end = object()

        def put(item: object) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            # for this thread alone: its own OpenMP team would exceed the cores; libgomp then puts the model's threads
            # to sleep at every barrier, which halves the speed of training on two cores
            torch.set_num_threads(1)
            try:
                for batch in produce():
                    put(batch)
                    if stop.is_set():
                        return
                put(end)
            except BaseException as error:  # the consumer raises it again
                put(error)

        thread = threading.Thread(target=work, name="prismer-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not end:
                if isinstance(item, BaseException):
                    raise item
                positions, batch = item
                yield positions, None if batch is None else self._hand_over(batch)
        finally:
            stop.set()
            thread.join()

    def _hand_over(self, batch: Batch) -> Batch:
        if self.device.type == "cuda":
            # the tensors belong to the pipeline's stream: the allocator must not reuse them while the model reads them
            images, texts = batch.images, batch.texts
            tensors = [images.rgb, images.features, *images.labels.values(), *images.rows.values()]
            tensors += [texts.ids, texts.labels, texts.weights] if texts is not None else []
            tensors += [images.detections.ids, images.detections.facts] if images.detections is not None else []
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return batch
