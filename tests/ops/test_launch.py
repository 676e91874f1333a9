"""Proves that `launch` runs the variant that Triton itself would run, on the right device, and that few are compiled.

The kernels run in name only, in a process with a driver that stands in for a GPU's.

Run: pytest tests/ops/test_launch.py
"""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from prismer.kernels import instance_rows, label_map
from prismer.kernels import launch as module
from prismer.kernels.activation import bias_activation
from prismer.kernels.adaptor import adaptor
from prismer.kernels.attention import attention
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.decode_attention import decode_attention
from prismer.kernels.dispatch import use_backend
from prismer.kernels.gemm import gemm
from prismer.kernels.launch import (
    Prepared,
    cdiv,
    counted,
    input_precision,
    kept,
    launch,
    next_power_of_2,
    unspecialised,
)
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.mlp import mlp
from prismer.kernels.resampler_attention import resampler_attention
from tests.ops.stand_in_driver import stand_in_driver

pytestmark = pytest.mark.cpu

D, H = 64, 2
# in a batch of one, so that there is one row in the first
LENGTHS = (1, 7, 16, 20, 30, 32, 33, 48)


@triton.jit(do_not_specialize=["R"])
def scaled_copy(p_x, p_bias, p_y, R, D, scale, HAS_BIAS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    o_row, o_col = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m = (o_row < R)[:, None] & (o_col < D)[None, :]
    b = tl.load(p_x + o_row[:, None] * D + o_col[None, :], mask=m, other=0.0) * scale
    if HAS_BIAS:
        b += tl.load(p_bias + o_col, mask=o_col < D, other=0.0)[None, :]
    tl.store(p_y + o_row[:, None] * D + o_col[None, :], b, mask=m)


def arguments(rows, width, bias=None, dtype=torch.float32, skip=0, **options):
    """Grid, pointers, numbers and constants of a launch of `scaled_copy`; the output is the last pointer."""
    x = torch.randn(rows * width + skip).to(dtype)[skip:].view(rows, width)
    constants = dict(HAS_BIAS=bias is not None, BR=4, BD=next_power_of_2(width)) | options
    return (cdiv(rows, 4),), (x, bias, torch.empty_like(x)), (rows, width, 2.0), constants


def tensor(*shape):
    return torch.randn(*shape, requires_grad=True)


def op_layer_norm(T):
    return layer_norm(tensor(T, D), tensor(D), tensor(D))


def op_add_layer_norm(T):
    return torch.cat(add_layer_norm(tensor(T, D), tensor(T, D), torch.randn(D), torch.randn(D)))


def op_bias_activation(T):
    return bias_activation(tensor(T, D), tensor(D), "gelu")


def op_mlp(T):
    return mlp(tensor(T, D), tensor(4 * D, D), tensor(4 * D), tensor(D, 4 * D), tensor(D), activation="gelu")


def op_adaptor(T):
    return adaptor(tensor(T, D), *(tensor(*shape) for shape in ((D,), (D,), (D, D), (D,), (D, D), (D,))), late=True)


def op_self_attention(T):
    q, k, v = tensor(1, T, 3, H, 32).permute(2, 0, 3, 1, 4)
    return attention(q, k, v, causal=True, key_mask=torch.ones(1, T, dtype=torch.bool), dropout=0.1)


def op_cross_attention(T):
    return attention(*(tensor(1, n, H, 32).transpose(1, 2) for n in (T, 260, 260)), dropout=0.1)


def op_cross_entropy(T):
    return linear_cross_entropy(tensor(T, D), tensor(99, D), tensor(99), torch.arange(T), label_smoothing=0.1)


def op_decode_attention(T):
    """A step in which 3 beams see T slots of their own and a prompt of T tokens."""
    keys = [torch.randn(1, H, n, 32) for n in (T, T, 3 * T, 3 * T)]
    ancestors = torch.arange(3 * T).view(1, 3, T)
    with torch.no_grad():
        return decode_attention(
            torch.randn(1, H, 3, 32), *keys[:2], torch.ones(1, T, dtype=torch.bool), *keys[2:], ancestors
        )


OPS = {name.removeprefix("op_"): function for name, function in globals().items() if name.startswith("op_")}


def variants(call):
    """How many variants the first of the text lengths launches, and all of them together."""
    with stand_in_driver() as driver, use_backend("triton"):
        numbers = []
        for T in LENGTHS:
            y = call(T)
            if y.requires_grad:
                y.sum().backward()
            numbers.append(len({id(compiled) for compiled, *_ in driver.launched}))
    return numbers[0], numbers[-1]


def fresh():
    """`scaled_copy`, of which nothing is compiled."""
    return triton.jit(do_not_specialize=["R"])(scaled_copy.fn)


def against_triton():
    """Whether `launch` and Triton itself run the same kernel with the same arguments, for one launch of each class."""
    bias, kernel, same = torch.randn(64), fresh(), []
    with stand_in_driver() as driver:
        for call in (
            dict(rows=5, width=64),
            dict(rows=16, width=64),
            dict(rows=5, width=64, bias=bias),
            dict(rows=5, width=64, bias=bias[1:]),
            dict(rows=5, width=1),
            dict(rows=5, width=60),
            dict(rows=5, width=64, skip=1),
            dict(rows=5, width=64, dtype=torch.bfloat16),
            dict(rows=5, width=64, num_warps=8),
            dict(rows=5, width=64, BR=8),
        ) * 2:
            grid, pointers, numbers, constants = arguments(**call)
            launch(kernel, grid, pointers, numbers, constants)
            kernel[grid](*pointers, *numbers, **constants)
            (ours, _, mine), (theirs, _, its) = driver.launched[-2:]
            # in between are the metadata of a launch and two hooks, for profilers
            same.append(ours is theirs and mine[:6] == its[:6] and [*map(id, mine[9:])] == [*map(id, its[9:])])
        return dict(same=same, compiled=len({id(compiled) for compiled, *_ in driver.launched}))


def prepared():
    """Whether `Prepared` runs what `launch` runs, for aligned pointers twice, for others, and on another device."""
    kernel, bias, same = fresh(), torch.randn(65), []
    constants = kept(HAS_BIAS=True, BR=4, BD=64)
    with stand_in_driver() as driver:
        run = Prepared(kernel, (2,), (5, 64, 2.0), constants)
        tensors = [torch.randn(5, 64), bias[:64], torch.randn(5, 64)]
        for pointers in (tensors, tensors, [tensors[0], bias[1:], tensors[2]], tensors):
            run(*pointers)
            launch(kernel, (2,), tuple(pointers), (5, 64, 2.0), constants)
            (ours, *_, mine), (theirs, *_, its) = driver.launched[-2:]
            same.append(ours is theirs and mine[:6] == its[:6] and [*map(id, mine[9:])] == [*map(id, its[9:])])
        with counted() as counter:
            run(*tensors)
        # a CPU tensor is not on the current device now
        driver.device = 0
        run(*tensors)
        return dict(
            same=same,
            compiled=len({id(compiled) for compiled, *_ in driver.launched}),
            elsewhere=[driver.launched[-1][1], driver.device],
            counted=[*counter.values()],
        )


def a_large_number():
    """The types of R that are compiled, where it stays within 32 bits and where it does not."""
    x, kernel = torch.zeros(1), fresh()
    with stand_in_driver() as driver:
        for rows in (5, 2**31, 6):
            launch(kernel, (1,), (x, None, x), (rows, 64, 1.0), dict(HAS_BIAS=False, BR=4, BD=64))
        return [compiled.source.signature["R"] for compiled, *_ in driver.launched]


class OnDevice:
    """A pointer on a GPU, as far as a launch looks at it."""

    dtype, is_meta = torch.float32, False

    def __init__(self, device):
        self.device = device

    def get_device(self):
        return self.device

    def data_ptr(self):
        return 0


class Broken(OnDevice):
    def data_ptr(self):
        raise RuntimeError("no memory")


def devices():
    """Current device and stream of launches for tensors of devices 1, 0 and 1, and the current device after each."""
    found, kernel, settings = [], fresh(), ((5, 64, 1.0), dict(HAS_BIAS=False, BR=4, BD=64))
    with stand_in_driver() as driver:
        driver.device = 0
        for device in (1, 0, 1):
            x = OnDevice(device)
            launch(kernel, (1,), (x, None, x), *settings)
            _, current, (_, _, _, stream, *_) = driver.launched[-1]
            found.append([current, stream, driver.device])
        compiled = len({id(compiled) for compiled, *_ in driver.launched})
        try:
            launch(kernel, (1,), (Broken(1), None, None), *settings)
        except RuntimeError:
            return dict(launches=found, compiled=compiled, after_failure=driver.device)


@functools.cache
def without_interpreter():
    """What the functions above return in a process whose kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_launch"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", OPS)
def test_eight_text_lengths_compile_each_kernel_at_most_twice(op):
    first, all_lengths = without_interpreter()["variants"][op]
    assert 0 < first <= all_lengths <= 2 * first


def test_a_launch_is_the_one_that_triton_would_make():
    found = without_interpreter()["against_triton"]
    assert found["same"] == [True] * 20
    # rows make no difference, everything else does
    assert found["compiled"] == 9


def test_a_number_of_more_than_32_bits_gets_a_variant_of_its_own():
    assert without_interpreter()["a_large_number"] == ["i32", "i64", "i32"]


def test_a_kernel_runs_on_the_device_of_its_tensors():
    found = without_interpreter()["devices"]
    assert found["launches"] == [[1, 1001, 0], [0, 1000, 0], [1, 1001, 0]]
    assert found["compiled"] == 2 and found["after_failure"] == 0


def test_a_prepared_launch_is_the_same_launch():
    found = without_interpreter()["prepared"]
    assert found["same"] == [True] * 4 and found["compiled"] == 2
    # the device of the tensors, and the current one afterwards
    assert found["elsewhere"] == [-1, 0] and found["counted"] == [1]


def test_constants_are_kept_once_and_compared_with_their_types():
    assert kept(BR=4, FLAG=True) is kept(BR=4, FLAG=True)
    assert kept(BR=4, FLAG=True) is not kept(BR=4, FLAG=1)
    assert kept(BR=4, FLAG=True) != kept(BR=4, FLAG=1) and {**kept(BR=4, FLAG=True)} == dict(BR=4, FLAG=True)


def test_the_interpreter_runs_a_prepared_launch():
    bias = torch.randn(60)
    grid, (x, _, y), numbers, constants = arguments(5, 60, bias)
    Prepared(scaled_copy, grid, numbers, kept(**constants))(x, bias, y)
    torch.testing.assert_close(y, x * 2 + bias)


def test_the_interpreter_runs_a_launch():
    bias = torch.randn(60)
    grid, (x, _, y), numbers, constants = arguments(5, 60, bias)
    launch(scaled_copy, grid, (x, bias, y), numbers, constants)
    torch.testing.assert_close(y, x * 2 + bias)


def test_launches_are_counted_and_those_without_data_are_not_run():
    name = f"{__name__}.scaled_copy"
    launch(scaled_copy, *arguments(5, 60))
    with counted() as outer:
        launch(scaled_copy, *arguments(5, 60))
        with counted() as inner, torch.device("meta"):
            x = torch.empty(5, 60)
            launch(scaled_copy, (2,), (x, None, x), (5, 60, 1.0), dict(HAS_BIAS=False, BR=4, BD=64))
    assert (outer, inner) == ({name: 2}, {name: 1})
    assert not module._counters


def test_integer_arithmetic_is_that_of_triton():
    for a in range(70):
        assert next_power_of_2(a + 1) == triton.next_power_of_2(a + 1)
        assert [cdiv(a, b) for b in (1, 7, 16)] == [triton.cdiv(a, b) for b in (1, 7, 16)]


def test_the_marked_arguments_are_known_under_the_interpreter_too():
    assert unspecialised(scaled_copy) == {"R"}


@pytest.fixture
def precision_settings():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_fp32_is_multiplied_as_torch_is_set(precision_settings):
    for setting in ("ieee", "tf32", "ieee"):
        precision_settings.fp32_precision = setting
        assert input_precision(torch.float32) == setting
        assert input_precision(torch.bfloat16) == "ieee"
    precision_settings.fp32_precision = "none"
    with torch.backends.flags(fp32_precision="tf32"):
        # what is set for all backends counts where nothing is set for this one
        assert input_precision(torch.float32) == "tf32"


def products():
    """Calls in fp32 whose products follow the setting, and two whose sums of rows must not."""
    a, b = torch.randn(40, 64), torch.randn(48, 64)
    context, labels = torch.randn(1, H, 40, 32), torch.arange(40)
    ids, rows = torch.randint(5, (1, 8, 8), dtype=torch.uint8), torch.arange(256)[None]
    suffix, ancestors = torch.randn(1, H, 3, 32), torch.tensor([[[0], [1], [2]]])
    seen = torch.ones(1, 40, dtype=torch.bool)
    dy = torch.randn(1, 4, 4, 16)
    return dict(
        gemm=lambda: gemm(a, b, None, backend="triton")[0],
        attention=lambda: attention(suffix, context, context),
        cross_entropy=lambda: linear_cross_entropy(a, b, b[:, 0], labels),
        decode_attention=lambda: decode_attention(suffix, context, context, seen, suffix, suffix, ancestors),
        resampler_attention=lambda: resampler_attention(
            a[None, :16],
            b[None],
            b[0],
            b[1],
            0.1 * torch.cat((a, a, b, b, b[:16])),
            b.new_zeros(192),
            2,
            order="absorbed",
        ),
        label_map=lambda: label_map._label_map_backward(dy, ids, rows, 5),
        instance_rows=lambda: instance_rows._instance_rows_backward(
            dy.view(1, 16, 16), ids, rows[0], 5, 4, True, False
        )[0],
    )


@pytest.mark.parametrize("name", products())
def test_the_precision_of_torch_reaches_the_products(name, precision_settings, running):
    call, found = products()[name], []
    with running("triton"), torch.no_grad():
        for setting in ("ieee", "tf32", "ieee"):
            precision_settings.fp32_precision = setting
            found.append(call())
    exact, rounded, again = found
    assert torch.equal(exact, again)
    assert torch.equal(exact, rounded) == (name in ("label_map", "instance_rows"))
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)


def test_the_older_setting_of_precision_counts_too():
    """In a process of its own: torch refuses to mix both settings."""
    code = (
        "import torch; from prismer.kernels.launch import input_precision as p; m = torch.backends.cuda.matmul\n"
        "seen = [p(torch.float32)]; m.allow_tf32 = True; seen.append(p(torch.float32))\n"
        "m.allow_tf32 = False; seen.append(p(torch.float32)); print(*seen)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "tf32", "ieee"], done.stderr


if __name__ == "__main__":
    # the process that `without_interpreter` starts
    print(
        json.dumps(
            dict(
                variants={name: variants(op) for name, op in OPS.items()},
                against_triton=against_triton(),
                a_large_number=a_large_number(),
                devices=devices(),
                prepared=prepared(),
            )
        )
    )
