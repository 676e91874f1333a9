"""Checks each address of an interpreted kernel: it belongs to the argument, and no other program stores to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter as triton_interpreter

from tests.ops.interpreter.counters import Ledger


class KernelFault(AssertionError):
    """What a kernel did that it may not do; the text names the kernel and the argument."""


@dataclass(kw_only=True)
class Argument:
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


def describe(name: str, tensor: torch.Tensor) -> Argument:
    elements, count = None, 0
    if tensor.numel():
        count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() < count or 0 in tensor.stride():
        elements = np.zeros(count, dtype=bool)
        np.lib.stride_tricks.as_strided(elements, tensor.shape, tensor.stride())[...] = True
    return Argument(
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


# in a shadow: more than one program
_MANY = -1


class _Shadow:
    """Who touched each element of one storage in one launch: 0 nobody, else 1 + the index of the program."""

    def __init__(self, storage: torch.UntypedStorage, itemsize: int) -> None:
        self.low, self.itemsize = storage.data_ptr(), itemsize
        count = storage.nbytes() // itemsize + 1
        self.writer, self.reader, self.lane = (np.zeros(count, np.int32) for _ in range(3))


class Launch:
    """Checks and counts one launch of one kernel."""

    def __init__(self, kernel: str, ledger: Ledger, others: list[Argument]) -> None:
        self.kernel, self.ledger, self.others = kernel, ledger, others
        self.arguments: dict[int, Argument] = {}  # by the id of the tensor that is passed
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
                self.arguments[id(tensor)] = describe(name, plain)
                storage = plain.untyped_storage()
                _, itemsize = storages.get(storage.data_ptr(), (None, 8))
                storages[storage.data_ptr()] = storage, min(itemsize, plain.element_size())
        self.shadows = {low: _Shadow(*entry) for low, entry in storages.items() if low}

    def fault(self, what: str) -> KernelFault:
        return KernelFault(f"kernel {self.kernel}, program {self.place}: {what}")

    def _owner(self, ptrs: Any, addresses: np.ndarray, verb: str) -> Argument | None:
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
        self.ledger.count_access(self.kernel, argument.name, verb, size)
        shadow = self.shadows.get(argument.storage)
        if shadow is not None:
            self._race(argument, shadow, addresses, verb, None if values is None else values[mask])

    def _race(self, argument: Argument, shadow: _Shadow, addresses: np.ndarray, verb: str, values) -> None:
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


def find_fault(error: BaseException) -> BaseException:
    """The fault inside the errors that Triton's interpreter wraps around what a kernel raises."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KernelFault):
            return cause
        cause = cause.__cause__
    return error
