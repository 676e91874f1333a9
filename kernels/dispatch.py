"""Which implementation of an op runs, and how ops are registered with torch: the one place that decides both.

Backends, the fastest usable one first: `native` is compiled C++ and CUDA C++, `triton` is compiled at its first call,
`torch` is composed of PyTorch operators without needless memory, `reference` is the definition that tests compare with.
Attention can also be lent to `flash-attn`, `xformers` and torch's own `sdpa`. PRISMER_BACKEND, read when this module
is imported, or `use_backend` asks for another than the fastest.
"""

import functools
import importlib
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

BACKENDS = ("native", "triton", "torch", "flash-attn", "xformers", "sdpa", "reference")

_ANY, _GPU, _COMPILED = None, ("cuda",), ("cpu", "cuda")
_OPS: dict[str, dict[str, tuple[str, ...] | None]] = {
    # native first: its launch costs the host a fraction of Triton's, and these ops are short
    "layer_norm": {"native": _COMPILED, "triton": _GPU, "torch": _ANY, "reference": _ANY},
    "label_map": {"native": _COMPILED, "triton": _GPU, "torch": _ANY, "reference": _ANY},
    "decode_attention": {"native": _COMPILED, "triton": _GPU, "torch": _ANY, "reference": _ANY},
    "bias_activation": {"native": ("cpu",), "triton": _GPU, "torch": _ANY, "reference": _ANY},
    "mlp": {"triton": _GPU, "torch": _ANY, "reference": _ANY},
    "adaptor": {"triton": _GPU, "torch": _ANY, "reference": _ANY},
    # on a GPU a vendor's attention where it serves the call, and ours where it does not
    "attention": {
        "flash-attn": _GPU,
        "native": ("cpu",),
        "sdpa": _ANY,
        "triton": _GPU,
        "xformers": _GPU,
        "torch": _ANY,
        "reference": _ANY,
    },
    "resampler_attention": {"triton": _GPU, "torch": _ANY, "reference": _ANY},
    "cross_entropy": {"triton": _GPU, "torch": _ANY, "reference": _ANY},
    # inside the loss and attention on torch's operators
    "logit_statistics": {"native": ("cpu",), "torch": _ANY},
    "philox_kept": {"native": ("cpu",), "torch": _ANY},
    "instance_rows": {"triton": _GPU, "torch": _ANY, "reference": _ANY},
}
# op -> backend, fastest first -> device types that it serves; None is every device

_BUILD = "run pip install --no-build-isolation --no-deps -e ."
_log = logging.getLogger("prismer.kernels")


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One line of `backends()`: may `backend` serve `op` on this machine, and if not, why."""

    op: str
    backend: str
    usable: bool
    reason: str


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}; choose {', '.join(BACKENDS)}, or leave it unset")
    return backend


def _from_environment() -> str | None:
    backend = os.environ.get("PRISMER_BACKEND")
    return _checked(backend, "PRISMER_BACKEND") if backend else None


_asked: str | None = _from_environment()
# of the whole process, not of a thread: on a GPU the backward pass runs in threads of autograd's own


def asked() -> str | None:
    """The backend that `use_backend` or PRISMER_BACKEND asks for, or None."""
    return _asked


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Ask for one backend inside the block, in every thread, before PRISMER_BACKEND; None asks for the fastest.

    Raises:
        ValueError: if `backend` is no backend's name.
    """
    global _asked
    before, _asked = _asked, None if backend is None else _checked(backend, "backend")
    try:
        yield
    finally:
        _asked = before


_loading = threading.RLock()


@functools.cache
def native_missing(device_type: str = "cpu") -> str | None:
    """Load the native extension of a device once; None if its ops are there, else the reason why they are not."""
    # while a thread loads an extension, it is in sys.modules without a spec, and find_spec raises in the others
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
        return f"{name} was not built; with {needs} present, {_BUILD}"
    try:
        importlib.import_module(name)
    except ImportError as error:
        reason = f"{name} does not load ({error}); {_BUILD}"
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
    """Does Triton run kernels in its interpreter (TRITON_INTERPRET=1), which takes tensors of the CPU?"""
    import triton

    return bool(triton.knobs.runtime.interpret)


_PACKAGES = {
    # generations 3, 4 and 2; the third name alone is an empty namespace where only generation 4 is installed
    "flash-attn": tuple(
        (module, "flash_attn_func") for module in ("flash_attn_interface", "flash_attn.cute", "flash_attn")
    ),
    "xformers": (("xformers.ops", "memory_efficient_attention"),),
}


@functools.cache
def module_missing(module: str, function: str) -> str | None:
    """None if another library's `module` has `function`, else the reason; it may be absent or broken."""
    try:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if not hasattr(importlib.import_module(module), function):
            return f"{module} has no {function}"
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return f"{module} is not installed"
        return f"{module} does not import here ({error})"
    except Exception as error:  # a binary built for another torch fails in any way it likes
        return f"{module} does not import here ({type(error).__name__}: {error})"
    return None


def package_missing(backend: str) -> str | None:
    """None if a package behind `flash-attn` or `xformers` imports, else the reason."""
    reasons = [module_missing(*entry) for entry in _PACKAGES[backend]]
    return None if None in reasons else f"{backend} is not there: {'; '.join(reasons)}"


@functools.cache
def _has_native(op: str, device_type: str) -> bool:
    # the first look-up of an unknown name raises, so ask for the schema before the kernel
    return hasattr(torch.ops.prismer_native, op) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"prismer_native::{op}", device_type.upper())
    )


def _why_not(op: str, backend: str, device_type: str) -> str | None:
    """None if `backend` can serve `op` on this kind of device, else the reason."""
    if backend == "triton":
        reason = triton_missing()
        if reason is None and device_type != "cuda" and not interpreting():
            reason = (
                f"triton {op} serves cuda tensors, not {device_type}; TRITON_INTERPRET=1 runs it on the CPU, slowly"
            )
        return reason
    served = _OPS[op][backend]
    if served is not None and device_type not in served:
        return f"{backend} {op} serves {' and '.join(served)} tensors, not {device_type}"
    if backend == "native":
        reason = native_missing(device_type)
        if reason is None and not _has_native(op, device_type):
            reason = f"prismer._C was built from older sources, without {op}; {_BUILD}"
        return reason
    if backend in ("flash-attn", "xformers"):
        return package_missing(backend)
    return None


def _anything(backend: str) -> str | None:
    return None


def choose(op: str, device: torch.device, supports: Callable[[str], str | None] = _anything) -> str:
    """The implementation that `op` uses for tensors on `device`.

    An op that never comes in the backend asked for ignores the request (there is no native loss); one that does, but
    cannot run here or does not support this call, refuses. Otherwise the fastest that can is taken, and what was
    passed over for the sake of this call is logged once (logger `prismer.kernels`, level INFO).

    Args:
        op: a name of the table above.
        device: where the tensors are.
        supports: the room's own rule: backend -> None, or the reason why that one does not serve this call.

    Raises:
        RuntimeError: if the backend asked for exists and cannot run this call.
    """
    asked_for = _asked
    if asked_for in _OPS[op]:
        reason = _why_not(op, asked_for, device.type) or supports(asked_for)
        if reason is not None:
            raise RuntimeError(f"backend {asked_for} was asked for, but {reason}")
        return asked_for
    for backend in _OPS[op]:
        # the interpreter is for proofs: slower than anything, it is only taken when asked for
        if backend == "triton" and device.type != "cuda":
            continue
        if _why_not(op, backend, device.type) is None:
            reason = supports(backend)
            if reason is None:
                return backend
            _log_once(op, backend, reason)
    raise AssertionError(f"{op} has no backend for {device}")


@functools.lru_cache(maxsize=256)
def _log_once(op: str, backend: str, reason: str) -> None:
    _log.info("%s does not run on %s here: %s", op, backend, reason)


def backends() -> list[BackendRow]:
    """Every op with its implementations, and which of them can run on this machine."""
    gpu = torch.cuda.is_available()
    rows = []
    for op, served_by in _OPS.items():
        for backend, served in served_by.items():
            device = "cuda" if gpu and (served is None or "cuda" in served) else "cpu"
            reason = _why_not(op, backend, device)
            rows.append(BackendRow(op=op, backend=backend, usable=reason is None, reason=reason or ""))
    return rows


_library = torch.library.Library("prismer", "FRAGMENT")
_implementations: dict[str, Callable] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# types of tensors that are what they seem
NARROW = frozenset(
    dtype
    for name, dtype in vars(torch).items()
    if name.startswith(("float8", "float4")) and isinstance(dtype, torch.dtype)
)
# floats by name that no operator of torch computes with


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register `prismer::<name>` with torch: opaque to torch.compile, with shapes from `fake`.

    A call with ordinary tensors that nobody watches (no compiler, no dispatch mode, no function transform, no tensor
    subclass) runs the implementation directly, with the gradient of `register_backward` as an autograd function: the
    dispatcher's way to an op of Python, and its generated autograd, cost the host several times as much.

    Args:
        schema: such as "layer_norm(Tensor x, float eps) -> Tensor".
        implementation: serves every device; it chooses the backend itself, and returns fresh contiguous tensors.
        fake: the same outputs without data.

    Returns:
        The op, to be called as a function.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prismer::{name}", fake, lib=_library)
    _implementations[name] = implementation
    op = getattr(torch.ops.prismer, name)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        if forward_ad._current_level >= 0:
            # it would come out as zeros
            raise NotImplementedError(
                f"prismer::{name} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
                "differentiate in reverse, or leave the dual level for this call"
            )
        if _watched():
            return op(*args)
        gradient = False
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if type(arg) not in PLAIN:
                    return op(*args)
                if arg.dtype in NARROW:
                    raise ValueError(
                        f"{name} was given a tensor of {arg.dtype}, which is for storage alone; cast it first, with "
                        "its scale if it has one: fp32, bf16, fp16 and float64 are served"
                    )
                gradient = gradient or arg.requires_grad
        if gradient and torch.is_grad_enabled():
            function = _functions.get(name)
            # an op without a gradient says so itself
            return op(*args) if function is None else function.apply(*args)
        return implementation(*args)

    return call


def on_host(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Does an eager call with `x` run on this CPU, with no backend asked for and nobody watching?

    There the host is the device: between products that empty its caches, a function of Python costs as much as adding
    two tensors. Rooms call torch's own operators where a fused one would save no more than that. Not so for `weights`
    that ZeRO-3 partitions: torch keeps a view of a weight for the backward pass, which would keep it gathered.
    """
    return (
        _asked is None
        and x.device.type == "cpu"
        and type(x) in PLAIN
        and x.dtype not in NARROW
        and not (torch.compiler.is_compiling() or _watched())
        and not any(hasattr(weight, "ds_id") for weight in weights)
    )


_believed: bool | None = None


@contextmanager
def as_if_watched(answer: bool) -> Iterator[None]:
    """Have the ops believe that something watches them, or that nothing does, whatever is the case.

    With False a counter sees the operators of a plain run one by one; with True a profile shows the registered ops.
    """
    global _believed
    before, _believed = _believed, answer
    try:
        yield
    finally:
        _believed = before


def _watched() -> bool:
    """Does something see the operators that are called: a dispatch or function mode, or a transform of torch.func?"""
    if _believed is not None:
        return _believed
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    )


def implementation(name: str) -> Callable:
    """What runs behind `prismer::<name>` on every device, for those who count the operators inside."""
    return _implementations[name]


def register_backward(name: str, setup_context: Callable, backward: Callable) -> None:
    """Give the op `name` its gradient, as `torch.library.register_autograd` does."""
    torch.library.register_autograd(f"prismer::{name}", backward, setup_context=setup_context, lib=_library)
    run = implementation(name)

    def forward(ctx, *args):
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    _functions[name] = type(
        name, (torch.autograd.Function,), dict(forward=staticmethod(forward), backward=staticmethod(backward))
    )
