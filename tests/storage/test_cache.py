"""Proves that the cache never holds more than its limit, removes no file in use, and never shows part of a file.

python -m pytest tests/storage/test_cache.py
"""

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prismer.errors import InputError
from prismer.storage import cache as cache_module
from prismer.storage.cache import FileCache, parse_bytes
from prismer.storage.objects import StorageError

ROOT = Path(__file__).parents[2]
SIZE = 1000


def content(name: str, size: int = SIZE) -> bytes:
    return (name.encode() * size)[:size]


def filler(name: str, size: int = SIZE):
    def fill(file):
        begun = file.seek(0, os.SEEK_END)
        file.write(content(name, size)[begun:])

    return fill


def read(cache: FileCache, name: str, size: int = SIZE) -> bytes:
    with cache.open(name, size, filler(name, size)) as file:
        return file.read()


def age(cache: FileCache, name: str, seconds: float) -> None:
    os.utime(cache.folder / name, (time.time() - seconds,) * 2)


def held(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {".lock"}


@pytest.fixture
def cache(tmp_path) -> FileCache:
    return FileCache(tmp_path / "cache", 3 * SIZE)


def test_a_file_is_fetched_once(cache):
    assert read(cache, "a") == content("a") and cache.holds("a")
    with cache.open("a", SIZE, lambda file: pytest.fail("fetched again")) as file:
        assert file.read() == content("a")


def test_the_file_that_was_not_used_for_the_longest_time_makes_room(cache):
    for i, name in enumerate("abc"):
        read(cache, name)
        age(cache, name, 100 - i)
    # reading a makes it the newest
    read(cache, "a")
    read(cache, "d")
    assert held(cache) == {"a", "c", "d"}
    read(cache, "long", 2 * SIZE)
    assert held(cache) == {"d", "long"}


def test_a_file_that_is_open_stays(cache):
    with cache.open("a", SIZE, filler("a")) as file:
        age(cache, "a", 100)
        for name in "bcd":
            read(cache, name)
        assert held(cache) == {"a", "c", "d"}
        assert file.read() == content("a")
    age(cache, "a", 100)
    read(cache, "e")
    assert "a" not in held(cache)


def test_a_file_that_is_removed_before_it_is_locked_is_fetched_again(cache, monkeypatch):
    read(cache, "a")
    flock, removed = fcntl.flock, []

    def late(file, operation):
        if operation == fcntl.LOCK_SH and not removed:
            removed.append("a")
            os.unlink(cache.folder / "a")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with cache.open("a", SIZE, filler("a")) as file:
        # a file without a name would count for nothing
        assert removed and os.fstat(file.fileno()).st_nlink == 1 and file.read() == content("a")


def test_files_in_use_that_leave_no_room_are_waited_for(cache, monkeypatch):
    files = [cache.open(name, SIZE, filler(name)) for name in "abc"]
    timer = threading.Timer(0.2, files[1].close)
    timer.start()
    assert read(cache, "d") == content("d")
    assert held(cache) == {"a", "c", "d"}
    files.append(cache.open("d", SIZE, filler("d")))
    monkeypatch.setattr(cache_module, "PATIENCE", 0.1)
    with pytest.raises(StorageError, match=r"files in use fill the cache .*; raise PRISMER_CACHE_LIMIT"):
        read(cache, "e")
    for file in files:
        file.close()


def test_a_file_larger_than_the_cache_is_refused(cache):
    with pytest.raises(StorageError, match="3,001 bytes does not fit .* 3,000; set PRISMER_CACHE_LIMIT"):
        read(cache, "a", 3 * SIZE + 1)


def test_a_failed_download_is_not_shown_and_goes_on(cache):
    def broken(file):
        file.write(content("a")[:400])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        cache.open("a", SIZE, broken)
    # the user is told which disk is full
    assert caught.value.filename == str(cache.folder / "a.1000.partial") and not cache.holds("a")
    seen = []

    def rest(file):
        seen.append(file.seek(0, os.SEEK_END))
        filler("a")(file)

    with cache.open("a", SIZE, rest) as file:
        assert seen == [400] and file.read() == content("a")


def test_a_download_counts_with_its_whole_size_and_its_rest_makes_room(cache):
    read(cache, "a")
    read(cache, "b")
    age(cache, "a", 100)
    with pytest.raises(ZeroDivisionError):
        cache.open("c", 2 * SIZE, lambda file: file.write(b"c" * 10) // 0)
    assert held(cache) == {"b", "c.2000.partial"}
    os.utime(cache.folder / "c.2000.partial", (1, 1))
    read(cache, "d")
    assert held(cache) == {"b", "d"}


def test_a_file_that_two_threads_need_is_fetched_by_one(cache):
    fetched = []

    def slow(file):
        fetched.append(1)
        time.sleep(0.1)
        filler("a")(file)

    def work():
        with cache.open("a", SIZE, slow) as file:
            assert file.read() == content("a")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [1]


_WORKER = """
import os, random, sys, time
from pathlib import Path
from prismer.storage.cache import FileCache
cache, rng = FileCache(Path(sys.argv[1]), 5000), random.Random(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    name = rng.choice("abcdefghij")
    size = 1000 + 100 * (ord(name) - ord("a"))
    def fill(file):
        begun = file.seek(0, os.SEEK_END)
        for i in range(begun, size):
            file.write(name.encode())
            if i % 300 == 0:
                file.flush()
                time.sleep(rng.random() / 1000)
    with cache.open(name, size, fill) as file:
        assert os.pread(file.fileno(), 9999, 0) == name.encode() * size, name
        time.sleep(rng.random() / 500)
"""


def test_several_processes_stay_below_the_limit_and_one_may_be_killed(tmp_path):
    folder, total = tmp_path / "cache", []
    command = [sys.executable, "-c", _WORKER, str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(seed), "1.5"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in range(3)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    began, cache = time.monotonic(), FileCache(folder, 5000)
    while any(worker.poll() is None for worker in workers):
        # under the lock nothing comes or goes
        with cache._bookkeeping():
            total.append(sum(path.stat().st_size for path in folder.iterdir()))
        if time.monotonic() - began > 0.5:
            workers[0].send_signal(signal.SIGKILL)
        time.sleep(0.002)
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0], errors
    assert 4000 < max(total) <= 5000
    # what the killed one left is in nobody's way
    for name in random.Random(0).choices("abcdefghij", k=30):
        size = 1000 + 100 * (ord(name) - ord("a"))
        assert read(cache, name, size) == content(name, size)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("50GB", 50 * 10**9), ("1.5 tb", 15 * 10**11), ("7 M", 7_000_000), ("3kB", 3000)]
)
def test_limits_are_numbers_of_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "fifty", "-1", "5 PB", "1e9"])
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="give a number of bytes such as 50GB"):
        parse_bytes(text)
