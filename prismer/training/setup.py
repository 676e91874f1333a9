"""Set-up: everything that training needs, built from the config, the dataset and the run folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from prismer.config import PrismerConfig
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.precision import NAMES, choose_precision, slow_resumption
from prismer.tokenizer import Tokenizer
from prismer.training import zero
from prismer.training.checkpoint import restore_optimizer
from prismer.training.config import MAX_STEPS, TrainConfig
from prismer.training.data import check_dataset, check_readable, check_texts, open_loaders
from prismer.training.evaluation import predict
from prismer.training.run_folder import RunFolder
from prismer.training.streams import print_on_rank_zero
from prismer.training.text_statistics import TextStatistics
from prismer.weights.folder import from_pretrained
from prismer.weights.initial_model import start_config, start_model

# the dataset that is rendered where it does not exist
EMBEDDED_DATA = TrainConfig.data
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(kw_only=True)
class Run:
    """One training run on one rank, ready to train.

    Attributes:
        config: the settings.
        device: where this rank computes.
        host_group: process group for tensors on the host.
        folder: the run folder.
        precision: "bf16" or "fp32".
        model_config: architecture of the model.
        tokenizer: of the model.
        engine: DeepSpeed's engine around the model.
        loader: of the training split.
        val_loader: of the validation split, if there is one.
        statistics: of the texts of the training split.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: optimizer steps of the run.
        resumed: trainer.json of the checkpoint that the run resumes from; None at the first start.
    """

    config: TrainConfig
    device: torch.device
    host_group: dist.ProcessGroup
    folder: RunFolder
    precision: str
    model_config: PrismerConfig
    tokenizer: Tokenizer
    engine: nn.Module
    loader: Loader
    val_loader: Loader | None
    statistics: TextStatistics
    steps_per_epoch: int
    total_steps: int
    resumed: dict | None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is rank 0, which prints and writes for all."""
        return dist.get_rank() == 0

    def new_replica(self) -> Prismer:
        """An unsharded model without trained weights, in the precision of the run."""
        model = Prismer(self.model_config, self.tokenizer)
        return model.to(device=self.device, dtype=DTYPES[self.precision]).eval()

    def predict(self, model: Prismer, *, limit: int = 0, blank: bool = False) -> list[dict]:
        """Records of the validation split (collective), see `evaluation.predict`."""
        return predict(
            model,
            self.val_loader,
            task=self.config.task,
            statistics=self.statistics,
            limit=limit,
            blank=blank,
            group=self.host_group,
        )


def set_up(config: TrainConfig, settings: dict, *, local_rank: int | None = None, fresh: bool = False) -> Run:
    """Build a run, on every rank: process group, precision, model, loaders, engine, and the state to resume from.

    Args:
        config: the settings of the run.
        settings: engine settings, as `engine_settings.read_config` returned them.
        local_rank: the launcher's --local_rank, if it gave one.
        fresh: set an earlier run of this name aside (renamed, not deleted) instead of resuming it.

    Raises:
        ValueError: if config, settings, data, model and an earlier run of this name do not fit together.
    """
    device = zero.start_distributed(local_rank)
    group = zero.new_host_group()
    folder = RunFolder(config.folder)
    micro_batch = config.micro_batch(dist.get_world_size())
    zero.check_settings(config, settings)
    precision = zero.run_on_rank_zero(lambda: _prepare(config, folder, device, fresh), group)

    checkpoint = folder.last()
    if checkpoint:
        model = from_pretrained(checkpoint)
    else:
        # every rank builds the same weights, of which DeepSpeed keeps a shard on each
        model = start_model(config.model, config.image_size, config.seed)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    trainable, parameters = freeze(model, config.freeze)
    print_on_rank_zero(f"trainable: {trainable:,} of {parameters:,} parameters ({trainable / parameters:.0%})")

    first_start = checkpoint is None
    zero.run_on_rank_zero(lambda: check_texts(config, model, folder.path, first_start), group)
    statistics = TextStatistics.load(folder.path)
    loader, val_loader = open_loaders(config, model, statistics.classes, micro_batch, device)
    if val_loader:
        check_readable(val_loader, group)
    steps_per_epoch, total_steps = _count_steps(config, loader)

    engine = zero.build_engine(model.train(), config, settings, precision)
    resumed = restore_optimizer(engine, checkpoint) if checkpoint else None
    if resumed:
        print_on_rank_zero(f"resuming {folder.path} at step {resumed['step']} of {total_steps}")
    return Run(
        config=config,
        device=device,
        host_group=group,
        folder=folder,
        precision=precision,
        model_config=model.config,
        tokenizer=model.tokenizer,
        engine=engine,
        loader=loader,
        val_loader=val_loader,
        statistics=statistics,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        resumed=resumed,
    )


def _prepare(config: TrainConfig, folder: RunFolder, device: torch.device, fresh: bool) -> str:
    """On rank 0, before anything is built: lock and check the run folder, render the data, choose the precision."""
    data = Path(config.data)
    width = start_config(config.model).vision_width
    if config.data != EMBEDDED_DATA:
        check_dataset(data)
    # the earlier run is moved only after model and data were checked
    if moved := folder.claim(fresh):
        print_on_rank_zero(f"the earlier run was moved to {moved}")
    folder.check_files()
    if config.data == EMBEDDED_DATA and not ((data / "train").is_dir() and (data / "val").is_dir()):
        print_on_rank_zero(f"rendering the embedded dataset into {data}")
        render_dataset(data)
        check_dataset(data)

    def choose() -> str:
        chosen, why = choose_precision(config.precision, width, device)
        print_on_rank_zero(why)
        return chosen

    precision, changes = folder.reconcile_settings(config, choose)
    if folder.last() and (slow := slow_resumption(precision, width, device)):
        print_on_rank_zero(slow)
    for change in changes:
        print_on_rank_zero(f"changed since the run was started: {change}")
    return precision


def _count_steps(config: TrainConfig, loader: Loader) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    steps_per_epoch = loader.steps_per_epoch // config.accumulation
    if not steps_per_epoch:
        raise ValueError(f"{loader.dataset.folder} has fewer images than batch_size {config.batch_size}; lower it")
    total_steps = config.steps or config.epochs * steps_per_epoch
    if total_steps > MAX_STEPS:
        raise ValueError(
            f"epochs {config.epochs} of {steps_per_epoch} steps are {total_steps} steps; at most {MAX_STEPS} can be run"
        )
    return steps_per_epoch, total_steps
