"""CUDA graphs: a program of fixed shapes is recorded once, and one call of the host replays all of its kernels.

A step of beam search issues some 200 operators. On a GPU the host needs longer to launch them than the device to run
them, so `recorded` lends a recording to whoever runs such a program again and again.

A graph runs the recorded kernels on the recorded addresses. So a recording owns copies of the program's arguments, and
a search is loaded into them. A program reads nothing else but the weights of its module, where they are: recordings are
dropped when a weight has moved. It draws no random numbers and never asks the device for a value. All recordings of a
stream share one pool of memory; what survives a replay is in the arguments, or is copied before the next one.

Shapes are recorded when they come for the second time, because a recording costs as much as several runs. Everything
here is for GPUs: on a CPU, `why_eager` says no, sizes stay as they are and flags are read at once.
"""

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prismer.kernels import dispatch
from prismer.kernels.launch import input_precision
from prismer.kernels.layer_state import has_global_hooks, has_hooks

# of one module on one stream; the least recently used goes first
_MOST_RECORDINGS = 16
# shapes that came once
_MOST_SEEN = 256
# the first run compiles Triton kernels and lets libraries choose, the second one shows that neither is left to do
_WARM_UPS = 2
_DEVICES = ("cuda",)
_SMALLEST_CLASS = 16

_allowed = True


@contextmanager
def eager() -> Iterator[None]:
    """Run every program operator by operator inside the block, in every thread, to compare or to time."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def why_eager(module: nn.Module, device: torch.device) -> str | None:
    """None if programs of `module` are recorded on `device`, else the reason why not: the one place that decides."""
    if device.type not in _DEVICES:
        return f"a {device.type} device has no CUDA graphs"
    if not _allowed:
        return "prismer.capture.eager is active"
    if torch.compiler.is_compiling():
        return "torch.compile traces the program"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if torch.get_deterministic_debug_mode():
        return "torch's deterministic mode is on, which checks operators as they run"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on, which casts weights anew in each run"
    if is_in_torch_dispatch_mode() or torch._C._len_torch_function_stack():
        return "a mode watches the operators"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being recorded"
    if has_global_hooks():
        return "hooks are registered for every module"
    for name, part in module.named_modules():
        if has_hooks(part) or "forward" in part.__dict__ or part._compiled_call_impl is not None:
            return f"{name or 'the module'} has hooks, a forward of its own or a compiled one, which a graph would skip"
    return None


def size_class(size: int, device: torch.device) -> int:
    """The size to pad `size` to: on a GPU at most 1/4 more, or 16, so that few shapes occur; on a CPU `size` itself.

    A library such as cuDNN plans anew for each shape, and a recording serves one.
    """
    if device.type not in _DEVICES:
        return size
    step = max(_SMALLEST_CLASS, 1 << max(0, (size - 1).bit_length() - 3))
    return max(1, -(-size // step)) * step


class LateFlag:
    """A condition on the device; the host reads it one question late, so that it never waits for the newest work."""

    def __init__(self, device: torch.device):
        self._late = device.type in _DEVICES
        self._asked = 0
        if self._late:
            self._slots = [(_pinned_flag(), torch.cuda.Event()) for _ in range(2)]

    def read(self, flag: Tensor) -> bool:
        """`flag` () bool as it is on a CPU; on a GPU as it was at the last question, and False at the first."""
        if not self._late:
            return bool(flag)
        copy, copied = self._slots[self._asked % 2]
        copy.copy_(flag, non_blocking=True)
        copied.record(torch.cuda.current_stream(flag.device))
        self._asked += 1
        if self._asked == 1:
            return False
        earlier, copied = self._slots[self._asked % 2]
        copied.synchronize()
        return bool(earlier)


def _pinned_flag() -> Tensor:
    return torch.zeros((), dtype=torch.bool, pin_memory=True)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target of the same shape and dtype, with one operator for each dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, out_of = by_dtype.setdefault(target.dtype, ([], []))
        into.append(target)
        out_of.append(source)
    for into, out_of in by_dtype.values():
        torch._foreach_copy_(into, out_of)


class Recording:
    """A program at fixed shapes, whose arguments and result keep their places.

    Attributes:
        arguments: copies, in the structure of the program's arguments. The graph reads them and may change them.
        result: what the program returned, overwritten by every replay of a recording of this stream.
    """

    def __init__(self, program: Callable[..., Any], given: tuple, shelf: "_Shelf"):
        leaves, structure = tree_flatten(given)
        self._leaves = [shelf.place(i, leaf) for i, leaf in enumerate(leaves)]
        self.arguments: tuple = tree_unflatten(self._leaves, structure)
        ours, side = torch.cuda.current_stream(leaves[0].device), shelf.side
        side.wait_stream(ours)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                # a program that changes its arguments starts from the same ones each time
                self.load(given)
                program(*self.arguments)
        ours.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # other threads, such as those of a loader, may use the device meanwhile
        with torch.cuda.graph(self._graph, pool=shelf.pool, stream=side, capture_error_mode="thread_local"):
            self.result = program(*self.arguments)

    def load(self, given: tuple) -> None:
        """Copy arguments of the recorded shapes into their places."""
        copy_all(self._leaves, tree_leaves(given))

    def replay(self) -> Any:
        """Run the program on the arguments as they are, and return `result`."""
        self._graph.replay()
        return self.result


class _Shelf:
    """The recordings of a module's programs on one stream, where they run one after another."""

    def __init__(self, device: torch.device):
        # recordings share memory only if they share the stream on which they are made
        self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        # a search loads, replays and reads before another thread may load
        self.lock = threading.RLock()
        self.weights: tuple = ()
        # None where recording failed
        self.recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self.seen: OrderedDict[Hashable, None] = OrderedDict()
        self.places: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()

    def place(self, index: int, leaf: Tensor) -> Tensor:
        """Memory for argument number `index`: that of another recording whose argument is alike, or a new copy."""
        key = (index, leaf.shape, leaf.dtype)
        place = self.places.get(key)
        if place is None:
            self.places[key] = place = leaf.clone()
        return place

    def find(self, key: Hashable, weights: tuple, program: Callable[..., Any], given: tuple) -> Recording | None:
        if weights != self.weights:
            self.recordings.clear()
            self.weights = weights
        if key not in self.recordings:
            if not self._is_known(key):
                return None
            self.recordings[key] = self._record(program, given)
        self.recordings.move_to_end(key)
        if len(self.recordings) > _MOST_RECORDINGS:
            self.recordings.popitem(last=False)
        found = self.recordings[key]
        if found is not None:
            found.load(given)
        return found

    def _record(self, program: Callable[..., Any], given: tuple) -> Recording | None:
        try:
            return Recording(program, given, self)
        except RuntimeError as error:
            # a driver or a library that cannot be recorded, or too little memory: slower, and just as right
            warnings.warn(f"a CUDA graph was not recorded, its operators run one by one: {error}", stacklevel=2)
            return None

    def _is_known(self, key: Hashable) -> bool:
        known = key in self.seen
        self.seen[key] = None
        self.seen.move_to_end(key)
        if len(self.seen) > _MOST_SEEN:
            self.seen.popitem(last=False)
        return known


_shelves: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Shelf]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _shelf(module: nn.Module, device: torch.device) -> _Shelf:
    stream = torch.cuda.current_stream(device)
    with _making:
        shelves = _shelves.setdefault(module, {})
        if stream not in shelves:
            shelves[stream] = _Shelf(device)
        return shelves[stream]


def _weights(module: nn.Module) -> tuple:
    """Where the weights are, and what they are: a graph reads these addresses."""
    found: list = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            found += [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors.values() if t is not None]
    return tuple(found)


@contextmanager
def recorded(
    module: nn.Module, options: Hashable, program: Callable[..., Any], arguments: tuple
) -> Iterator[Recording | None]:
    """Lend the recording of a program, loaded with `arguments`; None where the program must run eagerly.

    Use it inside the block alone: the next search is loaded into the same memory.

    Args:
        module: whose weights the program reads.
        options: the name of the program and all that it depends on besides weights and arguments.
        program: a function of `arguments`; it may change them in place.
        arguments: tensors of one device, in tuples, lists and named tuples.
    """
    leaves = tree_leaves(arguments)
    device = leaves[0].device
    if why_eager(module, device) is not None:
        yield None
        return
    shelf = _shelf(module, device)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    # a recording keeps the backends and the precision that were chosen
    key = (options, shapes, dispatch.choice_state(), input_precision(torch.float32))
    with shelf.lock:
        yield shelf.find(key, _weights(module), program, arguments)
