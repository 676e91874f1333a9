"""What depends on the step alone: the learning rate, and the seeds of everything random in a step.

The order of the data and augmentation are keyed in the same way (dataloading/feed/loader.py). So a run that was killed
and resumed has the losses of an uninterrupted one, without a stored generator.
"""

import math

import numpy as np
import torch
from torch import Tensor

from prismer.training.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of a step (counted from 0): linear warm-up, then a cosine down to the minimum."""
    peak, low, warmup = config.learning_rate, config.min_learning_rate, min(config.warmup_steps, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def keyed_seed(*key: int) -> int:
    """A 63-bit seed that depends on every number of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def instance_rows(seed: int, step: int, num_instances: int) -> Tensor:
    """(256,) int64: each object id's row of the instance table, permuted anew each step and alike on all ranks."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, step))
    order = torch.randperm(num_instances, generator=generator)
    return order[torch.arange(256) % num_instances]
