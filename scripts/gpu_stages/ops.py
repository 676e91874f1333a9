"""Every op on the device against float64: values, gradients, repeats, a side stream, capture and replay."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismer.kernels.dispatch import use_backend
from prismer.kernels.errors import MachineError
from scripts.gpu_stages.calls import BASE, CALLS, LARGE, OpCalls, Shape, Upstream, cast, draw, run
from scripts.gpu_stages.device import captured, side_stream, wait_for
from scripts.gpu_stages.processes import die_with_parent, in_processes

if TYPE_CHECKING:
    from scripts.gpu_check import Context

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# ours give the same bits at every run; the gradients of other libraries need not
_OURS = ("native", "triton")


def check(context: "Context") -> Iterator[dict]:
    """Check every op in each dtype, each pair in a process of its own: an illegal address spoils its process alone."""
    tasks = {
        f"{name} {dtype}": lambda name=name, dtype=dtype: check_op(name, dtype, context)
        for dtype in (("fp32",) if context.quick else DTYPES)
        for name in CALLS
    }
    for task, kind, value in in_processes(tasks, context.workers, 0.95 * context.seconds):
        if kind == "record":
            yield value
        elif kind != "done":
            op, dtype = task.split()
            yield dict(kind="check", what="op", op=op, dtype=dtype, ok=False, error=value or "not finished in time")


def check_op(name: str, dtype: str, context: "Context") -> Iterator[dict]:
    """Check one op in one dtype: all its backends, at the model's shapes and at edge shapes."""
    calls = CALLS[name]
    shapes = [calls.tiny] if context.quick else [*calls.edges, calls.real(BASE, 2), calls.real(LARGE, 1)]
    for shape in shapes:
        for backend in backends_of(calls, context.device):
            for trained in (False, True) if calls.trained else (False,):
                described = dict(kind="check", what="op", op=name, dtype=dtype, shape=shape, backend=backend)
                described["pass"] = "gradient" if trained else "forward"
                try:
                    found = _compare(calls, shape, DTYPES[dtype], backend, trained, context)
                except MachineError as error:
                    found = dict(refused=str(error))
                # a wrong kernel must not hide the next one, unless it has spoilt the device
                except Exception as error:
                    if "CUDA error" in str(error):
                        raise
                    found = dict(ok=False, error=f"{type(error).__name__}: {error}"[:500])
                yield described | found


def backends_of(calls: OpCalls, device: str) -> list[str]:
    """The backends that may serve calls of an op on a device; Triton's interpreter stands in for the GPU's Triton."""
    return [b.name for b in calls.op.backends if calls.op._unusable(b, device) is None]


def _compare(calls: OpCalls, shape: Shape, dtype: torch.dtype, backend: str, trained: bool, context: "Context") -> dict:
    """Errors relative to those of plain PyTorch, and whether repeats, a side stream and a graph give the same."""
    device, dy = context.device, Upstream() if trained else None
    arguments = cast(draw(calls, shape, device), dtype, device, trained)

    def ours() -> dict[str, Tensor]:
        with use_backend(backend):
            return run(calls.ours, arguments, dy)

    first = ours()
    wait_for(device)
    plain = run(calls.plain, arguments, dy)
    high = cast(arguments, torch.float64, device, trained)
    with use_backend("reference"):
        exact = run(calls.ours, high, dy)
    worst, wrong = 0.0, []
    # the gradient of a key's bias is zero but for rounding: it counts as a hundredth of the largest gradient
    least = 1e-2 * max((_size(t) for key, t in exact.items() if key.startswith("d")), default=0.0)
    for key, value in first.items():
        times, floor = (3, least) if key.startswith("d") else (2, 0.0)
        share = _share(value, plain[key], exact[key], times, floor)
        worst = max(worst, share)
        if not share <= 1:
            wrong.append(f"{key} has {share:.2g} times the error allowed")
    del plain, exact, high
    again = ours()
    repeats = all(torch.equal(first[key], again[key]) for key in first)
    with side_stream(device):
        aside = ours()
    wait_for(device)
    if not repeats and backend in _OURS:
        wrong.append("a repeat gives other bits")
    if not _agree(first, aside):
        wrong.append("a side stream gives another result")
    replayed = _replays(ours, arguments, device)
    if replayed is not True:
        wrong.append(f"a replayed graph: {replayed}")
    return dict(ok=not wrong, wrong=wrong, error_share=round(worst, 3), repeats=repeats)


def _share(ours: Tensor, plain: Tensor, exact: Tensor, times: int, floor: float) -> float:
    """Our error as a share of what is allowed: `times` that of plain PyTorch, or a rounding of the largest number.

    Args:
        floor: the largest number counts as at least so large.
    """
    if ours.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    if not bool(torch.isfinite(ours).all()):
        return float("inf")
    rounding = torch.finfo(ours.dtype).eps * max(_size(exact), floor)
    error, torch_error = (_size(t.double() - exact) for t in (ours, plain))
    # torch's own error may be zero by luck
    return error / (times * max(torch_error, rounding) + 1e-300)


def _size(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _agree(results: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Equal up to the order of a sum, which other libraries' gradients may change from call to call."""
    least = 1e-2 * max(map(_size, results.values()), default=0.0)
    return all(
        t.shape == others[key].shape and _size(t.double() - others[key].double()) <= 1e-2 * max(_size(t), least)
        for key, t in results.items()
    )


def _replays(ours: Callable[[], dict[str, Tensor]], arguments: list, device: str) -> bool | str:
    """Does a graph that was captured on some inputs give the result of the inputs that it is replayed on?"""
    try:
        replay, result = captured(ours, device)
    except RuntimeError as error:
        return f"not captured: {str(error).splitlines()[0][:200]}"
    with torch.no_grad():
        for a in arguments:
            if isinstance(a, Tensor) and a.is_floating_point():
                a.mul_(-0.5)
    replay()
    wait_for(device)
    return True if _agree(ours(), result) else "another result than a call"


def run_small_calls(device: str) -> None:
    """Call every op of ours at an edge shape, forward and backward: what compute-sanitizer watches."""
    for name, calls in CALLS.items():
        for backend in backends_of(calls, device):
            if backend not in _OURS:
                continue
            shape = calls.tiny if device == "cpu" else calls.edges[-1]
            arguments = cast(draw(calls, shape, device), torch.float32, device, calls.trained)
            try:
                with use_backend(backend):
                    run(calls.ours, arguments, Upstream() if calls.trained else None)
            except MachineError as error:
                print(f"{name} {backend}: {error}")
                continue
            wait_for(device)
            print(f"{name} {backend} {shape}", flush=True)


def sanitize(context: "Context") -> Iterator[dict]:
    """Run `run_small_calls` under compute-sanitizer where it is installed; the stand-in runs it alone."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    tool = shutil.which("compute-sanitizer") or (str(home) if home.is_file() else None)
    if tool is None and context.device == "cuda":
        yield dict(kind="note", note="compute-sanitizer is not installed")
        return
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--small-calls", "--device", context.device]
    if context.device == "cuda":
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=die_with_parent)
    said = (done.stdout + done.stderr)[-4000:]
    yield dict(kind="check", what="compute-sanitizer", ok=done.returncode == 0, status=done.returncode, said=said)
