"""Proves that a dataset in a bucket is written with the same bytes as a local one, and that a killed job loses nothing.

python -m pytest tests/storage/test_remote_writer.py
"""

import json
from pathlib import Path

import pytest

from prismer.cli.main import main
from prismer.dataloading.store.shards import ShardDataset, ShardWriter
from prismer.dataloading.store.writer import OpenShard, finished_shard, finished_shards
from prismer.shipped import cache_folder
from prismer.storage.objects import StorageError, list_objects, read_object
from tests.data.import_sources import make_folder
from tests.data.noise_shards import CLASSES, assert_same, bytes_of, make_sample, write_dataset
from tests.storage.bucket import BucketFileSystem, Outage, requests
from tests.storage.test_objects import HTTPStatusError


def folder_of(url: str) -> Path:
    return Path(url.removeprefix("bucket://"))


def left_here() -> list[str]:
    return [path.name for path in (cache_folder("storage") / "outgoing").rglob("*")]


def refuse(part: str):
    """A fault: objects with `part` in their names cannot be written."""

    def fault(operation, path):
        if operation == "write" and part in path:
            raise HTTPStatusError(403)

    return staticmethod(fault)


def test_the_bytes_are_those_of_a_local_dataset(bucket, tmp_path):
    write_dataset(f"{bucket}/data")
    assert bytes_of(folder_of(f"{bucket}/data")) == bytes_of(write_dataset(tmp_path / "local"))
    assert left_here() == []


def test_index_json_comes_last_and_a_shard_before_its_index_file(bucket):
    write_dataset(f"{bucket}/data", 6)
    assert requests("write") == [
        *("shard-000000.tar", "shard-000000.index.json", "shard-000001.tar", "shard-000001.index.json"),
        *("index.bin", "index.json"),
    ]


def test_at_most_one_shard_lies_on_this_machine(bucket, monkeypatch):
    most = []

    def look(operation, path):
        most.append(len([name for name in left_here() if name.endswith(".tar")]))

    monkeypatch.setattr(BucketFileSystem, "fault", staticmethod(look))
    write_dataset(f"{bucket}/data")
    assert max(most) == 1


@pytest.mark.parametrize(
    "part", ["shard-000001.tar", "shard-000001.index.json", "shard-000002.index.json", "index.bin", "/index.json"]
)
def test_a_job_that_broke_off_resumes_from_what_the_bucket_holds(bucket, tmp_path, monkeypatch, part):
    url = f"{bucket}/data"
    with monkeypatch.context() as patch:
        patch.setattr(BucketFileSystem, "fault", refuse(part))
        with pytest.raises(StorageError, match="refuses access"):
            write_dataset(url)
    with pytest.raises(ValueError, match="not a finished dataset"):
        ShardDataset(url)
    whole = [name for name in list_objects(url) if name.endswith("0.index.json")]
    BucketFileSystem.requests.clear()
    write_dataset(url, resume=True)
    assert bytes_of(folder_of(url)) == bytes_of(write_dataset(tmp_path / "local"))
    assert whole and not set(whole) & set(requests("write")) and left_here() == []


def test_what_a_killed_process_left_on_this_machine_is_dropped(bucket, tmp_path):
    url = f"{bucket}/data"
    write_dataset(url, 4)
    writer = ShardWriter(url, classes=CLASSES, source="made up", samples_per_shard=4, resume=True)
    writer.write(make_sample(4))
    # the state after a kill: an open shard, and one that was not uploaded
    (writer.folder / "shard-000002.tar").write_bytes(b"whole, not uploaded")
    writer._open.file.close()
    writer._lock.close()
    write_dataset(url, 10, resume=True)
    assert bytes_of(folder_of(url)) == bytes_of(write_dataset(tmp_path / "local"))
    assert left_here() == []


@pytest.mark.parametrize("damage", ["tar gone", "tar short", "index torn"])
def test_torn_shards_in_the_bucket_are_written_again(bucket, tmp_path, damage):
    url = f"{bucket}/data"
    folder = folder_of(write_dataset(url))
    tar, sidecar = folder / "shard-000001.tar", folder / "shard-000001.index.json"
    if damage == "tar gone":
        tar.unlink()
    elif damage == "tar short":
        tar.write_bytes(tar.read_bytes()[:-1])
    else:
        sidecar.write_bytes(sidecar.read_bytes()[:-9])
    BucketFileSystem.requests.clear()
    write_dataset(url, resume=True)
    assert bytes_of(folder) == bytes_of(write_dataset(tmp_path / "local"))
    assert requests("remove")[0] == "index.json"


def test_a_server_that_is_away_costs_no_shard(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(after=6, count=5))
    write_dataset(f"{bucket}/data")
    assert bytes_of(folder_of(f"{bucket}/data")) == bytes_of(write_dataset(tmp_path / "local"))


def test_a_bucket_that_holds_shards_is_not_written_without_resume(bucket):
    write_dataset(f"{bucket}/data")
    with pytest.raises(ValueError, match=f"{bucket}/data already holds shards"):
        write_dataset(f"{bucket}/data")


def test_two_writers_on_one_machine_do_not_mix(bucket):
    with ShardWriter(f"{bucket}/data", classes=CLASSES, source="made up") as writer:
        writer.write(make_sample(0))
        script = OpenShard(f"{bucket}/data", 7)
        script.abandon()
        assert (writer.folder / ".writer.lock").exists()


def test_finished_shards_are_found_in_the_bucket(bucket):
    url = f"{bucket}/data"
    write_dataset(url)
    fingerprint = json.loads(read_object(f"{url}/shard-000000.index.json"))["fingerprint"]
    folder_of(url).joinpath("shard-000002.tar").unlink()
    found = finished_shards(url, range(5), fingerprint)
    assert sorted(found) == [0, 1] and finished_shards(url, range(5), "another") == {}
    for number in range(5):
        assert finished_shard(url, number, fingerprint) == found.get(number)


def test_images_are_imported_into_a_bucket(bucket, tmp_path, capsys):
    make_folder(tmp_path / "images", 5)
    command = ["data", "import", "folder", str(tmp_path / "images"), "--samples-per-shard", "2", "--out"]
    assert main([*command, f"{bucket}/data/"]) == 0
    assert f"{bucket}/data: 5 of 5 images imported" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "local")]) == 0
    assert bytes_of(folder_of(f"{bucket}/data")) == bytes_of(tmp_path / "local")
    assert_same(ShardDataset(f"{bucket}/data")[3], ShardDataset(tmp_path / "local")[3])
