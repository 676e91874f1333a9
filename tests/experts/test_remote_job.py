"""Proves that a labelling job reads and writes a bucket, with the bytes of a local job; fsspec's own stands for it.

python -m pytest tests/experts/test_remote_job.py
"""

import json

import pytest

from prismer.cli.options import processes_of_this_machine
from prismer.dataloading.experts.job import label_records
from prismer.dataloading.experts.job_costs import total_costs
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.sources.stored_records import stored_records
from prismer.dataloading.store.shards import ShardDataset
from tests.experts.jobs import read_files, write_photos
from tests.experts.stand_ins import Brightness, Halves
from tests.experts.test_job import label

fsspec = pytest.importorskip("fsspec")
OUT = "memory://bucket/depth"


@pytest.fixture(autouse=True)
def bucket(monkeypatch, tmp_path):
    """An empty bucket, and an empty folder for what is kept of it here."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    write_photos(folder / "photos", 21)
    label(folder / "photos", folder / "objects", (Halves,), per_shard=4)
    return folder / "objects"


def label_into(out, place, network=Brightness, **options):
    dataset = ShardDataset(place)
    labeller = Labeller([network()], label_size=32, batch_size=4)
    options = {"source": "photos", "progress": False, "samples_per_shard": 8, **options}
    return label_records(stored_records(dataset), out, labeller, classes=dataset.classes, **options)


def fetched(memory, tmp_path):
    """The files of the dataset in the bucket, as `read_files` gives those of a folder."""
    memory.get("/bucket/depth/", str(tmp_path / "fetched"), recursive=True)
    return read_files(tmp_path / "fetched")


def test_a_job_from_a_bucket_into_a_bucket_has_the_bytes_of_a_local_one(objects, bucket, tmp_path):
    bucket.put(str(objects), "/bucket/objects", recursive=True)
    report = label_into(OUT, "memory://bucket/objects", preview=True)
    assert (report.labelled, report.skipped, report.shards_missing) == (21, [], 0)
    label_into(tmp_path / "local", objects)
    assert fetched(bucket, tmp_path) == read_files(tmp_path / "local")
    assert len(bucket.ls("/bucket/depth/preview")) == 3
    (entry,) = json.loads(bucket.cat("/bucket/depth/report.json"))["costs"]
    assert entry["images"] == 21
    # what was uploaded is removed here
    assert [path for path in (tmp_path / "home/storage/outgoing").rglob("*") if path.is_file()] == []


def test_a_job_that_broke_off_resumes_from_what_the_bucket_holds(objects, bucket, tmp_path):
    class Breaking(Brightness):
        left = 5

        def predict(self, images, earlier):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().predict(images, earlier)

    # in the third shard of three
    with pytest.raises(KeyboardInterrupt):
        label_into(OUT, objects, Breaking)
    assert not bucket.exists("/bucket/depth/index.json")
    assert label_into(OUT, objects).labelled == 21
    label_into(tmp_path / "local", objects)
    assert fetched(bucket, tmp_path) == read_files(tmp_path / "local")
    assert sum(one["images"] for one in total_costs(OUT)) == 21
    with pytest.raises(ValueError, match="memory://bucket/depth was begun with other licence"):
        label_into(OUT, objects, licence="CC0")


@pytest.mark.parametrize(
    ("rank", "world", "environment", "expected"),
    (
        (0, 1, {}, [0]),
        (5, 16, {}, [5]),
        (5, 16, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}, range(8)),
        (13, 16, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}, range(8, 16)),
        # deepspeed's name
        (9, 12, {"LOCAL_SIZE": "8", "LOCAL_RANK": "1"}, range(8, 12)),
        (9, 12, {"LOCAL_SIZE": "many", "LOCAL_RANK": "1"}, [9]),
    ),
)
def test_the_processes_of_a_machine_are_known(monkeypatch, rank, world, environment, expected):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert list(processes_of_this_machine(rank, world)) == list(expected)
