"""Proves that the backend is the one asked for, the fastest usable one otherwise, and that refusals say why.

Run: pytest tests/ops/test_dispatch.py
"""

import importlib
import logging
import os
import re
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import prismer.kernels.dispatch as dispatch
from prismer.kernels import machine as machine_module
from prismer.kernels import tuning
from prismer.kernels.attention.call import Facts
from prismer.kernels.dispatch import (
    NATIVE,
    TORCH,
    TRITON,
    Backend,
    Op,
    all_ops,
    asked,
    backends,
    use_backend,
)
from prismer.kernels.layer_norm import layer_norm
from prismer.kernels.machine import native_missing

pytestmark = pytest.mark.cpu

OPS = {op.name: op for op in all_ops()}
# parts of the loss and of attention, which have the definitions, and a plain product
PARTS = ("logit_statistics", "philox_kept", "linear")
TOY = Op(name="toy", reference=abs, backends=(NATIVE, TRITON, TORCH))


def call(device="cpu", dtype=torch.float32):
    """What a choice looks at."""
    sizes = dict(shape=(4, 8), dim=lambda: 2, numel=lambda: 32)
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype, **sizes)


CPU, CUDA = call("cpu"), call("cuda")


@pytest.fixture
def machine(request, monkeypatch):
    """Pretend that everything is installed but what a parameter maps to a reason; natively built is `toy` alone."""
    missing = getattr(request, "param", {})
    monkeypatch.setattr(machine_module, "native_missing", lambda device="cpu": missing.get(f"native {device}"))
    monkeypatch.setattr(machine_module, "triton_missing", lambda: missing.get("triton"))
    monkeypatch.setattr(machine_module, "package_missing", lambda name: missing.get(name, f"{name} is not installed"))
    monkeypatch.setattr(machine_module, "has_native", lambda op, device: op == "toy")
    dispatch._log_once.cache_clear()
    _forget_choices()
    yield
    _forget_choices()


def _forget_choices():
    dispatch._usable.cache_clear()
    for device in ("cpu", "cuda"):
        tuning.use_table(device, tuning.table(device))


def test_an_older_build_of_the_extension_says_so(machine):
    """A pulled repository with yesterday's extension does not fail inside an op."""
    assert OPS["layer_norm"].choose(CPU) == "torch"
    with use_backend("native"), pytest.raises(RuntimeError, match="built from older sources, without layer_norm"):
        OPS["layer_norm"].choose(CPU)


def test_the_first_usable_backend_runs_unless_another_is_asked_for(machine):
    assert TOY.choose(CPU) == TOY.choose(CUDA) == "native"
    assert OPS["instance_rows"].choose(CUDA) == "triton" and OPS["instance_rows"].choose(CPU) == "torch"
    with use_backend("torch"):
        assert TOY.choose(CPU) == "torch" and TOY.choose(CPU, asked_for="native") == "native"
        with use_backend(None):
            assert asked() is None and TOY.choose(CPU) == "native"
    assert asked() is None


def test_a_backend_that_an_op_does_not_have_is_ignored_and_one_that_cannot_run_is_refused(machine):
    with use_backend("native"):
        # there is no native loss, so the request cannot mean it
        assert OPS["linear_cross_entropy"].choose(CPU) == "torch"
        with pytest.raises(RuntimeError, match="native bias_activation serves cpu tensors, not cuda"):
            OPS["bias_activation"].choose(CUDA, "gelu")


def test_the_interpreter_is_only_taken_when_asked_for(machine):
    assert OPS["mlp"].choose(CPU) == "torch"
    with use_backend("triton"):
        if machine_module.interpreting():
            assert OPS["mlp"].choose(CPU) == "triton"
        else:
            with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
                OPS["mlp"].choose(CPU)


MISSING = {"native cpu": "it was not built", "native cuda": "it was not built", "triton": "no triton"}


@pytest.mark.parametrize("machine", (MISSING,), indirect=True)
def test_without_compilers_torch_runs(machine):
    assert TOY.choose(CPU) == TOY.choose(CUDA) == "torch"
    for backend, reason in (("native", "it was not built"), ("triton", "no triton")):
        with use_backend(backend), pytest.raises(RuntimeError, match=f"{backend} was asked for, but {reason}"):
            TOY.choose(CPU)
    rows = {(row.op, row.backend): row for row in backends()}
    assert not rows["label_map", "native"].usable and rows["label_map", "native"].reason == "it was not built"
    assert rows["label_map", "torch"].usable and rows["linear_cross_entropy", "reference"].usable


def test_what_does_not_serve_a_call_is_passed_over_and_logged_once(machine, caplog):
    def refuses(x, head_dim):
        return f"head dim {head_dim} is odd" if head_dim % 2 else None

    odd = [Backend(name=name, refuses=refuses) for name in ("triton", "sdpa")]
    op = Op(name="toy", reference=abs, backends=(*odd, TORCH))
    caplog.set_level(logging.INFO, "prismer.kernels")
    assert op.choose(CUDA, 7) == op.choose(CUDA, 7) == "torch" and op.choose(CUDA, 8) == "triton"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"toy does not run on {name} here: head dim 7 is odd" for name in ("triton", "sdpa")]
    with use_backend("sdpa"), pytest.raises(RuntimeError, match="sdpa was asked for, but head dim 7 is odd"):
        op.choose(CUDA, 7)


def test_a_slower_backend_runs_only_if_it_is_asked_for(machine):
    slow = Backend(name="native", slower=lambda x: "torch is as fast here")
    op = Op(name="toy", reference=abs, backends=(slow, TORCH))
    assert op.choose(CPU) == "torch"
    with use_backend("native"):
        assert op.choose(CPU) == "native"


@pytest.mark.parametrize("name", OPS)
def test_native_and_triton_refuse_float64(machine, monkeypatch, name):
    """They compute in fp32, so an op that takes float64 must not reach them."""
    monkeypatch.setattr(machine_module, "has_native", lambda op, device: True)
    op = OPS[name]
    # random numbers have no dtype to lose
    computing = [b for b in op.backends if b.name in ("native", "triton") and name != "philox_kept"]
    for backend in computing:
        fp32 = f"{backend.name} {name} computes in fp32, and the call is in float64"
        with use_backend(backend.name), pytest.raises(RuntimeError, match=fp32):
            op.choose(call((backend.devices or ("cpu",))[-1], torch.float64))


def test_a_definition_that_is_asked_for_runs_before_any_choice():
    """In a backward pass, whose op ran before the request, torch's operators take its place."""
    x = torch.randn(3, 8)
    with use_backend("reference"):
        assert OPS["layer_norm"].route(x, None, None) == "reference" and OPS["layer_norm"].choose(x) == "torch"
    x.requires_grad_()
    y = layer_norm(x.double(), None, None).sum() + layer_norm(x.bfloat16(), None, None).float().square().sum()
    with use_backend("reference"):
        y.backward()
    assert x.grad.isfinite().all()


def test_a_request_holds_in_every_thread(machine):
    """On a GPU the backward pass runs in threads of its own."""
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(asked()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'; choose native, triton, torch"), use_backend("cuda"):
        pass


@pytest.mark.parametrize(("value", "printed"), (("reference", "reference"), ("", "None"), ("fast", "InputError")))
def test_the_environment_asks_for_a_backend(value, printed):
    program = "from prismer.kernels import dispatch; print(dispatch.asked())"
    environment = {**os.environ, "PRISMER_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert printed in done.stdout + done.stderr
    if value == "fast":
        assert "PRISMER_BACKEND is 'fast'; choose native" in done.stderr


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_an_extension_that_was_not_built_says_so(device, monkeypatch):
    native_missing.cache_clear()
    monkeypatch.setattr(machine_module.importlib.util, "find_spec", lambda name: None)
    assert "was not built" in native_missing(device)
    native_missing.cache_clear()


def test_threads_load_the_extension_once(monkeypatch):
    """The other threads wait while one imports it: an extension is in sys.modules before it has a spec."""
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
    monkeypatch.setattr(machine_module.importlib, "import_module", load)
    monkeypatch.setattr(
        machine_module.importlib.util,
        "find_spec",
        lambda name: real(name) if name in sys.modules else importlib.machinery.ModuleSpec(name, None),
    )
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: native_missing(), range(8))) == [None] * 8
    native_missing.cache_clear()


def test_an_extension_that_does_not_load_warns_once(monkeypatch, tmp_path):
    """A missing extension does not warn."""
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
    assert machine_module.has_native("layer_norm", "cpu") and not machine_module.has_native("mlp", "cpu")


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_definition_and_ends_with_torch_for_any_device(name):
    op = OPS[name]
    assert (op.reference is None) == (name in PARTS)
    last = op.backends[-1]
    assert last.name == "torch" and last.devices is None and last.refuses is None and last.float64


@pytest.mark.parametrize("name", ("layer_norm", "mlp", "adaptor"))
def test_the_vendors_kernels_come_first_on_a_gpu_until_it_is_measured(machine, name):
    op = OPS[name]
    assert op.choose(CUDA) == "torch"
    key = name, torch.float32, True, op.shape_class(CUDA)
    with tuning.forcing({key: "triton"}):
        assert op.choose(CUDA, gradient=True) == "triton" and op.choose(CUDA) == "torch"


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("attention", "linear")])
def test_native_comes_before_triton_and_triton_before_torch(name):
    names = [backend.name for backend in OPS[name].backends]
    assert names == [name for name in ("native", "triton", "torch") if name in names]


def test_the_order_of_attention_puts_other_libraries_first_on_a_gpu():
    names = [backend.name for backend in OPS["attention"].backends]
    assert names == ["eager", "flash-attn", "native", "sdpa", "triton", "xformers", "torch"]
    facts = Facts(device=CUDA.device, dtype=torch.bfloat16, head_dim=64, shape=(8, 32, 1024, 64, 0), gradient=True)
    assert OPS["attention"].backends[0].slower(facts) is not None


def test_every_op_of_the_folder_is_found():
    found = set()
    for path in Path(dispatch.__file__).parent.rglob("*.py"):
        found |= set(re.findall(r"= Op\(\s*name=\"(\w+)\"", path.read_text()))
    assert found == set(OPS) and len(found) > 10


def test_a_fake_gets_the_arguments_that_it_names():
    def implementation(x, weight, eps):
        return x

    taking_all = dispatch._taking_all(lambda eps, x: (eps, x), implementation)
    assert taking_all("x", "weight", "eps") == ("eps", "x")
    with pytest.raises(ValueError, match="bias"):
        dispatch._taking_all(lambda bias: bias, implementation)


def test_forward_mode_is_refused():
    """A registered op has no forward-mode derivative; without the refusal jvp would silently return zeros."""
    x = torch.randn(3, 8)

    def norm(x):
        return layer_norm(x, None, None)

    with use_backend("torch"), pytest.raises(NotImplementedError, match="layer_norm has no forward-mode derivative"):
        torch.func.jvp(norm, (x,), (x,))
    with use_backend("torch"), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="in reverse"):
        norm(forward_ad.make_dual(x, x))
    norm(x)
