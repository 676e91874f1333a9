"""Which implementation of an op runs: the one place that decides between native, torch, reference.

`native` is the C++ extension `prismer._C`, `torch` is composed of PyTorch operators without
needless memory, `reference` is the definition that the tests compare with. The fastest usable one
is taken unless the environment variable PRISMER_BACKEND or `use_backend` asks for another.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_OPS = {
    "label_map": {"native": ("cpu",), "torch": None, "reference": None},
    "cross_entropy": {"torch": None, "reference": None},
}
# op -> backend, fastest first -> device types that it serves; None is every device

_BUILD = "run pip install --no-build-isolation --no-deps -e ."
_BACKENDS = ("native", "torch", "reference")
_asked: ContextVar[str | None] = ContextVar("prismer_backend", default=None)


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One line of `backends()`: may `backend` serve `op` on this machine, and if not, why."""

    op: str
    backend: str
    usable: bool
    reason: str


@functools.cache
def native_missing() -> str | None:
    """Load `prismer._C` once; None if its ops are there, else the reason why they are not."""
    if importlib.util.find_spec("prismer._C") is None:
        return f"prismer._C was not built; with a C++ compiler present, {_BUILD}"
    try:
        importlib.import_module("prismer._C")
    except ImportError as error:
        reason = f"prismer._C does not load ({error}); {_BUILD}"
        warnings.warn(f"{reason}; until then torch operators run instead", stacklevel=2)
        return reason
    return None


def _why_not(op: str, backend: str, device_type: str) -> str | None:
    """None if `backend` can serve `op` on this kind of device, else the reason."""
    served = _OPS[op][backend]
    if served is not None and device_type not in served:
        return f"{backend} {op} serves {', '.join(served)} tensors, not {device_type}"
    return native_missing() if backend == "native" else None


def _checked(backend: str, source: str) -> str:
    if backend not in _BACKENDS:
        raise ValueError(
            f"{source} is {backend!r}; choose {', '.join(_BACKENDS)}, or leave it unset"
        )
    return backend


def backend_for(op: str, device: torch.device) -> str:
    """The implementation that `op` uses for tensors on `device`.

    An op that never comes in the backend asked for ignores the request (there is no native loss);
    one that does, but cannot run here, refuses.

    Raises:
        ValueError: if PRISMER_BACKEND names no backend.
        RuntimeError: if the backend asked for exists and cannot run on this machine or device.
    """
    asked = _asked.get()
    if asked is None and os.environ.get("PRISMER_BACKEND"):
        asked = _checked(os.environ["PRISMER_BACKEND"], "PRISMER_BACKEND")
    if asked in _OPS[op]:
        reason = _why_not(op, asked, device.type)
        if reason is not None:
            raise RuntimeError(f"backend {asked} was asked for, but {reason}")
        return asked
    return next(backend for backend in _OPS[op] if _why_not(op, backend, device.type) is None)


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Ask for one backend inside the block, before PRISMER_BACKEND; None asks for the default."""
    token = _asked.set(None if backend is None else _checked(backend, "backend"))
    try:
        yield
    finally:
        _asked.reset(token)


def backends() -> list[BackendRow]:
    """Every op with its implementations, and which of them can run on this machine."""
    rows = []
    for op, served_by in _OPS.items():
        for backend, served in served_by.items():
            reason = _why_not(op, backend, served[0] if served else "cpu")
            rows.append(
                BackendRow(op=op, backend=backend, usable=reason is None, reason=reason or "")
            )
    return rows
