"""An empty bucket, a cache of its own, and pauses that take no time."""

import os
from pathlib import Path

import pytest

from prismer.storage import objects
from tests.storage.bucket import BucketFileSystem


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of other tests, nothing is kept outside of the test's folder."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PRISMER_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(objects, "_outages", objects._Outages())
    monkeypatch.setattr(objects, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(BucketFileSystem, "fault", None)
    monkeypatch.setattr(BucketFileSystem, "requests", [])


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """The URL of a bucket, whose objects are the files below `tmp_path`/bucket."""
    (tmp_path / "bucket").mkdir()
    return f"bucket://{tmp_path}/bucket"
