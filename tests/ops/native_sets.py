"""The instruction sets of native ops: all that they are compiled for, and those that this machine has."""

import pytest
import torch

from prismer.kernels.machine import native_missing

if native_missing() is not None:
    pytest.skip(native_missing(), allow_module_level=True)

SETS = ("baseline", "avx2", "avx512")
HERE = SETS[: SETS.index(torch.ops.prismer_native.cpu_capability()) + 1]
