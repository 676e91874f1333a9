"""Proves that a labelling job reads a dataset of ours through its index: the same bytes, and only the shards it needs.

python -m pytest tests/experts/test_stored_source.py
"""

import pytest

from prismer.dataloading.experts.job import label_records
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.sources.stored_records import stored_records
from prismer.dataloading.store.shards import ShardDataset
from tests.experts.jobs import read_files, write_photos
from tests.experts.stand_ins import Brightness, Halves
from tests.experts.test_job import label


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A dataset of five shards of four samples and one of one, with maps of objects and a caption."""
    folder = tmp_path_factory.mktemp("stored")
    photos = write_photos(folder / "photos", 21)
    (photos / "photo-00001.txt").write_text("A disc.")
    label(photos, folder / "objects", (Halves,), per_shard=4, licence="CC0")
    return folder / "objects"


def label_stored(dataset, out, **options):
    labeller = Labeller([Brightness()], label_size=32, batch_size=4)
    options = {"source": "photos", "progress": False, "samples_per_shard": 8, **options}
    return label_records(stored_records(dataset), out, labeller, classes=dataset.classes, **options)


def test_the_index_gives_the_bytes_that_the_tars_give(objects, tmp_path):
    report = label_stored(ShardDataset(objects), tmp_path / "indexed")
    assert (report.labelled, report.others) == (21, [])
    label(objects, tmp_path / "tars", (Brightness,))
    assert read_files(tmp_path / "indexed") == read_files(tmp_path / "tars")
    sample = ShardDataset(tmp_path / "indexed")[1]
    assert set(sample.labels) == {"depth", "obj_detection"}
    assert (sample.meta["captions"], sample.meta["licence"]) == (["A disc."], "CC0")


class Watched(ShardDataset):
    """A dataset that notes which samples are read, and which shards are fetched ahead."""

    def __init__(self, place):
        super().__init__(place)
        self.read, self.fetched = set(), []

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)

    def prefetch(self, shards):
        self.fetched.append(list(shards))


def test_a_process_reads_its_own_shards_and_fetches_the_next(objects, tmp_path):
    dataset = Watched(objects)
    report = label_stored(dataset, tmp_path / "out", rank=0, world=2, peers=())
    assert report.shards_missing == 1
    assert dataset.read == {*range(8), *range(16, 21)}
    # shard 0 of the job lies in shards 0 and 1 of the source, shard 2 in 4 and 5
    assert dataset.fetched == [[0, 1, 4, 5], [4, 5]]


def test_a_damaged_sample_is_skipped_and_named(objects, tmp_path):
    tar = objects / "shard-000002.tar"
    whole = tar.read_bytes()
    try:
        tar.write_bytes(whole[:700] + bytes([whole[700] ^ 255]) + whole[701:])
        report = label_stored(ShardDataset(objects), tmp_path / "out")
    finally:
        tar.write_bytes(whole)
    (skipped,) = report.skipped
    assert report.labelled == 20 and skipped["key"] == "photo-00008"
    assert skipped["image"] == f"{tar}/photo-00008" and "fails the checksum" in skipped["reason"]


def test_other_files_of_the_dataset_are_reported(objects, tmp_path):
    strange = [objects / "notes.txt", objects / "shard-000099.tar"]
    for path in strange:
        path.write_bytes(b"")
    try:
        report = label_stored(ShardDataset(objects), tmp_path / "out")
    finally:
        for path in strange:
            path.unlink()
    assert [entry["file"] for entry in report.others] == list(map(str, strange))
    assert "not in index.json" in report.others[1]["reason"]
