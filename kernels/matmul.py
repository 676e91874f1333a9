"""Matrix products without a gradient of their own, on the library that is fastest here; other ops consist of them.

On a CPU torch multiplies fp32 matrices with MKL. On AMD processors with AVX-512, MKL reaches less than half the speed
of oneDNN, the other library that torch includes: 222 against 488 GFLOP/s for matrices of 2048 x 2048 on two cores of a
Zen 5, and 31 against 5 ms for 3 rows times RoBERTa's vocabulary. There oneDNN multiplies, unless a measurement on this
machine says otherwise (`prismer tune`); elsewhere torch decides until it is measured.
PRISMER_BACKEND=linear:torch leaves every product to torch. Products of few rows have a kernel of their own
(kernels/few_rows.py).
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels import dispatch, tuning
from prismer.kernels.dispatch import PLAIN, TORCH, Backend, Example, Op, rows_and_width
from prismer.kernels.few_rows import MOST_ROWS, few_rows_serves, product_of_few_rows
from prismer.kernels.tuning.tables import mkl_is_slow

# numbers of the few rows that stay in a core's cache
_MOST_INPUTS = 2**18
# copies of a matrix that together exceed a processor's own caches
_COLD_BYTES, _MOST_COPIES = 2**27, 64


@dataclass(frozen=True, kw_only=True)
class Product:
    """What decides which library multiplies (R, K) by (N, K)^T.

    Attributes:
        device, dtype: of the factors.
        shape: R rounded up to a power of two, K and N.
        few: the kernel for few rows serves the product.
        enabled: torch.backends.mkldnn is enabled.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int]
    few: bool
    enabled: bool


def _few_rows_refuses(product: Product) -> str | None:
    return None if product.few else "kernels/few_rows.py does not serve the product"


def _few_rows_slower(product: Product) -> str | None:
    rows, inputs, _ = product.shape
    return "rows that exceed a core's cache are read again and again" if rows * inputs > _MOST_INPUTS else None


def _onednn_refuses(product: Product) -> str | None:
    if product.dtype != torch.float32:
        return "torch itself multiplies 16 bits with oneDNN"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no access to oneDNN"
    return None if product.enabled else "torch.backends.mkldnn is disabled"


def _onednn_slower(product: Product) -> str | None:
    return None if mkl_is_slow() else "torch multiplies as fast on this processor"


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Example:
    R, K, N = shape
    x, weight = (torch.randn(*s, device=device).mul_(K**-0.25).to(dtype) for s in ((R, K), (N, K)))
    copies, calls = 1, itertools.count()
    if R <= MOST_ROWS:
        # a decoding step reads each weight from memory: one matrix again and again would stay in the caches
        copies = max(1, min(_MOST_COPIES, _COLD_BYTES // weight.nbytes))

    def call(x: Tensor, weights: Tensor) -> Tensor:
        return linear(x, weights[next(calls) % len(weights)])

    return call, [x, weight.repeat(copies, 1, 1)]


OP = Op(
    name="linear",
    reference=None,
    backends=(
        Backend(name="few-rows", devices=("cpu",), refuses=_few_rows_refuses, slower=_few_rows_slower),
        Backend(name="onednn", devices=("cpu",), refuses=_onednn_refuses, slower=_onednn_slower),
        TORCH,
    ),
    classify=lambda product: product.shape,
    example=_example,
    depends=torch._C._get_mkldnn_enabled,
)


@functools.lru_cache(maxsize=4096)
def _pick(
    dtype: torch.dtype, shape: tuple[int, int, int], few: bool, asked: str | None, enabled: bool, tables: int
) -> str:
    """The library for plain tensors of a CPU, whose products are too short to choose anew each time.

    `tables` is the generation of the tables, on which the choice depends too.
    """
    product = Product(device=torch.device("cpu"), dtype=dtype, shape=shape, few=few, enabled=enabled)
    return OP.choose(product, asked_for=asked)


def library_of(x: Tensor, outputs: int, few: bool = False) -> str:
    """What multiplies `x` (..., K) by a matrix with this number of outputs: "few-rows", "onednn" or "torch".

    Args:
        few: the kernel for few rows serves the product.
    """
    if x.device.type != "cpu" or type(x) not in PLAIN or torch.compiler.is_compiling():
        return "torch"
    state = dispatch.asked(OP.name), torch.backends.mkldnn.enabled, tuning.generation
    return _pick(x.dtype, (*rows_and_width(x), outputs), few, *state)


def torch_multiplies(x: Tensor, outputs: int) -> bool:
    """Is torch's own operator as good as any for the product of `x` by a matrix with this number of outputs?"""
    return library_of(x, outputs) == "torch"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K) and (N, K), any strides -> (..., N), all of one dtype."""
    return OP.resolve(plan, (x, weight, bias))(x, weight, bias)


def plan(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """What runs `linear` on tensors like these, for the plan of an op whose key holds all that this one depends on."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # only torch's operator has a gradient of its own
        return F.linear
    library = library_of(x, weight.shape[0], few_rows_serves(x, weight))
    if library == "few-rows":
        return product_of_few_rows
    return _onednn if library == "onednn" and x.numel() and weight.numel() else F.linear


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a b: (M, K) and (K, N), any strides -> (M, N)."""
    return linear(a, b.mT) if library_of(a, b.shape[1]) == "onednn" else a @ b


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a b, in place of `out` (M, N)."""
    # oneDNN cannot write a product to given memory
    return out.add_(mm(a, b)) if library_of(a, b.shape[1]) == "onednn" else out.addmm_(a, b)
