"""The rounding error that a computation may have, independent of the processor, the library and the order of sums.

`Rounded` runs float64 code with the errors of a shorter dtype. After every torch operator, forward and backward, it
moves each number of the result y by a random amount. The sizes come from a first-order error analysis:

    u |y|                 because the dtype stores the result; u is the unit roundoff, eps / 2
    u' sqrt(n) sum |t|    if the result is a sum of n terms t, such as the |A| |B| of a product: the bound of Higham and
                          Mary (SIAM J. Sci. Comput. 41, 2019) for any order; u' is the accumulator's, fp32 or longer

The errors pass through the rest of the code as real ones do: cancellation amplifies them, averages damp them. The
result shows how much of them arrives. It does not depend on a library's luck or on a tolerance chosen by hand. Some
torch operators (softmax, norms) are decomposed: their parts round to the accumulator, and the result is stored once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# operators whose results are sums of products of arguments: they give sum |t| on absolute values, and n on ones
SUMS = {
    *(aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten.convolution, aten.convolution_backward),
    *(aten.sum, aten.cumsum, aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_),
    *(aten.index_put, aten.index_put_, aten._index_put_impl_, aten.embedding_dense_backward),
    *(aten.upsample_bilinear2d, aten.upsample_bilinear2d_backward),
}
# operators that do not round, although torch tags some of them as pointwise
EXACT = {
    *(aten._to_copy, aten.clone, aten.copy_, aten.detach, aten.where, aten.masked_fill, aten.masked_fill_, aten.neg),
    *(aten.abs, aten.relu, aten.threshold_backward, aten.clamp, aten.clamp_min, aten.maximum, aten.minimum, aten.sign),
    *(aten.zero_, aten.fill_, aten.fill, aten.floor, aten.ceil, aten.round),
}
PARTS = get_decompositions(
    [
        *(aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data),
        *(aten.native_layer_norm_backward, aten.nll_loss_forward, aten.gelu_backward, aten.silu_backward),
    ]
)


def mean(x: Tensor, dim=None, keepdim: bool = False, **_) -> Tensor:
    dim = list(range(x.dim())) if dim is None else dim
    total = x.sum(dim, keepdim=keepdim)
    return total / (x.numel() // max(total.numel(), 1))


def var_mean(x: Tensor, dim=None, *, correction=1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Computed in two passes: the larger error of one pass counts as a bug."""
    dim = list(range(x.dim())) if dim is None else dim
    center = mean(x, dim, True)
    squares = (x - center).square().sum(dim, keepdim=keepdim)
    count = x.numel() // max(squares.numel(), 1)
    return squares / (count - (1 if correction is None else correction)), center.view_as(squares)


def layer_norm(x: Tensor, shape, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    var, center = var_mean(x, list(range(x.dim() - len(shape), x.dim())), correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    y = (x - center) * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, center, rstd


def logsumexp(x: Tensor, dim, keepdim: bool = False) -> Tensor:
    largest = x.amax(dim, keepdim=True)
    total = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(dim)


PARTS |= {
    aten._safe_softmax.default: lambda x, dim, dtype=None: torch.softmax(x, dim).nan_to_num(),
    aten.logsumexp.default: logsumexp,
    aten.native_layer_norm.default: layer_norm,
    aten.mean.default: mean,
    aten.mean.dim: mean,
    aten.var_mean.correction: var_mean,
    aten.var.correction: lambda *args, **kwargs: var_mean(*args, **kwargs)[0],
}


class Rounded(TorchDispatchMode):
    """A mode in which float64 results have random errors as large as those of `dtype` may be; `seed` draws them."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)
        self.dtype, self.accumulator = dtype, max(torch.float32, dtype, key=lambda t: torch.finfo(t).bits)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func in PARTS:
            outer, self.dtype = self.dtype, self.accumulator
            try:
                with self:
                    out = PARTS[func](*args, **kwargs)
            finally:
                self.dtype = outer
            return self._each(out, self._stored) if self.dtype != self.accumulator else out
        if func.is_view or packet in EXACT:
            return func(*args, **kwargs)
        if packet in SUMS:
            # before the call, because it may overwrite its first argument
            with torch.no_grad():
                sizes, counts = (func(*_mapped(args, change), **_mapped(kwargs, change)) for change in (_size, _one))
            out = func(*args, **kwargs)
            return self._each(out, self._summed, sizes, counts)
        out = func(*args, **kwargs)
        return self._each(out, self._stored) if torch.Tag.pointwise in func.tags else out

    def _each(self, out, change: Callable, *more):
        """Apply `change` to `out` or each of its tensors, in place: `out` may be an argument of the operator."""
        if isinstance(out, tuple | list):
            parts = [t if isinstance(t, tuple | list) else [None] * len(out) for t in more]
            return tuple(self._each(*given) for given in zip(out, [change] * len(out), *parts, strict=True))
        if isinstance(out, Tensor) and out.dtype == torch.float64 and out.numel():
            new = change(out, *more)
            # leave infinities and NaN alone
            out.copy_(torch.where(out.isfinite(), new, out))
        return out

    def _stored(self, y: Tensor) -> Tensor:
        # below `tiny` all roundings have the same size; zeros are exact
        size = y.abs().clamp(min=torch.finfo(self.dtype).tiny) * (y != 0)
        return y + _unit(self.dtype) * size * self._noise(y)

    def _summed(self, y: Tensor, size: Tensor, count: Tensor) -> Tensor:
        return self._stored(y) + _unit(self.accumulator) * count.sqrt() * size * self._noise(y)

    def _noise(self, y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=self.draw, dtype=torch.float64, device="cpu").to(y.device)


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _mapped(arguments, change: Callable):
    """Copies of an operator's arguments with `change` applied to the float64 tensors, also inside lists."""
    if isinstance(arguments, dict):
        return {name: _mapped(value, change) for name, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(_mapped(value, change) for value in arguments)
    if isinstance(arguments, Tensor) and arguments.dtype == torch.float64:
        return change(arguments)
    # floats are factors, such as addmm's alpha
    return abs(arguments) if isinstance(arguments, float) else arguments


def _size(t: Tensor) -> Tensor:
    return t.abs().clone()


def _one(t: Tensor) -> Tensor:
    return torch.ones_like(t)
