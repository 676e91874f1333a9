"""One process of the DeepSpeed run that test_plan.py compares the planner with: bytes between steps and at the peak.

torchrun --nproc_per_node N tests/plan_under_zero.py report.json

torch's own products write into existing memory, as those of a GPU do.
"""

import functools
import gc
import json
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from prismer.config import PrismerConfig, prismer_tiny
from prismer.costs.fake_step import blank_batch
from prismer.freezing import freeze
from prismer.kernels.dispatch import use_backend
from prismer.model import Prismer
from prismer.training import zero as engines
from prismer.training.config import TrainConfig
from tests.ops.live_bytes import peak_bytes

MODE, BATCH, TEXTS = "freeze_lang_vision", 4, ((1, 12),)
RUNS = ((0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
ZERO = dict(
    reduce_bucket_size=300_000,
    stage3_prefetch_bucket_size=100_000,
    stage3_param_persistence_threshold=100,
    overlap_comm=True,
)


def config() -> PrismerConfig:
    """A small config with matrices of odd sizes, so that shards need padding."""
    return prismer_tiny(
        image_size=64,
        label_size=64,
        vision_width=128,
        vision_depth=2,
        vision_heads=4,
        resampler_depth=1,
        resampler_heads=4,
        num_latents=4,
        text_width=128,
        text_depth=2,
        text_heads=4,
        text_mlp_width=257,
        vocab_size=321,
    )


def wait_for_release(collective):
    """Make `collective` return only after gloo's own thread has released its tensors.

    That thread holds the tensors for a moment after the collective is done. If it is the last holder, it frees their
    memory, and the profiler, which follows one thread, would count that memory as alive until the end.
    """

    @functools.wraps(collective)
    def call(*args, async_op=False, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        before = [tensor._use_count() for tensor in tensors]
        work = collective(*args, async_op=True, **kwargs)
        work.wait()
        del work
        while [tensor._use_count() for tensor in tensors] != before:
            time.sleep(1e-4)
        return Done() if async_op else None

    return call


class Done:
    """The handle of a finished collective."""

    def wait(self) -> None:
        return


def held() -> int:
    """The bytes of all tensors that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measure(stage: int, precision: str) -> dict:
    """Train three steps; measure the bytes between the second and third step, and the peak of the third."""
    before = held()
    torch.manual_seed(0)
    model = Prismer(config()).train()
    freeze(model, MODE)
    world = dist.get_world_size()
    train = TrainConfig(batch_size=BATCH * world)
    settings = dict(
        train_batch_size=BATCH * world,
        gradient_clipping=1.0,
        bf16=dict(enabled=precision == "bf16"),
        zero_optimization=dict(stage=stage, **ZERO),
        zero_force_ds_cpu_optimizer=False,
        steps_per_print=10**9,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=engines.build_optimizer(model, train), config=settings, dist_init_required=False
    )
    batch = blank_batch(config(), BATCH, TEXTS)
    own = sum(t.nbytes for t in (batch.images.rgb, *batch.images.labels.values(), *batch.images.rows.values()))
    own += batch.images.features.nbytes + batch.images.instance_rows.nbytes
    own += batch.texts.ids.nbytes + batch.texts.labels.nbytes + batch.texts.weights.nbytes

    def step() -> None:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

    step()
    step()
    found = dict(stage=stage, precision=precision, held=held() - before - own)
    if stage == 3:
        zero = engine.optimizer
        states = [t for state in zero.optimizer.state.values() for t in state.values() if t.numel() > 1]
        shards = sum(p.ds_tensor.nbytes for p in model.parameters())
        whole = sum(p.nbytes for p in model.parameters()) if world > 1 else 0
        found |= dict(
            parameters=shards + whole + sum(b.nbytes for b in model.buffers()),
            optimizer=sum(t.nbytes for t in [*states, *zero.fp32_partitioned_groups_flat]),
            gradients=zero.grad_partitions_flat_buffer.nbytes,
        )
    found["peak"] = found["held"] + peak_bytes(step)
    engine.destroy()
    return found


def main() -> None:
    torch.set_num_threads(1)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, wait_for_release(getattr(dist, name)))
    engines.start_distributed()
    with use_backend("linear:torch"):
        found = [measure(*run) for run in RUNS]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
