"""One job of an experiment in a process of its own: a training run with its evaluation, or an evaluation alone."""

import json
import os
import platform
import shutil
from typing import Any

import torch

from prismer.ablations.catalogue import INFERENCE, Variant, find_variant
from prismer.ablations.experiment import Job
from prismer.ablations.feeds import changed
from prismer.ablations.networks import variant_class
from prismer.ablations.results import image_scores
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError
from prismer.evaluation.scores import scores
from prismer.files import write_atomically, write_json
from prismer.model import Prismer
from prismer.reading import read_json
from prismer.storage.places import inside
from prismer.training.config import TrainConfig
from prismer.training.data import has_split
from prismer.training.engine_settings import read_config
from prismer.training.evaluation import predict
from prismer.training.initial_model import semantics_folder
from prismer.training.run_folder import SETTINGS
from prismer.training.setup import DTYPES, Run
from prismer.training.text_statistics import TextStatistics
from prismer.training.trainer import Trainer

_VARIANT = "variant.json"


class VariantRun(Run):
    """A training run of a variant, which keeps the predictions of its final evaluation.

    Args:
        variant: what differs from the baseline.
        config, settings: as of `Run`.

    Attributes:
        rows: the predictions for all validation images; [] before the final evaluation.
    """

    def __init__(self, variant: Variant, config: TrainConfig, settings: dict) -> None:
        super().__init__(config, settings, model_class=variant_class(variant))
        self.rows: list[dict] = []
        for loader in (self.loader, *self.val_loaders.values()):
            loader.dataset = changed(loader.dataset, variant.feed)
        if self.is_rank_zero:
            write_json(self.folder.path / _VARIANT, dict(variant=variant.name))

    def predict(self, model: Prismer, loader: Loader, **options: Any) -> list[dict]:
        """The rows of a validation split, as `Run.predict`; none without images, which would take as long again."""
        if options.get("blank"):
            return []
        rows = super().predict(model, loader, **options)
        if not options.get("limit"):
            self.rows += rows
        return rows


def run_job(job: Job, config_file: str) -> int:
    """Do one job, on every rank, and write its result.

    Args:
        config_file: a DeepSpeed JSON, as train.py takes it.

    Returns:
        0 when finished; 128 + signal number if stopped and saved.

    Raises:
        ValueError: if settings, data or an earlier run do not fit.
    """
    variant = find_variant(job.variant)
    if job.stage == INFERENCE:
        assert job.parent is not None
        rows, config = _evaluate(job.parent, variant)
        _write_result(job, rows, config)
        return 0
    config, settings = read_config(config_file, **job.settings())
    check_validation(config)
    trainer = Trainer(VariantRun(variant, config, settings))
    if code := trainer.fit():
        return code
    if os.environ.get("RANK", "0") == "0":
        rows = trainer.run.rows
        if not rows:
            # the run was finished before, and its process ended before its result was written
            rows, _ = _evaluate(job, variant)
        _write_result(job, rows, config)
        # from here on the model is enough
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    return 0


def check_validation(config: TrainConfig) -> None:
    """Refuse data without a validation split, before any step is spent.

    Raises:
        ValueError: if no dataset of the run has one.
    """
    if not any(has_split(part.place, "val") or part.place == TrainConfig.data for part in config.parts):
        raise InputError(f"{config.data} has no val/, and variants are compared by it; import or render one")


def load_variant(run: Job) -> Prismer:
    """The trained model of a run, with the modules of its variant, in the precision of the run.

    Raises:
        ValueError: if the folder of the run holds another variant, or is damaged.
    """
    trained = read_json(run.folder / _VARIANT, dict, "run the variant again").get("variant")
    if trained != run.variant:
        raise InputError(f"{run.folder} holds the variant {trained}, not {run.variant}; move it away and run it again")
    stored = read_json(run.folder / SETTINGS, dict, "run the variant again")
    return variant_class(find_variant(run.variant)).from_pretrained(run.model, dtype=DTYPES[stored["precision"]])


def _evaluate(run: Job, variant: Variant) -> tuple[list[dict], TrainConfig]:
    """The rows of the validation images for the trained model of a run, with the samples of a variant."""
    stored = read_json(run.folder / SETTINGS, dict, "run the variant again")
    config = TrainConfig(**stored["settings"])
    check_validation(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_variant(run).to(device)
    semantics = Semantics.for_config(model.config, semantics_folder(config.semantics, config.model))
    rows: list[dict] = []
    for part in config.parts:
        if not has_split(part.place, "val"):
            continue
        loader = Loader(
            changed(ShardDataset(inside(part.place, "val")), variant.feed),
            config=model.config,
            batch_size=config.eval_batch_size,
            semantics=semantics,
            tokenizer=model.tokenizer,
            training=False,
            threads=config.loader_threads,
            device=device,
        )
        rows += predict(model, loader, config.task, TextStatistics.load(run.folder))
    return rows, config


def _write_result(job: Job, rows: list[dict], config: TrainConfig) -> None:
    if job.result.exists():
        return
    job.result.parent.mkdir(parents=True, exist_ok=True)
    folder = (job.parent if job.stage == INFERENCE and job.parent else job).folder
    finished = read_json(folder / "finished.json", dict, "run the variant again")
    about = dict(
        variant=job.variant,
        stage=job.stage,
        seed=job.seed,
        steps=finished["steps"],
        precision=finished["precision"],
        processes=finished["processes"],
        batch_size=config.batch_size,
        machine=f"{platform.machine()}, torch {torch.__version__}",
    )
    # on one line: lists of numbers with a line for each would be five times as long
    text = json.dumps(dict(about, scores=scores(rows), images=image_scores(rows)))
    write_atomically(job.result, f"{text}\n".encode())
