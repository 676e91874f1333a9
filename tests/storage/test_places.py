"""Proves that local folders stay local: they are told from URLs, and never need fsspec.

python -m pytest tests/storage/test_places.py
"""

import sys
from pathlib import Path

import pytest

from prismer.dataloading.store.shards import ShardDataset
from prismer.storage.objects import StorageError
from prismer.storage.places import as_place, host_of, inside, is_url, kept_folder
from tests.data.noise_shards import assert_same, make_sample, write_dataset


@pytest.mark.parametrize("place", ["s3://bucket/x", "gs://b", "hf://datasets/o/n", "https://h:8080/x", "http://h/x"])
def test_a_url_is_not_a_folder(place):
    assert is_url(place) and as_place(place + "/") == place
    assert inside(place, "train", "index.json") == f"{place}/train/index.json"


@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("data/x", "data/x"),
        ("/data/s3:/x", "/data/s3:/x"),
        ("file:///data/x y", "/data/x y"),
        ("file:///data/x%20y", "/data/x y"),
        ("FILE://localhost/data", "/data"),
        (Path("data"), "data"),
    ],
)
def test_anything_else_is_a_folder(place, folder):
    assert not is_url(place) and as_place(place) == Path(folder)
    assert inside(place, "train") == Path(folder) / "train"


def test_a_server_is_named_with_its_port():
    assert host_of("https://h:8080/x/y") == "https://h:8080" and host_of("s3://b") == "s3://b"


def test_folders_of_one_name_are_kept_apart():
    one, other = (kept_folder("models", f"s3://{bucket}/model/") for bucket in "ab")
    assert one != other and one.name.startswith("model-") and one == kept_folder("models", "s3://a/model")


def test_local_datasets_do_without_fsspec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    write_dataset(tmp_path / "data", 3)
    assert_same(ShardDataset(f"file://{tmp_path}/data")[2], make_sample(2))
    with pytest.raises(StorageError, match=r"s3:// needs a package that is not installed; run `pip install 'prismer-"):
        ShardDataset("s3://bucket/data")
