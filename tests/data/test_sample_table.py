"""Proves that `index.bin` says what the index files of the shards say, and is never wrong without a word.

python -m pytest tests/data/test_sample_table.py
"""

import errno
import gc
import json
import multiprocessing
import os
import shutil
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.many_shards import copy_shards
from prismer.dataloading.store import sample_table, shards
from prismer.dataloading.store.index import CorruptSample, Sidecar
from prismer.dataloading.store.sample_table import Row, pack_block
from prismer.dataloading.store.shard_files import LocalFiles
from prismer.dataloading.store.shards import ShardDataset, ShardWriter, make_table
from prismer.dataloading.store.writer import write_index
from tests.data.noise_shards import CLASSES, assert_same, flip, make_sample, write_dataset


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 shards of 200 samples, whose table has 2 MB."""
    folder = tmp_path_factory.mktemp("large")
    source = write_dataset(folder / "one", 200, samples_per_shard=200)
    return copy_shards(source, 200, folder / "many", sidecars=False)


class RemoteFiles:
    """The files of a folder, as another kind of storage gives them."""

    def __init__(self, place):
        self.place, self.fetched = str(place), []
        self.files = LocalFiles(str(place).removeprefix("far://"))
        self.read, self.local, self.open_shard = self.files.read, self.files.local, self.files.open_shard

    def prefetch(self, entries):
        self.fetched += [entry["name"] for entry in entries]


def rows_of(dataset: ShardDataset) -> list[Row | None]:
    """What the table says about every sample."""
    counts = [entry["count"] for entry in dataset.entries]
    return [dataset.table.row(shard, row) for shard, count in enumerate(counts) for row in range(count)]


def lines(caught: pytest.WarningsRecorder) -> list[str]:
    """The warnings of ours."""
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def mapping(path: Path) -> dict[str, int | str]:
    """The permissions and the resident kB of a file that this process has mapped."""
    # the datasets of earlier tests
    gc.collect()
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    resident = next(line for line in lines[start:] if line.startswith("Rss:"))
    return {"permissions": lines[start].split()[1], "resident": int(resident.split()[1])}


def damaged_tables(whole: bytes):
    """Tables of three shards that a reader must refuse, by name."""
    size = 4 * 8 + 56
    newer = whole[:-52] + (2).to_bytes(4, "little") + whole[-48:-4]
    return {
        "empty": b"",
        "without its end": whole[:-1],
        "half": whole[: len(whole) // 2],
        "another file": b"x" * 1000,
        "a newer version": newer + zlib.crc32(newer[-size:]).to_bytes(4, "little"),
        "longer": whole[:8] + b"x" + whole[8:],
    }


def test_the_table_says_what_the_index_files_say(folder):
    dataset = ShardDataset(folder)
    expected = []
    for name in dataset.shards:
        sidecar = json.loads((folder / name.replace(".tar", ".index.json")).read_bytes())
        for key, members in zip(sidecar["keys"], sidecar["members"], strict=True):
            expected.append(Row(key, [tuple(members[i : i + 3]) for i in (0, 3, 6)]))
    assert rows_of(dataset) == expected and len(expected) == 10


def test_long_keys_and_large_members_fit(tmp_path):
    keys = ["k" * 90, "a", "-_" * 45, "Z9", "0"]
    # from nothing to more than a block of the tar; the JSON of two has 512 and 1024 bytes
    lengths = [0, 1, 512 - 17, 1024 - 17, 1500]
    with ShardWriter(tmp_path, classes=CLASSES, source="") as writer:
        for i, key in enumerate(keys):
            sample = make_sample(i)
            sample.key, sample.meta = key, {"captions": ["x" * lengths[i]]}
            writer.write(sample)
    dataset = ShardDataset(tmp_path)
    assert [dataset.key(i) for i in range(5)] == keys
    assert [dataset.find(key) for key in keys] == [0, 1, 2, 3, 4]
    assert [len(dataset[i].meta["captions"][0]) for i in range(5)] == lengths
    sizes = [row.members[1][1] for row in rows_of(dataset)]
    assert sizes == [length + 17 for length in lengths]


def test_samples_are_read_without_the_index_files_of_the_shards(folder):
    for path in folder.glob("shard-*.index.json"):
        path.unlink()
    dataset = ShardDataset(folder)
    for i in range(10):
        assert_same(dataset[i], make_sample(i))
        assert dataset.meta(i) == make_sample(i).meta


def test_processes_share_the_pages_of_the_table(folder):
    ShardDataset(folder)[0]
    dataset = ShardDataset(folder)
    assert dataset.key(0) == "key_000"
    # s: shared with every process that maps the file, and -w: never written
    assert mapping(folder / "index.bin")["permissions"] == "r--s"


def test_opening_a_table_reads_its_end_alone(large):
    dataset = ShardDataset(large)
    assert len(dataset) == 40_000 and (large / "index.bin").stat().st_size > 1_800_000
    # the kernel maps up to 64 kB around a page
    assert mapping(large / "index.bin")["resident"] <= 128


def test_pages_are_returned_after_some_reads(large, monkeypatch):
    monkeypatch.setattr(sample_table, "_READS_BEFORE_RELEASE", 50)
    dataset = ShardDataset(large)
    draw = np.random.default_rng(0).integers(0, len(dataset), 49).tolist()
    assert [dataset.key(i) for i in draw] == [f"{i // 200:06d}_{i % 200:04d}" for i in draw]
    before = mapping(large / "index.bin")["resident"]
    assert dataset.key(20_000) == "000100_0000"
    assert mapping(large / "index.bin")["resident"] <= 128 < before


def test_a_key_is_found_among_many(large):
    dataset = ShardDataset(large)
    for i in (0, 199, 200, 23_456, 39_999):
        assert dataset.find(dataset.key(i)) == i
    others = ("000100", "0100_0000", "000100_0000\n000100_0001", "", "\n", "\N{GREEK SMALL LETTER ALPHA}", "\ud800")
    assert [dataset.find(key) for key in others] == [None] * len(others)


@pytest.mark.parametrize("kind", [*damaged_tables(bytes(200)), "absent", "stale", "pipe"])
def test_an_unusable_table_is_made_again_with_one_line(tmp_path, folder, kind):
    path = folder / "index.bin"
    whole = path.read_bytes()
    path.unlink()
    if kind == "stale":
        # of as many samples in as many shards
        write_dataset(tmp_path / "other", about={"side": 8})
        shutil.copy(tmp_path / "other/index.bin", path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "absent":
        path.write_bytes(damaged_tables(whole)[kind])
    with pytest.warns(UserWarning, match="it is made again from the index files of 3 shards") as caught:
        dataset = ShardDataset(folder)
    (line,) = lines(caught)
    assert str(folder) in line
    assert path.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for opened in (dataset, ShardDataset(folder)):
            assert_same(opened[9], make_sample(9))


@pytest.mark.filterwarnings("ignore:index.bin of")
def test_no_flipped_bit_gives_another_sample(folder):
    """A bit of the last part makes the table again, one of a record or a key sends the reader to the index file."""
    path = folder / "index.bin"
    whole, expected = path.read_bytes(), rows_of(ShardDataset(folder))
    kept = 0
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position)
        dataset = ShardDataset(folder)
        found = rows_of(dataset)
        assert all(a in (b, None) for a, b in zip(found, expected, strict=True)), position
        assert [dataset.key(i) for i in range(10)] == [row.key for row in expected]
        kept += found != expected
        # the places of the blocks, and the tail
        if position >= len(whole) - 4 * 8 - 60:
            assert path.read_bytes() == whole
    # every byte of a record and of a key counts: the sample's own bytes, and the end of the key before
    assert kept >= 10 * (36 + 7)


def test_a_damaged_record_warns_and_check_names_the_remedy(folder):
    flip(folder / "index.bin", 30)
    with pytest.warns(UserWarning, match=f"index.bin of {folder} is damaged; give the command: prismer data index"):
        assert_same(ShardDataset(folder)[0], make_sample(0))
    make_table(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(ShardDataset(folder)[0], make_sample(0))


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_table_that_cannot_be_written_is_kept_in_memory(folder, monkeypatch, error):
    (folder / "index.bin").unlink()

    def refuse(path, data):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(sample_table, "write_together", refuse)
    with pytest.warns(UserWarning) as caught:
        dataset = ShardDataset(folder)
    assert f"cannot be written ({os.strerror(error)}) and is kept in memory" in lines(caught)[1]
    assert not (folder / "index.bin").exists()
    for i in range(10):
        assert_same(dataset[i], make_sample(i))
    assert dataset.find("key_009") == 9


@pytest.mark.filterwarnings("ignore:.*it is made again")
def test_a_shard_without_its_index_file_has_no_block_until_the_file_is_back(folder):
    sidecar = folder / "shard-000001.index.json"
    data = sidecar.read_bytes()
    for path in (sidecar, folder / "index.bin"):
        path.unlink()
    dataset = ShardDataset(folder)
    assert [dataset.table.has_block(shard) for shard in range(3)] == [True, False, True]
    with pytest.raises(CorruptSample, match="No such file"):
        dataset[4]
    assert dataset.find("key_009") == 9
    with pytest.raises(CorruptSample, match="No such file"):
        dataset.find("key_005")
    sidecar.write_bytes(data)
    for opened in (dataset, ShardDataset(folder)):
        assert_same(opened[4], make_sample(4))
        assert opened.find("key_005") == 5


def open_silently(folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ShardDataset(folder).key(9)


def test_processes_can_make_the_table_at_the_same_time(folder):
    whole = (folder / "index.bin").read_bytes()
    (folder / "index.bin").unlink()
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(open_silently, [folder] * 8)) == ["key_009"] * 8
    assert (folder / "index.bin").read_bytes() == whole
    assert not list(folder.glob("*.partial"))


def moved(members: list[int]) -> list[int]:
    """The members of a sample one byte later."""
    return [number + (i % 3 == 0) for i, number in enumerate(members)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["members"][1].__setitem__(3, fields["members"][1][3] + 512), "follow one another"),
        (lambda fields: fields["members"].__setitem__(1, moved(fields["members"][1])), "follow one another"),
        (lambda fields: fields["members"][2].__setitem__(2, 1 << 32), "follow one another"),
        (lambda fields: fields["keys"].__setitem__(1, "a\nb"), "malformed key"),
    ],
    ids=["a gap", "a place between blocks", "a checksum of 33 bits", "a line end in a key"],
)
def test_what_the_table_cannot_hold_is_refused(folder, change, message):
    path = folder / "shard-000000.index.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    with pytest.raises(CorruptSample, match=message):
        pack_block(Sidecar(json.dumps(fields).encode(), path.name))


def test_a_dataset_is_not_finished_without_all_index_files(folder):
    index = json.loads((folder / "index.json").read_bytes())
    for name in ("index.json", "index.bin", "shard-000002.index.json"):
        (folder / name).unlink()
    with pytest.raises(CorruptSample, match=r"shard-000002.index.json cannot be read"):
        write_index(folder, index["shards"], index["classes"], index["source"], index["about"])
    assert not list(folder.glob("index*"))


def test_a_local_dataset_fetches_nothing(folder):
    dataset = ShardDataset(folder)
    assert not dataset.is_remote and dataset.place == str(folder) and dataset.folder == folder
    dataset.prefetch([0, 2])


@pytest.mark.filterwarnings("ignore:.*it is made again")
def test_another_storage_is_read_through_its_files(folder, monkeypatch):
    monkeypatch.setattr(shards, "open_files", RemoteFiles)
    place = f"far://{folder}"
    dataset = ShardDataset(place)
    assert dataset.is_remote and dataset.place == place
    dataset.prefetch([2, 0])
    assert dataset.files.fetched == ["shard-000002.tar", "shard-000000.tar"]
    assert_same(dataset[7], make_sample(7))
    with pytest.raises(ValueError, match="is no folder of this machine"):
        make_table(place)
    # nothing is written where another storage keeps its copy
    (folder / "index.bin").unlink()
    assert_same(ShardDataset(place)[7], make_sample(7))
    assert not (folder / "index.bin").exists()
