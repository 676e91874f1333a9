"""Proves that a dataset folder gives back what was written, and names what is damaged.

python -m pytest tests/data/test_shards.py
"""

import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest

from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from tests.data.noise_shards import CLASSES, assert_same, flip, make_sample, offset_of, write_dataset


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data")


@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_round_trip(tmp_path, count):
    about = {"experts": {"depth": "v1"}}
    dataset = ShardDataset(write_dataset(tmp_path / "data", count, about=about))
    assert len(dataset) == count
    assert len(dataset.shards) == -(-count // 4)
    assert (dataset.classes, dataset.source, dataset.about) == (CLASSES, "made up", about)
    evens = -(-count // 2)
    assert dataset.experts == {k: v for k, v in {"normal": evens, "seg": count}.items() if v}
    for i in range(count):
        expected = make_sample(i)
        assert_same(dataset[i], expected)
        assert_same(dataset[i - count], expected)
        assert dataset.key(i) == expected.key
        assert dataset.meta(i) == expected.meta
        assert dataset.shard_of(i) == i // 4
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            dataset[i]


def test_any_tar_reader_can_read_a_shard(folder):
    keys, groups = [], {}
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar"):
        with tarfile.open(folder / name, "r:") as tar:
            for member in tar:
                # as in a WebDataset reader, the key ends at the first dot
                key, _, extension = member.name.partition(".")
                groups.setdefault(key, {})[extension] = tar.extractfile(member).read()
                keys.append(key)
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert member.isfile()
    assert keys == [make_sample(i // 3).key for i in range(30)], "members of a sample are neighbours"
    for i in range(10):
        expected = make_sample(i)
        group = groups[expected.key]
        assert list(group) == ["jpg", "json", "labels"]
        assert group["jpg"] == expected.jpeg
        assert json.loads(group["json"]) == expected.meta


@pytest.mark.parametrize("extension", ["jpg", "json", "labels"])
def test_a_flipped_bit_is_found_before_a_decoder_sees_it(folder, extension):
    tar = folder / "shard-000001.tar"
    flip(tar, offset_of(tar, f"key_005.{extension}") + 7)
    dataset = ShardDataset(folder)
    with pytest.raises(CorruptSample, match=f"{extension} fails the checksum") as caught:
        dataset[5]
    assert (caught.value.shard, caught.value.key) == ("shard-000001.tar", "key_005")
    for i in (4, 6):
        assert_same(dataset[i], make_sample(i))
    # `meta` reads only the json
    if extension == "json":
        with pytest.raises(CorruptSample):
            dataset.meta(5)
    else:
        assert dataset.meta(5) == make_sample(5).meta


def test_a_truncated_tar_loses_only_the_samples_after_its_end(folder):
    tar = folder / "shard-000000.tar"
    with open(tar, "r+b") as file:
        file.truncate(offset_of(tar, "key_002.labels") + 3)
    dataset = ShardDataset(folder)
    assert_same(dataset[1], make_sample(1))
    for i in (2, 3):
        with pytest.raises(CorruptSample, match="bytes too early"):
            dataset[i]
    assert_same(dataset[4], make_sample(4))


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index.json"])
@pytest.mark.filterwarnings("ignore:.*it is made again")
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    # the table would hold what the index file of the shard said
    (folder / "index.bin").unlink()
    dataset = ShardDataset(folder)
    with pytest.raises(CorruptSample, match="No such file") as caught:
        dataset[5]
    assert caught.value.shard == "shard-000001.tar"
    assert_same(dataset[0], make_sample(0))
    assert_same(dataset[9], make_sample(9))


@pytest.mark.filterwarnings("ignore:.*it is made again")
def test_a_damaged_shard_index_is_found(folder):
    path = folder / "shard-000001.index.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole)
        flip(path, position)
        (folder / "index.bin").unlink()
        with pytest.raises(CorruptSample, match="checksum"):
            ShardDataset(folder).key(5)


def test_an_index_of_another_shard_is_found(folder):
    # both files are whole, but one was copied over the other
    (folder / "shard-000001.tar").write_bytes((folder / "shard-000002.tar").read_bytes())
    with pytest.raises(CorruptSample):
        ShardDataset(folder)[5]


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_torn_index_is_refused(folder, share):
    path = folder / "index.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="not JSON"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=2), "version 2"),
        (lambda index: index.update(format="other"), "import the data"),
        (lambda index: index.update(count=11), "do not add up"),
        (lambda index: index.pop("about"), "about is missing"),
        (lambda index: index.pop("shards"), "damaged"),
        (lambda index: index.update(shards=3), "damaged"),
        (lambda index: index["shards"][0].pop("sha256"), "sha256 is missing"),
        (lambda index: index["shards"][0].update(name="../a.tar"), "this library does not give"),
        (lambda index: index.update(classes={"seg": [1]}), "list of non-empty strings"),
    ],
)
def test_a_wrong_index_is_refused(folder, change, message):
    path = folder / "index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        ShardDataset(folder)


def test_an_unfinished_dataset_is_refused_in_one_sentence(tmp_path, folder):
    (folder / "index.json").unlink()
    for missing in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not a finished dataset"):
            ShardDataset(missing)


def test_errors_read_as_sentences():
    error = pickle.loads(pickle.dumps(CorruptSample("shard-000001.tar", "key_005", "its jpg is gone")))
    assert (error.shard, error.key, error.reason) == ("shard-000001.tar", "key_005", "its jpg is gone")
    assert str(error) == "sample key_005 of shard-000001.tar cannot be read: its jpg is gone"
    assert str(CorruptSample("s.tar", "", "gone")) == "s.tar cannot be read: gone"


@pytest.mark.parametrize("name", ["index.json", "shard-000000.index.json", "shard-000000.tar"])
@pytest.mark.filterwarnings("ignore:.*it is made again")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder, name):
    # the table would hold what the index file of the shard said
    (folder / "index.bin").unlink()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((OSError, CorruptSample), match="named pipe"):
        ShardDataset(folder)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_can_share_a_dataset(folder, method):
    dataset = ShardDataset(folder)
    # opened before the fork: children share descriptors, and `pread` needs no position
    assert dataset[0].key != dataset[9].key
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for i, sample in enumerate(pool.map(dataset.__getitem__, range(10), timeout=60)):
            assert_same(sample, make_sample(i))


def test_threads_can_share_a_dataset_that_keeps_closing_files(tmp_path):
    dataset = ShardDataset(write_dataset(tmp_path / "data", 24, samples_per_shard=1))
    dataset._file = lru_cache(2)(dataset._open_shard)
    order = np.random.default_rng(0).integers(0, 24, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: dataset[i].key, order))
    assert keys == [f"key_{i:03d}" for i in order]
    assert dataset._file.cache_info().currsize <= 2


def test_open_files_are_bounded(tmp_path):
    dataset = ShardDataset(write_dataset(tmp_path / "data", 70, samples_per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(70):
        dataset[i]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
