"""A stand-in for a bucket: an fsspec file system in a folder, whose requests are counted and can be made to fail."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class BucketFileSystem(LocalFileSystem):
    """bucket:///folder/name is the file /folder/name; an object appears when it is whole."""

    protocol = "bucket"
    # called with the operation and the path of each request; what it raises is the answer
    fault: Callable[[str, str], None] | None = None
    requests: list[tuple[str, str]] = []

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("bucket://")

    def _request(self, operation, path):
        BucketFileSystem.requests.append((operation, os.path.basename(path)))
        if BucketFileSystem.fault is not None:
            BucketFileSystem.fault(operation, path)

    def cat_file(self, path, start=None, end=None, **options):
        path = self._strip_protocol(path)
        self._request("read", path)
        return super().cat_file(path, start, end, **options)

    def info(self, path, **options):
        self._request("info", self._strip_protocol(path))
        return super().info(path, **options)

    def find(self, path, detail=False, **options):
        path = self._strip_protocol(path)
        self._request("list", path)
        files = [Path(root) / name for root, _, names in os.walk(path) for name in names]
        return {str(file): LocalFileSystem.info(self, str(file)) for file in files if file.name[0] != "."}

    def put_file(self, source, path, **options):
        path = Path(self._strip_protocol(path))
        self._request("write", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".{path.name}")
        shutil.copyfile(source, whole)
        os.replace(whole, path)

    def pipe_file(self, path, value, **options):
        path = Path(self._strip_protocol(path))
        self._request("write", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)

    def rm_file(self, path):
        path = self._strip_protocol(path)
        self._request("remove", path)
        os.remove(path)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)


class Outage:
    """A fault: after `after` requests, the next `count` find no server."""

    def __init__(self, after: int = 0, count: int = 1):
        self.after, self.count, self.seen = after, count, 0

    def __call__(self, operation: str, path: str) -> None:
        self.seen += 1
        if self.after < self.seen <= self.after + self.count:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")


def requests(operation: str) -> list[str]:
    """The names of the objects of all requests of one kind, in order."""
    return [name for kind, name in BucketFileSystem.requests if kind == operation]
