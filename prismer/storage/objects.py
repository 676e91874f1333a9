"""Objects of buckets and servers, read and written whole through fsspec, with patience while a server is away.

A server that does not answer is asked again, with growing pauses, so that a job survives its restart. What waiting
cannot mend (a missing package, a wrong bucket, no credentials) is one sentence. Only an object that is not there is a
FileNotFoundError. The client libraries find the credentials where they always look.
"""

import errno
import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from prismer.errors import MachineError
from prismer.storage.places import host_of, scheme_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# seconds that a server which has answered before may be silent: longer than a restart takes
PATIENCE = 600.0
# the same for a server that has never answered: its address may be mistyped
FIRST_PATIENCE = 30.0
# bytes of one request of a download, and so the most that a broken connection costs
CHUNK = 16 << 20
_LONGEST_PAUSE = 10.0
# what the file systems call the checksum of an object and the time at which it was written
_VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id"),
    *("LastModified", "Last-Modified", "updated", "mtime"),
)
# HTTP answers that waiting may change
_TRANSIENT = (408, 425, 429, *range(500, 600))
# top packages of the errors that client libraries raise when a connection fails
_CLIENTS = set(
    "aiohttp aiobotocore botocore fsspec s3fs gcsfs google huggingface_hub httpx httpcore requests urllib3".split()
)

Result = TypeVar("Result")


class StorageError(MachineError):
    """A bucket or server that cannot be used; one sentence for the user."""


def read_object(url: str) -> bytes:
    """The content of an object.

    Raises:
        FileNotFoundError: if there is none.
    """
    return _patiently(url, lambda fs, path: fs.cat_file(path))


def describe_object(url: str) -> tuple[int, str]:
    """The size of an object in bytes, and a text that changes when the object is written again.

    Raises:
        FileNotFoundError: if there is none.
    """
    info = _patiently(url, lambda fs, path: fs.info(path))
    # a prefix of other objects is a folder to fsspec; a server may not tell the size of what it makes on the fly
    if info.get("type") == "directory" or info.get("size") is None:
        raise _absent(url)
    return info["size"], _version(info)


def _version(info: dict) -> str:
    known = [(name, str(info[name])) for name in _VERSION_FIELDS if info.get(name)]
    return hashlib.sha256(repr((info["size"], known)).encode()).hexdigest()


def list_objects(url: str) -> dict[str, tuple[int, str]]:
    """All objects in the folder `url`, by their names in it ("index.json", "preview/shard-000000.jpg").

    Returns:
        The size of each, and a text that changes when it is written again; {} if there is no such folder.
    """

    def action(fs: "AbstractFileSystem", path: str) -> dict[str, tuple[int, str]]:
        root = path.rstrip("/") + "/"
        found = fs.find(path, detail=True).items()
        return {name.removeprefix(root): (info["size"], _version(info)) for name, info in found if name != root}

    try:
        return _patiently(url, action)
    except FileNotFoundError:
        return {}


def download_object(url: str, file: BinaryIO, size: int) -> Iterator[bytes]:
    """Append the rest of an object to `file`, which holds its first bytes, and yield each piece as it is written.

    Args:
        url: the object.
        file: open for writing, at the end of what it holds.
        size: of the object.

    Raises:
        OSError: if the object is absent (FileNotFoundError) or shorter than `size`, or the disk is full.
    """
    offset = file.tell()
    while offset < size:
        piece = _read_range(url, offset, min(offset + CHUNK, size))
        if not piece:
            raise OSError(errno.EBADMSG, f"it has {offset} bytes, not {size}", url)
        # a server without ranges sends the whole object, which may be longer
        piece = piece[: size - offset]
        file.write(piece)
        offset += len(piece)
        yield piece


def upload_file(path: Path, url: str) -> None:
    """Write a whole file as an object, and check its size there."""
    size = path.stat().st_size

    def action(fs: "AbstractFileSystem", there: str) -> None:
        fs.put_file(str(path), there)
        written = fs.info(there)["size"]
        if written != size:
            raise OSError(errno.EIO, f"{written} of {size} bytes were written", url)

    _write(url, action)


def write_object(url: str, data: bytes) -> None:
    """Write `data` as an object."""
    _write(url, lambda fs, path: fs.pipe_file(path, data))


def remove_object(url: str) -> None:
    """Remove an object; one that is absent is no error."""
    try:
        _write(url, lambda fs, path: fs.rm_file(path))
    except FileNotFoundError:
        return


def _write(url: str, action: Callable[["AbstractFileSystem", str], Result]) -> Result:
    if scheme_of(url) in ("http", "https"):
        raise StorageError(f"{url} can be read but not written; give a local folder or a bucket")
    return _patiently(url, action)


def _read_range(url: str, start: int, end: int) -> bytes:
    """The bytes `start` to `end` of an object, fewer if it ends before, more if the server does not know ranges."""

    def action(fs: "AbstractFileSystem", path: str) -> bytes:
        try:
            data = fs.cat_file(path, start=start, end=end)
        except Exception as error:
            # nothing lies beyond `start`
            if _status(error) == 416:
                return b""
            raise
        return data[start:] if len(data) > end - start else data

    return _patiently(url, action)


def _patiently(url: str, action: Callable[["AbstractFileSystem", str], Result]) -> Result:
    """The result of `action`, which is called again while the server of `url` does not answer.

    Raises:
        FileNotFoundError: if there is no such object.
        StorageError: if the server refuses, or stays away for too long.
    """
    began, pause = time.monotonic(), 0.1
    while True:
        try:
            fs, path = _open(url)
            result = action(fs, path)
        except Exception as error:
            if isinstance(error, StorageError):
                raise
            _refuse(error, url)
            reason = _reason(error)
        else:
            _outages.end(url)
            return result
        waited, patience = time.monotonic() - began, _outages.patience(url)
        if waited > patience:
            raise StorageError(
                f"{host_of(url)} did not answer for {waited:.0f} seconds ({reason}); check the address and the "
                f"connection, and give the command again"
            )
        _outages.begin(url, reason)
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, _LONGEST_PAUSE)


class _Outages:
    """Which servers have answered, and which are away; each outage is one line on stderr, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._away: set[str] = set()

    def patience(self, url: str) -> float:
        """For how many seconds the server of `url` may be silent."""
        return PATIENCE if host_of(url) in self._known else FIRST_PATIENCE

    def begin(self, url: str, reason: str) -> None:
        """The server did not answer."""
        host = host_of(url)
        with self._lock:
            if host in self._away:
                return
            self._away.add(host)
        text = f"{host} does not answer ({reason}); trying again for {self.patience(url):.0f} seconds\n"
        # one write, so that the lines of several processes do not mix; a closed terminal stops nothing
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def end(self, url: str) -> None:
        """The server has answered."""
        host = host_of(url)
        if host not in self._known or host in self._away:
            with self._lock:
                self._known.add(host)
                self._away.discard(host)


_outages = _Outages()


def _open(url: str) -> tuple["AbstractFileSystem", str]:
    """The fsspec file system of a URL, and the name of the object in it; fsspec keeps one for each process."""
    scheme = scheme_of(url)
    try:
        from fsspec.core import url_to_fs

        # without the listings that fsspec would keep: other processes write too
        return url_to_fs(url, use_listings_cache=False, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        ours = scheme in ("s3", "s3a", "http", "https")
        remedy = "run `pip install 'prismer-vlm[storage]'`" if ours else (str(error).splitlines() or ["install it"])[0]
        raise StorageError(f"{scheme}:// needs a package that is not installed; {remedy}") from None
    except ValueError as error:
        raise StorageError(f"{url} cannot be used ({error}); give s3://, gs://, hf://, https:// or a folder") from None


# the clients must not wait on their own: this file says that it waits, and for how long
_OPTIONS: dict[str, dict] = dict.fromkeys(("s3", "s3a"), {"config_kwargs": {"retries": {"max_attempts": 1}}})


def _refuse(error: Exception, url: str) -> None:
    """Raise what waiting cannot mend; return for an error that it may."""
    status, names = _status(error), {type(one).__name__ for one in _chain(error)}
    if "NoSuchBucket" in _codes(error):
        raise StorageError(f"there is no bucket {host_of(url)}; check the name, or make the bucket") from None
    if {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"} & names:
        raise StorageError(
            f"no credentials for {host_of(url)} were found; set those of its client library, for S3 AWS_ACCESS_KEY_ID "
            f"and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials"
        ) from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise StorageError(
            f"{host_of(url)} refuses access to {url} ({_reason(error)}); check the credentials and their rights"
        ) from None
    # a server that cannot be reached looks like an absent object to fsspec's http
    lost = status is None and any(_is_connection_failure(one) for one in _chain(error)[1:])
    if isinstance(error, FileNotFoundError) and not lost and status not in _TRANSIENT:
        raise _absent(url) from None
    if status is not None and 400 <= status < 500 and status not in _TRANSIENT:
        raise StorageError(f"{host_of(url)} refuses {url} ({_reason(error)}); check the address") from None
    if not _is_connection_failure(error) and not isinstance(error, OSError | EOFError):
        raise error


def _absent(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)


def _is_connection_failure(error: BaseException) -> bool:
    package = type(error).__module__.partition(".")[0]
    return package in _CLIENTS or isinstance(error, ConnectionError | TimeoutError)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(error: Exception) -> int | None:
    """The HTTP status that an error, or what caused it, tells."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = (
                getattr(response, "status_code", None) or getattr(one, "status", None) or getattr(one, "code", None)
            )
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _codes(error: Exception) -> set[str]:
    """The names that S3 gives to an error."""
    responses = [getattr(one, "response", None) for one in _chain(error)]
    return {response.get("Error", {}).get("Code", "") for response in responses if isinstance(response, dict)}


def _reason(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
