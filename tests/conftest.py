"""Shared by all tests: fixed seeds, poisoned memory, the twice-PyTorch rule, and the `gpu` marker."""

import os
import random
from collections import defaultdict
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import torch.utils.deterministic
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated: kernels then run on CPU tensors, when asked for
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds():
    """Every test draws the same numbers, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
    """Compare by name: our error may be `factor` times that of plain PyTorch in the same dtype, plus one rounding.

    Of the largest error, one draw that depends on the processor's order of summation, four roundings.
    """

    def check(name, ours, plain, exact, factor=2.0):
        assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        if not exact.numel():
            return
        assert torch.isfinite(ours).all(), f"{name} is not finite"
        rounding = torch.finfo(ours.dtype).eps / 2
        errors = {}
        norms = ("max", 4, lambda t: t.abs().amax()), ("rms", 1, lambda t: t.square().mean().sqrt())
        for kind, roundings, norm in norms:
            error, allowed = (norm(t.double() - exact).item() for t in (ours, plain))
            errors[kind] = error, factor * allowed + roundings * rounding * norm(exact).item()
        text = ", ".join(f"{kind} {error:.3g} (allowed {allowed:.3g})" for kind, (error, allowed) in errors.items())
        assert all(error <= allowed for error, allowed in errors.values()), f"{name} is off: {text}"

    return check


@pytest.fixture
def running():
    """A context in which ops run on the named backend; where there is no GPU, Triton's interpreter has correct bf16."""
    from prismer.kernels.dispatch import use_backend

    @contextmanager
    def context(backend):
        with ExitStack() as stack:
            if backend == "triton" and not torch.cuda.is_available():
                from interpreter import bf16_interpreter

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
