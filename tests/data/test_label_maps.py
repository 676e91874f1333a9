"""Proves that packed labels give back the same maps, are the same bytes each time, and never give back wrong maps.

python -m pytest tests/data/test_label_maps.py
"""

import struct
import zlib

import numpy as np
import pytest

from prismer.dataloading.store import native_ops
from prismer.dataloading.store.label_maps import blank_planes, pack_labels, unpack_labels
from prismer.experts import EXPERTS


def random_planes(seed=0, height=37, width=41):
    rng = np.random.default_rng(seed)
    shape = {1: (height, width), 3: (height, width, 3)}
    return {name: rng.integers(0, 256, shape[expert.planes], dtype=np.uint8) for name, expert in EXPERTS.items()}


def with_checksum(data):
    """The same bytes with the right checksum, as a careless or hostile writer could make them."""
    return data[:6] + struct.pack("<I", zlib.crc32(data[10:])) + data[10:]


@pytest.mark.parametrize("experts", [*((name,) for name in EXPERTS), tuple(EXPERTS), ()], ids=str)
def test_unpacking_gives_back_the_maps(experts):
    planes = {name: random_planes()[name] for name in experts}
    back = unpack_labels(pack_labels(planes))
    assert set(back) == set(experts)
    for name in experts:
        np.testing.assert_array_equal(back[name], planes[name])
        assert back[name].flags.writeable and back[name].flags.c_contiguous


def test_numpy_serves_where_native_ops_were_not_built(monkeypatch):
    monkeypatch.setattr(native_ops, "is_built", lambda: False)
    planes = random_planes()
    for name, plane in unpack_labels(pack_labels(planes)).items():
        np.testing.assert_array_equal(plane, planes[name])
        assert native_ops.values_in_use(plane) == np.unique(plane).tolist()


@pytest.mark.parametrize("side", [1, 2, 224])
def test_maps_may_have_any_size(side):
    planes = {"depth": random_planes(1, side, 3)["depth"], "seg": random_planes(2, 5, side)["seg"]}
    back = unpack_labels(pack_labels(planes))
    for name, plane in planes.items():
        np.testing.assert_array_equal(back[name], plane)


def test_bytes_depend_on_the_maps_alone():
    planes = random_planes()
    reordered = dict(reversed(planes.items()))
    # a view with other strides holds the same map
    reordered["depth"] = np.asfortranarray(planes["depth"])
    assert pack_labels(planes) == pack_labels(reordered)
    assert pack_labels(planes) != pack_labels(random_planes(1))


def test_smooth_maps_are_small():
    y, x = np.mgrid[:224, :224]
    depth = ((np.sin(x / 31) + np.cos(y / 23)) * 60 + 128).astype(np.uint8)
    # six times smaller; without row differences three times
    assert len(pack_labels({"depth": depth})) < depth.size / 5


def test_codes_never_change():
    codes = {name: expert.code for name, expert in EXPERTS.items()}
    assert codes == {"depth": 1, "normal": 2, "seg": 3, "edge": 4, "obj_detection": 5, "ocr_detection": 6}


def test_format_is_as_documented():
    data = pack_labels({"seg": np.array([[7, 255]], np.uint8)})
    assert data[:6] == b"PLBL\x01\x01"
    assert struct.unpack("<I", data[6:10])[0] == zlib.crc32(data[10:])
    assert struct.unpack("<BBHH", data[10:16]) == (3, 1, 1, 2)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_blank_map_holds_the_fill_of_its_expert(name):
    plane = blank_planes(name, 5)
    assert plane.dtype == np.uint8 and plane.shape == ((5, 5, 3) if name == "normal" else (5, 5))
    assert (plane == (255 if EXPERTS[name].is_ids else 0)).all()
    np.testing.assert_array_equal(unpack_labels(pack_labels({name: plane}))[name], plane)


def test_every_flipped_bit_is_found():
    data = pack_labels({"seg": random_planes()["seg"][:4, :4], "depth": random_planes()["depth"]})
    for position in [*range(60), *range(60, len(data), 29)]:
        for bit in (1, 128):
            damaged = bytearray(data)
            damaged[position] ^= bit
            with pytest.raises(ValueError, match="packed labels"):
                unpack_labels(bytes(damaged))


def test_every_truncation_is_found():
    data = pack_labels({"seg": random_planes()["seg"]})
    for length in [*range(40), len(data) // 2, len(data) - 1]:
        with pytest.raises(ValueError, match="packed labels"):
            unpack_labels(data[:length])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:4] + b"\x02" + data[5:], "version 2"),
        (lambda data: data[:10] + b"\x09" + data[11:], "code 9"),
        (lambda data: data[:11] + b"\x03" + data[12:], "3 planes"),
        (lambda data: data[:12] + b"\x01\x00" + data[14:], "their table says"),
        (lambda data: data[:5] + b"\xff" + data[6:], "cut short"),
        (lambda data: data[:16] + b"not a zstd frame", "decompress"),
        (lambda data: data + b"more", "decompress"),
    ],
    ids=["version", "expert", "planes", "size", "count", "payload", "tail"],
)
def test_a_wrong_file_with_the_right_checksum_is_refused(change, message):
    data = pack_labels({"seg": random_planes(0, 4, 4)["seg"]})
    with pytest.raises(ValueError, match=message):
        unpack_labels(with_checksum(change(data)))


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ({"flow": np.zeros((2, 2), np.uint8)}, "unknown expert 'flow'"),
        ({"seg": np.zeros((2, 2), np.int64)}, r"int64 \(2, 2\); expected uint8 \(h, w\)"),
        ({"seg": [[1]]}, "is list; give a numpy array"),
        ({"seg": np.zeros((2, 2, 1), np.uint8)}, r"expected uint8 \(h, w\)"),
        ({"seg": np.zeros(4, np.uint8)}, r"expected uint8 \(h, w\)"),
        ({"normal": np.zeros((2, 2), np.uint8)}, r"expected uint8 \(h, w, 3\)"),
        ({"normal": np.zeros((3, 2, 2), np.uint8)}, r"expected uint8 \(h, w, 3\)"),
        ({"seg": np.zeros((0, 2), np.uint8)}, "is empty"),
        ({"seg": np.zeros((1, 65536), np.uint8)}, "no side may exceed 65535"),
    ],
)
def test_malformed_maps_are_refused(planes, message):
    with pytest.raises(ValueError, match=message):
        pack_labels(planes)
