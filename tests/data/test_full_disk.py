"""Proves that a full disk leaves whole files alone, and that the job resumes once there is space.

python -m pytest tests/data/test_full_disk.py
"""

import errno
import os

import pytest

from prismer.cli.main import main
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.store import writer as shard_writer
from prismer.storage import output
from tests.data.import_sources import make_folder, run


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("when", ["tar", "sidecar", "index", "report"])
def test_an_import_keeps_whole_shards_and_resumes(tmp_path, monkeypatch, when):
    records = make_folder(tmp_path / "in", 6)
    settings = {"source": "test", "samples_per_shard": 2, "progress": False}

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    real, count = shard_writer.OpenShard._put, [0]

    def put(self, data):
        count[0] += 1
        if count[0] > 15:
            full()
        real(self, data)

    with monkeypatch.context() as patch:
        if when == "tar":
            patch.setattr(shard_writer.OpenShard, "_put", put)
        elif when == "index":
            patch.setattr(shard_writer, "write_together", full)
        elif when == "sidecar":
            patch.setattr(shard_writer, "write_atomically", full)
        else:
            patch.setattr(output, "write_together", full)
        with pytest.raises(OSError) as caught:
            import_records(records, tmp_path / "out", **settings)
    assert caught.value.errno == errno.ENOSPC
    left = left_in(tmp_path / "out")
    assert not [name for name in left if name.endswith(".partial") or name == ".writer.lock"]
    tars = {name[:12] for name in left if name.endswith(".tar")}
    assert tars == {name[:12] for name in left if name.startswith("shard") and name.endswith(".json")}
    report = import_records(records, tmp_path / "out", **settings)
    assert report.imported == 6
    import_records(records, tmp_path / "whole", **settings)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("shard-*")} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").glob("shard-*")
    }


def test_the_renderer_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.OpenShard, "_put", full)
        with pytest.raises(OSError):
            render_dataset(tmp_path / "out", train=2, val=0, test=0, size=32, label_size=32, workers=1, progress=False)
    assert left_in(tmp_path / "out") == [".scenes.lock"]


@pytest.mark.parametrize("command", ["show", "extract"])
def test_show_and_extract_leave_nothing(tmp_path, monkeypatch, command):
    run(make_folder(tmp_path / "in", 1), tmp_path / "data")
    (tmp_path / "out").mkdir()
    key = ["00000--000"] if command == "extract" else []
    out = tmp_path / "out" if key else tmp_path / "out/sheet.png"
    written = []

    def full(handle):
        # the first file of a sample is whole when the second fails
        written.append(handle)
        if len(written) > 2 * bool(key):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["data", command, str(tmp_path / "data"), *key, "--out", str(out)]) > 0
    assert left_in(tmp_path / "out") == []
