"""Replace the layers of somebody else's model by fused ones in place: `apply_to(model)`, undone by `restore(model)`."""

from prismer.kernels.patch.core import Report as Report
from prismer.kernels.patch.core import Rule as Rule
from prismer.kernels.patch.core import apply_to as apply_to
from prismer.kernels.patch.core import is_patched as is_patched
from prismer.kernels.patch.core import restore as restore
