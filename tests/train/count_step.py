"""The operators of one default training step, on one process under DeepSpeed; test_step_count.py launches this script.

count_step.py DATA RUN OUT.json PRECISION DETERMINISTIC
"""

import collections
import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismer.kernels.dispatch import as_if_watched
from prismer.training.engine_settings import read_config
from prismer.training.setup import Run
from prismer.training.trainer import Trainer

STEPS = 3
_ALLOCATIONS = ("empty", "new_empty", "zeros", "new_zeros", "new_ones", "ones_like")


class StepCounter(TorchDispatchMode):
    """Counts what reaches torch's dispatcher below autograd: operators, casts, allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if func.is_view or name == "_unsafe_view":
            self.kinds["views"] += 1
        elif name.startswith(_ALLOCATIONS):
            self.kinds["allocations"] += 1
        else:
            self.kinds["operators"] += 1
            self.kinds["casts"] += name == "_to_copy"
        return func(*args, **(kwargs or {}))


def main() -> None:
    data, folder, out, precision, deterministic = sys.argv[1:]
    torch.set_num_threads(1)
    config, settings = read_config(Path(__file__).parents[2] / "zero3.json", data=data, run=folder, steps=100)
    config = replace(config, precision=precision, deterministic=deterministic == "yes")
    trainer = Trainer(Run(config, settings))
    losses = []
    counter = StepCounter()
    with closing(trainer._micro_batches()) as batches:
        for _ in range(STEPS):
            trainer._train_step(batches)
            losses.append(float(trainer.loss_sum))
        trainer._save(None)
        # the loader works in threads of its own, which the counter does not see
        with as_if_watched(False), counter:
            trainer._train_step(batches)
        losses.append(float(trainer.loss_sum))
    report = dict(
        counter.kinds,
        losses=losses,
        resumed=trainer.run.resumed is not None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
