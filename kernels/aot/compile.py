"""Compile kernels for GPUs that need not be there, and read the machine code that they become.

Triton kernels are compiled from a `KernelCase`; CUDA C++ sources are compiled by nvcc where there is one.
"""

import functools
import importlib.util
import multiprocessing
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prismer.kernels.aot.cases import KernelCase

_CSRC = Path(__file__).resolve().parents[2] / "csrc"


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Limits of one streaming multiprocessor, from the CUDA programming guide.

    Attributes:
        gpus: a GPU that has it.
        shared: bytes of shared memory that one block may have.
        shared_total: bytes of shared memory of all blocks, with the 1 KiB that the driver takes for each.
        warps, blocks: the most that can be resident.
        nvcc: the architecture that the .cu files are built for, or None if they are not.
    """

    gpus: str
    shared: int
    shared_total: int
    warps: int
    blocks: int
    nvcc: str | None


ARCHS = {
    80: Arch(gpus="A100", shared=163 << 10, shared_total=164 << 10, warps=64, blocks=32, nvcc="80"),
    90: Arch(gpus="H100", shared=227 << 10, shared_total=228 << 10, warps=64, blocks=32, nvcc="90a"),
    100: Arch(gpus="B200", shared=227 << 10, shared_total=228 << 10, warps=64, blocks=32, nvcc="100a"),
    120: Arch(gpus="RTX 50", shared=99 << 10, shared_total=100 << 10, warps=48, blocks=24, nvcc=None),
}


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One kernel compiled for one architecture, or the error of the compiler.

    Attributes:
        op: the op whose file has the kernel.
        name: of the case, or of the function of a CUDA C++ kernel.
        arch: compute capability, a key of `ARCHS`.
        source: "triton" or "cuda".
        error: what the compiler said, if it made no code.
        registers: of one thread.
        stack: bytes of one thread.
        spills: instructions that move registers to or from local memory.
        shared: bytes of shared memory of one block.
        warps: of one block; 0 where the code does not fix them.
        tensor_core: the most frequent tensor-core instruction, such as HGMMA.64x64x16.F32.BF16, or "".
        vector_loads: number of instructions that read 128 bits or more of global memory.
        needs_dot: the code must have a tensor-core instruction.
        needs_vector_loads: the code must have a vector load.
    """

    op: str
    name: str
    arch: int
    source: str = "triton"
    error: str = ""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0
    tensor_core: str = ""
    vector_loads: int = 0
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
    """The fields of a `CompiledKernel` that the disassembly tells."""
    dots = [name for name in instructions if _TENSOR_CORE.match(name)]
    return dict(
        tensor_core=max(set(dots), key=dots.count) if dots else "",
        vector_loads=sum(_VECTOR_LOAD.match(name) is not None for name in instructions),
        spills=sum(_SPILL.match(name) is not None for name in instructions),
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def refuse_interpreter() -> None:
    """Raise RuntimeError if Triton interprets: its kernels cannot be compiled then."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")


def compile_case(op: str, case: KernelCase, arch: int) -> CompiledKernel:
    """Compile one case for one architecture (80, 90, 100 or 120) and read the code it became.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set, or Triton's cuobjdump fails.
    """
    refuse_interpreter()
    names = list(case.kernel.arg_names)
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*") or name in case.divisible]
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    described = dict(
        op=op, name=case.name, arch=arch, warps=case.num_warps, needs_dot=case.dot, needs_vector_loads=case.vector_loads
    )
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # whatever the compiler raises belongs in the report, next to the kernels that compile
    except Exception as error:
        return CompiledKernel(**described, error=f"{type(error).__name__}: {_last_line(str(error))}")
    cubin = compiled.asm["cubin"]
    usage = re.findall(r"(REG|STACK):(\d+)", _cuobjdump("--dump-resource-usage", cubin))
    usage = {name: int(value) for name, value in usage}
    described |= _of_code(_instructions(_cuobjdump("-sass", cubin)))
    return CompiledKernel(**described, registers=usage["REG"], stack=usage["STACK"], shared=compiled.metadata.shared)


def compile_cases(found: list[tuple[str, KernelCase]], archs: Iterable[int], jobs: int) -> list[CompiledKernel]:
    """`compile_case` of each pair in `found` on each architecture, `jobs` at a time."""
    work = [(op, case, arch) for op, case in found for arch in archs]
    if jobs == 1:
        return [compile_case(*item) for item in work]
    # kernels cannot be pickled: a forked child already has them
    with multiprocessing.get_context("fork").Pool(jobs, _share, (work,)) as pool:
        return pool.map(_compile_shared, range(len(work)), chunksize=1)


_shared: list[tuple[str, KernelCase, int]] = []


def _share(work: list[tuple[str, KernelCase, int]]) -> None:
    _shared[:] = work


def _compile_shared(index: int) -> CompiledKernel:
    return compile_case(*_shared[index])


def _compile_cuda_file(path: Path, arch: int) -> list[CompiledKernel]:
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
            return [CompiledKernel(op=path.stem, name=path.name, arch=arch, source="cuda", error=error)]
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
            CompiledKernel(
                op=path.stem,
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


def compile_cuda(archs: Iterable[int], ops: Iterable[str] = ()) -> list[CompiledKernel]:
    """Every kernel of csrc/cuda, built by nvcc for 80, 90a and 100a; none where nvcc or the sources are missing."""
    if shutil.which("nvcc") is None:
        return []
    rows = []
    for path in sorted((_CSRC / "cuda").glob("*.cu")):
        if not ops or path.stem in ops:
            for arch in archs:
                rows += _compile_cuda_file(path, arch) if ARCHS[arch].nvcc else []
    return rows
