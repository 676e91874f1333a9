"""The contract of an op: which of its implementations runs, and how torch knows the op.

The file of an op declares one `Op`: its definition, its implementations ("backends") and what each of them serves.
All else follows from the declaration. `Op.route` and `Op.choose` pick what runs a call, and `Op.resolve` remembers it
for the next call like it. `Op.register` gives torch the op with schema, shapes and gradient. `all_ops` finds the ops of
this folder, for `prismer info` and for the tests.

The backends: `native` is compiled C++ and CUDA C++, `triton` is compiled at its first call, `torch` is composed of
PyTorch operators, `reference` is the definition that tests compare with. Attention can also run on `flash-attn`,
`xformers`, torch's own `sdpa`, and `eager`, which keeps the probabilities; a matrix product on `few-rows` and `onednn`.
The measured choice runs (`tuning`), or else the first usable backend. PRISMER_BACKEND, read when this module is
imported, or `use_backend` ask for another one, for all ops (`torch`) or for some (`mlp:torch,attention:sdpa`).
"""

import functools
import importlib
import inspect
import itertools
import logging
import os
import pkgutil
import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from prismer.kernels import machine, tuning
from prismer.kernels.errors import InputError, MachineError

BACKENDS = ("native", "triton", "torch", "few-rows", "onednn", "flash-attn", "xformers", "sdpa", "eager", "reference")

_log = logging.getLogger("prismer.kernels")


# what is asked for

# op -> backend; None stands for every op that is not named
Asked = dict[str | None, str]


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise InputError(f"{source} is {backend!r}; choose {', '.join(BACKENDS)}, or leave it unset")
    return backend


def _parse(text: str | None, source: str) -> Asked:
    """Read `torch`, `mlp:torch,attention:sdpa`, or both kinds with commas between them."""
    asked: Asked = {}
    for part in text.split(",") if text else ():
        op, _, backend = part.strip().rpartition(":")
        asked[op or None] = _checked(backend, source)
    unknown = {op for op in asked if op is not None} - (_declared() if len(asked) > (None in asked) else set())
    if unknown:
        raise InputError(f"{source} names {', '.join(sorted(unknown))}; prismer info lists the ops")
    return asked


def _declared() -> set[str]:
    """The names of all ops, read from the sources: to import them would be a circle."""
    texts = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("*.py"))
    return {name for text in texts for name in re.findall(r'\bOp\(\s*name="(\w+)"', text)}


# of the whole process, not of a thread: on a GPU the backward pass runs in autograd's own threads
_asked: Asked = _parse(os.environ.get("PRISMER_BACKEND"), "PRISMER_BACKEND")
# the same as a part of keys
_asked_key = tuple(_asked.items())


def asked(op: str | None = None) -> str | None:
    """The backend that `use_backend` or PRISMER_BACKEND asks for: for an op, or for all that are not named."""
    return _asked.get(op, _asked.get(None)) if _asked else None


def choice_state() -> Hashable:
    """What choices depend on beside the calls: the backends asked for, and the tables of measured choices."""
    return _asked_key, tuning.generation


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Ask for backends inside the block, in every thread, whatever PRISMER_BACKEND says.

    Args:
        backend: one backend for every op ("torch"), one for an op ("mlp:torch"), or several of these with commas
            between them; None asks for the fastest.

    Raises:
        ValueError: if a name is not that of a backend or of an op.
    """
    global _asked, _asked_key
    before, _asked = _asked, _parse(backend, "backend")
    _asked_key = tuple(_asked.items())
    try:
        yield
    finally:
        _asked, _asked_key = before, tuple(before.items())


# who watches a call

# tensors of these types have no behaviour of their own
PLAIN = frozenset((Tensor, torch.nn.Parameter))
# torch has no arithmetic for these floating dtypes
NARROW = frozenset(
    dtype
    for name, dtype in vars(torch).items()
    if name.startswith(("float8", "float4")) and isinstance(dtype, torch.dtype)
)
_believed: bool | None = None


@contextmanager
def as_if_watched(answer: bool) -> Iterator[None]:
    """Make the ops believe, inside the block, that something watches them (True) or that nothing does (False).

    With False a counter sees the operators of a plain run one by one; with True a profile shows the registered ops.
    """
    global _believed
    before, _believed = _believed, answer
    try:
        yield
    finally:
        _believed = before


def _watched() -> bool:
    """Does a dispatch mode, a function mode or a transform of torch.func see each operator that is called?"""
    if _believed is not None:
        return _believed
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    )


def _untraced() -> bool:
    """Is this an eager call that nothing traces: no compiler, no mode, no transform, no dual level?"""
    return not (is_compiling() or forward_ad._current_level >= 0 or _watched())


def runs_directly(*args: Any) -> bool:
    """May a plan (`Op.resolve`) call an implementation itself, in place of the registered op?

    That is an eager call of plain tensors that nothing traces and that keeps no graph.
    """
    if not _untraced():
        return False
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    records = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not records and all(type(t) in PLAIN and t.dtype not in NARROW for t in tensors)


def is_partitioned(weight: Tensor) -> bool:
    """Does ZeRO-3 partition this weight? torch's own operators would save a view of it, which keeps it gathered."""
    return hasattr(weight, "ds_id")


def on_host(x: Tensor, op: str | None = None) -> bool:
    """Is `x` a plain tensor on the CPU, in an eager call with no backend asked for (of `op`) and nothing watching?

    There the host is the device: between products that empty its caches, a call of a Python function costs as much as
    adding two tensors.
    """
    return (
        type(x) in PLAIN
        and x.is_cpu
        and (not _asked or asked(op) is None)
        and x.dtype not in NARROW
        and not (is_compiling() or _watched())
    )


# the contract


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an op, and what it serves.

    Attributes:
        name: one of `BACKENDS`.
        devices: the device types that it serves; None is every device type.
        float64: whether it computes float64 exactly; if not, it refuses float64.
        refuses: a rule of its own, which gets the arguments of `Op.choose`: None, or the reason why it does not serve
            the call.
        slower: likewise, None, or the reason why another backend is faster. Not asked if the user asked for this one.
    """

    name: str
    devices: tuple[str, ...] | None = None
    float64: bool = True
    refuses: Callable[..., str | None] | None = None
    slower: Callable[..., str | None] | None = None

    def __post_init__(self) -> None:
        _checked(self.name, "the name of a backend")


# the three that most ops have. A native launch costs the host a fraction of Triton's, and these ops are short: native
# comes first where there is one
NATIVE = Backend(name="native", devices=("cpu", "cuda"), float64=False)
TRITON = Backend(name="triton", devices=("cuda",), float64=False)
TORCH = Backend(name="torch")

_library = torch.library.Library("prismer", "FRAGMENT")
_implementations: dict[str, Callable] = {}


def rows_and_width(x: Tensor) -> tuple[int, int]:
    """The number of rows of `x`, rounded up to a power of two, and the width of a row."""
    width = x.shape[-1] if x.dim() else 1
    return tuning.rows_class(x.numel() // max(width, 1)), width


# a call of an op for a measurement: the function, and its arguments
Example = tuple[Callable[..., Any], list[Any]]
# choices and plans that an op remembers
_MOST_REMEMBERED = 4096
# arguments of these types are part of the key of a plan
_CONSTANTS = frozenset((type(None), bool, int, float, str))
# what torch's own operators are called among the implementations of an op
HOST = "host"


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """One op: its definition and its implementations.

    Which implementation runs is decided in this order: the backend asked for; the measured choice for this class of
    calls (`prismer.kernels.tuning`); the prior. The prior is torch's own operators where `host` and `host_first` say
    so, else the first backend that serves the call.

    Attributes:
        name: torch knows the op as `prismer::<name>`, and its kernels in the native extension as
            `prismer_native::<name>`.
        reference: the definition, in plain PyTorch; None for a part of another op.
        backends: the implementations, the fastest first. The last one is `torch`, which serves every call.
        vendor: `torch` consists of the vendor's own kernels. Then it comes first on a GPU, until a measurement there
            says otherwise.
        host: whether torch's own operators do a call as well, with no more memory; gets the arguments of `route`. It
            counts for eager calls on a CPU, where a fused op pays only if it saves more than its own Python functions
            cost.
        host_first: likewise, whether the prior takes them; None where it takes them whenever it can.
        classify: the class of a call's shape, from the arguments of `route` or `choose`; None is `rows_and_width`.
        paths: names of what is measured where the op itself chooses, instead of its backends.
        example: a call of the public function for a measurement, from the class of its shape, a dtype and a device.
        depends: what else a plan of this op depends on, such as a setting of torch; asked at each call.
    """

    name: str
    reference: Callable | None
    backends: tuple[Backend, ...]
    vendor: bool = False
    host: Callable[..., bool] | None = None
    host_first: Callable[..., bool] | None = None
    classify: Callable[..., tuple[int, ...]] | None = None
    paths: tuple[str, ...] = ()
    example: Callable[[tuple[int, ...], torch.dtype, torch.device], Example] | None = None
    depends: Callable[[], Hashable] | None = None
    _picked: dict[tuple, str] = field(default_factory=dict, init=False, repr=False)
    _plans: dict[tuple, Callable] = field(default_factory=dict, init=False, repr=False)

    def shape_class(self, x: Any, *facts: Any) -> tuple[int, ...]:
        """The class of a call's shape, by which measured choices are found."""
        return rows_and_width(x) if self.classify is None else self.classify(x, *facts)

    def measured(self, x: Any, shape: tuple[int, ...], gradient: bool) -> str | None:
        """The measured choice for a class of calls, or None."""
        return tuning.choice(x.device.type, (self.name, x.dtype, gradient, shape))

    def resolve(self, plan: Callable[..., Callable], *args: Any) -> Callable:
        """What runs a call: what `plan(*args)` returns, which is remembered for calls like this one.

        To check the arguments of a short call and to choose for it costs more than to run it. Both follow from shapes,
        strides, dtypes, devices and options, and from what choices depend on (`choice_state`): all of these are the
        key. A call that is traced is planned each time, and the registered op then runs.

        Args:
            plan: checks the arguments and returns a function that runs such a call. What it returns must hold no
                tensor, nor anything of the arguments but what is part of the key. One function for each op.
            args: tensors, numbers, strings and None, all that the plan depends on.
        """
        # as `_untraced`, whose call would cost a tenth of the look-up
        if is_compiling() or forward_ad._current_level >= 0 or _watched():
            return plan(*args)
        key: list[Any] = [tuning.generation, _asked_key, torch.is_grad_enabled()]
        if self.depends is not None:
            key.append(self.depends())
        for arg in args:
            if type(arg) in PLAIN:
                layout = arg.is_contiguous() or arg.stride()
                key += arg.shape, layout, arg.dtype, arg.device, arg.requires_grad
            elif type(arg) in _CONSTANTS:
                key.append(arg)
            else:
                return plan(*args)
        whole = tuple(key)
        found = self._plans.get(whole)
        if found is None:
            found = plan(*args)
            if len(self._plans) >= _MOST_REMEMBERED:
                self._plans.clear()
            self._plans[whole] = found
        return found

    def route(self, x: Tensor, *facts: Any) -> str:
        """How a public function runs a call: as "reference", on torch's own operators ("host"), or as the "op".

        Args:
            x: the tensor that decides.
            facts: more arguments for the rules of this op. The call keeps a graph if one of them needs a gradient.
        """
        if _asked and (backend := asked(self.name)) is not None:
            return "reference" if backend == "reference" else "op"
        if self.host is None or not on_host(x, self.name) or not self.host(x, *facts):
            return "op"
        measured = None
        if tuning.knows("cpu", self.name):
            gradient = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *facts))
            shape = self.shape_class(x, *facts)
            measured = self.measured(x, shape, gradient)
        if measured is None:
            on_torch = self.host_first is None or self.host_first(x, *facts)
        else:
            on_torch = measured == HOST
        if tuning.is_recording():
            tuning.record("cpu", (self.name, x.dtype, gradient, shape), HOST if on_torch else self.usable("cpu")[0])
        return HOST if on_torch else "op"

    def choose(self, x: Any, *facts: Any, gradient: bool = False, asked_for: str | None = None) -> str:
        """The name of the backend that runs a call.

        An op without the backend asked for ignores the request (there is no native loss). If the op has the backend,
        but it cannot run here or does not serve the call, the request is refused. Without a request the measured choice
        runs, else the first backend that serves the call, and the reason why another was passed over is logged once
        (logger `prismer.kernels`, level INFO). `reference` means `torch` here: a public function runs the definition
        before it comes to a choice.

        Args:
            x: the tensor that decides, or anything else with `device` and `dtype`.
            facts: more arguments for the rules of the backends.
            gradient: this is the backward pass.
            asked_for: a backend that precedes `use_backend` and PRISMER_BACKEND.

        Raises:
            RuntimeError: if the backend asked for exists and cannot run this call.
        """
        asked_for = asked_for or asked(self.name)
        if asked_for is not None:
            asked_for = "torch" if asked_for == "reference" else asked_for
            for backend in self.backends:
                if backend.name == asked_for:
                    reason = self._unusable(backend, x.device.type) or self._refusal(backend, x, facts)
                    if reason is not None:
                        raise MachineError(f"backend {asked_for} was asked for, but {reason}")
                    return asked_for
        if self.paths:
            # the op itself looks up what was measured
            return self.pick(x, *facts)
        shape = self.shape_class(x, *facts)
        # what was chosen before, unless a table came or went since
        key = (tuning.generation, x.device.type, x.dtype, gradient, shape)
        picked = self._picked.get(key) if self._has_no_rules else None
        if picked is None:
            if len(self._picked) >= _MOST_REMEMBERED:
                self._picked.clear()
            picked = self._picked[key] = self.pick(x, *facts, measured=self.measured(x, shape, gradient))
            tuning.record(x.device.type, (self.name, x.dtype, gradient, shape), picked)
        return picked

    def pick(self, x: Any, *facts: Any, measured: str | None = None) -> str:
        """The backend of a call for which none was asked: the measured one if it serves the call, else the prior."""
        usable = _usable(self, x.device.type)
        for backend in usable:
            if backend.name == measured and self._refusal(backend, x, facts) is None:
                return backend.name
        for backend in usable:
            reason = self._refusal(backend, x, facts)
            if reason is None and backend.slower is not None:
                reason = backend.slower(x, *facts)
            if reason is None:
                return backend.name
            _log_once(self.name, backend.name, reason)
        raise AssertionError(f"{self.name} has no backend for {x.device}")

    def usable(self, device_type: str) -> list[str]:
        """The backends that can run on a device type, in the order of the prior."""
        return [backend.name for backend in _usable(self, device_type)]

    @functools.cached_property
    def _has_no_rules(self) -> bool:
        """Does the class of a call decide alone which backends serve it?"""
        return all(backend.refuses is None and backend.slower is None for backend in self.backends)

    def _refusal(self, backend: Backend, x: Any, facts: tuple) -> str | None:
        """None if `backend` serves the call, else the reason why not."""
        if not backend.float64 and x.dtype == torch.float64:
            return f"{backend.name} {self.name} computes in fp32, and the call is in float64"
        return None if backend.refuses is None else backend.refuses(x, *facts)

    def _unusable(self, backend: Backend, device_type: str) -> str | None:
        """None if `backend` can run this op on tensors of a device type on this machine, else the reason why not."""
        name = backend.name
        if name == "triton":
            reason = machine.triton_missing()
            if reason is None and device_type != "cuda" and not machine.interpreting():
                reason = (
                    f"triton {self.name} serves cuda tensors, not {device_type}; "
                    "TRITON_INTERPRET=1 runs it on the CPU, slowly"
                )
            return reason
        if backend.devices is not None and device_type not in backend.devices:
            return f"{name} {self.name} serves {' and '.join(backend.devices)} tensors, not {device_type}"
        if name == "native":
            reason = machine.native_missing(device_type)
            if reason is None and not machine.has_native(self.name, device_type):
                reason = f"prismer._C was built from older sources, without {self.name}; {machine.BUILD}"
            return reason
        return machine.package_missing(name) if name in machine.PACKAGES else None

    def register(
        self,
        implementation: Callable,
        *,
        fake: Callable,
        suffix: str = "",
        mutates: tuple[str, ...] = (),
        setup_context: Callable | None = None,
        backward: Callable | None = None,
    ) -> Callable:
        """Register `prismer::<name><suffix>` with torch: opaque to torch.compile, with shapes from `fake`.

        A call with plain tensors that nothing watches (no compiler, no dispatch mode, no function transform, no tensor
        subclass) runs the implementation directly, and its gradient as an autograd function: the way through the
        dispatcher to an op of Python, with generated autograd, costs the host several times as much.

        Args:
            implementation: serves every device; its annotated signature is the schema. It chooses the backend itself,
                and returns fresh contiguous tensors.
            fake: the same outputs without data. Its parameters are those arguments of the implementation that it
                needs, by name.
            suffix: of the name, such as "_backward".
            mutates: names of the arguments that the implementation changes in place.
            setup_context, backward: the gradient, as `torch.library.register_autograd` takes it. `setup_context` is
                called only if an input needs a gradient. The gradient of an output that nothing used is None.
                `backward` is called only if some output has one. It may return gradients of the first inputs alone,
                and of inputs that need none: those are dropped.

        Returns:
            The op, to be called as a function with all arguments in order.
        """
        name = self.name + suffix
        # a graph takes integers for constants
        schema = torch.library.infer_schema(implementation, mutates_args=mutates).replace("SymInt", "int")
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"prismer::{name}", _taking_all(fake, implementation), lib=_library)
        _implementations[name] = implementation
        differentiable = None
        if backward is not None:
            setup_context, backward = _where_needed(setup_context, backward)
            torch.library.register_autograd(f"prismer::{name}", backward, setup_context=setup_context, lib=_library)
            differentiable = _autograd_function(name, implementation, setup_context, backward)
        op = getattr(torch.ops.prismer, name)

        def call(*args: Any) -> Any:
            if is_compiling():
                return op(*args)
            if forward_ad._current_level >= 0:
                # otherwise jvp silently returns zeros
                raise NotImplementedError(
                    f"prismer::{name} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
                    "differentiate in reverse, or leave the dual level for this call"
                )
            if _watched():
                return op(*args)
            gradient = False
            for arg in args:
                if isinstance(arg, Tensor):
                    if type(arg) not in PLAIN:
                        return op(*args)
                    if arg.dtype in NARROW:
                        raise ValueError(
                            f"{name} was given a tensor of {arg.dtype}, which is for storage alone; cast it first, "
                            "with its scale if it has one: fp32, bf16, fp16 and float64 are served"
                        )
                    gradient = gradient or arg.requires_grad
            if gradient and torch.is_grad_enabled():
                # an op without a gradient says so itself
                return op(*args) if differentiable is None else differentiable.apply(*args)
            return implementation(*args)

        return call


@functools.cache
def _usable(op: Op, device_type: str) -> tuple[Backend, ...]:
    """The backends of an op that can run on a device type, in the order of the prior."""
    # Triton's interpreter is for proofs: it is slower than anything, and only taken when asked for
    interpreted = "triton" if device_type != "cuda" else None
    usable = [b for b in op.backends if b.name != interpreted and op._unusable(b, device_type) is None]
    if op.vendor and device_type == "cuda":
        usable.sort(key=lambda backend: backend.name != "torch")
    return tuple(usable)


@functools.lru_cache(maxsize=256)
def _log_once(op: str, backend: str, reason: str) -> None:
    _log.info("%s does not run on %s here: %s", op, backend, reason)


def _taking_all(fake: Callable, implementation: Callable) -> Callable:
    """`fake`, called with all arguments of `implementation`."""
    names = list(inspect.signature(implementation).parameters)
    wanted = [names.index(name) for name in inspect.signature(fake).parameters]
    return lambda *args: fake(*(args[i] for i in wanted))


def _where_needed(setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Both functions of a gradient, with what `Op.register` promises them."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad):
            setup_context(ctx, inputs, output)

    def gradient(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        grads = () if all(dout is None for dout in douts) else backward(ctx, *douts)
        return tuple(grad if need else None for grad, need in itertools.zip_longest(grads, needs))

    return setup, gradient


def _autograd_function(
    name: str, implementation: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = implementation(*args)
        setup_context(ctx, args, output)
        return output

    members = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    return type(name, (torch.autograd.Function,), members)


def implementation(name: str) -> Callable:
    """What runs behind `prismer::<name>` on every device, for those who count the operators inside."""
    return _implementations[name]


# all ops


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One line of `backends()`: whether `backend` can serve `op` on this machine, and if not, why."""

    op: str
    backend: str
    usable: bool
    reason: str


def op_modules() -> list[ModuleType]:
    """Every module of this folder and of its packages, imported, in alphabetical order."""
    found = pkgutil.walk_packages([str(Path(__file__).parent)], "prismer.kernels.")
    return [importlib.import_module(name) for name in sorted(module.name for module in found)]


def all_ops() -> list[Op]:
    """Every op that a module of this folder declares."""
    found = (value for module in op_modules() for value in vars(module).values() if isinstance(value, Op))
    return list(dict.fromkeys(found))


def backends() -> list[BackendRow]:
    """Every op with its backends, and which of them can run on this machine."""
    gpu = torch.cuda.is_available()
    rows = []
    for op in all_ops():
        for backend in op.backends:
            device = "cuda" if gpu and (backend.devices is None or "cuda" in backend.devices) else "cpu"
            reason = op._unusable(backend, device)
            rows.append(BackendRow(op=op.name, backend=backend.name, usable=reason is None, reason=reason or ""))
        if op.reference is not None:
            rows.append(BackendRow(op=op.name, backend="reference", usable=True, reason=""))
    return rows
