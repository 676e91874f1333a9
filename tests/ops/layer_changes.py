"""What may happen to a layer of a built model: quantised, pruned, parametrised, hooked, wrapped, offloaded, ..."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


class Lora(nn.Module):
    """Like peft's: it holds the layer, and offers the layer's weight as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Int8(torch.Tensor):
    """Like torchao's: a weight of its own class, whose numbers only its own operators know."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Int8":
        self = torch.Tensor._make_subclass(cls, torch.zeros_like(weight))
        self.scale = weight.abs().amax() / 127
        self.steps = (weight / self.scale).round().to(torch.int8)
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.steps * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Shifted(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5


def quantise(layer: nn.Module) -> None:
    layer._parameters["weight"] = Int8(layer.weight.detach())


def quantise_dynamically(layer: nn.Linear) -> nn.Module:
    engines = torch.backends.quantized.supported_engines
    if not {"fbgemm", "x86", "onednn"} & set(engines):
        pytest.skip("no engine for dynamic quantisation")
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return torch.ao.nn.quantized.dynamic.Linear.from_float(layer)


def offload(layer: nn.Module) -> None:
    """Like accelerate's hooks: a forward on the instance, over weights that are elsewhere."""
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for name, p in list(layer.named_parameters()):
        layer._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    layer.forward = lambda x: F.linear(x, weights["weight"], weights.get("bias"))


def override_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def add_old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)
    with torch.no_grad():
        # so that the attribute `weight` is out of date
        layer.weight_g.mul_(1.5)


def in_place(_: object) -> None:
    """A change of the layer itself, for which no other layer is put in its place."""


# name: changes a layer and returns None, or returns what takes its place
CHANGES: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "adapted": Lora,
    "wrapped": nn.Sequential,
    "wrapped twice": lambda layer: nn.Sequential(layer, nn.LayerNorm(layer.out_features)),
    "quantised": quantise,
    "quantised dynamically": quantise_dynamically,
    "pruned": lambda layer: in_place(prune.random_unstructured(layer, "weight", 0.5)),
    "weight norm, old": add_old_weight_norm,
    "weight norm": lambda layer: in_place(parametrizations.weight_norm(layer)),
    "spectral norm, old": lambda layer: in_place(nn.utils.spectral_norm(layer)),
    "spectral norm": lambda layer: in_place(parametrizations.spectral_norm(layer)),
    "parametrised": lambda layer: in_place(parametrize.register_parametrization(layer, "weight", Shifted())),
    "offloaded": offload,
    "overridden": override_forward,
    "hook": lambda layer: in_place(layer.register_forward_hook(lambda m, a, y: y * 2)),
    "pre-hook": lambda layer: in_place(layer.register_forward_pre_hook(lambda m, a: (a[0] * 2,))),
    "backward hook": lambda layer: in_place(layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,))),
    "backward pre-hook": lambda layer: in_place(layer.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 2,))),
    "subclass": lambda layer: setattr(layer, "__class__", Halved),
    "rms norm": lambda layer: nn.RMSNorm(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else Lora(layer),
}


def change_layer(model: nn.Module, name: str, how: str) -> None:
    """Change the layer of this name; two equal models are changed alike."""
    torch.manual_seed(3)
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    layer = getattr(parent, child)
    new = CHANGES[how](layer)
    if new is not None:
        setattr(parent, child, new.to(layer.weight.dtype))
