"""The index files of a dataset folder, and the checks that the writer and the reader share.

`shard-000000.index.json` (the sidecar of one tar) gives the offset, size and crc32 of each member of each sample.
`index.json` lists the shards with their counts and checksums, the class tables and the writer's notes.
"""

import hashlib
import json
import re
from dataclasses import dataclass

import numpy as np

from prismer.errors import InputError
from prismer.experts import BACKGROUND, EXPERTS
from prismer.reading import parse_json

FORMAT = "prismer-shards"
VERSION = 1
# the files of a sample, in the order in which they lie in the tar
MEMBERS = ("jpg", "json", "labels")
# longest key: the classic tar header has 100 bytes for a name
MAX_KEY = 90
# two kinds of label maps, and the images of a dataset for classification
CLASS_TABLES = (*(name for name, expert in EXPERTS.items() if expert.has_classes), "class")
# the files that a writer makes, and may remove, besides index.json
SHARD_FILE = re.compile(r"shard-(\d{6})\.(tar|index\.json)(\.partial)?")

_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Sample:
    """One image with everything known about it.

    Attributes:
        key: its name in the dataset, [A-Za-z0-9_-]+ (a dot would split it in WebDataset readers).
        jpeg: the encoded image, RGB.
        labels: expert -> uint8 map, see label_maps.py; an expert without a map is not in the dict.
        meta: the sample's JSON, see sample_json.py.
    """

    key: str
    jpeg: bytes
    labels: dict[str, np.ndarray]
    meta: dict


class CorruptSample(InputError):
    """A sample that cannot be read.

    Attributes:
        shard, key: its name; key "" if unknown.
        reason: why.
    """

    def __init__(self, shard: str, key: str, reason: str):
        # with all three arguments the exception can be pickled, and so leave a worker process
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{f'sample {self.key} of ' if self.key else ''}{self.shard} cannot be read: {self.reason}"


class Sidecar:
    """A parsed and checked `shard-NNNNNN.index.json`.

    Args:
        data: its bytes.
        name: its file name.

    Attributes:
        shard: file name of the tar.
        size: of the tar, bytes.
        fingerprint: of the settings that the samples were made with.
        skipped: what the job that wrote the shard left out.
        keys: of the samples, in order.
        members: (samples, members, 3) int64: offset, size and crc32; 72 kB for 1000 samples.
        entry: what `index.json` notes about the shard.

    Raises:
        CorruptSample: if it is damaged, or belongs to another shard.
    """

    def __init__(self, data: bytes, name: str):
        shard = name.replace(".index.json", ".tar")
        try:
            fields = parse_json(data, "it", "copy it again")
            if fields["format"] != FORMAT or fields["version"] != VERSION or fields["shard"] != shard:
                raise InputError("another format, version or shard")
            self.shard, self.size, self.fingerprint = shard, int(fields["size"]), fields["fingerprint"]
            self.skipped: list[dict[str, str]] = fields.get("skipped", [])
            self.keys: list[str] = fields["keys"]
            self.members = np.array(fields["members"], dtype=np.int64).reshape(len(self.keys), len(MEMBERS), 3)
            ends = self.members[..., 0] + self.members[..., 1]
            if self.members.min(initial=0) < 0 or ends.max(initial=0) > self.size:
                raise InputError("a member lies outside the shard")
            self.entry = {
                "name": shard,
                "count": len(self.keys),
                "size": self.size,
                "sha256": fields["sha256"],
                "index_sha256": hashlib.sha256(data).hexdigest(),
                "experts": fields["experts"],
            }
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CorruptSample(shard, "", f"its {name} is damaged ({error}); write the shard again") from None


def parse_index(data: bytes, name: str) -> dict:
    """The parsed and checked `index.json` of a dataset.

    Args:
        data: its bytes.
        name: its name in errors.

    Raises:
        ValueError: if it is damaged or has an unknown version.
    """
    index = parse_json(data, name, "copy it again or resume the job that writes it")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{name} is not the index of a {FORMAT} dataset; import the data first")
    if index.get("version") != VERSION:
        raise InputError(f"{name} has version {index.get('version')}, this library reads {VERSION}; update the library")
    try:
        check_classes(index["classes"])
        if not all(SHARD_FILE.fullmatch(entry["name"]) for entry in index["shards"]):
            raise InputError("a shard has a name that this library does not give")
        if sum(entry["count"] for entry in index["shards"]) != index["count"]:
            raise InputError(f"the counts of the shards do not add up to {index['count']}")
        missing = {"source", "experts", "about"} - set(index)
        for entry in index["shards"]:
            missing |= {"size", "sha256", "index_sha256"} - set(entry)
        if missing:
            raise InputError(f"{', '.join(sorted(missing))} is missing")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{name} is damaged ({error}); copy it again") from None
    return index


def is_key(name: str) -> bool:
    """Whether tar and WebDataset readers give this key back unchanged."""
    return bool(_KEY.fullmatch(name)) and len(name) <= MAX_KEY


def check_classes(classes: dict[str, list[str]]) -> None:
    """Refuse class tables whose ids the maps could not hold.

    Raises:
        ValueError: if a table is not in CLASS_TABLES or not a list of names, or "seg" has more than 255 names.
    """
    for expert, names in classes.items():
        if expert not in CLASS_TABLES:
            raise InputError(f"there is a class table for {expert!r}; choose from {', '.join(CLASS_TABLES)}")
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"the class table of {expert} must be a list of non-empty strings")
        # the ids of such a map are class indices, and 255 is the background
        if expert in EXPERTS and EXPERTS[expert].kind == "class" and len(names) > BACKGROUND:
            raise InputError(f"the class table of {expert} has {len(names)} names; a uint8 map holds at most 255")


def to_json(value: object) -> bytes:
    """Compact UTF-8 JSON; equal values give equal bytes.

    Raises:
        ValueError: if a value is not JSON (NaN is not), is nested too deeply, or UTF-8 cannot hold a text.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise InputError(f"{error}; give numbers, strings, lists and dicts with string keys") from None
    except UnicodeEncodeError as error:
        part = ascii(error.object[error.start : error.end])
        raise InputError(f"a text holds {part}, which UTF-8 cannot hold; replace it") from None
    except RecursionError:
        raise InputError("a value is nested too deeply to be written as JSON") from None
