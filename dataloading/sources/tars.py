"""WebDataset tars -> Records, from img2dataset, other people's tools or our own writer.

Members of one name belong together wherever they lie in a tar (some tools sort by suffix). The name ends at its first
dot, as WebDataset has it; where that leaves no image, at its last (`photo.v2.jpg`). What is read of a sample are its
image, .txt, .json and .labels; every other member is counted in `Records.others`.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prismer.dataloading.sources.folders import IMAGE_SUFFIXES, MAX_TEXT, texts_of
from prismer.dataloading.sources.record import Other, Record, Records, Source, safe_key
from prismer.dataloading.store.index import SHARD_FILE, is_key
from prismer.reading import open_regular, parse_json, printable

_ENDINGS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_READ = ("txt", "json", "labels")
_OUR_FILES = ("index.json", "job.json", "report.json", "import-report.json", "preview", ".writer.lock")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".zip")


@dataclass
class _Tar:
    """What one tar holds.

    Attributes:
        samples: name -> ending -> where the member lies.
        faults: members that cannot be used, and why.
        unread: which members nobody reads -> their number.
        damage: what is wrong with the tar itself, "" if nothing.
    """

    samples: dict[str, dict[str, Source]] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    unread: Counter = field(default_factory=Counter)
    damage: str = ""


def tar_records(folder: str | Path) -> Records:
    """A folder of uncompressed WebDataset tars: images with .txt or .json, from img2dataset or our own writer.

    A tar of ours keeps its keys, texts and labels: a dataset whose index is lost is rebuilt by importing it with its
    class tables. Folders inside `folder` are not searched.

    Raises:
        ValueError: if there is no tar.
        OSError: if `folder` may not be read.
    """
    tars, others = [], []
    for path in sorted(Path(folder).iterdir()):
        if path.name.lower().endswith(".tar") and not path.name.startswith("."):
            tars.append(path)
        elif path.name not in _OUR_FILES and not SHARD_FILE.fullmatch(path.name):
            reason = "not a tar; the tars of one folder are read"
            if path.name.lower().endswith(_COMPRESSED):
                reason = "compressed; unpack it to a .tar to import it"
            others.append(Other(printable(str(path)), reason))
    if not tars:
        packed = [other.file for other in others if other.reason.startswith("compressed")]
        hint = f"; {packed[0]} is compressed, unpack it to a .tar" if packed else ""
        raise ValueError(f"{folder} holds no .tar files; name the folder of the shards{hint}")
    count = 0
    for path in tars:
        tar = _read_tar(path)
        count += len(tar.samples) + len(tar.faults) + bool(tar.damage)
        for which, number in sorted(tar.unread.items()):
            reason = f"{number} members {printable(which)}, which are not read"
            others.append(Other(printable(str(path)), reason))

    def iterate() -> Iterator[Record]:
        for path in tars:
            yield from _records_of(path)

    return Records(count, iterate, others=others)


def _read_tar(path: Path) -> _Tar:
    """The headers of a tar; one that ends too early gives what lies before and its damage."""
    tar, seen = _Tar(), set()
    groups: dict[str, dict[str, Source]] = {}
    try:
        with open_regular(path) as raw, tarfile.open(fileobj=raw, mode="r:") as file:
            for member in file:
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                if not member.isdir():
                    _sort_in(member, path, groups, seen, tar)
            # tarfile takes a damaged header for the end
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
    member: tarfile.TarInfo, path: Path, groups: dict[str, dict[str, Source]], seen: set[str], tar: _Tar
) -> None:
    """Put a member into the group of its name, or say why not."""
    name = member.name
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    # of photo.V2.JPG the last part alone is a suffix
    inner, dot, last = ending.rpartition(".")
    ending, key = f"{inner}{dot}{last.lower()}", f"{folder}/{stem}" if folder else stem
    if not member.isreg() or member.sparse is not None:
        tar.faults.append((name, "it is a link or no plain file; store the file itself in the tar"))
    elif not stem:
        tar.unread["that are hidden files"] += 1
    elif name in seen or ending in groups.get(key, ()):
        tar.faults.append((name, f"{path.name} holds a member of this name already, which is used"))
    else:
        seen.add(name)
        groups.setdefault(key, {})[ending] = Source(path, member.offset_data, member.size)


def _split(key: str, group: dict[str, Source]) -> dict[str, dict[str, Source]]:
    """A group as one sample; where names end at their first dot without an image, as those that end at their last."""
    suffixes = {ending.rpartition(".")[2] for ending in group}
    if any(ending in group for ending in _ENDINGS) or suffixes.isdisjoint(_ENDINGS):
        return {key: group}
    samples: dict[str, dict[str, Source]] = {}
    for ending, source in group.items():
        inner, dot, last = ending.rpartition(".")
        samples.setdefault(f"{key}{dot}{inner}", {})[last] = source
    return samples


def _records_of(path: Path) -> Iterator[Record]:
    tar = _read_tar(path)
    for name, members in tar.samples.items():
        image = next((members[ending] for ending in _ENDINGS if ending in members), None)
        packed = members.get("labels")
        # keys of foreign tars may start afresh in each of them; ours are unique and stay
        key = name if packed and is_key(name) else safe_key(f"{path.stem}/{name}")
        shown = f"{path}/{name}"
        if image is None:
            yield Record(key, None, fault=f"no image in {path.name}", name=shown)
            continue
        try:
            text, notes = (members[end].read(MAX_TEXT) if end in members else None for end in ("txt", "json"))
            # what we wrote ourselves is kept as it is
            meta = _ours(notes) if packed and notes is not None else texts_of(text, notes)
            yield Record(key, image, meta, packed=packed, name=shown)
        except (ValueError, OSError, EOFError) as error:
            yield Record(key, image, fault=str(error), name=shown)
    for number, (name, why) in enumerate(tar.faults):
        # a key that no sample has
        yield Record(safe_key(f"{path.stem}/{name} {number}"), None, fault=f"{name}: {why}")
    if tar.damage:
        yield Record(safe_key(f"{path.stem}/the rest of {path.name}"), None, fault=tar.damage)


def _ours(notes: bytes) -> dict:
    meta = parse_json(notes, "its json")
    if not isinstance(meta, dict):
        raise ValueError("its json is not an object")
    return meta
