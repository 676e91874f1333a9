"""The data of a run: its two splits are checked, their texts counted, and their loaders opened."""

from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from prismer.dataloading.feed.augment import AugmentConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS
from prismer.model import Prismer
from prismer.texts import ChooseTexts, answer_fits, choose_captions, choose_class, choose_joint, choose_questions
from prismer.training.config import TrainConfig
from prismer.training.initial_model import semantics_folder
from prismer.training.streams import print_on_rank_zero
from prismer.training.tasks import TASKS
from prismer.training.text_statistics import TextCounts, TextStatistics, count_texts
from prismer.training.zero import gather_json

_NO_AUGMENTATION = AugmentConfig(min_area=1.0, flip=0.0, num_ops=0)


def check_dataset(data: Path) -> None:
    """Refuse a dataset folder without a training split.

    Raises:
        ValueError: if there is no `data`/train.
    """
    if not (data / "train").is_dir():
        raise InputError(f"no dataset at {data / 'train'}; render or import one, or name another with --data")


def check_texts(config: TrainConfig, model: Prismer, run: Path, first_start: bool) -> None:
    """Check that both splits have texts for the task, and save the training split's statistics in `run` (rank 0).

    Args:
        run: the run folder.
        first_start: whether the training split is read; a resumed run has its statistics already.

    Raises:
        ValueError: if a split has no texts for the task.
    """
    data = Path(config.data)
    for split in ("train", "val"):
        if not (data / split).is_dir() or (split == "train" and not first_start):
            continue
        dataset = ShardDataset(data / split)
        counts = count_texts(dataset)
        counts.check(config.task, data / split)
        if counts.skipped:
            print_on_rank_zero(
                f"{len(counts.skipped)} of {len(dataset)} samples of {data / split} cannot be used and will be "
                f"skipped; the first: {counts.skipped[0]}"
            )
        if split == "train":
            _statistics(config, model, dataset, counts).save(run)


def _statistics(config: TrainConfig, model: Prismer, dataset: ShardDataset, counts: TextCounts) -> TextStatistics:
    room = model.config.max_positions
    fits = partial(answer_fits, model.tokenizer, max_positions=room)
    long = [answer for answer in counts.answers if not fits(answer)]
    if long:
        print_on_rank_zero(
            f"{len(long)} answers are too long for the model's {room} positions; their samples will be skipped "
            f"(the first: {long[0][:60]!r}...)"
        )
    return TextStatistics.from_counts(counts, dataset.classes.get("class"), config.max_answers, fits)


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
) -> tuple[Loader, Loader | None]:
    """The loaders of this rank: of the training split, and of the validation split if there is one.

    Args:
        classes: class names, for samples whose class is an index.
        micro_batch: training images per forward pass of this process.

    Raises:
        ValueError: if a split is damaged, or the training split is smaller than a batch.
    """
    data = Path(config.data)
    common = dict(
        config=model.config,
        semantics=Semantics.for_config(model.config, semantics_folder(config.semantics, config.model)),
        seed=config.seed,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        threads=config.loader_threads,
        device=device,
    )
    augment = AugmentConfig(min_area=config.crop_min_area, flip=config.flip, num_ops=config.augment_ops)
    counts = list(config.texts_per_image.values())
    train = Loader(
        ShardDataset(data / "train"),
        batch_size=micro_batch,
        texts=choose_texts(config, model, classes),
        group_size=sum(counts),
        # texts of the second kind have another length
        split=counts[0] if len(counts) > 1 else 0,
        augment=None if augment == _NO_AUGMENTATION else augment,
        drop_labels=config.drop_labels,
        **common,
    )
    if not (data / "val").is_dir():
        return train, None
    val = ShardDataset(data / "val")
    return train, Loader(val, batch_size=config.eval_batch_size, training=False, **common)


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
