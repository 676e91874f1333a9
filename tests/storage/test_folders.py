"""Proves that models and runs in a bucket are fetched once, and that a copy is never mixed from two states.

python -m pytest tests/storage/test_folders.py
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from prismer.cli.main import main
from prismer.config import prismer_tiny
from prismer.model import Prismer
from prismer.shipped import cache_folder, shipped_folder
from prismer.storage.folders import Mirror
from prismer.storage.objects import StorageError, list_objects, read_object, write_object
from prismer.training.config import TrainConfig
from prismer.training.run_folder import RunFolder
from prismer.weights.locate import find_folder, locate
from tests.storage.bucket import BucketFileSystem, requests
from tests.storage.test_remote_writer import folder_of, left_here, refuse
from tests.train.test_run_folder import CONFIG, put, steps


@pytest.fixture
def model() -> Prismer:
    sizes = dict(vision_width=32, vision_depth=1, vision_heads=2, text_width=32, text_depth=1, text_heads=2)
    torch.manual_seed(0)
    return Prismer(prismer_tiny(image_size=32, label_size=32, resampler_depth=1, vocab_size=50, **sizes))


def test_a_model_is_saved_in_a_bucket_and_loaded_from_it(bucket, model):
    url = f"{bucket}/models/mine"
    model.save_pretrained(url, answers=["yes", "no"])
    assert requests("write")[-1] == "checksums.json" and left_here() == []
    loaded = Prismer.from_pretrained(url)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert json.loads((loaded.folder / "answers.json").read_text()) == ["yes", "no"]
    assert "# mine" in (loaded.folder / "README.md").read_text() and find_folder(url) == loaded.folder
    # it is here now
    BucketFileSystem.requests.clear()
    Prismer.from_pretrained(url)
    assert requests("read") == []


def test_a_model_that_changed_is_fetched_again(bucket, model):
    url = f"{bucket}/mine"
    model.save_pretrained(url, answers=["yes", "no"])
    Prismer.from_pretrained(url)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(url)
    # its answers are gone
    assert "answers.json" not in list_objects(url)
    loaded = Prismer.from_pretrained(url)
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))
    assert not (loaded.folder / "answers.json").exists()


def test_a_model_whose_upload_broke_off_is_refused(bucket, model, monkeypatch):
    url = f"{bucket}/mine"
    model.save_pretrained(url)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(BucketFileSystem, "fault", refuse("checksums.json"))
        with pytest.raises(StorageError, match="refuses access"):
            model.save_pretrained(url)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Prismer.from_pretrained(url)
    assert left_here() == []


def test_a_save_does_not_delete_what_is_no_model(bucket, model):
    write_object(f"{bucket}/things/thesis.tex", b"")
    with pytest.raises(ValueError, match="is no model folder, and holds thesis.tex"):
        model.save_pretrained(f"{bucket}/things")


def test_a_place_without_a_model_is_named(bucket):
    with pytest.raises(ValueError, match=f"no model at {bucket}/none; it holds no config.json, model.safetensors"):
        locate(f"{bucket}/none")
    assert find_folder(f"{bucket}/elsewhere") is None


def test_a_model_is_exported_into_a_bucket(bucket, capsys):
    assert main(["export", "tiny", "--out", f"{bucket}/models/copy/"]) == 0
    assert f"tiny -> {bucket}/models/copy\n" in capsys.readouterr().out
    assert main(["export", f"{bucket}/models/copy", "--out", f"{bucket}/models/again"]) == 0
    weights = [read_object(f"{bucket}/models/{name}/model.safetensors") for name in ("copy", "again")]
    assert weights[0] == weights[1]
    assert "README.md" in list_objects(f"{bucket}/models/again")


def test_a_file_url_is_a_folder(tmp_path):
    shutil.copytree(shipped_folder("tiny"), tmp_path / "model")
    assert locate(f"file://{tmp_path}/model")[0] == tmp_path / "model"


@pytest.fixture
def run(bucket) -> RunFolder:
    """A run in a bucket with the checkpoints 1 (the best), 3 and 4."""
    run = RunFolder(f"{bucket}/runs/a")
    run.claim()
    run.reconcile_settings(CONFIG, lambda: "fp32")
    for step, score in ((1, 0.5), (2, None), (3, 0.25), (4, None)):
        put(run, step, score)
    return run


def elsewhere(bucket: str, monkeypatch) -> RunFolder:
    """The run on another machine."""
    monkeypatch.setenv("PRISMER_HOME", os.environ["PRISMER_HOME"] + "-2")
    run = RunFolder(f"{bucket}/runs/a")
    run.claim()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_may_be_named_by_a_url():
    assert TrainConfig(run="s3://bucket/runs/a").folder == "s3://bucket/runs/a"


def test_the_bucket_holds_what_the_run_keeps(run, bucket):
    assert contents(folder_of(f"{bucket}/runs/a")) == contents(run.path)
    assert steps(run) == ["1", "3", "4"]


def test_the_index_is_uploaded_after_the_checkpoint_and_before_others_are_removed(run):
    BucketFileSystem.requests.clear()
    put(run, 5, 0.75)
    kinds = [kind for kind, _ in BucketFileSystem.requests if kind in ("write", "remove")]
    assert kinds == sorted(kinds, reverse=True) and requests("write")[-1] == "index.json"
    assert len(requests("write")) == 6 and len(requests("remove")) == 10


def test_a_run_goes_on_on_another_machine(run, bucket, monkeypatch):
    before = contents(run.path)
    other = elsewhere(bucket, monkeypatch)
    assert other.path != run.path and contents(other.path) == before
    other.check_files()
    assert other.last().name == "step-00000004" and other.best().name == "step-00000001"
    put(other, 5)
    assert steps(other) == ["1", "4", "5"]
    # and comes back
    run._lock.close()
    back = RunFolder(f"{bucket}/runs/a")
    monkeypatch.setenv("PRISMER_HOME", os.environ["PRISMER_HOME"].removesuffix("-2"))
    back = RunFolder(f"{bucket}/runs/a")
    back.claim()
    assert back.path == run.path and contents(back.path) == contents(other.path)


def test_a_checkpoint_that_was_not_uploaded_is_kept_on_this_machine(run, bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BucketFileSystem, "fault", refuse("step-00000005/trainer.json"))
        with pytest.raises(StorageError):
            put(run, 5)
    run._lock.close()
    again = RunFolder(f"{bucket}/runs/a")
    again.claim()
    assert again.last().name == "step-00000005"
    assert contents(folder_of(f"{bucket}/runs/a")) == contents(again.path)


def test_the_bucket_counts_if_another_machine_has_trained_on(run, bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BucketFileSystem, "fault", refuse("step-00000005/trainer.json"))
        with pytest.raises(StorageError):
            put(run, 5)
    with monkeypatch.context() as patch:
        put(elsewhere(bucket, patch), 6)
    run._lock.close()
    again = RunFolder(f"{bucket}/runs/a")
    again.claim()
    # the checkpoint whose upload broke off is gone
    assert again.last().name == "step-00000006" and steps(again) == ["1", "4", "6"]
    put(again, 7)
    assert contents(folder_of(f"{bucket}/runs/a")) == contents(again.path)


def test_a_bucket_with_other_things_is_no_run(bucket):
    write_object(f"{bucket}/things/thesis.tex", b"")
    with pytest.raises(ValueError, match=f"{bucket}/things holds thesis.tex and is not a run folder"):
        RunFolder(f"{bucket}/things").claim()
    assert contents(RunFolder(f"{bucket}/things").path) == {}


def test_a_run_in_a_bucket_is_not_moved_aside(run, bucket):
    run._lock.close()
    with pytest.raises(ValueError, match="cannot be moved aside in its bucket; choose another --run"):
        RunFolder(f"{bucket}/runs/a").claim(fresh=True)


def test_only_what_was_copied_is_removed(bucket):
    mirror = Mirror(f"{bucket}/runs/a", kind="runs", last="index.json")
    mirror.reconcile()
    (mirror.folder / "index.json").write_text("{}")
    (mirror.folder / "a").write_text("a")
    mirror.push()
    write_object(f"{bucket}/runs/a/notes.txt", b"of a colleague")
    (mirror.folder / "a").unlink()
    mirror.push()
    assert set(list_objects(f"{bucket}/runs/a")) == {"index.json", "notes.txt"}
    # nothing changed, nothing is sent
    BucketFileSystem.requests.clear()
    mirror.push()
    assert [kind for kind, _ in BucketFileSystem.requests] == ["list"]
    assert cache_folder("storage") in mirror.folder.parents
