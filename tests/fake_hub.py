"""A Hugging Face hub on loopback: it answers the requests of `huggingface_hub` from files in memory."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/?]+))?/?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
# a repository stores larger files with LFS, which has their SHA-256
_LARGE = 2000


class FakeHub:
    """The hub.

    Attributes:
        repositories: owner/name -> path -> content; may be changed at any time.
        requests: "METHOD path" or "METHOD path bytes=START-", in order.
        breaks: how often the answer with a large file breaks off in its middle.
        corrupt: whether large files arrive with a wrong byte.
        refuse: status and X-Error-Code of all answers; None answers.
        refuse_files: the same for files alone.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.breaks, self.corrupt = 0, False
        self.refuse: tuple[int, str] | None = None
        self.refuse_files: tuple[int, str] | None = None

    def add_folder(self, repository: str, folder: Path, inside: str = "") -> None:
        """Put all files of a folder into a repository."""
        files = self.repositories.setdefault(repository, {})
        for path in folder.rglob("*"):
            if path.is_file():
                files[inside + path.relative_to(folder).as_posix()] = path.read_bytes()

    def taken(self, path: str) -> list[str]:
        """The GET requests for a file."""
        return [request for request in self.requests if request.startswith("GET") and f"/{path}" in request]

    def commit(self, repository: str) -> str:
        files = self.repositories[repository]
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
        return hashlib.sha1(content.encode()).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[str]:
    """Serve `hub` from a thread; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".rstrip())
            file = _FILE.fullmatch(path)
            refused = hub.refuse or (hub.refuse_files if file else None)
            if refused:
                return self.answer(b"", refused[0], {"X-Error-Code": refused[1]})
            if file and file[1] in hub.repositories:
                return self.send_file(file[1], file[3])
            api = _API.fullmatch(path)
            if api and api[1] in hub.repositories:
                return self.answer(json.dumps(self.about(api[1], api[2])).encode(), 200, {})
            return self.answer(b"", 401, {"X-Error-Code": "RepoNotFound"})

        def about(self, repository: str, what: str | None) -> object:
            entries = []
            for path, data in sorted(hub.repositories[repository].items()):
                lfs = None
                if len(data) > _LARGE:
                    lfs = {"size": len(data), "pointerSize": 130}
                oid = hashlib.sha1(data).hexdigest()
                sha = hashlib.sha256(data).hexdigest()
                if what == "tree":
                    entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
                    entries.append(entry | ({"lfs": lfs | {"oid": sha}} if lfs else {}))
                else:
                    entry = {"rfilename": path, "size": len(data), "blobId": oid}
                    entries.append(entry | ({"lfs": lfs | {"sha256": sha}} if lfs else {}))
            if what == "tree":
                return entries
            return {"id": repository, "sha": hub.commit(repository), "siblings": entries, "private": False, "tags": []}

        def send_file(self, repository: str, path: str) -> None:
            data = hub.repositories[repository].get(path)
            if data is None:
                return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            large = len(data) > _LARGE
            headers = {"X-Repo-Commit": hub.commit(repository), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if large:
                headers |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            status, start = 200, 0
            if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                status, start = 206, int(found[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            sent = data[start:]
            if large and hub.corrupt:
                sent = sent[:-1] + bytes([sent[-1] ^ 1])
            broken = large and self.command == "GET" and hub.breaks > 0
            if broken:
                hub.breaks -= 1
            self.answer(sent, status, headers, most=len(sent) // 2 if broken else None)

        def answer(self, data: bytes, status: int, headers: dict[str, str], most: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:most])
            if most is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def connected(hub: FakeHub, folder: Path, monkeypatch) -> Iterator[FakeHub]:
    """Let `huggingface_hub` in this process ask `hub`, with empty caches in `folder`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with serve(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("PRISMER_HOME", str(folder / "prismer"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # small enough that a download of these tests breaks off in its middle
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        # it waits a second before it asks again
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        close_session()
        yield hub
    close_session()
