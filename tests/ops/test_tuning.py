"""Proves that a measured choice is found, checked, written and read back, and that a bad table changes nothing.

Run: pytest tests/ops/test_tuning.py
"""

import functools
import json
import logging
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from prismer.kernels import dispatch, machine, tuning
from prismer.kernels.activation import OP as ACTIVATION
from prismer.kernels.attention import OP as ATTENTION
from prismer.kernels.attention import attention
from prismer.kernels.cross_attention import cross_attention
from prismer.kernels.dispatch import TORCH, Backend, Op, use_backend
from prismer.kernels.errors import InputError
from prismer.kernels.layer_norm import OP as NORM
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.tuning import measure, tables
from prismer.kernels.tuning.measure import Measurement, pick
from prismer.kernels.tuning.tables import Entry, Table

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
NORM_KEY = ("layer_norm", torch.float32, False, (8, 6, 0))


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home for tables of its own; what was loaded before is forgotten, and forgotten again afterwards."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    before = tuning.table("cpu")
    tuning.forget()
    yield tmp_path
    tuning.use_table("cpu", before)


def entry(choice="native", key=NORM_KEY, prior="host", **times):
    op, dtype, gradient, shape = key
    return Entry(
        op=op,
        dtype=str(dtype).removeprefix("torch."),
        gradient=gradient,
        shape=shape,
        choice=choice,
        prior=prior,
        threads=torch.get_num_threads(),
        microseconds=times,
    )


@pytest.fixture
def threads():
    """Sets the number of torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def write(table, path=None):
    path = path or tables.user_path(tables.device_facts("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.to_json())
    return path


# the table


def test_rows_are_rounded_up_to_a_power_of_two():
    assert [tuning.rows_class(n) for n in (0, 1, 2, 3, 4, 5, 1000, 1024)] == [0, 1, 2, 4, 4, 8, 1024, 1024]


def test_tokens_have_two_classes_for_each_doubling():
    numbers = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 257, 384, 385, 512)
    assert [tuning.tokens_class(n) for n in numbers] == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 384, 384, 512, 512]


def test_a_table_survives_its_file():
    table = Table(machine=dict(device="x", instructions="avx2"), entries=(entry(native=2.0, host=3.0),))
    again = Table.from_json(table.to_json())
    assert again == table and again.to_json() == table.to_json() and again.digest == table.digest
    assert again.choices()[NORM_KEY] == "native" and again.entries[0].gain == 1.5


def test_classes_of_rows_near_a_measured_one_take_its_choice():
    def norm(rows, width, choice):
        return entry(choice, ("layer_norm", torch.float32, False, (rows, width, 0)))

    found = Table(entries=(norm(8, 6, "native"), norm(256, 6, "host"), norm(8, 7, "torch"))).choices()
    rows = {key[3][0]: choice for key, choice in found.items() if key[3][1] == 6}
    assert rows == {n: "native" for n in (2, 4, 8, 16, 32)} | {n: "host" for n in (64, 128, 256, 512, 1024)}
    assert found["layer_norm", torch.float32, False, (16, 7, 0)] == "torch"
    assert ("layer_norm", torch.float32, True, (8, 6, 0)) not in found
    assert (
        Table(entries=(norm(1, 6, "native"), norm(4, 6, "host"))).choices()[
            "layer_norm", torch.float32, False, (2, 6, 0)
        ]
        == "native"
    )


def test_the_digest_is_of_the_choices_alone():
    table = Table(entries=(entry(native=2.0, host=3.0),))
    assert Table(entries=(entry(native=1.0, host=9.0),)).digest == table.digest
    assert Table(entries=(entry("host", native=2.0, host=3.0),)).digest != table.digest


def test_a_table_of_this_machine_is_found(home):
    path = write(Table(machine=tables.machine("cpu"), entries=(entry(),)))
    assert tuning.choice("cpu", NORM_KEY) == "native"
    assert tuning.choice("cpu", (*NORM_KEY[:3], (16, 7, 0))) is None
    assert tuning.table().source == str(path) and tuning.advice("cpu") is None


def test_without_a_table_one_line_says_what_to_type(home):
    assert tuning.choice("cpu", NORM_KEY) is None
    assert "prismer tune" in tuning.advice("cpu")


def test_a_table_for_another_number_of_threads_is_taken_with_one_line(home, threads):
    write(Table(machine=tables.machine("cpu"), entries=(entry(), entry("torch", (*NORM_KEY[:3], (8, 7, 0))))))
    threads(torch.get_num_threads() + 1)
    assert tuning.choice("cpu", NORM_KEY) == "native"
    assert "threads" in tuning.advice("cpu") and "prismer tune" in tuning.advice("cpu")


def test_an_entry_that_does_not_say_was_measured_with_one_thread():
    content = json.loads(GOOD)
    assert content["entries"][0].pop("threads") == torch.get_num_threads()
    assert Table.from_json(json.dumps(content)).entries[0].threads == 1


@pytest.mark.parametrize("fact", ("torch", "triton", "sources"))
def test_a_table_of_another_version_is_put_aside_with_one_line(home, caplog, fact):
    write(Table(machine=tables.machine("cpu") | {fact: "another"}, entries=(entry(),)))
    with caplog.at_level(logging.WARNING, "prismer.kernels"):
        assert tuning.choice("cpu", NORM_KEY) is None
    assert [fact in r.getMessage() and "prismer tune" in r.getMessage() for r in caplog.records] == [True]
    assert tuning.advice("cpu") == caplog.records[0].getMessage()


GOOD = Table(machine=dict(device="x"), entries=(entry(native=1.0),)).to_json()


@pytest.mark.parametrize(
    "text",
    (
        "",
        "{",
        "[]",
        "null",
        '{"format": 2, "machine": {}, "entries": []}',
        '{"format": 1, "machine": [], "entries": []}',
        '{"format": 1, "machine": {}, "entries": [{}]}',
        GOOD[: len(GOOD) // 2],
        GOOD.replace("float32", "Tensor"),
        GOOD.replace("float32", "float33"),
        GOOD.replace('"native": 1.0', '"native": -1.0'),
        GOOD.replace("false", "0"),
        GOOD.replace("6,", '"6",'),
        GOOD.replace(f'"threads": {torch.get_num_threads()}', '"threads": 0'),
        GOOD.replace(f'"threads": {torch.get_num_threads()}', '"threads": true'),
    ),
)
def test_a_damaged_table_is_put_aside_with_one_line(home, caplog, text):
    assert text != GOOD
    write(Table()).write_text(text)
    with caplog.at_level(logging.WARNING, "prismer.kernels"):
        assert tuning.choice("cpu", NORM_KEY) is None
        assert tuning.choice("cpu", NORM_KEY) is None
    assert len(caplog.records) == 1 and "cannot be used" in caplog.records[0].getMessage()


def test_a_file_that_is_not_text_is_put_aside(home):
    write(Table()).write_bytes(b"\xff\xfe\x00")
    assert tuning.choice("cpu", NORM_KEY) is None and "cannot be used" in tuning.advice("cpu")


def test_a_shipped_table_serves_until_the_user_measures(home):
    shipped = tables.SHIPPED / f"{tables.slug(tables.device_facts('cpu'))}.json"
    write(Table(machine=dict(torch="older"), entries=(entry("torch"),)), shipped)
    assert tuning.choice("cpu", NORM_KEY) == "torch" and tuning.table().source == str(shipped)
    write(Table(machine=tables.machine("cpu"), entries=(entry(),)))
    tuning.forget()
    assert tuning.choice("cpu", NORM_KEY) == "native"


@pytest.mark.parametrize("variable", tables.LIMITS)
def test_a_limited_instruction_set_has_a_table_of_its_own(home, monkeypatch, variable):
    whole = tables.user_path(tables.device_facts("cpu"))
    monkeypatch.setenv(variable, "avx2")
    assert tables.user_path(tables.device_facts("cpu")) != whole


def test_every_shipped_table_can_be_read():
    for path in (tables.PACKAGE / "tuned").glob("*.json"):
        table = Table.from_json(path.read_text())
        assert path.stem == tables.slug(table.machine) and table.entries


@pytest.mark.parametrize(
    ("flags", "limits", "expected"),
    (
        ("avx512f amx_bf16", {}, True),
        ("avx512f", {}, False),
        ("avx512f amx_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False),
        ("avx512f amx_bf16", {"ONEDNN_MAX_CPU_ISA": "avx512_core_amx"}, True),
        ("avx512f amx_bf16", {"ATEN_CPU_CAPABILITY": "avx2"}, False),
    ),
)
def test_amx_counts_where_torch_may_use_it(monkeypatch, flags, limits, expected):
    monkeypatch.setattr(tables, "_cpu", lambda: dict(device="x", instructions=flags))
    for name in tables.LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    assert tables.has_amx() is expected


# what the ops take


def paths_of(call):
    """What each op took, by name of the op."""
    with tuning.recording() as taken:
        call()
    return {key[0]: choice for (_, key), choice in taken.items()}


@pytest.mark.parametrize("choice", ("host", "native", "torch"))
def test_an_op_takes_what_the_table_says(choice):
    x, weight = torch.randn(5, 6), torch.randn(6)
    with tuning.forcing({NORM_KEY: choice}):
        assert paths_of(lambda: layer_norm(x, weight, weight))["layer_norm"] == choice
        torch.testing.assert_close(layer_norm(x, weight, weight), F.layer_norm(x, (6,), weight, weight))


def test_the_gradient_and_the_residual_sum_have_entries_of_their_own():
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(6)
    forced = {NORM_KEY: "native", ("layer_norm", torch.float32, True, (8, 6, 0)): "torch"}
    with tuning.forcing(forced):
        layer_norm(x, weight, weight)
        with tuning.recording() as taken:
            layer_norm(x, weight, weight).sum().backward()
        assert taken["cpu", ("layer_norm", torch.float32, True, (8, 6, 0))] == "torch"
        assert taken["cpu", NORM_KEY] == "native"
        assert paths_of(lambda: add_layer_norm(x.detach(), x.detach(), weight, weight))["layer_norm"] == "host"


def test_attention_takes_what_the_table_says_for_its_shape():
    q = torch.randn(1, 2, 5, 16)
    key = ("attention", torch.float32, False, (2, 6, 6, 16, 0))
    for choice in ("native", "sdpa", "torch"):
        with tuning.forcing({key: choice}):
            assert paths_of(lambda: attention(q, q, q))["attention"] == choice
    with tuning.forcing({key: "torch"}):
        assert paths_of(lambda: attention(q, q, q, causal=True))["attention"] != "torch"


def test_cross_attention_takes_the_order_of_the_table():
    q, context, weight = torch.randn(1, 3, 8), torch.randn(1, 9, 8), torch.randn(8, 8)
    call = lambda: cross_attention(q, context, weight, None, weight, None, 2)  # noqa: E731
    for order in ("absorbed", "ordinary"):
        with tuning.forcing({("cross_attention", torch.float32, False, (1, 3, 12, 8, 8, 2)): order}):
            assert paths_of(call)["cross_attention"] == order


def test_a_choice_that_does_not_serve_the_call_leaves_the_prior(monkeypatch):
    """Such as one of a shipped table, whose implementation is gone."""
    toy = Op(name="toy", reference=None, backends=(Backend(name="sdpa", refuses=lambda x: "never"), TORCH))
    key = ("toy", torch.float32, False, (4, 3))
    for choice in ("sdpa", "xformers", "nothing"):
        with tuning.forcing({key: choice}):
            assert toy.choose(torch.randn(4, 3)) == "torch"


def test_a_backend_that_is_asked_for_precedes_the_table():
    x = torch.randn(5, 6)
    with tuning.forcing({NORM_KEY: "host"}), use_backend("layer_norm:torch"):
        assert NORM.route(x, None, None, None) == "op" and NORM.choose(x, None, None, None) == "torch"


def test_a_table_that_comes_later_counts_at_once():
    x = torch.randn(5, 6)
    prior = ACTIVATION.choose(x, "gelu")
    with tuning.forcing({("bias_activation", torch.float32, False, (8, 6, 1)): "torch"}):
        assert ACTIVATION.choose(x, "gelu") == "torch"
    assert ACTIVATION.choose(x, "gelu") == prior


# asking for the backend of one op


def test_backends_of_single_ops_are_asked_for():
    with use_backend("torch, attention:sdpa"):
        assert dispatch.asked() == "torch" == dispatch.asked("mlp") and dispatch.asked("attention") == "sdpa"
        assert ATTENTION.name == "attention"
    with use_backend("mlp:torch"):
        assert dispatch.asked("mlp") == "torch" and dispatch.asked() is None
        assert dispatch.on_host(torch.randn(2), "layer_norm") and not dispatch.on_host(torch.randn(2), "mlp")


@pytest.mark.parametrize(("text", "said"), (("mlp:fast", "fast"), ("mpl:torch", "mpl"), ("a:b:torch", "a:b")))
def test_a_wrong_name_is_refused_in_one_sentence(text, said):
    with pytest.raises(InputError, match=said), use_backend(text):
        pass


def test_the_names_of_ops_in_the_sources_are_those_of_the_ops():
    assert dispatch._declared() == {op.name for op in dispatch.all_ops()}


# the measurement


class Clock:
    """A timer that says what a test wants: seconds by the implementation that runs."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, call):
        with tuning.recording() as taken:
            result = call()
        count = len(result) if isinstance(result, list) else 1
        return count * next(self.seconds[choice] for (_, key), choice in taken.items() if key[0] == "layer_norm")


def measured(seconds, key=NORM_KEY):
    return Measurement(device=CPU, seconds=0, timer=Clock(seconds)).measure(key, key[3])


NEEDS_NATIVE = pytest.mark.skipif(machine.native_missing() is not None, reason="the native extension is not built")


@NEEDS_NATIVE
def test_ours_is_taken_if_it_is_faster_by_the_margin():
    found = measured(dict(host=1e-3, native=0.5e-3, torch=2e-3))
    assert found.choice == "native" and found.prior == "host" and found.gain == pytest.approx(2)
    assert found.microseconds == pytest.approx(dict(host=1000, native=500, torch=2000))


@NEEDS_NATIVE
def test_ours_loses_where_it_is_not_faster_by_the_margin():
    assert measured(dict(host=1e-3, native=0.98e-3, torch=2e-3)).choice == "host"
    assert measured(dict(host=1e-3, native=1.5e-3, torch=0.9e-3)).choice == "torch"


@NEEDS_NATIVE
def test_ours_is_not_timed_if_it_is_wrong(monkeypatch):
    run = torch.ops.prismer_native.layer_norm

    def wrong(*args):
        y, *rest = run(*args)
        return y * 1.001, *rest

    monkeypatch.setattr(torch.ops.prismer_native, "layer_norm", wrong)
    found = measured(dict(host=1e-3, native=1e-6, torch=2e-3))
    assert found.choice == "host" and "native" not in found.microseconds


@NEEDS_NATIVE
@pytest.mark.parametrize(("count", "choice"), ((1, "native"), (2, "host")))
def test_with_more_threads_the_time_that_passes_decides(monkeypatch, threads, count, choice):
    """The processor time of one thread says nothing of an implementation that uses all of them."""
    seen = []

    class Counted(Clock):
        def __call__(self, call):
            seen.append(torch.get_num_threads())
            return super().__call__(call)

    monkeypatch.setattr(measure, "processor_seconds", Counted(dict(host=1e-3, native=0.5e-3, torch=2e-3)))
    monkeypatch.setattr(measure, "passed_seconds", Counted(dict(host=1e-3, native=1.1e-3, torch=2e-3)))
    threads(count)
    measurement = Measurement(device=CPU, seconds=0)
    ((_, found),) = measurement.run({NORM_KEY: NORM_KEY[3]})
    assert (found.choice, found.threads) == (choice, count)
    assert set(seen) == {count} and torch.get_num_threads() == count
    # a warm-up or two, then rounds of three implementations
    rounds = measure._LEAST_ROUNDS * (1 if count == 1 else measure._MORE_ROUNDS)
    assert 3 * (rounds + 1) <= len(seen) <= 3 * (rounds + 2)


def test_ours_has_to_win_the_median_of_disturbed_rounds():
    """One quiet round in which ours is fast, and one noisy one in which the vendor is slow, do not decide."""
    assert pick(dict(host=[1.0, 1.0, 9.0, 1.0, 1.0], native=[0.1, 1.0, 1.0, 0.99, 1.0])) == "host"
    assert pick(dict(host=[1.0, 1.1, 9.0, 1.0, 1.0], native=[0.9, 1.0, 9.5, 0.9, 0.9])) == "native"


def test_both_clocks_tell_seconds():
    slow = functools.partial(time.sleep, 0.02)
    assert measure.passed_seconds(slow) >= 0.02 > measure.processor_seconds(slow)


def test_the_margin_is_judged_round_by_round():
    """A machine that slows down for a while slows both."""
    assert pick(dict(torch=[1.0, 10.0, 1.0], native=[0.9, 9.0, 0.9])) == "native"
    assert pick(dict(torch=[1.0, 10.0, 1.0], native=[0.98, 9.8, 0.98])) == "torch"
    assert pick(dict(native=[2.0], triton=[1.0])) == "triton"


def test_a_call_with_one_implementation_gives_no_entry():
    assert measured({}, ("linear_cross_entropy", torch.float32, False, (8, 6))) is None
    assert measured({}, ("philox_kept", torch.float32, False, (8, 6))) is None


EXAMPLES = {
    "layer_norm": (8, 6, 1),
    "bias_activation": (8, 6, 2),
    "mlp": (8, 6, 12, 6),
    "linears": (8, 6, 12),
    "linear": (8, 6, 12),
    "attention": (2, 8, 8, 16, 3),
    "cross_attention": (2, 4, 8, 16, 16, 2),
    "resampler_attention": (2, 4, 8, 16, 2),
}


def test_every_example_is_tried():
    assert set(EXAMPLES) == {op.name for op in dispatch.all_ops() if op.example}


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_op_can_be_measured_from_its_class(name, dtype, gradient):
    """The example of a class makes a call of just this class, and every implementation of it passes the gate."""
    key = (name, dtype, gradient, EXAMPLES[name])
    op = {op.name: op for op in dispatch.all_ops()}[name]
    function, arguments = op.example(EXAMPLES[name], dtype, CPU)
    gradient = gradient and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    with tuning.recording() as taken, torch.set_grad_enabled(gradient):
        output = function(*arguments)
        output = output[0] if isinstance(output, tuple) else output
        if gradient:
            output.sum().backward()
    assert ("cpu", (name, dtype, gradient, EXAMPLES[name])) in taken
    found = Measurement(device=CPU, seconds=0).measure(key, key[3])
    if found is not None:
        assert found.choice in found.microseconds and found.prior in found.microseconds
        assert len(found.microseconds) > 1


def test_attention_is_measured_with_the_tokens_that_were_recorded(monkeypatch):
    q, k = (torch.randn(1, 2, n, 8) for n in (5, 9))
    with tuning.recording() as taken:
        attention(q, k, k)
    (key,) = [key for _, key in taken if key[0] == "attention"]
    assert key[3][:3] == (2, 6, 12)
    assert taken.to_measure("cpu")[key][:3] == (2, 5, 9)
    seen = []
    op = {op.name: op for op in dispatch.all_ops()}["attention"]
    example = op.example
    monkeypatch.setitem(vars(op), "example", lambda shape, *rest: seen.append(shape) or example(shape, *rest))
    ((_, found),) = Measurement(device=CPU, seconds=0).run(taken.to_measure("cpu"))
    assert seen == [(2, 5, 9, *key[3][3:])] and found.key == key


def test_leaf_ops_are_measured_before_what_consists_of_them():
    keys = dict.fromkeys([("mlp", torch.float32, False, (1,)), ("linear", torch.float32, False, (1,))], 1)
    assert [key[0] for key in measure.in_order(keys)] == ["linear", "mlp"]


def test_a_later_key_is_measured_with_what_was_chosen_before():
    measurement = Measurement(device=CPU, seconds=0)
    measurement.entries.append(entry("torch"))
    with measurement._forcing(("mlp", torch.float32, False, (1, 2, 3, 4)), "host"):
        assert tuning.choice("cpu", NORM_KEY) == "torch"


def test_a_gpu_is_measured_by_device_time_or_host_time(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def elapsed_time(self, end):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert measure.gpu_seconds(lambda: None) == pytest.approx(7e-3)


def test_an_entry_without_a_time_of_its_prior_gains_nothing():
    assert replace(entry(native=1.0), prior="").gain == 1.0


def test_the_table_is_json_that_people_can_read():
    content = json.loads(Table(machine=dict(device="x"), entries=(entry(native=1.0),)).to_json())
    assert content["entries"][0]["shape"] == [8, 6, 0] and content["entries"][0]["choice"] == "native"
