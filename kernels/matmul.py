"""Matrix products without a gradient of their own, on the library that is fastest here; other ops consist of them.

On a CPU torch multiplies fp32 matrices with MKL. On AMD processors with AVX-512, MKL reaches less than half the speed
of oneDNN, the other library that torch includes: 222 against 488 GFLOP/s for matrices of 2048 x 2048 on two cores of a
Zen 5, and 31 against 5 ms for 3 rows times RoBERTa's vocabulary. There oneDNN multiplies; elsewhere torch decides.
The choice depends on the processor, not on a measurement, so that a run gives the same bits each time.
PRISMER_MATMUL=torch, read when this module is imported, leaves every product to torch. Products of few rows are those
of kernels/few_rows.py.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.dispatch import PLAIN
from prismer.kernels.errors import InputError
from prismer.kernels.few_rows import few_rows_serves, product_of_few_rows

_asked = os.environ.get("PRISMER_MATMUL", "auto")
if _asked not in ("auto", "torch"):
    raise InputError(f"PRISMER_MATMUL is {_asked!r}; set it to torch, or leave it unset")


@functools.cache
def onednn_is_faster() -> bool:
    """Is this a processor on which oneDNN multiplies fp32 matrices, and does this torch give access to it?"""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if _asked == "auto" and cpuinfo.is_file() else ""
    known = "AuthenticAMD" in text and "avx512f" in text
    return known and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def on_onednn(x: Tensor) -> bool:
    """Does oneDNN multiply `x` by a matrix? It does if `x` is fp32 with data, on such a processor."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in PLAIN
        and onednn_is_faster()
        and torch.backends.mkldnn.enabled
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K) and (N, K), any strides -> (..., N), all of one dtype."""
    if _asked == "auto" and few_rows_serves(x, weight):
        return product_of_few_rows(x, weight, bias)
    if on_onednn(x) and x.numel() and weight.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a b: (M, K) and (K, N), any strides -> (M, N)."""
    return linear(a, b.mT) if on_onednn(a) else a @ b


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a b, in place of `out` (M, N)."""
    # oneDNN cannot write a product to given memory
    return out.add_(mm(a, b)) if on_onednn(a) else out.addmm_(a, b)
