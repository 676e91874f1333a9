"""Proves that `pytest -m gpu` selects the tests of ops where a device is there for them, and where their tensors lie.

Run: pytest tests/test_devices.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prismer.kernels.layer_norm import layer_norm_reference
from prismer.kernels.modules import PerceiverResampler
from tests import devices

ROOT = Path(__file__).parents[1]
META = torch.device("meta")


def selected(device, *options):
    """The tests that pytest selects from a file of an op and from one of the CPU."""
    environment = {name: value for name, value in os.environ.items() if name != "PRISMER_TEST_DEVICE"}
    if device:
        environment["PRISMER_TEST_DEVICE"] = device
    # no GPU, also where there is one
    environment["CUDA_VISIBLE_DEVICES"] = ""
    files = ["tests/ops/test_rms_norm.py", "tests/ops/test_on_host.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.long
def test_a_stand_in_adds_the_tests_marked_gpu():
    assert selected(None, "-m", "gpu") == []
    found = selected("cpu")
    norms = [name for name in found if "test_rms_norm.py" in name]
    on_gpu = [name for name in norms if "[gpu" in name]
    assert len(norms) == 2 * len(on_gpu) > 0
    assert len(found) > len(norms) and not any("[gpu" in name for name in found if "test_on_host.py" in name)
    assert selected("cpu", "-m", "gpu") == on_gpu


def test_an_unknown_device_is_refused(monkeypatch):
    monkeypatch.setenv("PRISMER_TEST_DEVICE", "tpu")
    with pytest.raises(ValueError, match="'tpu'; choose cpu, to stand in for a GPU, or cuda"):
        devices.kernel_device()


@pytest.fixture
def on_meta(monkeypatch):
    """The meta device in the place of a GPU."""
    for name in devices.FACTORIES:
        monkeypatch.setattr(torch, name, devices.made_on(META, getattr(torch, name)))


def test_what_a_test_makes_lies_on_its_device(on_meta):
    leaf = torch.randn(3, requires_grad=True)
    assert leaf.device == META and leaf.requires_grad and leaf.is_leaf
    assert torch.zeros(2, dtype=torch.int64).device == torch.tensor([1]).device == META
    assert torch.randn(2, generator=torch.Generator().manual_seed(0)).device == META
    modules = nn.Linear(3, 3), nn.MultiheadAttention(4, 2), PerceiverResampler(8, 1, 2, 4)
    assert {p.device for module in modules for p in module.parameters()} == {META}
    # as an op makes what it needs
    assert torch.zeros(2, device="cpu").device.type == "cpu" and torch.zeros_like(leaf).device == META


def test_a_device_gets_the_numbers_of_the_cpu(monkeypatch):
    torch.manual_seed(3)
    expected = torch.randn(4)
    monkeypatch.setattr(torch, "randn", devices.made_on(torch.device("cpu"), torch.randn))
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), expected)


def test_an_op_that_names_no_device_fails_on_the_stand_in(monkeypatch):
    source = "def op(x):\n    return x + torch.zeros(3)\n"
    scope = dict(torch=torch)
    exec(compile(source, layer_norm_reference.__code__.co_filename, "exec"), scope)
    assert torch.equal(scope["op"](torch.ones(3)), torch.ones(3))
    monkeypatch.setattr(torch, "zeros", devices.made_on(torch.device("cpu"), torch.zeros))
    with pytest.raises(AssertionError, match="layer_norm.py makes a tensor and names no device"):
        scope["op"](torch.ones(3))


def test_tensors_in_parameters_are_moved():
    given = dict(x=torch.zeros(2, requires_grad=True), more=[(torch.ones(1), "text")], n=3)
    got = devices.moved(given, META)
    assert got["x"].device == got["more"][0][0].device == META
    assert got["x"].requires_grad and got["more"][0][1] == "text" and got["n"] == 3
    assert devices.moved(got["x"], torch.device("cpu")) is got["x"], "a tensor of the meta device stays there"
