"""The samples that a run leaves out because they cannot be used: counted, named, and kept in metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from prismer.dataloading.feed.loader import Loader
from prismer.training.progress import METRICS, append_metrics, read_metrics
from prismer.training.zero import gather_json

NAMED = 20
"""Samples that the last lines of a run name; metrics.jsonl names all."""


class SkippedSamples:
    """What the loaders of all ranks have left out, those of earlier starts of the run included.

    Args:
        folder: the run folder, whose metrics.jsonl is cut at the step that the run starts at.
        loaders: split -> its loader.
        group: to gather over; rank 0 writes.
    """

    def __init__(self, folder: Path, loaders: Mapping[str, Loader], group: dist.ProcessGroup):
        self.folder, self._loaders, self._group = folder, loaders, group
        self._told = dict.fromkeys(loaders, 0)
        rows = read_metrics(folder) if dist.get_rank() == 0 else []
        self.names = {_name(row) for row in rows if row["kind"] == "skipped"}

    def note(self, step: int) -> None:
        """Write what is new since the last call to metrics.jsonl, one line a sample (a collective)."""
        own = []
        for split, loader in self._loaders.items():
            new = loader.skipped[self._told[split] :]
            self._told[split] += len(new)
            own += [dict(step=step, kind="skipped", split=split, **asdict(one)) for one in new]
        for row in (row for part in gather_json(own, self._group) for row in part):
            # several ranks may have come across the same sample
            if dist.get_rank() == 0 and _name(row) not in self.names:
                self.names.add(_name(row))
                append_metrics(self.folder, row)

    def summary(self) -> str:
        """One sentence that counts and names them (rank 0); "" if there are none."""
        if not self.names:
            return ""
        named = sorted(self.names)
        listed = ", ".join(f"{key or shard} of {split}" for split, shard, key in named[:NAMED])
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        return (
            f"skipped {len(named)} samples that cannot be used: {listed}{more}; "
            f"{self.folder / METRICS} has the reason of each"
        )


def _name(row: dict) -> tuple[str, str, str]:
    return row["split"], row["shard"], row["key"]
