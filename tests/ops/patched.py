"""What the tests of `apply_to` share: weights that show a mistake, and the comparison with the unpatched model."""

import copy

import torch
from torch import Tensor, nn


def enlarge(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter: matrices of scale 0.2, biases and norms away from 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
            elif parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3 + 0.7 * name.endswith("weight"))
    return model


def tensors(output, name: str = "output") -> dict[str, Tensor]:
    """The floating tensors in an output, by their place."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() else {}
    items = output.items() if hasattr(output, "items") else enumerate(output) if isinstance(output, tuple) else ()
    return {key: value for k, item in items for key, value in tensors(item, f"{name}.{k}").items()}


def step(model: nn.Module, inputs: dict, call=None) -> dict[str, Tensor]:
    """Outputs, and gradients of all parameters and floating inputs, for a loss that weighs every output differently."""
    leaves = {
        name: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    model.zero_grad()
    outputs = tensors((model if call is None else call)(**leaves))
    draw = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=draw).to(y)).sum() for y in outputs.values() if y.requires_grad)
    loss.backward()
    trained = {name: x for name, x in leaves.items() if isinstance(x, Tensor)} | dict(model.named_parameters())
    grads = {f"d{name}": x.grad.clone() for name, x in trained.items() if x.grad is not None}
    return {name: y.detach() for name, y in outputs.items()} | grads


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], forward=1e-5, backward=1e-4) -> None:
    """Equal names, and values to a tolerance relative to the largest entry."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    # a key's bias has no gradient but rounding: what is a hundredth of the others' is compared with those
    floor = max(g.abs().max().item() for n, g in expected.items() if n.startswith("d")) * 1e-2
    for name, value in expected.items():
        gradient = name.startswith("d")
        size = max(value.abs().max().item(), floor if gradient else 0.0)
        error = (got[name] - value).abs().max().item()
        assert error <= (backward if gradient else forward) * size, f"{name} is off by {error:.2e} of {size:.2e}"


def assert_no_worse(model: nn.Module, patched: nn.Module, inputs: dict, call=None) -> None:
    """In bf16: the error against float64 is at most twice the unpatched model's (three times for gradients)."""

    def run(m, dtype, reference=False):
        m = copy.deepcopy(m).to(torch.float64 if reference else dtype)
        if reference:  # from the same low-precision numbers
            m.load_state_dict(model_low.state_dict())
        cast = dict(inputs)
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                cast[name] = x.to(dtype).to(torch.float64 if reference else dtype)
        return step(m, cast, None if call is None else call(m))

    model_low = copy.deepcopy(model).bfloat16()
    exact = run(model, torch.bfloat16, reference=True)
    plain, ours = run(model, torch.bfloat16), run(patched, torch.bfloat16)
    floor = max(g.abs().max().item() for n, g in exact.items() if n.startswith("d")) * 1e-2
    for name, value in exact.items():
        gradient = name.startswith("d")
        errors = [(t[name].double() - value).square().mean().sqrt().item() for t in (ours, plain)]
        rounding = torch.finfo(torch.bfloat16).eps * max(
            value.square().mean().sqrt().item(), floor if gradient else 0.0
        )
        limit = (3 if gradient else 2) * errors[1] + rounding
        assert errors[0] <= limit, f"{name}: {errors[0]:.2e}, plain {errors[1]:.2e}"


def losses(model: nn.Module, inputs: dict, steps: int = 3, call=None) -> list[float]:
    """Losses of a few AdamW steps."""
    model = copy.deepcopy(model)
    call = model if call is None else call(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    out = []
    for _ in range(steps):
        loss = sum(y.float().square().mean() for y in tensors(call(**inputs)).values() if y.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out
