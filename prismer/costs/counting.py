"""Exact counts of what a piece of PyTorch code does: FLOPs, operators issued, bytes read and written.

`with CostCounter() as counter: model(batch).backward()` sees every operator of the forward and the backward pass. FLOPs
are those of matrix products, convolutions and attention, 2 per multiply-add, from the shapes of each call. By
convention a mask saves none of them. Tensors may be real, on the meta device or fake (enter CostCounter inside
FakeTensorMode).
"""

import collections
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from prismer.kernels import dispatch, resampler_attention

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
# operators that launch no kernel
_NO_LAUNCH = frozenset(
    f"aten::{name}"
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "_fused_sdp_choice",
    )
)
# operators that read only some rows of their first argument
_ROW_READERS = frozenset(f"aten::{name}" for name in ("embedding", "gather", "index", "index_select"))
# operators that write their first argument without reading it
_OVERWRITES = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "zero_"))


def _attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    return 2 * prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_, q: Tensor, k: Tensor, v: Tensor, *__, **___) -> int:
    # scores again, dq and dk; the gradient of the probabilities, and dv
    return 2 * prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _native_attention_backward(_, q: Tensor, k: Tensor, __, *rest, **___) -> int:
    *_, dq, dk, _ = rest
    # scores again and the gradient of the probabilities; dq; dk and dv
    return (2 + (dq is not None) + 2 * (dk is not None)) * 2 * q.numel() * k.shape[-2]


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, _, __, ___, ____, transposed: bool, *rest, **______
) -> int:
    # dx and dweight each cost as much as the forward pass; the weight's shape accounts for groups
    need_dx, need_dweight, _ = rest[-1]
    points = prod((x if transposed else dy).shape[2:])
    return (need_dx + need_dweight) * 2 * x.shape[0] * points * weight.numel()


def _decode_attention(q: Tensor, shared_k: Tensor, _, __, ___, ____, ancestors: Tensor, **_____) -> int:
    """All shared keys for each query, and the slots of the suffix that `ancestors` lists."""
    R, H, Q, K = q.shape
    listed = ancestors.numel() if _without_data(ancestors) else int((ancestors >= 0).sum())
    return 4 * K * H * (R * Q * shared_k.shape[2] + listed)


def _resampler_backward(_, query: Tensor, x_hat: Tensor, *rest) -> int:
    """By the op's own formula, since torch's backward pass cannot run on what Triton's forward pass kept."""
    kv, num_heads, *needs = rest[-7:]
    names = ("query", "x_hat", "norm_weight", "in_proj_weight", "in_proj_bias")
    grads = [name for name, need in zip(names, needs, strict=True) if need]
    (B, M, D), L = query.shape, x_hat.shape[1]
    order = "ordinary" if kv.numel() else "absorbed"
    with_gradients = resampler_attention.flops(order, B, M, L, D, num_heads, grads)
    return with_gradients - resampler_attention.flops(order, B, M, L, D, num_heads)


# formulas that torch's registry lacks, or has wrong (the backward pass of grouped convolutions)
_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "aten::dot": lambda x, *_, **__: 2 * x.numel(),
    "aten::vdot": lambda x, *_, **__: 2 * x.numel(),
    "aten::addmv": lambda _, matrix, *__, **___: 2 * matrix.numel(),
    "aten::addr": lambda _, a, b, **__: 2 * a.numel() * b.numel(),
    "aten::_int_mm": flop_registry[torch.ops.aten.mm],
    "aten::addbmm": flop_registry[torch.ops.aten.baddbmm],
    "aten::_addmm_activation": flop_registry[torch.ops.aten.addmm],
    "aten::_weight_int8pack_mm": lambda x, *_, out_val, **__: 2 * x.numel() * out_val.shape[-1],
    "quantized::linear_dynamic": lambda x, *_, out_val, **__: 2 * x.numel() * out_val.shape[-1],
    "aten::convolution_backward": _convolution_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "mkldnn::_linear_pointwise": lambda x, weight, *_, **__: 2 * x.numel() * weight.shape[0],
    "prismer_native::few_rows_linear": lambda x, weight, *_, **__: 2 * x.numel() * weight.shape[0],
    "prismer_native::attention": _attention,
    "prismer_native::attention_backward": _native_attention_backward,
    "prismer_native::decode_attention": _decode_attention,
}
for _packet, _formula in flop_registry.items():
    if isinstance(_packet, torch._ops.OpOverloadPacket):
        _FORMULAS.setdefault(_packet._qualified_op_name, _formula)


def _formula_of(name: str) -> Callable[..., int] | None:
    # addmm_ costs as much as addmm
    return _FORMULAS.get(name) or _FORMULAS.get(name.removesuffix("_"))


class CostCounter(TorchDispatchMode):
    """Counts the operators that run inside `with CostCounter() as counter:`.

    Registered ops (`prismer::*`) are one call each. On the CPU their implementation runs under the counter, so FLOPs
    and rows are those of the operators inside. The inside of a GPU's kernels and of ops on tensors without data is
    invisible: such an op is one row, with the FLOPs of its implementation on torch's operators for the same shapes.

    Attributes:
        flops: of matrix products, convolutions and attention, 2 per multiply-add.
        issued: operator name -> number of calls, without views and allocations.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.issued: collections.Counter[str] = collections.Counter()
        self._depth = 0
        self._rows: dict[str, list[int]] = {}

    @property
    def calls(self) -> int:
        """Operators issued, without views and allocations; a registered op is one."""
        return self.issued.total()

    def rows(self) -> list[tuple[str, int, int, int]]:
        """(operator, calls, FLOPs, bytes read and written) of the innermost operators, in order of appearance.

        Bytes are those of the tensors in and out, each element once. Less is moved where a cache holds an input.
        """
        return [(name, *row) for name, row in self._rows.items()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "prismer":
            return self._registered(func, args, kwargs)
        formula = _formula_of(name)
        if formula is None and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            # under inference_mode a composite operator such as linear arrives whole
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        if name == "aten::nonzero" and _without_data(args[0]):
            # the worst case: every label is a target
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name == "aten::_local_scalar_dense" and _without_data(args[0]):
            # the gradient of a loss
            return 1.0
        out = func(*args, **kwargs)
        if func.is_view or name in _NO_LAUNCH:
            return out
        if not self._depth:
            self.issued[name] += 1
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self._add(name, flops, _traffic(func, args, kwargs, out))
        return out

    def _registered(self, func, args: tuple, kwargs: dict):
        if not self._depth:
            self.issued[func._schema.name] += 1
        implementation = dispatch.implementation(func._opname)
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        visible = all(t.device.type == "cpu" and not _without_data(t) for t in tensors)
        if visible and dispatch.asked() != "triton":
            self._depth += 1
            try:
                with self:
                    return implementation(*args, **kwargs)
            finally:
                self._depth -= 1
        out = func(*args, **kwargs)
        if func._opname == "resampler_attention_backward" and args[8].numel():
            flops = _resampler_backward(*args)
        else:
            inside = CostCounter()
            meta_args, meta_kwargs = tree_map_only((Tensor, str), _without_kernels, (args, kwargs))
            with dispatch.use_backend("torch"), inside:
                implementation(*meta_args, **meta_kwargs)
            flops = inside.flops
        self._add(func._schema.name, flops, _traffic(func, args, kwargs, out))
        return out

    def _add(self, name: str, flops: int, traffic: int) -> None:
        row = self._rows.setdefault(name, [0, 0, 0])
        row[0] += 1
        row[1] += flops
        row[2] += traffic
        self.flops += flops


def _without_data(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def _without_kernels(argument: Tensor | str) -> Tensor | str:
    """Replace a tensor by one without data (a fake one stays), and the name of a kernel's backend by "torch"."""
    if isinstance(argument, str):
        return "torch" if argument in ("native", "triton") else argument
    if _without_data(argument):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements in memory: an expanded dimension has one element."""
    if tensor.layout != torch.strided:
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * prod(1 if stride == 0 and size else size for size, stride in sizes)


def _traffic(func, args: tuple, kwargs: dict, out) -> int:
    """The bytes that a call has to read and write."""
    written = _bytes_of_all(out)
    if func._schema.name in _ROW_READERS:
        # each row that is read is written too
        return 2 * written + _bytes_of_all(args[1:])
    read = 0
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if not (changed and (argument.is_out or func._schema.name in _OVERWRITES)):
            read += _bytes_of_all(value)
        if changed and not func._schema.returns:
            # operators that return what they change in place counted it above
            written += _bytes_of_all(value)
    return read + written


def _bytes_of_all(values) -> int:
    return sum(_bytes(leaf) for leaf in tree_iter(values) if isinstance(leaf, Tensor))
