"""Triton's interpreter made truthful, and watched: what lets kernels be proven on a machine with no GPU.

Inside `interpreted()` three things are guaranteed:

* a kernel computes bf16, tf32 and masked-off lanes as a GPU does (`shim.py`; `bf16_interpreter()` gives this alone);
* every address that a kernel touches belongs to the argument whose pointer it came through, and no program of a launch
  touches what another one stores (`checks.py`);
* the ledger counts what the kernels move and multiply (`counters.py`).

Limits. The programs of a launch run one after the other, so a race is found by its addresses and not by its effect. A
program may read back what it stored; the order of threads within a program is not judged. Two accesses of different
width to one address are taken for accesses to their first bytes.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter as triton_interpreter

from tests.ops.interpreter.checks import KernelFault as KernelFault
from tests.ops.interpreter.checks import Launch, describe, find_fault
from tests.ops.interpreter.counters import Ledger as Ledger
from tests.ops.interpreter.shim import bf16_interpreter, patched

_POINTER_MOVES = "addptr splat unsplat broadcast expand_dims reshape trans bitcast".split()


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
    others = [describe("a registered tensor", tensor) for tensor in tensors]
    running: list[Launch] = []

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
            running.append(Launch(self.fn.__name__, ledger, others))
            ledger.count_launch(self.fn.__name__)
            try:
                return original(self, *args, **kwargs)
            except Exception as error:
                found = find_fault(error)
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
            ledger.count_dot(a.data.size, b.data.shape[-1])
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
        patches = stack.enter_context(patched())
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
