"""The variants that change samples: a dataset that reads like the one inside it, with other label maps."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from prismer.dataloading.store.shards import Sample, ShardDataset
from prismer.errors import InputError

# other names for the classes of the rendered scenes: another label set for the same regions
_OTHER_NAMES = {
    "sphere": "ball",
    "cube": "box",
    "cylinder": "tube",
    "cone": "pyramid",
    "sign": "board",
    "ground": "floor",
    "sky": "heaven",
}


class ChangedSamples:
    """A dataset with changed samples; everything else is that of the dataset inside.

    Args:
        dataset: a `ShardDataset` or a mixture.
        feed: a key of CHANGES and its arguments.
    """

    def __init__(self, dataset: Any, feed: Sequence[Any]) -> None:
        self._dataset = dataset
        name, *arguments = feed
        self._change, change_classes = CHANGES[name]
        self._arguments = arguments
        self.classes = change_classes(dataset.classes)

    def __getattr__(self, name: str) -> Any:
        # copies and pickles look for attributes before __init__ has run
        if name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> Sample:
        sample = self._dataset[i]
        self._change(sample, *self._arguments)
        return sample


def changed(dataset: Any, feed: Sequence[Any]) -> ShardDataset:
    """`dataset` with the samples of a variant; itself without a change."""
    return cast(ShardDataset, ChangedSamples(dataset, feed)) if feed else dataset


def _noise_of(key: str, what: str) -> np.random.Generator:
    """The generator of a sample, the same in each epoch and process."""
    return np.random.default_rng(zlib.crc32(f"{what}/{key}".encode()))


def _replace_depth(sample: Sample, percent: int) -> None:
    """Replace the depth map by uniform noise in `percent` % of the samples; a larger share holds the smaller ones."""
    plane = sample.labels.get("depth")
    if plane is not None and _noise_of(sample.key, "share").integers(100) < percent:
        sample.labels["depth"] = _noise_of(sample.key, "depth").integers(0, 256, plane.shape, dtype=np.uint8)


def _drop(sample: Sample, *experts: str) -> None:
    for expert in experts:
        sample.labels.pop(expert, None)


def _keep(sample: Sample) -> None:
    pass


def _same(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    return classes


def _rename_segmentation(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    names = classes.get("seg", [])
    if not names or not set(names) <= set(_OTHER_NAMES):
        raise InputError(
            "other-seg knows other names for the classes of the rendered scenes alone; for other data label the "
            "validation images with another segmentation network and run `prismer evaluate` on them"
        )
    return {**classes, "seg": [_OTHER_NAMES[name] for name in names]}


# name -> what changes a sample in place, and what returns the class tables
CHANGES: dict[str, tuple[Callable[..., None], Callable[[dict[str, list[str]]], dict[str, list[str]]]]] = {
    "depth_noise": (_replace_depth, _same),
    "drop": (_drop, _same),
    "other_segmentation": (_keep, _rename_segmentation),
}
