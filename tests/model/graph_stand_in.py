"""A stand-in for CUDA graphs on a CPU: it records the operators of a program and replays them on the same memory.

It has the interface of `torch.cuda` as far as prismer/capture.py uses it, and the behaviour of a graph: recording
computes nothing that lasts (arguments are restored, the memory in between is filled with garbage), and a replay runs
each operator on the recorded addresses, whatever Python has done since. It refuses what no graph can hold: reading a
value on the host, and constants that the host sends to the device.
"""

import gc
import weakref
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prismer import capture
from prismer.kernels import dispatch

# operators that wait for the device, or copy from or to the host
REFUSED = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense item is_nonzero nonzero nonzero_numpy masked_select unique_consecutive _unique2 "
        "unique_dim equal allclose lift_fresh lift bincount"
    ).split()
)
# methods that read memory on the host without an operator
HOST_METHODS = frozenset("tolist numpy cpu item __bool__ __int__ __float__ __index__ __array__ data_ptr".split())
GARBAGE = 10**9


class CannotRecord(AssertionError):
    """The program does what a CUDA graph cannot hold."""


class RefuseHostMethods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in HOST_METHODS:
            raise CannotRecord(f"Tensor.{name} needs the host")
        return func(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class StandInGraph(TorchDispatchMode):
    """The recorder and the graph at once.

    Attributes:
        operators: (function, arguments, keywords, outputs in fresh memory) in order.
        outside: storage -> a tensor in it, of all memory that the program uses and did not allocate.
        replays: how often the graph was replayed.
    """

    def __init__(self):
        super().__init__()
        self.operators, self.outside, self.replays = [], {}, 0
        self._fresh, self._before, self._results = {}, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        # a mask as an index becomes a list of places, whose length the host must know
        masked = name.startswith("aten::index") and any(
            leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor)
        )
        if name in REFUSED or kwargs.get("pin_memory") or masked:
            raise CannotRecord(f"{name} needs the host")
        if func.namespace == "prismer":
            # the operators inside are launched one by one
            with self:
                return dispatch.implementation(func._opname)(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            if storage(tensor) not in self._fresh:
                self.outside.setdefault(storage(tensor), tensor.detach())
        written = self._written(func, args, kwargs)
        for tensor in written:
            if storage(tensor) not in self._fresh and storage(tensor) not in self._before:
                self._before[storage(tensor)] = (tensor.detach(), tensor.clone())
        out = func(*args, **kwargs)
        inputs = {storage(tensor) for tensor in given}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and storage(t) not in inputs]
        for tensor in new:
            self._fresh[storage(tensor)] = tensor.detach()
            self._results.append((name, weakref.ref(tensor)))
        if new or written:
            # other objects than the program's own, which must die with it
            args, kwargs = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
            self.operators.append((func, args, kwargs, [tensor.detach() for tensor in new]))
        return out

    @staticmethod
    def _written(func, args, kwargs) -> list[Tensor]:
        found = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def end(self) -> None:
        """Undo what the recording computed."""
        for tensor, before in self._before.values():
            tensor.copy_(before)
        for tensor in self._fresh.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE if tensor.dtype != torch.bool else 1)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outs in self.operators:
            new = func(*args, **kwargs)
            if outs and not func._schema.name.startswith("aten::empty") and "new_empty" not in func._schema.name:
                given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
                fresh = [t for t in tree_leaves(new) if isinstance(t, Tensor) and storage(t) not in given]
                for place, value in zip(outs, fresh, strict=True):
                    place.copy_(value)

    def escaped(self, result) -> list[str]:
        """Operators whose outputs are alive after the program, its result apart."""
        gc.collect()
        own = {id(leaf) for leaf in tree_leaves(result)}
        return [name for name, ref in self._results if ref() is not None and id(ref()) not in own]


class _Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class _Event:
    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


@contextmanager
def _recording(graph, pool=None, stream=None, capture_error_mode="global"):
    assert pool is not None and stream is not None and capture_error_mode == "thread_local"
    with ExitStack() as modes:
        modes.enter_context(RefuseHostMethods())
        modes.enter_context(graph)
        yield
    graph.end()


def install(monkeypatch) -> None:
    """Make prismer/capture.py record on the CPU."""
    ours, pools = _Stream(), iter(range(1000))
    for name, stand_in in dict(
        CUDAGraph=StandInGraph,
        graph=_recording,
        Stream=_Stream,
        Event=_Event,
        stream=lambda stream: ExitStack(),
        current_stream=lambda device=None: ours,
        graph_pool_handle=lambda: next(pools),
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(capture, "_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(capture, "_pinned_flag", lambda: torch.zeros((), dtype=torch.bool))


def recordings_of(module) -> list[capture.Recording]:
    return [recording for shelf in capture._shelves.get(module, {}).values() for recording in shelf.recordings.values()]
