"""Compile every kernel for GPUs that need not be there, hold the machine code to a budget, and predict its time.

    python -m prismer.kernels.inspect [--arch 80,90,100,120] [--op layer_norm,attention] [--json FILE] [--jobs 4]

prints two Markdown tables: what the compiler made of each kernel (registers, stack, shared memory, tensor-core
instructions, 128-bit loads), and what each launch moves and computes, with the time that no implementation can
beat. Exit status 1 if a budget is broken. Needs no GPU and no driver; CUDA C++ sources are included where nvcc is.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prismer.kernels.aot.cases import KernelCase

ROOMS = (
    "layer_norm",
    "activation",
    "gemm",
    "mlp",
    "adaptor",
    "attention",
    "resampler_attention",
    "cross_entropy",
    "label_map",
    "instance_rows",
    "decode_attention",
)
_HERE = Path(__file__).resolve().parent
_CSRC = _HERE.parent / "csrc"


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Limits of one streaming multiprocessor, from the CUDA programming guide."""

    gpus: str
    shared: int  # bytes that one block may have
    shared_total: int  # bytes of all blocks, each with 1 KiB that the driver takes
    warps: int
    blocks: int
    nvcc: str | None  # the architecture that the .cu files are built for


ARCHS = {
    80: Arch(gpus="A100", shared=163 << 10, shared_total=164 << 10, warps=64, blocks=32, nvcc="80"),
    90: Arch(gpus="H100", shared=227 << 10, shared_total=228 << 10, warps=64, blocks=32, nvcc="90a"),
    100: Arch(gpus="B200", shared=227 << 10, shared_total=228 << 10, warps=64, blocks=32, nvcc="100a"),
    120: Arch(gpus="RTX 50", shared=99 << 10, shared_total=100 << 10, warps=48, blocks=24, nvcc=None),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the machine code of a kernel may use. The most that is tolerated, not what is aimed at."""

    registers: int
    stack: int = 0  # bytes
    spills: int = 0  # instructions that move registers to or from local memory
    occupancy: float = 1 / 16  # share of a multiprocessor's warps that must be able to be resident
    reason: str = ""  # why an exception is one


# the one table of budgets. Shared memory is held to the limit of the architecture, and tensor cores and
# 128-bit loads are required where a case says so, without exception
WITH_DOT = Budget(registers=255)
WITHOUT_DOT = Budget(registers=128, occupancy=1 / 4)
CUDA = Budget(registers=168)
EXCEPTIONS: tuple[tuple[str, Budget], ...] = (
    (r"gemm fp32 .*", Budget(registers=255, reason="products exact to fp32, which tensor cores do not make")),
)
# (pattern of "room kernel sm_ARCH", budget): the first that fits comes before the three above


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel compiled for one architecture."""

    room: str
    name: str
    arch: int
    source: str = "triton"  # or "cuda"
    error: str = ""  # what the compiler said, if it made no code
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0  # of one block; 0 where the code does not fix it
    tensor_core: str = ""  # the instruction, such as HGMMA.64x64x16.F32.BF16, or nothing
    vector_loads: int = 0  # instructions that read 128 bits or more of global memory
    needs_dot: bool = False
    needs_vector_loads: bool = False

    @property
    def occupancy(self) -> float | None:
        """Share of a multiprocessor's warps that registers and shared memory let be resident."""
        if not self.warps or not self.registers:
            return None
        arch = ARCHS[self.arch]
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        blocks = min(
            arch.blocks, arch.warps // self.warps, 65536 // registers, arch.shared_total // (self.shared + 1024)
        )
        return blocks * self.warps / arch.warps


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Datasheet numbers of one GPU, dense."""

    tensor: float  # FLOP/s in bf16
    vector: float  # FLOP/s in fp32
    memory: float  # bytes/s


PEAKS = {
    "A100": Peak(tensor=312e12, vector=19.5e12, memory=2.04e12),
    "H100": Peak(tensor=989e12, vector=67e12, memory=3.35e12),
    "B200": Peak(tensor=2250e12, vector=75e12, memory=8e12),
}

_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|OMMA|UTC\w*MMA)(\.|$)")
_VECTOR_LOAD = re.compile(r"(LDG|LDGSTS)\.(.*\.)?(128|256)(\.|$)|UTMALDG|UBLKCP")
_SPILL = re.compile(r"(STL|LDL)(\.|$)")


def _instructions(sass: str) -> list[str]:
    """Names of the instructions of a disassembly, predicates dropped."""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout


def _of_code(instructions: list[str]) -> dict[str, Any]:
    """The part of a row that the disassembly tells."""
    dots = [name for name in instructions if _TENSOR_CORE.match(name)]
    return dict(
        tensor_core=max(set(dots), key=dots.count) if dots else "",
        vector_loads=sum(_VECTOR_LOAD.match(name) is not None for name in instructions),
        spills=sum(_SPILL.match(name) is not None for name in instructions),
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _refuse_interpreter() -> None:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")


def compile_case(room: str, case: KernelCase, arch: int) -> Row:
    """Compile one case for one architecture (80, 90, 100 or 120) and read the code it became.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set, or Triton's cuobjdump fails.
    """
    _refuse_interpreter()
    names = list(case.kernel.arg_names)
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*") or name in case.divisible]
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    row = dict(
        room=room,
        name=case.name,
        arch=arch,
        warps=case.num_warps,
        needs_dot=case.dot,
        needs_vector_loads=case.vector_loads,
    )
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # whatever the compiler raises belongs in the report, next to the kernels that compile
    except Exception as error:
        return Row(**row, error=f"{type(error).__name__}: {_last_line(str(error))}")
    cubin = compiled.asm["cubin"]
    usage = re.findall(r"(REG|STACK):(\d+)", _cuobjdump("--dump-resource-usage", cubin))
    usage = {name: int(value) for name, value in usage}
    row |= _of_code(_instructions(_cuobjdump("-sass", cubin)))
    return Row(**row, registers=usage["REG"], stack=usage["STACK"], shared=compiled.metadata.shared)


def cases(ops: Iterable[str] | None = None) -> list[tuple[str, KernelCase]]:
    """Every case of every room that has some, or of the rooms named.

    Raises:
        ValueError: if a room is named that does not exist.
    """
    unknown = set(ops or ()) - set(ROOMS)
    if unknown:
        raise ValueError(f"no room is called {', '.join(sorted(unknown))}; choose {', '.join(ROOMS)}")
    found = []
    for room in ROOMS:
        if (_HERE / f"{room}.py").exists() and (not ops or room in ops):
            module = importlib.import_module(f"prismer.kernels.{room}")
            found += [(room, case) for case in getattr(module, "kernel_cases", list)()]
    return found


def representatives(found: list[tuple[str, KernelCase]]) -> list[tuple[str, KernelCase]]:
    """The first case of every kernel."""
    first = {}
    for room, case in found:
        first.setdefault((room, case.kernel.__name__), (room, case))
    return list(first.values())


def compile_cases(found: list[tuple[str, KernelCase]], archs: Iterable[int], jobs: int) -> list[Row]:
    """`compile_case` of each pair in `found` on each architecture that its launcher serves, `jobs` at a time."""
    work = [(room, case, arch) for room, case in found for arch in archs if arch in case.archs]
    if jobs == 1:
        return [compile_case(*item) for item in work]
    # kernels cannot be pickled: a forked child already has them
    with multiprocessing.get_context("fork").Pool(jobs, _share, (work,)) as pool:
        return pool.map(_compile_shared, range(len(work)), chunksize=1)


_shared: list[tuple[str, KernelCase, int]] = []


def _share(work: list[tuple[str, KernelCase, int]]) -> None:
    _shared[:] = work


def _compile_shared(index: int) -> Row:
    return compile_case(*_shared[index])


def _compile_cuda(path: Path, arch: int) -> list[Row]:
    """Compile one .cu file and read what ptxas and the disassembly say of each kernel in it."""
    torch = Path(importlib.util.find_spec("torch").origin).parent / "include"
    includes = [_CSRC, torch, torch / "torch" / "csrc" / "api" / "include"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-cubin", "-Xptxas", "-v", "-std=c++20", f"-arch=sm_{ARCHS[arch].nvcc}"]
        command += ["-DTORCH_TARGET_VERSION=0x020A000000000000", "-DUSE_CUDA"]
        command += [f"-I{include}" for include in includes] + [str(path), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            error = errors[0] if errors else _last_line(done.stderr)
            return [Row(room=path.stem, name=path.name, arch=arch, source="cuda", error=error)]
        sass = _cuobjdump("-sass", cubin.read_bytes())
    code = dict(re.findall(r"^\s*Function : (\S+)\n(.*?)(?=^\s*Function : |\Z)", sass, re.DOTALL | re.MULTILINE))
    rows = []
    for report in done.stderr.split("Compiling entry function ")[1:]:
        symbol = report.split("'")[1]
        number = {
            what: int((re.search(rf"(\d+) {what}", report) or [0, 0])[1])
            for what in ("registers", "bytes stack frame", "bytes smem")
        }
        rows.append(
            Row(
                room=path.stem,
                name=_demangled(symbol),
                arch=arch,
                source="cuda",
                registers=number["registers"],
                stack=number["bytes stack frame"],
                shared=number["bytes smem"],
                **_of_code(_instructions(code[symbol])),
            )
        )
    return rows


@functools.cache
def _demangled(symbol: str) -> str:
    """The kernel's name with its template arguments; the symbol itself where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", "-p", symbol], capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |\(anonymous namespace\)::|prismer::|_INTERNAL\w+::", "", name)


def cuda_cases(archs: Iterable[int], ops: Iterable[str] | None = None) -> list[Row]:
    """Every kernel of csrc/cuda, built by nvcc for 80, 90a and 100a; none where nvcc or the sources are missing."""
    if shutil.which("nvcc") is None:
        return []
    rows = []
    for path in sorted((_CSRC / "cuda").glob("*.cu")):
        if not ops or path.stem in ops:
            for arch in archs:
                rows += _compile_cuda(path, arch) if ARCHS[arch].nvcc else []
    return rows


def budget(row: Row) -> Budget:
    """What this kernel may use."""
    text = f"{row.room} {row.name} sm_{row.arch}"
    exception = (line for pattern, line in EXCEPTIONS if re.fullmatch(pattern, text))
    usual = CUDA if row.source == "cuda" else WITH_DOT if row.needs_dot else WITHOUT_DOT
    return next(exception, usual)


def check(rows: Iterable[Row]) -> list[str]:
    """Every broken budget, as a sentence that names kernel, architecture, what was found and what is allowed."""
    broken = []
    for row in rows:
        allowed, where = budget(row), f"{row.room}: {row.name} on sm_{row.arch}"
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


def code_table(rows: Iterable[Row]) -> str:
    """Markdown: what the compiler made of each kernel on each architecture."""
    lines = [
        "| room | kernel | arch | registers | stack | spills | shared memory (limit) | resident warps | tensor core "
        "| 128-bit loads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        arch = ARCHS[row.arch]
        room = row.room if row.source == "triton" else f"{row.room} (CUDA C++)"
        start = f"| {room} | {row.name} | sm_{row.arch} |"
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
        "| room | kernel | shape | MB | GFLOP | FLOP/byte | "
        + " | ".join(f"{gpu}, at least us" for gpu in PEAKS)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * len(PEAKS),
    ]
    for room, case in found:
        times = []
        for gpu in PEAKS:
            seconds, limit = bound(case, gpu)
            times.append(f"{seconds * 1e6:.1f} ({limit})")
        intensity = case.flops / case.bytes if case.bytes else float("inf")
        lines.append(
            f"| {room} | {case.name} | {case.shape} | {case.bytes / 1e6:.2f} | {case.flops / 1e9:.3f} "
            f"| {intensity:.1f} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m prismer.kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="80,90,100,120", help="compute capabilities, by commas")
    parser.add_argument("--op", default="", help="rooms, by commas; all of them if left out")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--jobs", type=int, default=1, help="compile so many kernels at a time")
    parser.add_argument("--representative", action="store_true", help="only the first case of each kernel")
    parser.add_argument("--no-cuda", action="store_true", help="leave csrc/cuda out")
    options = parser.parse_args(argv)
    options.arch = [int(arch) for arch in options.arch.split(",")]
    options.op = [op for op in options.op.split(",") if op]
    unknown = [arch for arch in options.arch if arch not in ARCHS]
    if unknown:
        parser.error(f"no limits are known of {unknown}; choose from {', '.join(map(str, ARCHS))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = _parsed(argv)
    try:
        _refuse_interpreter()
        found = cases(options.op)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.representative:
        found = representatives(found)
    rows = compile_cases(found, options.arch, options.jobs)
    if not options.no_cuda:
        rows += cuda_cases(options.arch, options.op)
    broken = check(rows)
    print("## Compiled code\n")
    print(f"Triton {triton.__version__}, without a GPU. Shared memory and resident warps are those of one block and of")
    print("one multiprocessor; for CUDA C++ kernels shared memory is the static part.\n")
    print(code_table(rows))
    print("\n## Cost of a launch\n")
    print("Compulsory traffic and arithmetic at the shape named, and the time that no implementation can beat: a lower")
    print("bound computed from datasheet numbers (dense bf16, memory bandwidth), **not measured**.\n")
    print(
        "; ".join(f"{gpu}: {peak.tensor / 1e12:g} TFLOP/s, {peak.memory / 1e12:g} TB/s" for gpu, peak in PEAKS.items())
        + ".\n"
    )
    print(cost_table(found))
    if options.json:
        table = [asdict(row) | {"occupancy": row.occupancy} for row in rows]
        costs = [
            {"room": room, "name": case.name, "shape": case.shape, "bytes": case.bytes, "flops": case.flops}
            | {f"{gpu}_seconds": bound(case, gpu)[0] for gpu in PEAKS}
            for room, case in found
        ]
        options.json.write_text(json.dumps({"rows": table, "costs": costs, "broken": broken}, indent=1))
    print(f"\n{len(rows)} kernels, {len(broken)} broken budgets", file=sys.stderr)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
