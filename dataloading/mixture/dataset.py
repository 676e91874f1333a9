"""Several datasets read as one: samples one dataset after the other, and class tables merged by name.

Each dataset numbers its classes itself, so the class ids in its label maps and in the JSON of its samples are rewritten
to the merged tables as a sample is read. An id outside its own table is refused before it could become another class.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np

from prismer.dataloading.store.index import CLASS_TABLES, CorruptSample, Sample
from prismer.dataloading.store.native_ops import values_in_use
from prismer.dataloading.store.sample_json import check_meta
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError
from prismer.experts import BACKGROUND, EXPERTS


class MixedPart:
    """One dataset of a mixture: its samples carry the ids of the merged class tables, its shards the dataset's name.

    Args:
        dataset: the dataset.
        name: of the dataset in the mixture.
        classes: the merged class tables.

    Attributes:
        dataset, name, classes: as given.
        place: of the dataset.
    """

    def __init__(self, dataset: ShardDataset, name: str, classes: dict[str, list[str]]):
        self.dataset, self.name, self.classes = dataset, name, classes
        self.place = dataset.place
        # class table -> the merged id of each of its own ids
        self._merged: dict[str, list[int]] = {}
        for table in CLASS_TABLES:
            ids = {text: i for i, text in enumerate(classes.get(table, ()))}
            self._merged[table] = [ids[text] for text in dataset.classes.get(table, ())]
        # the same for the pixels of maps whose ids change
        self._pixels = {}
        for expert, merged in self._merged.items():
            if expert in EXPERTS and EXPERTS[expert].kind == "class" and merged != list(range(len(merged))):
                self._pixels[expert] = np.full(256, BACKGROUND, np.uint8)
                self._pixels[expert][: len(merged)] = merged

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Sample:
        """Read and check sample `i`.

        Raises:
            ValueError: as ShardDataset, or if a class id is not in the dataset's own table.
        """
        with self._naming():
            sample = self.dataset[i]
        self._renumber_maps(sample.labels)
        self._renumber_meta(sample.meta)
        return sample

    def key(self, i: int) -> str:
        """The key of sample `i`; another dataset may have the same."""
        with self._naming():
            return self.dataset.key(i)

    def meta(self, i: int) -> dict:
        """The JSON of sample `i`.

        Raises:
            ValueError: as for `self[i]`.
        """
        with self._naming():
            meta = self.dataset.meta(i)
        self._renumber_meta(meta)
        return meta

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except CorruptSample as error:
            raise CorruptSample(f"{self.name}/{error.shard}", error.key, error.reason) from None

    def _renumber_maps(self, labels: dict[str, np.ndarray]) -> None:
        """Rewrite the maps whose pixels are class ids."""
        for expert in (name for name in labels if EXPERTS[name].kind == "class"):
            count = len(self._merged[expert])
            for i in values_in_use(labels[expert]):
                if count <= i < BACKGROUND:
                    raise InputError(
                        f"its {expert} map has class {i}, the class table has {count}; label the sample again"
                    )
            if expert in self._pixels:
                labels[expert] = self._pixels[expert][labels[expert]]

    def _renumber_meta(self, meta: dict) -> None:
        """Rewrite the class indices in a sample's JSON: of its objects, and of the image."""
        for expert, field in ((name, kind.table) for name, kind in EXPERTS.items() if kind.kind == "object"):
            table, merged = meta.get(field), self._merged[expert]
            if isinstance(table, dict):
                meta[field] = {i: self._renumbered(index, merged, meta) for i, index in table.items()}
        if not isinstance(meta.get("class"), str | None):
            meta["class"] = self._renumbered(meta["class"], self._merged["class"], meta)

    def _renumbered(self, index: object, merged: list[int], meta: dict) -> int:
        if type(index) is not int or not 0 <= index < len(merged):
            check_meta(meta, self.dataset.classes)
            raise AssertionError(f"{index!r} is no index of {len(merged)} classes, and the check accepts it")
        return merged[index]


class MixedDataset:
    """Random access to the samples of several datasets, one dataset after the other, as a ShardDataset gives it.

    Args:
        datasets: the datasets.
        names: of the datasets, different from each other.

    Attributes:
        parts: the datasets, with merged class tables.
        begins: dataset k holds samples begins[k] .. begins[k + 1] - 1.
        classes: the class tables, merged by name: every name once, in the order of the datasets.
        shards: names of the tars, behind the name of their dataset and a slash.
        starts: shard s holds samples starts[s] .. starts[s + 1] - 1.
        place: of all datasets, for messages.
        is_remote: whether one of the datasets lies in object storage.

    Raises:
        ValueError: if the merged table of a map has more names than a uint8 map holds.
    """

    def __init__(self, datasets: Sequence[ShardDataset], names: Sequence[str]):
        self._datasets, self._names = list(datasets), list(names)
        self.classes = merge_classes([dataset.classes for dataset in datasets], names)
        self.parts = [MixedPart(*pair, self.classes) for pair in zip(datasets, names, strict=True)]
        self.begins = [0, *accumulate(map(len, self.parts))]
        self.shards = [f"{part.name}/{shard}" for part in self.parts for shard in part.dataset.shards]
        self.starts = [
            begin + start
            for begin, dataset in zip(self.begins, datasets, strict=False)
            for start in dataset.starts[:-1]
        ] + [len(self)]
        # shards before each dataset
        self._first_shards = [0, *accumulate(len(dataset.shards) for dataset in datasets)]
        self.place = ", ".join(part.place for part in self.parts)
        self.is_remote = any(dataset.is_remote for dataset in datasets)

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, i: int) -> Sample:
        """Read and check sample `i`; errors as `MixedPart` says."""
        part, i = self._locate(i)
        return part[i]

    def key(self, i: int) -> str:
        """The key of sample `i`; two datasets may use the same."""
        part, i = self._locate(i)
        return part.key(i)

    def meta(self, i: int) -> dict:
        """The JSON of sample `i`, with the ids of the merged tables."""
        part, i = self._locate(i)
        return part.meta(i)

    def shard_of(self, i: int) -> int:
        """The position in `shards` of the tar that holds sample `i`."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of a mixture of {len(self)}")
        return bisect_right(self.starts, i % len(self)) - 1

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards, given by their positions in `shards`, in the background."""
        wanted: dict[int, list[int]] = defaultdict(list)
        for shard in shards:
            k = bisect_right(self._first_shards, shard) - 1
            wanted[k].append(shard - self._first_shards[k])
        for k, own in wanted.items():
            self._datasets[k].prefetch(own)

    def first_shard(self, k: int) -> int:
        """The position in `shards` of the first tar of dataset `k`."""
        return self._first_shards[k]

    def __reduce__(self) -> tuple:
        return MixedDataset, (self._datasets, self._names)

    def _locate(self, i: int) -> tuple[MixedPart, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of a mixture of {len(self)}")
        i %= len(self)
        k = bisect_right(self.begins, i) - 1
        return self.parts[k], i - self.begins[k]


def merge_classes(tables: Sequence[dict[str, list[str]]], names: Sequence[str]) -> dict[str, list[str]]:
    """Class tables merged by name: each name once, in the order in which it comes first.

    Args:
        tables: the class tables of each dataset.
        names: of the datasets, for messages.

    Raises:
        ValueError: if a merged table has more names than a uint8 map holds.
    """
    merged = {}
    for table in CLASS_TABLES:
        if any(table in own for own in tables):
            merged[table] = list(dict.fromkeys(name for own in tables for name in own.get(table, ())))
    for expert, texts in merged.items():
        if expert in EXPERTS and EXPERTS[expert].kind == "class" and len(texts) > BACKGROUND:
            raise InputError(
                f"the {expert} classes of {', '.join(names)} are {len(texts)} different names, and a uint8 map holds "
                f"at most {BACKGROUND}; leave a dataset out, or label them with the same classes"
            )
    return merged
