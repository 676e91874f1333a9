"""What all runs of a comparison have in common, and the runs that a variant needs, in order.

    RUNS/STAGE/VARIANT/seed-S/         a run folder, as train.py writes it, with the trained model in model/
    RESULTS/experiment.json            the settings that all runs share
    RESULTS/STAGE/VARIANT/seed-S.json  the result of a finished run (results.py)

A run whose result is there is finished and never repeated, also where its run folder is gone. A run without a result
resumes from its last checkpoint.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismer.ablations.catalogue import BASE_VARIANT, BASELINE, FINE_TUNING, INFERENCE, Finding, Variant, find_variant
from prismer.config import PRESETS, PrismerConfig
from prismer.errors import InputError, listed, shown
from prismer.files import write_json
from prismer.reading import read_json
from prismer.training.config import TrainConfig
from prismer.training.engine_settings import read_config

JOINT, PRETRAIN, FINETUNE = "joint", "pretrain", "finetune"
TASKS = {JOINT: "joint", PRETRAIN: "pretrain", FINETUNE: "vqa"}
_EXPERIMENT = "experiment.json"
# never during training, so that the model of the last step is the one that is scored; then on few images, since the
# whole split is scored after the run
_SCORED_AT_THE_END = dict(eval_every=2**31 - 1, eval_images=1)
# fp32, so that every machine computes the same; labels are never dropped, as in the paper
_EMBEDDED = dict(
    batch_size=16,
    crop_min_area=1.0,
    flip=0.0,
    augment_ops=0,
    drop_labels=0.0,
    learning_rate=1e-3,
    min_learning_rate=1e-5,
    warmup_steps=50,
    gradient_clipping=1.0,
    precision="fp32",
    save_every=100,
)
_PUBLISHED = dict(image_size=224, drop_labels=0.0)
# how to train: in which stages, unless a finding needs two, and with which settings of each stage
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "embedded": {
        JOINT: _EMBEDDED,
        PRETRAIN: {**_EMBEDDED, "captions_per_image": 5},
        FINETUNE: {**_EMBEDDED, "learning_rate": 5e-4, "questions_per_image": 9, "freeze": "freeze_vision"},
    },
    "paper": {PRETRAIN: _PUBLISHED, FINETUNE: _PUBLISHED},
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all runs of a comparison have in common.

    Attributes:
        recipe: a key of RECIPES.
        model: a preset, around whose towers each variant is built anew.
        data: dataset of joint training and of pre-training, as train.py's --data.
        finetune_data: dataset of fine-tuning.
        steps: stage -> optimizer steps; 0 leaves the number of epochs to the task.
        settings: further fields of TrainConfig, of every stage.
    """

    recipe: str = "embedded"
    model: str = "tiny"
    data: str = "data/scenes"
    finetune_data: str = ""
    steps: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := set(self.settings) - known:
            raise InputError(f"there is no setting {listed(unknown)}; known are {', '.join(sorted(known))}")
        if self.settings.get("rename_kinds"):
            raise InputError("rename_kinds gives a run three validation splits, and variants are compared by one")
        if self.recipe not in RECIPES:
            raise InputError(f"recipe is {shown(self.recipe)}; choose from {', '.join(RECIPES)}")
        if self.model.removesuffix("-z") not in PRESETS:
            raise InputError(f"model is {shown(self.model)}; variants are built anew: choose from {', '.join(PRESETS)}")
        if unknown := set(self.steps) - set(TASKS):
            raise InputError(f"steps are given for {shown(min(unknown))}; stages are {', '.join(TASKS)}")

    def store(self, results: Path) -> None:
        """Write the settings beside the results, or refuse settings other than those of the results that are there.

        Raises:
            ValueError: if results of other settings are there.
        """
        file, own = results / _EXPERIMENT, dataclasses.asdict(self)
        if not file.exists():
            results.mkdir(parents=True, exist_ok=True)
            write_json(file, own)
            return
        stored = read_json(file, dict, "restore it from a copy")
        for name in own | stored:
            if stored.get(name) != own.get(name):
                raise InputError(
                    f"{results} holds results of runs with {name} {shown(stored.get(name))}, not "
                    f"{shown(own.get(name))}; only equal runs can be compared: choose another --runs"
                )

    @classmethod
    def load(cls, results: Path) -> "Experiment":
        """Read what `store` wrote.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        values = read_json(results / _EXPERIMENT, dict, "start with `python -m prismer.ablations run NAME`")
        try:
            return cls(**values)
        except TypeError:
            raise InputError(f"{results / _EXPERIMENT} is damaged; restore it from a copy") from None

    def last_stage(self, finding: Finding) -> str:
        """The stage whose models a finding compares."""
        return FINETUNE if finding.two_stages or JOINT not in RECIPES[self.recipe] else JOINT


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run, or one evaluation of a trained model.

    Attributes:
        experiment: what it shares with all others.
        stage: one of TASKS; INFERENCE evaluates the model of `parent` without training.
        variant: its name.
        seed: of the run.
        parent: the run whose model it starts from; None for a new model.
        runs, results: the folders of all run folders and of all results.
    """

    experiment: Experiment
    stage: str
    variant: str
    seed: int
    parent: "Job | None" = None
    runs: Path
    results: Path

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.runs / self.stage / self.variant / f"seed-{self.seed}"

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.folder / "model"

    @property
    def result(self) -> Path:
        """The file of its result."""
        return self.results / self.stage / self.variant / f"seed-{self.seed}.json"

    @property
    def title(self) -> str:
        """What the user reads of it."""
        return f"{self.stage} {self.variant} seed {self.seed}"

    def needed(self) -> list["Job"]:
        """The runs that are still to be done for this result, in order; [] if it is there."""
        if self.result.exists():
            return []
        before = [] if self.parent is None or self.parent.model.is_dir() else self.parent.needed_for_model()
        return [*before, self]

    def needed_for_model(self) -> list["Job"]:
        """The runs that are still to be done for the trained model, in order."""
        if self.model.is_dir():
            return []
        before = [] if self.parent is None else self.parent.needed_for_model()
        return [*before, self]

    def settings(self) -> dict[str, Any]:
        """Fields of TrainConfig."""
        experiment, variant = self.experiment, find_variant(self.variant)
        recipe = RECIPES[experiment.recipe]
        begins = self.stage == FINETUNE if variant.begins == FINE_TUNING else self.stage != FINETUNE
        if variant.begins == INFERENCE:
            begins = False
        return {
            **recipe[self.stage],
            **_SCORED_AT_THE_END,
            **experiment.settings,
            **(variant.settings if begins else {}),
            "task": TASKS[self.stage],
            "data": (experiment.finetune_data if self.stage == FINETUNE else "") or experiment.data,
            "model": experiment.model if self.parent is None else str(self.parent.model),
            "run": str(self.folder),
            "seed": self.seed,
            "steps": experiment.steps.get(self.stage, 0),
        }

    def check(self, config_file: str) -> None:
        """Refuse wrong settings before anything runs.

        Args:
            config_file: a DeepSpeed JSON, as train.py takes it.

        Raises:
            ValueError: if a setting is unknown or out of range, or the file is missing or wrong.
        """
        if self.parent is not None:
            self.parent.check(config_file)
        if self.stage != INFERENCE:
            read_config(config_file, **self.settings())

    def to_json(self) -> str:
        """The job as JSON, for the process that runs it."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read what `to_json` wrote."""
        return cls._from_dict(json.loads(text))

    @classmethod
    def _from_dict(cls, values: dict) -> "Job":
        parent = values["parent"]
        return cls(
            **{
                **values,
                "experiment": Experiment(**values["experiment"]),
                "parent": None if parent is None else cls._from_dict(parent),
                "runs": Path(values["runs"]),
                "results": Path(values["results"]),
            }
        )


def same_as_baseline(variant: Variant, config: PrismerConfig) -> bool:
    """Whether a variant changes nothing of a model of this config, such as a resampler of its own number of layers."""
    if variant.network or variant.feed or variant.settings:
        return False
    return all(getattr(config, name) == value for name, value in variant.config.items())


def job_for(
    experiment: Experiment,
    config: PrismerConfig,
    finding: Finding,
    variant: Variant,
    seed: int,
    runs: Path,
    results: Path,
) -> Job:
    """The job whose result a finding needs of a variant.

    Args:
        config: of the initial model.
    """
    if same_as_baseline(variant, config):
        variant = BASE_VARIANT

    def job(stage: str, name: str, parent: Job | None = None) -> Job:
        return Job(
            experiment=experiment, stage=stage, variant=name, seed=seed, parent=parent, runs=runs, results=results
        )

    trained = BASELINE if variant.begins == INFERENCE else variant.name
    if experiment.last_stage(finding) == JOINT:
        last = job(JOINT, trained)
    else:
        before = BASELINE if variant.begins == FINE_TUNING else trained
        last = job(FINETUNE, trained, job(PRETRAIN, before))
    return job(INFERENCE, variant.name, last) if variant.begins == INFERENCE else last


def all_jobs(
    experiment: Experiment,
    config: PrismerConfig,
    chosen: Sequence[tuple[Finding, Sequence[Variant]]],
    seeds: Sequence[int],
    runs: Path,
    results: Path,
) -> list[Job]:
    """The jobs of some findings and variants, each once, one seed after the other."""
    jobs = [
        job_for(experiment, config, finding, variant, seed, runs, results)
        for seed in seeds
        for finding, variants in chosen
        for variant in variants
    ]
    return list({job.result: job for job in jobs}.values())
