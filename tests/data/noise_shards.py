"""Small datasets of noise images, and what tests do to their files."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prismer.dataloading.store.shards import Sample, ShardWriter

CLASSES = {"seg": ["ground", "sky"], "obj_detection": ["cube"]}


def make_sample(i: int, side: int = 16) -> Sample:
    rng = np.random.default_rng(i)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
    labels = {
        "seg": rng.integers(0, 2, (8, 8), dtype=np.uint8),
        "normal": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
    }
    if i % 2:
        del labels["normal"]
    meta = {"captions": [f"caption {i}, \N{LATIN SMALL LETTER E WITH ACUTE}"], "size": [side, side]}
    return Sample(f"key_{i:03d}", file.getvalue(), labels, meta)


def write_dataset(folder: Path, count: int = 10, samples_per_shard: int = 4, **settings: Any) -> Path:
    """Write samples 0 to `count` - 1, without those that `folder` already has."""
    settings = {"classes": CLASSES, "source": "made up", **settings}
    with ShardWriter(folder, samples_per_shard=samples_per_shard, **settings) as writer:
        for i in range(count):
            sample = make_sample(i)
            if sample.key not in writer.written_keys:
                writer.write(sample)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(sample: Sample, expected: Sample) -> None:
    assert (sample.key, sample.jpeg, sample.meta) == (expected.key, expected.jpeg, expected.meta)
    assert set(sample.labels) == set(expected.labels)
    for name, plane in expected.labels.items():
        np.testing.assert_array_equal(sample.labels[name], plane)


def flip(path: Path, position: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def offset_of(tar_path: Path, name: str) -> int:
    with tarfile.open(tar_path) as tar:
        return tar.getmember(name).offset_data
