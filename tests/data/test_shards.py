"""Proves that a dataset folder gives back what was written, names what is damaged, and survives a killed writer.

python -m pytest -q tests/data/test_shards.py
"""

import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.store.index import to_json
from prismer.dataloading.store.shards import CorruptSample, Sample, ShardDataset, ShardWriter

CLASSES = {"seg": ["ground", "sky"], "obj_detection": ["cube"]}


def make_sample(i, side=16):
    rng = np.random.default_rng(i)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
    labels = {
        "seg": rng.integers(0, 2, (8, 8), dtype=np.uint8),
        "normal": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
    }
    if i % 2:
        del labels["normal"]
    meta = {"captions": [f"caption {i}, \N{LATIN SMALL LETTER E WITH ACUTE}"], "size": [side, side]}
    return Sample(f"key_{i:03d}", file.getvalue(), labels, meta)


def write_dataset(folder, count=10, samples_per_shard=4, **settings):
    settings = {"classes": CLASSES, "source": "made up", **settings}
    with ShardWriter(folder, samples_per_shard=samples_per_shard, **settings) as writer:
        for i in range(count):
            sample = make_sample(i)
            if sample.key not in writer.written_keys:
                writer.write(sample)
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(sample, expected):
    assert (sample.key, sample.jpeg, sample.meta) == (expected.key, expected.jpeg, expected.meta)
    assert set(sample.labels) == set(expected.labels)
    for name, plane in expected.labels.items():
        np.testing.assert_array_equal(sample.labels[name], plane)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def offset_of(tar_path, name):
    with tarfile.open(tar_path) as tar:
        return tar.getmember(name).offset_data


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """A busy disk takes a second for what these tests do a thousand times; their order is proved on its own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data")


@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_round_trip(tmp_path, count):
    about = {"experts": {"depth": "v1"}}
    dataset = ShardDataset(write_dataset(tmp_path / "data", count, about=about))
    assert len(dataset) == count
    assert len(dataset.shards) == -(-count // 4)
    assert (dataset.classes, dataset.source, dataset.about) == (CLASSES, "made up", about)
    evens = -(-count // 2)
    assert dataset.experts == {k: v for k, v in {"normal": evens, "seg": count}.items() if v}
    for i in range(count):
        expected = make_sample(i)
        assert_same(dataset[i], expected)
        assert_same(dataset[i - count], expected)
        assert dataset.key(i) == expected.key
        assert dataset.meta(i) == expected.meta
        assert dataset.shard_of(i) == i // 4
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            dataset[i]


def test_any_tar_reader_can_read_a_shard(folder):
    keys, groups = [], {}
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar"):
        with tarfile.open(folder / name, "r:") as tar:
            for member in tar:
                # what a WebDataset reader does: the key ends at the first dot
                key, _, extension = member.name.partition(".")
                groups.setdefault(key, {})[extension] = tar.extractfile(member).read()
                keys.append(key)
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert member.isfile()
    assert keys == [make_sample(i // 3).key for i in range(30)], "members of a sample are neighbours"
    for i in range(10):
        expected = make_sample(i)
        group = groups[expected.key]
        assert list(group) == ["jpg", "json", "labels"]
        assert group["jpg"] == expected.jpeg
        assert json.loads(group["json"]) == expected.meta


def test_bytes_are_deterministic(tmp_path, folder):
    assert bytes_of(write_dataset(tmp_path / "again")) == bytes_of(folder)


def test_no_traces_of_the_writer(folder):
    names = {f"shard-00000{i}.{end}" for i in range(3) for end in ("tar", "index.json")}
    assert {path.name for path in folder.iterdir()} == names | {"index.json"}


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "\N{GREEK SMALL LETTER ALPHA}", "a" * 91, "a\n"])
def test_malformed_keys_are_refused(tmp_path, key):
    sample = make_sample(0)
    sample.key = key
    with (
        ShardWriter(tmp_path, classes=CLASSES, source="") as writer,
        pytest.raises(ValueError, match="rename the sample"),
    ):
        writer.write(sample)


def test_longest_key(tmp_path):
    sample = make_sample(0)
    sample.key = "k" * 90
    with ShardWriter(tmp_path, classes=CLASSES, source="") as writer:
        writer.write(sample)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"{sample.key}.{end}" for end in ("jpg", "json", "labels")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "key_000"}, "written twice"),
        ({"jpeg": b"\x89PNG"}, "not a JPEG"),
        ({"meta": ["caption"]}, "expected a dict"),
        ({"meta": {"captions": {1}}}, "key_009 cannot be written: .*give numbers"),
        ({"meta": {"weight": float("nan")}}, "key_009 cannot be written"),
        ({"labels": {"seg": np.zeros(3)}}, "key_009 cannot be written: .*float64"),
    ],
    ids=["duplicate", "jpeg", "meta", "json", "nan", "labels"],
)
def test_malformed_samples_are_refused_and_leave_no_trace(tmp_path, change, message):
    with ShardWriter(tmp_path / "a", classes=CLASSES, source="made up") as writer:
        writer.write(make_sample(0))
        sample = make_sample(9)
        for name, value in change.items():
            setattr(sample, name, value)
        with pytest.raises(ValueError, match=message):
            writer.write(sample)
        writer.write(make_sample(1))
    assert bytes_of(tmp_path / "a") == bytes_of(write_dataset(tmp_path / "b", 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": {"depth": ["near"]}}, "choose from seg"),
        ({"classes": {"seg": "ab"}}, "list of non-empty strings"),
        ({"classes": {"seg": [f"c{i}" for i in range(256)]}}, "at most 255"),
        ({"samples_per_shard": 0}, "at least 1"),
        ({"about": {"version": {1, 2}}}, "give numbers"),
    ],
)
def test_malformed_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path / "new", **{"classes": CLASSES, "source": "", **settings})
    assert not (tmp_path / "new").exists()


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    replace = os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    )

    def log_replace(source, target):
        steps.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "replace", log_replace)
    write_dataset(tmp_path / "data", 2)
    expected = []
    for name in ("shard-000000.tar", "shard-000000.index.json", "index.json"):
        expected += [f"{name}.partial", f"-> {name}", "data"]
    assert steps == expected


# --- damage


@pytest.mark.parametrize("extension", ["jpg", "json", "labels"])
def test_a_flipped_bit_is_found_before_a_decoder_sees_it(folder, extension):
    tar = folder / "shard-000001.tar"
    flip(tar, offset_of(tar, f"key_005.{extension}") + 7)
    dataset = ShardDataset(folder)
    with pytest.raises(CorruptSample, match=f"{extension} fails the checksum") as caught:
        dataset[5]
    assert (caught.value.shard, caught.value.key) == ("shard-000001.tar", "key_005")
    for i in (4, 6):
        assert_same(dataset[i], make_sample(i))
    # only the json is read for the texts
    if extension == "json":
        with pytest.raises(CorruptSample):
            dataset.meta(5)
    else:
        assert dataset.meta(5) == make_sample(5).meta


def test_a_truncated_tar_loses_only_what_is_gone(folder):
    tar = folder / "shard-000000.tar"
    with open(tar, "r+b") as file:
        file.truncate(offset_of(tar, "key_002.labels") + 3)
    dataset = ShardDataset(folder)
    assert_same(dataset[1], make_sample(1))
    for i in (2, 3):
        with pytest.raises(CorruptSample, match="bytes too early"):
            dataset[i]
    assert_same(dataset[4], make_sample(4))


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    dataset = ShardDataset(folder)
    with pytest.raises(CorruptSample, match="No such file") as caught:
        dataset[5]
    assert caught.value.shard == "shard-000001.tar"
    assert_same(dataset[0], make_sample(0))
    assert_same(dataset[9], make_sample(9))


def test_a_damaged_shard_index_is_found(folder):
    path = folder / "shard-000001.index.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole)
        flip(path, position)
        with pytest.raises(CorruptSample, match="checksum"):
            ShardDataset(folder).key(5)


def test_an_index_of_another_shard_is_found(folder):
    # both files are whole, but one was copied over the other
    (folder / "shard-000001.tar").write_bytes((folder / "shard-000002.tar").read_bytes())
    with pytest.raises(CorruptSample):
        ShardDataset(folder)[5]


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_torn_index_is_refused(folder, share):
    path = folder / "index.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="not JSON"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(version=2), "version 2"),
        (lambda index: index.update(format="other"), "import the data"),
        (lambda index: index.update(count=11), "do not add up"),
        (lambda index: index.pop("about"), "about is missing"),
        (lambda index: index.pop("shards"), "damaged"),
        (lambda index: index.update(shards=3), "damaged"),
        (lambda index: index["shards"][0].pop("sha256"), "sha256 is missing"),
        (lambda index: index["shards"][0].update(name="../a.tar"), "this library does not give"),
        (lambda index: index.update(classes={"seg": [1]}), "list of non-empty strings"),
    ],
)
def test_a_wrong_index_is_refused(folder, change, message):
    path = folder / "index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        ShardDataset(folder)


def test_no_dataset_is_a_sentence(tmp_path, folder):
    (folder / "index.json").unlink()
    for missing in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not a finished dataset"):
            ShardDataset(missing)


def test_errors_read_as_sentences():
    error = pickle.loads(pickle.dumps(CorruptSample("shard-000001.tar", "key_005", "its jpg is gone")))
    assert (error.shard, error.key, error.reason) == ("shard-000001.tar", "key_005", "its jpg is gone")
    assert str(error) == "sample key_005 of shard-000001.tar cannot be read: its jpg is gone"
    assert str(CorruptSample("s.tar", "", "gone")) == "s.tar cannot be read: gone"


# --- processes and threads


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataset_travels_to_processes(folder, method):
    dataset = ShardDataset(folder)
    # opened before the fork: children share descriptors, never positions
    assert dataset[0].key != dataset[9].key
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for i, sample in enumerate(pool.map(dataset.__getitem__, range(10), timeout=60)):
            assert_same(sample, make_sample(i))


def test_threads_share_a_dataset_that_closes_files_all_the_time(tmp_path):
    dataset = ShardDataset(write_dataset(tmp_path / "data", 24, samples_per_shard=1))
    dataset._file, dataset._sidecar = (lru_cache(2)(load) for load in (dataset._open_shard, dataset._load_sidecar))
    order = np.random.default_rng(0).integers(0, 24, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: dataset[i].key, order))
    assert keys == [f"key_{i:03d}" for i in order]
    assert dataset._file.cache_info().currsize <= 2


def test_open_files_are_bounded(tmp_path):
    dataset = ShardDataset(write_dataset(tmp_path / "data", 70, samples_per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(70):
        dataset[i]
    assert len(os.listdir("/proc/self/fd")) - before <= 64


# --- stopping and going on


def test_resume_after_an_error(tmp_path, folder):
    target = tmp_path / "resumed"
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(target, classes=CLASSES, source="made up", samples_per_shard=4) as writer,
    ):
        for i in range(7):
            writer.write(make_sample(i))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not a finished dataset"):
        ShardDataset(target)
    assert {path.name for path in target.iterdir()} == {"shard-000000.tar", "shard-000000.index.json"}
    with ShardWriter(target, classes=CLASSES, source="made up", samples_per_shard=4, resume=True) as writer:
        assert writer.written_keys == {make_sample(i).key for i in range(4)}
        for i in range(4, 10):
            writer.write(make_sample(i))
    assert bytes_of(target) == bytes_of(folder)


def test_a_finished_dataset_grows(tmp_path):
    write_dataset(tmp_path, 6)
    write_dataset(tmp_path, 10, resume=True)
    dataset = ShardDataset(tmp_path)
    assert [dataset[i].key for i in range(10)] == [make_sample(i).key for i in range(10)]


@pytest.mark.parametrize("kind", ["tar gone", "index gone", "tar short", "index torn"])
def test_resume_replaces_damaged_shards_alone(folder, kind):
    expected, stamps = bytes_of(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    path = folder / ("shard-000001.tar" if "tar" in kind else "shard-000001.index.json")
    data = path.read_bytes()
    path.unlink()
    if "gone" not in kind:
        path.write_bytes(data[:-700])
    write_dataset(folder, resume=True)
    assert bytes_of(folder) == expected
    for kept in ("shard-000000.tar", "shard-000002.tar"):
        assert (folder / kept).stat().st_mtime_ns == stamps[kept], "a whole shard is not written again"


def test_resume_withdraws_the_index_before_the_shard_it_promises(folder):
    (folder / "shard-000001.tar").unlink()
    writer = ShardWriter(folder, classes=CLASSES, source="made up", resume=True)
    with pytest.raises(ValueError, match="not a finished dataset"):
        ShardDataset(folder)
    writer.close()
    assert len(ShardDataset(folder)) == 6


def test_only_its_own_files_are_removed(folder):
    foreign = ["notes.txt", "shard-1.tar", "shard-000009.tar.bak", "my-shard-000009.tar"]
    ours = ["shard-000009.tar", "shard-000003.tar.partial", "shard-000000.index.json.partial"]
    for name in foreign + ours:
        (folder / name).write_bytes(b"x")
    write_dataset(folder, resume=True)
    left = {path.name for path in folder.iterdir()}
    assert left.issuperset(foreign) and left.isdisjoint(ours)


def test_what_does_not_belong_together_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="already holds shards"):
        write_dataset(folder)
    for change in ({"classes": {"seg": ["sky"]}}, {"source": "elsewhere"}, {"about": {"side": 8}}):
        with pytest.raises(ValueError, match="other class tables, source or notes"):
            write_dataset(folder, resume=True, **change)
    before = bytes_of(folder)
    write_dataset(folder, resume=True)
    assert bytes_of(folder) == before


def _start_writer(folder):
    """The pid of a forked process that writes 40 samples, one every 3 ms or so, and resumes what is there."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        write = ShardWriter.write

        def slow_write(self, sample):
            time.sleep(0.003)
            write(self, sample)

        ShardWriter.write = slow_write
        write_dataset(folder, 40, samples_per_shard=3, resume=True)
        status = 0
    finally:
        os._exit(status)


def test_two_writers_exclude_each_other(tmp_path):
    child = _start_writer(tmp_path)
    try:
        deadline = time.monotonic() + 30
        while not any(tmp_path.glob("*.partial")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(child, signal.SIGSTOP)
        with pytest.raises(ValueError, match="another process is writing"):
            ShardWriter(tmp_path, classes=CLASSES, source="made up", resume=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # the lock of a dead process is no lock
    write_dataset(tmp_path, 40, samples_per_shard=3, resume=True)


def test_sigkill_and_resume(tmp_path):
    """Killed at random points until it is done, the job loses nothing and ends with the bytes of an unbroken one."""
    target, kills, kept = tmp_path / "killed", 0, 0
    rng = random.Random(os.urandom(8))
    while kills < 6:
        child = _start_writer(target)
        # from then on it has made progress; a machine under load may need a while to get there
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and len(list(target.glob("*.index.json"))) <= kept:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        kept = len(list(target.glob("*.index.json")))
        if not (target / "index.json").exists():
            with pytest.raises(ValueError, match="not a finished dataset"):
                ShardDataset(target)
    assert kills
    child = _start_writer(target)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes_of(target) == bytes_of(write_dataset(tmp_path / "whole", 40, samples_per_shard=3))


def _die_at_call(number, folder):
    """In a forked child: write, and vanish in the instant before the number-th call that changes the disk."""
    calls = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    write_dataset(folder, 5, samples_per_shard=2, resume=True)
    os._exit(0)


def test_death_between_any_two_steps(tmp_path):
    """Whatever the last step was, the folder is a whole dataset or one that resumes to the same bytes."""
    expected = bytes_of(write_dataset(tmp_path / "whole", 5, samples_per_shard=2))
    number, deaths = 0, 0
    while True:
        number += 1
        folder = tmp_path / f"death-{number}"
        child = os.fork()
        if child == 0:
            _die_at_call(number, folder)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        deaths += 1
        finished = (folder / "index.json").exists()
        if finished:
            dataset = ShardDataset(folder)
            assert [dataset[i].key for i in range(5)] == [make_sample(i).key for i in range(5)]
        write_dataset(folder, 5, samples_per_shard=2, resume=True)
        assert bytes_of(folder) == expected, f"death before call {number}"
    # three shards of tar and index, and the index of all: two or more calls each
    assert deaths >= 14


@pytest.mark.parametrize("name", ["index.json", "shard-000000.index.json", "shard-000000.tar"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((OSError, CorruptSample), match="named pipe"):
        ShardDataset(folder)[0]


def test_json_says_which_text_it_cannot_hold():
    with pytest.raises(ValueError, match=r"a text holds '.ud800', which UTF-8 cannot hold"):
        to_json({"captions": ["a", "\ud800"]})
    value = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="nested too deeply"):
        to_json(value)
