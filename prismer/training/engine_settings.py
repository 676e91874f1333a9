"""DeepSpeed's JSON (zero3.json): read, checked, and completed with what TrainConfig decides."""

import copy
import dataclasses
from pathlib import Path

from prismer.errors import InputError, listed, shown
from prismer.reading import read_json
from prismer.training.config import TrainConfig

# setting -> (types, their name); DeepSpeed itself ignores any misspelled setting
_OBJECT, _SWITCH = ((dict,), "an object"), ((bool,), "true or false")
_COUNT, _NUMBER = ((int,), "a whole number"), ((int, float), "a number")
_KNOWN = {
    **dict.fromkeys("bf16 zero_optimization aio data_types flops_profiler comms_logger".split(), _OBJECT),
    **dict.fromkeys("zero_force_ds_cpu_optimizer prescale_gradients sparse_gradients".split(), _SWITCH),
    **dict.fromkeys("wall_clock_breakdown memory_breakdown dump_state".split(), _SWITCH),
    **dict.fromkeys("train_batch_size train_micro_batch_size_per_gpu".split(), _COUNT),
    **dict.fromkeys("gradient_accumulation_steps steps_per_print".split(), _COUNT),
    **dict.fromkeys("gradient_clipping gradient_predivide_factor".split(), _NUMBER),
    "communication_data_type": None,
}
_ACCUMULATION_DTYPES = (None, "fp32", "bf16", "fp16")
_PROFILER = {
    "enabled": (bool,),
    "recompute_fwd_factor": (int, float),
    "profile_step": (int,),
    "module_depth": (int,),
    "top_modules": (int,),
    "detailed": (bool,),
    "output_file": (str, type(None)),
}
_PRECISION = "training runs in bf16 or fp32; set precision in the prismer section"
_REFUSED = {
    "optimizer": "the trainer builds AdamW itself; set learning_rate and weight_decay in the prismer section",
    "scheduler": "the trainer sets the rate itself; set learning_rate and warmup_steps in the prismer section",
    "fp16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "activation_checkpointing": "set gradient_checkpointing in the prismer section",
}


def read_config(path: str | Path, **overrides) -> tuple[TrainConfig, dict]:
    """Read a DeepSpeed JSON with an optional `"prismer"` section.

    Args:
        path: the JSON file.
        overrides: fields of TrainConfig that win over the file (the flags of train.py); None means not given.

    Returns:
        The run's TrainConfig, and the engine settings with "auto" still in them.

    Raises:
        ValueError: if the file is not such a JSON, or holds an unknown setting.
    """
    settings = read_json(path, remedy="correct it, or name another with --config")
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds a {type(settings).__name__}; expected an object of engine settings")
    section = settings.pop("prismer", {})
    for key, value in settings.items():
        if key in _REFUSED:
            raise InputError(f"{shown(key)} in {path} is not used: {_REFUSED[key]}")
        if key not in _KNOWN:
            raise InputError(f"unknown engine setting {shown(key)} in {path}; known are {', '.join(sorted(_KNOWN))}")
        _check(key, value)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if not isinstance(section, dict) or set(section) - known:
        extra = listed(set(section) - known) if isinstance(section, dict) else type(section).__name__
        raise InputError(f"the prismer section of {path} holds {extra}; known settings are {', '.join(sorted(known))}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return TrainConfig.for_task(**{**section, **given}), settings


def complete_settings(config: TrainConfig, settings: dict, *, world_size: int, precision: str) -> dict:
    """The complete DeepSpeed configuration: engine settings plus what `config` decides.

    DeepSpeed resolves no "auto" itself (`bf16.enabled: "auto"` silently becomes fp32) and clips at 1.0 unless told
    otherwise, so every such value is explicit in the result.

    Args:
        config: decides batch sizes, precision and clipping.
        settings: as `read_config` returned them; a value that `config` decides must be absent, "auto" or equal.
        world_size: number of processes.
        precision: "bf16" or "fp32", as precision.py chose it.

    Raises:
        ValueError: if a setting contradicts `config`, or asks for something that a resumed run cannot restore.
    """
    for key, value in settings.items():
        _check(key, value)
    merged = copy.deepcopy(settings)
    decided = {
        "train_batch_size": ("batch_size", config.batch_size),
        "train_micro_batch_size_per_gpu": ("batch_size", config.micro_batch(world_size)),
        "gradient_accumulation_steps": ("accumulation", config.accumulation),
        "gradient_clipping": ("gradient_clipping", config.gradient_clipping),
    }
    for key, (field, value) in decided.items():
        if merged.get(key, "auto") not in ("auto", value):
            raise InputError(
                f"{key} is {shown(merged[key])} in the engine settings, but {field} of the run gives {value}; "
                f'write "auto" there, or change {field}'
            )
        merged[key] = value
    bf16 = merged.setdefault("bf16", {})
    if bf16.get("enabled", "auto") not in ("auto", precision == "bf16"):
        raise InputError(
            f"bf16.enabled is {shown(bf16['enabled'])} in the engine settings, but the run trains in {precision}; "
            f'write "auto" there, or set precision'
        )
    bf16["enabled"] = precision == "bf16"
    zero = merged.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 3) != 3:
        raise InputError(f"zero_optimization.stage is {shown(zero['stage'])}; checkpoints here are for stage 3")
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") not in ("none", "cpu"):
        raise InputError(f"offload_optimizer.device is {shown(offload['device'])}; choose none or cpu")
    # torch's AdamW also runs on the CPU; DeepSpeed would insist on its own, which compiles C++ at start
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    # DeepSpeed's own step report would repeat ours
    merged.setdefault("steps_per_print", 1_000_000_000)
    return merged


def _check(key: str, value: object) -> None:
    """Refuse a setting that DeepSpeed would meet with a traceback, or take for something else.

    DeepSpeed checks the ranges of numbers itself (`zero.check_settings`).
    """
    if kind := _KNOWN.get(key):
        types, name = kind
        if type(value) not in types and not (value == "auto" and kind is not _OBJECT):
            raise InputError(f"{key} is {shown(value)} in the engine settings; it must be {name}")
        if type(value) in (int, float) and value < (key != "gradient_clipping"):
            raise InputError(f"{key} is {shown(value)} in the engine settings; it must be at least 1")
    if key == "data_types":
        if set(value) - {"grad_accum_dtype"} or value.get("grad_accum_dtype") not in _ACCUMULATION_DTYPES:
            raise InputError(
                f"data_types is {shown(value)} in the engine settings; it may hold grad_accum_dtype: fp32, bf16 or fp16"
            )
    elif key == "flops_profiler":
        for inner, setting in value.items():
            if type(setting) not in _PROFILER.get(inner, ()):
                raise InputError(f"flops_profiler.{inner} is {shown(setting)}, which DeepSpeed refuses; correct it")
    elif key == "zero_optimization":
        _check_zero(value)


def _check_zero(section: dict) -> None:
    for name in ("reduce_bucket_size", "sub_group_size"):
        if section.get(name, 1) == 0:
            raise InputError(f"zero_optimization.{name} is 0; it must be at least 1")
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(section.get(name), dict | None):
            raise InputError(
                f"zero_optimization.{name} is {shown(section[name])} in the engine settings; it must be an object"
            )
    if "stage" in section and type(section["stage"]) is not int:
        raise InputError(f"zero_optimization.stage is {shown(section['stage'])}; it must be 3")
