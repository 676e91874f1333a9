"""TrainConfig, its JSON and its merge with DeepSpeed's settings: defaults by task, explicit values, refused mistakes.

python -m pytest tests/train/test_train_config.py
"""

import dataclasses
import json
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from prismer.training.config import TASK_DEFAULTS, TrainConfig, merge, read_config
from prismer.training.zero import check_settings

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
    assert merged["bf16"]["enabled"] is True and merged["gradient_clipping"] == config.gradient_clipping
    assert merged["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(merged)
    assert engine["train_batch_size"] == "auto", "merge changed its argument"


@pytest.mark.parametrize("task", TASK_DEFAULTS)
def test_task_defaults(tmp_path, task):
    config, _ = read(tmp_path, {}, task=task, epochs=None)
    assert config.task == task
    assert {name: getattr(config, name) for name in TASK_DEFAULTS[task]} == TASK_DEFAULTS[task]
    assert config.freeze == ("freeze_lang_vision" if task in ("joint", "pretrain") else "freeze_vision")


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
        ({"prismer": {"task": []}}, "task is \\[\\]; it must be str"),
        ({"prismer": {"learning_rate": 10**400}}, "it must be float"),
        ({"prismer": {"learning_rate": 1e39}}, "at most 3.4e"),
        ({"prismer": {"beta1": 1}}, "beta1 is 1.0; it must be below 1"),
        ({"prismer": {"beta2": 1.5}}, "below 1"),
        ({"prismer": {"epsilon": 0}}, "epsilon is 0.0; it must be at least"),
        ({"prismer": {"flip": 1.01}}, "flip is 1.01; it must be at most 1"),
        ({"prismer": {"drop_labels": 2}}, "at most 1"),
        ({"prismer": {"crop_min_area": 0}}, "crop_min_area is 0"),
        ({"prismer": {"min_learning_rate": 0.1}}, "min_learning_rate 0.1 is above learning_rate"),
        ({"prismer": {"questions_per_image": 10**9}}, "questions_per_image is 1000000000; it must be at most 1024"),
        ({"prismer": {"captions_per_image": 10**9}}, "at most 1024"),
        ({"prismer": {"batch_size": 10**9}}, "batch_size is 1000000000; it must be at most"),
        ({"prismer": {"eval_batch_size": 10**9}}, "eval_batch_size is"),
        ({"prismer": {"loader_threads": 10**6}}, "loader_threads is"),
        ({"prismer": {"loader_threads": 0}}, "loader_threads is 0; it must be at least 1"),
        ({"prismer": {"image_size": 10**6}}, "image_size is 1000000"),
        ({"prismer": {"epochs": 10**9}}, "epochs is 1000000000"),
        ({"prismer": {"steps": 10**30}}, "steps is 1000000000000000000000000000000"),
        ({"prismer": {"warmup_steps": 10**9}}, "warmup_steps is"),
        ({"prismer": {"augment_ops": 10**6}}, "augment_ops is"),
        ({"prismer": {"max_answers": 0}}, "max_answers is 0"),
        ({"prismer": {"seed": 2**64}}, "seed is"),
        ({"prismer": {"data": ""}}, "data is empty"),
        ({"prismer": {"model": ""}}, "model is empty"),
        ({"prismer": {"data": "a\nb"}}, "holds characters that no name has"),
        ({"prismer": {"data": "\ud800"}}, "holds characters that no name has"),
        ({"bf16": True}, "bf16 is True in the engine settings; it must be an object"),
        ({"bf16": "auto"}, "bf16 is 'auto' in the engine settings; it must be an object"),
        ({"zero_optimization": "x"}, "zero_optimization is 'x' .* must be an object"),
        ({"zero_optimization": []}, "must be an object"),
        ({"zero_optimization": None}, "must be an object"),
        ({"zero_optimization": {"offload_optimizer": 5}}, "offload_optimizer is 5 .* must be an object"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param is 'cpu'"),
        ({"zero_optimization": {"stage": True}}, "stage is True; it must be 3"),
        ({"train_batch_size": True}, "train_batch_size is True .* a whole number"),
        ({"train_batch_size": [16]}, "a whole number"),
        ({"steps_per_print": "often"}, "a whole number"),
        ({"gradient_clipping": {}}, "a number"),
        ({"dump_state": 1}, "dump_state is 1 .* true or false"),
        ({"aio": 5}, "aio is 5"),
        ({"steps_per_print": 0}, "steps_per_print is 0 .* at least 1"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1"),
        ({"zero_optimization": {"sub_group_size": 0}}, "sub_group_size is 0"),
        ({"data_types": {"grad_accum_dtype": []}}, "data_types is"),
        ([], "holds a list"),
    ],
)
def test_refused_files(tmp_path, engine, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, engine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"prismer": {"flip": NaN}}', "NaN is no number"),
        ('{"prismer": {"learning_rate": Infinity}}', "Infinity is no number"),
        ('{"prismer": {"learning_rate": 1e999}}', "1e999 is too large"),
        ('{"prismer": {"steps": 1, "steps": 2}}', "gives the key 'steps' twice"),
        ('{"prismer": {}, "prismer": {}}', "gives the key 'prismer' twice"),
    ],
)
def test_broken_json(tmp_path, text, message):
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "engine.json")


def test_no_config_file(tmp_path):
    for name, message in {"": "a folder, not a file; name a file\\)", "none.json": "is missing"}.items():
        with pytest.raises(ValueError, match=f"{message}; correct it, or name another with --config"):
            read_config(tmp_path / name)


def test_a_byte_order_mark_means_nothing(tmp_path):
    (tmp_path / "engine.json").write_bytes(b'\xef\xbb\xbf{"prismer": {"steps": 7}}')
    assert read_config(tmp_path / "engine.json")[0].steps == 7


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig) if field.type is not str])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1, 2**63, None, "1", [], {}, 10**400], ids=lambda value: str(value)[:9]
)
def test_no_number_is_absurd(name, value):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{"min_learning_rate": 0.0, name: value})
    assert str(caught.value).startswith(f"{name} is ") and len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "run",
    [
        "",
        ".",
        "..",
        "/",
        "a/..",
        "a/.",
        "./",
        "//",
        " ",
        "a/ ",
        "a\x00b",
        "a\nb",
        "\ud800",
        "x" * 201,
        "a/" + "x" * 300,
    ],
)
def test_names_that_are_no_run(run):
    with pytest.raises(ValueError, match="run is "):
        TrainConfig(run=run)


@pytest.fixture(scope="module")
def one_process():
    """What DeepSpeed asks for before it reads its settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size: Input should be greater"),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, "reduce_bucket_size: Input should be a valid integer"),
        ({"zero_optimization": {"overlap": True}}, "overlap: Extra inputs are not permitted"),
        ({"zero_optimization": {"offload_param": {"device": 5}}}, "offload_param.device"),
        ({"bf16": {"enbled": True}}, "enbled"),
        ({"communication_data_type": "float7"}, "DeepSpeed does not take the engine settings"),
        ({"data_types": {"grad_accum_dtype": "float7"}}, "data_types is"),
        ({"flops_profiler": {"top_modules": "x"}}, "top_modules"),
        ({"train_batch_size": 64}, "train_batch_size is 64 in the engine settings"),
    ],
)
def test_what_deepspeed_does_not_take(one_process, engine, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_settings(TrainConfig(), engine)
    assert "\n" not in str(caught.value)


def test_shipped_settings_are_taken(one_process):
    check_settings(*read_config(ZERO3))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64 in the engine settings, but batch_size of the run gives 32"),
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
    with pytest.raises(ValueError, match="32 does not divide among 3 processes x 1 .* multiple of 3"):
        TrainConfig(batch_size=32).micro_batch(3)


def test_run_folder():
    assert TrainConfig(run="a").folder == Path("runs/a")
    assert TrainConfig(run="./a").folder == Path("a")
