"""Put the fused ops into somebody else's model, see what was replaced, and take them out again.

    report = apply_to(model)
    print(report)
    report.undo()

A module is patched by giving it another class: a subclass of its own whose `forward` calls the fused op. Parameters,
state-dict keys, hooks, devices, optimizers and `isinstance` stay as they are, before or after `.to()`, and
undoing gives the old class back. What families are known, and when a module of one is kept as it is, is said by the
rules of `patch_towers.py`, `patch_resamplers.py` and `patch_loss.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

from torch import nn

PARTS = ("layer_norm", "mlp", "attention", "resampler", "loss")
"""What `which` selects."""

_RULE_FILES = ("patch_towers", "patch_resamplers", "patch_loss")


@dataclass(frozen=True)
class Rule:
    """How modules of one class are replaced.

    Attributes:
        part: one of PARTS.
        target: the class, "package.module.Name"; exactly this class, since a subclass may have another forward.
        methods: what the subclass gets: "forward" and whatever else its callers use.
        check: why an instance has to be kept, one clause, or None if it can be replaced.
        children: names of the sub-modules whose parameters `forward` reads without calling them, as
            `get_submodule` takes them. They must be plain linears or norms without hooks, or the module is kept.
        covers: whether the sub-modules are part of the fused forward, so that they are not patched themselves.
    """

    part: str
    target: str
    methods: dict[str, Callable]
    check: Callable[[nn.Module], str | None] = lambda module: None
    children: tuple[str, ...] = ()
    covers: bool = True


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
    _changed: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that run on fused ops now."""
        return [row.name for row in self.rows if row.reason is None]

    def undo(self) -> None:
        """Give every module its own class back; a second time does nothing."""
        for module, original in self._changed:
            module.__class__ = original
        self._changed.clear()

    def __str__(self) -> str:
        groups = Counter((row.part, row.kind, row.reason) for row in self.rows)
        lines = [f"{len(self.replaced)} of {len(self.rows)} modules run on fused ops"]
        for (part, kind, reason), count in groups.items():
            fate = "replaced" if reason is None else f"kept: {reason}"
            lines.append(f"  {part:<10} {count:>4} x {kind:<32} {fate}")
        return "\n".join(lines)


def apply_to(
    model: nn.Module, which: str | Sequence[str] = PARTS, *, strict: bool = False
) -> Report:
    """Replace the modules of a model that are known here.

    Args:
        model: any; on any device, before or after `.to()`, `torch.compile` or ZeRO-3.
        which: parts to replace, of PARTS.
        strict: whether a module that has to be kept is an error.

    Returns:
        The report; its `undo` restores the model.

    Raises:
        ValueError: if a part is unknown, nothing in the model is known here, the model is patched already, or
            `strict` and a module has to be kept. The model is left as it was.
    """
    wanted = (which,) if isinstance(which, str) else tuple(which)
    for part in wanted:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    rules = {rule.target: rule for rule in all_rules() if rule.part in wanted}
    rows, changes, covered = [], [], set()
    for name, module in model.named_modules():
        if getattr(type(module), "prismer_rule", None) is not None:
            raise ValueError(
                f"{name or 'the model'} runs on fused ops already; call undo() of its report first"
            )
        rule = rules.get(qualified_name(type(module)))
        if rule is None or id(module) in covered:
            continue
        reason = reason_to_keep(rule, module)
        rows.append(Row(name, type(module).__name__, rule.part, reason))
        if reason is None:
            changes.append((module, type(module), fused_class(type(module), rule.target)))
            if rule.covers:
                covered.update(id(child) for child in module.modules() if child is not module)
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
    for module, _, fused in changes:
        module.__class__ = fused
    return Report(rows, [(module, original) for module, original, _ in changes])


def qualified_name(kind: type) -> str:
    """ "package.module.Name" of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def all_rules() -> tuple[Rule, ...]:
    """The rules of every family."""
    return tuple(
        rule for name in _RULE_FILES for rule in import_module(f"prismer.kernels.{name}").RULES
    )


@cache
def fused_class(original: type, target: str) -> type:
    """The subclass of `original` that runs on fused ops, made once."""
    (rule,) = (rule for rule in all_rules() if rule.target == target)
    # ZeRO-3 gathers the whole module on entry: forward reads its children's parameters without calling them
    extra = {"_z3_leaf": True} if rule.children else {}
    body = {
        **rule.methods,
        **extra,
        "prismer_rule": rule.target,
        "__module__": original.__module__,
        "__reduce_ex__": _reduce,
    }
    return type(original.__name__, (original,), body)


def reason_to_keep(rule: Rule, module: nn.Module) -> str | None:
    """Why this module cannot be replaced; None if it can."""
    for name in rule.children:
        try:
            child = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        if type(child) not in (nn.Linear, nn.LayerNorm) and not _is_norm(child):
            return f"its {name} is a {type(child).__name__} (quantised, adapted or wrapped), not a plain layer"
        if has_hooks(child):
            return f"its {name} has hooks, which a fused forward would not call"
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            return f"its {name} is {parameter.dtype}, not floating point"
    return rule.check(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this module's forward or backward."""
    return any(
        getattr(module, name, None)
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )


def _is_norm(module: nn.Module) -> bool:
    rule = next((r for r in all_rules() if r.target == qualified_name(type(module))), None)
    return rule is not None and rule.part == "layer_norm"


def _reduce(self, protocol):
    # copies and pickles: a class made here has no name that pickle could find it by
    original = type(self).__mro__[1]
    return _rebuild, (original, type(self).prismer_rule), self.__dict__.copy()


def _rebuild(original: type, target: str) -> nn.Module:
    fused = fused_class(original, target)
    return fused.__new__(fused)
