"""What a rule says about the modules of one class, and when a module of that class has to be kept as it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prismer.kernels.layer_state import DTYPES, fingerprint, has_global_hooks, reason_not_plain

PARTS = ("layer_norm", "mlp", "attention", "resampler", "loss")
LAYER_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
)
RMS_NORMS = (
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm",
    "transformers.models.internvl.modeling_internvl.InternVLVisionRMSNorm",
)
# torch gives the output projection of nn.MultiheadAttention a class of its own
_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True, eq=False)
class Rule:
    """How modules of one class are replaced.

    Each method takes the place of the method of its name. It returns NotImplemented for a call that the fused op does
    not serve; the original then runs.

    Attributes:
        part: one of PARTS.
        target: full name of the class, "package.module.Name", or a pattern of such names with `*`. A subclass does not
            match, since its forward may differ.
        methods: what the patched class overrides: "forward", and whatever else its callers use.
        check: returns the reason why a module has to be kept, one clause, or None.
        reads: names of the sub-modules whose weights `forward` reads without calling them, as `get_submodule` takes
            them. A module is kept unless these are plain linears or norms.
        covers: the sub-modules that `forward` replaces, each with everything inside: True for all, False for none, or
            their names. They are not patched themselves, and a module is kept if they have hooks.
        find_head: returns the name of the model's output layer, which gets a patched class too.
        head_methods: what the patched class of the output layer overrides.
        one_dtype: whether norms must have the dtype of the input too, and not only matrices.
    """

    part: str
    target: str
    methods: Mapping[str, object]
    check: Callable[[nn.Module], str | None] = lambda module: None
    reads: tuple[str, ...] = ()
    covers: bool | tuple[str, ...] = True
    find_head: Callable[[nn.Module], str] | None = None
    head_methods: Mapping[str, object] = field(default_factory=dict)
    one_dtype: bool = False

    def covered(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and modules inside `module` that the fused forward replaces."""
        if self.covers is False:
            return []
        inside = [(name, child) for name, child in module.named_modules() if name]
        if self.covers is True:
            return inside
        return [pair for pair in inside if any(f"{pair[0]}.".startswith(f"{c}.") for c in self.covers)]

    def fingerprint(self, module: nn.Module, head_path: tuple[str, ...], x: object = None) -> list:
        """The `fingerprint` of a module for this rule, with the names on the way to its output layer."""
        children = module._modules
        names = children if self.covers is True else self.covers or ()
        covered = [children.get(name) for name in names]
        return fingerprint(module, covered, head_path, x, self.one_dtype)

    def reason_to_keep(self, module: nn.Module, x: object = None) -> str | None:
        """Why this module cannot be replaced, or not for the input `x`; None if it can."""
        for name in self.reads:
            reason = _reason_not_readable(name, module)
            if reason is not None:
                return reason
        reason = reason_not_plain("", module, x, self.one_dtype, is_called=True)
        if reason is not None:
            return reason
        covered = self.covered(module)
        for name, child in covered:
            reason = reason_not_plain(name, child, x, self.one_dtype)
            if reason is not None:
                return reason
        if covered and has_global_hooks():
            return "global module hooks are registered (torch.nn.modules.module), which a fused forward would not call"
        for name, parameter in module.named_parameters():
            if parameter.dtype not in DTYPES:
                return f"its {name} is {parameter.dtype}, and the fused ops take fp32, bf16, fp16 or float64"
        return self.check(module)


def _reason_not_readable(name: str, module: nn.Module) -> str | None:
    """Why the sub-module of this name is not a linear or norm that a fused forward can read."""
    try:
        child = module.get_submodule(name)
    except AttributeError:
        return f"it has no {name}"
    if type(child) in _LINEARS:
        return None
    kind = qualified_name(unpatched_class(child))
    if kind in RMS_NORMS:
        return None
    if kind not in LAYER_NORMS:
        return f"its {name} is a {type(child).__name__} (quantised, adapted or wrapped), not a plain layer"
    return reason_many_dimensions(f"its {name}", child)


def reason_many_dimensions(name: str, norm: Any) -> str | None:
    """Keep a norm over several dimensions; `name` begins the clause."""
    if len(norm.normalized_shape) != 1:
        return f"{name} normalises {len(norm.normalized_shape)} dimensions, and the fused norm only the last one"
    return None


def reason_wrong_class(module: nn.Module, classes: Mapping[str, str]) -> str | None:
    """Keep a module unless its sub-modules, by name, have the classes given by their full names."""
    for name, wanted in classes.items():
        try:
            child = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        if qualified_name(unpatched_class(child)) != wanted:
            return f"its {name} is a {type(child).__name__} (quantised, adapted or another class), not a {wanted}"
    return None


def qualified_name(kind: type) -> str:
    """The full name of a class, "package.module.Name"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_patched(module: nn.Module) -> bool:
    """Whether this module runs on fused ops."""
    return getattr(type(module), "unpatched_class", None) is not None


def unpatched_class(module: nn.Module) -> type:
    """The class that a module had before it was patched, or else its class."""
    kind = type(module)
    return vars(kind).get("unpatched_class", kind)
