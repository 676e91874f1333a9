"""Proves that the calls of the GPU check fit together at their real shapes, which quick runs do not use: on the meta
device, which has shapes and no numbers. Run: pytest tests/test_gpu_check_calls.py
"""

from pathlib import Path

import pytest
import torch

from benchmarks.shapes import MODELS
from prismer.kernels.dispatch import all_ops, use_backend
from scripts.gpu_check import Context
from scripts.gpu_stages import models, ops, timing
from scripts.gpu_stages.calls import CALLS, cast, draw

ON_META = Context(device="meta", quick=False, folder=Path(), seconds=60.0, workers=1)
ON_CPU = Context(device="cpu", quick=True, folder=Path(), seconds=60.0, workers=1)


def shapes_of(value):
    return [tuple(t.shape) for t in ([value] if isinstance(value, torch.Tensor) else value)]


def test_every_public_op_is_called():
    """Parts of other ops, and ops of patches, are not."""
    named = {calls.op.name for calls in CALLS.values()}
    others = {op.name for op in all_ops()} - named
    assert others <= {
        "logit_statistics",
        "philox_kept",
        "rms_norm",
        "rotary",
        "gated_mlp",
        "resampler_projections",
        "linear",
        "few_rows_linear",
    }


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("name", CALLS)
def test_real_shapes(name, model):
    calls = CALLS[name]
    shapes = [calls.real(model, batch) for batch in timing.BATCHES]
    for shape in (*shapes, *calls.edges, calls.tiny):
        arguments = cast(draw(calls, shape, "meta"), torch.bfloat16, "meta", False)
        with use_backend("reference"):
            ours = calls.ours(*arguments)
        assert shapes_of(ours) == shapes_of(calls.plain(*arguments)), shape
        # what a table of measured choices is keyed by
        assert all(isinstance(size, int) for size in shape.values())
    assert len({tuple(shape.values()) for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("name", CALLS)
def test_edge_shapes_are_right_on_torch(name):
    calls = CALLS[name]
    for shape in calls.edges:
        if torch.Size(shape.values()).numel() < 10**6:
            for trained in (False, True) if calls.trained else (False,):
                found = ops._compare(calls, shape, torch.float32, "torch", trained, ON_CPU)
                assert found["ok"], (shape, found)


@pytest.mark.parametrize("name", ("base", "large"))
@pytest.mark.parametrize("side", (224, 480))
def test_the_models_run_at_their_sizes(name, side):
    model = models.build(name, side, ON_META, torch.bfloat16)
    batch = models.draw_batch(model.config, 2, "meta")
    # a loss without numbers has no backward pass
    loss = model(batch)
    assert loss.shape == () and loss.device.type == "meta"
    assert model.encoder(batch.images).shape == (2, model.config.num_context_tokens, model.config.vision_width)


def test_every_job_is_timed_at_a_preset():
    assert {(name, side) for name, side, *_ in models._JOBS} <= {(n, s) for n in ("base", "large") for s in (224, 480)}
    assert {job for _, _, job, _ in models._JOBS} == {"encode", "step"}


def test_tiles_are_swept_at_real_shapes():
    cases = timing._tile_cases(ON_META)
    assert len(cases) == 16 and {op for op, *_ in cases.values()} == {"gemm", "attention"}
