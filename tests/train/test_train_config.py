"""Proves that TrainConfig refuses values that cannot be trained with, in one sentence that names the field.

python -m pytest tests/train/test_train_config.py
"""

import dataclasses
from pathlib import Path

import pytest

from prismer.training.config import TrainConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "vqa2"}, "task is 'vqa2'; choose from"),
        ({"freeze": "all"}, "freeze is 'all'; choose from none"),
        ({"batch_size": "32"}, "batch_size is '32'; it must be int"),
        ({"batch_size": True}, "batch_size is True; it must be int"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; it must be at least 0"),
        ({"log_every": 0}, "at least 1"),
        ({"epochs": 0}, "epochs and steps are both 0"),
        ({"batch_size": 10, "accumulation": 4}, "not a multiple of accumulation 4"),
        ({"task": []}, "task is \\[\\]; it must be str"),
        ({"learning_rate": 10**400}, "it must be float"),
        ({"learning_rate": 1e39}, "at most 3.4e"),
        ({"beta1": 1}, "beta1 is 1.0; it must be below 1"),
        ({"beta2": 1.5}, "below 1"),
        ({"epsilon": 0}, "epsilon is 0.0; it must be at least"),
        ({"flip": 1.01}, "flip is 1.01; it must be at most 1"),
        ({"drop_labels": 2}, "at most 1"),
        ({"crop_min_area": 0}, "crop_min_area is 0"),
        ({"min_learning_rate": 0.1}, "min_learning_rate 0.1 is above learning_rate"),
        ({"questions_per_image": 10**9}, "questions_per_image is 1000000000; it must be at most 1024"),
        ({"captions_per_image": 10**9}, "at most 1024"),
        ({"batch_size": 10**9}, "batch_size is 1000000000; it must be at most"),
        ({"eval_batch_size": 10**9}, "eval_batch_size is"),
        ({"loader_threads": 10**6}, "loader_threads is"),
        ({"loader_threads": 0}, "loader_threads is 0; it must be at least 1"),
        ({"image_size": 10**6}, "image_size is 1000000"),
        ({"epochs": 10**9}, "epochs is 1000000000"),
        ({"steps": 10**30}, "steps is 1000000000000000000000000000000"),
        ({"warmup_steps": 10**9}, "warmup_steps is"),
        ({"augment_ops": 10**6}, "augment_ops is"),
        ({"max_answers": 0}, "max_answers is 0"),
        ({"seed": 2**64}, "seed is"),
        ({"data": ""}, "data is empty"),
        ({"model": ""}, "model is empty"),
        ({"data": "a\nb"}, "holds unprintable characters"),
        ({"data": "\ud800"}, "holds unprintable characters"),
    ],
)
def test_a_wrong_setting_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_task(**given)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig) if field.type is not str])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1, 2**63, None, "1", [], {}, 10**400], ids=lambda value: str(value)[:9]
)
def test_an_absurd_number_is_refused_in_a_short_sentence(name, value):
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
def test_a_run_name_needs_a_folder_of_its_own(run):
    with pytest.raises(ValueError, match="run is "):
        TrainConfig(run=run)


def test_a_batch_must_divide_among_the_processes():
    with pytest.raises(ValueError, match="32 does not divide among 3 processes x 1 .* multiple of 3"):
        TrainConfig(batch_size=32).micro_batch(3)


def test_a_run_has_a_folder_under_runs_or_at_its_own_path():
    assert TrainConfig(run="a").folder == Path("runs/a")
    assert TrainConfig(run="./a").folder == Path("a")
