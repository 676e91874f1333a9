"""Proves that rendered datasets are reproducible and disjoint, and are written whole or not at all.

python -m pytest tests/data/test_scene_dataset.py
"""

import io
import json

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.scenes import dataset as scenes
from prismer.dataloading.store.shards import ShardDataset


def test_render_scene_is_reproducible():
    first, again, other = (scenes.render_scene(seed) for seed in (11, 11, 12))
    assert first.rgb.tobytes() == again.rgb.tobytes()
    assert json.dumps(first.meta) == json.dumps(again.meta)
    for name, plane in first.planes.items():
        assert plane.tobytes() == again.planes[name].tobytes(), name
    assert first.rgb.tobytes() != other.rgb.tobytes() and first.meta["scene"] != other.meta["scene"]


def test_a_scene_does_not_depend_on_its_sizes():
    small, large = (scenes.render_scene(5, size=48, label_size=80), scenes.render_scene(5, size=96, label_size=80))
    assert small.rgb.shape == (48, 48, 3) and large.rgb.shape == (96, 96, 3)
    for name in small.planes:
        assert (small.planes[name] == large.planes[name]).all(), name
    assert small.meta["captions"] == large.meta["captions"]
    assert small.meta["questions"] == large.meta["questions"]
    # the large image at half its size is the small one
    halved = large.rgb.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(halved - small.rgb).mean() < 3


@pytest.mark.parametrize("sizes", [(16, 128), (128, 16)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="at least 32"):
        scenes.render_scene(0, *sizes)


def _samples(folder) -> list:
    dataset = ShardDataset(folder)
    return [dataset[i] for i in range(len(dataset))]


def test_splits_share_no_scene():
    splits = ("train", "val", "test")
    seeds = [scenes.scene_seed(s, n, i) for s in (0, 1) for n in splits for i in range(500)]
    assert len(set(seeds)) == len(seeds)
    described = [
        {json.dumps(scenes.render_scene(scenes.scene_seed(0, split, i), 32, 32).meta["scene"]) for i in range(12)}
        for split in splits
    ]
    assert all(len(split) == 12 for split in described)
    assert len(set.union(*described)) == 36


def test_render_dataset(tmp_path):
    settings = dict(train=12, val=2, test=0, size=32, label_size=48, progress=False)
    scenes.render_dataset(tmp_path / "a", workers=1, **settings)
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if not p.name.startswith(".")) == ["train", "val"]
    samples = _samples(tmp_path / "a" / "train")
    assert [s.key for s in samples] == [f"train-{i:06d}" for i in range(12)]
    expected = scenes.render_scene(scenes.scene_seed(0, "train", 3), 32, 48)
    assert samples[3].meta == expected.meta
    for name, plane in expected.planes.items():
        assert (samples[3].labels[name] == plane).all(), name
    with Image.open(io.BytesIO(samples[3].jpeg)) as image:
        assert image.size == (32, 32)
        # 4:4:4: every component has the same sampling
        assert len({component[1:3] for component in image.layer}) == 1
        assert np.abs(np.asarray(image).astype(int) - expected.rgb).mean() < 4
    dataset = ShardDataset(tmp_path / "a" / "train")
    assert dataset.classes == {"seg": scenes.SEG_CLASSES, "obj_detection": scenes.OBJECT_CLASSES}

    # two processes write the same bytes as one
    scenes.render_dataset(tmp_path / "b", workers=2, **settings)
    shards = sorted((tmp_path / "a" / "train").glob("shard*"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "b" / "train" / shard.name).read_bytes()

    # existing splits are kept, and a new one is added
    before = shards[0].stat()
    scenes.render_dataset(tmp_path / "a", workers=1, **(settings | {"test": 2}))
    assert shards[0].stat().st_mtime_ns == before.st_mtime_ns and shards[0].stat().st_ino == before.st_ino
    assert len(ShardDataset(tmp_path / "a" / "test")) == 2
    with pytest.raises(ValueError, match="delete it or choose another folder"):
        scenes.render_dataset(tmp_path / "a", workers=1, **(settings | {"seed": 1}))
    (tmp_path / "c" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no dataset"):
        scenes.render_dataset(tmp_path / "c", workers=1, **settings)
    with pytest.raises(ValueError, match="at least 0"):
        scenes.render_dataset(tmp_path / "a", train=-1)


def test_an_interrupted_split_is_rendered_again(tmp_path, monkeypatch):
    settings = dict(train=10, val=0, test=0, size=32, label_size=32, workers=1, progress=False)
    render_chunk = scenes._render_chunk

    def fail(about, indices):
        if 8 in indices:
            raise KeyboardInterrupt
        return render_chunk(about, indices)

    monkeypatch.setattr(scenes, "_render_chunk", fail)
    with pytest.raises(KeyboardInterrupt):
        scenes.render_dataset(tmp_path, **settings)
    assert not (tmp_path / "train").exists()
    monkeypatch.setattr(scenes, "_render_chunk", render_chunk)
    scenes.render_dataset(tmp_path, **settings)
    assert len(ShardDataset(tmp_path / "train")) == 10
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["train"]
