"""What a training run is told: one frozen dataclass, the defaults of each task, and how it meets DeepSpeed's JSON.

`zero3.json` holds engine settings (how to shard and communicate). Everything about learning lives in `TrainConfig`; a
`"prismer"` section of the same JSON and a few flags of train.py override its defaults.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from prismer.errors import listed, shown
from prismer.freezing import FREEZE_MODES
from prismer.reading import is_text, read_json

PRECISIONS = ("auto", "bf16", "fp32")
MAX_STEPS = 2**24
"""AdamW counts its steps in float32, which counts no further."""
_ANY, _FLOAT32 = 2**31 - 1, 3.4e38
# field -> its least and its most; what is not named is at least 0 and at most what float32 or 31 bits hold
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "epochs": (0, MAX_STEPS),
    "steps": (0, MAX_STEPS),
    "warmup_steps": (0, MAX_STEPS),
    # a million images a batch is the most that was ever published
    "batch_size": (1, 2**20),
    "accumulation": (1, 2**20),
    "eval_batch_size": (1, 2**12),
    # the richest published sets (Visual Genome) say a few hundred things about an image
    "captions_per_image": (1, 1024),
    "questions_per_image": (0, 1024),
    # the largest side of a JPEG; what the model takes is less
    "image_size": (0, 65_535),
    "flip": (0, 1),
    "drop_labels": (0, 1),
    "crop_min_area": (0, 1),
    # there are ten operations, and each may come twice
    "augment_ops": (0, 20),
    "max_answers": (1, 2**20),
    # more than any machine has cores
    "loader_threads": (1, 1024),
    # the smallest normal number of float32: a smaller one is 0 on some devices, and 0 / 0 is no step
    "epsilon": (1.18e-38, _FLOAT32),
    "log_every": (1, _ANY),
    "save_every": (1, _ANY),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; the defaults are the embedded demonstration (preset tiny on rendered scenes).

    Raises:
        ValueError: if a field is out of range; the sentence names the field and the remedy.
    """

    task: str = "joint"
    # pretrain, caption, vqa, classify, or joint: captions and questions of an image in one group
    data: str = "data/scenes"
    # dataset folder with train/ and val/; the default is rendered when absent
    model: str = "tiny"
    # a preset, or a model folder to start from
    run: str = "tiny"
    # name of the folder under runs/, or a path with a slash
    seed: int = 42

    epochs: int = 5
    steps: int = 0
    # optimizer steps in all; 0 follows epochs
    batch_size: int = 16
    # images per optimizer step over all processes, so that the curve does not depend on their number
    accumulation: int = 1
    # forward passes that one optimizer step is cut into
    captions_per_image: int = 1
    questions_per_image: int = 9
    image_size: int = 0
    # side of the RGB input, px; 0 keeps the model's own
    crop_min_area: float = 1.0
    # smallest share of a training image that a random crop keeps; 1 crops nothing
    flip: float = 0.0
    # probability of a mirror image; 0 where texts speak of left and right
    augment_ops: int = 0
    # RandAugment operations per image
    drop_labels: float = 0.25
    # share of training images that come without expert labels
    semantics: str = ""
    # folder of the semantics table, for models that read one
    max_answers: int = 3128
    # distinct training answers that evaluation ranks, the most frequent ones

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 0.05
    decay_norms: bool = True
    # whether norms, biases and embeddings of one dimension decay too, as in the official training
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    gradient_clipping: float = 1.0
    # largest gradient norm; 0 is off

    freeze: str = "freeze_lang_vision"
    precision: str = "auto"
    # auto: bf16 unless this processor multiplies bf16 more slowly than fp32
    gradient_checkpointing: bool = False

    loader_threads: int = 2
    # per rank
    log_every: int = 10
    save_every: int = 200
    eval_every: int = 0
    # steps between evaluations; 0 evaluates at the end of each epoch
    eval_images: int = 0
    # validation images used during training; 0 uses all of them
    eval_batch_size: int = 50

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # a whole number may stand for a fraction
            if field.type is float and type(value) is int and abs(value) < 2**63:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if type(value) is not field.type:
                raise ValueError(f"{field.name} is {shown(value)}; it must be {field.type.__name__}")
            if field.type is str:
                _check_text(field.name, value)
            elif field.type in (int, float):
                _check_number(field.name, value, _FLOAT32 if field.type is float else _ANY)
        for name, choices in (("task", TASK_DEFAULTS), ("freeze", FREEZE_MODES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {shown(getattr(self, name))}; choose from {', '.join(choices)}")
        for name in ("data", "model"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name a folder")
        _check_run(self.run)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be below 1")
        if not self.crop_min_area:
            raise ValueError("crop_min_area is 0; it must be above 0, and 1 crops nothing")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}, "
                f"which falls to it; lower it"
            )
        if not self.epochs and not self.steps:
            raise ValueError("epochs and steps are both 0; give one of them")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}; change one"
            )

    def micro_batch(self, world_size: int) -> int:
        """Images per forward pass of one process.

        Raises:
            ValueError: if the global batch does not divide among the processes.
        """
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide among {world_size} processes x "
                f"{self.accumulation} accumulation steps; make it a multiple of {parts}"
            )
        return self.batch_size // parts

    @property
    def folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.run) if "/" in self.run else Path("runs") / self.run


def _check_number(name: str, value: float, most_of_kind: float) -> None:
    least, most = _RANGES.get(name, (0, most_of_kind))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; give a finite number")
    if value < 0:
        raise ValueError(f"{name} is {shown(value)}; it must not be negative")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {most}")


def _check_text(name: str, value: str) -> None:
    if not is_text(value) or not value.isprintable():
        raise ValueError(f"{name} is {shown(value)}, which holds characters that no name has; correct it")


def _check_run(run: str) -> None:
    """Refuse a run whose folder would be `runs` itself, the working directory or the root."""
    last = run.rstrip("/").rpartition("/")[2]
    if last.strip() in ("", ".", ".."):
        raise ValueError(f"run is {shown(run)}, which names no folder of its own; give a name such as tiny")
    if len(last.encode()) > 200:
        raise ValueError(f"run is {shown(run)}; give a name of at most 200 bytes")


_PHOTOS = dict(crop_min_area=0.5, flip=0.5, augment_ops=2, captions_per_image=1)
# hyper-parameters of arXiv:2303.02506 and its released configurations; what is not named keeps the dataclass default
TASK_DEFAULTS: dict[str, dict] = {
    "joint": {},
    "pretrain": dict(
        **_PHOTOS,
        epochs=20,
        batch_size=1024,
        learning_rate=3e-4,
        min_learning_rate=1e-6,
        warmup_steps=2000,
        questions_per_image=0,
        gradient_clipping=0.0,
        freeze="freeze_lang_vision",
    ),
    "caption": dict(
        **_PHOTOS,
        epochs=3,
        batch_size=256,
        learning_rate=5e-5,
        min_learning_rate=0.0,
        warmup_steps=0,
        questions_per_image=0,
        gradient_clipping=0.0,
        freeze="freeze_vision",
    ),
    "vqa": dict(
        **_PHOTOS,
        epochs=10,
        batch_size=512,
        learning_rate=5e-5,
        min_learning_rate=0.0,
        warmup_steps=0,
        questions_per_image=1,
        gradient_clipping=0.0,
        freeze="freeze_vision",
    ),
    "classify": dict(
        **_PHOTOS,
        epochs=20,
        batch_size=64,
        learning_rate=5e-5,
        min_learning_rate=0.0,
        warmup_steps=0,
        questions_per_image=0,
        gradient_clipping=0.0,
        freeze="freeze_vision",
    ),
}

# engine settings that may stand in the JSON; DeepSpeed itself accepts any misspelling in silence
ENGINE_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 "
    "zero_optimization zero_force_ds_cpu_optimizer aio communication_data_type data_types prescale_gradients "
    "gradient_predivide_factor sparse_gradients steps_per_print wall_clock_breakdown memory_breakdown dump_state "
    "flops_profiler comms_logger".split()
)
# what DeepSpeed itself would meet with a traceback, or take for something else
_OBJECTS = frozenset("bf16 zero_optimization aio data_types flops_profiler comms_logger".split())
_SWITCHES = frozenset(
    "zero_force_ds_cpu_optimizer prescale_gradients sparse_gradients wall_clock_breakdown memory_breakdown "
    "dump_state".split()
)
_COUNTS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print".split()
)
_NUMBERS = frozenset("gradient_clipping gradient_predivide_factor".split())
_TYPES = (
    (_OBJECTS, (dict,), "an object"),
    (_SWITCHES, (bool,), "true or false"),
    (_COUNTS, (int,), "a whole number"),
    (_NUMBERS, (int, float), "a number"),
)
_NESTED = ("offload_optimizer", "offload_param")
# objects inside zero_optimization; null is none
_PROFILER = {
    "enabled": (bool,),
    "recompute_fwd_factor": (int, float),
    "profile_step": (int,),
    "module_depth": (int,),
    "top_modules": (int,),
    "detailed": (bool,),
    "output_file": (str, type(None)),
}
_ACCUMULATION = (None, "fp32", "bf16", "fp16")
_REFUSED = {
    "optimizer": "the trainer builds AdamW itself; set learning_rate and weight_decay in the prismer section",
    "scheduler": "the trainer sets the rate itself; set learning_rate and warmup_steps in the prismer section",
    "fp16": "training runs in bf16 or fp32; set precision in the prismer section",
    "amp": "training runs in bf16 or fp32; set precision in the prismer section",
    "torch_autocast": "training runs in bf16 or fp32; set precision in the prismer section",
    "activation_checkpointing": "set gradient_checkpointing in the prismer section",
}


def read_config(path: str | Path, **overrides) -> tuple[TrainConfig, dict]:
    """Read a DeepSpeed JSON with an optional `"prismer"` section.

    Args:
        path: the JSON file.
        overrides: fields of TrainConfig that win over the file (the flags of train.py); None means not given.

    Returns:
        The run's TrainConfig and the engine settings, still with "auto" in them.

    Raises:
        ValueError: if the file is not such a JSON, or names a setting that does not exist.
    """
    engine = read_json(path, remedy="correct it, or name another with --config")
    if not isinstance(engine, dict):
        raise ValueError(f"{path} holds a {type(engine).__name__}; expected an object of engine settings")
    section = engine.pop("prismer", {})
    for key in engine:
        if key in _REFUSED:
            raise ValueError(f"{shown(key)} in {path} is not used: {_REFUSED[key]}")
        if key not in ENGINE_KEYS:
            raise ValueError(
                f"unknown engine setting {shown(key)} in {path}; known are {', '.join(sorted(ENGINE_KEYS))}"
            )
        _check_setting(key, engine[key])
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if not isinstance(section, dict) or set(section) - known:
        extra = listed(set(section) - known) if isinstance(section, dict) else type(section).__name__
        raise ValueError(f"the prismer section of {path} holds {extra}; known settings are {', '.join(sorted(known))}")
    given = {**section, **{name: value for name, value in overrides.items() if value is not None}}
    task = given.get("task", TrainConfig.task)
    defaults = TASK_DEFAULTS.get(task, {}) if isinstance(task, str) else {}
    return TrainConfig(**{**defaults, **given}), engine


def _check_setting(key: str, value) -> None:
    """Refuse an engine setting of a wrong type; what its numbers may be, DeepSpeed knows (`engine.check_settings`)."""
    for keys, types, name in _TYPES:
        if key in keys and type(value) not in types and not (value == "auto" and keys is not _OBJECTS):
            raise ValueError(f"{key} is {shown(value)} in the engine settings; it must be {name}")
        if key in keys and type(value) in (int, float) and value < (key != "gradient_clipping"):
            raise ValueError(f"{key} is {shown(value)} in the engine settings; it must be at least 1")
    extra = key == "data_types" and set(value) - {"grad_accum_dtype"}
    if extra or (key == "data_types" and value.get("grad_accum_dtype") not in _ACCUMULATION):
        raise ValueError(
            f"data_types is {shown(value)} in the engine settings; it may hold grad_accum_dtype: fp32, bf16 or fp16"
        )
    if key == "flops_profiler":
        for inner, setting in value.items():
            if type(setting) not in _PROFILER.get(inner, ()):
                raise ValueError(
                    f"flops_profiler.{inner} is {shown(setting)}, which DeepSpeed does not take; correct it"
                )
    if key == "zero_optimization":
        for inner in ("reduce_bucket_size", "sub_group_size"):
            if value.get(inner, 1) == 0:
                raise ValueError(f"zero_optimization.{inner} is 0; it must be at least 1")
        for inner in _NESTED:
            if not isinstance(value.get(inner), dict | None):
                raise ValueError(
                    f"zero_optimization.{inner} is {shown(value[inner])} in the engine settings; it must be an object"
                )
        if "stage" in value and type(value["stage"]) is not int:
            raise ValueError(f"zero_optimization.stage is {shown(value['stage'])}; it must be 3")


def merge(config: TrainConfig, engine: dict, *, world_size: int, precision: str) -> dict:
    """The complete DeepSpeed configuration: engine settings plus what `config` decides.

    DeepSpeed resolves no "auto" itself (`bf16.enabled: "auto"` would silently be fp32) and clips at 1.0 unless told
    otherwise, so every such value is made explicit here.

    Args:
        config: decides batch sizes, precision and clipping.
        engine: settings as `read_config` returned them; a value that `config` decides must be absent, "auto" or equal.
        world_size: number of processes.
        precision: "bf16" or "fp32", after the policy of precision.py.

    Raises:
        ValueError: if a setting contradicts `config`, or asks for what resume cannot restore.
    """
    for key, value in engine.items():
        _check_setting(key, value)
    merged = copy.deepcopy(engine)
    decided = {
        "train_batch_size": ("batch_size", config.batch_size),
        "train_micro_batch_size_per_gpu": ("batch_size", config.micro_batch(world_size)),
        "gradient_accumulation_steps": ("accumulation", config.accumulation),
        "gradient_clipping": ("gradient_clipping", config.gradient_clipping),
    }
    for key, (field, value) in decided.items():
        if merged.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{key} is {shown(merged[key])} in the engine settings, but {field} of the run gives {value}; "
                f'write "auto" there, or change {field}'
            )
        merged[key] = value
    bf16 = merged.setdefault("bf16", {})
    if bf16.get("enabled", "auto") not in ("auto", precision == "bf16"):
        raise ValueError(
            f"bf16.enabled is {shown(bf16['enabled'])} in the engine settings, but the run trains in {precision}; "
            f'write "auto" there, or set precision'
        )
    bf16["enabled"] = precision == "bf16"
    zero = merged.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 3) != 3:
        raise ValueError(f"zero_optimization.stage is {shown(zero['stage'])}; checkpoints here are for stage 3")
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") not in ("none", "cpu"):
        raise ValueError(f"offload_optimizer.device is {shown(offload['device'])}; choose none or cpu")
    # torch's AdamW also runs on the CPU; DeepSpeed would insist on its own, which compiles C++ at start
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    # its own step report repeats ours
    merged.setdefault("steps_per_print", 1_000_000_000)
    return merged
