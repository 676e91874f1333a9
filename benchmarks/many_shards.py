"""A dataset of many shards made of a few: hard links to their tars, with keys and index files of its own."""

import hashlib
import json
import os
from pathlib import Path

from prismer.dataloading.store.index import to_json
from prismer.dataloading.store.sample_table import TABLE_FILE, write_table
from prismer.dataloading.store.shard_files import LocalFiles
from prismer.dataloading.store.shards import read_index


class CopiedShards(LocalFiles):
    """Shards 0 to `count` - 1, of which shard n is a copy of shard n modulo the number of shards in `source`.

    Their index files are made when they are read, so that ten million samples need no gigabyte of JSON.

    Args:
        source: a dataset folder.
        count: of shards.

    Attributes:
        index: the content of `index.json`.
    """

    def __init__(self, source: Path, count: int):
        super().__init__(source)
        self.index = read_index(source)
        self._sidecars = [
            json.loads((source / entry["name"].replace(".tar", ".index.json")).read_bytes())
            for entry in self.index["shards"]
        ]
        # most of the time that an index file takes, spent once
        self._members = [to_json(sidecar.pop("members")) for sidecar in self._sidecars]
        entries = []
        for number in range(count):
            origin = self.index["shards"][number % len(self._sidecars)]
            name = f"shard-{number:06d}.tar"
            digest = hashlib.sha256(self.read(name.replace(".tar", ".index.json"))).hexdigest()
            entries.append({**origin, "name": name, "index_sha256": digest})
        self.index = {**self.index, "shards": entries, "count": sum(entry["count"] for entry in entries)}

    def read(self, name: str) -> bytes:
        """The index file of a shard."""
        number = int(name[6:12])
        sidecar, members = (of[number % len(self._sidecars)] for of in (self._sidecars, self._members))
        keys = [f"{number:06d}_{row:04d}" for row in range(len(sidecar["keys"]))]
        fields = to_json({**sidecar, "shard": f"shard-{number:06d}.tar", "keys": keys})
        return b'%b,"members":%b}' % (fields[:-1], members)


def copy_shards(source: Path, count: int, folder: Path, *, sidecars: bool) -> Path:
    """Write a dataset of `count` shards to `folder`.

    Args:
        source: a dataset folder on the same disk.
        count: of shards.
        folder: to make.
        sidecars: whether to write the index files of the shards, from which nothing reads while there is a table.
    """
    files = CopiedShards(source, count)
    folder.mkdir(parents=True)
    tars = sorted(source.glob("shard-*.tar"))
    for number, entry in enumerate(files.index["shards"]):
        os.link(tars[number % len(tars)], folder / entry["name"])
        if sidecars:
            name = entry["name"].replace(".tar", ".index.json")
            (folder / name).write_bytes(files.read(name))
    data = json.dumps(files.index).encode()
    write_table(files, folder / TABLE_FILE, files.index["shards"], hashlib.sha256(data).hexdigest(), progress=False)
    (folder / "index.json").write_bytes(data)
    return folder
