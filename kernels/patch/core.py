"""Put the fused ops into somebody else's model, see what was replaced, and take them out again.

    report = apply_to(model)
    print(report)
    report.undo()

A module is patched by giving it another class: a subclass of its own whose `forward` calls the fused op. Parameters,
state-dict keys, hooks, devices, optimizers and `isinstance` stay as they are, before or after `.to()`, and
undoing gives the old class back. What families are known, and when a module of one is kept as it is, is said by the
rules of `patch_towers.py`, `patch_text.py`, `patch_resamplers.py` and `patch_loss.py`. For ZeRO-3, patch before the
engine is built: its hooks on every layer would keep most modules.

A fused forward does not call the layers that it covers. So it asks at every call whether they still are what the rule
knows (`patch_state.py`): once one of them is quantised, pruned, hooked, wrapped, offloaded or sharded, the module runs
its own forward, says so in one warning, and goes back to the fused op when the layers do.

Two things follow. Under `torch.autocast` every module runs its own forward: cast the model (`model.bfloat16()`) to have
the fused ops. Under the transforms of `torch.func` and `torch.jit.trace` it does too. And the fused ops have no second
derivative.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module

import torch
from torch import nn

from prismer.kernels.layer_state import DTYPES, has_global_hooks, state_of, why_not

PARTS = ("layer_norm", "mlp", "attention", "resampler", "loss")
"""What `which` selects."""

_RULE_FILES = ("towers", "text", "resamplers", "loss")
_SEEN = "_prismer_seen"
# where a patched module keeps the state that was judged last, the reason that was found, and those told already


@dataclass(frozen=True)
class Rule:
    """How modules of one class are replaced.

    A method replaces the one of its name. It finds the class that it stands in for in `self.prismer_class`, so that
    `self.prismer_class.forward(self, ...)` is the way back for a call that the fused op does not serve.

    Attributes:
        part: one of PARTS.
        target: the class, "package.module.Name", or a pattern of such names with `*`; exactly this class, since a
            subclass may have another forward.
        methods: what the subclass gets: "forward" and whatever else its callers use.
        check: why an instance has to be kept, one clause, or None if it can be replaced.
        children: names of the sub-modules whose parameters `forward` reads without calling them, as
            `get_submodule` takes them. They must be plain linears or norms without hooks, or the module is kept.
        covers: which sub-modules are part of the fused forward, so that they are not patched themselves: all, none, or
            these, with everything inside. Hooks on one of them keep the module.
        inner: names the sub-modules that get a subclass of their own too, from the module; and its methods.
        one_dtype: whether the forward takes norms of the dtype of the matrices alone.
    """

    part: str
    target: str
    methods: dict[str, Callable]
    check: Callable[[nn.Module], str | None] = lambda module: None
    children: tuple[str, ...] = ()
    covers: bool | tuple[str, ...] = True
    inner: tuple[Callable[[nn.Module], list[str]], dict[str, Callable]] | None = None
    one_dtype: bool = False

    def covered(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and modules inside `module` that the fused forward stands in for."""
        if self.covers is False:
            return []
        every = [(name, child) for name, child in module.named_modules() if name]
        if self.covers is True:
            return every
        return [pair for pair in every if any(f"{pair[0]}.".startswith(f"{c}.") for c in self.covers)]

    def state(self, module: nn.Module, paths: tuple[tuple[str, ...], ...], x: object = None) -> list:
        """`state_of` a module with this rule; `paths` are the names on the way to its inner modules."""
        children = module._modules
        if self.covers is True:
            covered = children.values()
        else:
            covered = [children.get(name) for name in self.covers or ()]
        return state_of(module, covered, paths, x, self.one_dtype)


@dataclass(frozen=True)
class Row:
    """What happened to one module: its name in the model, class, part, and why it was kept (None: replaced)."""

    name: str
    kind: str
    part: str
    reason: str | None


@dataclass
class Report:
    """What `apply_to` did.

    Attributes:
        rows: every module that a rule names, in the order of the model.
    """

    rows: list[Row]
    _changed: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that run on fused ops now."""
        return [row.name for row in self.rows if row.reason is None]

    def undo(self) -> None:
        """Give every module its own class back; a second time does nothing."""
        for module in self._changed:
            _restore(module)
        self._changed.clear()

    def __str__(self) -> str:
        groups = Counter((row.part, row.kind, row.reason) for row in self.rows)
        lines = [f"{len(self.replaced)} of {len(self.rows)} modules run on fused ops"]
        for (part, kind, reason), count in groups.items():
            fate = "replaced" if reason is None else f"kept: {reason}"
            lines.append(f"  {part:<10} {count:>4} x {kind:<32} {fate}")
        return "\n".join(lines)


def apply_to(model: nn.Module, which: str | Sequence[str] = PARTS, *, strict: bool = False) -> Report:
    """Replace the modules of a model that are known here.

    Args:
        model: any; on any device, before or after `.to()` and `torch.compile`, before ZeRO-3's engine is built.
        which: parts to replace, of PARTS.
        strict: whether a module that has to be kept is an error.

    Returns:
        The report; its `undo` restores the model.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if a part is unknown, nothing in the model is known here, the model is patched already, or
            `strict` and a module has to be kept. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module itself")
    wanted = (which,) if isinstance(which, str) else tuple(which)
    for part in wanted:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    rules = [rule for rule in all_rules() if rule.part in wanted]
    rows, changes, covered = [], [], set()
    for name, module in model.named_modules():
        if is_patched(module):
            raise ValueError(
                f"{name or 'the model'} runs on fused ops already; call undo() of its report first, or restore(model)"
            )
        rule = find_rule(type(module), rules)
        if rule is None or id(module) in covered:
            continue
        reason = _not_called(rule, module) or reason_to_keep(rule, module)
        rows.append(Row(name, type(module).__name__, rule.part, reason))
        if reason is None:
            changes.append((module, fused_class(type(module), rule.target, False)))
            covered.update(id(child) for _, child in rule.covered(module))
            for inner in _inner(rule, module):
                changes.append((inner, fused_class(type(inner), rule.target, True)))
    kept = [row for row in rows if row.reason is not None]
    if not rows:
        raise ValueError(
            f"{type(model).__name__} holds no module that is known here for {', '.join(wanted)}; "
            f"build it from prismer.kernels.modules, or call the ops directly"
        )
    if strict and kept:
        first = kept[0]
        raise ValueError(
            f"{first.name or first.kind} ({first.kind}) has to be kept: {first.reason}; {len(kept)} modules in all; "
            f"leave strict out to replace the other {len(rows) - len(kept)}"
        )
    done = []
    try:
        for module, fused in changes:
            module.__class__ = fused
            done.append(module)
        for module in done:
            _accept(module)
    except Exception:  # a module may guard its attributes: then none is changed
        for module in done:
            _restore(module)
        raise
    return Report(rows, done)


def restore(model: nn.Module) -> int:
    """Give every patched module of a model its own class back, where the report is not at hand: a copy, a pickle.

    Returns:
        How many modules were patched.
    """
    patched = [module for module in model.modules() if is_patched(module)]
    for module in patched:
        _restore(module)
    return len(patched)


def is_patched(module: nn.Module) -> bool:
    """Whether this module runs on fused ops."""
    return getattr(type(module), "prismer_class", None) is not None


def _restore(module: nn.Module) -> None:
    if is_patched(module):
        module.__class__ = _unpatched(type(module))
        module.__dict__.pop(_SEEN, None)


def _unpatched(kind: type) -> type:
    """The class that a patched module had; what torch has derived since (parametrised, sharded) stays derived."""
    if "prismer_class" in vars(kind):
        return kind.prismer_class
    bases = tuple(_unpatched(base) if hasattr(base, "prismer_class") else base for base in kind.__bases__)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, body)


def qualified_name(kind: type) -> str:
    """ "package.module.Name" of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """The rules of every family."""
    return tuple(rule for name in _RULE_FILES for rule in import_module(f"prismer.kernels.patch.{name}").RULES)


def find_rule(kind: type, rules: Sequence[Rule]) -> Rule | None:
    """The rule for a class: that of its name, or else the first whose pattern fits."""
    name = qualified_name(kind)
    exact = next((rule for rule in rules if rule.target == name), None)
    return exact or next((rule for rule in rules if "*" in rule.target and fnmatchcase(name, rule.target)), None)


@functools.cache
def fused_class(original: type, target: str, inner: bool) -> type:
    """The subclass of `original` that runs on fused ops, made once; `inner` for a rule's inner modules."""
    (rule,) = (rule for rule in all_rules() if rule.target == target)
    methods = rule.inner[1] if inner else rule.methods
    # ZeRO-3 gathers the whole module on entry: forward reads its children's parameters without calling them
    extra = {"_z3_leaf": True} if rule.children and not inner else {}
    body = {
        **_with_way_back(methods, original, None if inner else rule),
        **extra,
        "prismer_class": original,
        "_prismer_origin": (target, inner),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
    }
    return type(original.__name__, (original,), body)


def _with_way_back(methods: Mapping[str, Callable], original: type, rule: Rule | None) -> dict[str, Callable]:
    """The methods, each giving way to the original's where it does not serve the call or the modules as they are."""
    wrapped = dict(methods)
    for name, method in methods.items():
        plain = getattr(original, name, None)
        if callable(method) and callable(plain):
            wrapped[name] = _with_plain(method, plain, rule)
    return wrapped


def _with_plain(method: Callable, plain: Callable, rule: Rule | None) -> Callable:
    @functools.wraps(plain)
    def call(self, *args, **kwargs):
        # the ops take dtypes as they come
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            return plain(self, *args, **kwargs)
        # neither torch.func's transforms nor torch.jit.trace can look into the ops
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            return plain(self, *args, **kwargs)
        if rule is not None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not _still_fits(self, rule, x):
                return plain(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call


def _still_fits(module: nn.Module, rule: Rule, x: object) -> bool:
    """Whether the fused forward may stand in for what it covers, as it is now; once, a warning says why not."""
    seen = module.__dict__.get(_SEEN)
    paths = () if rule.inner is None or seen is None else seen[3]
    state = rule.state(module, paths, x)
    if seen is not None and seen[0] == state:
        return seen[1] is None
    if torch.compiler.is_compiling():
        # a rule cannot be asked inside a graph; what the state has read guards the graph
        return False
    if rule.inner is not None and seen is None:
        paths = _paths(rule, module)
        state = rule.state(module, paths, x)
    reason = reason_to_keep(rule, module, x)
    told = set() if seen is None else seen[2]
    if reason is not None and reason not in told:
        told = {*told, reason}
        warnings.warn(f"{type(module).__name__} was patched, and runs its own forward now: {reason}", stacklevel=4)
    module.__dict__[_SEEN] = state, reason, told, paths
    return reason is None


def _accept(module: nn.Module) -> None:
    """Note the state of a module that has just been patched."""
    rule, inner = _origin(type(module))
    if not inner:
        paths = _paths(rule, module)
        module.__dict__[_SEEN] = rule.state(module, paths), None, set(), paths


def _origin(kind: type) -> tuple[Rule, bool]:
    """The rule that a patched class was made for, and whether it is that of an inner module."""
    target, inner = kind._prismer_origin
    return next(rule for rule in all_rules() if rule.target == target), inner


def _paths(rule: Rule, module: nn.Module) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name.split(".")) for name in rule.inner[0](module)) if rule.inner else ()


def _not_called(rule: Rule, module: nn.Module) -> str | None:
    """Why a method of another class would not be called at all."""
    for name in rule.methods:
        if name in module.__dict__:
            return f"it has a {name} on the instance (offloaded or wrapped), which hides that of its class"
    return None


def reason_to_keep(rule: Rule, module: nn.Module, x: object = None) -> str | None:
    """Why this module cannot be replaced, or not for the input `x`; None if it can."""
    for name in rule.children:
        try:
            child = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        if not isinstance(child, nn.Module) or not (_is_linear(child) or _is_norm(child)):
            return f"its {name} is a {type(child).__name__} (quantised, adapted or wrapped), not a plain layer"
        if _is_norm(child) and len(child.normalized_shape) != 1:
            return f"its {name} normalises {len(child.normalized_shape)} dimensions, the fused one the last alone"
    reason = why_not("", module, x, rule.one_dtype, hooks=False)
    if reason is not None:
        return reason
    covered = rule.covered(module)
    for name, child in covered:
        reason = why_not(name, child, x, rule.one_dtype)
        if reason is not None:
            return reason
    if covered and has_global_hooks():
        return "hooks on every module are set (torch.nn.modules.module), which a fused forward would not call"
    for name, parameter in module.named_parameters():
        if parameter.dtype not in DTYPES:
            return f"its {name} is {parameter.dtype}, and the fused ops take fp32, bf16, fp16 or float64"
    return rule.check(module)


def unlike(module: nn.Module, kinds: Mapping[str, str | tuple[str, ...]]) -> str | None:
    """None if the sub-modules named are of the classes given, by their full names; else the reason."""
    for name, wanted in kinds.items():
        try:
            child = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        if qualified_name(own_class(child)) not in ((wanted,) if isinstance(wanted, str) else wanted):
            return f"its {name} is a {type(child).__name__} (quantised, adapted or another), not a {wanted}"
    return None


def _inner(rule: Rule, module: nn.Module) -> list[nn.Module]:
    names = rule.inner[0](module) if rule.inner else []
    return [module.get_submodule(name) for name in names]


def own_class(module: nn.Module) -> type:
    """The class of a module, patched or not."""
    kind = type(module)
    return vars(kind).get("prismer_class", kind)


def _is_linear(module: nn.Module) -> bool:
    # the second is nn.MultiheadAttention's own name for its output projection
    return type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _is_norm(module: nn.Module) -> bool:
    kind = own_class(module)
    if kind is nn.LayerNorm:
        return True
    rule = find_rule(kind, all_rules())
    return rule is not None and rule.part == "layer_norm" and isinstance(module, nn.LayerNorm)


def _reduce(self, protocol):
    # copies and pickles: a class made here has no name that pickle could find it by
    kind = type(self)
    if "prismer_class" not in vars(kind):  # derived from it since, by somebody who may know how
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    state = {name: value for name, value in state.items() if name != _SEEN}
    return _rebuild, (kind.prismer_class, *kind._prismer_origin), state


def _rebuild(original: type, target: str, inner: bool) -> nn.Module:
    fused = fused_class(original, target, inner)
    return fused.__new__(fused)


def _set_state(self, state):
    type(self).prismer_class.__setstate__(self, state)
    rule, inner = _origin(type(self))
    if not inner and rule.inner is None and reason_to_keep(rule, self) is None:
        # a compiler may see the copy before it is called
        _accept(self)
