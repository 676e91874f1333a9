"""What the modules under a fused forward are now: whether it may still stand in for them.

A fused forward reads the weights of the layers that it covers and does not call them. It may, as long as to call them
would do the same: each is of the class that the rule knows, nobody hooks into it, no `forward` hangs on the instance,
its weights are plain tensors of a float that the ops take, where the input is and of its dtype. All of this may change
after patching: layers are quantised, pruned, normalised, adapted, wrapped, offloaded, sharded.

`state_of` is a summary of it, a flat list that costs a microsecond for a few layers, and equal as long as nothing of
this kind changes. Only where it differs from the one that was judged last is a rule asked again, by `patch.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from prismer.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALARS = ("eps", "variance_epsilon", "approximate", "normalized_shape", "p")
# what a rule's check reads of a layer beside its weights
_CARRIERS = ("deepspeed", "torch.distributed.fsdp")
# gather weights on entry by hooks, and leave what goes in and comes out as it is


def state_of(module: nn.Module, covered: Iterator, paths: Iterator, x: object, one_dtype: bool) -> list:
    """A summary that changes when a fused forward may no longer stand in for what it covers.

    Args:
        module: the patched module; its own weights count, its hooks are called in any case.
        covered: the sub-modules that are not called, each with everything inside.
        paths: tuples of names; modules on the way to one that is called otherwise than in the original.
        x: the input, with whose device and dtype the weights are compared; anything but a float tensor is not.
        one_dtype: whether norms have to be of the dtype of `x` too, and not only matrices.
    """
    given = (x.dtype, x.device) if isinstance(x, Tensor) and x.is_floating_point() else None
    state: list = []
    _add_weights(state, module, given, one_dtype)
    for child in covered:
        _add(state, child, given, one_dtype)
    for path in paths:
        child = module
        for name in path:
            child = child._modules.get(name)
            state.append(type(child))
            if child is None:
                break
            if has_foreign_hooks(child) or "forward" in child.__dict__:
                state.append("hooks")
        else:
            _add_weights(state, child, None, one_dtype)
    if len(state) > len(module._parameters) and has_global_hooks():
        state.append("global hooks")
    return state


def _add(state: list, module: nn.Module | None, given: tuple | None, one_dtype: bool) -> None:
    state.append(type(module))
    if module is None:
        return
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        state.append("hooks")
    if "forward" in own:
        state.append("forward")
    if own.get("_parameters") or "weight" in own:
        _add_weights(state, module, given, one_dtype)
    children = own["_modules"]
    if children:
        for child in children.values():
            _add(state, child, given, one_dtype)
    elif type(module) is not nn.Linear:
        for name in _SCALARS:
            state.append(own.get(name))


def _add_weights(state: list, module: nn.Module, given: tuple | None, one_dtype: bool) -> None:
    for name, tensor in module._parameters.items():
        if tensor is None:
            continue
        state.append(name)
        if type(tensor) not in dispatch.PLAIN and not is_plain(tensor):
            state.append(type(tensor))
        dtype = tensor.dtype
        if dtype not in DTYPES:
            state.append(dtype)
        if given is not None:
            if dtype != given[0] and (one_dtype or tensor.dim() > 1):
                state.append("dtype")
            if tensor.device != given[1]:
                state.append("device")
    if "weight" in module.__dict__:
        # a plain attribute, as FSDP's views and torch's older norms of weights are
        state.append("weight" if is_plain(module.__dict__["weight"]) else "no weight")


def why_not(name: str, module: nn.Module, x: object = None, one_dtype: bool = False, hooks: bool = True) -> str | None:
    """One clause, why reading the weights of `module`, called `name`, is not what calling it is; or None.

    Args:
        x, one_dtype: as in `state_of`.
        hooks: whether hooks and a `forward` on the instance count: they do where the module is not called.
    """
    if hooks and has_hooks(module):
        return f"its {name} has hooks, which a fused forward would not call"
    if hooks and "forward" in module.__dict__:
        return f"its {name} has a forward on the instance (offloaded or wrapped), which a fused forward would not call"
    tensors = dict(module.__dict__.get("_parameters", ()))  # a scripted module has none
    if "weight" in module.__dict__:
        tensors["weight"] = module.__dict__["weight"]
    for key, tensor in tensors.items():
        full = f"{name}.{key}" if name else key
        if tensor is None:
            continue
        if not is_plain(tensor):
            return f"its {full} is a {type(tensor).__name__} (quantised or sharded), not a plain tensor"
        if tensor.dtype not in DTYPES:
            return f"its {full} is {tensor.dtype}, and the fused ops take fp32, bf16, fp16 or float64"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if tensor.device != x.device:
            return f"its {full} is on {tensor.device} (offloaded or moved), and the input on {x.device}"
        if tensor.dtype != x.dtype and (one_dtype or tensor.dim() > 1):
            return f"its {full} is {tensor.dtype}, and the input {x.dtype}"
    return None


def reads_as_called(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether to read the weights of `layer`, of exactly this `kind`, is to call it: for modules of fixed layers."""
    own = layer.__dict__
    if type(layer) is not kind or "forward" in own:
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    weight = own["_parameters"].get("weight")
    return type(weight) in dispatch.PLAIN or weight is None or is_plain(weight)


def is_plain(tensor: object) -> bool:
    """Whether this is a tensor that is what it seems; torch's own stand-ins for one while it traces are."""
    kind = type(tensor)
    return kind in dispatch.PLAIN or (isinstance(tensor, Tensor) and kind.__module__.startswith("torch._subclasses."))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this module's forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_foreign_hooks(module: nn.Module) -> bool:
    """The same, those left out that only gather the weights: DeepSpeed's and FSDP's."""
    return has_hooks(module) and not all(
        (getattr(hook, "__module__", None) or "").startswith(_CARRIERS)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def has_global_hooks() -> bool:
    """Whether somebody listens to every module of the process."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
