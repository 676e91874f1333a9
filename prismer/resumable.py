"""Jobs whose result is a long list: killed at any time they resume, and any number of processes share them.

    job = ResumableJob(folder, notes, count=len(items), part_size=64, rank=rank, world=world)
    for number in job.missing_parts():
        job.write_part(number, [row_of(items[i]) for i in job.items_of(number)])
    parts_missing = job.finish(combine)

Part k holds the rows of items k n .. (k + 1) n - 1; process r of w makes the parts with k mod w = r. A part is a file,
whole or absent. A job that was killed therefore resumes at its first absent part, even with another number of
processes, and ends with the same bytes, provided that the rows of a part depend on its items alone. No process waits
for another: the one that finds all parts present combines them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from prismer.errors import InputError, check_count, listed
from prismer.files import write_together
from prismer.reading import is_text, parse_json, read_bytes, read_json

JOB_FILE, PARTS = "job.json", "parts"


def json_line(row: dict) -> str:
    """A row as one line of JSON: readable where UTF-8 can hold its texts, else in escapes."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # a lone surrogate stands for a byte of a file name that is not UTF-8
    return text if is_text(text) else json.dumps(row, allow_nan=False)


class ResumableJob:
    """A list of rows that is made part by part.

    Args:
        folder: where `job.json` and the parts lie; it may hold other files.
        notes: what decides the rows (the model, the data, every option) and what made them, as JSON values. A job is
            only resumed with the same notes.
        count: number of items.
        part_size: items of a part. A part is what a killed job loses at most.
        rank, world: the index of this process, and the number of processes.

    Attributes:
        folder, count, part_size: the arguments.

    Raises:
        ValueError: if `folder` holds another job.
    """

    def __init__(
        self, folder: str | Path, notes: dict[str, Any], *, count: int, part_size: int, rank: int = 0, world: int = 1
    ) -> None:
        check_count("count", count)
        check_count("part_size", part_size)
        if not 0 <= rank < world:
            raise InputError(f"rank is {rank} of {world}; ranks count from 0")
        self.folder, self.count, self.part_size = Path(folder), count, part_size
        self.num_parts = -(-count // part_size)
        self.mine = range(rank, self.num_parts, world)
        self._claim_folder({**notes, "items": count, "part_size": part_size})
        if self.finished:
            # what a process that was killed while it removed the parts has left
            shutil.rmtree(self._combined, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether the parts have been combined."""
        return (self.folder / JOB_FILE).is_file() and not (self.folder / PARTS).is_dir()

    def missing_parts(self) -> list[int]:
        """The parts that this process has yet to make, in order."""
        return [] if self.finished else [number for number in self.mine if not self._part(number).is_file()]

    def count_missing(self) -> int:
        """The number of parts that no process has made yet; 0 if the job is finished."""
        missing = sum(not self._part(number).is_file() for number in range(self.num_parts))
        # asked last: the process that combines the parts removes them
        return 0 if self.finished else missing

    def items_of(self, number: int) -> range:
        """The items of a part."""
        return range(number * self.part_size, min((number + 1) * self.part_size, self.count))

    def write_part(self, number: int, rows: Sequence[dict]) -> None:
        """Store the rows of a part, whole or not at all."""
        write_together(self._part(number), "".join(f"{json_line(row)}\n" for row in rows).encode())

    def finish(self, combine: Callable[[Iterator[dict]], None]) -> int:
        """Combine the rows if every part is present.

        Args:
            combine: takes all rows in the order of the items and writes the result. Two processes may call it at the
                same time, with the same rows: it must write each file with `write_together`.

        Returns:
            The number of parts that other processes have yet to make; 0 if the job is finished.
        """
        missing = self.count_missing()
        if not missing and not self.finished:
            try:
                combine(chain.from_iterable(map(self._rows_of, range(self.num_parts))))
                self._remove_parts()
            except FileNotFoundError:
                # another process combined the parts at the same time and has removed them
                if not self.finished:
                    raise
        return 0 if self.finished else missing

    def _part(self, number: int) -> Path:
        return self.folder / PARTS / f"{number:06d}.jsonl"

    @property
    def _combined(self) -> Path:
        return self.folder / f".{PARTS}-combined"

    def _rows_of(self, number: int) -> Iterator[dict]:
        path = self._part(number)
        for line in read_bytes(path).splitlines():
            yield parse_json(line, path, "delete this part and give the command again")

    def _remove_parts(self) -> None:
        # renamed first: a folder that lost only some of its parts would look like a job to resume
        shutil.rmtree(self._combined, ignore_errors=True)
        os.replace(self.folder / PARTS, self._combined)
        shutil.rmtree(self._combined)

    def _claim_folder(self, notes: dict[str, Any]) -> None:
        """Write the notes into a new folder, or compare them with those of the job that began it."""
        path = self.folder / JOB_FILE
        if not path.is_file():
            if not self.mine:
                # a process without work might come when the others have finished
                return
            (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
            write_together(path, (json.dumps(notes, indent=1, allow_nan=False) + "\n").encode())
        before = read_json(path, dict, "choose another folder")
        changed = [name for name in {**before, **notes} if before.get(name) != json.loads(json.dumps(notes.get(name)))]
        if changed:
            raise InputError(
                f"{self.folder} was begun with other {listed(changed)}; give the same options, or choose another place "
                f"for the result"
            )
