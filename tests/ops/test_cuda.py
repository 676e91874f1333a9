"""Proves the CUDA kernels of csrc/cuda without a GPU.

nvcc compiles each source for its GPUs, without spills or stack and with 128-bit loads. A plain compiler also builds the
same source on tests/ops/simt.h, which simulates the GPU, with the address and undefined-behaviour sanitisers. The tests
run this build, with threads taking turns in several orders, and compare it with float64. The bugs planted at the end
show that these tests can fail.

Run: pytest tests/ops/test_cuda.py
     PRISMER_COMPILE_ALL=1 pytest tests/ops/test_cuda.py   all three GPUs, and the extension itself
"""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels.decode_attention import decode_attention_reference
from prismer.kernels.label_map import label_map_reference

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
NAMES = ("layer_norm", "label_map", "decode_attention")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the most registers that a kernel of each source may use, on any of the three GPUs
REGISTERS = {"layer_norm": 80, "label_map": 128, "decode_attention": 144}
FORWARD, REVERSE, RANDOM = range(3)
everything = pytest.mark.skipif(
    "PRISMER_COMPILE_ALL" not in os.environ, reason="takes a minute: set PRISMER_COMPILE_ALL=1"
)


def readable(value):
    if isinstance(value, torch.dtype):
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[value]
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parametrize(names, values):
    return pytest.mark.parametrize(names, values, ids=readable)


# ---- compiled for the GPU


@pytest.mark.parametrize(
    "arch", [pytest.param("sm_80", marks=everything), "sm_90a", pytest.param("sm_100a", marks=everything)]
)
@parametrize("name", NAMES)
def test_compiles(name, arch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path / "kernel.cubin"
    command = ["nvcc", "-cubin", "-Xptxas", "-v", "-std=c++20", "-O3", f"-arch={arch}", "-o", cubin]
    result = subprocess.run(
        [*command, SOURCES / f"{name}.cu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "warning" not in result.stdout, result.stdout
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) bytes spill", result.stdout)
    registers = list(map(int, re.findall(r"Used (\d+) registers", result.stdout)))
    assert len(frames) == len(registers) > 0, result.stdout
    assert all(frame == ("0", "0", "0") for frame in frames), result.stdout
    assert max(registers) <= REGISTERS[name], result.stdout
    cuobjdump = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("no cuobjdump to look at the instructions")
    instructions = subprocess.run([cuobjdump, "-sass", cubin], stdout=subprocess.PIPE, text=True).stdout
    assert re.search(r"LDG\.E\.128", instructions) and re.search(r"STG\.E\.128|STS\.128", instructions)


LOAD = """
import importlib.util, sys, torch
import prismer._C
spec = importlib.util.spec_from_file_location("prismer._C_cuda", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
for op in ("layer_norm", "layer_norm_backward", "label_map", "label_map_backward", "decode_attention"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prismer_native::{op}", "CUDA"), op
"""


@everything
def test_extension(tmp_path):
    """PRISMER_CUDA=1 builds prismer._C_cuda without a GPU; it loads and registers its ops."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if torch.version.cuda is None or importlib.util.find_spec("prismer._C") is None:
        pytest.skip("torch is built without CUDA, or prismer._C is not built")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "prismer"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    # this test does not build the CPU extension
    shutil.rmtree(tmp_path / "csrc" / "cpu")
    for built in (tmp_path / "prismer").glob("*.so"):
        built.unlink()
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "PRISMER_CUDA": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    library = tmp_path / "prismer" / "_C_cuda.abi3.so"
    assert result.returncode == 0 and library.exists(), result.stdout
    subprocess.run([sys.executable, "-c", LOAD, library], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "asked, reason", [("0", "PRISMER_CUDA=0"), ("", "nvcc is not installed"), ("yes", "set it to 0 or 1")]
)
def test_one_line_says_why_the_extension_is_not_built(tmp_path, asked, reason):
    """The rest is built without it."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    # a stub of torch, because setup.py reads only its version; there is nothing to compile
    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    (torch_folder / "__init__.py").touch()
    (torch_folder / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    environment = {
        "PATH": str(tmp_path),
        "CUDA_HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "PRISMER_CUDA": asked,
    }
    printed = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    lines = [line for line in printed.splitlines() if "CUDA kernels not built" in line]
    assert len(lines) == 1 and reason in lines[0], printed


# ---- executed on the host


class Host:
    """One source, built for the host; each call of a launcher runs in its own process."""

    def __init__(self, program):
        self.program = program

    def run(self, op, integers, buffers, *, number=0.0, order=FORWARD, skipped_barrier=0):
        """Run the op and return the finished process; its stdout holds the number of launches and the buffers."""
        words = [op, order, skipped_barrier, len(integers), *integers]
        request = [struct.pack(f"<{len(words)}q", *words), struct.pack("<dq", number, len(buffers))]
        for buffer in buffers:
            if buffer is None:
                request.append(struct.pack("<q", -1))
                continue
            data = buffer.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            request += [struct.pack("<q", len(data)), data, bytes(-len(data) % 8)]
        # leaks do not matter: the process ends after the call
        environment = {"ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([self.program], input=b"".join(request), capture_output=True, env=environment)

    def __call__(self, op, integers, buffers, **settings):
        """Run the op, copy its results into the buffers, and return the number of launches."""
        result = self.run(op, integers, buffers, **settings)
        assert result.returncode == 0, result.stderr.decode()
        (launches,) = struct.unpack_from("<q", result.stdout)
        place = 8
        for buffer in buffers:
            (size,) = struct.unpack_from("<q", result.stdout, place)
            place += 8
            if size > 0:
                data = torch.frombuffer(bytearray(result.stdout[place : place + size]), dtype=torch.uint8)
                buffer.copy_(data.view(buffer.dtype).view(buffer.shape))
            place += max(size, 0) + -max(size, 0) % 8
        return launches

    def count(self, *integers):
        """The size of scratch memory, from the source's own function: op number 2."""
        answer = torch.zeros(1, dtype=torch.int64)
        self(2, integers, [answer])
        return answer.item()


def compile_for_host(name, folder, source=None):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = folder / name
    command = [
        *(compiler, "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-Werror"),
        *("-fno-strict-aliasing", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *("-I", ROOT / "tests" / "ops", "-I", SOURCES),
        *(f"-DHOST_{name.upper()}", f'-DSOURCE="{source or SOURCES / f"{name}.cu"}"'),
        *(ROOT / "tests" / "ops" / "cuda_host" / "driver.cpp", "-o", program),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return Host(program)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """A function that returns the host build of a source, and builds it at the first call."""
    folder = tmp_path_factory.mktemp("cuda_host")
    built = {}

    def host(name):
        if name not in built:
            built[name] = compile_for_host(name, folder)
        return built[name]

    return host


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def double(tensor):
    return None if tensor is None else tensor.double()


def layer_norm(host, x, residual, weight, bias, eps=1e-5, **settings):
    R, D = x.shape
    y, mean, rstd = nan(R, D, dtype=x.dtype), nan(R), nan(R)
    total = None if residual is None else nan(R, D, dtype=x.dtype)
    types = [DTYPES.index(t.dtype if t is not None else x.dtype) for t in (x, weight, bias)]
    buffers = [x, residual, weight, bias, y, total, mean, rstd]
    assert host(0, [*types, R, D], buffers, number=eps, **settings) == (1 if R else 0)
    return y, total, mean, rstd


def layer_norm_backward(host, dy, dtotal, x, weight, mean, rstd, affine, **settings):
    R, D = x.shape
    dx = nan(R, D, dtype=x.dtype)
    dweight, dbias, partial = (nan(D), nan(D), nan(host.count(R), 2, D)) if affine else (None, None, None)
    types = [DTYPES.index(t.dtype if t is not None else x.dtype) for t in (x, weight)]
    buffers = [dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias, partial]
    launches = host(1, [*types, R, D], buffers, **settings)
    assert launches == (1 if R else 0) + affine * (2 if R else 1)
    return dx, dweight, dbias


# a width below a vector, a prime, rows of one and of several 128-bit loads per thread, a row longer than the registers
LAYER_NORM_SHAPES = ((1, 1), (3, 60), (37, 127), (3, 1023), (2, 768), (1, 4104), (2, 4133), (0, 8))


def draw_layer_norm(R, D, dtype):
    weight_dtype = torch.bfloat16 if D == 60 else dtype
    x, residual, dy, dtotal = (torch.randn(4, R, D) * 2 + 1).to(dtype).unbind()
    weight, bias = (torch.randn(2, D) * 2 + 1).to(weight_dtype).unbind()
    return x, residual, weight, bias, dy, dtotal


@parametrize("dtype", DTYPES)
@parametrize("shape", LAYER_NORM_SHAPES)
def test_layer_norm(hosts, assert_no_worse, shape, dtype):
    R, D = shape
    x, residual, weight, bias, dy, dtotal = draw_layer_norm(R, D, dtype)
    if D == 60:
        # a residual too, and parameters in a dtype of their own
        y, total, mean, rstd = layer_norm(hosts("layer_norm"), x, residual, weight, bias)
        assert torch.equal(total, x + residual)
        # the op normalises the sum as it is stored
        again = layer_norm(hosts("layer_norm"), total, None, weight, bias)
        assert torch.equal(y, again[0]) and torch.equal(mean, again[2])
    elif D == 768:
        residual = weight = bias = dtotal = None
        y, total, mean, rstd = layer_norm(hosts("layer_norm"), x, None, None, None)
    else:
        residual = None
        y, total, mean, rstd = layer_norm(hosts("layer_norm"), x, None, weight, bias)
    total = x if residual is None else total
    affine = weight is not None
    dx, dweight, dbias = layer_norm_backward(hosts("layer_norm"), dy, dtotal, total, weight, mean, rstd, affine)

    def leaves(convert):
        return [None if t is None else convert(t).requires_grad_() for t in (total, weight, bias)]

    exact, plain = leaves(torch.Tensor.double), leaves(lambda t: t.to(dtype, copy=True))
    names = ("y", "dx", "dweight", "dbias") if affine else ("y", "dx")

    def results(a, b, c):
        out = F.layer_norm(a, (D,), b, c)
        added = 0 if dtotal is None else (a * dtotal.to(a.dtype)).sum()
        loss = (out * dy.to(a.dtype)).sum() + added
        grads = torch.autograd.grad(loss, [t for t in (a, b, c) if t is not None])
        return dict(zip(names, [out.detach(), *grads], strict=True))

    ours = dict(zip(names, (y, dx, dweight, dbias), strict=False))
    assert_no_worse("", ours, results(*plain), lambda: results(*exact))


def test_layer_norm_with_a_large_mean(hosts, assert_no_worse):
    """With such activations, E[x^2] - mean^2 would lose all digits."""
    x = torch.randn(2, 96) + 3e3
    x[0, 5] = 1e4
    y, *_ = layer_norm(hosts("layer_norm"), x, None, None, None)
    high = x.double()
    assert_no_worse("y", y, F.layer_norm(x, (96,)), lambda: F.layer_norm(high, (96,)))


def label_map(host, ids, rows, features, size, **settings):
    (B, h, w), (num_rows, C) = ids.shape, features.shape
    out = nan(B, size, size, C, dtype=features.dtype)
    integers = [DTYPES.index(features.dtype), B, h, w, size, C, num_rows]
    host(0, integers, [ids, rows, features, out], **settings)
    return out


def label_map_backward(host, dy, ids, rows, num_rows, **settings):
    (B, h, w), (size, C) = ids.shape, dy.shape[2:]
    dfeatures = nan(num_rows, C)
    partial = nan(host.count(B * size, num_rows, C), num_rows, C)
    integers = [DTYPES.index(dy.dtype), B, h, w, size, C, num_rows]
    host(1, integers, [ids, rows, dy, dfeatures, partial], **settings)
    return dfeatures


def draw_label_map(B, h, w, size, C, num_rows, dtype):
    # regions of a few pixels, so that some taps agree and others differ
    ids = torch.randint(0, 256, (B, -(-h // 3), -(-w // 3)), dtype=torch.uint8)
    ids = ids.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :h, :w].contiguous()
    rows = torch.randint(0, num_rows, (B, 256))
    return ids, rows, torch.randn(num_rows, C).to(dtype), torch.randn(B, size, size, C).to(dtype)


# one output pixel, one source pixel, no resize, a prime width, more channels than a warp, more rows than one table
LABEL_MAP_SHAPES = (
    (1, 5, 4, 1, 8, 3),
    (2, 1, 1, 5, 64, 2),
    (1, 7, 7, 7, 5, 1),
    (2, 23, 31, 9, 64, 40),
    (1, 31, 13, 35, 33, 300),
    (0, 4, 4, 2, 8, 3),
)


@parametrize("dtype", DTYPES)
@parametrize("shape", LABEL_MAP_SHAPES)
def test_label_map(hosts, assert_no_worse, shape, dtype):
    B, h, w, size, C, num_rows = shape
    ids, rows, features, dy = draw_label_map(*shape, dtype)
    out = label_map(hosts("label_map"), ids, rows, features, size)
    dfeatures = label_map_backward(hosts("label_map"), dy, ids, rows, num_rows)
    assert not dfeatures.isnan().any()
    if not B:
        assert not dfeatures.any()
        return

    def results(dtype):
        table = features.to(dtype, copy=True).requires_grad_()
        result = label_map_reference(ids, rows, table, size).permute(0, 2, 3, 1)
        return dict(out=result.detach(), dfeatures=torch.autograd.grad(result, table, dy.to(dtype))[0])

    ours = dict(out=out, dfeatures=dfeatures)
    assert_no_worse("", ours, results(dtype), lambda: results(torch.float64))


@parametrize("dtype", DTYPES)
def test_label_map_rows_outside_the_features_become_nan(hosts, dtype):
    """Only the pixels that use such a row become NaN, and nothing outside is read."""
    ids, rows, features, dy = draw_label_map(1, 12, 12, 12, 16, 6, dtype)
    for bad in (-1, 6, 2**40, -(2**63)):
        rows[0, 7] = bad
        ids[0, 3, 4] = 7
        used = (rows[0, ids.long()] == bad)[0]
        out = label_map(hosts("label_map"), ids, rows, features, 12)[0]
        # without a resize the second taps have weight 0, and 0 * NaN is NaN
        spread = F.max_pool2d(F.pad(used[None].float(), (0, 1, 0, 1)), 2, 1)[0].bool()
        assert out[used].isnan().all() and not out[~spread].isnan().any()
        dfeatures = label_map_backward(hosts("label_map"), dy, ids, rows, 6)
        assert torch.isfinite(dfeatures).all()


def decode_attention(host, q, shared_k, shared_v, mask, suffix_k, suffix_v, ancestors, **settings):
    R, H, Q, K = q.shape
    S, M, A = shared_k.shape[2], suffix_k.shape[2], ancestors.shape[2]
    splits = host.count(S, M, A)
    out, parts = nan(R, Q, H, K, dtype=q.dtype), nan(splits, R, H, Q, K)
    highest, sums = nan(splits, R, H, Q), nan(splits, R, H, Q)
    buffers = [q, shared_k, shared_v, mask, suffix_k, suffix_v, ancestors, out, parts, highest, sums]
    host(0, [DTYPES.index(q.dtype), R, H, Q, K, S, mask.shape[1], M, A], buffers, **settings)
    return out.transpose(1, 2)


def draw_decode_attention(R, H, Q, K, S, M, A, dtype, per_query=True):
    q = torch.randn(R, H, Q, K).to(dtype) * 2
    shared_k, shared_v = torch.randn(2, R, H, S, K).to(dtype).unbind()
    suffix_k, suffix_v = torch.randn(2, R, H, M, K).to(dtype).unbind()
    mask = torch.rand(R, Q if per_query else 1, S) < 0.8
    slots = torch.rand(R, Q, M).argsort(-1)[..., :A]
    ancestors = torch.where(torch.rand(slots.shape) < 0.7, slots, -1)
    return q, shared_k, shared_v, mask, suffix_k, suffix_v, ancestors


# R H Q K S M A: one of each, splits of 256 keys, more queries than a tile, nothing shared, no suffix, nothing at all
DECODE_SHAPES = (
    (1, 1, 1, 32, 1, 1, 1),
    (2, 2, 3, 64, 67, 5, 3),
    (1, 1, 2, 96, 259, 40, 35),
    (1, 2, 18, 128, 33, 2, 2),
    (1, 1, 5, 160, 40, 3, 2),
    (1, 1, 9, 256, 35, 3, 1),
    (1, 1, 2, 40, 0, 4, 2),
    (1, 1, 2, 8, 31, 0, 0),
    (1, 1, 2, 8, 0, 0, 0),
    (0, 1, 2, 8, 4, 1, 1),
)


@parametrize("dtype", DTYPES)
@parametrize("shape", DECODE_SHAPES)
def test_decode_attention(hosts, assert_no_worse, shape, dtype):
    inputs = draw_decode_attention(*shape, dtype, per_query=shape[2] != 5)
    out = decode_attention(hosts("decode_attention"), *inputs)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    plain = decode_attention_reference(*inputs)
    assert_no_worse("out", out, plain, lambda: decode_attention_reference(*exact))


def test_decode_attention_of_difficult_queries(hosts, assert_no_worse):
    """Queries that see nothing, only the suffix or only late keys; scores of hundreds; ancestors that are not slots."""
    inputs = draw_decode_attention(1, 1, 5, 16, 300, 4, 3, torch.float32)
    q, _, _, mask, _, _, ancestors = inputs
    q *= 100
    mask[0, 0] = mask[0, 1] = False
    ancestors[0, 0] = -1
    ancestors[0, 1] = torch.tensor([2, -1, 0])
    mask[0, 2, :299] = False
    out = decode_attention(hosts("decode_attention"), *inputs)
    assert not out[0, 0, 0].any()
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    plain = decode_attention_reference(*inputs)
    assert_no_worse("out", out, plain, lambda: decode_attention_reference(*exact))
    ancestors[0, 0] = torch.tensor([4, 2**40, -7])
    assert torch.equal(out, decode_attention(hosts("decode_attention"), *inputs))


# ---- the same bits for any order of the threads and in any batch


def calls(dtype=torch.float32):
    """Name of the source -> calls that use several warps and blocks; each is a function of the host and settings."""
    x, residual, weight, bias, dy, dtotal = draw_layer_norm(34, 300, dtype)
    mean, rstd = x.float().mean(1), 1 / x.float().std(1)
    maps = draw_label_map(2, 23, 31, 9, 40, 12, dtype)
    narrow, wide = (draw_decode_attention(2, 1, 6, K, 70, 5, 3, dtype) for K in (32, 160))
    return {
        "layer_norm": [
            lambda host, **s: layer_norm(host, x, residual, weight, bias, **s),
            lambda host, **s: layer_norm_backward(host, dy, dtotal, x, weight, mean, rstd, True, **s),
        ],
        "label_map": [
            lambda host, **s: (label_map(host, *maps[:3], 9, **s),),
            lambda host, **s: (label_map_backward(host, maps[3], *maps[:2], 12, **s),),
        ],
        "decode_attention": [
            lambda host, **s: (decode_attention(host, *narrow, **s),),
            lambda host, **s: (decode_attention(host, *wide, **s),),
        ],
    }


def bits(tensors):
    return [t.contiguous().view(torch.uint8) for t in tensors if t is not None]


def same(first, second):
    return all(map(torch.equal, bits(first), bits(second)))


@parametrize("name", NAMES)
def test_the_order_of_threads_does_not_matter(hosts, name):
    for call in calls()[name]:
        expected = call(hosts(name), order=FORWARD)
        assert not any(t.isnan().any() for t in expected if t is not None)
        for order in (FORWARD, REVERSE, RANDOM):
            assert same(expected, call(hosts(name), order=order))


def test_a_row_does_not_depend_on_the_batch(hosts):
    x, residual, weight, bias, dy, dtotal = draw_layer_norm(5, 304, torch.bfloat16)
    batch = layer_norm(hosts("layer_norm"), x, residual, weight, bias)
    alone = layer_norm(hosts("layer_norm"), x[3:4], residual[3:4], weight, bias)
    assert same(alone, [t[3:4] for t in batch])
    dx, *_ = layer_norm_backward(hosts("layer_norm"), dy, dtotal, batch[1], weight, *batch[2:], False)
    one, *_ = layer_norm_backward(hosts("layer_norm"), dy[3:4], dtotal[3:4], alone[1], weight, *alone[2:], False)
    assert same([one], [dx[3:4]])
    q, *cache, ancestors = draw_decode_attention(3, 2, 17, 32, 37, 5, 3, torch.bfloat16)
    batch = decode_attention(hosts("decode_attention"), q, *cache, ancestors)
    alone = decode_attention(hosts("decode_attention"), *(t[1:2] for t in (q, *cache, ancestors)))
    assert same([alone], [batch[1:2]])
    cache[2] = cache[2][:, 16:]
    alone = decode_attention(hosts("decode_attention"), q[:, :, 16:], *cache, ancestors[:, 16:])
    assert same([alone], [batch[:, :, 16:]])


# ---- planted bugs


def barriers(name):
    """Numbers of the lines of the source that have a __syncthreads."""
    lines = (SOURCES / f"{name}.cu").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if "__syncthreads()" in line]


@pytest.mark.parametrize(
    "name, line", [(name, line) for name in ("layer_norm", "decode_attention") for line in barriers(name)]
)
def test_a_missing_barrier_changes_the_result(hosts, name, line):
    """Every barrier is needed: without it, some order of the threads changes the result."""
    for call in calls()[name]:
        expected = call(hosts(name))
        for order in (FORWARD, REVERSE, RANDOM):
            if not same(expected, call(hosts(name), order=order, skipped_barrier=line)):
                return
    pytest.fail(f"{name}.cu: nothing changes without the barrier in line {line}")


def test_a_read_outside_a_buffer_is_found(tmp_path):
    """A copy of the source lacks the check that keeps reads inside."""
    source = (SOURCES / "label_map.cu").read_text()
    check = "row >= 0 && row < num_rows ? static_cast<int>(row) : -1"
    assert check in source
    copy = tmp_path / "planted.cu"
    copy.write_text(source.replace(check, "static_cast<int>(row)"))
    host = compile_for_host("label_map", tmp_path, copy)
    ids, rows, features, _ = draw_label_map(1, 6, 6, 6, 16, 5, torch.float32)
    label_map(host, ids, rows, features, 6)
    rows[0, ids[0, 2, 2].long()] = 5
    out = nan(1, 6, 6, 16)
    result = host.run(0, [0, 1, 6, 6, 6, 16, 5], [ids, rows, features, out])
    assert result.returncode != 0 and b"heap-buffer-overflow" in result.stderr


def test_a_short_buffer_is_found(hosts):
    """Buffers are checked to the byte: one that lacks its last element ends the program."""
    x = torch.randn(2, 37)
    buffers = [x, None, x[0].clone(), x[1].clone(), torch.empty(2, 37), None, nan(2), nan(2)]
    assert hosts("layer_norm").run(0, [0, 0, 0, 2, 37], buffers, number=1e-5).returncode == 0
    for i in (0, 2, 3, 4, 6, 7):
        short = list(buffers)
        short[i] = short[i].flatten()[:-1].clone()
        result = hosts("layer_norm").run(0, [0, 0, 0, 2, 37], short, number=1e-5)
        assert result.returncode != 0 and b"heap-buffer-overflow" in result.stderr, i


PLANTED = """
#include "launch.cuh"
namespace prismer {
namespace {
__global__ void meet(float* out) {
  if (threadIdx.x >= 16) {
    __syncthreads();
  } else if (out[0] == 0.0f) {
    __syncthreads();
  } else if (out[0] == 1.0f) {
    __shfl_xor_sync(kAllLanes, 1.0f, 1);
  } else {
    __shfl_sync(0xffffu, 1.0f, 20);
  }
}
}  // namespace
int64_t label_map_parts(int64_t, int64_t, int64_t) { return 0; }
int label_map_backward_cuda(const LabelMapBackward&, void*) { return 0; }
int label_map_cuda(const LabelMap& args, void* stream) {
  PRISMER_LAUNCH(meet, 1, 64, 0, stream, static_cast<float*>(args.out));
  return last_error();
}
}  // namespace prismer
"""


def test_threads_that_do_not_meet_are_reported(tmp_path):
    """Code that hangs a GPU, or is undefined there, ends the program with a message."""
    copy = tmp_path / "planted.cu"
    copy.write_text(PLANTED)
    host = compile_for_host("label_map", tmp_path, copy)
    for wrong, sentence in enumerate(
        ("different barriers", "a warp waits for a lane", "a shuffle from a lane outside")
    ):
        result = host.run(0, [0] * 7, [None, None, None, torch.tensor([float(wrong)])])
        assert result.returncode == 3 and sentence in result.stderr.decode()
