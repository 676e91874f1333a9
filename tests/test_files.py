"""Files are whole or absent, JSON is strict, checksums see every bit, and a lock dies with its holder.

python -m pytest tests/test_files.py
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys

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
    write_atomically,
    write_checksums,
    write_json,
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


def test_json_is_written_through_to_the_disk(tmp_path, monkeypatch):
    """A rename lasts only once file and folder are synced."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    write_json(tmp_path / "a.json", {"a": 1})
    assert synced == [str(tmp_path / "a.json.partial"), str(tmp_path)]
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_no_number_that_json_lacks(tmp_path, value):
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
    """Killed after the first of two renames, the old folder is found; after a failed second one, it is back."""
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
    # what a kill between the two leaves
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


def test_what_is_no_json_file(tmp_path):
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


def test_a_byte_order_mark_means_nothing():
    assert parse_json(b'\xef\xbb\xbf{"a": 1.5}', "x") == {"a": 1.5}


def test_checksums_see_every_bit(tmp_path):
    data = random.randbytes(5000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    assert find_damage(tmp_path) is None, "a folder without checksums is an old one"
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
def test_damaged_checksums(tmp_path, text):
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


def test_a_lock_dies_with_its_holder(tmp_path):
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
