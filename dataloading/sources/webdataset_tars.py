"""WebDataset tars -> records, from img2dataset, from other tools or from this library's writer.

Members of one name form a sample, wherever they lie in a tar (some tools sort by suffix). The name ends at its first
dot, as in WebDataset; if that leaves no image, at its last (`photo.v2.jpg`). Only the image, .txt, .json and .labels
of a sample are read; every other member is counted in `ImageRecords.others`.
"""

import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from prismer.dataloading.sources.image_folders import IMAGE_SUFFIXES, MAX_TEXT, read_meta
from prismer.dataloading.sources.records import FilePart, IgnoredFile, ImageRecord, ImageRecords, safe_key
from prismer.dataloading.store.index import SHARD_FILE, is_key
from prismer.errors import InputError
from prismer.reading import open_regular, parse_json, printable

_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_READ = ("txt", "json", "labels")
_DATASET_FILES = (
    *("index.json", "index.bin", "job.json", "report.json", "import-report.json", "preview", "costs"),
    *(".writer.lock", ".labelling.lock"),
)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".zip")


@dataclass
class _Tar:
    """The content of one tar.

    Attributes:
        samples: name -> ending -> member.
        faults: members that cannot be used, and why.
        unread: description of members that are not read -> their number.
        damage: what is wrong with the tar itself; "" if it is whole.
    """

    samples: dict[str, dict[str, FilePart]] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    unread: Counter = field(default_factory=Counter)
    damage: str = ""


def tar_records(folder: str | Path) -> ImageRecords:
    """An uncompressed WebDataset tar or a folder of them: images with .txt or .json, or shards of this library.

    Samples of shards keep their keys, texts and labels: importing a dataset that lost its index, with its class tables,
    rebuilds it. Folders inside `folder` are not searched.

    Raises:
        ValueError: if there is no tar.
        OSError: if `folder` may not be read.
    """
    tars, others = [], []
    source = Path(folder)
    for path in [source] if source.is_file() else sorted(source.iterdir()):
        if path.name.lower().endswith(".tar") and not path.name.startswith("."):
            tars.append(path)
        elif path.name not in _DATASET_FILES and not SHARD_FILE.fullmatch(path.name):
            others.append(_ignored(path))
    if not tars:
        packed = [other.file for other in others if other.reason.startswith("compressed")]
        hint = f"; {packed[0]} is compressed, unpack it to a .tar" if packed else ""
        raise InputError(f"{folder} holds no .tar files; name the folder of the shards{hint}")
    # position of the first record of each tar, and the number of all
    starts = [0]
    for path in tars:
        tar = _read_tar(path)
        starts.append(starts[-1] + len(tar.samples) + len(tar.faults) + bool(tar.damage))
        for which, number in sorted(tar.unread.items()):
            reason = f"{number} members {printable(which)}, which are not read"
            others.append(IgnoredFile(printable(str(path)), reason))

    def outlines() -> Iterator[ImageRecord]:
        for path in tars:
            for record, _ in _outlines_of(path):
                yield record

    def part(here: range, ahead: range) -> Iterator[ImageRecord]:
        for path, start, end in zip(tars, starts, starts[1:], strict=False):
            if max(start, here.start) < min(end, here.stop):
                inside = islice(_outlines_of(path), max(here.start - start, 0), here.stop - start)
                yield from (_with_texts(record, members) for record, members in inside)

    return ImageRecords(
        starts[-1], lambda: part(range(starts[-1]), range(0)), others=others, part=part, outlines=outlines
    )


def other_files(folder: Path, shards: Collection[str]) -> list[IgnoredFile]:
    """What the folder of a dataset holds besides the shards of this name and the files that this library writes."""
    own, others = set(shards), []
    for path in sorted(folder.iterdir()):
        shard = SHARD_FILE.fullmatch(path.name)
        if shard and f"shard-{shard[1]}.tar" not in own:
            others.append(IgnoredFile(printable(str(path)), "not in index.json; it belongs to no finished dataset"))
        elif not shard and path.name not in _DATASET_FILES:
            others.append(_ignored(path))
    return others


def _ignored(path: Path) -> IgnoredFile:
    reason = "not a tar; the tars of one folder are read"
    if path.name.lower().endswith(_COMPRESSED):
        reason = "compressed; unpack it to a .tar to import it"
    return IgnoredFile(printable(str(path)), reason)


def _read_tar(path: Path) -> _Tar:
    """Read the headers of a tar; of one that ends too early, those before its end."""
    tar, seen = _Tar(), set()
    groups: dict[str, dict[str, FilePart]] = {}
    try:
        with open_regular(path) as raw, tarfile.open(fileobj=raw, mode="r:") as file:
            for member in file:
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                if not member.isdir():
                    _sort_in(member, path, groups, seen, tar)
            # tarfile mistakes a damaged header for the end
            raw.seek(file.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        tar.damage = f"{path.name} is damaged or cut short ({error or type(error).__name__})"
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
            tar.damage = f"{path.name} cannot be read ({error.strerror or error})"
    for key, group in groups.items():
        for name, members in _split(key, group).items():
            tar.samples[name] = members
            images = [ending for ending in _ENDINGS if ending in members]
            tar.faults += [(f"{name}.{x}", "its sample has another image already") for x in images[1:]]
            for ending in members.keys() - {*images, *_READ} if images else ():
                tar.unread[f"ending in .{ending}"] += 1
    return tar


def _sort_in(
    member: tarfile.TarInfo, path: Path, groups: dict[str, dict[str, FilePart]], seen: set[str], tar: _Tar
) -> None:
    """Put a member into the group of its name, or note why it cannot be used."""
    name = member.name
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    # in photo.V2.JPG only the last part is a suffix
    inner, dot, last = ending.rpartition(".")
    ending, key = f"{inner}{dot}{last.lower()}", f"{folder}/{stem}" if folder else stem
    if not member.isreg() or member.sparse is not None:
        tar.faults.append((name, "it is a link or not a plain file; store the file itself in the tar"))
    elif not stem:
        tar.unread["that are hidden files"] += 1
    elif name in seen or ending in groups.get(key, ()):
        tar.faults.append((name, f"{path.name} holds an earlier member of this name, which is used"))
    else:
        seen.add(name)
        groups.setdefault(key, {})[ending] = FilePart(path, member.offset_data, member.size)


def _split(key: str, group: dict[str, FilePart]) -> dict[str, dict[str, FilePart]]:
    """A group as one sample; if it has no image, as the samples whose names end at their last dot."""
    suffixes = {ending.rpartition(".")[2] for ending in group}
    if any(ending in group for ending in _ENDINGS) or suffixes.isdisjoint(_ENDINGS):
        return {key: group}
    samples: dict[str, dict[str, FilePart]] = {}
    for ending, source in group.items():
        inner, dot, last = ending.rpartition(".")
        samples.setdefault(f"{key}{dot}{inner}", {})[last] = source
    return samples


def _outlines_of(path: Path) -> Iterator[tuple[ImageRecord, dict[str, FilePart]]]:
    """The records of a tar without their texts, each with the members of its sample; only headers are read."""
    tar = _read_tar(path)
    for name, members in tar.samples.items():
        image = next((members[ending] for ending in _ENDINGS if ending in members), None)
        packed = members.get("labels")
        # other tools number each tar from zero; keys of this library are unique, and stay
        key = name if packed and is_key(name) else safe_key(f"{path.stem}/{name}")
        shown = f"{path}/{name}"
        if image is None:
            yield ImageRecord(key, None, fault=f"no image in {path.name}", name=shown), members
        else:
            yield ImageRecord(key, image, packed=packed, name=shown), members
    for number, (name, why) in enumerate(tar.faults):
        # the number keeps this key apart from those of samples
        yield ImageRecord(safe_key(f"{path.stem}/{name} {number}"), None, fault=f"{name}: {why}"), {}
    if tar.damage:
        yield ImageRecord(safe_key(f"{path.stem}/the rest of {path.name}"), None, fault=tar.damage), {}


def _with_texts(record: ImageRecord, members: dict[str, FilePart]) -> ImageRecord:
    """A record with the texts of its sample."""
    if record.image is None:
        return record
    try:
        text, notes = (members[end].read(MAX_TEXT) if end in members else None for end in ("txt", "json"))
        # the JSON of a shard is kept as it is
        meta = _sample_json(notes) if record.packed and notes is not None else read_meta(text, notes)
        return replace(record, meta=meta)
    except (ValueError, OSError, EOFError) as error:
        return replace(record, packed=None, fault=str(error))


def _sample_json(notes: bytes) -> dict:
    meta = parse_json(notes, "its json")
    if not isinstance(meta, dict):
        raise InputError("its json is not an object")
    return meta
