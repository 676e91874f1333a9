"""Proves on a real S3 server that training data, imports, models and runs in a bucket survive what happens to servers.

pip install --target /tmp/extra s3fs 'moto[server]'
PYTHONPATH=/tmp/extra python -m pytest tests/storage/test_s3.py
"""

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.model import Prismer
from prismer.shipped import cache_folder, shipped_folder
from prismer.storage import objects
from prismer.storage.cache import FileCache
from prismer.storage.objects import StorageError, list_objects
from prismer.training.run_folder import RunFolder
from tests.data.noise_shards import assert_same, bytes_of, make_sample, write_dataset
from tests.data.test_loader import CONFIG, SEMANTICS
from tests.train.test_run_folder import CONFIG as RUN_CONFIG
from tests.train.test_run_folder import put

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

ROOT = Path(__file__).parents[2]
COUNT = 48


class Server:
    """The S3 server, in a process of its own that can be killed and started again."""

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log = folder, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        command = [sys.executable, ROOT / "tests/storage/s3_server.py", str(self.port), self.folder]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        """End the server without a word to its clients."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def get_requests(self) -> list[str]:
        """The names of the tars that were asked for."""
        return re.findall(r"GET (\S+\.tar) ", self.log.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Buckets "data", with a dataset of twelve shards and one with a shard that was cut, and "out", which is empty."""
    folder = tmp_path_factory.mktemp("s3")
    write_dataset(folder / "start" / "data" / "noise", COUNT)
    cut = write_dataset(folder / "start" / "data" / "cut", 8) / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:4000])
    (folder / "start" / "out").mkdir()
    server = Server(folder / "start", folder / "log")
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def settings(server, tmp_path, monkeypatch):
    """What a user sets: the address, credentials, and a cache of the test's own."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(objects, "_LONGEST_PAUSE", 0.2)
    forget_clients()


def forget_clients() -> None:
    """fsspec keeps a client for each process, with the credentials that it found."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def batches(place, each=lambda step: None):
    loader = Loader(ShardDataset(place), config=CONFIG, batch_size=4, semantics=SEMANTICS, seed=3, threads=1)
    found = []
    with closing(loader.epoch(0)) as epoch:
        for step, batch in enumerate(epoch):
            found.append((batch.keys, batch.images.rgb, batch.images.labels))
            each(step)
    return found, loader


def assert_equal(ours, theirs) -> None:
    assert len(ours) == len(theirs) == COUNT // 4
    for (keys, rgb, labels), (other_keys, other_rgb, other_labels) in zip(ours, theirs, strict=True):
        assert keys == other_keys and torch.equal(rgb, other_rgb)
        assert all(torch.equal(labels[name], other_labels[name]) for name in labels)


def test_batches_are_bit_equal_to_local_ones(server):
    ours, loader = batches("s3://data/noise")
    assert loader.skipped == []
    assert_equal(ours, batches(server.folder / "data" / "noise")[0])


def test_a_server_that_is_killed_and_restarted_within_an_epoch_costs_no_sample(server, monkeypatch, capfd):
    folder = server.folder / "data" / "noise"
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    limit = 3 * size + (folder / "index.bin").stat().st_size
    # a cache of a quarter of the set: the epoch needs the server to its end
    monkeypatch.setenv("PRISMER_CACHE_LIMIT", str(limit))
    most, ended = [], threading.Event()

    def watch():
        cache = FileCache(cache_folder("storage") / "shards", limit)
        while not ended.is_set():
            # under the lock nothing comes or goes
            with cache._bookkeeping():
                most.append(sum(path.stat().st_size for path in cache.folder.iterdir()))
            time.sleep(0.002)

    def each(step):
        if step == 3:
            server.kill()
            threading.Timer(1.0, server.start).start()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ours, loader = batches("s3://data/noise", each)
    finally:
        ended.set()
        watcher.join()
    assert loader.skipped == []
    assert_equal(ours, batches(folder)[0])
    assert max(most) <= limit
    told = [line for line in capfd.readouterr().err.splitlines() if "does not answer" in line]
    assert len(told) == 1 and told[0].startswith("s3://data does not answer (")


def test_two_processes_share_what_was_fetched(server):
    script = """
from prismer.dataloading.store.shards import ShardDataset
print(ShardDataset("s3://data/noise")[5].key)
"""
    before = len(server.get_requests())
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "key_005\n"
    assert len(server.get_requests()) - before == 1


def test_a_wrong_bucket_is_one_sentence():
    for use in (lambda: ShardDataset("s3://nobody/noise"), lambda: write_dataset("s3://nobody/new", 1)):
        with pytest.raises(StorageError, match=r"^there is no bucket s3://nobody; check the name, or make the bucket$"):
            use()


def test_missing_credentials_are_one_sentence(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match=r"^no credentials for s3://data were found; set .* AWS_ACCESS_KEY_ID"):
        ShardDataset("s3://data/noise")


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(objects, "_outages", objects._Outages())
    monkeypatch.setattr(objects, "FIRST_PATIENCE", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"^s3://data did not answer for \d+ seconds \(.*check the address"):
        ShardDataset("s3://data/noise")


def test_a_shard_that_was_cut_is_one_sentence():
    dataset = ShardDataset("s3://data/cut")
    assert_same(dataset[3], make_sample(3))
    with pytest.raises(
        CorruptSample, match=r"shard-000001.tar cannot be read: .*it has 4000 bytes, not \d+\); copy it"
    ):
        dataset[4]


_WRITER = """
import sys, time
from tests.data.noise_shards import CLASSES, make_sample
from prismer.dataloading.store.shards import ShardWriter
writer = ShardWriter(sys.argv[1], classes=CLASSES, source="made up", samples_per_shard=4, resume=True)
for i in range(10):
    writer.write(make_sample(i))
    if i == 9:
        print("written", flush=True)
        time.sleep(60)
"""


def test_a_job_that_was_killed_resumes_from_the_bucket(tmp_path):
    url = "s3://out/killed"
    command = [sys.executable, "-c", _WRITER, url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.kill()
    held = list_objects(url)
    assert sorted(held) == [f"shard-00000{i}.{end}" for i in range(2) for end in ("index.json", "tar")]
    write_dataset(url, resume=True)
    local = bytes_of(write_dataset(tmp_path / "local"))
    assert {name: objects.read_object(f"{url}/{name}") for name in list_objects(url)} == local
    # the two shards of the killed process are those that it uploaded
    assert {name: list_objects(url)[name] for name in held} == held
    assert [path.name for path in (cache_folder("storage") / "outgoing").rglob("*")] == []


def test_a_model_and_a_run_are_kept_in_a_bucket(monkeypatch):
    model = Prismer.from_pretrained("tiny")
    model.save_pretrained("s3://out/tiny")
    loaded = Prismer.from_pretrained("s3://out/tiny")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    run = RunFolder("s3://out/runs/a")
    run.claim()
    run.reconcile_settings(RUN_CONFIG, lambda: "fp32")
    for step in range(1, 4):
        put(run, step)
    monkeypatch.setenv("PRISMER_HOME", os.environ["PRISMER_HOME"] + "-2")
    other = RunFolder("s3://out/runs/a")
    other.claim()
    other.check_files()
    assert other.path != run.path and other.last().name == "step-00000003"
    assert len(list(other.checkpoints.glob("step-*"))) == 2


def test_a_web_server_without_ranges_is_read(server, tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=server.folder / "data")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{web.server_port}"
            ours, loader = batches(f"{url}/noise")
            with pytest.raises(ValueError, match=f"{url}/none is not a finished dataset"):
                ShardDataset(f"{url}/none")
            with pytest.raises(StorageError, match="can be read but not written"):
                write_dataset(f"{url}/new", 1)
        finally:
            web.shutdown()
            thread.join()
    assert loader.skipped == []
    assert_equal(ours, batches(server.folder / "data" / "noise")[0])


def test_a_model_is_read_from_a_web_server():
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=shipped_folder("tiny").parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            loaded = Prismer.from_pretrained(f"http://127.0.0.1:{web.server_port}/tiny")
        finally:
            web.shutdown()
            thread.join()
    model = Prismer.from_pretrained("tiny")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
