"""Proves that the records of a run survive crashes, full disks and closed terminals, and that its curves are drawn.

python -m pytest tests/train/test_progress.py
"""

import json
import os
import sys
import types

import pytest

from prismer.errors import InputError, MachineError
from prismer.training.config import TrainConfig
from prismer.training.progress import Progress, plot_metrics, read_metrics
from prismer.training.run_folder import RunFolder
from prismer.training.streams import print_line
from prismer.training.wandb_run import WandbRun
from tests.faults.disk import full_after

ROW = dict(step=1, kind="train", loss=0.5, learning_rate=0.1)


def test_records_after_the_resumed_step_are_removed(tmp_path):
    rows = [dict(step=step, kind="train", loss=1.0 / step) for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "ki')
    progress = Progress(tmp_path, 5, 20)
    progress.record(dict(step=6, kind="train", loss=0.25, learning_rate=1e-3, samples_per_s=3.0))
    progress.close()
    found = read_metrics(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6] and found[-1]["loss"] == 0.25


@pytest.mark.parametrize("scored", [{}, {"CIDEr-D": 2.0}, {"CIDEr-D": 2.0, "accuracy": 0.5, "accuracy/yes/no": 0.7}])
def test_curves_are_drawn_with_and_without_scores(tmp_path, scored):
    rows = [dict(step=step, kind="train", loss=1.0 / step, learning_rate=1e-3) for step in range(1, 9)]
    if scored:
        rows.append(dict(step=8, kind="validation", score=0.5, **scored))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_metrics(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "line",
    [
        b"5",
        b"[]",
        b"{}",
        b"\xff",
        b'{"step": "1", "kind": "train"}',
        b'{"step": 1}',
        b'{"step": 1, "kind": 5}',
        b'{"step": 1, "kind": "train", "loss": "x"}',
        b'{"step": 1, "kind": "skipped", "key": "a"}',
        b'{"step": 1, "kind": "validation", "score": []}',
        b'{"step": 1, "ki',
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_named(tmp_path, line):
    """A damaged line in the middle is named, and no line is lost; a last line that was cut short is left out."""
    good = json.dumps(ROW).encode() + b"\n"
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(good + line + b"\n" + good)
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is damaged"):
        RunFolder(tmp_path).check_files()
    with pytest.raises(ValueError, match="line 2"):
        Progress(tmp_path, 5, 9)
    assert file.read_bytes() == good + line + b"\n" + good
    file.write_bytes(good + line)
    assert read_metrics(tmp_path) == [ROW]


def test_a_full_disk_names_the_record_file(tmp_path):
    progress = Progress(tmp_path, 0, 9)
    # a thread of TensorBoard writes the head of its file; the limit below must not stop this write
    progress._board.flush()
    with pytest.raises(OSError) as caught, full_after(3):
        progress.record(ROW | {"samples_per_s": 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    progress.close()


class Wandb(types.ModuleType):
    """A stand-in for the library, which notes its calls."""

    Error = type("Error", (Exception,), {})

    def __init__(self, refusal=""):
        super().__init__("wandb")
        self.refusal, self.calls = refusal, []

    def init(self, **options):
        if self.refusal:
            raise self.Error(self.refusal)
        self.calls.append(options)
        return types.SimpleNamespace(
            define_metric=lambda *_, **options: self.calls.append(options),
            log=self.calls.append,
            finish=lambda: self.calls.append("finish"),
        )


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", library := Wandb())
    config = TrainConfig(wandb="prismer", run="mine")
    ids = []
    for start in (0, 5, 0):
        library.calls.clear()
        progress = Progress(tmp_path, start, 9, WandbRun(config, tmp_path, start))
        progress.record(dict(step=start + 1, kind="train", loss=2.5, samples_per_s=8.0))
        progress.record(dict(step=start + 1, kind="skipped", split="train", shard="a", key="b"))
        progress.record(dict(step=start + 1, kind="validation/coco", accuracy=0.5))
        progress.close()
        opened, *_, first, second, end = library.calls
        assert (opened["project"], opened["name"], opened["config"]["seed"]) == ("prismer", "mine", config.seed)
        assert first == {"step": start + 1, "train/loss": 2.5, "train/samples_per_s": 8.0}
        assert second == {"step": start + 1, "validation/coco/accuracy": 0.5} and end == "finish"
        assert {"step_metric": "step"} in library.calls
        ids.append(opened["id"])
    assert ids[0] == ids[1] != ids[2]


def test_a_missing_or_refusing_wandb_is_one_sentence(tmp_path, monkeypatch):
    config = TrainConfig(wandb="prismer")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MachineError, match=r"^wandb is not installed; run pip install 'prismer-vlm\[wandb\]'$"):
        WandbRun(config, tmp_path, 0)
    monkeypatch.setitem(sys.modules, "wandb", Wandb("api_key not configured (no-tty)\nmore"))
    with pytest.raises(
        InputError, match=r"^wandb does not start \(api_key not configured \(no-tty\)\); run wandb login"
    ):
        WandbRun(config, tmp_path, 0)


def test_a_closed_pipe_and_a_full_disk_end_only_the_printing(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        print_line("a", file)
        print_line("b", file)
    with open("/dev/full", "w") as file:
        print_line("a", file)
    assert "standard output cannot be written (No space left on device)" in capfd.readouterr().err
