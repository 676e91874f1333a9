"""Samples that a run skips because they cannot be used: counted, named, and recorded in metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from prismer.dataloading.feed.loader import Loader
from prismer.training.progress import METRICS, append_metrics, read_metrics
from prismer.training.zero import gather_json

# how many samples the last line of a run names; metrics.jsonl names all
NAMED = 20


class SkippedSamples:
    """The samples that the loaders of all ranks skipped, including those of earlier starts of the run.

    Args:
        folder: the run folder; its metrics.jsonl ends at the step from which the run starts or resumes.
        loaders: split -> its loader.
        group: process group for tensors on the host; rank 0 writes.
    """

    def __init__(self, folder: Path, loaders: Mapping[str, Loader], group: dist.ProcessGroup) -> None:
        self.folder, self._loaders, self._group = folder, loaders, group
        self._recorded = dict.fromkeys(loaders, 0)
        rows = read_metrics(folder) if dist.get_rank() == 0 else []
        self.names = {_name(row) for row in rows if row["kind"] == "skipped"}

    def record(self, step: int) -> None:
        """Append the samples skipped since the last call to metrics.jsonl, one line for each (collective)."""
        own = []
        for split, loader in self._loaders.items():
            new = loader.skipped[self._recorded[split] :]
            self._recorded[split] += len(new)
            own += [dict(step=step, kind="skipped", split=split, **asdict(one)) for one in new]
        for row in (row for part in gather_json(own, self._group) for row in part):
            # several ranks may have skipped the same sample
            if dist.get_rank() == 0 and _name(row) not in self.names:
                self.names.add(_name(row))
                append_metrics(self.folder, row)

    def summary(self) -> str:
        """One sentence that counts and names the samples (rank 0); "" if there are none."""
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
