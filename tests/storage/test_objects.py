"""Proves that a server that is away is waited for, and that what waiting cannot mend is one sentence.

python -m pytest tests/storage/test_objects.py
"""

import io

import pytest

from prismer.storage import objects
from prismer.storage.objects import (
    StorageError,
    describe_object,
    download_object,
    list_objects,
    read_object,
    remove_object,
    upload_file,
    write_object,
)
from tests.storage.bucket import BucketFileSystem, Outage, requests


def download(url: str, size: int, begun: bytes = b"") -> bytes:
    file = io.BytesIO()
    file.write(begun)
    for _ in download_object(url, file, size):
        pass
    return file.getvalue()


def fail_with(monkeypatch, error: Exception) -> None:
    def fault(operation, path):
        raise error

    monkeypatch.setattr(BucketFileSystem, "fault", staticmethod(fault))


def test_objects_are_written_listed_read_and_removed(bucket, tmp_path):
    write_object(f"{bucket}/folder/a", b"one")
    (tmp_path / "b").write_bytes(b"three")
    upload_file(tmp_path / "b", f"{bucket}/folder/inner/b")
    sizes = {name: size for name, (size, _) in list_objects(f"{bucket}/folder").items()}
    assert sizes == {"a": 3, "inner/b": 5}
    assert read_object(f"{bucket}/folder/inner/b") == b"three"
    remove_object(f"{bucket}/folder/a")
    remove_object(f"{bucket}/folder/a")
    assert list(list_objects(f"{bucket}/folder")) == ["inner/b"] and list_objects(f"{bucket}/none") == {}


def test_an_object_that_is_absent_is_a_file_not_found(bucket):
    for look in (read_object, describe_object):
        with pytest.raises(FileNotFoundError):
            look(f"{bucket}/none")
    assert len(BucketFileSystem.requests) == 2


def test_an_object_that_is_written_again_has_another_version(bucket):
    write_object(f"{bucket}/a", b"one")
    before = describe_object(f"{bucket}/a")
    assert describe_object(f"{bucket}/a") == before == list_objects(bucket)["a"]
    write_object(f"{bucket}/a", b"two")
    assert describe_object(f"{bucket}/a") != before


def test_a_server_that_is_away_is_waited_for_and_named_once(bucket, monkeypatch, capsys):
    write_object(f"{bucket}/a", b"one")
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(count=4))
    assert read_object(f"{bucket}/a") == b"one"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "does not answer" in lines[0] and "connection refused" in lines[0]
    # the next outage is told again
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(count=2))
    assert read_object(f"{bucket}/a") == b"one"
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_server_that_stays_away_ends_the_job(bucket, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_PATIENCE", 0.2)
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(count=10**9))
    with pytest.raises(StorageError, match=r"did not answer for \d+ seconds \(.*refused\); check the address"):
        read_object(f"{bucket}/a")


def test_a_server_that_answered_before_is_given_more_time(bucket, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_PATIENCE", -1.0)
    write_object(f"{bucket}/a", b"one")
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(count=3))
    assert read_object(f"{bucket}/a") == b"one"


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, code: str, status: int):
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class NoCredentialsError(Exception):
    """As botocore's."""


class HTTPStatusError(Exception):
    """As the errors of aiohttp, which have a status."""

    def __init__(self, status: int):
        super().__init__(f"{status}")
        self.status = status


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (caused_by(FileNotFoundError("x"), ClientError("NoSuchBucket", 404)), "there is no bucket"),
        (NoCredentialsError("Unable to locate credentials"), "no credentials for .*AWS_ACCESS_KEY_ID"),
        (caused_by(PermissionError("Forbidden"), ClientError("AccessDenied", 403)), "refuses access .*Forbidden"),
        (HTTPStatusError(401), "refuses access"),
        (HTTPStatusError(400), "check the address"),
    ],
    ids=["bucket", "credentials", "forbidden", "unauthorised", "bad request"],
)
def test_what_waiting_cannot_mend_is_one_sentence(bucket, monkeypatch, error, sentence):
    fail_with(monkeypatch, error)
    with pytest.raises(StorageError, match=sentence) as caught:
        read_object(f"{bucket}/a")
    assert len(BucketFileSystem.requests) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        caused_by(FileNotFoundError("x"), ConnectionResetError("reset")),
        caused_by(FileNotFoundError("x"), HTTPStatusError(503)),
        caused_by(OSError("slow down"), ClientError("SlowDown", 503)),
        TimeoutError(),
    ],
    ids=["hidden loss", "hidden 503", "slow down", "timeout"],
)
def test_a_failure_that_may_pass_is_no_absent_object(bucket, monkeypatch, error):
    write_object(f"{bucket}/a", b"one")
    left = [3]

    def fault(operation, path):
        left[0] -= 1
        if left[0] >= 0:
            raise error

    monkeypatch.setattr(BucketFileSystem, "fault", staticmethod(fault))
    assert read_object(f"{bucket}/a") == b"one"


def test_a_mistake_in_the_code_is_not_repeated(bucket, monkeypatch):
    fail_with(monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError):
        read_object(f"{bucket}/a")
    assert len(BucketFileSystem.requests) == 1


def test_a_storage_that_fsspec_does_not_know_is_named():
    with pytest.raises(StorageError, match=r"nope://x/y cannot be used .*give s3://, gs://, hf://"):
        read_object("nope://x/y")


def test_a_web_server_is_not_written():
    with pytest.raises(StorageError, match="can be read but not written"):
        write_object("https://host/x", b"")


def test_a_download_goes_on_where_it_broke_off(bucket, monkeypatch):
    monkeypatch.setattr(objects, "CHUNK", 10)
    write_object(f"{bucket}/a", bytes(range(95)))
    assert download(f"{bucket}/a", 95, begun=bytes(range(20))) == bytes(range(95))
    assert len(requests("read")) == 8
    monkeypatch.setattr(BucketFileSystem, "fault", Outage(after=3, count=2))
    assert download(f"{bucket}/a", 95) == bytes(range(95))
    assert len(requests("read")) == 8 + 10 + 2


def test_a_server_without_ranges_sends_the_whole_object_once(bucket, monkeypatch):
    monkeypatch.setattr(objects, "CHUNK", 10)
    write_object(f"{bucket}/a", bytes(range(95)))
    whole = BucketFileSystem.cat_file
    monkeypatch.setattr(BucketFileSystem, "cat_file", lambda self, path, start=None, end=None: whole(self, path))
    assert download(f"{bucket}/a", 95) == bytes(range(95))
    assert len(requests("read")) == 1
    assert download(f"{bucket}/a", 95, begun=bytes(range(20))) == bytes(range(95))


@pytest.mark.parametrize("begun", [b"", bytes(range(50))])
def test_an_object_that_is_too_short_is_refused(bucket, begun):
    write_object(f"{bucket}/a", bytes(range(50)))
    with pytest.raises(OSError, match="it has 50 bytes, not 60"):
        download(f"{bucket}/a", 60, begun)


def test_nothing_beyond_the_end_of_an_object_may_be_an_error_of_the_server(bucket, monkeypatch):
    write_object(f"{bucket}/a", bytes(50))
    whole = BucketFileSystem.cat_file

    def cat_file(self, path, start=None, end=None):
        if start >= 50:
            raise OSError("range") from ClientError("InvalidRange", 416)
        return whole(self, path, start, end)

    monkeypatch.setattr(BucketFileSystem, "cat_file", cat_file)
    with pytest.raises(OSError, match="it has 50 bytes, not 60"):
        download(f"{bucket}/a", 60)


def test_an_upload_that_arrives_short_is_repeated(bucket, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    put, left = BucketFileSystem.put_file, [2]

    def put_file(self, source, path, **options):
        put(self, source, path)
        left[0] -= 1
        if left[0] >= 0:
            with open(self._strip_protocol(path), "r+b") as file:
                file.truncate(40)

    monkeypatch.setattr(BucketFileSystem, "put_file", put_file)
    upload_file(tmp_path / "a", f"{bucket}/a")
    assert read_object(f"{bucket}/a") == bytes(100) and len(requests("write")) == 3
