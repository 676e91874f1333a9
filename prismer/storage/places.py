"""Names of places: local folders are `Path`s, URLs such as s3://bucket/folder are `str`s."""

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote

from prismer.shipped import cache_folder

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def is_url(place: object) -> bool:
    """Whether `place` is a URL of a bucket or server; file:// names a local folder."""
    found = _URL.fullmatch(place) if isinstance(place, str) else None
    return found is not None and found[1].lower() != "file"


def as_place(place: str | Path) -> str | Path:
    """A place as a user gives it: the URL without a slash at its end, or the path of a local file or folder."""
    if is_url(place):
        return place.rstrip("/")
    found = _URL.fullmatch(place) if isinstance(place, str) else None
    # file:///data/shards and file://localhost/data/shards
    return Path(unquote(found[2].removeprefix("localhost"))) if found else Path(place)


def inside(place: str | Path, *names: str) -> str | Path:
    """The place of a file or folder in `place`."""
    place = as_place(place)
    return place.joinpath(*names) if isinstance(place, Path) else "/".join((place, *names))


def scheme_of(url: str) -> str:
    """What stands before ://, in lower case."""
    return _URL.fullmatch(url)[1].lower()


def host_of(url: str) -> str:
    """The server or bucket of a URL, as scheme://name."""
    found = _URL.fullmatch(url)
    return f"{found[1]}://{found[2].partition('/')[0]}"


def kept_folder(kind: str, url: str) -> Path:
    """The folder of this machine that stands for the folder `url`; it need not exist.

    Args:
        kind: what it holds: "models", "runs" or "outgoing".
    """
    # two buckets may hold folders of one name
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", url.rstrip("/").rpartition("/")[2])[:80]
    return cache_folder("storage") / kind / f"{name}-{digest}"
