"""Import the images, texts and labels of other people's datasets into shards: any Records -> one dataset folder.

    records = caption_records("coco_karpathy_train.json", images="data", labels="labels")
    report = import_records(records, "shards/coco", source="COCO Karpathy train")

What kinds there are is in `records.py`. RGB JPEGs are kept byte for byte; what cannot be
imported is skipped, counted and named in `import-report.json`. A job that was killed goes on where its last whole
shard ended when it is started again.
"""

import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from prismer.dataloading.feed.pixels import to_rgb
from prismer.dataloading.sources.record import Record, Records, Source
from prismer.dataloading.store.index import to_json
from prismer.dataloading.store.labels import blank_planes, unpack_labels
from prismer.dataloading.store.schema import check_meta
from prismer.dataloading.store.shards import Sample, ShardWriter
from prismer.experts import BACKGROUND, EXPERTS
from prismer.files import write_atomically
from prismer.reading import parse_json, printable, read_json

REPORT_FILE = "import-report.json"
NUM_OFFICIAL_OBJECTS = 722
"""Classes of the detector that the released labels come from: ids 0 .. 721."""
_QUALITY = 95
_ORIENTATION = 0x0112
# how a picture that carries this EXIF orientation is turned upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class ImportReport:
    """What became of the records: `records` = `imported` + len(`skipped`).

    Attributes:
        records: records in the list.
        imported: samples in the dataset, those of an earlier attempt included.
        re_encoded: images that were not RGB JPEGs, of this attempt.
        blank_labels: expert -> samples of this attempt whose label file was absent or empty.
        skipped: {"key", "image", "reason"} of what was left out.
        others: {"file", "reason"} of what was found and is no record, such as hidden files.
    """

    records: int = 0
    imported: int = 0
    re_encoded: int = 0
    blank_labels: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    others: list[dict[str, str]] = field(default_factory=list)


def import_records(
    records: Records,
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
    """Write every record that can be read to the dataset folder `out`; start it again to resume.

    Args:
        records: what a function of `records.py` returned.
        source, licence: where the images come from; kept with every sample.
        class_tables: {"seg": names, "obj_detection": names} or a JSON file of it. Without one, ids are kept as they
            are under the names "class 0", "class 1", ...: 255 of seg, 722 of obj_detection.
        label_size: side of the stored label maps, px, resized by nearest neighbour.
        workers: threads that read, check and convert.

    Returns:
        The report, which is also in `out/import-report.json`.

    Raises:
        ValueError: if the class tables are malformed, or `out` holds another dataset.
    """
    tables = _class_tables(class_tables)
    # every sample would fail otherwise
    to_json([source, licence])
    report = ImportReport(others=[asdict(other) for other in records.others])
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
    bar = tqdm(total=len(records), desc="importing", unit="image", disable=not progress)
    with writer, bar, ThreadPoolExecutor(workers) as pool:

        def convert(record: Record) -> "_Converted":
            return _convert(record, tables, label_size, source, licence)

        for record, future in _ahead(pool, convert, records, writer.written_keys, 4 * workers):
            report.records += 1
            bar.update()
            try:
                if future is not None:
                    converted = future.result()
                    writer.write(converted.sample)
                    report.re_encoded += converted.re_encoded
                    blank.update(converted.blank)
                report.imported += 1
            except _Unusable as error:
                report.skipped.append(skipped_entry(record, str(error)))
    report.blank_labels = dict(blank)
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    write_atomically(Path(out) / REPORT_FILE, text.encode())
    return report


def skipped_entry(record: Record, reason: str) -> dict[str, str]:
    """What a report says about a record that was left out, in characters that UTF-8 can hold."""
    image = record.name or (str(record.image.path) if record.image else "")
    return {"key": record.key, "image": printable(image), "reason": printable(reason)}


def to_jpeg(data: bytes, whole: bool = True) -> tuple[bytes, tuple[int, int], int]:
    """Any encoded image as an upright 8-bit RGB JPEG; one that is that already is returned byte for byte.

    Transparency is laid over white, 16-bit greys are scaled to 8 bit, of several frames the first is taken.

    Args:
        data: the encoded image.
        whole: whether to decode also a JPEG that needs no change, to see that it is whole; leave it out if it is
            decoded right afterwards anyway.

    Returns:
        The JPEG, (height, width) of it, and the EXIF orientation that was undone (1: none).

    Raises:
        ValueError: if the image is empty, cannot be decoded to its end, has more pixels than Pillow allows, or no
            8-bit meaning.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        # at once: what reads the EXIF of a damaged PNG first swallows the error, and the rows after it come out black
        if whole or image.format != "JPEG":
            image.load()
        turn = _turn_of(image)
        if image.format == "JPEG" and image.mode == "RGB" and turn == 1:
            return data, (image.height, image.width), 1
        image = to_rgb(image, "it")
    except UnidentifiedImageError:
        raise ValueError("the image is in no known format or damaged at its start") from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ValueError(f"the image cannot be decoded ({error or type(error).__name__})") from None
    if turn != 1:
        image = image.transpose(_TURNS[turn])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue(), (image.height, image.width), turn


def read_official_labels(
    files: dict[str, Path], classes: dict[str, list[str]], size: int, orientation: int = 1
) -> tuple[dict[str, np.ndarray], dict, list[str]]:
    """The label maps that Prismer's released labelling writes, at (size, size).

    An absent or empty file is a map that says nothing (never class 0, "person"). Boxes and words have their tables in
    `.json` and `.pt` files beside the PNG; of the latter the text is taken. The axes of the normals are taken as they
    are. Labels are turned with an image that its EXIF orientation turns; its normals, whose vectors would have to
    turn too, are left out.

    Args:
        files: expert -> PNG.
        classes: the class tables that ids must lie in.

    Returns:
        expert -> uint8 map; {"instances": ..., "words": ...} as far as those experts are in `files`; experts
        whose file was absent or empty.

    Raises:
        ValueError: if a file is damaged, or holds an id that its table does not know.
    """
    planes, tables, blank = {}, {}, []
    for expert, path in files.items():
        if expert == "normal" and orientation != 1:
            continue
        plane = _read_plane(expert, path, size, orientation)
        table: dict[str, object] = {}
        kind = EXPERTS[expert].kind
        if kind == "object" and plane is not None:
            table = _read_instances(path.with_suffix(".json"), len(classes[expert]))
        if kind == "word" and plane is not None:
            table = _read_words(path.with_suffix(".pt"))
            # the released loader: a map without its table holds no words
            plane = plane if table else None
        if plane is None:
            blank.append(expert)
            plane = blank_planes(expert, size)
        if EXPERTS[expert].is_ids:
            known = set(range(len(classes[expert]))) if kind == "class" else {int(i) for i in table}
            unknown = set(np.unique(plane).tolist()) - known - {BACKGROUND}
            if unknown:
                raise ValueError(f"{path} holds id {min(unknown)}, which its table of {len(known)} does not know")
        planes[expert] = plane
        if EXPERTS[expert].table:
            tables[EXPERTS[expert].table] = table
    return planes, tables, blank


class _Unusable(ValueError):
    """A record that is skipped."""


@dataclass
class _Converted:
    sample: Sample
    re_encoded: bool
    blank: list[str]


def _convert(record: Record, classes: dict[str, list[str]], label_size: int, source: str, licence: str) -> _Converted:
    try:
        data = record.image.read()
        jpeg, size, orientation = to_jpeg(data)
        blank: list[str] = []
        if record.packed is not None:
            planes, tables = unpack_labels(record.packed.read()), {}
        else:
            planes, tables, blank = read_official_labels(record.label_files, classes, label_size, orientation)
        meta = {"source": source, "licence": licence, **record.meta, **tables, "size": list(size)}
        check_meta(meta, classes)
        to_json(meta)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise _Unusable(str(error) or "it does not fit into memory") from None
    return _Converted(Sample(record.key, jpeg, planes, meta), jpeg is not data, blank)


def _ahead(
    pool: ThreadPoolExecutor, convert: Callable, records: Records, written: set[str], limit: int
) -> Iterator[tuple[Record, Future | None]]:
    """Records in order with their conversion under way, at most `limit` ahead; None for what is written already."""
    waiting: deque[tuple[Record, Future | None]] = deque()
    seen: set[str] = set()
    for record in records:
        future: Future | None = Future()
        if record.fault:
            # before the keys: what has no image must not count as imported because another of its name was
            future.set_exception(_Unusable(record.fault))
        elif record.key in seen:
            future.set_exception(_Unusable(f"another image has the key {record.key} too"))
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
            raise ValueError(f"the class tables {error}") from None
        if not isinstance(given, dict):
            raise ValueError('class tables are {"seg": [names], "obj_detection": [names]}; got another JSON value')
    counts = {"seg": BACKGROUND, "obj_detection": NUM_OFFICIAL_OBJECTS}
    numbered = {name: [f"class {i}" for i in range(count)] for name, count in counts.items()}
    return {**numbered, **(given or {})}


def _turn_of(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF says nothing about the picture, which has been decoded by now
        return 1
    return orientation if orientation in _TURNS else 1


def _read_plane(expert: str, path: Path, size: int, orientation: int) -> np.ndarray | None:
    """A label PNG as uint8 at (size, size); None if it is absent or has no bytes."""
    mode = "RGB" if EXPERTS[expert].planes == 3 else "L"
    try:
        data = _read_if_any(path)
        if not data:
            return None
        with Image.open(io.BytesIO(data)) as image:
            # an id map in another mode would be converted, and its ids with it
            if image.mode != mode and not (image.mode == "P" and EXPERTS[expert].is_ids):
                raise ValueError(f"it is {image.mode}, expected {mode}")
            image.load()
            if orientation != 1:
                image = image.transpose(_TURNS[orientation])
            return np.asarray(image.resize((size, size), Image.Resampling.NEAREST)).copy()
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ValueError(f"the label {path} cannot be read ({error})") from None


def _read_instances(path: Path, num_classes: int) -> dict[str, int]:
    try:
        table = parse_json(Source(path).read(), "it")
        if not isinstance(table, dict):
            raise ValueError(f"it is a {type(table).__name__}, not an object of id: class")
        for i, class_id in table.items():
            if not (i.isascii() and i.isdecimal()):
                raise ValueError(f"it has the id {i!r}, expected a number")
            if not isinstance(class_id, int) or isinstance(class_id, bool):
                raise ValueError(f"object {i} is of class {str(class_id)[:40]!r}, expected a number")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the object table {path} cannot be read ({error})") from None
    for class_id in table.values():
        if not 0 <= class_id < num_classes:
            raise ValueError(f"{path} names class {class_id}, the class table has {num_classes} names")
    return table


def _read_words(path: Path) -> dict[str, str]:
    """The words of a released `.pt` file {id: {"features", "text"}}; {} if there is none."""
    try:
        data = _read_if_any(path)
        if not data:
            return {}
        table = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for i, word in table.items():
            if isinstance(i, bool) or not isinstance(i, int) or not isinstance(word["text"], str):
                raise ValueError(f"its word {i!r} is no text under a number")
        return {str(i): word["text"].lower() for i, word in table.items()}
    except Exception as error:  # torch raises its own kinds on damaged or unsafe files
        raise ValueError(f"the word table {path} cannot be read ({error})") from None


def _read_if_any(path: Path) -> bytes:
    """The bytes of a file; none if it is absent. What is there and is no file is an error, not an absence."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    return Source(path).read()
