"""Set-up: everything that training needs, built from the config, the dataset and the run folder."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.errors import InputError
from prismer.freezing import freeze
from prismer.kernels import tuning
from prismer.kernels.tuning.tables import Table
from prismer.model import Prismer
from prismer.precision import NAMES, choose_precision, slow_resumption
from prismer.training import zero
from prismer.training.checkpoint import restore_optimizer
from prismer.training.config import MAX_STEPS, TrainConfig
from prismer.training.data import check_dataset, check_readable, check_texts, has_split, open_loaders
from prismer.training.evaluation import predict
from prismer.training.initial_model import build_initial_model, initial_config
from prismer.training.run_folder import RunFolder
from prismer.training.streams import print_on_rank_zero
from prismer.training.text_statistics import TextStatistics

# datasets that are rendered if they do not exist -> the words on their signs
EMBEDDED_DATA = {TrainConfig.data: "few", "data/signs": "many"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Run:
    """One training run on one rank; to create it is to set it up, up to the state that it resumes from.

    Args:
        config: the settings of the run.
        settings: engine settings, as `engine_settings.read_config` returned them.
        local_rank: the launcher's --local_rank, if it gave one.
        fresh: set an earlier run of this name aside (renamed, not deleted) instead of resuming it.
        model_class: what is trained; prismer/ablations trains subclasses.

    Attributes:
        device: where this rank computes.
        group: process group for tensors on the host.
        is_rank_zero: whether this process prints and writes for all.
        folder: the run folder.
        precision: "bf16" or "fp32".
        model, engine: the sharded model, and DeepSpeed's engine around it.
        loader: of the training split.
        val_loaders: of each validation split, by the name of its dataset; "" is the name of the only one.
        statistics: of the training split's texts.
        steps_per_epoch, total_steps: optimizer steps of an epoch and of the run.
        resumed: trainer.json of the checkpoint that the run resumes from; None at the first start.

    Raises:
        ValueError: if config, settings, data, model and an earlier run of this name do not fit together.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: dict,
        *,
        local_rank: int | None = None,
        fresh: bool = False,
        model_class: type[Prismer] = Prismer,
    ) -> None:
        self.config, self.model_class = config, model_class
        if config.deterministic:
            be_deterministic()
        self.device, self.group = zero.start_distributed(local_rank)
        self.is_rank_zero = dist.get_rank() == 0
        self.folder = RunFolder(config.folder)
        micro_batch = config.micro_batch(dist.get_world_size())
        zero.check_settings(config, settings)
        prepared = zero.run_on_rank_zero(lambda: _prepare(config, self.folder, self.device, fresh), self.group)
        self.precision = prepared["precision"]
        # every rank takes the implementations that rank 0 takes
        tuning.use_table(self.device.type, Table.from_json(prepared["table"]))

        self.folder.share(self.group)
        checkpoint = self.folder.last()
        if checkpoint:
            model = model_class.from_pretrained(checkpoint)
        else:
            # every rank builds the same weights, of which DeepSpeed keeps a shard on each
            model = build_initial_model(config.model, config.image_size, config.seed, config.text_experts, model_class)
        model.set_gradient_checkpointing(config.gradient_checkpointing)
        trainable, parameters = freeze(model, config.freeze)
        print_on_rank_zero(f"trainable: {trainable:,} of {parameters:,} parameters ({trainable / parameters:.0%})")

        zero.run_on_rank_zero(lambda: check_texts(config, model, self.folder.path, checkpoint is None), self.group)
        self.folder.share(self.group)
        self.statistics = TextStatistics.load(self.folder.path)
        classes = self.statistics.classes
        self.loader, self.val_loaders = open_loaders(config, model, classes, micro_batch, self.device)
        for loader in self.val_loaders.values():
            check_readable(loader, self.group)
        self.steps_per_epoch, self.total_steps = _count_steps(config, self.loader)

        self.model = model.train()
        self.engine = zero.build_engine(model, config, settings, self.precision)
        self.resumed = restore_optimizer(self.engine, checkpoint) if checkpoint else None
        if self.resumed:
            print_on_rank_zero(f"resuming {self.folder.path} at step {self.resumed['step']} of {self.total_steps}")

    def new_replica(self) -> Prismer:
        """An unsharded model without trained weights, in the precision of the run."""
        model = self.model_class(self.model.config, self.model.tokenizer)
        return model.to(device=self.device, dtype=DTYPES[self.precision]).eval()

    def predict(self, model: Prismer, loader: Loader, **options) -> list[dict]:
        """The rows of a validation split (collective), with options of `training.evaluation.predict`."""
        return predict(model, loader, self.config.task, self.statistics, group=self.group, **options)


def be_deterministic() -> None:
    """Let torch take only algorithms that give the same bits in each run, in this process from now on.

    The default backward passes of attention and convolutions on a GPU add in any order.
    """
    # read when cuBLAS starts; without it torch refuses matrix products
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # torch would fill each new tensor; every op here writes all of its output
    torch.utils.deterministic.fill_uninitialized_memory = False


def _prepare(config: TrainConfig, folder: RunFolder, device: torch.device, fresh: bool) -> dict[str, str]:
    """On rank 0, before anything is built: lock and check the run folder, render the data, choose the precision.

    Returns:
        The precision, and the table of measured choices as text.
    """
    places = [part.place for part in config.parts]
    model = initial_config(config.model, config.text_experts)
    for place in places:
        if place not in EMBEDDED_DATA:
            check_dataset(place)
    # the earlier run is moved only after model and data were checked
    if moved := folder.claim(fresh):
        print_on_rank_zero(f"the earlier run was moved to {moved}")
    folder.check_files()
    for place in [place for place in dict.fromkeys(places) if place in EMBEDDED_DATA]:
        if not all(has_split(place, split) for split in ("train", "val")):
            print_on_rank_zero(f"rendering the embedded dataset into {place}")
            render_dataset(Path(place), sign_words=EMBEDDED_DATA[place])
            check_dataset(place)

    def choose() -> str:
        chosen, why = choose_precision(config.precision, model, device)
        print_on_rank_zero(why)
        return chosen

    table = tuning.table(device.type)
    if advice := tuning.advice(device.type):
        print_on_rank_zero(advice)
    precision, changes = folder.reconcile_settings(config, choose, table.digest if table.entries else "")
    if folder.last() and (slow := slow_resumption(precision, model, device)):
        print_on_rank_zero(slow)
    for change in changes:
        print_on_rank_zero(f"changed since the run was started: {change}")
    return dict(precision=precision, table=table.to_json())


def _count_steps(config: TrainConfig, loader: Loader) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    steps_per_epoch = loader.steps_per_epoch // config.accumulation
    if not steps_per_epoch:
        raise InputError(f"{loader.dataset.place} has fewer images than batch_size {config.batch_size}; lower it")
    total_steps = config.steps or config.epochs * steps_per_epoch
    if total_steps > MAX_STEPS:
        raise InputError(
            f"epochs {config.epochs} of {steps_per_epoch} steps are {total_steps} steps; at most {MAX_STEPS} can be run"
        )
    return steps_per_epoch, total_steps
