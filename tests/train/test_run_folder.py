"""A run's folder loses nothing: damaged or lost files are named with the way on, and only its own checkpoints go.

python -m pytest tests/train/test_run_folder.py
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from prismer.files import write_checksums, write_json
from prismer.tensor_files import save_tensors
from prismer.training.config import TrainConfig
from prismer.training.progress import Progress, read_metrics, tell
from prismer.training.run_folder import OPTIMIZER, RunFolder, export_checkpoint, read_answers
from tests.faults.disk import full_after

CONFIG = TrainConfig(batch_size=32)


def put(run: RunFolder, step: int, score: float | None = None) -> None:
    """What `RunFolder.save` does on rank 0, with small tensors."""
    target = run.checkpoints / f"step-{step:08d}"
    aside = target.with_name(target.name + ".partial")
    aside.mkdir(parents=True)
    sums = {name: save_tensors({"x": torch.rand(50)}, aside / name) for name in ("model.safetensors", OPTIMIZER)}
    write_json(aside / "config.json", {})
    write_json(aside / "trainer.json", dict(step=step, loss_sum=0.5, loss_count=1, score=score))
    write_checksums(aside, sums)
    run._enter(aside, target, score)


def steps(run: RunFolder) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in run.checkpoints.glob("step-*"))


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 1 (the best), 3 and 4."""
    run = RunFolder(tmp_path / "run")
    run.claim()
    run.settle(CONFIG, lambda: "fp32")
    for step, score in ((1, 0.5), (2, None), (3, 0.25), (4, None)):
        put(run, step, score)
    return run


def test_the_last_two_and_the_best_stay(run):
    assert steps(run) == ["1", "3", "4"]
    assert run.last().name == "step-00000004" and run.best().name == "step-00000001"
    put(run, 5, 0.75)
    assert steps(run) == ["4", "5"] and run.best() == run.last()
    run.check()


def test_nothing_else_is_deleted(run):
    """Neither what an index does not know, nor a checkpoint of the same step, nor later ones after going back."""
    foreign = run.checkpoints / "step-00000007"
    shutil.copytree(run.checkpoints / "step-00000004", foreign)
    for step in (5, 6, 7, 8):
        put(run, step)
    assert steps(run) == ["1", "7", "7.1", "8"]
    assert json.loads((foreign.with_name("step-00000007.1") / "trainer.json").read_text())["step"] == 4
    index = run.index()
    write_json(run.checkpoints / "index.json", {**index, "last": "step-00000001"})
    put(run, 2)
    assert steps(run) == ["1", "2", "7", "7.1", "8"]


def test_an_index_of_an_earlier_version(run):
    index = run.index()
    del index["written"]
    write_json(run.checkpoints / "index.json", index)
    put(run, 5)
    # 3 may be another's; what the index named is known to be this run's
    assert steps(run) == ["1", "3", "4", "5"]


INDEX_FAULTS = {
    "lost": None,
    "empty": "",
    "cut": '{"last": "step',
    "list": "[]",
    "null": "null",
    "no last": "{}",
    "number": '{"last": 5}',
    "other": '{"last": "../../x"}',
    "gone": '{"last": "step-00000009"}',
    "best gone": '{"last": "step-00000004", "best": "step-00000002"}',
    "best list": '{"last": "step-00000004", "best": []}',
    "score": '{"last": "step-00000004", "best_score": "x"}',
    "nan": '{"last": "step-00000004", "best_score": NaN}',
    "written": '{"last": "step-00000004", "written": 5}',
    "written names": '{"last": "step-00000004", "written": ["/"]}',
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_is_lost_or_damaged(run, fault):
    """The run is refused, and what the sentence says to write makes it go on from the last checkpoint."""
    file = run.checkpoints / "index.json"
    if INDEX_FAULTS[fault] is None:
        file.unlink()
    else:
        file.write_text(INDEX_FAULTS[fault])
    for ask in (run.last, run.best, run.check, lambda: run.settle(CONFIG, lambda: "fp32"), lambda: put(run, 5)):
        with pytest.raises(ValueError, match="index.json|is missing") as caught:
            ask()
        shutil.rmtree(run.checkpoints / "step-00000005.partial", ignore_errors=True)
    text = str(caught.value)
    assert "step-00000004 is whole" in text and "\n" not in text
    assert steps(run) == ["1", "3", "4"], "something was deleted"
    advice = text[text.index("write {") + 6 :]
    file.write_text(advice[: advice.index("}") + 1])
    assert run.index() == {"last": "step-00000004", "best": "step-00000001", "best_score": 0.5}


@pytest.mark.parametrize("name", ["model.safetensors", OPTIMIZER, "trainer.json", "config.json", "checksums.json"])
@pytest.mark.parametrize("fault", ["flipped", "empty", "gone"])
def test_a_damaged_checkpoint_is_named(run, name, fault):
    """So is the last that is whole; no bit flips unseen."""
    file = run.last() / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if fault == "gone":
        file.unlink()
    else:
        file.write_bytes(data if fault == "flipped" else b"")
    if (name, fault) == ("checksums.json", "gone"):
        # a checkpoint of an earlier version
        run.check()
        return
    with pytest.raises(ValueError) as caught:
        run.check()
    text = str(caught.value)
    assert name in text and "step-00000003 is whole" in text and "\n" not in text and "--fresh" in text
    assert steps(run) == ["1", "3", "4"]


def test_a_damaged_best_checkpoint(run):
    (run.best() / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match='step-00000001/model.* is damaged.*"best": "step-00000003"'):
        run.check()


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"settings": 5, "precision": "fp32"}', '{"settings": {}}', "{"]
)
def test_damaged_settings(run, text):
    file = run.path / "train_config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="train_config.json .*--fresh"):
        run.settle(CONFIG, lambda: pytest.fail("a resumed run keeps its precision"))


@pytest.mark.parametrize("text", ["", "{}", "[5]", '["a", null]', "[", "5"])
def test_damaged_answers(run, text):
    (run.path / "answers.json").write_text(text)
    with pytest.raises(ValueError, match="answers.json"):
        read_answers(run.path / "answers.json")
    with pytest.raises(ValueError, match="answers.json"):
        export_checkpoint(run.path, run.path / "out")
    assert not (run.path / "out").exists()


GOOD = dict(step=1, kind="train", loss=0.5, learning_rate=0.1)


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
def test_damaged_metrics(run, line):
    """A line in the middle is named, and none after it is lost; a last line that was cut short is left out."""
    good = json.dumps(GOOD).encode() + b"\n"
    file = run.path / "metrics.jsonl"
    file.write_bytes(good + line + b"\n" + good)
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is damaged"):
        run.check()
    with pytest.raises(ValueError, match="line 2"):
        Progress(run.path, 5, 9)
    assert file.read_bytes() == good + line + b"\n" + good
    file.write_bytes(good + line)
    assert read_metrics(run.path) == [GOOD]


HOLD = """
import sys
from prismer.files import take_lock
lock = take_lock(sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_run_is_trained_by_one(run, tmp_path):
    """Not even --fresh moves one that is in use away."""
    run._lock.close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, run.path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for fresh in (False, True):
        with pytest.raises(ValueError, match=f"run is in use by process {holder.pid}"):
            RunFolder(run.path).claim(fresh)
    assert os.listdir(tmp_path) == ["run"] and steps(run) == ["1", "3", "4"]
    holder.communicate("\n")
    again = RunFolder(run.path)
    assert again.claim() is None and again.last() is not None
    again = RunFolder(run.path)
    assert again.claim(fresh=True) == tmp_path / "run.1" and again.last() is None
    assert RunFolder(run.path).claim(fresh=True) is None, "there is nothing to set aside"
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    (tmp_path / "file").write_text("")
    for name, words in (("photos", "is no run, and holds a.jpg"), ("file", "is a file")):
        for fresh in (False, True):
            with pytest.raises(ValueError, match=words):
                RunFolder(tmp_path / name).claim(fresh)
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]


def test_what_a_killed_save_left_goes(run):
    (run.checkpoints / "step-00000005.partial").mkdir()
    run._lock.close()
    RunFolder(run.path).claim()
    assert steps(run) == ["1", "3", "4"]


def test_a_full_disk_loses_no_checkpoint(run, monkeypatch):
    """Wherever it fails, the index and the checkpoints are as they were, and the next save goes through."""
    before = run.index()
    with pytest.raises(OSError), full_after(100):
        put(run, 5)
    shutil.rmtree(run.checkpoints / "step-00000005.partial")
    target = run.checkpoints / "step-00000005"
    aside = target.with_name("step-00000005.partial")
    shutil.copytree(run.last(), aside)
    with pytest.raises(OSError, match="index.json"), full_after(20):
        run._enter(aside, target, None)
    assert run.index() == before and steps(run) == ["1", "3", "4"]
    assert sorted(os.listdir(run.checkpoints))[0] == "index.json" and len(os.listdir(run.checkpoints)) == 4
    put(run, 5)
    assert steps(run) == ["1", "4", "5"]


def test_a_full_disk_names_the_record(run):
    progress = Progress(run.path, 0, 9)
    # TensorBoard writes the head of its file in a thread, which must not meet the limit that is meant for the record
    progress._board.flush()
    with pytest.raises(OSError) as caught, full_after(3):
        progress.record(GOOD | {"samples_per_s": 1.0})
    assert caught.value.filename == str(run.path / "metrics.jsonl")
    progress.close()


def test_output_that_nobody_reads(tmp_path, capfd):
    """A closed pipe and a full disk end the printing, not the run."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        tell("a", file)
        tell("b", file)
    with open("/dev/full", "w") as file:
        tell("a", file)
    assert "standard output cannot be written (No space left on device)" in capfd.readouterr().err
