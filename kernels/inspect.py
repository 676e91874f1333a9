"""Compile every kernel for GPUs that need not be there, hold the machine code to a budget, and predict its time.

    python -m prismer.kernels.inspect [--arch 80,90,100,120] [--op layer_norm,attention] [--json FILE] [--jobs 4]

This command prints two Markdown tables: what the compiler made of each kernel (registers, stack, shared memory,
tensor-core instructions, 128-bit loads), and what each launch moves and computes, with the time that no implementation
can beat. The exit status is 1 if a budget is broken. It needs neither GPU nor driver, and includes the CUDA C++ sources
where nvcc is. `aot/` holds the substance: the cases, the compilers, the budgets and the tables.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from prismer.kernels.aot.cases import all_cases, representatives
from prismer.kernels.aot.compile import ARCHS, compile_cases, compile_cuda, refuse_interpreter
from prismer.kernels.aot.tables import PEAKS, bound, check, code_table, cost_table


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m prismer.kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="80,90,100,120", help="compute capabilities, by commas")
    parser.add_argument("--op", default="", help="ops, by commas; all of them if left out")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--jobs", type=int, default=1, help="kernels to compile at a time")
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
    """Compile, check and print; returns the exit status."""
    options = _parsed(argv)
    try:
        refuse_interpreter()
        found = all_cases(options.op)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.representative:
        found = representatives(found)
    rows = compile_cases(found, options.arch, options.jobs)
    if not options.no_cuda:
        rows += compile_cuda(options.arch, options.op)
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
            {"op": op, "name": case.name, "shape": case.shape, "bytes": case.bytes, "flops": case.flops}
            | {f"{gpu}_seconds": bound(case, gpu)[0] for gpu in PEAKS}
            for op, case in found
        ]
        options.json.write_text(json.dumps({"rows": table, "costs": costs, "broken": broken}, indent=1))
    print(f"\n{len(rows)} kernels, {len(broken)} broken budgets", file=sys.stderr)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
