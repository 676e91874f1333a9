"""Proves that each task of the table has the published defaults and draws the right texts with the right prefix.

python -m pytest tests/train/test_tasks.py
"""

import dataclasses

import numpy as np
import pytest

from prismer.costs.plan import texts_of
from prismer.training.config import TrainConfig
from prismer.training.data import choose_texts
from prismer.training.initial_model import build_initial_model
from prismer.training.tasks import TASKS

# Prismer, arXiv:2303.02506, and its released configurations
PUBLISHED = {
    "pretrain": dict(epochs=20, batch_size=1024, learning_rate=3e-4, min_learning_rate=1e-6, warmup_steps=2000),
    "caption": dict(epochs=3, batch_size=256, learning_rate=5e-5, min_learning_rate=0.0, warmup_steps=0),
    "vqa": dict(epochs=10, batch_size=512, learning_rate=5e-5, min_learning_rate=0.0, warmup_steps=0),
    "classify": dict(epochs=20, batch_size=64, learning_rate=5e-5, min_learning_rate=0.0, warmup_steps=0),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_task_has_the_published_defaults(task):
    expected = dict(
        PUBLISHED[task],
        crop_min_area=0.5,
        flip=0.5,
        augment_ops=2,
        captions_per_image=1,
        questions_per_image=1 if task == "vqa" else 0,
        gradient_clipping=0.0,
        freeze="freeze_lang_vision" if task == "pretrain" else "freeze_vision",
    )
    assert TASKS[task].defaults == expected
    assert TrainConfig.for_task(task=task) == dataclasses.replace(TrainConfig(), task=task, **expected)


def test_the_default_run_is_joint_training():
    assert TrainConfig.for_task() == TrainConfig.for_task(task="joint") == TrainConfig()


def test_given_settings_win_over_the_defaults_of_the_task():
    config = TrainConfig.for_task(task="caption", batch_size=8, epochs=1)
    assert (config.batch_size, config.epochs, config.freeze) == (8, 1, "freeze_vision")


@pytest.mark.parametrize(
    ("task", "group_size", "has_prefix"),
    [("joint", 5, True), ("caption", 2, True), ("pretrain", 2, False), ("vqa", 3, False), ("classify", 1, False)],
)
def test_a_task_draws_its_texts_and_no_others(workshop, task, group_size, has_prefix):
    model = build_initial_model(str(workshop.folder / "model"))
    model.config = model.config.replace(caption_prefix="a picture of")
    config = TrainConfig(task=task, captions_per_image=2, questions_per_image=3)
    questions = [
        {"question": f"how many, {i}?", "kind": "count", "answers": [{"answer": str(i), "weight": 1.0}]}
        for i in range(4)
    ]
    meta = {"captions": ["a red cube", "a cube", "one red cube"], "questions": questions, "class": 1}
    texts = choose_texts(config, model, ["cat", "dog"])(meta, np.random.default_rng(0))
    assert len(texts) == sum(config.texts_per_image.values()) == group_size
    written = [model.tokenizer.decode(ids).lower() for ids, _, _ in texts]
    assert any(text.startswith("a picture of") for text in written) == has_prefix
    assert ("dog" in written[0]) == (task == "classify")
    assert sum("how many" in text for text in written) == {"joint": 3, "vqa": 3}.get(task, 0)
    # the planner counts the same texts
    planned = texts_of(config, model.config)
    assert sum(count for count, _ in planned) == group_size and len(planned) == len(TASKS[task].texts)


def test_a_task_about_questions_needs_questions():
    with pytest.raises(ValueError, match="questions_per_image is 0, but task vqa trains on questions; give at least 1"):
        TrainConfig.for_task(task="vqa", questions_per_image=0)
    assert sum(TrainConfig(task="joint", questions_per_image=0).texts_per_image.values()) == 1
