"""The folder of a run: its settings, its lock, and which of its checkpoints are kept.

    runs/NAME/
      .lock                 held by the run's first process, so that no two trainings use one folder
      train_config.json     TrainConfig, the precision that was chosen at the first start, and which measured choices
                            the last start took (a digest)
      answers.json          the answers of the training split, which evaluation ranks (text_statistics.py)
      guesses.json          its most frequent answers and caption, and the class names
      metrics.jsonl         one line for each logged step or evaluation (progress.py)
      checkpoints/
        index.json          names of the last and the best checkpoint, the best score, and the names this run wrote
        step-00000200/      a checkpoint (checkpoint.py)

A run in a bucket (--run s3://bucket/runs/NAME) has this folder on each machine, and rank 0 copies what it writes to the
bucket: a checkpoint after it is whole, then index.json. A run that resumes on another machine fetches it from there.

The last two checkpoints and the best are kept. Nothing else is deleted but checkpoints that index.json lists as
written by this run. A damaged file is never ignored: the run refuses to start, names the file, and says how to go on.
"""

import json
import math
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch.distributed as dist
from torch import nn

from prismer.errors import InputError, shown
from prismer.files import CHECKSUMS, find_damage, take_lock, write_json
from prismer.reading import read_json
from prismer.storage.folders import Mirror
from prismer.storage.places import as_place
from prismer.training.checkpoint import STATE, read_state, write_checkpoint
from prismer.training.config import TrainConfig
from prismer.training.progress import read_metrics
from prismer.training.zero import gather_json

SETTINGS = "train_config.json"
INDEX = "index.json"
LOCK = ".lock"
# how many of the newest checkpoints are kept, besides the best
KEPT = 2

_CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")
_REMEDY = "restore it from a copy, or set this run aside with --fresh"

# settings that a resumed run must not change: they decide the order of the data or the meaning of the optimizer's state
FIXED = "task data model seed batch_size captions_per_image questions_per_image image_size freeze decay_norms".split()

# further such settings, which a run of an earlier version did not have
_LATER = ("order", "expert_text", "rename_kinds")


class RunFolder:
    """One run on disk; every rank must call a method whose docstring says "collective".

    Args:
        place: the folder, or a URL such as s3://bucket/runs/NAME.

    Attributes:
        path: the folder on this machine.
        checkpoints: the folder of its checkpoints.
    """

    def __init__(self, place: str | Path) -> None:
        place = as_place(place)
        self._mirror = None if isinstance(place, Path) else Mirror(place, kind="runs", last=f"{_CHECKPOINTS}/{INDEX}")
        self.path = place if self._mirror is None else self._mirror.folder
        self.checkpoints = self.path / _CHECKPOINTS
        self._lock: IO[str] | None = None

    def claim(self, fresh: bool = False) -> Path | None:
        """Lock this folder until the process ends, and remove what an interrupted save left (rank 0).

        Args:
            fresh: move an earlier run of this name aside first, unless another process trains it.

        Returns:
            The new path of the earlier run, if one was moved.

        Raises:
            ValueError: if another process trains here, or the folder is not that of a run.
        """
        moved = lock = None
        if self._mirror is not None:
            lock = self._fetch(fresh)
        elif self.path.exists():
            self._check_kind()
            lock = take_lock(self.path / LOCK)
            if fresh and any(path.name != LOCK for path in self.path.iterdir()):
                moved = self.set_aside()
                lock.close()
                lock = None
        if lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(self.path / LOCK)
        self._lock = lock
        # no other process can be writing them
        for leftover in self.checkpoints.glob("step-*.partial"):
            shutil.rmtree(leftover)
        return moved

    def _fetch(self, fresh: bool) -> IO[str]:
        """Lock the copy of a run in a bucket, and bring it up to date."""
        names = self._mirror.names()
        if fresh and names:
            raise InputError(f"{self._mirror.url} cannot be moved aside in its bucket; choose another --run")
        _check_names(names, self._mirror.url)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.path / LOCK)
        self._mirror.reconcile()
        for checkpoint in self.checkpoints.glob("step-*"):
            # its upload broke off; the next copy to the bucket removes it there
            if not (checkpoint / CHECKSUMS).exists():
                shutil.rmtree(checkpoint)
        return lock

    def share(self, group: dist.ProcessGroup) -> None:
        """Copy a run in a bucket there, and from there to the machines of other ranks (collective).

        Nothing for a local folder, which every rank sees.
        """
        if self._mirror is None:
            return
        rank = dist.get_rank()
        if rank == 0:
            self._mirror.push()
        hosts = gather_json(socket.gethostname(), group)
        if hosts[rank] != hosts[0]:
            self._mirror.pull()
        # rank 0 must not go on writing while others copy
        dist.barrier(group)

    def _check_kind(self) -> None:
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose another --run")
        _check_names({path.name for path in self.path.iterdir()}, self.path)

    def index(self) -> dict:
        """The content of index.json; {} before the first checkpoint.

        "last" and "best" are names of checkpoints, "best_score" is a number, "written" lists the checkpoints that this
        run wrote.

        Raises:
            ValueError: if the file is damaged or lost.
        """
        file = self.checkpoints / INDEX
        if not file.exists():
            if self._steps():
                raise InputError(f"{file} is lost; {self._recovery()}")
            return {}
        try:
            return self._check_index(read_json(file, dict, ""))
        except ValueError as error:
            raise InputError(f"{str(error).rstrip('; ')}; {self._recovery()}") from None

    def _check_index(self, index: dict) -> dict:
        names, written = [index.get("last"), index.get("best", index.get("last"))], index.get("written", [])
        score = index.get("best_score", 0)
        if type(written) is not list or not all(type(n) is str and _STEP.fullmatch(n) for n in names + written):
            raise InputError(f"{self.checkpoints / INDEX} names no checkpoint as last or best")
        if type(score) not in (int, float) or not math.isfinite(score):
            raise InputError(f"{self.checkpoints / INDEX} has the score {score!r}")
        missing = [name for name in names if not (self.checkpoints / name).is_dir()]
        if missing:
            raise InputError(f"{self.checkpoints / missing[0]} is missing")
        return index

    def _steps(self) -> list[str]:
        """The names of all checkpoints on disk, in the order of their steps."""
        found = (path.name for path in self.checkpoints.glob("step-*") if path.is_dir())
        return sorted((name for name in found if _STEP.fullmatch(name)), key=_step_of)

    def _recovery(self) -> str:
        """Advice for a user whose index, or one of the checkpoints that it names, is damaged."""
        index = {}
        for name in self._steps():
            try:
                if find_damage(self.checkpoints / name):
                    continue
                state = read_json(self.checkpoints / name / STATE, dict)
            except ValueError:
                continue
            index["last"] = name
            score = state.get("score")
            if type(score) in (int, float) and score >= index.get("best_score", -math.inf):
                index.update(best=name, best_score=score)
        afresh = "set this run aside with --fresh"
        if not index:
            return f"no checkpoint is whole: restore one from a copy, or {afresh}"
        return (
            f"{index['last']} is whole: to go on from there write {json.dumps(index)} into "
            f"{self.checkpoints / INDEX}, or {afresh}"
        )

    def last(self) -> Path | None:
        """The newest checkpoint."""
        index = self.index()
        return self.checkpoints / index["last"] if index else None

    def best(self) -> Path | None:
        """The checkpoint with the best validation score; the last one if none was evaluated."""
        index = self.index()
        return self.checkpoints / index.get("best", index["last"]) if index else None

    def check_files(self) -> None:
        """Refuse a run whose files are damaged, before anything is built from them (rank 0).

        Raises:
            ValueError: if a file is damaged; the message names it and says how to go on.
        """
        read_metrics(self.path)
        last = self.last()
        if last is None:
            return
        for checkpoint in {last: None, self.best(): None}:
            try:
                read_state(checkpoint)
                damaged = find_damage(checkpoint)
            except ValueError as error:
                raise InputError(f"{error}; {self._recovery()}") from None
            if damaged:
                raise InputError(f"{checkpoint / damaged} is damaged or gone; {self._recovery()}")

    def set_aside(self) -> Path | None:
        """Rename the folder of an earlier run; returns its new path, or None if there is no earlier run."""
        return self.path.rename(_free_name(self.path)) if self.path.exists() else None

    def reconcile_settings(
        self, config: TrainConfig, choose_precision: Callable[[], str], choices: str = ""
    ) -> tuple[str, list[str]]:
        """Store the settings at the first start, and compare them with the stored ones at a later start (rank 0).

        Args:
            choose_precision: called only at the first start, since a resumed run keeps its precision.
            choices: digest of the table of measured choices; "" if there is none.

        Returns:
            The run's precision, and one line for each setting that a resumed run changes.

        Raises:
            ValueError: if a resumed run changes a setting of FIXED, or its settings are damaged or lost.
        """
        file = self.path / SETTINGS
        now = asdict(config)
        # a run that leaves a later setting alone has the file that it had before there was this setting
        chosen = {
            name: value for name, value in now.items() if name not in _LATER or value != getattr(TrainConfig, name)
        }
        if self.last() is None:
            self.path.mkdir(parents=True, exist_ok=True)
            precision = choose_precision()
            write_json(file, dict(precision=precision, choices=choices, settings=chosen))
            return precision, []
        stored = read_json(file, dict, _REMEDY)
        before, precision = stored.get("settings"), stored.get("precision")
        if not isinstance(before, dict) or precision not in ("bf16", "fp32") or not set(FIXED) <= set(before):
            raise InputError(f"{file} is damaged; {_REMEDY}")
        # a run that was started before a setting existed had its default
        before = {name: before.get(name, getattr(TrainConfig, name)) for name in now}
        for name in (*FIXED, *_LATER):
            if before[name] != now[name]:
                raise InputError(
                    f"{self.path} was trained with {name} {shown(before[name])}, not {now[name]!r}; "
                    f"restore it, choose another --run, or set this run aside with --fresh"
                )
        if config.precision not in ("auto", precision):
            raise InputError(
                f"{self.path} trains in {precision}, not {config.precision}; set precision to auto or {precision}"
            )
        quiet = ("precision", "run")
        changes = [
            f"{name}: {before[name]} -> {value}"
            for name, value in now.items()
            if before[name] != value and name not in quiet
        ]
        # a run of an earlier version stored no digest
        earlier = stored.get("choices", choices)
        if earlier != choices:
            was, now_is = earlier or "none", choices or "none"
            changes.append(f"measured choices: {was} -> {now_is}, so sums may round otherwise")
        write_json(file, dict(precision=precision, choices=choices, settings=chosen))
        return precision, changes

    def save(self, engine: nn.Module, state: dict, score: float | None) -> Path:
        """Write a checkpoint under a temporary name, rename it, then delete those that it replaces (collective).

        Args:
            engine: the DeepSpeed engine.
            state: content of trainer.json; holds "step".
            score: validation score, if this step was evaluated; the checkpoint with the best score is kept.

        Raises:
            OSError: on rank 0, if the disk is full or broken; the earlier checkpoints are unchanged.
        """
        target = self.checkpoints / f"step-{state['step']:08d}"
        aside = target.with_name(target.name + ".partial")
        first = dist.get_rank() == 0
        try:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            write_checkpoint(engine, aside, dict(state, score=score))
            if first:
                self._commit(aside, target, score)
        finally:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        return target

    def _commit(self, aside: Path, target: Path, score: float | None) -> None:
        """Rename a whole checkpoint to `target`, enter it in the index, and delete those that are no longer kept."""
        index = self.index()
        written = set(index.get("written") or {index.get("last"), index.get("best")}) - {None}
        if target.exists():
            if target.name in written:
                shutil.rmtree(target)
            else:
                # another run's, so it is kept
                target.rename(_free_name(target))
        aside.rename(target)
        index["last"] = target.name
        if score is not None and score >= index.get("best_score", float("-inf")):
            index.update(best=target.name, best_score=score)
        here = sorted((name for name in written | {target.name} if (self.checkpoints / name).is_dir()), key=_step_of)
        # later checkpoints exist where the user went back to an earlier one; they are kept
        until = [name for name in here if _step_of(name) <= _step_of(target.name)]
        gone = set(until[:-KEPT]) - {index.get("best")}
        try:
            write_json(self.checkpoints / INDEX, dict(index, written=[name for name in here if name not in gone]))
        except BaseException:
            # otherwise a checkpoint would remain that the index does not list
            shutil.rmtree(target)
            raise
        for name in gone:
            shutil.rmtree(self.checkpoints / name)
        if self._mirror is not None:
            self._mirror.push()


def _check_names(names: set[str], place: str | Path) -> None:
    """Refuse a folder that holds other things than a run."""
    names = names - {LOCK}
    if names and not names & {SETTINGS, _CHECKPOINTS}:
        raise InputError(f"{place} holds {min(names)} and is not a run folder; choose another --run")


def _step_of(name: str) -> int:
    return int(_STEP.fullmatch(name)[1])


def _free_name(path: Path) -> Path:
    """`path` with the first suffix .1, .2, ... that does not exist."""
    number = 1
    while (found := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return found
