"""Triton's interpreter made truthful, and watched: what lets kernels be proven on a machine with no GPU.

`bf16_interpreter()` repairs what the interpreter of Triton gets wrong: bf16 is held as bit patterns that arithmetic and
`tl.dot` take for integers, fp32 is truncated to bf16 rather than rounded, a dot in tf32 is computed in fp32, and a lane
that is masked off without `other` reads as zero instead of undefined.
`interpreted()` does that too, and checks every address, looks for races between programs, and counts what the kernels
move and multiply.

Limits. The programs of a launch run one after the other, so a race is found by its addresses and not by its effect.
Reading back in a program what the same program stored is not judged, nor is the order of threads within a program.
Two accesses of different width to one address are taken for accesses to their first bytes.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

_ARITHMETIC = (
    "fadd fsub fmul fdiv frem fneg precise_divf fma clampf fabs floor ceil exp exp2 log log2 sin cos sqrt precise_sqrt "
    "rsqrt erf minimumf minnumf maximumf maxnumf"
).split()
_COMPARISONS = [f"fcmp{order}{name}" for order in "OU" for name in ("LT", "GT", "LE", "GE", "EQ", "NE")]
_POINTER_MOVES = "addptr splat unsplat broadcast expand_dims reshape trans bitcast".split()


class KernelFault(AssertionError):
    """What a kernel did that it may not do; the text names the kernel and the argument."""


@dataclass(kw_only=True)
class Ledger:
    """What the kernels launched inside one `interpreted()` block did, counted lane by lane.

    Bytes are those issued: every lane that is not masked off counts, also where several lanes or programs read the same
    address. A dot of (M, K) and (K, N) is 2*M*N*K FLOPs, padding included.
    """

    launches: int = 0
    programs: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    dot_flops: int = 0
    kernels: list[str] = field(default_factory=list)  # one name per launch, in order
    traffic: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    # (kernel, argument) -> bytes read, bytes written


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


class _Patches:
    """Replaces private names of Triton's interpreter, refusing loudly if one is gone, and puts them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name, None)
        if not callable(original):
            raise AssertionError(
                f"Triton {triton.__version__} has no {owner.__name__}.{name} any more; "
                "adapt tests/ops/interpreter.py to its interpreter"
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
def _patched() -> Iterator[_Patches]:
    patches = _Patches()
    try:
        yield patches
    finally:
        patches.restore()


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


@contextmanager
def bf16_interpreter() -> Iterator[None]:
    """Inside the block Triton's interpreter computes as a GPU does in bf16, tf32 and masked-off lanes.

    bf16 arithmetic is carried out in fp32 and rounded to nearest even after every operation. It changes nothing for
    kernels that are compiled.

    Raises:
        AssertionError: if this Triton has renamed what is patched.
    """
    builder = triton_interpreter.InterpreterBuilder
    with _patched() as patches:
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
        patches.add(
            builder,
            "get_bf16",
            lambda self, value: triton_interpreter.TensorHandle(_encode(np.array([value], np.float32)), tl.bfloat16),
        )
        yield


@dataclass(kw_only=True)
class _Argument:
    """One tensor argument of a launch: the addresses that its pointer may reach."""

    name: str
    low: int  # address of the first element
    itemsize: int
    elements: np.ndarray | None  # which elements of the span belong to it; None is all of them
    count: int  # elements in the span, gaps included
    storage: int

    def reaches(self, addresses: np.ndarray) -> np.ndarray:
        offset = addresses.astype(np.int64) - self.low
        index = offset // self.itemsize
        inside = (offset >= 0) & (index < self.count)
        if self.elements is not None:
            inside &= self.elements[np.where(inside, index, 0)]
        return inside


def _argument(name: str, tensor: torch.Tensor) -> _Argument:
    elements, count = None, 0
    if tensor.numel():
        count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() < count or 0 in tensor.stride():
        elements = np.zeros(count, dtype=bool)
        np.lib.stride_tricks.as_strided(elements, tensor.shape, tensor.stride())[...] = True
    return _Argument(
        name=name,
        low=tensor.data_ptr(),
        itemsize=tensor.element_size(),
        elements=elements,
        count=count,
        storage=tensor.untyped_storage().data_ptr(),
    )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor inside one argument, by name: itself, or those of a tuple or a descriptor."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)
    elif hasattr(value, "data_ptr"):
        yield name, value
    elif hasattr(value, "block_shape"):
        yield from _tensors(name, value.base)


_MANY = -1


class _Shadow:
    """Who touched each element of one storage in one launch: 0 nobody, else 1 + the index of the program."""

    def __init__(self, storage: torch.UntypedStorage, itemsize: int) -> None:
        self.low, self.itemsize = storage.data_ptr(), itemsize
        count = storage.nbytes() // itemsize + 1
        self.writer, self.reader, self.lane = (np.zeros(count, np.int32) for _ in range(3))


class _Launch:
    """Checks and counts one launch of one kernel."""

    def __init__(self, kernel: str, ledger: Ledger, others: list[_Argument]) -> None:
        self.kernel, self.ledger, self.others = kernel, ledger, others
        self.arguments: dict[int, _Argument] = {}  # by the id of the tensor that is passed
        self.shadows: dict[int, _Shadow] = {}
        self.program = 0
        self.place: tuple[int, ...] = ()
        self.kept: list[Any] = []  # keeps ids from being reused

    def register(self, bound: dict[str, Any]) -> None:
        storages: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for argument, value in bound.items():
            for name, tensor in _tensors(argument, value):
                plain = getattr(tensor, "base", tensor)
                self.kept.append(tensor)
                self.arguments[id(tensor)] = _argument(name, plain)
                storage = plain.untyped_storage()
                _, itemsize = storages.get(storage.data_ptr(), (None, 8))
                storages[storage.data_ptr()] = storage, min(itemsize, plain.element_size())
        self.shadows = {low: _Shadow(*entry) for low, entry in storages.items() if low}

    def fault(self, what: str) -> KernelFault:
        return KernelFault(f"kernel {self.kernel}, program {self.place}: {what}")

    def _owner(self, ptrs: Any, addresses: np.ndarray, verb: str) -> _Argument | None:
        argument = ptrs.attr.get("argument")
        if argument is None:
            # the pointer was made in a way that is not followed: it must at least reach something known
            known = [*self.arguments.values(), *self.others]
            for argument in known:
                if argument.reaches(addresses).all():
                    return argument
            raise self.fault(f"{verb} through a pointer of unknown origin lands outside all arguments")
        inside = argument.reaches(addresses)
        if inside.all():
            return argument
        address = int(addresses[~inside][0])
        offset = (address - argument.low) / argument.itemsize
        hit = [o.name for o in self.arguments.values() if o is not argument and o.reaches(np.array([address])).all()]
        raise self.fault(
            f"{verb} through {argument.name} reaches {int((~inside).sum())} addresses outside it, "
            f"the first at element {offset:g} of a span of {argument.count}"
            + (f", which belongs to {', '.join(hit)}" if hit else "")
        )

    def access(self, ptrs: Any, mask: Any, verb: str, values: np.ndarray | None = None) -> None:
        """Check and count one load ("load"), store ("store") or atomic ("atomic")."""
        mask = np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), ptrs.data.shape)
        addresses = ptrs.data[mask]
        size = addresses.size * triton_interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        if not addresses.size:
            return
        argument = self._owner(ptrs, addresses, verb)
        traffic = self.ledger.traffic.setdefault((self.kernel, argument.name), [0, 0])
        if verb != "store":
            self.ledger.bytes_read += size
            traffic[0] += size
        if verb != "load":
            self.ledger.bytes_written += size
            traffic[1] += size
        shadow = self.shadows.get(argument.storage)
        if shadow is not None:
            self._race(argument, shadow, addresses, verb, None if values is None else values[mask])

    def _race(self, argument: _Argument, shadow: _Shadow, addresses: np.ndarray, verb: str, values) -> None:
        at = (addresses.astype(np.int64) - shadow.low) // shadow.itemsize
        mine = self.program + 1
        writer = shadow.writer[at]
        if verb == "load":
            if ((writer != 0) & (writer != mine)).any():
                raise self.fault(f"race: loads from {argument.name} what another program of the launch stored")
            reader = shadow.reader[at]
            shadow.reader[at] = np.where((reader == 0) | (reader == mine), mine, _MANY)
            return
        # several programs may add to one integer, in any order; all else that meets is a race
        if verb == "store" and ((writer != 0) & (writer != mine)).any():
            raise self.fault(f"race: two programs of the launch store to the same address of {argument.name}")
        if verb == "atomic" and ((writer != 0) & (writer != mine) & (writer != _MANY)).any():
            raise self.fault(f"race: an atomic on {argument.name} meets the store of another program")
        reader = shadow.reader[at]
        if ((reader != 0) & (reader != mine)).any():
            raise self.fault(f"race: stores to {argument.name} where another program of the launch loads")
        shadow.writer[at] = _MANY if verb == "atomic" else mine
        if values is not None and at.size > 1:
            lanes = np.arange(at.size, dtype=np.int32)
            shadow.lane[at] = lanes
            last = shadow.lane[at]
            clash = last != lanes
            if clash.any() and (values[clash].tobytes() != values[last[clash]].tobytes()):
                raise self.fault(f"race: one store puts different values to the same address of {argument.name}")


def _unwrapped(error: BaseException) -> BaseException:
    """The fault inside the errors that Triton's interpreter wraps around what a kernel raises."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KernelFault):
            return cause
        cause = cause.__cause__
    return error


@contextmanager
def interpreted(*tensors: torch.Tensor) -> Iterator[Ledger]:
    """Run the kernels launched inside the block with a correct bf16, checked, and counted in the `Ledger` it yields.

    Every lane of a load or store that is not masked off must reach an element of the very argument whose pointer it
    came through: for a view, the elements of the view, not its neighbours in the storage. A program may not store where
    another one of the launch loads or stores, nor use a floating-point atomic.

    Args:
        tensors: memory that pointers of unknown origin may reach too: addresses that a kernel loads from memory, or
            selects between two arguments. Arguments of a launch need not be listed.

    Raises:
        KernelFault: (an AssertionError) that names the kernel, the program and the argument, when a kernel does what it
            may not.
        AssertionError: if this Triton has renamed what is patched.
    """
    if not triton.knobs.runtime.interpret:
        pytest.skip("the ledger counts interpreted kernels only: set TRITON_INTERPRET=1")
    builder, executor = triton_interpreter.InterpreterBuilder, triton_interpreter.GridExecutor
    ledger = Ledger()
    others = [_argument("a registered tensor", tensor) for tensor in tensors]
    running: list[_Launch] = []

    def follow(original: Callable) -> Callable:
        def move(self, *args):
            result = original(self, *args)
            for arg in args:
                if "argument" in getattr(arg, "attr", ()):
                    result.set_attr("argument", arg.attr["argument"])
            return result

        return move

    def call(original: Callable) -> Callable:
        def launch(self, *args, **kwargs):
            running.append(_Launch(self.fn.__name__, ledger, others))
            ledger.launches += 1
            ledger.kernels.append(self.fn.__name__)
            try:
                return original(self, *args, **kwargs)
            except Exception as error:
                found = _unwrapped(error)
                if found is error:
                    raise
                raise found from None
            finally:
                running.pop()

        return launch

    def prepare(original: Callable) -> Callable:
        def bind(self, args, kwargs):
            args_here, kwargs_here = original(self, args, kwargs)
            running[-1].register(inspect.getcallargs(self.fn, *args_here, **kwargs_here))
            return args_here, kwargs_here

        return bind

    def convert(original: Callable) -> Callable:
        def as_handle(arg):
            result = original(arg)
            argument = running[-1].arguments.get(id(arg)) if running else None
            if argument is not None:
                result.handle.set_attr("argument", argument)
            return result

        return as_handle

    def place(original: Callable) -> Callable:
        def set_grid_idx(self, *index):
            original(self, *index)
            launch, (_, ny, nz) = running[-1], self.grid_dim
            launch.program = (index[0] * ny + index[1]) * nz + index[2]
            launch.place = index
            ledger.programs += 1

        return set_grid_idx

    def load(original: Callable) -> Callable:
        def checked(self, ptrs, mask, *rest, **options):
            running[-1].access(ptrs, mask, "load")
            return original(self, ptrs, mask, *rest, **options)

        return checked

    def store(original: Callable) -> Callable:
        def checked(self, ptrs, value, mask, *rest, **options):
            values = np.broadcast_to(value.data, ptrs.data.shape)
            running[-1].access(ptrs, mask, "store", values)
            return original(self, ptrs, value, mask, *rest, **options)

        return checked

    def atomic(original: Callable) -> Callable:
        def checked(self, operation, ptr, value, mask, *rest):
            if ptr.get_element_ty().is_floating():
                name = getattr(ptr.attr.get("argument"), "name", "a pointer")
                raise running[-1].fault(
                    f"a floating-point atomic on {name} makes the result depend on the order of programs"
                )
            running[-1].access(ptr, mask, "atomic")
            return original(self, operation, ptr, value, mask, *rest)

        return checked

    def compare_and_swap(original: Callable) -> Callable:
        def checked(self, ptr, *rest):
            running[-1].access(ptr, np.ones(ptr.data.shape, bool), "atomic")
            return original(self, ptr, *rest)

        return checked

    def dot(original: Callable) -> Callable:
        def counted(self, a, b, *rest):
            ledger.dot_flops += 2 * a.data.size * b.data.shape[-1]
            return original(self, a, b, *rest)

        return counted

    def descriptor(original: Callable) -> Callable:
        def materialise(self, offsets):
            pointers, masks = original(self, offsets)
            pointers.attr.update(self.base.attr)
            return pointers, masks

        return materialise

    with ExitStack() as stack:
        stack.enter_context(bf16_interpreter())
        patches = stack.enter_context(_patched())
        for name in _POINTER_MOVES:
            patches.replace(builder, f"create_{name}", follow)
        patches.replace(builder, "create_masked_load", load)
        patches.replace(builder, "create_masked_store", store)
        patches.replace(builder, "create_atomic_rmw", atomic)
        patches.replace(builder, "create_atomic_cas", compare_and_swap)
        patches.replace(builder, "create_dot", dot)
        patches.replace(builder, "set_grid_idx", place)
        patches.replace(executor, "__call__", call)
        patches.replace(executor, "_init_args_hst", prepare)
        patches.replace(triton_interpreter, "_implicit_cvt", convert)
        patches.replace(triton_interpreter.TensorDescHandle, "materialize_pointers", descriptor)
        yield ledger
