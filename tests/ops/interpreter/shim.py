"""Triton's interpreter with the arithmetic of a GPU: bf16, tf32 and lanes that are masked off.

The interpreter holds bf16 as bit patterns that arithmetic and `tl.dot` take for integers, truncates fp32 to bf16 where
a GPU rounds, computes a tf32 dot in fp32, and reads a masked-off lane without `other` as zero instead of undefined.

It also spends a third of its time on preparing `triton.language` again for every function that a kernel calls; here
each launch prepares it once.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

_ARITHMETIC = (
    "fadd fsub fmul fdiv frem fneg precise_divf fma clampf fabs floor ceil exp exp2 log log2 sin cos sqrt precise_sqrt "
    "rsqrt erf minimumf minnumf maximumf maxnumf"
).split()
_COMPARISONS = [f"fcmp{order}{name}" for order in "OU" for name in ("LT", "GT", "LE", "GE", "EQ", "NE")]


class Patches:
    """Replaces private names of Triton's interpreter, refusing loudly if one is gone, and puts them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name, None)
        if not callable(original):
            raise AssertionError(
                f"Triton {triton.__version__} has no {owner.__name__}.{name} any more; "
                "adapt tests/ops/interpreter/ to its interpreter"
            )
        self._undo.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, wraps(original)(make(original)))

    def add(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        while self._undo:
            owner, name, original = self._undo.pop()
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@contextmanager
def patched() -> Iterator[Patches]:
    patches = Patches()
    try:
        yield patches
    finally:
        patches.restore()


def _decode(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns -> the same numbers in fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encode(numbers: np.ndarray) -> np.ndarray:
    """fp32 -> bit patterns of the nearest bf16, ties to even, as every GPU rounds."""
    bits = np.asarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(numbers), quiet, rounded).astype(np.uint16)


def _round_to_tf32(numbers: np.ndarray) -> np.ndarray:
    """fp32 -> the nearest number with the ten bits of mantissa that tensor cores read."""
    bits = np.asarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), rounded.view(np.float32), numbers)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, triton_interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _as_fp32(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return triton_interpreter.TensorHandle(_decode(handle.data), tl.float32)


def _arithmetic(original: Callable) -> Callable:
    def compute(self, *args):
        if not any(_is_bf16(arg) for arg in args):
            return original(self, *args)
        result = original(self, *map(_as_fp32, args))
        return triton_interpreter.TensorHandle(_encode(result.data), tl.bfloat16)

    return compute


def _comparison(original: Callable) -> Callable:
    def compare(self, *args):
        return original(self, *map(_as_fp32, args))

    return compare


def _cast(original: Callable) -> Callable:
    def cast(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16 or _is_bf16(src):
            return src if dst_type.scalar == tl.bfloat16 else original(self, _as_fp32(src), dst_type)
        return triton_interpreter.TensorHandle(_encode(src.data.astype(np.float32)), tl.bfloat16)

    return cast


def _cast_float(original: Callable) -> Callable:
    rounding = getattr(triton_interpreter._ir, "ROUNDING_MODE", None)

    def cast(self, src, dst_type, rounding_mode):
        ends = {src.dtype.scalar, dst_type.scalar}
        if rounding_mode == rounding.RTNE and ends <= {tl.bfloat16, tl.float16, tl.float32}:
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return cast


def _dot(original: Callable) -> Callable:
    tf32 = triton_interpreter._ir.INPUT_PRECISION.TF32

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b, d = map(_as_fp32, (a, b, d))
        if input_precision == tf32 and a.data.dtype == b.data.dtype == np.float32:
            a, b = (triton_interpreter.TensorHandle(_round_to_tf32(operand.data), tl.float32) for operand in (a, b))
        return original(self, a, b, d, input_precision, max_num_imprecise_acc)

    return dot


def _undefined(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """What a lane reads that is masked off without `other`: nothing a kernel may build on."""
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    return np.full(shape, True if dtype.kind == "b" else np.iinfo(dtype).max, dtype)


def _load(original: Callable) -> Callable:
    def load(self, ptrs, mask, other, *rest, **options):
        if other is None:
            dtype = ptrs.get_element_ty()
            data = _undefined(triton_interpreter._get_np_dtype(dtype), ptrs.data.shape)
            other = triton_interpreter.TensorHandle(data, dtype)
        return original(self, ptrs, mask, other, *rest, **options)

    return load


def _sum(original: Callable) -> Callable:
    def total(self, input):
        if input.dtype not in (tl.bfloat16, tl.float16):
            return original(self, input)
        # compiled code adds halves in the dtype itself, rounding every time; so must this, or it flatters
        bf16 = input.dtype == tl.bfloat16
        data = input.handle.data.reshape(-1) if self.axis is None else input.handle.data
        data = np.moveaxis(_decode(data) if bf16 else data, 0 if self.axis is None else self.axis, -1)
        while data.shape[-1] > 1:
            half = data.shape[-1] // 2
            data = data[..., :half] + data[..., half:]
            data = _decode(_encode(data)) if bf16 else data
        data = data[..., 0]
        if self.keep_dims:
            dims = range(len(input.shape)) if self.axis is None else self.axis
            data = np.expand_dims(data, tuple(dims) if self.axis is None else dims)
        return self.to_tensor(_encode(data) if bf16 else data, input.dtype)

    return total


def _language(original: Callable) -> Callable:
    # the modules of the language that the launch in progress has prepared
    ready: set[int] = set()

    def prepare(fn):
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if ready and modules <= ready:
            return triton_interpreter._LangPatchScope()
        scope = original(fn)
        if not ready:
            restore = scope.restore

            def end():
                ready.clear()
                restore()

            scope.restore = end
        ready.update(modules)
        return scope

    return prepare


# a module or class of the language -> those of its functions that the interpreter replaces
_builtins: dict[Any, list[tuple[str, Any]]] = {}


def _replace_builtins(original: Callable) -> Callable:
    def replace(owner, builder, scope):
        if not _builtins.get(owner):
            _builtins[owner] = [(name, value) for name, value in inspect.getmembers(owner) if tl.core.is_builtin(value)]
        for name, value in _builtins[owner]:
            triton_interpreter._patch_attr(owner, name, value, builder, scope)

    return replace


def _numpy_dtype(original: Callable) -> Callable:
    known: dict[str, np.dtype] = {}

    def convert(dtype):
        element = dtype.scalar
        if element.name not in known:
            known[element.name] = original(element)
        return known[element.name]

    return convert


@contextmanager
def bf16_interpreter() -> Iterator[None]:
    """Inside the block Triton's interpreter computes as a GPU does in bf16, tf32 and masked-off lanes.

    bf16 arithmetic is carried out in fp32 and rounded to nearest even after every operation. It changes nothing for
    kernels that are compiled.

    Raises:
        AssertionError: if this Triton has renamed what is patched.
    """
    builder = triton_interpreter.InterpreterBuilder
    with patched() as patches:
        for name in _ARITHMETIC:
            patches.replace(builder, f"create_{name}", _arithmetic)
        for name in _COMPARISONS:
            # an unordered comparison that Triton's interpreter lacks fails by itself where a kernel uses it
            if hasattr(builder, f"create_{name}"):
                patches.replace(builder, f"create_{name}", _comparison)
        patches.replace(builder, "cast_impl", _cast)
        patches.replace(builder, "create_fp_to_fp", _cast_float)
        patches.replace(builder, "create_dot", _dot)
        patches.replace(builder, "create_masked_load", _load)
        patches.replace(triton_interpreter.ReduceOps, "sum", _sum)
        patches.replace(triton_interpreter, "_patch_lang", _language)
        patches.replace(triton_interpreter, "_patch_builtin", _replace_builtins)
        patches.replace(triton_interpreter, "_get_np_dtype", _numpy_dtype)
        patches.add(
            builder,
            "get_bf16",
            lambda self, value: triton_interpreter.TensorHandle(_encode(np.array([value], np.float32)), tl.bfloat16),
        )
        yield
