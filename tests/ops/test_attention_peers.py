"""Proves that the attention of other libraries is called as they publish it, and only for what they serve.

Their GPU code does not run here. This file keeps the signature of each, read from the published package. A stand-in
with that signature computes by torch's attention, and must give the right result through our adapter. Where a package
is installed, its signature must still be the one kept here.

Run: pytest tests/ops/test_attention_peers.py
"""

import importlib
import inspect
import sys
import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import machine
from prismer.kernels.attention import OP, attention_reference, peers
from prismer.kernels.attention.call import Call, Facts

pytestmark = pytest.mark.cpu

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Published:
    """A function as its package declares it: (name, default) of every parameter, with "-" where there is no default."""

    package: str
    source: str
    module: str
    function: str
    parameters: tuple[tuple[str, object], ...]
    keyword_only: int = 0  # of these, the last ones
    gives: str = "out"  # or "out, lse"

    @property
    def signature(self) -> inspect.Signature:
        first = len(self.parameters) - self.keyword_only
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature(
            [
                inspect.Parameter(name, kinds[i >= first], default=inspect.Parameter.empty if value == "-" else value)
                for i, (name, value) in enumerate(self.parameters)
            ]
        )


_QKV = (("q", "-"), ("k", "-"), ("v", "-"))
FLASH2 = Published(
    "flash-attn 2.8.3.post2",
    "flash_attn/flash_attn_interface.py",
    "flash_attn",
    "flash_attn_func",
    (
        *_QKV,
        *(("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1))),
        *(("softcap", 0.0), ("alibi_slopes", None), ("deterministic", False), ("return_attn_probs", False)),
    ),
)
FLASH3 = Published(
    "flash-attn 2.8.3.post2",
    "hopper/flash_attn_interface.py",
    "flash_attn_interface",
    "flash_attn_func",
    (
        *_QKV,
        *(("softmax_scale", None), ("causal", False), ("qv", None)),
        *(("q_descale", None), ("k_descale", None), ("v_descale", None)),
        *(("window_size", (-1, -1)), ("attention_chunk", 0), ("softcap", 0.0), ("num_splits", 1)),
        *(("pack_gqa", None), ("deterministic", False), ("sm_margin", 0)),
    ),
)
FLASH4 = Published(
    "flash-attn-4 4.0.0b36",
    "flash_attn/cute/interface.py",
    "flash_attn.cute",
    "flash_attn_func",
    (
        *_QKV,
        *(("qv", None), ("gather_kv_indices", None), ("softmax_scale", None), ("causal", False)),
        *(("window_size", (None, None)), ("learnable_sink", None), ("softcap", 0.0), ("num_splits", 1)),
        *(("pack_gqa", None), ("deterministic", False), ("score_mod", None), ("score_mod_bwd", None)),
        *(("mask_mod", None), ("aux_tensors", None), ("aux_scalars", None), ("block_sparse_tensors", None)),
        *(("block_sparse_tensors_bwd", None), ("return_lse", False), ("gather_bwd_recompute_p", False)),
        ("gather_bwd_token_chunk", None),
    ),
    gives="out, lse",
)
XFORMERS = Published(
    "xformers 0.0.35",
    "xformers/ops/fmha/__init__.py",
    "xformers.ops",
    "memory_efficient_attention",
    (
        *(("query", "-"), ("key", "-"), ("value", "-"), ("attn_bias", None), ("p", 0.0), ("scale", None)),
        *(("op", None), ("output_dtype", None)),
    ),
    keyword_only=2,
)
FLASH = {2: FLASH2, 3: FLASH3, 4: FLASH4}
RECORDS = {"flash-attn 2": FLASH2, "flash-attn 3": FLASH3, "flash-attn 4": FLASH4, "xformers": XFORMERS}


class LowerTriangularMask:
    """A stand-in for the class of that name in xformers.ops."""


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins for packages where imports find them; returns the arguments of every call, by parameter name."""
    names = ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    machine.module_missing.cache_clear()
    calls = []

    def add(record):
        def function(*args, **kwargs):
            given = record.signature.bind(*args, **kwargs)
            given.apply_defaults()
            given = given.arguments
            calls.append(given)
            q, k, v = (x.transpose(1, 2) for x in list(given.values())[:3])
            causal = given.get("causal", False) or isinstance(given.get("attn_bias"), LowerTriangularMask)
            scale = given["scale" if "scale" in given else "softmax_scale"]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)
            return (out, None) if record.gives == "out, lse" else out

        parts = record.module.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            if sys.modules[name] is None:
                module = types.ModuleType(name)
                module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
                monkeypatch.setitem(sys.modules, name, module)
        setattr(sys.modules[record.module], record.function, function)
        if record is XFORMERS:
            sys.modules[record.module].LowerTriangularMask = LowerTriangularMask
        machine.module_missing.cache_clear()
        return calls

    yield add
    machine.module_missing.cache_clear()


def facts_of(capability=(9, 0), **changes):
    given = dict(device=torch.device("cuda"), dtype=BF16, head_dim=64, capability=capability)
    return Facts(**given | changes)


def test_cudnn_precedes_generation_2_on_recent_gpus(install):
    install(FLASH2)
    assert peers.flash_attn_slower(facts_of((8, 0))) is None
    assert "cuDNN" in peers.flash_attn_slower(facts_of((9, 0)))
    install(FLASH3)
    assert peers.flash_attn_slower(facts_of((9, 0))) is None


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", RECORDS)
def test_calls_bind_to_the_published_signature(name, causal, install, monkeypatch):
    """Layout, causality, dropout and scale arrive as they are meant, and the output is right."""
    calls = install(RECORDS[name])
    q, k, v = torch.randn(2, 9, 3, 4, 64).permute(2, 0, 3, 1, 4)
    dropout = 0.1 if name in ("flash-attn 2", "xformers") else 0.0
    call = Call(q, k, v, None, None, causal, dropout, 0.3)
    if name == "xformers":
        out = peers.xformers(call)
        assert calls[0]["p"] == dropout
    else:
        facts = facts_of((10, 0) if name == "flash-attn 4" else (9, 0), deterministic=True, dropout=dropout > 0)
        assert peers.flash_attn_refuses(facts) is None
        monkeypatch.setattr(Facts, "on_this_machine", lambda **_: facts)
        out = peers.flash_attn(call)
        assert calls[0]["deterministic"] is True and calls[0].get("dropout_p", dropout) == dropout
    torch.testing.assert_close(out, attention_reference(q, k, v, causal=causal, scale=0.3))
    assert out.transpose(1, 2).is_contiguous()
    # (B, N, H, K) with the last dimension contiguous, without a copy
    assert calls[0]["query" if name == "xformers" else "q"].data_ptr() == q.data_ptr()


@pytest.mark.parametrize("name", RECORDS)
def test_an_installed_package_still_has_the_signature(name):
    record = RECORDS[name]
    module = pytest.importorskip(record.module, exc_type=Exception)
    if not hasattr(module, record.function):
        pytest.skip(f"another generation than {name} is installed")
    parameters = inspect.signature(getattr(module, record.function)).parameters.values()
    got = tuple((p.name, "-" if p.default is p.empty else p.default) for p in parameters)
    assert got == record.parameters, f"{record.function} of {record.module} is no longer that of {record.package}"


def test_an_installed_xformers_has_the_causal_mask():
    ops = pytest.importorskip("xformers.ops", exc_type=Exception)
    assert ops.LowerTriangularMask() is not None


@pytest.mark.parametrize(
    ("installed", "facts", "generation"),
    (
        ((2, 3, 4), facts_of((9, 0)), 3),
        ((2, 4), facts_of((9, 0)), 4),
        ((2, 3, 4), facts_of((10, 0)), 4),
        ((2, 3, 4), facts_of((10, 0), head_dim=160), 2),
        ((4,), facts_of((9, 0), head_dim=160), 4),
        ((2, 3, 4), facts_of((8, 0)), 2),
        ((2, 3, 4), facts_of((12, 0)), 2),
        ((2, 3, 4), facts_of((9, 0), dropout=True), 2),
        ((3, 4), facts_of((9, 0), dropout=True), None),
        ((4,), facts_of((10, 0), head_dim=160), None),
        ((3,), facts_of((8, 0)), None),
        ((2, 3, 4), facts_of((7, 5)), None),
        ((2, 3, 4), facts_of((9, 0), head_dim=36), None),
        ((2, 3, 4), facts_of((9, 0), head_dim=264), None),
        ((), facts_of((9, 0)), None),
    ),
)
def test_the_best_generation_of_flash_attn_is_taken(installed, facts, generation, install):
    """It is the best that is installed and serves the call; if there is none, there are reasons."""
    for number in installed:
        install(FLASH[number])
    found = peers._generation(facts)
    assert (found and found.number) == generation
    assert (peers.flash_attn_refuses(facts) is None) == (generation is not None)


@pytest.mark.parametrize(
    ("backend", "facts", "reason"),
    (
        ("flash-attn", facts_of(masked=True), "no key mask"),
        ("flash-attn", facts_of(dtype=torch.float32), "not torch.float32"),
        ("flash-attn", facts_of(dropout=True, seeded=True), "a seed was given"),
        ("flash-attn", facts_of(empty=True), "without elements"),
        ("flash-attn", facts_of(compiling=True), "torch.compile does not see"),
        ("flash-attn", facts_of((10, 0), head_dim=160), "flash-attn 4 serves head dims up to 128"),
        ("flash-attn", facts_of(dropout=True), "flash-attn 3 has no dropout"),
        ("flash-attn", facts_of((8, 0)), "flash_attn is not installed"),
        ("xformers", facts_of(), None),
        ("xformers", facts_of(dtype=torch.float32, dropout=True), None),
        ("xformers", facts_of(dtype=torch.float64), "not torch.float64"),
        ("xformers", facts_of(masked=True), "no key mask"),
        ("xformers", facts_of(head_dim=36), "multiples of 8"),
        ("xformers", facts_of(deterministic=True), "no deterministic backward"),
        ("sdpa", facts_of(dropout=True, head_dim=36, dtype=torch.float64), None),
        ("sdpa", facts_of(masked=True), "does not promise zeros on cuda"),
        ("sdpa", facts_of(masked=True, device=torch.device("cpu"), capability=None), None),
        ("eager", facts_of(shape=(8, 32, 1024, 64, 1), dropout=True), None),
        ("eager", facts_of(shape=(8, 1024, 1024, 64, 0)), "take more than 2 times the memory"),
        ("eager", facts_of(shape=(8, 32, 1024, 64, 2), masked=True), "keys are all masked"),
        ("eager", facts_of(shape=(8, 32, 1024, 64, 4), dropout=True, seeded=True), "a seed was given"),
        ("eager", facts_of(shape=(0, 0, 1024, 64, 0), empty=True), "without elements"),
        ("eager", facts_of(compiling=True), "leaves sizes open"),
        ("triton", facts_of(head_dim=48), "32, 64, 96, 128, 160, not 48"),
        ("triton", facts_of(head_dim=160, masked=True, dropout=True, seeded=True), None),
        ("torch", facts_of(head_dim=48, dtype=torch.float64), None),
    ),
)
def test_a_backend_serves_a_call_or_says_why_not(backend, facts, reason, install):
    (declared,) = (b for b in OP.backends if b.name == backend)
    found = OP._refusal(declared, facts, ())
    assert found is None if reason is None else reason in found


def test_packages_may_be_absent_or_broken(install, monkeypatch):
    assert "flash_attn.cute is not installed" in machine.package_missing("flash-attn")
    assert "xformers.ops is not installed" in machine.package_missing("xformers")
    install(FLASH4)
    # only an empty namespace beside generation 4
    assert machine.module_missing("flash_attn", "flash_attn_func") == "flash_attn has no flash_attn_func"
    assert machine.package_missing("flash-attn") is None
    machine.module_missing.cache_clear()

    def broken(name, *_):
        raise OSError("undefined symbol")

    monkeypatch.setattr(machine.importlib.util, "find_spec", broken)
    assert "does not import here (OSError: undefined symbol)" in machine.package_missing("xformers")
