"""Replace the layers of somebody else's model by fused ones in place: `apply_to(model)`, undone by `restore(model)`."""

from prismer.kernels.patch.core import PatchReport, apply_to, restore
from prismer.kernels.patch.rules import Rule, is_patched

__all__ = ["PatchReport", "Rule", "apply_to", "is_patched", "restore"]
