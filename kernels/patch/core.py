"""Put the fused ops into somebody else's model, report what was replaced, and take them out again.

    report = apply_to(model)
    print(report)
    report.undo()

A module is patched by changing its class: to a subclass of its own class whose `forward` calls the fused op.
Parameters, state-dict keys, hooks, devices, optimizers and `isinstance` stay as they are, and undoing restores the
old class. Supported families, and the reasons to keep a module as it is, are listed in towers.py, qwen_vl.py,
vision.py, text.py, resamplers.py and loss.py.

A fused forward reads the weights of the layers that it covers and does not call these layers. At every call it
therefore checks that each of them is still plain (prismer.kernels.layer_state). Once a layer is quantised, pruned,
hooked, wrapped, offloaded or sharded, the module runs its original forward and warns once. It returns to the fused op
when the layer is plain again.

Patched modules run their original forward under `torch.autocast` (cast the model with `model.bfloat16()` instead),
under the transforms of `torch.func` and in `torch.jit.trace`. The fused ops have no second derivative. With ZeRO-3,
patch before the engine is built: a module whose layers have ZeRO-3's hooks is kept.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from prismer.kernels.patch import loss, qwen_vl, resamplers, text, towers, vision
from prismer.kernels.patch.rules import PARTS, Rule, is_patched, qualified_name

RULES = (*towers.RULES, *qwen_vl.RULES, *vision.RULES, *text.RULES, *resamplers.RULES, *loss.RULES)
# the attribute in which a patched module keeps its LastCheck
_LAST_CHECK = "_prismer_last_check"


@dataclass(frozen=True)
class ReportRow:
    """What happened to one module.

    Attributes:
        name: of the module in the model.
        class_name: its class.
        part: of the rule that fits it, one of PARTS.
        reason: why it was kept; None if it was replaced.
    """

    name: str
    class_name: str
    part: str
    reason: str | None


@dataclass
class PatchReport:
    """What `apply_to` did.

    Attributes:
        rows: one for every module that a rule fits, in the order of the model.
    """

    rows: list[ReportRow]
    _changed: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that were replaced."""
        return [row.name for row in self.rows if row.reason is None]

    def undo(self) -> None:
        """Restore the class of every module; calling it twice does no harm."""
        for module in self._changed:
            _restore_class(module)
        self._changed.clear()

    def __str__(self) -> str:
        groups = Counter((row.part, row.class_name, row.reason) for row in self.rows)
        lines = [f"{len(self.replaced)} of {len(self.rows)} modules run on fused ops"]
        for (part, class_name, reason), count in groups.items():
            outcome = "replaced" if reason is None else f"kept: {reason}"
            lines.append(f"  {part:<10} {count:>4} x {class_name:<32} {outcome}")
        return "\n".join(lines)


def apply_to(model: nn.Module, which: str | Sequence[str] = PARTS, *, strict: bool = False) -> PatchReport:
    """Replace the supported modules of a model.

    Args:
        model: any model, on any device, before or after `.to()` and `torch.compile`, before ZeRO-3's engine is built.
        which: the parts to replace, of PARTS.
        strict: whether a module that has to be kept is an error.

    Returns:
        The report; its `undo` restores the model.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if a part is unknown, the model holds no supported module or is patched already, or `strict` is set
            and a module has to be kept. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module itself")
    wanted = (which,) if isinstance(which, str) else tuple(which)
    for part in wanted:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    rules = [rule for rule in RULES if rule.part in wanted]
    rows: list[ReportRow] = []
    changes: list[tuple[nn.Module, type]] = []
    covered: set[int] = set()
    for name, module in model.named_modules():
        if is_patched(module):
            raise ValueError(
                f"{name or 'the model'} is patched already; call undo() of its report first, or restore(model)"
            )
        kind: Any = type(module)
        rule = _find_rule(kind, rules)
        if rule is None or id(module) in covered:
            continue
        reason = _reason_class_is_hidden(rule, module) or rule.reason_to_keep(module)
        rows.append(ReportRow(name, kind.__name__, rule.part, reason))
        if reason is None:
            changes.append((module, _patched_class(kind, rule, False)))
            covered.update(id(child) for _, child in rule.covered(module))
            if rule.find_head is not None:
                head: Any = module.get_submodule(rule.find_head(module))
                changes.append((head, _patched_class(head.__class__, rule, True)))
    kept = [row for row in rows if row.reason is not None]
    if not rows:
        raise ValueError(
            f"{type(model).__name__} holds no supported module for {', '.join(wanted)}; "
            f"build it from prismer.kernels.modules, or call the ops directly"
        )
    if strict and kept:
        first = kept[0]
        raise ValueError(
            f"{first.name or first.class_name} ({first.class_name}) cannot be replaced: {first.reason}; "
            f"{len(kept)} of {len(rows)} modules have to be kept; leave strict out to replace the others"
        )
    changed = []
    try:
        for module, patched_class in changes:
            module.__class__ = patched_class
            changed.append(module)
        for module in changed:
            _record_check(module)
    except Exception:
        # a module may guard its attributes: then none is changed
        for module in changed:
            _restore_class(module)
        raise
    return PatchReport(rows, changed)


def restore(model: nn.Module) -> int:
    """Restore the class of every patched module of a model; for a copy or an unpickled model, which have no report.

    Returns:
        The number of modules that were patched.
    """
    patched = [module for module in model.modules() if is_patched(module)]
    for module in patched:
        _restore_class(module)
    return len(patched)


def _find_rule(kind: type, rules: Sequence[Rule]) -> Rule | None:
    """The rule that names a class, or else the first whose pattern fits."""
    name = qualified_name(kind)
    exact = next((rule for rule in rules if rule.target == name), None)
    return exact or next((rule for rule in rules if "*" in rule.target and fnmatchcase(name, rule.target)), None)


def _reason_class_is_hidden(rule: Rule, module: nn.Module) -> str | None:
    """Why the methods of a patched class would not be called."""
    for name in rule.methods:
        if name in module.__dict__:
            return f"it has a {name} on the instance (offloaded or wrapped), which hides that of its class"
    return None


# the classes of patched modules


@functools.cache
def _patched_class(original: Any, rule: Rule, is_head: bool) -> type:
    """The subclass of `original` that runs on fused ops; `is_head` for the output layer that the rule finds."""
    methods = dict(rule.head_methods if is_head else rule.methods)
    for name, method in methods.items():
        plain = getattr(original, name, None)
        if callable(method) and callable(plain):
            methods[name] = _with_fallback(method, plain, None if is_head else rule)
    # ZeRO-3 gathers the whole module on entry: forward reads its children's parameters without calling them
    zero = {"_z3_leaf": True} if rule.reads and not is_head else {}
    body = {
        **methods,
        **zero,
        "unpatched_class": original,
        "_prismer_rule": rule,
        "_prismer_is_head": is_head,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
    }
    return type(original.__name__, (original,), body)


def _restore_class(module: nn.Module) -> None:
    if is_patched(module):
        module.__class__ = _without_patch(type(module))
        module.__dict__.pop(_LAST_CHECK, None)


def _without_patch(kind: Any) -> type:
    """The original of a patched class. Classes that torch derived from it since (parametrised) are derived again."""
    if "unpatched_class" in vars(kind):
        return kind.unpatched_class
    bases = tuple(_without_patch(base) if hasattr(base, "unpatched_class") else base for base in kind.__bases__)
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, body)


def _reduce(self: Any, protocol: int) -> Any:
    """Copy and pickle by the original class: pickle cannot find a class that was made here by its name."""
    kind: Any = type(self)
    # a class that somebody has derived from it since may know better
    if "unpatched_class" not in vars(kind):
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    state = {name: value for name, value in state.items() if name != _LAST_CHECK}
    return _rebuild, (kind.unpatched_class, kind._prismer_rule.target, kind._prismer_is_head), state


def _rebuild(original: type, target: str, is_head: bool) -> Any:
    (rule,) = (rule for rule in RULES if rule.target == target)
    patched: Any = _patched_class(original, rule, is_head)
    return patched.__new__(patched)


def _set_state(self: Any, state: dict) -> None:
    type(self).unpatched_class.__setstate__(self, state)
    rule = self._prismer_rule
    # record now, since a compiler may see the copy before its first call
    if not self._prismer_is_head and rule.find_head is None and rule.reason_to_keep(self) is None:
        _record_check(self)


# checks at call time


class LastCheck(NamedTuple):
    """The last thorough check of a patched module.

    Attributes:
        fingerprint: of the module at that time.
        reason: why the fused forward does not fit; None if it does.
        warned: the reasons that were warned about already.
        head_path: names on the way to the patched output layer.
    """

    fingerprint: list
    reason: str | None
    warned: frozenset[str]
    head_path: tuple[str, ...]


def _with_fallback(method: Callable, plain: Callable, rule: Rule | None) -> Callable:
    """`method`, or `plain` for calls and states of the module that `method` does not support."""

    @functools.wraps(plain)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # autocast does not reach the ops, which take dtypes as they come
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            return plain(self, *args, **kwargs)
        # torch.func and torch.jit.trace need torch's own operators
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            return plain(self, *args, **kwargs)
        if rule is not None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not _fused_forward_fits(self, rule, x):
                return plain(self, *args, **kwargs)
        result = method(self, *args, **kwargs)
        return plain(self, *args, **kwargs) if result is NotImplemented else result

    return call


def _fused_forward_fits(module: nn.Module, rule: Rule, x: object) -> bool:
    """Whether the layers that the fused forward covers are still plain; warns once for each reason why not."""
    last: LastCheck | None = module.__dict__.get(_LAST_CHECK)
    head_path = () if last is None else last.head_path
    now = rule.fingerprint(module, head_path, x)
    if last is not None and last.fingerprint == now:
        return last.reason is None
    # a thorough check cannot run inside a graph; the attributes that `fingerprint` has read guard the graph
    if torch.compiler.is_compiling():
        return False
    if last is None and rule.find_head is not None:
        head_path = _find_head_path(rule, module)
        now = rule.fingerprint(module, head_path, x)
    reason = rule.reason_to_keep(module, x)
    warned = frozenset() if last is None else last.warned
    if reason is not None and reason not in warned:
        warned |= {reason}
        warnings.warn(f"{type(module).__name__} is patched but runs its original forward: {reason}", stacklevel=4)
    module.__dict__[_LAST_CHECK] = LastCheck(now, reason, warned, head_path)
    return reason is None


def _record_check(module: Any) -> None:
    """Note that the fused forward fits a module which has just been patched."""
    if not module._prismer_is_head:
        rule = module._prismer_rule
        head_path = _find_head_path(rule, module)
        module.__dict__[_LAST_CHECK] = LastCheck(rule.fingerprint(module, head_path), None, frozenset(), head_path)


def _find_head_path(rule: Rule, module: nn.Module) -> tuple[str, ...]:
    return () if rule.find_head is None else tuple(rule.find_head(module).split("."))
