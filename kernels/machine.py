"""What of a kernel's needs this machine has: the native extension, Triton, the packages of other libraries."""

import functools
import importlib
import importlib.util
import threading
import warnings

import torch

BUILD = "run pip install --no-build-isolation --no-deps -e ."

_loading = threading.RLock()


@functools.cache
def native_missing(device_type: str = "cpu") -> str | None:
    """Load the native extension for a device type once; None if it loads, else the reason why not."""
    # while a thread loads an extension, it is in sys.modules without a spec, and find_spec raises in other threads
    with _loading:
        return _load_native(device_type)


def _load_native(device_type: str) -> str | None:
    name = "prismer._C" if device_type == "cpu" else "prismer._C_cuda"
    if device_type != "cpu":
        reason = native_missing("cpu")
        if reason is not None:
            return reason
    if importlib.util.find_spec(name) is None:
        needs = "a C++ compiler" if device_type == "cpu" else "nvcc and PRISMER_CUDA=1"
        return f"{name} was not built; with {needs} present, {BUILD}"
    try:
        importlib.import_module(name)
    except ImportError as error:
        reason = f"{name} does not load ({error}); {BUILD}"
        warnings.warn(f"{reason}; until then other backends run instead", stacklevel=2)
        return reason
    return None


@functools.cache
def triton_missing() -> str | None:
    """None if Triton can be imported, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run pip install triton"
    return None


def interpreting() -> bool:
    """Does Triton run kernels in its interpreter (TRITON_INTERPRET=1), which takes CPU tensors?"""
    import triton

    return bool(triton.knobs.runtime.interpret)


PACKAGES = {
    # generations 3, 4 and 2; where only generation 4 is installed, the third name is an empty namespace
    "flash-attn": tuple(
        (module, "flash_attn_func") for module in ("flash_attn_interface", "flash_attn.cute", "flash_attn")
    ),
    "xformers": (("xformers.ops", "memory_efficient_attention"),),
}


@functools.cache
def module_missing(module: str, function: str) -> str | None:
    """None if `module` of another library can be imported and has `function`, else the reason why not."""
    try:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if not hasattr(importlib.import_module(module), function):
            return f"{module} has no {function}"
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return f"{module} is not installed"
        return f"{module} does not import here ({error})"
    # a binary that was built for another torch can raise anything
    except Exception as error:
        return f"{module} does not import here ({type(error).__name__}: {error})"
    return None


def package_missing(backend: str) -> str | None:
    """None if a package behind `flash-attn` or `xformers` can be imported, else the reason why not."""
    reasons = [module_missing(*entry) for entry in PACKAGES[backend]]
    return None if None in reasons else f"{backend} is not there: {'; '.join(reasons)}"


@functools.cache
def has_native(op: str, device_type: str) -> bool:
    """Was the native extension built with a kernel of `op` for a device type?"""
    # the first look-up of an unknown name raises, so ask for the schema before the kernel
    return hasattr(torch.ops.prismer_native, op) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"prismer_native::{op}", device_type.upper())
    )
