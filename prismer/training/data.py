"""The data of a run: the splits of its datasets are checked, their texts counted, and their loaders opened.

A run has one dataset or several (dataloading/mixture/). Several give one training split, a mixture; the validation
split of each is evaluated apart, under the dataset's name.
"""

from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from prismer.dataloading.feed.augment import AugmentConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.feed.order import Order, choose_order
from prismer.dataloading.mixture.dataset import MixedDataset, MixedPart
from prismer.dataloading.mixture.order import MixedOrder
from prismer.dataloading.mixture.parts import slots_of
from prismer.dataloading.scenes.names import kind_names
from prismer.dataloading.scenes.rename import has_shapes, rename_shapes
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS
from prismer.model import Prismer
from prismer.storage.output import has_file
from prismer.storage.places import inside
from prismer.texts import ChooseTexts, answer_fits, choose_captions, choose_class, choose_joint, choose_questions
from prismer.training.config import TrainConfig
from prismer.training.initial_model import semantics_folder
from prismer.training.streams import print_on_rank_zero
from prismer.training.tasks import TASKS
from prismer.training.text_statistics import TextCounts, TextStatistics, count_texts
from prismer.training.zero import gather_json

_NO_AUGMENTATION = AugmentConfig(min_area=1.0, flip=0.0, num_ops=0)


def has_split(place: str, split: str) -> bool:
    """Whether there is a split of this name at `place`.

    Raises:
        RuntimeError: if a bucket or server cannot be used.
    """
    found = inside(place, split)
    return found.is_dir() if isinstance(found, Path) else has_file(found, "index.json")


def check_dataset(place: str) -> None:
    """Refuse a dataset without a training split.

    Raises:
        ValueError: if there is no `place`/train.
    """
    if not has_split(place, "train"):
        raise InputError(f"no dataset at {inside(place, 'train')}; render or import one, or name another with --data")


def check_texts(config: TrainConfig, model: Prismer, run: Path, first_start: bool) -> None:
    """Check that every split has texts for the task, and save the training splits' statistics in `run` (rank 0).

    Args:
        run: the run folder.
        first_start: whether the training splits are read; a resumed run has its statistics already.

    Raises:
        ValueError: if a split has no texts for the task.
    """
    if first_start:
        train = open_training_split(config)
        counts = TextCounts()
        for dataset in train.parts if isinstance(train, MixedDataset) else [train]:
            counts.add(_check_split(config.task, dataset))
        _statistics(config, model, train, counts).save(run)
    for part in config.parts:
        if has_split(part.place, "val"):
            _check_split(config.task, ShardDataset(inside(part.place, "val")))


def _check_split(task: str, dataset: ShardDataset | MixedPart) -> TextCounts:
    counts = count_texts(dataset)
    counts.check(task, dataset.place)
    if counts.skipped:
        print_on_rank_zero(
            f"{len(counts.skipped)} of {len(dataset)} samples of {dataset.place} cannot be used and will be "
            f"skipped; the first: {counts.skipped[0]}"
        )
    return counts


def _statistics(
    config: TrainConfig, model: Prismer, dataset: ShardDataset | MixedDataset, counts: TextCounts
) -> TextStatistics:
    room = model.config.max_positions
    fits = partial(answer_fits, model.tokenizer, max_positions=room)
    long = [answer for answer in counts.answers if not fits(answer)]
    if long:
        print_on_rank_zero(
            f"{len(long)} answers are too long for the model's {room} positions; their samples will be skipped "
            f"(the first: {long[0][:60]!r}...)"
        )
    classes = dataset.classes.get("class")
    if classes and isinstance(dataset, MixedDataset):
        # the classes of a dataset that has no table, but names in its samples
        named = {name for name in counts.classes if isinstance(name, str)}
        classes = [*classes, *sorted(named.difference(classes))]
    return TextStatistics.from_counts(counts, classes, config.max_answers, fits)


def open_training_split(config: TrainConfig) -> ShardDataset | MixedDataset:
    """The training split of the run's dataset, or the mixture of those of its datasets.

    Raises:
        ValueError: if a split is damaged, or the datasets do not fit together.
    """
    parts = config.parts
    datasets = [ShardDataset(inside(part.place, "train")) for part in parts]
    return MixedDataset(datasets, [part.name for part in parts]) if len(parts) > 1 else datasets[0]


def _order(config: TrainConfig, dataset: ShardDataset | MixedDataset) -> Order:
    options = dict(seed=config.seed, kind=config.order, global_batch=config.batch_size)
    if not isinstance(dataset, MixedDataset):
        return choose_order(dataset, **options)
    slots, rounded = slots_of(config.parts)
    order = MixedOrder(dataset, slots, **options)
    print_on_rank_zero(order.line() + (", weights rounded to thousandths" if rounded else ""))
    return order


def choose_texts(config: TrainConfig, model: Prismer, classes: list[str]) -> ChooseTexts:
    """The function that draws the task's texts from a sample's JSON.

    Args:
        classes: class names, for samples whose class is an index.
    """
    task, tokenizer, room = TASKS[config.task], model.tokenizer, model.config.max_positions
    prefix = model.config.caption_prefix if task.caption_prefix else ""
    choosers = {
        CAPTIONS: partial(choose_captions, tokenizer, prefix, config.captions_per_image, room),
        QUESTIONS: partial(choose_questions, tokenizer, config.questions_per_image, room),
        CLASSES: partial(choose_class, tokenizer, classes, room),
    }
    return partial(choose_joint, {kind.field: choosers[kind] for kind in task.texts})


def open_loaders(
    config: TrainConfig, model: Prismer, classes: list[str], micro_batch: int, device: torch.device
) -> tuple[Loader, dict[str, Loader]]:
    """The loaders of this rank: of the training split, and of every validation split by the name of its dataset.

    The only dataset of a run has the name "". With `rename_kinds`, rendered scenes are validated three times: with
    their own names ("original"), with other names of the training ("seen"), and with held-out ones ("unseen").

    Args:
        classes: class names, for samples whose class is an index.
        micro_batch: training images per forward pass of this process.

    Raises:
        ValueError: if a split is damaged, the training split is smaller than a batch, or there is nothing to rename.
    """
    common = dict(
        config=model.config,
        semantics=Semantics.for_config(model.config, semantics_folder(config.semantics, config.model)),
        tokenizer=model.tokenizer,
        seed=config.seed,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        threads=config.loader_threads,
        device=device,
    )
    augment = AugmentConfig(min_area=config.crop_min_area, flip=config.flip, num_ops=config.augment_ops)
    counts = list(config.texts_per_image.values())
    dataset = open_training_split(config)
    rename = None
    if config.rename_kinds:
        _check_renaming(model, dataset)
        rename = partial(rename_shapes, kind_names()[0])
    train = Loader(
        dataset,
        batch_size=micro_batch,
        texts=choose_texts(config, model, classes),
        group_size=sum(counts),
        # texts of the second kind have another length
        split=counts[0] if len(counts) > 1 else 0,
        augment=None if augment == _NO_AUGMENTATION else augment,
        drop_labels=config.drop_labels,
        order=_order(config, dataset),
        rename=rename,
        **common,
    )
    parts, val = config.parts, {}
    for part in parts:
        if has_split(part.place, "val"):
            split = ShardDataset(inside(part.place, "val"))
            name = part.name if len(parts) > 1 else ""
            for kind, names in _validation_names(config, split).items():
                rename = None if names is None else partial(rename_shapes, names)
                loader = Loader(split, batch_size=config.eval_batch_size, training=False, rename=rename, **common)
                val["-".join(filter(None, (name, kind)))] = loader
    return train, val


def _validation_names(config: TrainConfig, split: ShardDataset) -> dict[str, tuple[str, ...] | None]:
    """Names with which a split is validated, by what they are called; None for its own names."""
    if not (config.rename_kinds and has_shapes(split.classes)):
        return {"": None}
    seen, held_out = kind_names()
    return {"original": None, "seen": seen, "unseen": held_out}


def _check_renaming(model: Prismer, dataset: ShardDataset | MixedDataset) -> None:
    """Refuse to rename what nobody renders, or names that no expert tells the model."""
    if not has_shapes(dataset.classes):
        raise InputError(
            f"rename_kinds renames the shapes of rendered scenes, and {dataset.place} has none; leave it out"
        )
    experts = {*model.config.experts, *model.config.expert_text}
    if not experts & {"seg", "obj_detection"}:
        raise InputError("rename_kinds needs a model that reads seg or obj_detection; choose another model")


def check_readable(val: Loader, group: dist.ProcessGroup) -> None:
    """Refuse a validation split none of whose images can be read, before any step is spent (collective).

    Raises:
        ValueError: on all ranks, if none of them reads an image.
    """
    with closing(val.epoch(0)) as batches:
        readable = next(batches, None) is not None
    if not any(gather_json(readable, group)):
        why = val.skipped[0].reason if val.skipped else "it is empty"
        raise InputError(
            f"none of the {len(val.dataset)} samples of {val.dataset.place} can be read ({why}); write the split "
            f"again, or move it away to train without validation"
        )
