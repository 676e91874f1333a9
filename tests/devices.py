"""Where the op tests run: on the CPU, and once more on the device of the tests marked `gpu`.

That device is a GPU where there is one. `PRISMER_TEST_DEVICE=cpu` lets the CPU stand in for it, with Triton in its
interpreter, so that `pytest -m gpu` can be tried on any machine. Without either there are no such tests.

A test names no device. While it runs, the factories of torch (`FACTORIES`) put what it makes on its device. A mode of
torch would do so too, but an op takes another way where a mode watches it.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
)
_ROOT = Path(__file__).resolve().parents[1]
_OURS = str(_ROOT / "kernels"), str(_ROOT / "prismer")
# torch's own tools name no device where they want the CPU; its layers, where they want the default
_LIBRARIES = str(Path(torch.__file__).parent), f"{Path(torch.__file__).parents[1]}/triton"
_LAYERS = str(Path(torch.nn.__file__).parent)


def kernel_device() -> torch.device | None:
    """The device of the tests marked `gpu`, or None if this machine has none for them.

    Raises:
        ValueError: if PRISMER_TEST_DEVICE names neither cpu nor cuda.
    """
    named = os.environ.get("PRISMER_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
    if named not in ("", "cpu", "cuda"):
        raise ValueError(f"PRISMER_TEST_DEVICE is {named!r}; choose cpu, to stand in for a GPU, or cuda")
    return torch.device(named) if named else None


def made_on(device: torch.device, factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory of torch, such as `torch.randn`, that puts tensors on `device` if the caller names no device.

    It draws them on the CPU, so that every device gets the same numbers. What an op makes while it runs stays where the
    op puts it: an op that forgets the device of its inputs has to fail, on the stand-in too.
    """

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or kwargs.get("device") is not None:
            return factory(*args, **kwargs)
        caller = sys._getframe(1).f_code
        # modules make their parameters where the test wants them
        if caller.co_filename.startswith(_OURS) and caller.co_name != "__init__":
            # on a GPU the op has a tensor of the CPU now, and fails by itself
            assert device.type != "cpu", f"{caller.co_filename} makes a tensor and names no device"
            return factory(*args, **kwargs)
        if caller.co_filename.startswith(_LIBRARIES) and not caller.co_filename.startswith(_LAYERS):
            return factory(*args, **kwargs)
        return moved(factory(*args, **kwargs | dict(device="cpu")), device)

    return make


def moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor inside it (in dicts, lists and tuples) on `device`; other values as they are."""
    if isinstance(value, Tensor):
        if value.device.type == "meta" or value.device.type == device.type:
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {name: moved(inner, device) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(inner, device) for inner in value)
    return value
