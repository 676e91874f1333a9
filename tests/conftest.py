"""Shared by all tests: fixed seeds, poisoned memory, the twice-PyTorch rule, and the `gpu` marker.

No test may hang on one processor's rounding. A loop over what libraries do on others, and over other draws:

    for onednn in SSE41 AVX2 AVX512_CORE AVX512_CORE_BF16; do for aten in default avx2 avx512; do for threads in 1 2; do
        export ONEDNN_MAX_CPU_ISA=$onednn ATEN_CPU_CAPABILITY=$aten OMP_NUM_THREADS=$threads
        PRISMER_TEST_SEED=$((seed += 1)) pytest -q tests/ops
    done; done; done

MKL_ENABLE_INSTRUCTIONS (SSE4_2, AVX2, AVX512) and MKL_CBWR (COMPATIBLE, AVX2) do the same for MKL, PRISMER_CPU_ISA
(baseline, avx2, avx512) for our own C++, whose tests go through all three by themselves.
"""

import os
import random
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import torch.utils.deterministic
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated: kernels then run on CPU tensors, when asked for
    os.environ["TRITON_INTERPRET"] = "1"


# another number draws other tensors
SEED = int(os.environ.get("PRISMER_TEST_SEED", 0))
# how often errors are drawn: enough that a single number is not near nothing in all of them
DRAWS = 8
NORMS = {"max": lambda t: t.abs().max().item(), "rms": lambda t: t.square().mean().sqrt().item()}


def by_name(name, tensors):
    return dict(tensors) if isinstance(tensors, Mapping) else {name: tensors}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers, alone or in any order."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def poisoned_memory():
    """Uninitialised tensors are full of NaN, those of native code too, so that unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def assert_no_worse():
    """Compare with float64: our error may be twice that of plain PyTorch in the same dtype, gradients' three times.

    Where PyTorch's own error is small by luck, ours may be twice what the arithmetic makes of the computation whatever
    the order of its sums (see `roundings.py`); and one rounding more, since a result is stored.

    Args:
        name: of the tensor; of tensors by name it is the prefix, if any. `d...` is a gradient.
        ours, plain: a tensor, or tensors by name, of which those in `ours` are compared.
        exact: called without arguments, gives the same in float64. It is called again where PyTorch was lucky, with
            errors put into every operator: it must draw nothing, and round nothing itself.
        factor: instead of 2, or of 3 for gradients.
        inner: the dtype that holds what comes before the result, if it is not that of `ours`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from tests.roundings import Rounded

    def check(name, ours, plain, exact, factor=None, inner=None):
        ours, plain, truth = (by_name(name, tensors) for tensors in (ours, plain, exact()))
        drawn = {}

        def modelled(key):
            dtype = inner or ours[key].dtype
            if dtype not in drawn:
                drawn[dtype] = []
                for seed in range(DRAWS):
                    # attention of torch's own in parts, each of which rounds
                    with Rounded(dtype, seed), sdpa_kernel(SDPBackend.MATH):
                        drawn[dtype].append(by_name(name, exact()))
            return torch.stack([draw[key] - truth[key] for draw in drawn[dtype]])

        for key, value in ours.items():
            wanted = truth[key]
            assert value.shape == wanted.shape, f"{key} has shape {tuple(value.shape)}, not {tuple(wanted.shape)}"
            if not wanted.numel():
                continue
            assert wanted.dtype == torch.float64, f"{key} is compared with {wanted.dtype}"
            assert torch.isfinite(value).all(), f"{key} is not finite"
            times = factor or (3.0 if key.startswith("d") else 2.0)
            rounding = torch.finfo(value.dtype).eps / 2
            for kind, norm in NORMS.items():
                error, torch_error = norm(value.double() - wanted), norm(plain[key].double() - wanted)
                allowed = times * torch_error + rounding * norm(wanted)
                if error > allowed:
                    expected = norm(modelled(key))
                    allowed = times * max(torch_error, expected) + rounding * norm(wanted)
                assert error <= allowed, (
                    f"{key} is off: {kind} {error:.3g} (allowed {allowed:.3g}, torch's own {torch_error:.3g})"
                )

    return check


@pytest.fixture
def running():
    """A context in which ops run on the named backend; where there is no GPU, Triton's interpreter has correct bf16."""
    from prismer.kernels.dispatch import use_backend

    @contextmanager
    def context(backend):
        with ExitStack() as stack:
            if backend == "triton" and not torch.cuda.is_available():
                from tests.ops.interpreter import bf16_interpreter

                stack.enter_context(bf16_interpreter())
            stack.enter_context(use_backend(backend))
            yield

    return context


@pytest.fixture
def count_calls():
    """A context that records the calls of operators: name -> list of their arguments by name."""

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = defaultdict(list)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names = [argument.name for argument in func._schema.arguments]
            self.calls[func._schema.name].append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
            return func(*args, **(kwargs or {}))

    @contextmanager
    def record():
        with Recorder() as recorder:
            yield recorder.calls

    return record
