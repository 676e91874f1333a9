"""ZeRO-3 on one process: a step without DeepSpeed's work for each parameter.

One process holds every shard whole, so that nothing is gathered, reduced or released. DeepSpeed 0.19.8 still runs some
thirty operators for each parameter in each step: it frees and gathers every parameter, copies every gradient three
times and takes the norm of each. Its hooks run before and after every module. For a small model this is most of a
step. Here parameters stay views of the optimizer's flat buffers, and the gradients become one flat tensor, whose norm
is one operator. The optimizer with its masters, its clipping and its checks remains DeepSpeed's. The losses are the
same; only the norm that clips is summed in another order.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# numbers whose squares are added in fp32: to about a tenth of a rounding
_ROW = 1024


def is_alone(engine: nn.Module) -> bool:
    """Whether one process holds all parameters, and the settings let each of them stay gathered between steps.

    They do if no parameter is larger than `stage3_param_persistence_threshold`, and nothing is offloaded.
    """
    optimizer: Any = engine.optimizer
    return (
        optimizer.partition_count == 1
        and all(p.ds_persist for p in engine.module.parameters())
        and not (optimizer.offload_optimizer or optimizer.offload_param or optimizer.zenflow)
        # autograd adds the gradients of micro-batches in the dtype of the parameters
        and optimizer.gradient_accumulation_dtype == optimizer.communication_data_type == optimizer.dtype
    )


def stay_gathered(engine: nn.Module) -> None:
    """Gather all parameters for good, remove the hooks that would release them, and replace the work per parameter."""
    optimizer: Any = engine.optimizer
    optimizer.parameter_offload._remove_module_hooks()
    for hook in (*optimizer._grad_acc_hooks, *optimizer._leaf_module_hooks):
        hook.remove()
    for module in engine.module.modules():
        module._parameters = _without_gathering(module)
    parameters: list[Any] = list(engine.module.parameters())
    # views of the flat buffers, which the optimizer changes in place
    parameters[0].all_gather(parameters)
    for low, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True):
        if low.dtype == master.dtype:
            # an fp32 parameter is its own master
            master.data = low.data
    optimizer.persistent_parameters = []
    optimizer._partition_all_parameters = _nothing
    optimizer._reassign_or_swap_out_partitioned_parameters = partial(_round_masters, optimizer)
    optimizer.independent_gradient_partition_epilogue = _nothing
    optimizer._get_norm_groups = partial(_gather_gradients, optimizer)
    optimizer._prepare_fp32_grad_for_sub_group = _nothing


def _without_gathering(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """DeepSpeed's dict of a module's parameters, without its look-up, which gathers and costs more than an operator."""
    found: Any = module._parameters
    members = dict(__getitem__=OrderedDict.__getitem__)
    # of DeepSpeed's class, which DeepSpeed would put in place of any other at the next forward pass
    plain = type("GatheredParameters", (type(found),), members)(parent_module=module)
    plain.update(found)
    return plain


def _nothing(*_: Any) -> None:
    pass


def _gather_gradients(optimizer: Any) -> list[Tensor]:
    """Hand the gradients to the masters, one flat tensor for each group; returns the norms of the groups."""
    norms = []
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        master.grad = optimizer.flatten(gradients).to(master.dtype)
        for p in group:
            p.grad = None
        norms.append(_norm(master.grad))
    return norms


def _norm(x: Tensor) -> Tensor:
    """The norm of a flat tensor, in its dtype for a thousand numbers at a time and in float64 for these sums."""
    rows = x[: len(x) // _ROW * _ROW].view(-1, _ROW)
    parts = torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(x[rows.numel() :], keepdim=True)
    return torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64)


def _round_masters(optimizer: Any, group: int) -> None:
    """Copy the masters of a group to its parameters, unless they share memory."""
    low, master = optimizer.fp16_partitioned_groups_flat[group], optimizer.fp32_partitioned_groups_flat[group]
    if low.dtype != master.dtype:
        low.data.copy_(master.data)
