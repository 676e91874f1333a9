"""TrainConfig, its JSON and its merge with DeepSpeed's settings: defaults by task, explicit values, refused mistakes.

python -m pytest tests/train/test_train_config.py
"""

import json
from pathlib import Path

import pytest

from prismer.train_config import TASK_DEFAULTS, TrainConfig, merge, read_config

ZERO3 = Path(__file__).resolve().parents[2] / "zero3.json"


def read(tmp_path, engine: dict, **overrides):
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(engine))
    return read_config(file, **overrides)


def test_shipped_settings_give_the_default_run():
    config, engine = read_config(ZERO3)
    assert config == TrainConfig()
    merged = merge(config, engine, world_size=2, precision="bf16")
    assert merged["train_batch_size"] == config.batch_size
    assert merged["train_micro_batch_size_per_gpu"] * 2 * config.accumulation == config.batch_size
    assert (
        merged["bf16"]["enabled"] is True
        and merged["gradient_clipping"] == config.gradient_clipping
    )
    assert merged["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(merged)
    assert engine["train_batch_size"] == "auto", "merge changed its argument"


@pytest.mark.parametrize("task", TASK_DEFAULTS)
def test_task_defaults(tmp_path, task):
    config, _ = read(tmp_path, {}, task=task, epochs=None)
    assert config.task == task
    assert {name: getattr(config, name) for name in TASK_DEFAULTS[task]} == TASK_DEFAULTS[task]
    assert config.freeze == (
        "freeze_lang_vision" if task in ("joint", "pretrain") else "freeze_vision"
    )


def test_flags_win_over_section_over_task(tmp_path):
    section = dict(task="vqa", epochs=7, learning_rate=1)
    config, _ = read(tmp_path, {"prismer": section}, epochs=9)
    assert (config.epochs, config.learning_rate, config.batch_size) == (9, 1.0, 512)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"train_batchsize": 4}, "unknown engine setting 'train_batchsize'"),
        ({"optimizer": {"type": "AdamW"}}, "the trainer builds AdamW itself"),
        ({"scheduler": {}}, "sets the rate itself"),
        ({"fp16": {"enabled": True}}, "bf16 or fp32"),
        ({"prismer": {"lerning_rate": 1.0}}, "holds lerning_rate; known settings are"),
        ({"prismer": {"task": "vqa2"}}, "task is 'vqa2'; choose from"),
        ({"prismer": {"freeze": "all"}}, "freeze is 'all'; choose from none"),
        ({"prismer": {"batch_size": "32"}}, "batch_size is '32'; it must be int"),
        ({"prismer": {"batch_size": True}}, "batch_size is True; it must be int"),
        ({"prismer": {"learning_rate": -1e-3}}, "must not be negative"),
        ({"prismer": {"log_every": 0}}, "at least 1"),
        ({"prismer": {"epochs": 0}}, "epochs and steps are both 0"),
        ({"prismer": {"batch_size": 10, "accumulation": 4}}, "not a multiple of accumulation 4"),
        ({"prismer": []}, "holds list"),
        ([], "holds a list"),
    ],
)
def test_refused_files(tmp_path, engine, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, engine)


def test_broken_json(tmp_path):
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(tmp_path / "engine.json")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"train_batch_size": 64},
            "train_batch_size is 64 in the engine settings, but batch_size of the run gives 32",
        ),
        ({"train_micro_batch_size_per_gpu": 32}, "but batch_size of the run gives 8"),
        ({"gradient_accumulation_steps": 4}, "but accumulation of the run gives 2"),
        ({"gradient_clipping": 0.5}, "but gradient_clipping of the run gives 1.0"),
        ({"bf16": {"enabled": True}}, "the run trains in fp32"),
        ({"zero_optimization": {"stage": 2}}, "stage is 2; checkpoints here are for stage 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "choose none or cpu"),
    ],
)
def test_contradictions(engine, message):
    with pytest.raises(ValueError, match=message):
        merge(TrainConfig(batch_size=32, accumulation=2), engine, world_size=2, precision="fp32")


def test_equal_values_are_no_contradiction():
    engine = dict(train_batch_size=32, gradient_clipping=1.0, bf16=dict(enabled=False))
    merged = merge(TrainConfig(batch_size=32), engine, world_size=1, precision="fp32")
    assert merged["train_micro_batch_size_per_gpu"] == 32 and merged["bf16"]["enabled"] is False


def test_batch_that_does_not_divide():
    with pytest.raises(
        ValueError, match="32 does not divide among 3 processes x 1 .* multiple of 3"
    ):
        TrainConfig(batch_size=32).micro_batch(3)


def test_run_folder():
    assert TrainConfig(run="a").folder == Path("runs/a")
    assert TrainConfig(run="./a").folder == Path("a")
