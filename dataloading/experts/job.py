"""The labelling job: records of any kind -> a dataset folder with expert maps, written by any number of processes.

Shard k holds the records k n .. (k + 1) n - 1 of the source. Process r of w first writes the shards with k mod w = r,
and then takes over those of slow or dead processes: the absent shards that no living process has claimed. A shard is
whole or absent, and its sidecar names the records that were skipped. A job that was killed therefore resumes at the
first absent shard, even with another number of processes, and ends with the same dataset, byte for byte. The process
that finds all shards present writes `index.json` and `report.json`.
"""

import hashlib
import io
import json
from array import array
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prismer.dataloading.experts.claims import ShardClaims
from prismer.dataloading.experts.job_costs import PACK, READ, WRITE, JobCosts, total_costs
from prismer.dataloading.experts.labeller import DecodedBatch, Labeller
from prismer.dataloading.feed.dali import UndecodableImages
from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.feed.rgb import to_jpeg
from prismer.dataloading.sources.importer import skipped_entry
from prismer.dataloading.sources.one_pass import submit_ahead, wanted_parts
from prismer.dataloading.sources.records import FilePart, ImageRecord, ImageRecords
from prismer.dataloading.sources.stored_records import StoredImage
from prismer.dataloading.store.index import Sample, check_classes, to_json
from prismer.dataloading.store.label_maps import pack_labels, resize_nearest, unpack_labels
from prismer.dataloading.store.sample_json import check_meta
from prismer.dataloading.store.writer import OpenShard, finished_shard, finished_shards, write_index
from prismer.errors import InputError, MachineError
from prismer.experts import EXPERTS
from prismer.reading import parse_json
from prismer.storage.output import list_files, read_file, stage, write_file
from prismer.storage.places import as_place, inside

JOB_FILE, REPORT_FILE = "job.json", "report.json"
# field of a sample's JSON -> the expert whose ids it describes
_EXPERT_OF_TABLE = {expert.table: name for name, expert in EXPERTS.items() if expert.table}
# samples on the contact sheet of a shard
_PREVIEW_SAMPLES = 8


@dataclass
class LabelReport:
    """What a job did: `records` = `labelled` + len(`skipped`) once `shards_missing` is 0.

    Attributes:
        records: number of records in the source.
        labelled: number of samples in the dataset.
        skipped: {"key", "image", "reason"} of each record that was left out.
        shards_missing: number of shards that other processes have yet to write.
        taken_over: number of shards of other processes that this one has written.
        others: {"file", "reason"} of each file in the source that is not a record.
    """

    records: int = 0
    labelled: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    shards_missing: int = 0
    taken_over: int = 0
    others: list[dict[str, str]] = field(default_factory=list)


@dataclass
class _ReadRecord:
    """A record that was read.

    Attributes:
        record: where it comes from.
        meta: its texts and tables.
        jpeg: its image, as it is stored.
        size: (height, width) of the image in pixels.
        planes: the maps that the record already has and that the job keeps.
    """

    record: ImageRecord
    meta: dict
    jpeg: bytes
    size: tuple[int, int]
    planes: dict[str, np.ndarray]


def label_records(
    records: ImageRecords,
    out: str | Path,
    labeller: Labeller,
    *,
    source: str,
    licence: str = "",
    classes: dict[str, list[str]] | None = None,
    samples_per_shard: int = 1000,
    rank: int = 0,
    world: int = 1,
    peers: Collection[int] | None = None,
    workers: int = 4,
    preview: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Label every record that can be read. Call it again to resume.

    Args:
        records: the records, see `sources/any_source.py`. Maps that they already have are kept, except those of the
            experts in `labeller`.
        out: the dataset folder, or a URL such as s3://bucket/dataset.
        labeller: the experts.
        source, licence: origin and licence of the images, stored with every sample.
        classes: class tables of the maps that the records already have.
        samples_per_shard: records for each shard. Skipped records make a shard smaller.
        rank, world: the index of this process, and the number of processes.
        peers: the processes whose shards this one may take over, because they see the same claims; None for all.
        workers: threads that read and pack.
        preview: whether to write a contact sheet of each shard's first samples to `out/preview/`.
        progress: whether to show a bar with the images per second of each network, and the remaining time.

    Returns:
        The report. Once every shard is present, it covers the whole job and is also in `out/report.json`.

    Raises:
        ValueError: if `out` holds the dataset of another job, or its file system has no record locks.
    """
    if not 0 <= rank < world:
        raise InputError(f"rank is {rank} of {world}; ranks count from 0")
    if samples_per_shard < 1 or workers < 1:
        raise InputError(f"samples_per_shard is {samples_per_shard}, workers {workers}; both must be at least 1")
    place = as_place(out)
    costs = JobCosts(place, labeller, workers, world)
    job = _Job(records, place, labeller, source, licence, classes or {}, samples_per_shard, costs)
    within_reach = [k for k in range(job.num_shards) if peers is None or k % world in {rank, *peers}]
    wanted = job.unfinished(range(rank, job.num_shards, world))
    taken_over = 0
    bar = tqdm(total=0, desc="labelling", unit="image", disable=not progress)
    with (
        ShardClaims(stage(place)) as claims,
        bar,
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(1) as decoder,
    ):
        costs.start()
        while True:
            bar.total = bar.n + sum(len(job.records_of(k)) for k in wanted)
            for number, part in job.parts(wanted):
                with claims.claim(number) as ours:
                    # another process may have finished the shard since `wanted` was listed
                    if not ours or job.is_finished(number):
                        bar.total -= len(job.records_of(number))
                        continue
                    first = job.write_shard(number, part, pool, decoder, bar)
                    taken_over += number % world != rank
                    if preview and first:
                        job.draw_preview(number, first)
            # last, because listing the shards of all processes reads the index file of each
            wanted = [k for k in job.unfinished(within_reach) if claims.is_free(k)]
            if not wanted:
                break
        costs.save()
        report = job.report()
        if not report.shards_missing:
            with claims.turn():
                job.finish(report)
            claims.remove_file()
    report.taken_over = taken_over
    return report


class _Job:
    """What all shards of a job share, and the writing of one shard."""

    def __init__(
        self,
        records: ImageRecords,
        place: str | Path,
        labeller: Labeller,
        source: str,
        licence: str,
        classes: dict[str, list[str]],
        samples_per_shard: int,
        costs: JobCosts,
    ):
        self._records, self.costs = records, costs
        self.place, self.labeller, self.source, self.licence = place, labeller, source, licence
        self.experts = {network.info.expert for network in labeller.networks}
        kept = {name: table for name, table in classes.items() if name not in self.experts}
        self.classes = {**kept, **labeller.classes}
        if records.class_names:
            self.classes["class"] = records.class_names
        check_classes(self.classes)
        self.others = [asdict(other) for other in records.others]
        self.samples_per_shard = samples_per_shard
        self.count, listing, self.repeated = _scan_keys(records)
        self.num_shards = -(-self.count // samples_per_shard)
        self.about = {**labeller.about, "samples_per_shard": samples_per_shard}
        notes = {
            "classes": self.classes,
            "source": source,
            "licence": licence,
            "about": self.about,
            "records": self.count,
            "listing": listing,
        }
        self.fingerprint = hashlib.sha256(to_json(notes)).hexdigest()[:16]
        # shard -> its entry in `index.json` and its skipped records, once it is known to be whole
        self._finished: dict[int, tuple[dict, list[dict[str, str]]]] = {}
        self._claim_folder(notes)

    def records_of(self, number: int) -> range:
        """The positions of the records of a shard."""
        return range(number * self.samples_per_shard, min((number + 1) * self.samples_per_shard, self.count))

    def unfinished(self, numbers: Iterable[int]) -> list[int]:
        """Those of some shards that are not whole."""
        unknown = [number for number in numbers if number not in self._finished]
        self._finished |= finished_shards(self.place, unknown, self.fingerprint)
        return [number for number in numbers if number not in self._finished]

    def is_finished(self, number: int) -> bool:
        """Whether a shard is whole by now."""
        found = finished_shard(self.place, number, self.fingerprint)
        if found is not None:
            self._finished[number] = found
        return found is not None

    def parts(self, numbers: list[int]) -> Iterator[tuple[int, Iterator[ImageRecord]]]:
        """The number and the records of each of these shards, which are in order."""
        if self._records.part is None:
            yield from wanted_parts(self._records, self.samples_per_shard, set(numbers))
            return
        for number, following in zip_longest(numbers, numbers[1:]):
            ahead = range(0) if following is None else self.records_of(following)
            yield number, self._records.part(self.records_of(number), ahead)

    def write_shard(
        self,
        number: int,
        records: Iterator[ImageRecord],
        pool: ThreadPoolExecutor,
        decoder: ThreadPoolExecutor,
        bar: tqdm,
    ) -> list[Sample]:
        """Label the records of one shard, write the shard, and return its first samples."""
        first: list[Sample] = []
        costs = self.costs
        shard = OpenShard(self.place, number)
        try:
            skipped: list[dict[str, str]] = []
            for batch, decoded in self._decoded_batches(records, pool, decoder, skipped, bar):
                labels = self.labeller.label(decoded)
                for sample in map(self._sample, batch, labels):
                    with costs.measure(PACK):
                        members = sample.jpeg, to_json(sample.meta), pack_labels(sample.labels)
                    with costs.measure(WRITE):
                        shard.append(sample.key, members, sample.labels)
                    if len(first) < _PREVIEW_SAMPLES:
                        first.append(sample)
                bar.update(len(batch))
                speeds = (f"{name} {speed:.3g}/s" for name, speed in self.labeller.speeds().items())
                bar.set_postfix_str(", ".join(speeds), refresh=False)
            costs.bytes_written += shard.size
            # before the shard is whole, so that the figures of a finished job hold each of its shards
            costs.save()
            with costs.measure(WRITE):
                self._finished[number] = shard.finish(self.fingerprint, skipped), skipped
        except BaseException:
            shard.abandon()
            raise
        return first

    def report(self) -> LabelReport:
        """The report of the shards that are whole."""
        missing = self.unfinished(range(self.num_shards))
        report = LabelReport(records=self.count, others=self.others, shards_missing=len(missing))
        for number in sorted(self._finished):
            entry, skipped = self._finished[number]
            report.labelled += entry["count"]
            report.skipped += skipped
        return report

    def finish(self, report: LabelReport) -> None:
        """Write the index and the report of a job of which every shard is whole."""
        if report.labelled + len(report.skipped) != report.records:
            raise MachineError(
                f"{report.records} records became {report.labelled} samples and {len(report.skipped)} skipped; "
                f"this is a bug of the labelling job, keep {self.place} and report it"
            )
        entries = [self._finished[number][0] for number in range(self.num_shards)]
        write_index(self.place, entries, self.classes, self.source, self.about)
        text = {
            "records": report.records,
            "labelled": report.labelled,
            "skipped": report.skipped,
            "others": report.others,
            "costs": total_costs(self.place),
        }
        write_file(self.place, REPORT_FILE, _indented(text))

    def draw_preview(self, number: int, samples: list[Sample]) -> None:
        """Write the contact sheet of a shard."""
        # imported here, because it needs matplotlib and fonts
        from prismer.dataloading.views.contact_sheet import contact_sheet

        file = io.BytesIO()
        contact_sheet(samples, self.classes).save(file, "JPEG", quality=90)
        write_file(self.place, f"preview/shard-{number:06d}.jpg", file.getvalue())

    def _claim_folder(self, notes: dict) -> None:
        """Write the job's notes into a new folder, or compare them with those of the job that began it."""
        held = list_files(self.place)
        if JOB_FILE not in held:
            if any(name.startswith("shard-") or name == "index.json" for name in held):
                raise InputError(f"{self.place} holds a dataset that no labelling job began; choose another folder")
            write_file(self.place, JOB_FILE, _indented(notes))
        before = parse_json(read_file(self.place, JOB_FILE), inside(self.place, JOB_FILE), "choose another folder")
        if before == notes:
            return
        if not isinstance(before, dict):
            raise InputError(f"{inside(self.place, JOB_FILE)} holds no object; choose another folder")
        changed = [name for name in notes if before.get(name) != notes[name]]
        if "listing" in changed:
            raise InputError(
                f"{self.place} was begun with {before.get('records')} records, the source now lists {self.count} "
                f"(or others); label the new ones into another folder"
            )
        raise InputError(
            f"{self.place} was begun with other {', '.join(changed)}; give the same options or choose another folder"
        )

    def _decoded_batches(
        self,
        records: Iterator[ImageRecord],
        pool: ThreadPoolExecutor,
        decoder: ThreadPoolExecutor,
        skipped: list[dict[str, str]],
        bar: tqdm,
    ) -> Iterator[tuple[list[_ReadRecord], DecodedBatch]]:
        """Batches of readable records with their pixels. While one is labelled, the next is read and decoded."""

        def skip(record: ImageRecord, reason: str) -> None:
            skipped.append(skipped_entry(record, reason))
            bar.update()

        def batches() -> Iterator[list[_ReadRecord]]:
            batch: list[_ReadRecord] = []
            for record, future in submit_ahead(pool, self._read, records, 2 * self.labeller.batch_size):
                try:
                    batch.append(future.result())
                except ValueError as error:
                    skip(record, str(error))
                if len(batch) == self.labeller.batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch

        def decode(batch: list[_ReadRecord]) -> tuple[list[_ReadRecord], DecodedBatch, list[tuple[ImageRecord, str]]]:
            faults = []
            while batch:
                try:
                    return batch, self.labeller.decode([read.jpeg for read in batch]), faults
                except UndecodableImages as error:
                    faults += [(batch[i].record, why) for i, why in sorted(error.reasons.items())]
                    batch = [read for i, read in enumerate(batch) if i not in error.reasons]
            return [], {}, faults

        # one batch ahead: the next one is decoded while the caller labels this one
        for _, future in submit_ahead(decoder, decode, batches(), 1):
            batch, decoded, faults = future.result()
            for record, reason in faults:
                skip(record, reason)
            if batch:
                yield batch, decoded

    def _read(self, record: ImageRecord) -> _ReadRecord:
        """Read the image and the maps of a record. Threads call it.

        Raises:
            ValueError: with the reason, if the record cannot be labelled.
        """
        if record.fault:
            raise InputError(record.fault)
        if self.repeated.get(record.key, record.image) != record.image:
            raise InputError(f"another image has the key {record.key} too; rename one")
        try:
            with self.costs.measure(READ):
                jpeg, planes, meta = _content(record)
                self.costs.add_bytes(len(jpeg))
                jpeg, size, _ = to_jpeg(jpeg, whole=False)
        except (OSError, EOFError, MemoryError) as error:
            reason = error or "it does not fit into memory"
            raise InputError(f"it cannot be read ({reason})") from None
        # the tables and boxes of the maps that the job replaces are not used
        meta = {name: value for name, value in meta.items() if _EXPERT_OF_TABLE.get(name) not in self.experts}
        if isinstance(boxes := meta.get("boxes"), dict):
            meta["boxes"] = {name: found for name, found in boxes.items() if name not in self.experts}
        check_meta(meta, self.classes)
        to_json(meta)
        side = self.labeller.label_size
        planes = {name: resize_nearest(plane, side, side) for name, plane in planes.items() if name not in self.experts}
        return _ReadRecord(record, meta, jpeg, size, planes)

    def _sample(self, read: _ReadRecord, labels: ExpertLabels) -> Sample:
        notes = {"size": list(read.size), "source": self.source, "licence": self.licence}
        # the record's own source and licence take precedence over those of the job
        meta = {**notes, **read.meta, **labels.meta, "size": list(read.size)}
        boxes = {**read.meta.get("boxes", {}), **labels.meta.get("boxes", {})}
        if boxes:
            meta["boxes"] = boxes
        else:
            meta.pop("boxes", None)
        return Sample(read.record.key, read.jpeg, {**read.planes, **labels.planes}, meta)


def _indented(value: dict) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _content(record: ImageRecord) -> tuple[bytes, dict[str, np.ndarray], dict]:
    """The encoded image, the maps and the JSON of a record."""
    if isinstance(record.image, StoredImage):
        sample = record.image.sample()
        return sample.jpeg, sample.labels, sample.meta
    return record.image.read(), unpack_labels(record.packed.read()) if record.packed else {}, record.meta


def _scan_keys(records: ImageRecords) -> tuple[int, str, dict[str, FilePart | None]]:
    """The number of records, a digest of their keys in order, and the first image of each repeated key."""
    outlines = records.outlines or records.iterate
    digest, hashes = hashlib.sha256(), array("Q")
    for record in outlines():
        key = record.key.encode()
        digest.update(key + b"\n")
        # eight bytes for each key, because ten million keys would take a gigabyte
        hashes.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
    values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    first: dict[str, FilePart | None] = {}
    if suspects:
        for record, value in zip(outlines(), hashes, strict=True):
            if value in suspects:
                first.setdefault(record.key, record.image)
    return len(hashes), digest.hexdigest()[:16], first
