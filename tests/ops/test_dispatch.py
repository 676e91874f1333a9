"""Proves that the backend is the one asked for, the fastest usable one otherwise, and that refusals say why.

Run: pytest tests/ops/test_dispatch.py
"""

import sys

import pytest
import torch

import prismer.kernels.dispatch as dispatch
from prismer.kernels.dispatch import backend_for, backends, native_missing, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("PRISMER_BACKEND", raising=False)


@pytest.fixture
def native(request, monkeypatch):
    """Pretend that the extension is there (None) or is missing for a reason."""
    monkeypatch.setattr(dispatch, "native_missing", lambda: request.param)


@pytest.mark.parametrize("native", (None,), indirect=True)
def test_choice(native, monkeypatch):
    assert backend_for("label_map", CPU) == "native"
    assert backend_for("label_map", CUDA) == "torch"
    assert backend_for("cross_entropy", CPU) == "torch"
    monkeypatch.setenv("PRISMER_BACKEND", "reference")
    assert backend_for("label_map", CPU) == "reference"
    with use_backend("torch"):
        assert backend_for("label_map", CPU) == "torch"
        with use_backend(None):
            assert backend_for("cross_entropy", CPU) == "reference"
    with use_backend("native"):
        # there is no native loss, so the request cannot mean it
        assert backend_for("cross_entropy", CPU) == "torch"
        with pytest.raises(RuntimeError, match="serves cpu tensors, not cuda"):
            backend_for("label_map", CUDA)


@pytest.mark.parametrize("native", ("it was not built",), indirect=True)
def test_without_extension(native):
    assert backend_for("label_map", CPU) == "torch"
    with use_backend("native"), pytest.raises(RuntimeError, match="it was not built"):
        backend_for("label_map", CPU)
    rows = {(row.op, row.backend): row for row in backends()}
    assert not rows["label_map", "native"].usable and rows["label_map", "native"].reason == "it was not built"
    assert rows["label_map", "torch"].usable and rows["cross_entropy", "reference"].usable


def test_unknown_backend(monkeypatch):
    with pytest.raises(ValueError, match="'cuda'; choose native, torch, reference"), use_backend("cuda"):
        pass
    monkeypatch.setenv("PRISMER_BACKEND", "fast")
    with pytest.raises(ValueError, match="PRISMER_BACKEND is 'fast'"):
        backend_for("label_map", CPU)


def test_extension_not_built(monkeypatch):
    native_missing.cache_clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "was not built" in native_missing()
    native_missing.cache_clear()


def test_broken_extension_warns(monkeypatch, tmp_path):
    """A file that does not load is not the same as none: it says so once."""
    package = tmp_path / "prismer"
    package.mkdir()
    (package / "_C.py").write_text("raise ImportError('undefined symbol: torch_x')")
    native_missing.cache_clear()
    monkeypatch.delitem(sys.modules, "prismer._C", raising=False)
    monkeypatch.setattr(sys.modules["prismer"], "__path__", [str(package)])
    with pytest.warns(UserWarning, match="undefined symbol: torch_x"):
        assert "does not load" in native_missing()
    assert "does not load" in native_missing()
    native_missing.cache_clear()
