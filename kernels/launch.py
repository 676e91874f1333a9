"""How this folder launches its Triton kernels, with little work on the host, and how fp32 is multiplied there.

Triton's own launch, `kernel[grid](...)`, asks for each argument at each call which compiled variant serves it.
`launch` keeps the answer. Its key holds all that the answer depends on: the constants, the dtype of each pointer and
whether it is a multiple of 16, and the values of the numbers for which Triton specialises code (1, and multiples of
16). A number under `do_not_specialize` is not in the key: give that mark to whatever varies from batch to batch, such
as rows and text lengths, and keep it from widths and strides, which decide whether loads are vectors.

Every kernel takes its pointers first, then its numbers, then its constants.
"""

import collections
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction


class Constants(dict[str, Any]):
    """The constants of a launch that a launcher keeps, since to hash them at each launch costs more than to compare.

    `kept` makes them: one object for equal constants, which is equal to itself alone.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # a dict has None
    __eq__ = object.__eq__
    __ne__ = object.__ne__


_kept: dict[tuple, Constants] = {}


def kept(**constants: Any) -> Constants:
    """The one object for these constants, to be kept by a launcher for a class of its launches."""
    # 1, 1.0 and True are equal, but not the same constant
    key = tuple((name, type(value), value) for name, value in constants.items())
    return _kept.setdefault(key, Constants(constants))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` goes through a wrapper that costs the host twenty times as much."""
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def input_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a dot of this dtype: fp32 is multiplied as torch is set to multiply it on a GPU.

    torch has two settings, and reading the old one (`allow_tf32`) raises once a program has used the new one.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if fp32_precision() == "tf32" else "ieee"


def fp32_precision() -> str:
    """How torch is set to multiply fp32 on a GPU."""
    try:
        # what torch.backends.cuda.matmul.fp32_precision reads, in a fifth of its time
        return torch._C._get_fp32_precision_getter("cuda", "matmul")
    except AttributeError:
        # before torch 2.9
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


_counters: list[collections.Counter[str]] = []


@contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Count the launches inside the block, in every thread, by kernel: "layer_norm._forward_kernel".

    A launch for tensors on the meta device is counted and not run.
    """
    counter: collections.Counter[str] = collections.Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(kernel: Any) -> None:
    name = f"{kernel.fn.__module__.removeprefix('prismer.kernels.')}.{kernel.fn.__name__}"
    for counter in _counters:
        counter[name] += 1


def unspecialised(kernel: Any) -> frozenset[str]:
    """The names of the arguments under `do_not_specialize`, compiled or interpreted."""
    options = vars(kernel) if isinstance(kernel, JITFunction) else kernel.kwargs
    return frozenset(options["do_not_specialize"] or ())


# Triton's own objects, which outlive any driver or setting
_drivers, _knobs = triton.runtime.driver, triton.knobs.runtime
# numbers up to here are i32, whatever their value
_INT32 = 2**31 - 1
# one kernel has a few variants; more entries than this are a number that should not be specialised
_MOST = 4096


class _Variants:
    """The compiled variants of one kernel that have been launched, by key.

    Attributes:
        kernel: kept alive, since its id is a key of `_variants`.
        names: of the constants, in order.
        specialised: picks, from the numbers of a launch, those that are part of the key.
        found: key -> what runs the variant, its function and metadata, the constants in order, and the variant.
    """

    __slots__ = ("found", "kernel", "names", "specialised")

    def __init__(self, kernel: JITFunction, pointers: int, numbers: int) -> None:
        self.kernel = kernel
        first, last = pointers, pointers + numbers
        self.names = kernel.arg_names[last:]
        kept = [i for i, name in enumerate(kernel.arg_names[first:last]) if name not in unspecialised(kernel)]
        self.specialised: Callable = operator.itemgetter(*kept) if kept else lambda numbers: None
        self.found: dict[tuple, tuple] = {}


_variants: dict[int, _Variants] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], pointers: tuple[Tensor | None, ...], numbers: tuple, constants: dict[str, Any]
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants)` on the device of the first pointer and its current stream.

    Args:
        kernel: a function under @triton.jit, compiled or interpreted.
        grid: one to three sizes, all positive.
        pointers: tensors of one device, or None; the first one is a tensor.
        numbers: int or float. A float stays a float in every launch: 0.0, not 0.
        constants: the tl.constexpr arguments by name, `num_warps` and `num_stages`; `Constants` cost the host less.
    """
    if _counters:
        _count(kernel)
        if pointers[0].is_meta:
            return
    if type(kernel) is not JITFunction:
        # Triton's interpreter
        kernel[grid](*pointers, *numbers, **constants)
        return
    device, driver = pointers[0].get_device(), _drivers.active
    current = driver.get_current_device()
    if device == current:
        _run(driver, device, kernel, grid, pointers, numbers, constants)
        return
    # Triton compiles for the current device, and a stream belongs to its device
    driver.set_current_device(device)
    try:
        _run(driver, device, kernel, grid, pointers, numbers, constants)
    finally:
        driver.set_current_device(current)


def _run(
    driver: Any,
    device: int,
    kernel: JITFunction,
    grid: tuple[int, ...],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple,
    constants: dict[str, Any],
) -> None:
    hooks = _knobs.launch_enter_hook
    if hooks is not None and getattr(hooks, "calls", True):
        # a profiler of Triton wants the metadata of each launch
        kernel[grid](*pointers, *numbers, **constants)
        return
    run, function, metadata, values, _ = _variant(device, kernel, grid, pointers, numbers, constants)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *pointers, *numbers, *values)


def _variant(
    device: int,
    kernel: JITFunction,
    grid: tuple[int, ...],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple,
    constants: dict[str, Any],
) -> tuple:
    """What runs a launch, its function and metadata, the constants in order, and the compiled variant."""
    variants = _variants.get(id(kernel))
    if variants is None:
        variants = _variants[id(kernel)] = _Variants(kernel, len(pointers), len(numbers))
    key = (
        device,
        # an int above 32 bits changes its type, and so its variant
        variants.specialised(numbers) if max(numbers) <= _INT32 else numbers,
        constants if type(constants) is Constants else (*constants, *constants.values()),
        *[p if p is None else p.dtype if not p.data_ptr() % 16 else (p.dtype,) for p in pointers],
    )
    found = variants.found.get(key)
    if found is None:
        compiled = kernel.run(*pointers, *numbers, grid=grid, warmup=True, **constants)
        if len(variants.found) >= _MOST:
            variants.found.clear()
        values = [constants[name] for name in variants.names]
        # `run` loads the code, and so comes before `function`; code is unloaded with the last reference to `compiled`
        found = variants.found[key] = compiled.run, compiled.function, compiled.packed_metadata, values, compiled
    return found


class Prepared:
    """A launch that a plan keeps: grid, numbers and constants are fixed, and so are dtypes and device of the pointers.

    Then the variant depends only on the alignment of the pointers. If all of them are multiples of 16, as memory of
    torch's allocator is, the variant is looked up once; every other call goes through `launch`.
    """

    __slots__ = ("compiled", "grid", "interpreted", "settings", "variant")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple, constants: Constants) -> None:
        self.settings = kernel, grid, numbers, constants
        self.interpreted = type(kernel) is not JITFunction
        self.grid = (*grid, 1, 1)[:3]
        self.compiled: Any = None
        self.variant: tuple = ()

    def __call__(self, *pointers: Tensor | None) -> None:
        hooks = _knobs.launch_enter_hook
        if self.interpreted or _counters or (hooks is not None and getattr(hooks, "calls", True)):
            self._launch(pointers)
            return
        address = 0
        for p in pointers:
            if p is not None:
                address |= p.data_ptr()
        device, driver = pointers[0].get_device(), _drivers.active
        if address % 16 or device != driver.get_current_device():
            self._launch(pointers)
            return
        if not self.variant:
            kernel, grid, numbers, constants = self.settings
            run, function, metadata, values, compiled = _variant(device, kernel, grid, pointers, numbers, constants)
            # code is unloaded with the last reference to `compiled`
            self.variant, self.compiled = (run, function, metadata, (*numbers, *values)), compiled
        run, function, metadata, rest = self.variant
        stream = driver.get_current_stream(device)
        run(*self.grid, stream, function, metadata, None, None, None, *pointers, *rest)

    def _launch(self, pointers: tuple[Tensor | None, ...]) -> None:
        kernel, grid, numbers, constants = self.settings
        launch(kernel, grid, pointers, numbers, constants)
