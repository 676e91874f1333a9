"""DeepSpeed's side of training: the process group, the ZeRO-3 engine, and access to the tensors that it shards.

Every workaround for DeepSpeed 0.19.8 is in this file. A "collective" is a function that every rank must call.
"""

import importlib
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.errors import InputError
from prismer.training import zero_alone
from prismer.training.config import TrainConfig
from prismer.training.engine_settings import complete_settings

# AdamW's state of a parameter
MOMENTS = ("exp_avg", "exp_avg_sq")
# below this number of parameters, gathering the whole decoder at once costs no memory worth saving
SMALL_MODEL = 20_000_000

Result = TypeVar("Result")


def start_distributed(local_rank: int | None = None) -> tuple[torch.device, dist.ProcessGroup]:
    """Join the process group of the launcher (`deepspeed`, `torchrun` or plain `python`).

    Args:
        local_rank: the launcher's --local_rank; None takes LOCAL_RANK from the environment.

    Returns:
        This rank's device; and a group for tensors on the host, whose messages do not wait for the GPU, and whose ranks
        wait up to 12 hours.
    """
    if "RANK" not in os.environ:
        # plain `python train.py` is a group of one process, which needs a free port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    # DeepSpeed calls collectives by names that torch 2.14 deprecates
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops

    # otherwise start-up compiles a shared-memory all-reduce with g++ and ninja, which only inference uses
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
    return device, dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def end_distributed(group: dist.ProcessGroup) -> None:
    """Wait for every rank, then leave the process group (collective)."""
    dist.barrier(group)
    dist.destroy_process_group()


def gather_json(value: object, group: dist.ProcessGroup) -> list:
    """The `value` of every rank, in the order of the ranks, on every rank (collective); JSON carries the values."""
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(own)]), group=group)
    longest = int(max(lengths))
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(texts, F.pad(own, (0, longest - len(own))), group=group)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]


class SharedError(InputError):
    """An error that every rank raises with the same message, so that it is printed once."""


def run_on_rank_zero(work: Callable[[], Result], group: dist.ProcessGroup) -> Result:
    """Run `work` on rank 0 while the other ranks wait; returns its result on every rank (collective).

    Args:
        work: returns something that JSON can hold.

    Raises:
        SharedError: on every rank, if `work` raised a ValueError.
        OSError: on every rank, if `work` raised one.
    """
    outcome = None
    if dist.get_rank() == 0:
        try:
            outcome = dict(value=work())
        except ValueError as error:
            outcome = dict(error=str(error))
        except OSError as error:
            outcome = dict(system=[error.errno, error.strerror or str(error), error.filename and str(error.filename)])
    outcome = gather_json(outcome, group)[0]
    if "error" in outcome:
        raise SharedError(outcome["error"])
    if "system" in outcome:
        raise OSError(*outcome["system"])
    return outcome["value"]


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective raised `error` because another process of the run has ended."""
    broken = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo/transport")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in broken)
    )


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters."""
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
    """Refuse engine settings that contradict the run or that DeepSpeed refuses, before anything is built.

    Raises:
        ValueError: if there is such a setting; the message names it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    # build_engine compares bf16.enabled with the precision, which is not known yet
    settings = {**settings, "bf16": {**settings.get("bf16", {}), "enabled": "auto"}}
    merged = complete_settings(config, settings, world_size=dist.get_world_size(), precision="fp32")
    try:
        DeepSpeedConfig(merged)
    # errors of pydantic, failed asserts, and whatever else a wrong value runs into
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # pydantic counts its errors in the first line and names the field in the second
        reason = ": ".join(lines[1:3] if len(lines) > 2 else lines[:1]) or type(error).__name__
        raise InputError(
            f"DeepSpeed refuses the engine settings ({reason[:200]}); correct them in the config file"
        ) from None


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which the engine asks for, without compiling functions that nobody calls.

    Compiling them imports torch's inductor, which takes a second of every start.
    """
    from deepspeed.runtime import compiler

    compile_function, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


def build_engine(model: nn.Module, config: TrainConfig, settings: dict, precision: str) -> nn.Module:
    """Hand `model` to DeepSpeed: its parameters become shards, the trainable ones with fp32 masters and AdamW.

    Args:
        settings: engine settings, as `read_config` returned them.
        precision: "bf16" or "fp32".

    Returns:
        The DeepSpeedEngine.
    """
    import deepspeed

    merged = complete_settings(config, settings, world_size=dist.get_world_size(), precision=precision)
    _import_muon()
    if sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        # one hook for the whole decoder: a hook for each block takes a quarter of tiny's step on a CPU
        deepspeed.utils.set_z3_leaf_module(model.decoder, True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, config), config=merged, dist_init_required=False
    )
    if zero_alone.is_alone(engine):
        zero_alone.stay_gathered(engine)
    return engine


# whole tensors out of the shards


@contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Give a parameter or buffer with all its data; valid inside the context (collective)."""
    if not hasattr(tensor, "ds_id"):
        yield tensor.data
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # DeepSpeed would release a parameter that was gathered before
    with deepspeed.zero.GatheredParameters([tensor], enabled=tensor.ds_status != ZeroParamStatus.AVAILABLE):
        yield tensor.data


def gather_weight(tensor: Tensor) -> Tensor:
    """The tensor that a checkpoint stores: the fp32 master of a trainable parameter, else a copy (collective)."""
    if getattr(tensor, "requires_grad", False):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    with gathered(tensor) as data:
        return data.clone()


def gather_moment(parameter: Tensor, key: str) -> Tensor:
    """One of AdamW's MOMENTS of a trainable parameter, whole (collective)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key)


def copy_weights(engine: nn.Module, replica: nn.Module) -> None:
    """Copy the engine's current weights into `replica`, an unsharded module of the same tree (collective)."""
    targets = replica.state_dict(keep_vars=True)
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with gathered(tensor) as data:
            targets[name].data.copy_(data)


# whole tensors into the shards


def allocate_moments(engine: nn.Module, step: int) -> None:
    """Give AdamW the state that it has after `step` steps, with moments of 0; torch makes it only at the first step."""
    optimizer = engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step), device=flat.device),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }


# the setters of DeepSpeed 0.19.8 for full tensors fail where a tensor does not divide among the ranks


def set_weight(parameter: Tensor, value: Tensor) -> None:
    """Overwrite this rank's shard of the fp32 master of a trainable parameter; `value` is the whole tensor."""
    from deepspeed.utils import safe_set_local_fp32_param

    safe_set_local_fp32_param(parameter, _local_shard(parameter, value))


def set_moment(parameter: Tensor, key: str, value: Tensor) -> None:
    """Overwrite this rank's shard of one of AdamW's MOMENTS; `value` is the whole tensor."""
    from deepspeed.utils import safe_set_local_optimizer_state

    safe_set_local_optimizer_state(parameter, _local_shard(parameter, value), key)


def _local_shard(parameter: Tensor, value: Tensor) -> Tensor:
    """This rank's shard of a whole tensor: equal consecutive parts, the last one padded with zeros."""
    size = parameter.partition_numel()
    flat = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return flat.narrow(0, size * dist.get_rank(), size)
