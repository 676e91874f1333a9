"""Write the images, texts and labels of any records as a dataset folder of shards.

    records = caption_records("coco_karpathy_train.json", images="data", labels="labels")
    report = import_records(records, "shards/coco", source="COCO Karpathy train")

The other files of this folder make records. RGB JPEGs are kept byte for byte. Records that cannot be imported are
skipped, counted and named in `import-report.json`. A killed job, started again, resumes after its last whole shard.
"""

import io
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from prismer.dataloading.feed.rgb import to_jpeg
from prismer.dataloading.sources.published_labels import read_published_labels
from prismer.dataloading.sources.records import ImageRecord, ImageRecords
from prismer.dataloading.store.index import to_json
from prismer.dataloading.store.label_maps import unpack_labels
from prismer.dataloading.store.sample_json import check_meta
from prismer.dataloading.store.shards import Sample, ShardWriter
from prismer.errors import InputError
from prismer.experts import BACKGROUND
from prismer.reading import printable, read_json
from prismer.storage.output import write_file

REPORT_FILE = "import-report.json"
# classes of the detector that made the published labels: ids 0 .. 721
_NUM_PUBLISHED_OBJECTS = 722


@dataclass
class ImportReport:
    """The outcome of an import: `records` = `imported` + len(`skipped`).

    Attributes:
        records: number of records in the source.
        imported: samples in the dataset, those of an earlier attempt included.
        re_encoded: images of this attempt that were not RGB JPEGs.
        formats: what these were, such as "greyscale JPEG" -> {"count", "first"}.
        blank_labels: expert -> samples of this attempt whose label file was absent or empty.
        skipped: {"key", "image", "reason"} of the records left out.
        others: {"file", "reason"} of what else the source holds, such as hidden files.
    """

    records: int = 0
    imported: int = 0
    re_encoded: int = 0
    formats: dict[str, dict] = field(default_factory=dict)
    blank_labels: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    others: list[dict[str, str]] = field(default_factory=list)


def import_records(
    records: ImageRecords,
    out: str | Path,
    *,
    source: str,
    licence: str = "",
    class_tables: dict[str, list[str]] | str | Path | None = None,
    samples_per_shard: int = 1000,
    label_size: int = 224,
    workers: int = 4,
    progress: bool = True,
) -> ImportReport:
    """Write every readable record to the dataset folder `out`; start it again to resume.

    Args:
        records: from one of the other files of this folder.
        out: the dataset folder, or a URL such as s3://bucket/dataset.
        source, licence: where the images come from; kept with every sample.
        class_tables: {"seg": names, "obj_detection": names} or a JSON file of it. Without one, ids are kept as they
            are under the names "class 0", "class 1", ...: 255 of seg, 722 of obj_detection.
        samples_per_shard: size of a full tar.
        label_size: side of the stored label maps, px, resized by nearest neighbour.
        workers: threads that read, check and convert.
        progress: show a bar with the time left.

    Returns:
        The report, which is also in `out/import-report.json`.

    Raises:
        ValueError: if the class tables are malformed, or `out` holds another dataset.
    """
    tables = _class_tables(class_tables)
    # an unusable value fails here, not once for every sample
    to_json([source, licence])
    report = ImportReport()
    blank: Counter = Counter()
    if records.class_names:
        tables["class"] = records.class_names
    writer = ShardWriter(
        out,
        classes=tables,
        source=source,
        samples_per_shard=samples_per_shard,
        about={"label_size": label_size},
        resume=True,
    )
    bar = tqdm(total=records.count, desc="importing", unit="image", disable=not progress)
    with writer, bar, ThreadPoolExecutor(workers) as pool:

        def convert(record: ImageRecord) -> "_Converted":
            return _convert(record, tables, label_size, source, licence)

        for record, future in _ahead(pool, convert, records, writer.written_keys, 4 * workers):
            report.records += 1
            bar.update()
            try:
                if future is not None:
                    converted = future.result()
                    writer.write(converted.sample)
                    if converted.was:
                        report.re_encoded += 1
                        one = report.formats.setdefault(converted.was, {"count": 0, "first": _shown_name(record)})
                        one["count"] += 1
                    blank.update(converted.blank)
                report.imported += 1
            except _BadRecord as error:
                report.skipped.append(skipped_entry(record, str(error)))
    report.blank_labels = dict(blank)
    # some sources know what they left out when they have been read to their end
    report.others = [asdict(other) for other in records.others]
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_file(out, REPORT_FILE, text.encode())
    return report


def skipped_entry(record: ImageRecord, reason: str) -> dict[str, str]:
    """The entry of a skipped record in a report, in characters that UTF-8 can hold."""
    return {"key": record.key, "image": _shown_name(record), "reason": printable(reason)}


def _shown_name(record: ImageRecord) -> str:
    return printable(record.name or (str(record.image.path) if record.image else ""))


class _BadRecord(InputError):
    """A record that is skipped."""


@dataclass
class _Converted:
    """A record as a sample.

    Attributes:
        sample: to be written.
        was: what its image was, if not an RGB JPEG; "" if it was kept.
        blank: experts whose label file was absent or empty.
    """

    sample: Sample
    was: str
    blank: list[str]


def _convert(
    record: ImageRecord, classes: dict[str, list[str]], label_size: int, source: str, licence: str
) -> _Converted:
    try:
        data = record.image.read()
        jpeg, size, orientation = to_jpeg(data)
        blank: list[str] = []
        if record.packed is not None:
            planes, tables = unpack_labels(record.packed.read()), {}
        else:
            planes, tables, blank = read_published_labels(record.label_files, classes, label_size, orientation)
        meta = {"source": source, "licence": licence, **record.meta, **tables, "size": list(size)}
        check_meta(meta, classes)
        to_json(meta)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise _BadRecord(str(error) or "it does not fit into memory") from None
    return _Converted(Sample(record.key, jpeg, planes, meta), "" if jpeg is data else _format_of(data), blank)


def _format_of(data: bytes) -> str:
    """The format and the kind of pixels of an image that was decoded before."""
    with Image.open(io.BytesIO(data)) as image:
        mode, form = image.mode, image.format
    kind = {"1": "greyscale ", "L": "greyscale ", "LA": "greyscale ", "CMYK": "CMYK ", "RGB": ""}.get(mode, f"{mode} ")
    return f"{kind}{form}" if kind or form != "JPEG" else "JPEG that its EXIF turns"


def _ahead(
    pool: ThreadPoolExecutor,
    convert: Callable[[ImageRecord], _Converted],
    records: ImageRecords,
    written: set[str],
    limit: int,
) -> Iterator[tuple[ImageRecord, Future | None]]:
    """Records in order with their running conversions, at most `limit` ahead; None if a record is already written."""
    waiting: deque[tuple[ImageRecord, Future | None]] = deque()
    seen: set[str] = set()
    for record in records:
        future: Future | None = Future()
        if record.fault:
            # first: a record without an image must not count as imported because another of its key was
            future.set_exception(_BadRecord(record.fault))
        elif record.key in seen:
            future.set_exception(_BadRecord(f"another image has the key {record.key} too"))
        elif record.key in written:
            future = None
        else:
            future = pool.submit(convert, record)
        if not record.fault:
            seen.add(record.key)
        waiting.append((record, future))
        if len(waiting) > limit:
            yield waiting.popleft()
    yield from waiting


def _class_tables(given: dict[str, list[str]] | str | Path | None) -> dict[str, list[str]]:
    if isinstance(given, (str, Path)):
        try:
            given = read_json(given)
        except ValueError as error:
            raise InputError(f"the class tables {error}") from None
        if not isinstance(given, dict):
            raise InputError('class tables are {"seg": [names], "obj_detection": [names]}; got another JSON value')
    counts = {"seg": BACKGROUND, "obj_detection": _NUM_PUBLISHED_OBJECTS}
    numbered = {name: [f"class {i}" for i in range(count)] for name, count in counts.items()}
    return {**numbered, **(given or {})}
