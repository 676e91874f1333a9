"""Proves that a run folder loses nothing: damaged files are named with a way to go on, and only checkpoints that the
run wrote are deleted.

python -m pytest tests/train/test_run_folder.py
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from prismer.files import write_checksums, write_json
from prismer.tensor_files import save_tensors, write_safetensors
from prismer.training.checkpoint import OPTIMIZER
from prismer.training.config import TrainConfig
from prismer.training.export import export_checkpoint
from prismer.training.run_folder import RunFolder
from prismer.training.text_statistics import read_answers
from tests.faults.disk import full_after

CONFIG = TrainConfig(batch_size=32, learning_rate=1e-2)


def put(run: RunFolder, step: int, score: float | None = None) -> None:
    """Save a checkpoint as `RunFolder.save` does on rank 0, with small tensors."""
    target = run.checkpoints / f"step-{step:08d}"
    aside = target.with_name(target.name + ".partial")
    aside.mkdir(parents=True)
    sums = {name: save_tensors({"x": torch.rand(50)}, aside / name) for name in ("model.safetensors", OPTIMIZER)}
    write_json(aside / "config.json", {})
    write_json(aside / "trainer.json", dict(step=step, loss_sum=0.5, loss_count=1, score=score))
    write_checksums(aside, sums)
    run._commit(aside, target, score)


def steps(run: RunFolder) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in run.checkpoints.glob("step-*"))


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 1 (the best), 3 and 4."""
    run = RunFolder(tmp_path / "run")
    run.claim()
    run.reconcile_settings(CONFIG, lambda: "fp32")
    for step, score in ((1, 0.5), (2, None), (3, 0.25), (4, None)):
        put(run, step, score)
    return run


def test_a_run_from_before_a_setting_existed_had_its_default(run):
    file = run.path / "train_config.json"
    stored = json.loads(file.read_text())
    del stored["settings"]["deterministic"]
    file.write_text(json.dumps(stored))
    assert run.reconcile_settings(CONFIG, lambda: "fp32") == ("fp32", [])
    file.write_text(json.dumps(stored))
    changed = run.reconcile_settings(replace(CONFIG, deterministic=True), lambda: "fp32")
    assert changed == ("fp32", ["deterministic: False -> True"])


def test_the_last_two_checkpoints_and_the_best_are_kept(run):
    assert steps(run) == ["1", "3", "4"]
    assert run.last().name == "step-00000004" and run.best().name == "step-00000001"
    put(run, 5, 0.75)
    assert steps(run) == ["4", "5"] and run.best() == run.last()
    run.check_files()


def test_checkpoints_of_others_are_not_deleted(run):
    """An unlisted checkpoint is kept, also one of the same step, and so are later ones when the run goes back."""
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


def test_an_index_without_a_list_of_written_checkpoints_deletes_only_what_it_names(run):
    index = run.index()
    del index["written"]
    write_json(run.checkpoints / "index.json", index)
    put(run, 5)
    # step 3 may be another run's; only the checkpoints that the index named are known to be this run's
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
def test_a_damaged_index_can_be_restored_from_the_message(run, fault):
    """The run is refused, and the text that the message says to write makes it resume from the last checkpoint."""
    file = run.checkpoints / "index.json"
    if INDEX_FAULTS[fault] is None:
        file.unlink()
    else:
        file.write_text(INDEX_FAULTS[fault])
    for ask in (
        run.last,
        run.best,
        run.check_files,
        lambda: run.reconcile_settings(CONFIG, lambda: "fp32"),
        lambda: put(run, 5),
    ):
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
    """Every flipped bit is found; the message also names the last checkpoint that is whole."""
    file = run.last() / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if fault == "gone":
        file.unlink()
    else:
        file.write_bytes(data if fault == "flipped" else b"")
    if (name, fault) == ("checksums.json", "gone"):
        # a checkpoint without checksums counts as whole
        run.check_files()
        return
    with pytest.raises(ValueError) as caught:
        run.check_files()
    text = str(caught.value)
    assert name in text and "step-00000003 is whole" in text and "\n" not in text and "--fresh" in text
    assert steps(run) == ["1", "3", "4"]


def test_a_damaged_best_checkpoint_is_named(run):
    (run.best() / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match='step-00000001/model.* is damaged.*"best": "step-00000003"'):
        run.check_files()


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"settings": 5, "precision": "fp32"}', '{"settings": {}}', "{"]
)
def test_damaged_settings_are_refused(run, text):
    file = run.path / "train_config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="train_config.json .*--fresh"):
        run.reconcile_settings(CONFIG, lambda: pytest.fail("a resumed run keeps its precision"))


@pytest.mark.parametrize("text", ["", "{}", "[5]", '["a", null]', "[", "5"])
def test_damaged_answers_are_refused(run, text):
    (run.path / "answers.json").write_text(text)
    with pytest.raises(ValueError, match="answers.json"):
        read_answers(run.path / "answers.json")
    with pytest.raises(ValueError, match="answers.json"):
        export_checkpoint(run.path, run.path / "out")
    assert not (run.path / "out").exists()


HOLD_LOCK = """
import sys
from prismer.files import take_lock
lock = take_lock(sys.argv[1])
print("held", flush=True)
input()
"""


def test_only_one_process_trains_a_run(run, tmp_path):
    """Not even --fresh moves a run that another process trains."""
    run._lock.close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, run.path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
    assert RunFolder(run.path).claim(fresh=True) is None, "there is no earlier run to set aside"
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    (tmp_path / "file").write_text("")
    for name, words in (("photos", "holds a.jpg and is not a run folder"), ("file", "is a file")):
        for fresh in (False, True):
            with pytest.raises(ValueError, match=words):
                RunFolder(tmp_path / name).claim(fresh)
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]


def test_leftovers_of_a_killed_save_are_removed(run):
    (run.checkpoints / "step-00000005.partial").mkdir()
    run._lock.close()
    RunFolder(run.path).claim()
    assert steps(run) == ["1", "3", "4"]


def test_a_full_disk_loses_no_checkpoint(run, monkeypatch):
    """Wherever a save fails, the index and the checkpoints stay as they were, and the next save succeeds."""
    before = run.index()
    with pytest.raises(OSError), full_after(100):
        put(run, 5)
    shutil.rmtree(run.checkpoints / "step-00000005.partial")
    target = run.checkpoints / "step-00000005"
    aside = target.with_name("step-00000005.partial")
    shutil.copytree(run.last(), aside)
    with pytest.raises(OSError, match="index.json"), full_after(20):
        run._commit(aside, target, None)
    assert run.index() == before and steps(run) == ["1", "3", "4"]
    assert sorted(os.listdir(run.checkpoints))[0] == "index.json" and len(os.listdir(run.checkpoints)) == 4
    put(run, 5)
    assert steps(run) == ["1", "4", "5"]


def test_a_resumed_run_keeps_its_precision_and_fixed_settings(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.last() is None and run.best() is None
    assert run.reconcile_settings(CONFIG, lambda: "fp32") == ("fp32", [])
    # before the first checkpoint every setting may change
    assert run.reconcile_settings(replace(CONFIG, seed=1), lambda: "fp32") == ("fp32", [])
    put_index(run, 5)
    assert run.best() == run.last() == run.checkpoints / "step-00000005"
    again = replace(CONFIG, seed=1, learning_rate=0.5)
    precision, changes = run.reconcile_settings(again, lambda: pytest.fail("the precision was chosen again"))
    assert precision == "fp32" and changes == ["learning_rate: 0.01 -> 0.5"]
    # measured choices that came or went are named; a run of an earlier version knew none
    _, changes = run.reconcile_settings(again, lambda: "fp32", "3f2a")
    assert changes == ["measured choices: none -> 3f2a, so sums may round otherwise"]
    assert run.reconcile_settings(again, lambda: "fp32", "3f2a") == ("fp32", [])
    settings = json.loads((run.path / "train_config.json").read_text())
    del settings["choices"]
    (run.path / "train_config.json").write_text(json.dumps(settings))
    assert run.reconcile_settings(again, lambda: "fp32", "3f2a") == ("fp32", [])
    with pytest.raises(ValueError, match="was trained with batch_size 32, not 64; .* --fresh"):
        run.reconcile_settings(replace(again, batch_size=64), lambda: "fp32")
    with pytest.raises(ValueError, match="trains in fp32, not bf16"):
        run.reconcile_settings(replace(again, precision="bf16"), lambda: "fp32")


def put_index(run: RunFolder, step: int) -> None:
    """An empty checkpoint and its index."""
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    write_json(run.checkpoints / "index.json", dict(last=f"step-{step:08d}"))


def test_setting_a_run_aside_deletes_nothing(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.set_aside() is None
    for number in (1, 2):
        put_index(run, number)
        assert run.set_aside() == tmp_path / f"run.{number}"
    assert not run.path.exists()
    assert (tmp_path / "run.1/checkpoints/step-00000001").is_dir()
    assert (tmp_path / "run.2/checkpoints/step-00000002").is_dir()


def test_tensors_are_written_as_safetensors(tmp_path):
    tensors = {
        "steps": torch.tensor(7),
        "weight": torch.randn(3, 5),
        "transposed": torch.randn(4, 2).t(),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
    }
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", header, iter(tensors.values()))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
