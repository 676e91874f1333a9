"""Proves that a shard writer refuses malformed samples, and that a killed one loses nothing.

python -m pytest tests/data/test_shard_writer.py
"""

import os
import random
import signal
import tarfile
import time

import numpy as np
import pytest

from prismer.dataloading.store.index import to_json
from prismer.dataloading.store.shards import ShardDataset, ShardWriter
from tests.data.noise_shards import CLASSES, bytes_of, make_sample, write_dataset


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "data")


def test_bytes_are_deterministic(tmp_path, folder):
    assert bytes_of(write_dataset(tmp_path / "again")) == bytes_of(folder)


def test_only_shards_and_index_files_are_left(folder):
    names = {f"shard-00000{i}.{end}" for i in range(3) for end in ("tar", "index.json")}
    assert {path.name for path in folder.iterdir()} == names | {"index.json", "index.bin"}


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "\N{GREEK SMALL LETTER ALPHA}", "a" * 91, "a\n"])
def test_malformed_keys_are_refused(tmp_path, key):
    sample = make_sample(0)
    sample.key = key
    with (
        ShardWriter(tmp_path, classes=CLASSES, source="") as writer,
        pytest.raises(ValueError, match="rename the sample"),
    ):
        writer.write(sample)


def test_a_key_may_have_90_characters(tmp_path):
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


def test_json_says_which_text_it_cannot_hold():
    with pytest.raises(ValueError, match=r"a text holds '.ud800', which UTF-8 cannot hold"):
        to_json({"captions": ["a", "\ud800"]})
    value = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="nested too deeply"):
        to_json(value)


def test_every_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
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
    for name in ("shard-000000.tar", "shard-000000.index.json", "index.bin", "index.json"):
        expected += [f"{name}.partial", f"-> {name}", "data"]
    assert steps == expected


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


def test_resuming_a_finished_dataset_appends_samples(tmp_path):
    write_dataset(tmp_path, 6)
    write_dataset(tmp_path, 10, resume=True)
    dataset = ShardDataset(tmp_path)
    assert [dataset[i].key for i in range(10)] == [make_sample(i).key for i in range(10)]


@pytest.mark.parametrize("kind", ["tar gone", "index gone", "tar short", "index torn"])
def test_resume_replaces_only_damaged_shards(folder, kind):
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


def test_resume_removes_the_index_before_a_shard_that_it_lists(folder):
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


def test_resume_with_other_settings_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="already holds shards"):
        write_dataset(folder)
    for change in ({"classes": {"seg": ["sky"]}}, {"source": "elsewhere"}, {"about": {"side": 8}}):
        with pytest.raises(ValueError, match="other class tables, source or notes"):
            write_dataset(folder, resume=True, **change)
    before = bytes_of(folder)
    write_dataset(folder, resume=True)
    assert bytes_of(folder) == before


def _start_writer(folder):
    """Fork a process that writes 40 samples, one about every 3 ms, and resumes an earlier attempt; returns its pid."""
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
    # a process that died holds no lock
    write_dataset(tmp_path, 40, samples_per_shard=3, resume=True)


def test_a_writer_killed_again_and_again_loses_nothing(tmp_path):
    """Killed at random points until it is done, the job ends with the bytes of an uninterrupted one."""
    target, kills, kept = tmp_path / "killed", 0, 0
    rng = random.Random(os.urandom(8))
    while kills < 6:
        child = _start_writer(target)
        # wait until it has finished another shard, which can take a while under load
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
    """In a forked child: write, and exit just before the number-th call that changes the disk."""
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
    """After any step, the folder is a whole dataset or one that resumes to the same bytes."""
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
    # three shards of tar and index, and the table and the index of all: two or more calls each
    assert deaths >= 16
