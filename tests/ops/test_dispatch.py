"""Proves that the backend is the one asked for, the fastest usable one otherwise, and that refusals say why.

Run: pytest tests/ops/test_dispatch.py
"""

import importlib
import logging
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad

import prismer.kernels.dispatch as dispatch
from prismer.kernels.dispatch import asked, backends, choose, native_missing, use_backend
from prismer.kernels.layer_norm import layer_norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(request, monkeypatch):
    """Pretend that each of these is there (None) or missing for a reason; the rest is."""
    missing = getattr(request, "param", {})
    monkeypatch.setattr(dispatch, "native_missing", lambda device="cpu": missing.get(f"native {device}"))
    monkeypatch.setattr(dispatch, "triton_missing", lambda: missing.get("triton"))
    monkeypatch.setattr(dispatch, "package_missing", lambda name: missing.get(name, f"{name} is not installed"))
    built = ("label_map", "bias_activation")
    monkeypatch.setattr(dispatch, "_has_native", lambda op, device: op in built)
    dispatch._log_once.cache_clear()


def test_older_build(machine):
    """A pulled repository with yesterday's extension says so, instead of failing inside an op."""
    assert choose("layer_norm", CPU) == "torch"
    with use_backend("native"), pytest.raises(RuntimeError, match="built from older sources, without layer_norm"):
        choose("layer_norm", CPU)


def test_choice(machine):
    assert choose("label_map", CPU) == choose("label_map", CUDA) == "native"
    assert choose("mlp", CUDA) == "triton" and choose("mlp", CPU) == "torch"
    with use_backend("torch"):
        assert choose("label_map", CPU) == "torch"
        with use_backend(None):
            assert asked() is None and choose("label_map", CPU) == "native"
    assert asked() is None
    with use_backend("native"):
        # there is no native loss, so the request cannot mean it
        assert choose("cross_entropy", CPU) == "torch"
        with pytest.raises(RuntimeError, match="native bias_activation serves cpu tensors, not cuda"):
            choose("bias_activation", CUDA)


def test_the_interpreter_is_only_taken_when_asked_for(machine):
    assert choose("cross_entropy", CPU) == "torch"
    with use_backend("triton"):
        if dispatch.interpreting():
            assert choose("cross_entropy", CPU) == "triton"
        else:
            with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
                choose("cross_entropy", CPU)


MISSING = {"native cpu": "it was not built", "native cuda": "it was not built", "triton": "no triton"}


@pytest.mark.parametrize("machine", (MISSING,), indirect=True)
def test_without_compilers(machine):
    assert choose("label_map", CPU) == choose("label_map", CUDA) == "torch"
    for backend, reason in (("native", "it was not built"), ("triton", "no triton")):
        with use_backend(backend), pytest.raises(RuntimeError, match=f"{backend} was asked for, but {reason}"):
            choose("label_map", CPU)
    rows = {(row.op, row.backend): row for row in backends()}
    assert not rows["label_map", "native"].usable and rows["label_map", "native"].reason == "it was not built"
    assert rows["label_map", "torch"].usable and rows["cross_entropy", "reference"].usable


def test_supports(machine, caplog):
    """What a call cannot use is passed over and logged once; what was asked for is refused with the reason."""

    def supports(backend):
        return "head dim 7 is odd" if backend in ("triton", "sdpa") else None

    caplog.set_level(logging.INFO, "prismer.kernels")
    assert choose("attention", CUDA, supports) == "torch"
    assert choose("attention", CUDA, supports) == "torch"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"attention does not run on {name} here: head dim 7 is odd" for name in ("sdpa", "triton")]
    with use_backend("sdpa"), pytest.raises(RuntimeError, match="sdpa was asked for, but head dim 7 is odd"):
        choose("attention", CUDA, supports)


def test_choice_holds_in_every_thread(machine):
    """On a GPU the backward pass runs in threads of its own."""
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(asked()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_backend():
    with pytest.raises(ValueError, match="'cuda'; choose native, triton, torch"), use_backend("cuda"):
        pass


@pytest.mark.parametrize(("value", "printed"), (("reference", "reference"), ("", "None"), ("fast", "ValueError")))
def test_environment(value, printed):
    program = "from prismer.kernels import dispatch; print(dispatch.asked())"
    environment = {**os.environ, "PRISMER_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert printed in done.stdout + done.stderr
    if value == "fast":
        assert "PRISMER_BACKEND is 'fast'; choose native" in done.stderr


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_extension_not_built(device, monkeypatch):
    native_missing.cache_clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "was not built" in native_missing(device)
    native_missing.cache_clear()


def test_threads_load_the_extension_once(monkeypatch):
    """While one imports it, the others wait: an extension is in sys.modules before it has a spec."""
    native_missing.cache_clear()
    name, whole = "prismer._C", threading.Event()
    # set first, so that what stands there now, or nothing, stands there again after the test
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)

    def load(_):
        module = types.ModuleType(name)
        module.__spec__ = None
        if sys.modules.setdefault(name, module) is module:
            whole.wait(0.05)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    real = importlib.util.find_spec
    monkeypatch.setattr(dispatch.importlib, "import_module", load)
    monkeypatch.setattr(
        dispatch.importlib.util,
        "find_spec",
        lambda name: real(name) if name in sys.modules else importlib.machinery.ModuleSpec(name, None),
    )
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: native_missing(), range(8))) == [None] * 8
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


def test_native_kernels_are_looked_up():
    if native_missing() is not None:
        pytest.skip(native_missing())
    assert dispatch._has_native("layer_norm", "cpu") and not dispatch._has_native("mlp", "cpu")


def test_every_op_has_torch_and_a_definition():
    for op, served_by in dispatch._OPS.items():
        if op in ("logit_statistics", "philox_kept"):
            # parts of cross_entropy and of attention, which have their definitions
            assert list(served_by) == ["native", "torch"]
            continue
        assert list(served_by)[-2:] == ["torch", "reference"], op
        assert served_by["torch"] is None and set(served_by) <= set(dispatch.BACKENDS), op


def test_forward_mode_refuses():
    """A registered op has no tangent to give: it says so, where torch would hand out zeros."""
    x = torch.randn(3, 8)

    def norm(x):
        return layer_norm(x, None, None)

    with use_backend("torch"), pytest.raises(NotImplementedError, match="layer_norm has no forward-mode derivative"):
        torch.func.jvp(norm, (x,), (x,))
    with use_backend("torch"), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="in reverse"):
        norm(forward_ad.make_dual(x, x))
    norm(x)
