"""Proves how zero3.json is read and completed: defaults by task, explicit values, and refused mistakes.

python -m pytest tests/train/test_engine_settings.py
"""

import json
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from prismer.training.config import TrainConfig
from prismer.training.engine_settings import complete_settings, read_config
from prismer.training.zero import check_settings

ZERO3 = Path(__file__).resolve().parents[2] / "zero3.json"


def read(tmp_path, engine: dict, **overrides):
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(engine))
    return read_config(file, **overrides)


def test_shipped_settings_give_the_default_run():
    config, engine = read_config(ZERO3)
    assert config == TrainConfig()
    merged = complete_settings(config, engine, world_size=2, precision="bf16")
    assert merged["train_batch_size"] == config.batch_size
    assert merged["train_micro_batch_size_per_gpu"] * 2 * config.accumulation == config.batch_size
    assert merged["bf16"]["enabled"] is True and merged["gradient_clipping"] == config.gradient_clipping
    assert merged["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(merged)
    assert engine["train_batch_size"] == "auto", "complete_settings changed its argument"


def test_flags_win_over_the_section_and_the_section_over_the_task(tmp_path):
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
        ({"prismer": {"lerning_rate": 1.0}}, "holds lerning_rate; known settings are"),
        ({"prismer": []}, "holds list"),
        ({"prismer": {"task": []}}, "task is \\[\\]; it must be str"),
        ({"prismer": {"learning_rate": -1e-3}}, "must be at least 0"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, engine, message):
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
def test_broken_json_is_refused(tmp_path, text, message):
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "engine.json")


def test_a_missing_config_file_is_named(tmp_path):
    for name, message in {"": "a folder, not a file; name a file\\)", "none.json": "is missing"}.items():
        with pytest.raises(ValueError, match=f"{message}; correct it, or name another with --config"):
            read_config(tmp_path / name)


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "engine.json").write_bytes(b'\xef\xbb\xbf{"prismer": {"steps": 7}}')
    assert read_config(tmp_path / "engine.json")[0].steps == 7


@pytest.fixture(scope="module")
def one_process():
    """The process group that DeepSpeed needs before it reads settings."""
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
        ({"communication_data_type": "float7"}, "DeepSpeed refuses the engine settings"),
        ({"data_types": {"grad_accum_dtype": "float7"}}, "data_types is"),
        ({"flops_profiler": {"top_modules": "x"}}, "top_modules"),
        ({"train_batch_size": 64}, "train_batch_size is 64 in the engine settings"),
    ],
)
def test_settings_that_deepspeed_refuses_are_named_in_one_sentence(one_process, engine, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_settings(TrainConfig(), engine)
    assert "\n" not in str(caught.value)


def test_deepspeed_accepts_the_shipped_settings(one_process):
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
def test_a_setting_that_contradicts_the_run_is_refused(engine, message):
    with pytest.raises(ValueError, match=message):
        complete_settings(TrainConfig(batch_size=32, accumulation=2), engine, world_size=2, precision="fp32")


def test_a_setting_may_repeat_a_value_of_the_run():
    engine = dict(train_batch_size=32, gradient_clipping=1.0, bf16=dict(enabled=False))
    merged = complete_settings(TrainConfig(batch_size=32), engine, world_size=1, precision="fp32")
    assert merged["train_micro_batch_size_per_gpu"] == 32 and merged["bf16"]["enabled"] is False
