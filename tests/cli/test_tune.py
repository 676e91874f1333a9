"""Proves what `prismer tune` measures, writes and prints, and that commands say so where nothing was measured.

Run: pytest tests/cli/test_tune.py
"""

import json

import pytest
import torch

from prismer.costs import tuned_calls
from prismer.costs.info import info_text, model_config
from prismer.kernels import tuning
from prismer.kernels.tuning import tables
from prismer.kernels.tuning.measure import Measurement
from prismer.kernels.tuning.tables import Table
from tests.cli.commands import assert_refused

CPU = torch.device("cpu")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty home for tables; what this process knew comes back afterwards."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    before = tuning.table("cpu")
    tuning.forget()
    yield tmp_path / "home"
    tuning.use_table("cpu", before)


@pytest.fixture
def quick(monkeypatch):
    """A round each, whatever time is asked for; where bf16 is emulated it would take minutes."""
    monkeypatch.setattr("prismer.kernels.tuning.measure._LEAST_ROUNDS", 1)
    monkeypatch.setattr("prismer.kernels.tuning.measure._SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(tuned_calls, "precisions", lambda device: (torch.float32,))
    monkeypatch.setattr(tuned_calls, "caption_seconds", lambda config: {torch.float32: 1.0, torch.bfloat16: 2.0})


def test_tune_writes_a_table_that_is_taken_at_once(run, model, home, quick):
    done = run("tune", "--model", model, "--batch", 2, "--seconds", 1, "--device", "cpu")
    assert done.code == 0, done.err
    (file,) = (home / "tuned").glob("*.json")
    table = Table.from_json(file.read_text())
    assert table.machine == tables.machine("cpu")
    assert {"layer_norm", "linear", "attention", "mlp"} <= {entry.op for entry in table.entries}
    assert all(entry.choice in entry.microseconds for entry in table.entries)
    assert "calls keep the implementation they had" in done.out and str(file) in done.err
    tuning.forget()
    assert tuning.table("cpu").digest == table.digest and tuning.advice("cpu") is None
    assert table.digest in info_text("tiny") and "measured: " in info_text("tiny")


@pytest.mark.long
def test_a_second_measurement_keeps_the_calls_of_the_first(run, model, home, quick, monkeypatch):
    assert run("tune", "--model", model, "--batch", 2, "--seconds", 1, "--device", "cpu").code == 0
    (file,) = (home / "tuned").glob("*.json")
    first = {entry.key for entry in Table.from_json(file.read_text()).entries}
    tuning.forget()
    shape = (4, 6, 0)
    monkeypatch.setattr(tuned_calls, "record_calls", lambda *_: {("layer_norm", torch.float32, False, shape): shape})
    assert run("tune", "--model", model, "--seconds", 1, "--device", "cpu").code == 0
    second = {entry.key for entry in Table.from_json(file.read_text()).entries}
    assert len(second - first) == 1 and first <= second


def test_a_damaged_table_is_measured_again(run, model, home, quick, monkeypatch):
    path = tables.user_path(tables.machine("cpu"))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    monkeypatch.setattr(tuned_calls, "record_calls", lambda *_: {})
    assert run("tune", "--model", model, "--device", "cpu").code == 0
    assert json.loads(path.read_text())["machine"] == tables.machine("cpu")


def test_the_recorded_calls_are_those_of_training_captions_and_ranking(model, monkeypatch):
    monkeypatch.setattr(tuned_calls, "precisions", lambda device: (torch.float32,))
    calls = tuned_calls.record_calls(model_config(str(model)), 2, CPU)
    norms = [key for key in calls if key[0] == "layer_norm"]
    assert {gradient for _, _, gradient, _ in norms} == {False, True}
    assert {op for op, *_ in calls} >= {"layer_norm", "linear", "linears", "attention", "cross_attention", "mlp"}
    # a trie's nodes are more rows than beams are
    assert len({shape[0] for op, _, _, shape in calls if op == "linear"}) > 2


def test_layers_repeat_so_that_two_make_every_call():
    config = model_config("tiny").replace(
        vision_width=32, vision_heads=2, text_width=32, text_heads=2, text_mlp_width=64
    )
    config = config.replace(image_size=32, label_size=32, vocab_size=300)
    found = [
        set(tuned_calls.record_calls(config.replace(vision_depth=depth, text_depth=depth), 1, CPU)) for depth in (2, 3)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--model", "no/such"], "no model folder"),
        (["--device", "tpu"], "unknown device"),
        (["--compile", "--device", "cpu"], "leave it out"),
        (["--image-size", "1"], "image_size"),
    ),
)
def test_bad_arguments_are_refused_in_one_sentence(run, arguments, words):
    assert_refused(run("tune", *arguments), words)


def test_a_caption_says_that_nothing_was_measured(run, images, home):
    done = run("caption", images[0], "--model", "tiny", "--device", "cpu")
    assert done.code == 0 and [line for line in done.err.splitlines() if "prismer tune" in line]
    assert done.err.count("prismer tune") == 1


def test_a_measurement_that_is_stopped_writes_nothing(run, model, home, quick, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "measure", stop)
    assert run("tune", "--model", model, "--device", "cpu").code == 130
    assert not list(home.rglob("*.json"))
