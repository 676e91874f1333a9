"""Proves on a real S3 server that a run from and into a bucket is the run from and into local folders.

pip install --target /tmp/extra s3fs 'moto[server]'
PRISMER_LONG_TESTS=1 PYTHONPATH=/tmp/extra python -m pytest tests/train/test_buckets.py
"""

import json
import shutil

import pytest

from prismer.files import find_damage
from prismer.storage.objects import list_objects
from prismer.storage.places import kept_folder
from prismer.training.progress import read_metrics
from tests.storage.test_s3 import Server, forget_clients

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture
def server(workshop, tmp_path, monkeypatch):
    """Bucket "data" with the dataset of the tests, and the empty bucket "out"."""
    (tmp_path / "start" / "out").mkdir(parents=True)
    (tmp_path / "start" / "data").symlink_to(workshop.folder / "data")
    server = Server(tmp_path / "start", tmp_path / "log")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "someone")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    forget_clients()
    yield server
    server.kill()


def rows(folder) -> list[dict]:
    """What was logged, but for the times."""
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in read_metrics(folder)]


def test_a_run_in_a_bucket_goes_on_on_another_machine(workshop, server, tmp_path, monkeypatch):
    # the order of blocks is what a dataset in a bucket has anyway
    settings = dict(steps=9, save_every=3, order="blocks", precision="fp32")
    local = workshop.launch("local", "torchrun 2", **settings)
    assert local.end() == 0, local.text()
    url = "s3://out/runs/a"
    remote = dict(settings, data="s3://data")

    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "one"))
    first = workshop.launch("first", "torchrun 2", flags=("--name", url), **remote)
    first.folder = kept_folder("runs", url)
    first.wait_for_step(4)
    # the server is away for a moment, and comes back without what the run has written
    server.kill()
    server.start()
    first.wait_for_step(6)
    first.process.terminate()
    # torchrun passes the signal on, and has an exit code of its own
    first.end()
    assert "saved at step" in first.text()

    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "two"))
    second = workshop.launch("second", "torchrun 2", flags=("--name", url), **remote)
    assert second.end() == 0, second.text()
    assert "resuming" in second.text()
    folder = kept_folder("runs", url)
    assert rows(folder) == rows(local.folder)
    held = list_objects(url)
    assert {"finished.json", "model/model.safetensors", "checkpoints/index.json"} <= set(held)
    assert json.loads((folder / "finished.json").read_text())["steps"] == 9
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (folder / "checkpoints/step-00000009" / name).read_bytes() == (
            local.folder / "checkpoints/step-00000009" / name
        ).read_bytes()
    # what the bucket holds is whole
    from prismer.storage.folders import fetch_folder

    copy = fetch_folder(f"{url}/model", [name.removeprefix("model/") for name in held if name.startswith("model/")])
    assert find_damage(copy) is None
    shutil.rmtree(copy)
