"""TrainConfig: every setting of a training run, with defaults for each task.

zero3.json holds engine settings, that is how to shard and how to communicate. Everything about learning lives in
TrainConfig; a "prismer" section of the same JSON and a few flags of train.py override its defaults
(engine_settings.py).
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from prismer.dataloading.feed.order import ORDERS
from prismer.dataloading.mixture.parts import Part, join_places, parse_parts
from prismer.errors import InputError, listed, shown
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS, TextKind
from prismer.experts import TEXT_EXPERTS
from prismer.freezing import FREEZE_MODES
from prismer.reading import is_text
from prismer.storage.places import is_url
from prismer.training.tasks import TASKS

PRECISIONS = ("auto", "bf16", "fp32")
# AdamW counts its steps in float32, which is exact up to here
MAX_STEPS = 2**24
_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, 3.4e38
# field -> smallest and largest value; any other number is at least 0 and fits into 31 bits or float32
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("epochs", "steps", "warmup_steps"), (0, MAX_STEPS)),
    # no published run has batches of more than a million images
    **dict.fromkeys(("batch_size", "accumulation"), (1, 2**20)),
    "eval_batch_size": (1, 2**12),
    # the richest published datasets (Visual Genome) have a few hundred texts for an image
    "captions_per_image": (1, 1024),
    "questions_per_image": (0, 1024),
    # the largest side of a JPEG; the model accepts less
    "image_size": (0, 65_535),
    **dict.fromkeys(("flip", "drop_labels", "crop_min_area"), (0, 1)),
    # RandAugment has ten operations, and each may be drawn twice
    "augment_ops": (0, 20),
    "max_answers": (1, 2**20),
    "loader_threads": (1, 1024),
    # the smallest normal number of float32: some devices flush a smaller one to 0, and AdamW would divide 0 by 0
    "epsilon": (1.18e-38, _LARGEST_FLOAT),
    **dict.fromkeys(("log_every", "save_every"), (1, _LARGEST_INT)),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults train the embedded demonstration: preset tiny on rendered scenes.

    Attributes:
        task: a key of TASKS: joint, pretrain, caption, vqa or classify.
        data: dataset folder with train/ and, optionally, val/; the default is rendered if it does not exist. Commas, or
            a list, name several; `a,b:0.2` takes 20 % of the samples from b.
        order: of the samples: random over all shards, blocks of shards, or auto: blocks for large or remote datasets.
        model: where to start from: a preset, or a model as `Prismer.from_pretrained` takes it.
        expert_text: experts whose detections the decoder reads as text, with commas between them, or a list; "none" for
            none, "" keeps the model's own.
        run: name of the run's folder under runs/, a path with a slash, or a URL such as s3://bucket/runs/NAME.
        seed: of everything that is random.
        epochs, steps: passes over the training split, or optimizer steps in all; `steps` counts unless it is 0.
        batch_size: images of an optimizer step over all processes, whose number does not change the loss curve.
        accumulation: forward passes that make one optimizer step.
        captions_per_image, questions_per_image: the most captions and (question, answer) pairs drawn for an image.
        image_size: side of the RGB input in px; 0 keeps the model's own.
        crop_min_area: smallest share of a training image that a random crop keeps; 1 crops nothing.
        flip: probability that a training image is mirrored; 0 where texts mention left and right.
        augment_ops: RandAugment operations for each training image.
        drop_labels: share of training images that come without expert labels, neither as maps nor as text.
        rename_kinds: whether the shapes of rendered scenes get other names, drawn anew for each image and epoch, in
            classes and texts alike; an image without expert labels keeps its own.
        semantics: folder of the semantics table, for models that need one.
        max_answers: number of distinct training answers that evaluation ranks, the most frequent ones.
        learning_rate, min_learning_rate: at the peak, and at the end of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay, beta1, beta2, epsilon: of AdamW.
        decay_norms: whether one-dimensional parameters (norms, biases) decay too, as in the official training.
        gradient_clipping: largest gradient norm; 0 does not clip.
        freeze: which inherited towers are frozen, see prismer/freezing.py.
        precision: bf16, fp32, or auto: bf16 unless this processor multiplies bf16 more slowly than fp32.
        gradient_checkpointing: whether the backward pass recomputes activations to save memory.
        deterministic: whether a GPU, too, gives the same bits in each run; slower there, and without effect on a CPU.
        loader_threads: threads of each process that decode images, and as many that read samples.
        log_every, save_every: steps between lines of metrics.jsonl, and between checkpoints.
        wandb: project of Weights & Biases that gets the metrics as well; "" is none.
        eval_every: steps between two evaluations; 0 evaluates at the end of each epoch.
        eval_images, eval_batch_size: validation images used during training (0 for all), and per forward pass.

    Raises:
        ValueError: if a field is out of range; the message names the field and the remedy.
    """

    task: str = "joint"
    data: str = "data/scenes"
    order: str = "auto"
    model: str = "tiny"
    expert_text: str = ""
    run: str = "tiny"
    seed: int = 42

    epochs: int = 5
    steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    captions_per_image: int = 1
    questions_per_image: int = 9
    image_size: int = 0
    crop_min_area: float = 1.0
    flip: float = 0.0
    augment_ops: int = 0
    drop_labels: float = 0.25
    rename_kinds: bool = False
    semantics: str = ""
    max_answers: int = 3128

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 0.05
    decay_norms: bool = True
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    gradient_clipping: float = 1.0

    freeze: str = "freeze_lang_vision"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    deterministic: bool = False

    loader_threads: int = 2
    log_every: int = 10
    wandb: str = ""
    save_every: int = 200
    eval_every: int = 0
    eval_images: int = 0
    eval_batch_size: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.data, list | tuple):
            object.__setattr__(self, "data", join_places(self.data))
        if isinstance(self.expert_text, list | tuple):
            object.__setattr__(self, "expert_text", ",".join(map(str, self.expert_text)) or "none")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # JSON may write a float without a fraction
            if field.type is float and type(value) is int and abs(value) < 2**63:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if type(value) is not field.type:
                raise InputError(f"{field.name} is {shown(value)}; it must be {field.type.__name__}")
            if field.type is str:
                _check_text(field.name, value)
            elif field.type in (int, float):
                _check_number(field.name, value, _LARGEST_FLOAT if field.type is float else _LARGEST_INT)
        for name, choices in (
            ("task", TASKS),
            ("freeze", FREEZE_MODES),
            ("precision", PRECISIONS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {shown(getattr(self, name))}; choose from {', '.join(choices)}")
        for name in ("data", "model"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; name a folder")
        parse_parts(self.data)
        unknown = [name for name in self.text_experts or () if name not in TEXT_EXPERTS]
        if unknown:
            raise InputError(
                f"expert_text names {listed(unknown)}; choose from {', '.join(TEXT_EXPERTS)}, or none for none of them"
            )
        _check_run(self.run)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be below 1")
        if not self.crop_min_area:
            raise InputError("crop_min_area is 0; it must be above 0, and 1 crops nothing")
        if self.min_learning_rate > self.learning_rate:
            raise InputError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}, "
                f"which falls to it; lower it"
            )
        if not self.epochs and not self.steps:
            raise InputError("epochs and steps are both 0; give one of them")
        if self.batch_size % self.accumulation:
            raise InputError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}; change one"
            )
        if not any(self.texts_per_image.values()):
            raise InputError(f"questions_per_image is 0, but task {self.task} trains on questions; give at least 1")

    @classmethod
    def for_task(cls, **given) -> "TrainConfig":
        """The defaults of `given["task"]` (of the default task without one), overridden by the fields of `given`."""
        task = given.get("task", cls.task)
        # anything but a known task is refused by the checks
        defaults = TASKS[task].defaults if isinstance(task, str) and task in TASKS else {}
        return cls(**{**defaults, **given})

    @property
    def parts(self) -> list[Part]:
        """The datasets that `data` names."""
        return parse_parts(self.data)

    @property
    def text_experts(self) -> tuple[str, ...] | None:
        """The experts that `expert_text` names, each once; None keeps the model's own."""
        if self.expert_text in ("", "none"):
            return () if self.expert_text else None
        return tuple(dict.fromkeys(name.strip() for name in self.expert_text.split(",")))

    @property
    def texts_per_image(self) -> dict[TextKind, int]:
        """The most texts of each kind that the task draws from a sample, in the order of the group."""
        most = {CAPTIONS: self.captions_per_image, QUESTIONS: self.questions_per_image, CLASSES: 1}
        return {kind: most[kind] for kind in TASKS[self.task].texts}

    def micro_batch(self, world_size: int) -> int:
        """Images per forward pass of one process.

        Raises:
            ValueError: if the global batch does not divide among the processes.
        """
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise InputError(
                f"batch_size {self.batch_size} does not divide among {world_size} processes x "
                f"{self.accumulation} accumulation steps; make it a multiple of {parts}"
            )
        return self.batch_size // parts

    @property
    def folder(self) -> str | Path:
        """The folder that keeps everything of the run; a URL as it is."""
        if is_url(self.run):
            return self.run
        return Path(self.run) if "/" in self.run else Path("runs") / self.run


def _check_number(name: str, value: float, largest: float) -> None:
    least, most = _RANGES.get(name, (0, largest))
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is {value}; give a finite number")
    if value < least:
        raise InputError(f"{name} is {shown(value)}; it must be at least {least}")
    if value > most:
        raise InputError(f"{name} is {shown(value)}; it must be at most {most}")


def _check_text(name: str, value: str) -> None:
    if not is_text(value) or not value.isprintable():
        raise InputError(f"{name} is {shown(value)}, which holds unprintable characters; correct it")


def _check_run(run: str) -> None:
    """Refuse a run whose folder would be `runs` itself, the working directory or the root."""
    last = run.rstrip("/").rpartition("/")[2]
    if last.strip() in ("", ".", ".."):
        raise InputError(f"run is {shown(run)}, which names no folder of its own; give a name such as tiny")
    if len(last.encode()) > 200:
        raise InputError(f"run is {shown(run)}; give a name of at most 200 bytes")
