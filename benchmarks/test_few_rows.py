"""Products of few rows, beside a plain read of the weights: pytest benchmarks/test_few_rows.py --benchmark-only

The time of such a product is that of reading its weights, so every call reads another copy of them: all copies together
are larger than a processor's caches. The contender "read" adds up the bytes of the weights as fp32 numbers (torch.sum),
whatever they mean. "fp32" of an int8 product is torch's product with the same weights in fp32, four times the bytes,
and "int_mm" torch's int8 product.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, OURS, Contender, contenders_on, refuse_if_worse, time_contenders
from benchmarks.shapes import VOCABULARY
from prismer.kernels.dispatch import use_backend
from prismer.kernels.few_rows import few_rows_linear, few_rows_linear_reference

ROWS = (1, 3, 8, 32, 64)
SHAPES = {  # outputs, inputs
    "BASE up": (3072, 768),
    "BASE down": (768, 3072),
    "BASE square": (768, 768),
    "BASE vocabulary": (VOCABULARY, 768),
    "LARGE up": (4096, 1024),
}
# of all copies of a matrix together
_BYTES = 2**29

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel is for a CPU")


@functools.lru_cache(maxsize=1)
def copies(N: int, K: int, dtype: torch.dtype) -> Tensor:
    """(copies, N, K): one random matrix again and again."""
    weight = torch.randn(N, K).to(dtype) if dtype.is_floating_point else torch.randint(-127, 128, (N, K)).to(dtype)
    return weight.repeat(max(2, _BYTES // weight.nbytes), 1, 1)


def reading(function, weights: Tensor, *rest) -> Contender:
    """A contender that calls `function` with the next copy of the weights each time."""
    turn = itertools.cycle(weights.unbind())
    return Contender(run=lambda: function(next(turn), *rest))


def read(weight: Tensor) -> Tensor:
    """The sum of the bytes, four at a time as an fp32 number."""
    return weight.view(torch.float32).sum()


def record(benchmark, contenders: dict[str, Contender], shape: str, rows: int, dtype: torch.dtype, N: int, K: int):
    time_contenders(
        benchmark,
        contenders,
        room="few_rows",
        shape=f"{shape} {rows}",
        dtype=dtype,
        part="forward",
        bytes_moved=N * K * dtype.itemsize,
        flops=2 * rows * N * K,
        seconds=0.3,
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows(benchmark, shape, rows, dtype):
    N, K = SHAPES[shape]
    small = [torch.randn(rows, K), torch.randn(100, K), torch.randn(100)]
    refuse_if_worse(
        contenders_on(small, {OURS: few_rows_linear, "eager": F.linear}, frozen=(0, 1, 2)), dtype, "forward"
    )
    x, bias, weights = torch.randn(rows, K).to(dtype), torch.randn(N).to(dtype), copies(N, K, dtype)
    contenders = {
        OURS: reading(lambda weight: few_rows_linear(x, weight, bias), weights),
        "eager": reading(lambda weight: F.linear(x, weight, bias), weights),
        "read": reading(read, weights),
    }
    record(benchmark, contenders, shape, rows, dtype, N, K)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows_of_int8(benchmark, shape, rows):
    N, K = SHAPES[shape]
    x, scale, bias, weights = torch.randn(rows, K), torch.rand(N), torch.randn(N), copies(N, K, torch.int8)
    # random weights of these sizes round every product alike
    exact = few_rows_linear_reference(x, weights[0, :100], bias[:100], scale[:100])
    torch.testing.assert_close(
        few_rows_linear(x, weights[0, :100], bias[:100], scale[:100]), exact, rtol=1e-4, atol=1e-2
    )

    def int_mm(weight: Tensor) -> Tensor:
        with use_backend("torch"):
            return few_rows_linear(x, weight, bias, scale)

    wide = weights[: max(2, len(weights) // 4)].float()
    contenders = {
        OURS: reading(lambda weight: few_rows_linear(x, weight, bias, scale), weights),
        "fp32": reading(lambda weight: F.linear(x, weight, bias), wide),
        "int_mm": reading(int_mm, weights),
        "read": reading(read, weights),
    }
    record(benchmark, contenders, shape, rows, torch.int8, N, K)
