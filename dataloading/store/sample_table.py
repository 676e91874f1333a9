"""`index.bin`: where every sample of a dataset lies, in one binary table that is mapped into memory and never parsed.

The table says what the index files of the shards say, and can always be made again from them. Numbers are
little-endian. It holds

* 8 bytes, MAGIC;
* a block per shard: four zero bytes; a record of 36 bytes per sample; the keys, each between two line ends. A block
  without bytes belongs to a shard whose index file could not be read;
* the place of each block and of their end, 8 bytes each;
* the tail: MAGIC, version, shards, samples, the sha256 of the `index.json` that the table belongs to, and the crc32
  of the places and of the tail before it. It lies at the end, so that a table of any size is written in one pass.

A record has nine numbers of 4 bytes: the crc32 of the other eight and of the key; the place of the image in the tar,
in blocks of 512 bytes; the sizes of the three members; their crc32; the end of the key, counted from the start of the
keys. A key begins after the end of the one before it, which lies directly before the record. The members of a sample
follow one another as the tar format has it, so that the place of the first is enough.
"""

import hashlib
import mmap
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from prismer.dataloading.store.index import MEMBERS, CorruptSample, Sidecar, is_key
from prismer.dataloading.store.shard_files import LocalFiles, ShardFiles
from prismer.errors import InputError
from prismer.files import write_together
from prismer.reading import open_regular

TABLE_FILE = "index.bin"
MAGIC = b"PRISMERT"
VERSION = 1

_TAIL = struct.Struct("<8sIIQ32sI")
# the end of the key before, then the record
_RECORD = struct.Struct("<10I")
_RECORD_SIZE = 36
_PREFIX = bytes(4)
_Size = TypeVar("_Size", int, np.ndarray)
# after so many records a process returns the pages of the table, of which each read maps up to 64 kB; they stay in
# the page cache, which all processes share
_READS_BEFORE_RELEASE = 1000


class Row(NamedTuple):
    """What the table says about a sample.

    Attributes:
        key: of the sample.
        members: (offset, size, crc32) of each member, in the order of MEMBERS.
    """

    key: str
    members: list[tuple[int, int, int]]


class SampleTable:
    """The content of `index.bin`.

    Args:
        data: holds the blocks.
        places: block s lies at places[s] .. places[s + 1].
        counts: samples of each shard.
    """

    def __init__(self, data: bytes | bytearray | mmap.mmap, places: Sequence[int], counts: Sequence[int]):
        self._data, self._places, self._counts = data, places, counts
        self._reads = 0

    def has_block(self, shard: int) -> bool:
        """Whether the index file of a shard could be read when the table was made."""
        return self._places[shard] < self._places[shard + 1]

    def row(self, shard: int, row: int) -> Row | None:
        """What the table says about sample `row` of a shard; None if its block is absent or this part is damaged."""
        if not self.has_block(shard):
            return None
        self._count_read()
        begin = self._places[shard]
        record = begin + row * _RECORD_SIZE
        before, check, place, *numbers, key_end = _RECORD.unpack_from(self._data, record)
        keys = begin + len(_PREFIX) + self._counts[shard] * _RECORD_SIZE
        key = self._data[keys + before + 1 : keys + key_end]
        if zlib.crc32(key, zlib.crc32(self._data[record + 8 : record + _RECORD.size])) != check:
            return None
        offset, members = place * BLOCKSIZE, []
        for size, checksum in zip(numbers[: len(MEMBERS)], numbers[len(MEMBERS) :], strict=True):
            members.append((offset, size, checksum))
            offset += _stride(size)
        return Row(key.decode(), members)

    def find(self, shard: int, key: str) -> int | None:
        """The row of a key among the samples of a shard that has a block; None if it is not there."""
        keys = self._keys(shard)
        position = keys.find(b"\n%b\n" % key.encode())
        return None if position < 0 else keys.count(b"\n", 0, position)

    def keys(self, shard: int) -> list[bytes]:
        """The keys of a shard that has a block, as they are stored: a damaged one is given as it is."""
        return self._keys(shard).split(b"\n")[1 : self._counts[shard] + 1]

    def block(self, shard: int) -> bytes:
        """The bytes of a shard's block; b"" if it is absent."""
        self._count_read()
        return self._data[self._places[shard] : self._places[shard + 1]]

    def _keys(self, shard: int) -> bytes:
        self._count_read()
        begin = self._places[shard] + len(_PREFIX) + self._counts[shard] * _RECORD_SIZE
        return self._data[begin : self._places[shard + 1]]

    def _count_read(self) -> None:
        self._reads += 1
        if self._reads % _READS_BEFORE_RELEASE == 0 and isinstance(self._data, mmap.mmap):
            # the file is unchanged, so that another thread finds the same bytes again
            self._data.madvise(mmap.MADV_DONTNEED)


def read_sidecar(files: ShardFiles, entry: dict) -> Sidecar:
    """The index file of a shard.

    Args:
        files: of the dataset.
        entry: the shard's, from `index.json`.

    Raises:
        CorruptSample: if it is absent, damaged or of another shard.
    """
    name = entry["name"].replace(".tar", ".index.json")
    try:
        data = files.read(name)
    except OSError as error:
        reason = f"{name} cannot be read ({error.strerror}); copy it again"
        raise CorruptSample(entry["name"], "", reason) from None
    if hashlib.sha256(data).hexdigest() != entry["index_sha256"]:
        raise CorruptSample(entry["name"], "", f"{name} fails its checksum; copy it again")
    sidecar = Sidecar(data, name)
    if len(sidecar.keys) != entry["count"]:
        reason = f"{name} lists {len(sidecar.keys)} samples, index.json {entry['count']}; copy both again"
        raise CorruptSample(entry["name"], "", reason)
    return sidecar


def pack_block(sidecar: Sidecar) -> bytes:
    """The block of a shard.

    Raises:
        CorruptSample: if a key is malformed, or the members lie elsewhere than a `ShardWriter` puts them.
    """
    for key in sidecar.keys:
        if not is_key(key):
            raise CorruptSample(sidecar.shard, "", f"it has a malformed key, {key!r}; import the shard again")
    places, sizes, checksums = (sidecar.members[..., i] for i in range(3))
    follow = places[:, :1] + np.cumsum(_stride(sizes), axis=1)[:, :-1]
    first = places[:, 0] // BLOCKSIZE
    fits = all(part.max(initial=0) < 1 << 32 for part in (first, sizes, checksums))
    if not fits or (places[:, 0] % BLOCKSIZE).any() or (places[:, 1:] != follow).any():
        raise CorruptSample(sidecar.shard, "", "its members do not follow one another; import the shard again")
    keys = [key.encode() for key in sidecar.keys]
    # a line end before the first key and one after each
    key_ends = np.cumsum([len(key) + 1 for key in keys], dtype=np.int64)
    fields = np.column_stack([first, sizes, checksums, key_ends]).astype("<u4").tobytes()
    records = [fields[i : i + _RECORD_SIZE - 4] for i in range(0, len(fields), _RECORD_SIZE - 4)]
    checked = [
        zlib.crc32(key, zlib.crc32(record)).to_bytes(4, "little") + record
        for key, record in zip(keys, records, strict=True)
    ]
    return b"".join([_PREFIX, *checked, b"\n", *(key + b"\n" for key in keys)])


def load_table(files: ShardFiles, entries: Sequence[dict], index_sha256: str) -> SampleTable:
    """The table of a dataset, mapped into memory; nothing but its last part is read.

    Args:
        files: of the dataset.
        entries: of the shards, from `index.json`.
        index_sha256: of the bytes of `index.json`.

    Raises:
        OSError: if the table cannot be read.
        ValueError: if it is damaged, belongs to another `index.json` or has another version.
    """
    with open_regular(files.local(TABLE_FILE)) as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise InputError("is empty") from None
    size = 8 * (len(entries) + 1) + _TAIL.size
    end = data[-size:]
    magic, version, shards, samples, digest, checksum = _TAIL.unpack(end[-_TAIL.size :].rjust(_TAIL.size, b"\0"))
    if magic != MAGIC:
        raise InputError("is cut short")
    if version != VERSION:
        raise InputError(f"has version {version}, this library reads {VERSION}")
    counts = [entry["count"] for entry in entries]
    if (shards, samples, digest.hex()) != (len(entries), sum(counts), index_sha256):
        raise InputError("belongs to another index.json")
    places = np.frombuffer(end, "<u8", len(entries) + 1).tolist()
    if zlib.crc32(end[:-4]) != checksum or places[-1] + size != len(data):
        raise InputError("is damaged")
    return SampleTable(data, places, counts)


def write_table(files: ShardFiles, path: Path, entries: Sequence[dict], index_sha256: str, progress: bool) -> None:
    """Write the table of a dataset from the index files of its shards; several processes may do so at the same time.

    Args:
        files: of the dataset; `entries`, `index_sha256` as for `load_table`.
        path: the file to write.
        progress: show a bar with the time left.

    Raises:
        CorruptSample: if an index file cannot be used; no table is written then.
        OSError: if the table cannot be written.
    """
    watched = tqdm(entries, TABLE_FILE, unit="shard", disable=not progress)
    blocks = (pack_block(read_sidecar(files, entry)) for entry in watched)
    write_together(path, _pieces(blocks, entries, index_sha256))


def open_table(files: ShardFiles, entries: Sequence[dict], index_sha256: str) -> SampleTable:
    """The table of a dataset; a missing, stale or damaged one is made again, with a warning.

    It is written beside `index.json`, or else kept in memory. A shard whose index file cannot be used has no block.

    Args:
        files, entries, index_sha256: as for `load_table`.
    """
    try:
        return load_table(files, entries, index_sha256)
    except FileNotFoundError:
        what = f"{files.place} has no {TABLE_FILE}"
    except OSError as error:
        what = f"{TABLE_FILE} of {files.place} cannot be read ({error.strerror})"
    except ValueError as error:
        what = f"{TABLE_FILE} of {files.place} {error}"
    warnings.warn(f"{what}; it is made again from the index files of {len(entries)} shards", stacklevel=3)
    pieces = _pieces((_block_if_readable(files, entry) for entry in entries), entries, index_sha256)
    if isinstance(files, LocalFiles):
        try:
            write_together(files.local(TABLE_FILE), pieces)
            return load_table(files, entries, index_sha256)
        except (OSError, InputError) as error:
            why = getattr(error, "strerror", None) or f"it {error}"
            warnings.warn(
                f"{TABLE_FILE} of {files.place} cannot be written ({why}) and is kept in memory", stacklevel=3
            )
    data, places = bytearray(), [0]
    for entry in entries:
        data += _block_if_readable(files, entry)
        places.append(len(data))
    return SampleTable(data, places, [entry["count"] for entry in entries])


def table_of_shard(files: ShardFiles, entry: dict) -> SampleTable:
    """A table of one shard alone, from its index file.

    Raises:
        CorruptSample: if the index file cannot be used.
    """
    block = pack_block(read_sidecar(files, entry))
    return SampleTable(block, [0, len(block)], [entry["count"]])


def _pieces(blocks: Iterator[bytes], entries: Sequence[dict], index_sha256: str) -> Iterator[bytes]:
    """The parts of the file, one after the other."""
    yield MAGIC
    places = [len(MAGIC)]
    for block in blocks:
        yield block
        places.append(places[-1] + len(block))
    samples = sum(entry["count"] for entry in entries)
    tail = _TAIL.pack(MAGIC, VERSION, len(entries), samples, bytes.fromhex(index_sha256), 0)[:-4]
    end = np.array(places, "<u8").tobytes() + tail
    yield end + zlib.crc32(end).to_bytes(4, "little")


def _block_if_readable(files: ShardFiles, entry: dict) -> bytes:
    try:
        return pack_block(read_sidecar(files, entry))
    except CorruptSample:
        # reading one of its samples gives the reason
        return b""


def _stride(size: _Size) -> _Size:
    """From the start of a member of a tar to that of the next: its padded bytes and a header."""
    return size + -size % BLOCKSIZE + BLOCKSIZE
