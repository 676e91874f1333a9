"""Read every byte of a dataset folder and list its problems by shard and key."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from prismer.dataloading.store.index import SHARD_FILE
from prismer.dataloading.store.native_ops import values_in_use
from prismer.dataloading.store.sample_json import meta_problems
from prismer.dataloading.store.sample_table import TABLE_FILE, pack_block, read_sidecar, table_of_shard
from prismer.dataloading.store.shard_files import ShardFiles
from prismer.dataloading.store.shards import CorruptSample, Sample, ShardDataset
from prismer.experts import BACKGROUND, EXPERTS


@dataclass(frozen=True)
class Problem:
    """One problem of a dataset.

    Attributes:
        shard: file name of the tar, "" if the problem is the folder's.
        key: the sample, "" if the problem is the shard's.
        text: what is wrong, and what to do.
    """

    shard: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.text) if part)


@dataclass
class Report:
    """The result of `check_dataset`.

    Attributes:
        place: of the dataset.
        samples: number of samples by the index.
        counts: number of captions, questions, answers, objects, words and maps per expert, in samples without a
            problem.
        problems: all of them, in the order of the shards.
    """

    place: str
    samples: int = 0
    counts: Counter = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def lines(self) -> list[str]:
        """The report as text: one line of counts, one per problem, one verdict."""
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        verdict = "no problems" if self.ok else f"problems: {len(self.problems)}"
        return [
            f"{self.place}: {self.samples} samples" + (f" ({counted})" if counted else ""),
            *(str(problem) for problem in self.problems),
            verdict,
        ]


def check_dataset(place: str | Path, progress: bool = True, workers: int = 4) -> Report:
    """Read and check a whole dataset; no problem hides another one.

    Checks the index files, the checksum of each shard and member, that every JPEG decodes, the sizes of the label maps,
    ids against class, object and word tables, texts, and that keys are unique. Memory beyond the report: 8 bytes per
    sample.

    Args:
        place: of a dataset.
        progress: show a bar with the time left.
        workers: threads that decode.

    Returns:
        A Report; damaged data raise nothing.
    """
    report = Report(str(place))
    try:
        dataset = ShardDataset(place)
    except ValueError as error:
        report.problems.append(Problem("", "", str(error)))
        return report
    report.samples = len(dataset)
    report.problems += _stray_files(dataset)
    repeated = _repeated_keys(dataset)
    bar = tqdm(total=len(dataset), desc="checking", unit="sample", disable=not progress)
    with bar, ThreadPoolExecutor(workers) as pool:
        for number, shard in enumerate(dataset.shards):
            indices = range(dataset.starts[number], dataset.starts[number + 1])
            faults, is_readable = _shard_faults(dataset, number)
            report.problems += [Problem(shard, "", fault) for fault in faults]
            for key, first in repeated.get(number, []):
                report.problems.append(Problem(shard, key, f"the key is also in {first}; rename one"))
            if not is_readable:
                bar.update(len(indices))
                continue
            for problems, counts in pool.map(lambda i: _check_sample(dataset, i), indices):
                report.problems += problems
                report.counts.update(counts)
                bar.update()
    return report


def sample_problems(sample: Sample, classes: dict[str, list[str]]) -> list[str]:
    """The problems of a readable sample, one sentence each; [] if there are none.

    Args:
        sample: from a ShardDataset.
        classes: the class tables of its dataset.
    """
    texts = meta_problems(sample.meta, classes)
    return [*_image_problems(sample), *_label_problems(sample, classes), *texts]


def _check_sample(dataset: ShardDataset, i: int) -> tuple[list[Problem], Counter]:
    shard = dataset.shards[dataset.shard_of(i)]
    try:
        sample = dataset[i]
    except CorruptSample as error:
        return [Problem(shard, error.key, error.reason)], Counter()
    problems = [Problem(shard, sample.key, text) for text in sample_problems(sample, dataset.classes)]
    return problems, Counter() if problems else _counts(sample)


def _image_problems(sample: Sample) -> Iterator[str]:
    try:
        with Image.open(io.BytesIO(sample.jpeg)) as image:
            image.load()
    except UnidentifiedImageError:
        yield "the image is in no known format or damaged at its start"
        return
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        yield f"the image does not decode ({error})"
        return
    if (image.format, image.mode) != ("JPEG", "RGB"):
        yield f"the image is {image.format} {image.mode}; expected an RGB JPEG"
    size = [image.height, image.width]
    stored = sample.meta.get("size", size)
    if stored != size and isinstance(stored, list):
        yield f"the image is {size} (height, width), its json says {stored}"


def _repeated_keys(dataset: ShardDataset) -> dict[int, list[tuple[str, str]]]:
    """Shard -> its keys that an earlier sample has too, each with the tar of that sample."""
    hashes, count = np.empty(len(dataset), np.int64), 0
    for number in range(len(dataset.shards)):
        keys = _keys_of(dataset, number)
        hashes[count : count + len(keys)] = np.fromiter(map(hash, keys), np.int64, len(keys))
        count += len(keys)
    # sorted in place: ten million keys take 80 MB
    hashes = hashes[:count]
    hashes.sort()
    candidates = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    found: dict[int, list[tuple[str, str]]] = {}
    if candidates:
        tars: dict[bytes, str] = {}
        for number, shard in enumerate(dataset.shards):
            for key in _keys_of(dataset, number):
                # two keys may share a hash
                if hash(key) not in candidates:
                    continue
                if key in tars:
                    found.setdefault(number, []).append((key.decode("ascii", "replace"), tars[key]))
                tars.setdefault(key, shard)
    return found


def _keys_of(dataset: ShardDataset, number: int) -> list[bytes]:
    if dataset.table.has_block(number):
        return dataset.table.keys(number)
    try:
        return table_of_shard(dataset.files, dataset.entries[number]).keys(0)
    except CorruptSample:
        # the shard's fault is listed with its other ones
        return []


def _shard_faults(dataset: ShardDataset, number: int) -> tuple[list[str], bool]:
    """What is wrong with the files of a shard, and whether its samples can be read."""
    entry, faults = dataset.entries[number], []
    try:
        fault = _tar_fault(dataset.files, entry)
        has_tar = True
    except OSError as error:
        fault, has_tar = f"the file cannot be read ({error.strerror}); copy it again", False
    faults += [fault] if fault else []
    try:
        block = pack_block(read_sidecar(dataset.files, entry))
        has_index = True
        if block != dataset.table.block(number):
            faults.append(
                f"{TABLE_FILE} differs from its index file; give the command: prismer data index {dataset.place}"
            )
    except CorruptSample as error:
        faults.append(error.reason)
        # the table has what the index file said
        has_index = dataset.table.has_block(number)
    return faults, has_tar and has_index


def _tar_fault(files: ShardFiles, entry: dict) -> str | None:
    digest, size = hashlib.sha256(), 0
    with files.open_shard(entry) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    if size != entry["size"]:
        return f"the file has {size} bytes, the index says {entry['size']}; copy it again"
    if digest.hexdigest() != entry["sha256"]:
        return "the file fails its checksum; copy it again"
    return None


def _stray_files(dataset: ShardDataset) -> Iterator[Problem]:
    if dataset.is_remote:
        return
    listed = {name.removesuffix(".tar") for name in dataset.shards}
    for path in sorted(dataset.folder.iterdir()):
        match = SHARD_FILE.fullmatch(path.name)
        if match and (match[3] or f"shard-{match[1]}" not in listed):
            yield Problem("", "", f"{path.name} belongs to no shard of the index; remove it or resume its job")


def _label_problems(sample: Sample, classes: dict[str, list[str]]) -> Iterator[str]:
    sides = {name: plane.shape[:2] for name, plane in sample.labels.items()}
    if len(set(sides.values())) > 1:
        listed = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sides.items())
        yield f"the label maps have different sizes ({listed}); store all at one size"
    for name, (height, width) in sides.items():
        if height != width:
            yield f"the {name} map is {height} x {width}; store a square"
    known = {
        name: set(map(str, range(len(classes.get(name, [])))))
        if expert.kind == "class"
        else _ids_of(sample.meta.get(expert.table))
        for name, expert in EXPERTS.items()
        if expert.is_ids
    }
    for name, ids in known.items():
        if name in sample.labels:
            used = set(values_in_use(sample.labels[name])) - {BACKGROUND}
            unknown = {i for i in used if str(i) not in ids}
            if unknown:
                yield (
                    f"the {name} map holds {len(unknown)} ids that are not in its table of {len(ids)} entries "
                    f"({min(unknown)} is the first)"
                )


def _ids_of(table: object) -> set[str]:
    return set(table) if isinstance(table, dict) else set()


def _counts(sample: Sample) -> Counter:
    meta = sample.meta
    questions = meta.get("questions", [])
    counts = Counter(
        captions=len(meta.get("captions", [])),
        questions=len(questions),
        answers=sum(len(question.get("answers", [])) for question in questions),
        objects=len(meta.get("instances", {})),
        words=len(meta.get("words", {})),
    )
    counts.update({f"{name} maps": int(name in sample.labels) for name in EXPERTS})
    return counts
