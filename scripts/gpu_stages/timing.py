"""Time every backend at the shapes of the model, and block shapes of products and attention."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING
from unittest import mock

import torch

from benchmarks.shapes import MODELS
from prismer.kernels import attention, gemm
from prismer.kernels.attention import triton_backend
from prismer.kernels.dispatch import use_backend
from prismer.kernels.errors import MachineError
from scripts.gpu_stages.calls import BASE, CALLS, LARGE, Shape, Upstream, cast, draw, run
from scripts.gpu_stages.device import measure, wait_for
from scripts.gpu_stages.ops import DTYPES, backends_of
from scripts.gpu_stages.processes import in_processes

if TYPE_CHECKING:
    from scripts.gpu_check import Context

BATCHES = (1, 4, 8, 32)
PLAIN = "plain"


def _shapes(name: str, quick: bool) -> list[Shape]:
    """The model's shapes: those of 480 px at every batch, those of 224 px (pre-training) at the larger batches."""
    calls = CALLS[name]
    if quick:
        return [calls.tiny]
    pairs = [(model, batch) for batch in BATCHES for model in (BASE, LARGE)]
    pairs += [(model, batch) for batch in BATCHES[2:] for model in (MODELS[0], MODELS[2])]
    return list({tuple(shape.items()): shape for shape in (calls.real(*pair) for pair in pairs)}.values())


def compare_backends(context: "Context") -> Iterator[dict]:
    """Each backend of each op, and plain PyTorch, in bf16 and then in fp32; what no time is left for is listed.

    All cores run every call once before anything is timed, so that no time holds a compilation.
    """
    end = time.monotonic() + 0.95 * context.seconds
    warm = {name: lambda name=name: _warm_up(name, context) for name in CALLS}
    for name, kind, value in in_processes(warm, context.workers, 0.4 * context.seconds):
        if kind in ("failed", "overran"):
            yield dict(kind="note", note=f"warming up {name}: {kind}", traceback=value)
    left_out = 0
    for dtype in ("fp32",) if context.quick else ("bf16", "fp32"):
        for name in CALLS:
            for shape in _shapes(name, context.quick):
                if time.monotonic() > end:
                    left_out += 1
                    continue
                yield from _time_op(name, shape, dtype, context)
    if left_out:
        yield dict(kind="note", note=f"{left_out} shapes were not timed: the budget was spent")


def _calls(name: str, shape: Shape, dtype: str, context: "Context") -> Iterator[tuple[str, str, Callable]]:
    """Pass, backend and the call, of each backend and of plain PyTorch."""
    calls = CALLS[name]
    drawn = draw(calls, shape, context.device)
    for trained in (False, True) if calls.trained else (False,):
        arguments = cast(drawn, DTYPES[dtype], context.device, trained)
        dy = Upstream() if trained else None
        for backend in (*backends_of(calls, context.device), PLAIN):

            def call(backend: str = backend, arguments: list = arguments, dy: Upstream | None = dy) -> object:
                if backend == PLAIN:
                    return run(calls.plain, arguments, dy)
                with use_backend(backend):
                    return run(calls.ours, arguments, dy)

            yield "gradient" if trained else "forward", backend, call


def _warm_up(name: str, context: "Context") -> Iterator[dict]:
    for shape in _shapes(name, context.quick):
        for _, backend, call in _calls(name, shape, "fp32" if context.quick else "bf16", context):
            # the interpreter compiles nothing
            if backend == "triton" and context.device == "cuda":
                try:
                    call()
                except MachineError:
                    continue
    wait_for(context.device)
    yield from ()


def _time_op(name: str, shape: Shape, dtype: str, context: "Context") -> Iterator[dict]:
    for part, backend, call in _calls(name, shape, dtype, context):
        described = dict(kind="time", op=name, dtype=dtype, shape=shape, backend=backend) | {"pass": part}
        try:
            yield described | measure(call, context.device, context.quick)
        except (MachineError, torch.OutOfMemoryError) as error:
            yield described | dict(kind="refused", reason=str(error).splitlines()[0][:200])


# block shapes

_GEMM_TILES = [
    dict(BM=BM, BN=BN, BK=64, num_warps=warps, num_stages=stages)
    for BM, BN, warps in ((64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8), (128, 128, 8), (128, 256, 8))
    for stages in (3, 4)
]
_ATTENTION_TILES = [
    dict(BM=BM, BN=BN, num_warps=warps, num_stages=stages)
    for BM, BN, warps in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 32, 4))
    for stages in (2, 3)
]


@contextmanager
def _fixed(op: str, tiles: dict | None) -> Iterator[None]:
    """Let the launches of an op take these tiles; None leaves the choice as it is."""
    if tiles is None:
        yield
        return
    where, name = (gemm, "_tiles") if op == "gemm" else (triton_backend, "tiles")
    with mock.patch.object(where, name, lambda *_, **__: dict(tiles)):
        _forget(where)
        yield
    _forget(where)


def _forget(module: ModuleType) -> None:
    """Clear the caches of a module: they hold tiles."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _tile_cases(context: "Context") -> dict[str, tuple[str, Shape, Callable[[], object]]]:
    """The calls whose tiles are swept: name -> op, shape and a forward call on Triton."""
    device, dtype = context.device, torch.float32 if context.quick else torch.bfloat16
    found: dict[str, tuple[str, Shape, Callable[[], object]]] = {}
    for model, batch in [(BASE, 1)] if context.quick else itertools.product((BASE, LARGE), (1, 8)):
        R, D = (17, 32) if context.quick else (batch * model.tokens, model.width)
        for N, K in ((4 * D, D), (D, 4 * D), (D, D)):
            a, b = torch.randn(R, K, device=device).to(dtype), torch.randn(N, K, device=device).to(dtype)

            def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> object:
                return gemm.gemm(a, b, None, backend="triton")

            found[f"gemm {R} {N} {K}"] = "gemm", dict(R=R, N=N, D=K), multiply
        L = 17 if context.quick else model.tokens
        shape = dict(B=batch, H=2 if context.quick else model.heads, N=L, L=L, K=32 if context.quick else 64)
        q, k, v, *_ = cast(draw(CALLS["attention"], shape, device), dtype, device, False)

        def attend(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> object:
            with torch.no_grad():
                return attention.attention(q, k, v, backend="triton")

        found[f"attention {shape}"] = "attention", shape, attend
    return found


def sweep_tiles(context: "Context") -> Iterator[dict]:
    """Time the forward kernels of products and attention with each block shape, and with the one that is chosen now."""
    end = time.monotonic() + 0.9 * context.seconds
    candidates = dict(gemm=_GEMM_TILES, attention=_ATTENTION_TILES)
    if context.quick:
        small = dict(BM=16, BN=32, num_warps=4, num_stages=2)
        candidates = dict(gemm=[small | dict(BK=32)], attention=[small])
    elif context.device == "cuda":
        tasks = {
            f"{op} {i}": lambda op=op, tiles=tiles: _warm_tiles(op, tiles, context)
            for op, listed in candidates.items()
            for i, tiles in enumerate(listed)
        }
        for _ in in_processes(tasks, context.workers, 0.5 * context.seconds):
            pass
    left_out = 0
    for op, shape, call in _tile_cases(context).values():
        for tiles in (None, *candidates[op]):
            if time.monotonic() > end:
                left_out += 1
                continue
            described = dict(kind="tiles", op=op, shape=shape, tiles=tiles, dtype="fp32" if context.quick else "bf16")
            try:
                with _fixed(op, tiles):
                    yield described | measure(call, context.device, context.quick)
            # too much shared memory, or a compiler that gives up
            except Exception as error:
                yield described | dict(refused=f"{type(error).__name__}: {error}"[:200])
    if left_out:
        yield dict(kind="note", note=f"{left_out} block shapes were not timed: the budget was spent")


def _warm_tiles(op: str, tiles: dict, context: "Context") -> Iterator[dict]:
    for name, _, call in _tile_cases(context).values():
        if name == op:
            with _fixed(op, tiles):
                call()
    wait_for(context.device)
    yield from ()
