"""What the tests of `apply_to` share: random weights, a step of a model, and comparisons with the unpatched model."""

import copy
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0, eps: float | None = 0.1) -> nn.Module:
    """Draw every parameter, and set the eps of every norm, so large that a forgotten norm, scale, bias or eps shows.

    Matrices have scale 0.2, and vectors 0.3, around 0.7 if they are weights; positions and latents count as inputs, of
    scale 1.
    """
    for module in model.modules():
        for name in ("eps", "variance_epsilon", "rms_norm_eps"):
            if eps is not None and isinstance(getattr(module, name, None), float):
                setattr(module, name, eps)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "latents" in name or name.endswith(("_emb", "_embs")):
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * 0.2)
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.3 + 0.7 * name.endswith("weight"))
    return model


def floating_tensors(output: object, name: str = "output") -> dict[str, Tensor]:
    """The floating tensors in an output, by their place in it."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() else {}
    items = output.items() if hasattr(output, "items") else enumerate(output) if isinstance(output, tuple) else ()
    return {key: value for k, item in items for key, value in floating_tensors(item, f"{name}.{k}").items()}


def step(model: nn.Module, inputs: Mapping[str, object], call: Callable | None = None) -> dict[str, Tensor]:
    """Outputs of a model, and the gradients of all its parameters and floating inputs as "d<name>".

    The loss weighs every number of the outputs differently.

    Args:
        call: is called with the inputs in place of the model.
    """
    leaves = {
        name: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    model.zero_grad()
    outputs = floating_tensors((model if call is None else call)(**leaves))
    draw = torch.Generator().manual_seed(1)
    # numbers of bf16, which are the same in every dtype
    weights = {name: torch.randn(y.shape, generator=draw).bfloat16().to(y) for name, y in outputs.items()}
    loss = sum((y * weights[name]).sum() for name, y in outputs.items() if y.requires_grad)
    loss.backward()
    trained = {name: x for name, x in leaves.items() if isinstance(x, Tensor)} | dict(model.named_parameters())
    grads = {f"d{name}": x.grad.clone() for name, x in trained.items() if x.grad is not None}
    return {name: y.detach() for name, y in outputs.items()} | grads


def assert_same(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    forward: float = 1e-5,
    backward: float = 1e-4,
    floor: float = 1e-2,
) -> None:
    """Equal names, dtypes and shapes, and values up to a tolerance relative to a tensor's largest number.

    Args:
        floor: a gradient counts as at least so large, relative to the largest of all: that of a key's bias is zero
            but for rounding.
    """
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    floor *= max(g.abs().max().item() for name, g in expected.items() if name.startswith("d"))
    for name, value in expected.items():
        is_gradient = name.startswith("d")
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        size = max(value.abs().max().item(), floor if is_gradient else 0.0)
        error = (got[name] - value).abs().max().item()
        assert error <= (backward if is_gradient else forward) * size, f"{name} is off by {error:.2e} of {size:.2e}"


def assert_bf16_no_worse(
    assert_no_worse: Callable,
    plain: nn.Module,
    patched: nn.Module,
    inputs: Mapping[str, object],
    call: Callable = lambda model: model,
    exact_call: Callable | None = None,
) -> None:
    """Judge a patched model in bf16 by the shared rule, against the unpatched one in bf16 and in float64.

    Args:
        assert_no_worse: the fixture.
        call: gives what is called with the inputs, for a model.
        exact_call: in place of `call` for the model in float64.
    """

    def run(model: nn.Module, dtype: torch.dtype, call: Callable) -> dict[str, Tensor]:
        is_float = {name: isinstance(x, Tensor) and x.is_floating_point() for name, x in inputs.items()}
        cast = {name: x.bfloat16().to(dtype) if is_float[name] else x for name, x in inputs.items()}
        return step(model, cast, call(model))

    low = copy.deepcopy(plain).bfloat16()
    high = copy.deepcopy(low).double()
    ours, theirs = (run(m, torch.bfloat16, call) for m in (copy.deepcopy(patched).bfloat16(), low))
    assert_no_worse("", ours, theirs, lambda: run(high, torch.float64, exact_call or call))


def train_losses(
    model: nn.Module, inputs: Mapping[str, object], steps: int = 3, call: Callable = lambda model: model
) -> list[float]:
    """Losses of a few AdamW steps of a copy of the model."""
    model = copy.deepcopy(model)
    run = call(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        outputs = floating_tensors(run(**inputs)).values()
        loss = sum(y.float().square().mean() for y in outputs if y.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, each storage once, without the parameters."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            # the tensor too, so that its address is not used again
            saved.append((storage.nbytes(), t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call()
    assert output.requires_grad
    return sum(size for size, _ in saved)


def fallback_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    """The warnings that a patched module runs its original forward."""
    return [str(w.message) for w in caught if "is patched but runs its original forward" in str(w.message)]
