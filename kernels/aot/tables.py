"""The budget of each kernel, and the two tables of `python -m prismer.kernels.inspect`: code, and cost of a launch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prismer.kernels.aot.cases import KernelCase
from prismer.kernels.aot.compile import ARCHS, CompiledKernel


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the machine code of a kernel may use: the most that is tolerated, not what is aimed at.

    Attributes:
        registers: of one thread.
        stack: bytes of one thread.
        spills: instructions that move registers to or from local memory.
        occupancy: the share of a multiprocessor's warps that must be able to be resident.
        reason: why an exception is one.
    """

    registers: int
    stack: int = 0
    spills: int = 0
    occupancy: float = 1 / 16
    reason: str = ""


# the one table of budgets. Shared memory is held to the limit of the architecture. Tensor cores and 128-bit loads are
# required where a case says so, without exception
WITH_DOT = Budget(registers=255)
WITHOUT_DOT = Budget(registers=128, occupancy=1 / 4)
CUDA = Budget(registers=168)
# (pattern of "op kernel sm_ARCH", budget): the first that fits precedes the three above
EXCEPTIONS: tuple[tuple[str, Budget], ...] = (
    (r"gemm fp32 .*", Budget(registers=255, reason="products exact to fp32, which tensor cores do not make")),
)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Datasheet numbers of one GPU, dense.

    Attributes:
        tensor: FLOP/s of the tensor cores in bf16.
        vector: FLOP/s in fp32.
        memory: bytes/s.
    """

    tensor: float
    vector: float
    memory: float


PEAKS = {
    "A100": Peak(tensor=312e12, vector=19.5e12, memory=2.04e12),
    "H100": Peak(tensor=989e12, vector=67e12, memory=3.35e12),
    "B200": Peak(tensor=2250e12, vector=75e12, memory=8e12),
}


def budget(row: CompiledKernel) -> Budget:
    """What this kernel may use."""
    text = f"{row.op} {row.name} sm_{row.arch}"
    exception = (line for pattern, line in EXCEPTIONS if re.fullmatch(pattern, text))
    usual = CUDA if row.source == "cuda" else WITH_DOT if row.needs_dot else WITHOUT_DOT
    return next(exception, usual)


def check(rows: Iterable[CompiledKernel]) -> list[str]:
    """Every broken budget, as a sentence that names kernel, architecture, what was found and what is allowed."""
    broken = []
    for row in rows:
        allowed, where = budget(row), f"{row.op}: {row.name} on sm_{row.arch}"
        if row.error:
            broken.append(f"{where} does not compile: {row.error}")
            continue
        for what, used, most in (
            ("registers", row.registers, allowed.registers),
            ("bytes of stack", row.stack, allowed.stack),
            ("spill instructions", row.spills, allowed.spills),
            ("bytes of shared memory", row.shared, ARCHS[row.arch].shared),
        ):
            if used > most:
                broken.append(f"{where} uses {used} {what}; {most} are allowed")
        if row.occupancy is not None and row.occupancy < allowed.occupancy:
            broken.append(
                f"{where} keeps {row.occupancy:.1%} of the warps resident; at least {allowed.occupancy:.1%} is asked"
            )
        if row.needs_dot and not row.tensor_core:
            broken.append(f"{where} has no tensor-core instruction, and must")
        if row.needs_vector_loads and not row.vector_loads:
            broken.append(f"{where} reads no 128 bits at once, and must")
    return broken


def code_table(rows: Iterable[CompiledKernel]) -> str:
    """Markdown: what the compiler made of each kernel on each architecture."""
    lines = [
        "| op | kernel | arch | registers | stack | spills | shared memory (limit) | resident warps | tensor core "
        "| 128-bit loads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        arch = ARCHS[row.arch]
        op = row.op if row.source == "triton" else f"{row.op} (CUDA C++)"
        start = f"| {op} | {row.name} | sm_{row.arch} |"
        if row.error:
            lines.append(f"{start} does not compile | | | | | | |")
            continue
        resident = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        lines.append(
            f"{start} {row.registers} | {row.stack} | {row.spills} "
            f"| {row.shared / 1024:.1f} KiB ({arch.shared >> 10}) | {resident} "
            f"| {row.tensor_core or '-'} | {row.vector_loads or '-'} |"
        )
    return "\n".join(lines)


def bound(case: KernelCase, gpu: str) -> tuple[float, str]:
    """Seconds that the launch takes at least on `gpu`, from datasheet numbers, and what limits it."""
    peak = PEAKS[gpu]
    memory = case.bytes / peak.memory
    compute = case.flops / (peak.tensor if case.dot else peak.vector)
    return max(memory, compute), "memory" if memory >= compute else "compute"


def cost_table(found: Iterable[tuple[str, KernelCase]]) -> str:
    """Markdown: bytes, FLOPs and intensity of each launch, and its lower bound on each GPU of `PEAKS`."""
    lines = [
        "| op | kernel | shape | MB | GFLOP | FLOP/byte | " + " | ".join(f"{gpu}, at least us" for gpu in PEAKS) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(PEAKS),
    ]
    for op, case in found:
        times = []
        for gpu in PEAKS:
            seconds, limit = bound(case, gpu)
            times.append(f"{seconds * 1e6:.1f} ({limit})")
        intensity = case.flops / case.bytes if case.bytes else float("inf")
        lines.append(
            f"| {op} | {case.name} | {case.shape} | {case.bytes / 1e6:.2f} | {case.flops / 1e9:.3f} "
            f"| {intensity:.1f} | {' | '.join(times)} |"
        )
    return "\n".join(lines)
