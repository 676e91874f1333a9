"""Proves that a dataset in a bucket reads like a local one, whatever the server does, within the limit of its cache.

python -m pytest tests/storage/test_remote_datasets.py
"""

import errno
import pickle
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.store import remote_files
from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.shipped import cache_folder
from prismer.storage.objects import StorageError
from tests.data.noise_shards import assert_same, flip, make_sample, write_dataset
from tests.data.test_loader import CONFIG, SEMANTICS
from tests.storage.bucket import BucketFileSystem, Outage, requests
from tests.storage.test_objects import HTTPStatusError

COUNT = 20


@pytest.fixture
def url(bucket, tmp_path) -> str:
    """Twenty samples in five shards."""
    write_dataset(tmp_path / "bucket" / "data", COUNT)
    return f"{bucket}/data"


def folder_of(url: str) -> Path:
    return Path(url.removeprefix("bucket://"))


def kept() -> list[str]:
    folder = cache_folder("storage") / "shards"
    return [path.name for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []


def shard_requests() -> list[str]:
    return [name for name in requests("read") if name.endswith(".tar")]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_samples_are_those_of_the_local_dataset(url):
    dataset = ShardDataset(url)
    assert dataset.is_remote and dataset.place == url and len(dataset) == COUNT
    for i in reversed(range(COUNT)):
        assert_same(dataset[i], make_sample(i))
    assert sorted(shard_requests()) == [f"shard-{i:06d}.tar" for i in range(5)]
    assert dataset.meta(7) == make_sample(7).meta and dataset.find("key_011") == 11
    # another process finds everything here
    BucketFileSystem.requests.clear()
    assert_same(pickle.loads(pickle.dumps(dataset))[9], make_sample(9))
    assert shard_requests() == []


def test_only_shards_that_are_needed_are_fetched(url):
    assert_same(ShardDataset(url)[9], make_sample(9))
    assert shard_requests() == ["shard-000002.tar"]


def test_shards_are_fetched_in_the_background(url):
    dataset = ShardDataset(url)
    dataset.prefetch([3, 1])
    wait_for(lambda: len(kept()) == 3)
    BucketFileSystem.requests.clear()
    assert_same(dataset[5], make_sample(5))
    assert_same(dataset[13], make_sample(13))
    assert BucketFileSystem.requests == []


def test_a_shard_that_is_announced_again_while_it_is_fetched_takes_one_thread(url, monkeypatch):
    first, others = threading.Event(), threading.Event()

    def slow(operation, path):
        if path.endswith("shard-000003.tar"):
            first.set()
            assert others.wait(20)

    monkeypatch.setattr(BucketFileSystem, "fault", staticmethod(slow))
    monkeypatch.setattr(remote_files, "_FETCHERS", 2)
    dataset = ShardDataset(url)
    dataset.prefetch([3])
    assert first.wait(20)
    # with the first of two threads busy, the second must fetch all others
    for shards in ([3, 1], [3, 2], [3, 1, 2, 4]):
        dataset.prefetch(shards)
    wait_for(lambda: len([name for name in kept() if len(name) == 64]) == 4)
    others.set()
    wait_for(lambda: dataset.files._fetchers == 0)
    assert sorted(shard_requests()) == [f"shard-{i:06d}.tar" for i in (1, 2, 3, 4)]


def test_the_background_takes_half_of_the_cache_at_most(url, monkeypatch):
    size = max(path.stat().st_size for path in folder_of(url).glob("*.tar"))
    monkeypatch.setenv("PRISMER_CACHE_LIMIT", str(5 * size))
    dataset = ShardDataset(url)
    dataset.prefetch(range(5))
    wait_for(lambda: dataset.files._fetchers == 0)
    assert sorted(shard_requests()) == ["shard-000000.tar", "shard-000001.tar"]


def test_the_cache_stays_below_its_limit(url, monkeypatch):
    sizes = [path.stat().st_size for path in sorted(folder_of(url).glob("*.tar"))]
    limit = 2 * max(sizes) + (folder_of(url) / "index.bin").stat().st_size
    monkeypatch.setenv("PRISMER_CACHE_LIMIT", str(limit))
    dataset = ShardDataset(url)
    for i in torch.randperm(COUNT).tolist():
        assert_same(dataset[i], make_sample(i))
        folder = cache_folder("storage") / "shards"
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit


def test_a_cache_that_holds_no_shard_is_refused(url, monkeypatch):
    monkeypatch.setenv("PRISMER_CACHE_LIMIT", "2k")
    with pytest.raises(StorageError, match="does not fit into the cache .* of 2,000; set PRISMER_CACHE_LIMIT"):
        ShardDataset(url)[0]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6, 9])
def test_no_sample_is_lost_while_the_server_is_away(url, monkeypatch, after):
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(after=after, count=3))
    dataset = ShardDataset(url)
    for i in range(COUNT):
        assert_same(dataset[i], make_sample(i))


def batches(place, **changes):
    options = dict(config=CONFIG, batch_size=4, semantics=SEMANTICS, seed=3, threads=1) | changes
    loader = Loader(ShardDataset(place), **options)
    with closing(loader.epoch(0)) as found:
        return [(batch.keys, batch.images.rgb, batch.images.labels["seg"]) for batch in found], loader


def test_batches_are_bit_equal_to_local_ones_also_after_an_outage(url, monkeypatch):
    local, _ = batches(folder_of(url))
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(after=5, count=6))
    remote, loader = batches(url)
    assert loader.skipped == [] and len(remote) == len(local) == COUNT // 4
    for ours, theirs in zip(remote, local, strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


def test_a_server_that_begins_to_refuse_ends_the_run_and_skips_nothing(url, monkeypatch):
    def refuse(operation, path):
        if path.endswith("shard-000003.tar"):
            raise HTTPStatusError(403)

    monkeypatch.setattr(BucketFileSystem, "fault", staticmethod(refuse))
    with pytest.raises(StorageError, match="refuses access"):
        batches(url)


@pytest.mark.parametrize("damage", ["flipped", "short", "absent"])
def test_a_wrong_shard_is_named_and_not_fetched_for_each_sample(url, damage):
    tar = folder_of(url) / "shard-000001.tar"
    if damage == "flipped":
        flip(tar, 600)
    elif damage == "short":
        tar.write_bytes(tar.read_bytes()[:5000])
    else:
        tar.unlink()
    reason = {"flipped": "it fails its checksum", "short": "it has 5000 bytes, not", "absent": "No such file"}[damage]
    dataset = ShardDataset(url)
    for i in (4, 5, 6, 7):
        with pytest.raises(CorruptSample, match=f"shard-000001.tar cannot be read: .*{reason}.*; copy it again"):
            dataset[i]
    assert len(shard_requests()) <= 2
    assert_same(dataset[8], make_sample(8))
    assert not [name for name in kept() if not name.endswith(".partial") and len(name) != 64]


def test_a_full_disk_ends_the_run_and_skips_nothing(url, monkeypatch):
    def full(url, file, size):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    dataset = ShardDataset(url)
    monkeypatch.setattr(remote_files, "download_object", full)
    with pytest.raises(StorageError, match=r"shards/\w+.\d+.partial cannot be written: No space left on device; free"):
        dataset[0]


def test_a_shard_that_was_written_anew_replaces_the_one_in_the_cache(url):
    assert_same(ShardDataset(url)[0], make_sample(0))
    for path in folder_of(url).iterdir():
        path.unlink()
    # shards of the same names with other samples
    write_dataset(folder_of(url), COUNT, 5)
    dataset = ShardDataset(url)
    for i in range(COUNT):
        assert_same(dataset[i], make_sample(i))


def test_what_a_killed_process_left_of_a_shard_is_completed_or_dropped(url):
    dataset = ShardDataset(url)
    entries, folder = dataset.entries, cache_folder("storage") / "shards"
    begun = (folder_of(url) / "shard-000000.tar").read_bytes()[:3000]
    (folder / f"{entries[0]['sha256']}.{entries[0]['size']}.partial").write_bytes(begun)
    (folder / f"{entries[1]['sha256']}.{entries[1]['size']}.partial").write_bytes(b"of another version")
    for i in range(8):
        assert_same(dataset[i], make_sample(i))
    assert not [name for name in kept() if name.endswith(".partial")]


def test_a_dataset_without_a_table_reads_its_index_files(url):
    (folder_of(url) / "index.bin").unlink()
    with pytest.warns(UserWarning, match="has no index.bin; it is made again"):
        dataset = ShardDataset(url)
    assert_same(dataset[13], make_sample(13))


def test_a_place_without_a_dataset_is_named(bucket):
    with pytest.raises(ValueError, match=f"{bucket}/none is not a finished dataset"):
        ShardDataset(f"{bucket}/none")


def test_fetching_goes_on_in_a_forked_process(url, monkeypatch):
    dataset = ShardDataset(url)
    # what the child of a fork sees: the count of threads that it does not have
    dataset.files._fetchers, dataset.files._process = remote_files._FETCHERS, -1
    dataset.prefetch([2])
    wait_for(lambda: len(kept()) == 2)


def test_a_cache_that_is_too_small_for_the_order_is_named_once(url, monkeypatch, recwarn):
    size = max(path.stat().st_size for path in folder_of(url).glob("*.tar"))
    monkeypatch.setenv("PRISMER_CACHE_LIMIT", str(2 * size + (folder_of(url) / "index.bin").stat().st_size))
    monkeypatch.setattr(remote_files, "_FEW", 2)
    dataset = ShardDataset(url)
    # shard after shard: each is fetched once
    for i in 2 * list(range(COUNT)):
        dataset[i]
    assert [str(one.message) for one in recwarn] == []
    # a sample of each shard in turn: each is fetched every time
    for i in 4 * list(range(0, COUNT, 4)):
        dataset[i]
    (warning,) = recwarn
    assert "downloaded again and again" in str(warning.message) and "PRISMER_CACHE_LIMIT" in str(warning.message)
