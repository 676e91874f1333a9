"""DeepSpeed's side of training: process group, ZeRO-3 engine, and whole tensors out of and into its shards.

What DeepSpeed 0.19.8 needs to be told on any machine is here, so that the trainer reads as a trainer.
"""

import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.training.config import TrainConfig, merge

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_distributed(local_rank: int | None = None) -> torch.device:
    """Join the process group that `deepspeed`, `torchrun` or plain `python` implies, and return this rank's device.

    Args:
        local_rank: what the launcher gave as --local_rank; the environment's LOCAL_RANK if None.
    """
    if "RANK" not in os.environ:
        # a plain `python train.py`: one process, which needs a port of its own
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    # deepspeed's collectives use torch names that torch 2.14 announces to rename
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops

    # otherwise start-up compiles a shared-memory all-reduce with g++ and ninja, which only inference would use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # the ranks of a machine share its cores
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


def end_distributed(group: dist.ProcessGroup) -> None:
    """Leave the process group, once every rank has come here."""
    dist.barrier(group)
    dist.destroy_process_group()


def host_group(hours: int = 12) -> dist.ProcessGroup:
    """A group for host tensors: flags and results do not wait for the GPU, and ranks wait for hours if need be."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=hours))


def gather_json(value, group: dist.ProcessGroup) -> list:
    """Every rank's `value` (anything JSON can hold), in the order of the ranks, on every rank."""
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(own)]), group=group)
    longest = int(max(lengths))
    boxes = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(boxes, F.pad(own, (0, longest - len(own))), group=group)
    return [json.loads(bytes(box[: int(n)].tolist())) for box, n in zip(boxes, lengths, strict=True)]


class SharedError(ValueError):
    """An error that every rank raises alike, so that one of them may say it for all."""


def on_first_rank(work: Callable[[], object], group: dist.ProcessGroup):
    """Run `work` on rank 0 while the others wait; its (JSON-like) result on every rank.

    Raises:
        SharedError: on every rank, if `work` raised a ValueError.
        OSError: on every rank, if `work` raised one.
    """
    told = None
    if dist.get_rank() == 0:
        try:
            told = dict(value=work())
        except ValueError as error:
            told = dict(error=str(error))
        except OSError as error:
            told = dict(system=[error.errno, error.strerror or str(error), error.filename and str(error.filename)])
    told = gather_json(told, group)[0]
    if "error" in told:
        raise SharedError(told["error"])
    if "system" in told:
        raise OSError(*told["system"])
    return told["value"]


def peer_ended(error: BaseException) -> bool:
    """Whether `error` is what a collective raises because another process of the run has gone."""
    broken = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo/transport")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in broken)
    )


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, and over nothing else."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=trainable)]
    if not config.decay_norms:
        groups = [
            dict(params=[p for p in trainable if p.ndim > 1]),
            dict(params=[p for p in trainable if p.ndim <= 1], weight_decay=0.0),
        ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def check_settings(config: TrainConfig, settings: dict) -> None:
    """Refuse engine settings that contradict the run or that DeepSpeed does not take, before anything is built.

    Raises:
        ValueError: which names the setting.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    # the precision is chosen later, and compared then
    settings = {**settings, "bf16": {**settings.get("bf16", {}), "enabled": "auto"}}
    merged = merge(config, settings, world_size=dist.get_world_size(), precision="fp32")
    try:
        DeepSpeedConfig(merged)
    except Exception as error:  # pydantic's, asserts and whatever a wrong value meets first
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # pydantic counts its errors in the first line, and names the field in the second
        reason = ": ".join(lines[1:3] if len(lines) > 2 else lines[:1]) or type(error).__name__
        raise ValueError(
            f"DeepSpeed does not take the engine settings ({reason[:200]}); correct them in the config file"
        ) from None


SMALL_MODEL = 20_000_000
"""Parameters below which gathering the decoder at once costs no memory worth saving."""


def build_engine(model: nn.Module, config: TrainConfig, settings: dict, precision: str):
    """Hand `model` to DeepSpeed: its parameters become shards, the trainable ones with fp32 masters and AdamW."""
    import deepspeed

    merged = merge(config, settings, world_size=dist.get_world_size(), precision=precision)
    if sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        # one hook for the whole decoder: those of its blocks cost a quarter of tiny's step on a CPU
        deepspeed.utils.set_z3_leaf_module(model.decoder, True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, config), config=merged, dist_init_required=False
    )
    return engine


def set_learning_rate(engine, rate: float) -> None:
    """The rate of every parameter group from the next step on."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


# whole tensors out of the shards


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their state-dict names: the sharded ones as they are, without data."""
    return module.state_dict(keep_vars=True)


@contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter or buffer with all its data, inside the context (a collective: every rank must enter)."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


def master(parameter: Tensor) -> Tensor:
    """What a checkpoint keeps of a tensor: fp32 master if it trains, else as it is (a collective)."""
    if getattr(parameter, "requires_grad", False):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    with whole(parameter) as data:
        return data.clone()


def moment(parameter: Tensor, key: str) -> Tensor:
    """AdamW's `exp_avg` or `exp_avg_sq` of a trainable parameter, whole (a collective)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key)


def copy_weights(engine, replica: nn.Module) -> None:
    """Fill `replica`, a plain module of the same tree, with the engine's current weights on every rank."""
    targets = replica.state_dict(keep_vars=True)
    for name, tensor in state_tensors(engine.module).items():
        with whole(tensor) as data:
            targets[name].data.copy_(data)


# whole tensors into the shards


def allocate_moments(engine, step: int) -> None:
    """Give AdamW the state that it has after `step` steps, with zero moments; torch would make it at its first step."""
    zero = engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(step), device=flat.device),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }


def own_part(parameter: Tensor, value: Tensor) -> Tensor:
    """This rank's shard of a whole tensor: equal consecutive parts, the last padded with zeros."""
    size = parameter.partition_numel()
    flat = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return flat.narrow(0, size * dist.get_rank(), size)


def set_master(parameter: Tensor, value: Tensor) -> None:
    """Overwrite the fp32 master of a trainable parameter with its part of `value` (whole)."""
    from deepspeed.utils import safe_set_local_fp32_param

    # the full-tensor setters of DeepSpeed 0.19.8 fail where a tensor does not divide among the ranks
    safe_set_local_fp32_param(parameter, own_part(parameter, value))


def set_moment(parameter: Tensor, key: str, value: Tensor) -> None:
    """Overwrite AdamW's `exp_avg` or `exp_avg_sq` of a trainable parameter with its part of `value` (whole)."""
    from deepspeed.utils import safe_set_local_optimizer_state

    safe_set_local_optimizer_state(parameter, own_part(parameter, value), key)
