"""Proves that files are whole or absent, JSON is strict, checksums detect every flip, and locks end with a process.

python -m pytest tests/test_files.py
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from prismer import files
from prismer.files import (
    CHECKSUMS,
    earlier_folder,
    find_damage,
    is_disk_failure,
    new_folder,
    replace_folder,
    replacing,
    sentence,
    take_lock,
    waiting_lock,
    write_atomically,
    write_checksums,
    write_json,
    write_together,
)
from prismer.reading import parse_json, read_json
from tests.faults.disk import full_after


def no_sync(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "write", [lambda path: write_atomically(path, b"x" * 500), lambda path: write_json(path, ["x"] * 99)]
)
@pytest.mark.parametrize("fault", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write, fault):
    path = tmp_path / "a.json"
    path.write_text("old")
    if fault == "fsync":
        monkeypatch.setattr(files.os, "fsync", no_sync)
    with pytest.raises(OSError) as caught, full_after(10 if fault == "write" else 10_000):
        write(path)
    assert is_disk_failure(caught.value)
    assert str(path) in sentence(caught.value) and "free some space" in sentence(caught.value)
    assert os.listdir(tmp_path) == ["a.json"] and path.read_text() == "old"


def test_json_is_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    """A rename is durable only once file and folder are synced."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    write_json(tmp_path / "a.json", {"a": 1})
    assert synced == [str(tmp_path / "a.json.partial"), str(tmp_path)]
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="a.json would hold a number that is not finite"):
        write_json(tmp_path / "a.json", value)
    assert not os.listdir(tmp_path)


def test_a_failed_block_leaves_nothing(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").write_text("")
    with pytest.raises(KeyError), new_folder(tmp_path / "m") as aside:
        (aside / "new").write_text("")
        raise KeyError
    with pytest.raises(KeyError), replacing(tmp_path / "f") as partial:
        partial.write_text("")
        raise KeyError
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == ["old"]
    with new_folder(tmp_path / "m") as aside:
        (aside / "new").write_text("")
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == ["new"]


def test_an_interruption_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    """After a failed second rename the old folder is back; after a kill before the rename it is found."""
    folder, aside = tmp_path / "m", tmp_path / "aside"
    for path, name in ((folder, "old"), (aside, "new")):
        path.mkdir()
        (path / name).write_text("")
    real = files.Path.rename

    def rename(path, target):
        if path == aside:
            raise failure
        return real(path, target)

    monkeypatch.setattr(files.Path, "rename", rename)
    failure = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        replace_folder(aside, folder)
    assert os.listdir(folder) == ["old"] and earlier_folder(folder) is None
    monkeypatch.undo()
    # the state after a kill between the two renames
    folder.rename(tmp_path / ".m-old")
    assert earlier_folder(folder) == tmp_path / ".m-old"
    replace_folder(aside, folder)
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "gives the key 'a' twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"\x00", "is not UTF-8 text"),
        (b"null", "holds null, not an object"),
        (b"5", "holds a number, not an object"),
        (b'"x"', "holds a string, not an object"),
        (b"[]", "holds a list, not an object"),
    ],
)
def test_damaged_json_is_one_sentence(tmp_path, data, words):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(path, dict, "do this")
    text = str(caught.value)
    assert words in text and str(path) in text and text.endswith("do this") and "\n" not in text


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for name, words in {
        "pipe": "is a named pipe",
        ".": "is a folder",
        "none": "is missing",
        "file/x": "is missing",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / name)


def test_a_byte_order_mark_is_ignored():
    assert parse_json(b'\xef\xbb\xbf{"a": 1.5}', "x") == {"a": 1.5}


def test_checksums_detect_a_flip_of_any_bit(tmp_path):
    data = random.randbytes(5000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    assert find_damage(tmp_path) is None, "a folder without checksums is accepted"
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    for _ in range(20):
        bit = random.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(flipped)
        assert find_damage(tmp_path) == "a" and find_damage(tmp_path, ["b", "unknown"]) is None
    (tmp_path / "a").write_bytes(data + b"\0")
    assert find_damage(tmp_path) == "a"
    (tmp_path / "a").unlink()
    assert find_damage(tmp_path) == "a"


@pytest.mark.parametrize("text", ["", "[]", '{"a": 5}', '{"a": {"size": 1}}', '{"a": null}'])
def test_damaged_checksums_are_refused(tmp_path, text):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / CHECKSUMS).write_text(text)
    with pytest.raises(ValueError, match=CHECKSUMS):
        find_damage(tmp_path)


HOLD = """
import sys
from prismer.files import take_lock
lock = take_lock(sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_lock_is_released_when_its_process_dies(tmp_path):
    path = tmp_path / "run" / ".lock"
    path.parent.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"run is in use by process {holder.pid} on "):
            take_lock(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with take_lock(path):
        # a child does not inherit it
        assert json.loads(path.read_text().split()[1]) == os.getpid()


def write_repeatedly(path, times):
    for i in range(times):
        # whole or in pieces
        write_together(path, (b"x" * 500 for _ in range(10)) if i % 2 else b"x" * 5000)


def test_processes_may_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "job.json"
    processes = [
        multiprocessing.get_context("fork").Process(target=write_repeatedly, args=(path, 200)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert path.read_bytes() == b"x" * 5000
    assert [file.name for file in tmp_path.iterdir()] == ["job.json"]


def test_a_waiting_lock_lets_one_process_in_at_a_time(tmp_path):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            with waiting_lock(tmp_path / "lock"), open(tmp_path / "order", "a") as file:
                os.write(tell, b"in")
                time.sleep(0.2)
                file.write("child ")
        finally:
            os._exit(0)
    assert os.read(told, 2) == b"in"
    with waiting_lock(tmp_path / "lock"), open(tmp_path / "order", "a") as file:
        file.write("parent ")
    os.waitpid(child, 0)
    assert (tmp_path / "order").read_text() == "child parent "
