"""Proves that learning rates, seeds and instance rows depend on the step alone, as an exact resumption needs.

python -m pytest tests/train/test_schedule.py
"""

import math
from dataclasses import replace

import pytest
import torch

from prismer.training.config import TrainConfig
from prismer.training.schedule import instance_rows, keyed_seed, learning_rate

CONFIG = TrainConfig(batch_size=32, learning_rate=1e-2, min_learning_rate=1e-4, warmup_steps=10)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate(step, 110, CONFIG) for step in range(110)]
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1e-2)
    # half of the cosine
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[60] == pytest.approx(1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * 50 / 100)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] > 1e-4


def test_the_warm_up_may_be_absent_or_longer_than_the_run():
    assert learning_rate(0, 10, replace(CONFIG, warmup_steps=0)) == 1e-2
    assert learning_rate(4, 5, CONFIG) == pytest.approx(1e-2), "a run shorter than its warm-up warms up faster"


def test_instance_rows_are_a_permutation_keyed_by_seed_and_step():
    rows = instance_rows(1, 2, 128)
    assert rows.shape == (256,) and torch.equal(rows[:128], rows[128:])
    assert torch.equal(rows[:128].sort().values, torch.arange(128))
    assert torch.equal(rows, instance_rows(1, 2, 128))
    assert not torch.equal(rows, instance_rows(1, 3, 128)) and not torch.equal(rows, instance_rows(2, 2, 128))


def test_keyed_seeds_differ():
    seeds = {keyed_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)
