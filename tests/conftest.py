"""Shared by all tests: fixed seeds, poisoned memory, the rule of numerics (`assert_no_worse`) and the `gpu` marker.

No test may depend on the rounding of one processor. This loop imitates other processors and draws other numbers:

    for onednn in SSE41 AVX2 AVX512_CORE AVX512_CORE_BF16; do for aten in default avx2 avx512; do for threads in 1 2; do
        export ONEDNN_MAX_CPU_ISA=$onednn ATEN_CPU_CAPABILITY=$aten OMP_NUM_THREADS=$threads
        PRISMER_TEST_SEED=$((seed += 1)) pytest -q tests/ops
    done; done; done

MKL_ENABLE_INSTRUCTIONS (SSE4_2, AVX2, AVX512) and MKL_CBWR (COMPATIBLE, AVX2) do the same for MKL, and PRISMER_CPU_ISA
(baseline, avx2, avx512) for our own C++. The tests of the C++ run on all three by themselves.
"""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import torch.utils.deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from prismer.kernels import tuning
from prismer.kernels.tuning.tables import Entry, Table
from tests.devices import kernel_device

if not torch.cuda.is_available():
    # lets Triton kernels run on CPU tensors; set here because Triton reads it when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"


# another seed draws other tensors
SEED = int(os.environ.get("PRISMER_TEST_SEED", 0))
# number of drawn errors: enough that the error of a single number is not close to zero in all of them
DRAWS = 8
NORMS = {"max": lambda t: t.abs().max().item(), "rms": lambda t: t.square().mean().sqrt().item()}


def by_name(name, tensors):
    """`tensors` as a dict; a single tensor gets `name`."""
    return dict(tensors) if isinstance(tensors, Mapping) else {name: tensors}


def pytest_collection_modifyitems(items):
    # processes take whole files in this order: those with few tests have the slow ones, and must not come last
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (sizes[item.path], str(item.path)))
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("PRISMER_LONG_TESTS"):
            item.add_marker(pytest.mark.skip(reason="set PRISMER_LONG_TESTS=1 to run it"))
    if kernel_device() is not None:
        return
    reason = "needs a CUDA device, or PRISMER_TEST_DEVICE=cpu to let the CPU stand in"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def no_measured_choices():
    """The prior decides what runs, so that a table of this machine makes no test pass or fail.

    The one entry is of no op and for these threads: else commands would advise to measure.
    """
    facts = dict(op="none", dtype="float32", gradient=False, shape=(), choice="torch", prior="torch")
    entry = Entry(**facts, threads=torch.get_num_threads())
    for device_type in ("cpu", "cuda"):
        tuning.use_table(device_type, Table(entries=(entry,)))


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers, whether it runs alone or in any order."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised tensors with NaN, those of native code too, so that unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def assert_no_worse():
    """The rule of numerics: our error against float64 may be twice that of plain PyTorch in the same dtype.

    The error of a gradient may be three times as large. PyTorch's own error can be small by luck; ours may then be
    twice (three times) the error that rounding causes in this computation, for any order of its sums (see
    `roundings.py`). One more rounding is always allowed, because the result is stored.

    Args:
        name: name of the tensor, if `ours` is one tensor. A name that begins with `d` is a gradient.
        ours: a tensor, or a dict of tensors by name; each of them is compared.
        plain: the same from plain PyTorch; it may hold more tensors.
        exact: a function without arguments that returns the same in float64. It is called again with errors added to
            every operator, so it must draw no random numbers and must not round.
        factor: replaces 2, and 3 for gradients.
        inner: dtype of the intermediate results, if it differs from that of `ours`.
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
                    # the MATH backend splits torch's attention into operators, each of which rounds
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


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Look up anew how to run each call: a test may patch what that depends on."""
    tuning.generation += 1
    yield
    tuning.generation += 1


@pytest.fixture
def running():
    """A context in which ops run on the named backend; without a GPU, Triton is interpreted, with correct bf16."""
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
    """A context that records calls of operators: operator name -> a list of arguments by name, one item per call."""

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
