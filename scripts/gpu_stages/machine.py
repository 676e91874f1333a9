"""The machine: versions, ceilings of copies and products, and everything compiled."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scripts.gpu_stages.device import measure
from scripts.gpu_stages.processes import die_with_parent

if TYPE_CHECKING:
    from scripts.gpu_check import Context

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = "torch triton numpy flash-attn xformers liger-kernel nvidia-cudnn-cu13 nvidia-cudnn-cu12".split()


def describe(context: "Context") -> Iterator[dict]:
    """Name, memory and versions; then bytes/s of a copy and FLOP/s of a product in each dtype."""
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = dict(name="cpu", cores=len(os.sched_getaffinity(0)))
    if context.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        machine |= dict(
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            memory=found.total_memory,
            multiprocessors=found.multi_processor_count,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            driver=_first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        )
    yield dict(kind="machine", **machine, versions=versions)

    count = 2**16 if context.quick else 2**30
    a, b = (torch.empty(count, dtype=torch.uint8, device=context.device) for _ in range(2))
    timed = measure(lambda: b.copy_(a), context.device, context.quick)
    yield dict(kind="ceiling", what="copy", bytes=2 * count, per_second=2e6 * count / timed["device_us"], **timed)
    del a, b
    side = 64 if context.quick else 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        size = min(side, 4096) if name == "fp32" else side
        a, b = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            timed = measure(lambda a=a, b=b: torch.mm(a, b), context.device, context.quick)
        finally:
            torch.set_float32_matmul_precision(before)
        flops = 2 * size**3
        yield dict(kind="ceiling", what=f"mm {name}", flops=flops, per_second=1e6 * flops / timed["device_us"], **timed)


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    return (subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines() or [None])[0]


def compile_all(context: "Context") -> Iterator[dict]:
    """Compile every case of every Triton kernel for this GPU, and build both native extensions meanwhile."""
    build, start = _start_build(context), time.monotonic()
    capability = "".join(map(str, torch.cuda.get_device_capability())) if context.device == "cuda" else "90"
    # architectures without a table of limits (sm_86, sm_89) compile for the next lower one
    known = [arch for arch in ("80", "90", "100", "120") if int(arch) <= int(capability)]
    rows = context.folder / "compiled.json"
    command = [sys.executable, "-m", "prismer.kernels.inspect", "--arch", known[-1] if known else "80"]
    command += ["--jobs", str(len(os.sched_getaffinity(0))), "--no-cuda", "--json", str(rows)]
    if context.quick:
        command += ["--representative", "--op", "activation"]
    # an interpreted kernel cannot be compiled
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=die_with_parent
    )
    if not rows.is_file():
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    found = json.loads(rows.read_text())
    failed = [row for row in found["rows"] if row["error"]]
    yield dict(
        kind="check",
        what="Triton kernels compile",
        ok=not failed,
        count=len(found["rows"]),
        seconds=round(time.monotonic() - start, 1),
        failed=[f"{row['op']} {row['name']}: {row['error']}" for row in failed],
        broken_budgets=found["broken"],
    )
    output, _ = build.communicate()
    seconds = round(time.monotonic() - start, 1)
    built = sorted(path.name for path in (ROOT / "prismer").glob("_C*.so"))
    ok = build.returncode == 0 and (context.device == "cpu" or any("_C_cuda" in name for name in built))
    yield dict(kind="check", what="native extensions build", ok=ok, seconds=seconds, built=built, said=output[-2000:])


def _start_build(context: "Context") -> subprocess.Popen:
    if context.device == "cpu":
        command = [sys.executable, "-c", "print('stands in for the build of the extensions')"]
    else:
        folder = (context.folder / "build").resolve()
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )
