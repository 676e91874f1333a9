"""int8 towers against fp32 and bf16, on a CPU: pytest benchmarks/test_int8.py --benchmark-only --full

The contenders are one model with random weights in four versions. "ours" has int8 towers (prismer/quantise.py) and
everything else in fp32. If the encoder's output in any version is off by more than 2 % of its norm, nothing is timed.
"""

import copy
import functools

import pytest
import torch

from benchmarks import whole_jobs as jobs
from benchmarks.harness import DEVICE, OURS
from benchmarks.job_runner import Job, measure
from prismer.config import preset
from prismer.model import Prismer
from prismer.quantise import quantise

# largest error of the encoder's output, relative to its norm
MAX_ERROR = 0.02
# tokens of a caption
LENGTH = 20


@functools.cache
def versions() -> dict[str, Prismer]:
    """The four versions of BASE at 480 px, by name of the contender."""
    model = copy.deepcopy(jobs.build(preset("base", image_size=480))).eval()
    bf16 = copy.deepcopy(model).to(torch.bfloat16)
    return {
        OURS: quantise(copy.deepcopy(model)),
        "fp32": model,
        "bf16": bf16,
        "int8 and bf16": quantise(copy.deepcopy(bf16)),
    }


def _encoder(versions, images) -> Job:
    def check(outcomes: dict[str, torch.Tensor]) -> None:
        for name, tokens in outcomes.items():
            jobs.assert_close(f"tokens of {name}", tokens.float(), outcomes["fp32"], MAX_ERROR)

    def encode(model):
        with torch.inference_mode():
            return model.encode(images)

    return Job(
        room="int8 encoder",
        shape="BASE-480 batch 1",
        calls={name: lambda model=model: encode(model) for name, model in versions.items()},
        check=check,
    )


def _caption(versions, images) -> Job:
    options = dict(beams=3, max_length=LENGTH, min_length=LENGTH)

    def check(outcomes: dict[str, list[str]]) -> None:
        # the words may differ: with random weights the best two are nearly tied
        assert all(len(captions) == 1 and captions[0] for captions in outcomes.values())

    return Job(
        room="int8 caption",
        shape="BASE-480 batch 1",
        calls={name: lambda model=model: model.caption(images, **options) for name, model in versions.items()},
        check=check,
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="int8 towers run on a CPU only")
@pytest.mark.parametrize("make", [_encoder, _caption], ids=["encoder", "caption"])
def test_int8(benchmark, make, everything):
    if not everything:
        pytest.skip("BASE in four versions takes long; --full runs it")
    job = make(versions(), jobs.draw_images(versions()["fp32"].config, 1))

    def in_turn(ours, others, rounds: int) -> list[float]:
        benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
        return list(benchmark.stats.stats.data)

    rows = measure(job, 5, in_turn)
    benchmark.group = f"{job.room} {job.shape}"
    benchmark.extra_info.update({f"{name} / ours": round(row.ratio, 3) for name, row in rows.items()})
