"""Fixtures for the tests of ops, and the device that each test runs on."""

import importlib

import pytest
import torch

from prismer.kernels.errors import MachineError
from prismer.kernels.machine import interpreting
from tests.devices import FACTORIES, kernel_device, made_on, moved


def pytest_generate_tests(metafunc):
    """Where there is a device for tests marked `gpu`, every test that is not marked `cpu` runs there too."""
    if kernel_device() is not None and metafunc.definition.get_closest_marker("cpu") is None:
        devices = ("cpu", pytest.param("gpu", marks=pytest.mark.gpu))
        metafunc.parametrize("op_device", devices, indirect=True)


@pytest.fixture(autouse=True)
def op_device(request, monkeypatch):
    """The device of this test. Tensors and modules that it makes lie there, and so do those of its file."""
    if getattr(request, "param", "cpu") == "cpu":
        yield torch.device("cpu")
        return
    # torch scripts these when they are imported, and cannot script a factory of ours
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    here = kernel_device()
    for name, value in list(vars(request.module).items()):
        if isinstance(value, torch.Tensor | dict | list | tuple):
            monkeypatch.setattr(request.module, name, moved(value, here))
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, made_on(here, getattr(torch, name)))
    yield here


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Move the tensors among the parameters of a test; skip it if the native backend does not serve this GPU."""
    device = pyfuncitem.funcargs["op_device"]
    if device.type != "cuda":
        return (yield)
    for name in pyfuncitem.funcargs:
        pyfuncitem.funcargs[name] = moved(pyfuncitem.funcargs[name], device)
    try:
        return (yield)
    except MachineError as error:
        if str(error).startswith("backend native was asked for, but"):
            pytest.skip(str(error))
        raise


@pytest.fixture
def running(running, op_device):
    """`running` of tests/conftest.py, on the device of this test."""

    def context(backend):
        if backend == "triton" and op_device.type == "cpu" and not interpreting():
            pytest.skip("where there is a GPU, Triton kernels are compiled for it: hide the GPU to interpret them")
        return running(backend)

    return context


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def isa(request, monkeypatch):
    """Run native ops on one instruction set, whose name the fixture returns."""
    from tests.ops.native_sets import HERE

    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("PRISMER_CPU_ISA", request.param)
    return request.param
