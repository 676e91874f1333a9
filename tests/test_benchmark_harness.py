"""Proves, without a GPU, that benchmarks measure there what they say: host times hold no wait for the device, device
times come from the same rounds, and every tensor lies on the device.

Run: pytest tests/test_benchmark_harness.py
"""

import types

import pytest
import torch
from torch import nn

from benchmarks import conftest, harness, test_decode_attention, test_drop_in, test_resampler_attention
from benchmarks.harness import OURS, Contender

META = torch.device("meta")
MASKED = test_drop_in.bert_encoder, test_drop_in.idefics2_resampler


class Clock:
    """A host that needs a second to launch a call, and a device that needs a hundred to run it."""

    def __init__(self):
        self.now, self.queued, self.order = 0.0, 0, []

    def perf_counter(self):
        return self.now

    def launch(self, name):
        self.order.append(name)
        self.now += 1.0
        self.queued += 1
        return torch.zeros(1)

    def synchronize(self):
        self.now += 100.0 * self.queued
        self.queued = 0


class Benchmark:
    """pytest-benchmark's fixture, as far as the harness uses it, on a clock."""

    def __init__(self, clock):
        self.clock, self.extra_info, self.group = clock, {}, ""
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(data=[]))

    def pedantic(self, function, setup, rounds, iterations, warmup_rounds):
        for i in range(warmup_rounds + rounds):
            setup()
            start = self.clock.now
            function()
            if i >= warmup_rounds:
                self.stats.stats.data.append(self.clock.now - start)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=found.perf_counter))
    monkeypatch.setattr(harness, "synchronize", found.synchronize)
    monkeypatch.setattr(harness, "peak_bytes", lambda call: 0)
    monkeypatch.setattr(harness, "MEASUREMENTS", [])
    return found


def test_host_time_holds_no_wait_for_the_device(clock, monkeypatch):
    """And device time comes from the timer, as ratios of the times of one round."""
    monkeypatch.setattr(harness, "DEVICE", types.SimpleNamespace(type="cuda"))
    device = {"eager": iter(range(2, 100)), OURS: iter(range(1, 99))}

    def timer(call, device_type):
        assert device_type == "cuda"
        # the name of the contender, of whose call this is a part
        call()
        name = clock.order[-1]
        return (lambda: float(next(device[name]))), "graph replay"

    monkeypatch.setattr(harness, "timer", timer)
    calls = {name: Contender(run=lambda name=name: clock.launch(name)) for name in (OURS, "eager")}
    rows = harness.time_contenders(
        Benchmark(clock), calls, room="toy", shape="S", dtype=torch.bfloat16, part="forward", seconds=1000.0
    )
    for name, row in rows.items():
        assert row.host_ms == 1e3, name
    assert rows[OURS].ratio == 1 and rows["eager"].milliseconds == rows[OURS].milliseconds + 1e3
    n = min(rows[OURS].rounds, harness.DEVICE_ROUNDS)
    ratios = sorted((i + 1) / i for i in range(1, n + 1))
    assert rows["eager"].ratio == pytest.approx((ratios[(n - 1) // 2] + ratios[n // 2]) / 2)


def test_ours_runs_last_in_a_round(clock):
    functions = {name: (lambda name=name: clock.launch(name)) for name in (OURS, "eager", "sdpa")}
    times = harness.time_on_host(Benchmark(clock), functions, 4)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(functions, 4)
    rounds = [clock.order[i : i + 3] for i in range(0, len(clock.order), 3)]
    assert all(round[-1] == OURS for round in rounds) and {round[0] for round in rounds} == {"eager", "sdpa"}


def test_device_times_run_on_the_stand_in():
    """On a CPU the timer takes the time of the thread, through the same code."""
    x = torch.randn(64, 64)
    times = harness.time_on_device({OURS: lambda: x @ x, "eager": lambda: x @ x}, 3)
    assert {name: len(values) for name, values in times.items()} == {OURS: 3, "eager": 3}
    assert all(value > 0 for values in times.values() for value in values)


@pytest.mark.parametrize("family", test_drop_in.FAMILIES, ids=lambda family: family.__name__)
def test_a_family_runs_on_the_device(family, monkeypatch):
    """A tensor of the CPU beside one of the meta device raises."""
    monkeypatch.setattr(test_drop_in, "DEVICE", META)
    plain, inputs, run = family()
    call = test_drop_in.build_call(plain.to(META), inputs, run, torch.float32)
    assert {t.device for t in call.inputs} == {META}
    try:
        assert call.forward().device == META
    except RuntimeError as error:
        # transformers reads these masks on the host: then they are of the meta device
        assert "cannot be called on meta tensors" in str(error) and family in MASKED


def test_the_resampler_runs_on_the_device(monkeypatch):
    monkeypatch.setattr(test_resampler_attention, "DEVICE", META)
    made = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device, dtype: made.append(device) or self)
    contenders = test_resampler_attention.module_calls(7, 24)(torch.float32)
    assert made == [META, META] and all(c.inputs[0].device == META for c in contenders.values())


@pytest.mark.parametrize("shape", test_decode_attention.SHAPES)
def test_decode_attention_is_timed_at_calls_of_the_model(shape):
    """The shared keys are those of a prompt, never those of an image; every query lists slots that exist."""
    R, H, Q, S, M, A = test_decode_attention.SHAPES[shape]
    assert S <= 16 and A <= M and (M == Q or M == Q * A)
    q, shared_k, _, mask, suffix_k, _, ancestors = test_decode_attention.draws(R, H, Q, S, M, A)
    assert q.shape == (R, H, Q, 64) and mask.sum() == R * S and shared_k.shape[2] == mask.shape[1]
    assert suffix_k.shape == (R, H, M, 64) and ancestors.shape == (R, Q, A) and ancestors.max() < M


def test_no_benchmark_starts_when_the_minutes_are_spent(monkeypatch):
    def item(**options):
        return types.SimpleNamespace(config=types.SimpleNamespace(getoption=lambda name: options[name[2:]]))

    monkeypatch.setattr(conftest, "STARTED", conftest.time.monotonic() - 61)
    conftest.pytest_runtest_setup(item(minutes=2.0, full=False))
    conftest.pytest_runtest_setup(item(minutes=1.0, full=True))
    with pytest.raises(pytest.skip.Exception, match="--minutes is spent"):
        conftest.pytest_runtest_setup(item(minutes=1.0, full=False))


def test_fp32_is_left_out_on_a_gpu(monkeypatch):
    conftest.skip_slow_dtype(torch.float32, False)
    monkeypatch.setattr(conftest, "DEVICE", types.SimpleNamespace(type="cuda"))
    conftest.skip_slow_dtype(torch.bfloat16, False)
    conftest.skip_slow_dtype(torch.float32, True)
    with pytest.raises(pytest.skip.Exception, match="--full has fp32"):
        conftest.skip_slow_dtype(torch.float32, False)
