"""The samples of a finished dataset of ours as records: through its index, so that any of them is found at once.

`tar_records` reads the headers of every tar, which takes long for ten million samples, and longer in a bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prismer.dataloading.sources.records import ImageRecord, ImageRecords
from prismer.dataloading.sources.webdataset_tars import other_files
from prismer.dataloading.store.shards import Sample, ShardDataset


@dataclass(frozen=True)
class StoredImage:
    """The image of a sample, with its maps and texts.

    Attributes:
        dataset: the dataset of the sample.
        index: its position in the dataset.
        path: the name of the image in reports.
    """

    dataset: ShardDataset
    index: int
    path: Path

    def sample(self) -> Sample:
        """The sample.

        Raises:
            CorruptSample: if it cannot be read.
        """
        return self.dataset[self.index]

    def read(self) -> bytes:
        """The encoded image; raises as `sample` does."""
        return self.sample().jpeg


def stored_records(dataset: ShardDataset) -> ImageRecords:
    """The records of a dataset in the order of its samples. Their texts and maps are those of `StoredImage.sample`.

    A damaged sample is a record that cannot be read.
    """

    def part(here: range, ahead: range) -> Iterator[ImageRecord]:
        dataset.prefetch(dict.fromkeys(dataset.shard_of(i) for i in (*here, *ahead)))
        return map(record, here)

    def record(i: int) -> ImageRecord:
        key = dataset.key(i)
        name = f"{dataset.place}/{dataset.shards[dataset.shard_of(i)]}/{key}"
        return ImageRecord(key, StoredImage(dataset, i, Path(name)), name=name)

    others = [] if dataset.is_remote else other_files(dataset.folder, dataset.shards)
    return ImageRecords(len(dataset), lambda: map(record, range(len(dataset))), others=others, part=part)
