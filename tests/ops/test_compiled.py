"""Proves, without a GPU, that every Triton and CUDA kernel compiles to code within its budget, and that a kernel that
exceeds it is reported. The budget: no spills, shared memory that fits, 128-bit loads, and tensor-core instructions for
a dot.

Run: pytest tests/ops/test_compiled.py                         one case of every kernel, for sm_90
     PRISMER_COMPILE_ALL=1 pytest tests/ops/test_compiled.py   every case, for sm_80, sm_90, sm_100 and sm_120

Kernels that are decorated under TRITON_INTERPRET cannot be compiled, so the tests compile in a separate process.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl

from prismer.kernels import dispatch
from prismer.kernels.aot.cases import KernelCase, all_cases
from prismer.kernels.aot.compile import ARCHS, CompiledKernel, compile_case
from prismer.kernels.aot.tables import Budget, bound, check, cost_table

pytestmark = pytest.mark.cpu


@triton.jit
def dot_kernel(p_a, p_b, p_c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_c = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        b_a = tl.load(p_a + o_m[:, None] * K + (k + o_k)[None, :])
        b_b = tl.load(p_b + o_n[:, None] * K + (k + o_k)[None, :])
        b_c = tl.dot(b_a, b_b.T, b_c)
    tl.store(p_c + o_m[:, None] * BN + o_n[None, :], b_c.to(tl.bfloat16))


@triton.jit
def copy_kernel(p_x, p_y, stride, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o * stride) + 1)


@triton.jit
def wrong_kernel(p_x, B: tl.constexpr):
    tl.store(p_x + tl.arange(0, B), tl.arange(0, 2 * B))


def dot_case(name, BM=64, BN=64, BK=64, **options):
    return KernelCase(
        name=name,
        kernel=dot_kernel,
        signature=dict(p_a="*bf16", p_b="*bf16", p_c="*bf16", K="i32"),
        constants=dict(BM=BM, BN=BN, BK=BK),
        divisible=("K",),
        shape="none",
        flops=2 * BM * BN * BK,
        bytes=2 * (BM * BK + BN * BK + BM * BN),
        dot=True,
        **options,
    )


def copy_case(name, stride, **options):
    return KernelCase(
        name=name,
        kernel=copy_kernel,
        signature=dict(p_x="*bf16", p_y="*bf16") | ({} if stride == 1 else dict(stride="i32")),
        constants=dict(B=1024) | (dict(stride=1) if stride == 1 else {}),
        shape="none",
        flops=1,
        bytes=1,
        **options,
    )


CASES = all_cases()

PLANTED = {
    "dot": (dot_case, None),
    "copy": (lambda name: copy_case(name, 1), None),
    "spilling": (lambda name: dot_case(name, BN=128, BK=16, num_warps=1), "spill instructions; 0 are allowed"),
    "too much shared memory": (lambda name: dot_case(name, num_stages=16), "bytes of shared memory"),
    "no dot": (lambda name: copy_case(name, 1, dot=True), "has no tensor-core instruction"),
    "scalar loads": (lambda name: copy_case(name, 2), "reads no 128 bits at once"),
    "does not compile": (
        lambda name: KernelCase(
            name=name, kernel=wrong_kernel, signature=dict(p_x="*i32"), constants=dict(B=16), shape="", flops=0, bytes=0
        ),
        "does not compile",
    ),
}


def without_interpreter(*command):
    """Run Python without the interpreter of Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def inspect(*options):
    done = without_interpreter("-m", "prismer.kernels.inspect", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_representatives_keep_the_budget(tmp_path):
    table = inspect("--arch", "90", "--representative", "--jobs", "2", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows and all(f"| {row['name']} | sm_90 |" in table for row in rows)
    assert any(row["source"] == "cuda" for row in rows) or not shutil.which("nvcc")


def jit_functions(module):
    """The functions under @triton.jit of a module, as syntax."""
    functions = (
        node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.FunctionDef)
    )
    return [function for function in functions if any("triton.jit" in ast.unparse(d) for d in function.decorator_list)]


MODULES = dispatch.op_modules()
# a function that another one calls is no kernel
CALLED = {
    node.func.id
    for module in MODULES
    for function in jit_functions(module)
    for node in ast.walk(function)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_triton_kernel_has_a_case(module):
    """Nobody without a GPU would compile a kernel without a case."""
    name = module.__name__.removeprefix("prismer.kernels.").removesuffix(".triton_backend")
    kernels = {function.name for function in jit_functions(module)} - CALLED
    with_case = {case.kernel.__name__ for op, case in CASES if op == name}
    assert kernels <= with_case, f"{module.__file__} has no kernel_cases for {sorted(kernels - with_case)}"


def test_names_of_cases_are_unique_within_an_op():
    names = [(op, case.name) for op, case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.skipif("PRISMER_COMPILE_ALL" not in os.environ, reason="takes minutes: set PRISMER_COMPILE_ALL=1")
@pytest.mark.parametrize("arch", ARCHS)
def test_every_case_keeps_the_budget(arch):
    inspect("--arch", str(arch))


@pytest.fixture(scope="module")
def violations():
    done = without_interpreter(__file__)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_problem_is_reported(violations, name):
    says = PLANTED[name][1]
    found = violations[name]
    assert (found == []) if says is None else any(says in sentence for sentence in found), found


def test_check_names_kernel_and_limits():
    row = CompiledKernel(
        op="attention", name="forward", arch=120, registers=255, stack=8, shared=100 << 10, warps=4, needs_dot=True
    )
    assert check([row]) == [
        "attention: forward on sm_120 uses 8 bytes of stack; 0 are allowed",
        "attention: forward on sm_120 uses 102400 bytes of shared memory; 101376 are allowed",
        "attention: forward on sm_120 keeps 0.0% of the warps resident; at least 6.2% is asked",
        "attention: forward on sm_120 has no tensor-core instruction, and must",
    ]


def test_an_exception_precedes_the_usual_budget(monkeypatch):
    row = CompiledKernel(
        op="attention", name="forward", arch=120, registers=255, stack=8, needs_dot=True, tensor_core="HMMA"
    )
    exception = ("attention forward sm_120", Budget(registers=255, stack=8, reason="one spilled address"))
    monkeypatch.setattr("prismer.kernels.aot.tables.EXCEPTIONS", (exception,))
    assert check([row]) == []


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"), [(32, 0, 4, 1), (255, 0, 4, 1 / 8), (64, 113 << 10, 4, 1 / 8)]
)
def test_occupancy_follows_from_registers_and_shared_memory(registers, shared, warps, resident):
    assert (
        CompiledKernel(op="", name="", arch=90, registers=registers, shared=shared, warps=warps).occupancy == resident
    )


def test_bound_is_the_larger_of_memory_and_compute():
    case = dot_case("square", BM=4096, BN=4096, BK=4096)
    assert bound(case, "H100") == (case.flops / 989e12, "compute")
    assert bound(copy_case("copy", 1), "A100") == (1 / 2.04e12, "memory")
    assert "| gemm | square | none | 100.66 | 137.439 | 1365.3 |" in cost_table([("gemm", case)])


def test_case_refuses_what_does_not_fit_the_kernel():
    with pytest.raises(ValueError, match=r"missing \['stride'\], unknown \['step'\]"):
        KernelCase(
            name="copy",
            kernel=copy_kernel,
            signature=dict(p_x="*bf16", p_y="*bf16", step="i32"),
            constants=dict(B=16),
            shape="",
            flops=0,
            bytes=0,
        )


@pytest.mark.parametrize(
    ("K", "constant", "divisible"), [(1, True, ()), (0, False, ("K",)), (24, False, ()), (48, False, ("K",))]
)
def test_a_case_is_specialised_as_a_launch_is(K, constant, divisible):
    tiles = dict(BM=1, BN=16, BK=16, num_warps=8)
    described = dict(shape="none", flops=0, bytes=0, dot=True)
    case = KernelCase.of_launch("dot", dot_kernel, ("*bf16", "*fp32", None, K), tiles, **described)
    assert case.signature == dict(p_a="*bf16", p_b="*fp32") | ({} if constant else dict(K="i32"))
    assert case.constants == dict(p_c=None, BM=1, BN=16, BK=16) | (dict(K=1) if constant else {})
    assert case.divisible == divisible
    assert (case.num_warps, case.num_stages, case.dot) == (8, 3, True)


def test_interpreted_kernels_and_unknown_ops_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "prismer.kernels.inspect"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
    done = without_interpreter("-m", "prismer.kernels.inspect", "--op", "kitchen")
    assert done.returncode == 2 and "no op with Triton kernels is called kitchen" in done.stderr


if __name__ == "__main__":
    # the process that `violations` starts: compile the planted kernels and print what is reported
    reports = {}
    for name, (make, _) in PLANTED.items():
        reports[name] = check([compile_case("planted", make(name), 90)])
    print(json.dumps(reports))
