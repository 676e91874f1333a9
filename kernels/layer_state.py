"""Whether reading the weights of a layer gives the same result as calling the layer.

A fused forward reads the weights of the layers that it covers and does not call these layers. That is correct only
while each layer is plain: of the expected class, without hooks, without a `forward` on the instance, and with weights
that are ordinary tensors of a supported dtype on the device of the input. A layer can lose this at any time: it is
quantised, pruned, parametrised, adapted, wrapped, offloaded or sharded.

`reason_not_plain` checks a layer thoroughly and names the obstacle. `fingerprint` is the cheap check that patched
modules make at every call: a flat list, built in about a microsecond for a few layers, that stays equal while nothing
relevant changes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from prismer.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what the checks of the rules read of a layer beside its weights
_SCALARS = ("eps", "variance_epsilon", "approximate", "normalized_shape", "p")
# hooks of these packages gather weights on entry and leave the layer's input and output alone
_GATHERING_PACKAGES = ("deepspeed", "torch.distributed.fsdp")


def fingerprint(
    module: nn.Module, covered: Iterable[nn.Module | None], head_path: tuple[str, ...], x: object, one_dtype: bool
) -> list:
    """Summarise everything that decides whether a fused forward may replace the layers that it covers.

    Args:
        module: the patched module. Its own weights count; its hooks do not, since it is called in any case.
        covered: the sub-modules that are not called, each with everything inside.
        head_path: names of the modules on the way to the patched head, if there is one.
        x: the input. Weights are compared with its device and dtype if it is a floating tensor.
        one_dtype: whether norms must have the dtype of `x` too, and not only matrices.
    """
    given = (x.dtype, x.device) if isinstance(x, Tensor) and x.is_floating_point() else None
    found: list = []
    _add_weights(found, module, given, one_dtype)
    for child in covered:
        _add_module(found, child, given, one_dtype)
    if head_path:
        _add_head(found, module, head_path, one_dtype)
    if len(found) > len(module._parameters) and has_global_hooks():
        found.append("global hooks")
    return found


def _add_module(found: list, module: nn.Module | None, given: tuple | None, one_dtype: bool) -> None:
    found.append(type(module))
    if module is None:
        return
    own = module.__dict__
    if has_hooks(module):
        found.append("hooks")
    if "forward" in own:
        found.append("forward")
    if own.get("_parameters") or "weight" in own:
        _add_weights(found, module, given, one_dtype)
    children = own["_modules"]
    if children:
        for child in children.values():
            _add_module(found, child, given, one_dtype)
    elif type(module) is not nn.Linear:
        for name in _SCALARS:
            found.append(own.get(name))


def _add_head(found: list, module: nn.Module, path: tuple[str, ...], one_dtype: bool) -> None:
    child: Any = module
    for name in path:
        child = child._modules.get(name)
        found.append(type(child))
        if child is None:
            return
        if has_foreign_hooks(child) or "forward" in child.__dict__:
            found.append("hooks")
    _add_weights(found, child, None, one_dtype)


def _add_weights(found: list, module: nn.Module, given: tuple | None, one_dtype: bool) -> None:
    for name, tensor in module._parameters.items():
        if tensor is None:
            continue
        found.append(name)
        # the set is asked first because it answers for most weights at once
        if type(tensor) not in dispatch.PLAIN and not is_plain_tensor(tensor):
            found.append(type(tensor))
        dtype = tensor.dtype
        if dtype not in DTYPES:
            found.append(dtype)
        if given is not None:
            if dtype != given[0] and (one_dtype or tensor.dim() > 1):
                found.append("dtype")
            if tensor.device != given[1]:
                found.append("device")
    # FSDP's views and torch's older weight norms leave a plain attribute in place of the parameter
    if "weight" in module.__dict__:
        found.append("weight" if is_plain_tensor(module.__dict__["weight"]) else "no weight")


def reason_not_plain(
    name: str, module: nn.Module, x: object = None, one_dtype: bool = False, is_called: bool = False
) -> str | None:
    """Say in one clause why reading the weights of `module` differs from calling it; None if it does not.

    Args:
        name: of `module`, for the clause.
        x, one_dtype: as in `fingerprint`.
        is_called: whether `module` is called anyway, so that its hooks and a `forward` on the instance do no harm.
    """
    if not is_called and has_hooks(module):
        return f"its {name} has hooks, which a fused forward would not call"
    if not is_called and "forward" in module.__dict__:
        return f"its {name} has a forward on the instance (offloaded or wrapped), which a fused forward would not call"
    # a scripted module has no _parameters
    tensors = dict(module.__dict__.get("_parameters", ()))
    if "weight" in module.__dict__:
        tensors["weight"] = module.__dict__["weight"]
    for key, tensor in tensors.items():
        full = f"{name}.{key}" if name else key
        if tensor is None:
            continue
        if not is_plain_tensor(tensor):
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


def is_plain_layer(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether `layer` is exactly a `kind` whose weights can be read in place of calling it."""
    if type(layer) is not kind or "forward" in layer.__dict__ or has_hooks(layer):
        return False
    weight = layer.__dict__["_parameters"].get("weight")
    return weight is None or is_plain_tensor(weight)


def is_plain_tensor(tensor: object) -> bool:
    """Whether this is an ordinary tensor or parameter, or the stand-in that torch uses for one while it traces."""
    kind = type(tensor)
    return kind in dispatch.PLAIN or (isinstance(tensor, Tensor) and kind.__module__.startswith("torch._subclasses."))


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks other than those of DeepSpeed and FSDP, which only gather the weights."""
    return has_hooks(module) and not all(
        (getattr(hook, "__module__", None) or "").startswith(_GATHERING_PACKAGES)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def has_global_hooks() -> bool:
    """Whether hooks are registered for every module of the process."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
