"""What the expert maps of one sample look like on disk: uint8 planes behind a small checked header, zstd inside.

Layout of a `KEY.labels` member, little-endian:

    4 s   magic "PLBL"
    u8    version, 1
    u8    number of maps P
    u32   crc32 of everything that follows
    P x   (u8 expert code, u8 planes, u16 height, u16 width)
    rest  one zstd frame: the maps in the order of the table, each row-major, planes last; of depth and normals
          each row minus the row above it (mod 256)

Values are those of the catalogue (prismer/experts.py): intensities for depth, normals and edges; ids with 255 for
"nothing here" for the others. An expert that has nothing to say about a sample is left out.
"""

import struct
import zlib

import numpy as np
import zstandard

from prismer.dataloading.feed import native_pixels
from prismer.experts import EXPERTS, Expert

MAGIC = b"PLBL"
VERSION = 1

_NAMES = {expert.code: name for name, expert in EXPERTS.items()}
_HEADER = struct.Struct("<4sBBI")
_ENTRY = struct.Struct("<BBHH")
_MAX_SIDE = 65535
# zstd's default; level 9 saves another 7 % for 5 times the time
_LEVEL = 3


def blank_planes(expert: str, size: int) -> np.ndarray:
    """The map of an expert that says nothing: (size, size) or (size, size, 3) uint8 filled with the catalogue's `fill`.

    Raises:
        ValueError: if the expert is unknown.
    """
    return np.full(_shape(expert, size, size), _known(expert).fill, dtype=np.uint8)


def pack_labels(planes: dict[str, np.ndarray]) -> bytes:
    """Expert maps -> bytes of a `KEY.labels` member; equal maps give equal bytes.

    Args:
        planes: expert -> uint8 (h, w), or (h, w, 3) for surface normals; sizes may differ; {} is allowed.

    Raises:
        ValueError: if an expert is unknown, or a map has another dtype, shape or an empty side.
    """
    table, payload = [], []
    for expert, plane in planes.items():
        _check_plane(expert, plane)
    # in the order of the codes, so that the bytes do not depend on the order in which a job filled the dict
    for expert in sorted(planes, key=lambda name: EXPERTS[name].code):
        plane = planes[expert]
        height, width = plane.shape[:2]
        table.append(_ENTRY.pack(EXPERTS[expert].code, EXPERTS[expert].planes, height, width))
        # row differences make smooth maps 2.3 times smaller for 0.2 ms of decoding at 224 px
        if EXPERTS[expert].is_smooth:
            plane = np.concatenate([plane[:1], plane[1:] - plane[:-1]])
        payload.append(plane.tobytes())
    compressed = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(b"".join(payload))
    body = b"".join(table) + compressed
    return _HEADER.pack(MAGIC, VERSION, len(table), zlib.crc32(body)) + body


def unpack_labels(data: bytes) -> dict[str, np.ndarray]:
    """Bytes of a `KEY.labels` member -> expert -> uint8 (h, w) or (h, w, 3), writable.

    Raises:
        ValueError: if the bytes are not packed labels, of an unknown version, truncated or damaged.
    """
    if len(data) < _HEADER.size or bytes(data[:4]) != MAGIC:
        raise ValueError(f"these {len(data)} bytes are not packed labels (no {MAGIC.decode()} header)")
    _, version, count, checksum = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"packed labels have version {version}, this library reads {VERSION}; update it or pack again")
    body = memoryview(data)[_HEADER.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError(f"packed labels of {len(data)} bytes fail their checksum; restore the file or label it again")
    if len(body) < count * _ENTRY.size:
        raise ValueError(f"packed labels promise {count} maps but their table is cut short; label the sample again")
    entries = [_ENTRY.unpack_from(body, i * _ENTRY.size) for i in range(count)]
    for code, channels, _, _ in entries:
        if code not in _NAMES or channels != EXPERTS[_NAMES[code]].planes:
            raise ValueError(f"packed labels hold an unknown map (code {code}, {channels} planes); update the library")
    sizes = [channels * height * width for _, channels, height, width in entries]
    raw = _decompress(body[count * _ENTRY.size :], sum(sizes))
    planes, start = {}, 0
    for (code, _, height, width), size in zip(entries, sizes, strict=True):
        expert = _NAMES[code]
        plane = raw[start : start + size].reshape(_shape(expert, height, width))
        if EXPERTS[expert].is_smooth and native_pixels.is_built():
            native_pixels.undifference(plane)
        elif EXPERTS[expert].is_smooth:
            plane = np.add.accumulate(plane, axis=0, dtype=np.uint8)
        planes[expert] = plane
        start += size
    return planes


def _decompress(frame: memoryview, size: int) -> np.ndarray:
    try:
        # the promised size is compared before memory is taken for it
        promised = zstandard.frame_content_size(frame)
        if promised != size:
            raise ValueError(f"packed labels hold {promised} bytes, their table says {size}; label the sample again")
        # straight to where it stays writable; what comes after the frame is read too, to refuse it
        raw = np.empty(size, np.uint8)
        reader = zstandard.ZstdDecompressor().stream_reader(frame, read_across_frames=True)
        if (held := reader.readinto(raw)) != size or reader.read(1):
            raise ValueError(
                f"packed labels hold {'more' if held == size else held} bytes, their table says {size}; "
                f"label the sample again"
            )
    except zstandard.ZstdError as error:
        raise ValueError(f"packed labels do not decompress ({error}); label the sample again") from None
    return raw


def _known(expert: str) -> Expert:
    if expert not in EXPERTS:
        raise ValueError(f"unknown expert {expert!r}; choose from {', '.join(EXPERTS)}")
    return EXPERTS[expert]


def _shape(expert: str, height: int, width: int) -> tuple[int, ...]:
    channels = _known(expert).planes
    return (height, width) if channels == 1 else (height, width, channels)


def _check_plane(expert: str, plane: np.ndarray) -> None:
    channels = _known(expert).planes
    if not isinstance(plane, np.ndarray) or plane.dtype != np.uint8:
        got = plane.dtype if isinstance(plane, np.ndarray) else type(plane).__name__
        raise ValueError(f"the {expert} map is {got}; give a uint8 numpy array")
    expected = "(h, w)" if channels == 1 else f"(h, w, {channels})"
    if plane.ndim < 2 or plane.shape != _shape(expert, *plane.shape[:2]):
        raise ValueError(f"the {expert} map has shape {plane.shape}; expected {expected}")
    if not all(1 <= side <= _MAX_SIDE for side in plane.shape[:2]):
        raise ValueError(f"the {expert} map has shape {plane.shape}; each side must lie in 1..{_MAX_SIDE}")
