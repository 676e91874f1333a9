"""Proves that a mixture of local datasets and datasets in a bucket gives the batches of the same datasets on a disk.

python -m pytest tests/storage/test_remote_mixtures.py
"""

import pytest

from prismer.dataloading.mixture.dataset import MixedDataset
from prismer.dataloading.store.shards import ShardDataset
from prismer.storage.objects import StorageError
from prismer.training.data import check_dataset, has_split
from tests.data import test_mixture as local
from tests.storage.bucket import requests


def test_a_remote_dataset_is_a_part_like_any_other(bucket, tmp_path):
    counts = {"street": 23, "sea": 9}
    parts = [local.write(tmp_path / "bucket", *one) for one in counts.items()]
    remote = MixedDataset([parts[0], ShardDataset(f"{bucket}/sea")], list(counts))
    assert remote.is_remote and remote.place == f"{parts[0].folder}, {bucket}/sea"
    expected = local.global_batches(MixedDataset(parts, list(counts)), [None, 400], "blocks", 1, 0)
    local.assert_same(local.global_batches(remote, [None, 400], "blocks", 2, 0), expected)
    # each shard is fetched once, whatever the number of passes
    assert sorted(name for name in requests("read") if name.endswith(".tar")) == parts[1].shards


def test_a_split_in_a_bucket_is_found_by_its_index(bucket, tmp_path):
    local.write(tmp_path / "bucket" / "town", "sea", 5)
    (tmp_path / "bucket" / "town" / "sea").rename(tmp_path / "bucket" / "town" / "train")
    assert has_split(f"{bucket}/town", "train") and not has_split(f"{bucket}/town/", "val")
    check_dataset(f"{bucket}/town")
    with pytest.raises(ValueError, match="no dataset at bucket://.*/field/train; render or import one, or name"):
        check_dataset(f"{bucket}/field")
    with pytest.raises(StorageError, match="nowhere://"):
        check_dataset("nowhere://bucket/field")
