"""What a call of each op costs the host, where its kernels are Triton's and a driver that does nothing stands in.

Shapes are small, but every tensor is real, so that checks, allocations and launches take their time and nothing else
does. `F.linear` of one number is the comparison: what the host pays for any operator of torch. On a CPU an allocation
costs less than on a GPU, and the call of a driver is missing: compare the numbers with each other.

Run: pytest benchmarks/test_launch.py --benchmark-only
"""

import time

import pytest
import torch
import torch.nn.functional as F
import triton

from prismer.kernels.activation import bias_activation
from prismer.kernels.adaptor import adaptor
from prismer.kernels.attention import attention
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.decode_attention import decode_attention
from prismer.kernels.dispatch import use_backend
from prismer.kernels.instance_rows import add_instance_rows
from prismer.kernels.label_map import label_map
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.mlp import mlp
from tests.ops.stand_in_driver import stand_in_driver

D, H, R = 64, 2, 8


def linear():
    x, weight, bias = torch.randn(1, 1), torch.randn(1, 1), torch.randn(1)
    return lambda: F.linear(x, weight, bias)


def op_layer_norm():
    x, weight, bias = torch.randn(R, D), torch.randn(D), torch.randn(D)
    return lambda: layer_norm(x, weight, bias)


def op_add_layer_norm():
    x, residual, weight, bias = torch.randn(R, D), torch.randn(R, D), torch.randn(D), torch.randn(D)
    return lambda: add_layer_norm(x, residual, weight, bias)


def op_bias_activation():
    h, bias = torch.randn(R, D), torch.randn(D)
    return lambda: bias_activation(h, bias, "gelu")


def op_mlp():
    x, fc, fc_bias, proj, bias = (torch.randn(*s) for s in ((R, D), (D, D), (D,), (D, D), (D,)))
    return lambda: mlp(x, fc, fc_bias, proj, bias, activation="gelu")


def op_adaptor():
    tensors = [torch.randn(*s) for s in ((R, D), (D,), (D,), (D, D), (D,), (D, D), (D,))]
    return lambda: adaptor(*tensors, late=False)


def op_attention():
    q, k, v = torch.randn(1, R, 3, H, 32).permute(2, 0, 3, 1, 4)
    return lambda: attention(q, k, v)


def op_decode_attention():
    keys = [torch.randn(1, H, R, 32) for _ in range(4)]
    q, mask, ancestors = torch.randn(1, H, 3, 32), torch.ones(1, R, dtype=torch.bool), torch.arange(6).view(1, 3, 2)
    return lambda: decode_attention(q, *keys[:2], mask, *keys[2:], ancestors)


def op_cross_entropy():
    x, weight, bias, labels = torch.randn(R, D), torch.randn(99, D), torch.randn(99), torch.arange(R)
    return lambda: linear_cross_entropy(x, weight, bias, labels)


def op_label_map():
    ids, rows = torch.zeros(1, 16, 16, dtype=torch.uint8), torch.zeros(1, 256, dtype=torch.int64)
    features = torch.randn(5, D)
    return lambda: label_map(ids, rows, features, 8)


def op_instance_rows():
    x, ids, table = torch.randn(1, 16, D), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.randn(5, D)
    return lambda: add_instance_rows(x, ids, table, None, 4)


OPS = {name.removeprefix("op_"): function for name, function in globals().items() if name.startswith("op_")}


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not launched")
    with stand_in_driver() as driver, use_backend("triton"), torch.no_grad():
        driver.keep = False
        yield


# processor time: other processes on the machine disturb it less than the clock on the wall
@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("op", ["linear", *OPS])
def test_host_time_of_a_call(benchmark, op):
    call = (linear if op == "linear" else OPS[op])()
    benchmark.pedantic(call, rounds=200, iterations=20, warmup_rounds=5)
