"""Whole jobs at real sizes, ours against the released way of computing: pytest benchmarks/test_jobs.py --benchmark-only

Weights are random, images have 480 px unless a case says otherwise. A CPU computes in fp32, a GPU in bf16.
whole_jobs.py defines what is computed and compared, job_runner.py how it is measured. By default a CPU runs one BASE
caption for one round, and a GPU a job of each kind and size; --full runs every job, and at BASE the same model through
torch.compile, which takes minutes to compile. A measurement holds the time, the peak memory (of a step: above
parameters and gradients), the counted FLOPs, the operators called, and the fraction of the operators' time spent in
matrix products.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks import whole_jobs as jobs
from benchmarks.harness import DEVICE, OURS
from benchmarks.job_runner import measure
from prismer.config import preset


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job at one size.

    Attributes:
        name: test id.
        make: (model, shape) -> Job.
        model, side: preset and image size in pixels.
        default: also measured without --full.
        on_gpu: likewise, on a GPU.
        rounds: number of rounds with --full; without it there is one.
        compiled: whether the same model through torch.compile is a contender with --full.
    """

    name: str
    make: Callable
    model: str = "base"
    side: int = 480
    default: bool = False
    on_gpu: bool = False
    rounds: int = 3
    compiled: bool = False


def _labels(model, shape, **options):
    return jobs.labels_job(model.config, shape, **options)


_pre_training = functools.partial(jobs.step_job, mode="freeze_lang_vision", batch=4, prefix="")
_fine_tuning = functools.partial(jobs.step_job, batch=2)
_rank = jobs.rank_job

CASES = [
    # cases with the same model follow each other: the last model is cached, so each is built once
    Case(name="pre-training", on_gpu=True, make=_pre_training, side=224, compiled=True),
    Case(name="labels", make=_labels, side=224, rounds=5),
    Case(name="classes", make=jobs.classify_job, side=384, rounds=1, compiled=True),
    Case(name="encoder", on_gpu=True, make=jobs.encoder_job, rounds=10, compiled=True),
    Case(name="caption", make=jobs.caption_job, default=True, compiled=True),
    Case(name="caption-8", make=functools.partial(jobs.caption_job, batch=8), rounds=1),
    Case(name="answer-16", on_gpu=True, make=functools.partial(_rank, top_k=16), compiled=True),
    Case(name="answer-16-five", make=functools.partial(_rank, top_k=16, questions=5)),
    Case(name="answer-128-all", make=functools.partial(_rank, top_k=128, whole_list=True), rounds=1),
    *(
        Case(
            name=f"fine-tuning-{mode}",
            make=functools.partial(_fine_tuning, mode=mode),
            on_gpu=mode == "freeze_vision",
            compiled=True,
        )
        for mode in ("freeze_vision", "freeze_lang_vision", "freeze_lang", "none")
    ),
    Case(name="five-captions", make=functools.partial(jobs.step_job, mode="freeze_vision", batch=1, texts=5), rounds=2),
    Case(name="large-pre-training", make=_pre_training, model="large", side=224, rounds=1),
    Case(name="large-classes", make=jobs.classify_job, model="large", side=384, rounds=1),
    Case(name="large-encoder", on_gpu=True, make=jobs.encoder_job, model="large", rounds=3),
    Case(name="large-caption", on_gpu=True, make=jobs.caption_job, model="large", rounds=1),
    Case(name="large-answer-16", make=functools.partial(_rank, top_k=16), model="large", rounds=1),
    Case(
        name="large-answer-128-all", make=functools.partial(_rank, top_k=128, whole_list=True), model="large", rounds=1
    ),
    Case(
        name="large-fine-tuning-freeze_vision",
        on_gpu=True,
        make=functools.partial(_fine_tuning, mode="freeze_vision"),
        model="large",
        rounds=1,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_job(benchmark, case, full):
    default = case.default or (DEVICE.type == "cuda" and case.on_gpu)
    if not (full or default):
        pytest.skip("few jobs run by default; --full runs them all")
    model = jobs.build(preset(case.model, image_size=case.side))
    options = dict(compiled=True) if full and case.compiled else {}
    job = case.make(model, f"{case.model.upper()}-{case.side}", **options)

    def in_turn(ours: Callable, others: Callable, rounds: int) -> list[float]:
        benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
        return list(benchmark.stats.stats.data)

    rows = measure(job, case.rounds if full or DEVICE.type == "cuda" else 1, in_turn)
    benchmark.group = f"{job.room} {job.shape}"
    benchmark.extra_info.update(
        {f"{name} / ours": round(row.ratio, 3) for name, row in rows.items() if name != OURS},
        peak_mb={name: round(row.peak_mb, 1) for name, row in rows.items()},
        gflop={name: round(row.flops / 1e9, 2) for name, row in rows.items()},
        operators={name: row.ops for name, row in rows.items()},
    )
