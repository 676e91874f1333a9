"""The data of a run: its two splits are checked, their texts read, and their loaders opened."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from prismer.dataloading.feed.augment import AugmentConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset
from prismer.model import Prismer
from prismer.texts import ChooseTexts, answer_fits, caption_texts, classification_texts, joint_texts, vqa_texts
from prismer.training.config import TrainConfig
from prismer.training.evaluation import Survey, collect_knowledge, survey
from prismer.training.zero import gather_json

NO_AUGMENTATION = AugmentConfig(min_area=1.0, flip=0.0, num_ops=0)


def find_dataset(data: Path) -> None:
    """Refuse a folder without a training split.

    Raises:
        ValueError: if there is no `data`/train.
    """
    if not (data / "train").is_dir():
        raise ValueError(f"no dataset at {data / 'train'}; render or import one, or name another with --data")


def read_texts(config: TrainConfig, model: Prismer, run: Path, first: bool, say: Callable[[str], None]) -> None:
    """Check that both splits have texts for the task; at the first start, keep in `run` what those of training say.

    Args:
        run: the run folder.
        first: whether the run starts for the first time; later the training split is not read again.
        say: told what will be skipped.

    Raises:
        ValueError: if a split has nothing for the task.
    """
    data = Path(config.data)
    for split in ("train", "val"):
        if not (data / split).is_dir() or (split == "train" and not first):
            continue
        dataset = ShardDataset(data / split)
        found = survey(dataset)
        found.check(config.task, data / split)
        if found.skipped:
            say(
                f"{len(found.skipped)} of {len(dataset)} samples of {data / split} cannot be used and will be "
                f"skipped; the first: {found.skipped[0]}"
            )
        if split == "train":
            _keep_knowledge(config, model, dataset, found, run, say)


def _keep_knowledge(
    config: TrainConfig, model: Prismer, dataset: ShardDataset, found: Survey, run: Path, say: Callable
) -> None:
    def fits(answer: str) -> bool:
        return answer_fits(model.tokenizer, answer, model.config.max_positions)

    long = [answer for answer in found.answers if not fits(answer)]
    if long:
        say(
            f"{len(long)} answers are too long for the model's {model.config.max_positions} positions; their samples "
            f"will be skipped (the first: {long[0][:60]!r}...)"
        )
    collect_knowledge(dataset, config.max_answers, found=found, fits=fits).save(run)


def choose_texts(config: TrainConfig, model: Prismer, classes: list[str]) -> tuple[ChooseTexts, int]:
    """What the loader takes from an image's JSON, and how many texts at most."""
    tokenizer, prefix, room = (model.tokenizer, model.config.caption_prefix, model.config.max_positions)
    captions, questions = config.captions_per_image, config.questions_per_image
    if config.task == "joint":
        return joint_texts(tokenizer, prefix, captions, questions, room), captions + questions
    if config.task == "vqa":
        return vqa_texts(tokenizer, questions, room), questions
    if config.task == "classify":
        return classification_texts(tokenizer, class_names=classes or None, max_positions=room), 1
    if config.task == "pretrain":
        prefix = ""
    return caption_texts(tokenizer, prefix, captions, room), captions


def open_loaders(
    config: TrainConfig, model: Prismer, classes: list[str], micro_batch: int, device: torch.device
) -> tuple[Loader, Loader | None]:
    """The loaders of this rank: of the training split, and of the validation split if there is one.

    Args:
        classes: class names, for classification.
        micro_batch: training images per forward pass of this process.

    Raises:
        ValueError: if a split is damaged, or too small for a batch.
    """
    data = Path(config.data)
    common = dict(
        config=model.config,
        semantics=Semantics.for_config(model.config, config.semantics or None),
        seed=config.seed,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        threads=config.loader_threads,
        device=device,
    )
    augment = AugmentConfig(min_area=config.crop_min_area, flip=config.flip, num_ops=config.augment_ops)
    texts, group_size = choose_texts(config, model, classes)
    train = Loader(
        ShardDataset(data / "train"),
        batch_size=micro_batch,
        texts=texts,
        group_size=group_size,
        split=config.captions_per_image if config.task == "joint" else 0,
        augment=None if augment == NO_AUGMENTATION else augment,
        drop_labels=config.drop_labels,
        **common,
    )
    if not (data / "val").is_dir():
        return train, None
    val = ShardDataset(data / "val")
    return train, Loader(val, batch_size=config.eval_batch_size, training=False, **common)


def check_readable(val: Loader, group: dist.ProcessGroup) -> None:
    """Refuse a validation split of which no image can be read, before any step is spent (a collective).

    Raises:
        ValueError: on all ranks, if none has read one.
    """
    with closing(val.epoch(0)) as batches:
        readable = next(batches, None) is not None
    if not any(gather_json(readable, group)):
        why = val.skipped[0].reason if val.skipped else "it is empty"
        raise ValueError(
            f"none of the {len(val.dataset)} samples of {val.dataset.folder} can be read ({why}); write the split "
            f"again, or take it away to train without"
        )
