"""The folder of a run: its settings, and checkpoints that any number of processes can resume from.

    runs/NAME/
      .lock                 held by the run's first process, so that no two train in one folder
      train_config.json     TrainConfig and the precision that was chosen at the first start
      answers.json          the answers of the training split, which evaluation ranks (evaluation.py)
      metrics.jsonl         one line per logged step or evaluation (progress.py)
      checkpoints/
        index.json          which folder is the last, which the best, the best's score, and which this run wrote
        step-00000200/      a model folder (config.json, model.safetensors, tokenizer), and beside it
          optimizer.safetensors   AdamW's moments: NAME.exp_avg, NAME.exp_avg_sq, fp32
          trainer.json            step, epoch, samples, precision, world size, seed
          checksums.json          size and crc32 of every file

There is one format for all: whole tensors, fp32 masters for what trains, streamed parameter by parameter from the
ZeRO-3 shards to rank 0, which writes. Nothing holds more than one gathered tensor, nothing is pickled, a checkpoint
is a loadable model, and each rank reads back its own part whatever the number of ranks. DeepSpeed's own format
(a pickle per rank) resumes at the same number only; its universal conversion loses frozen parameters in silence.
The price is one writer: 12 bytes per trainable parameter, 6 GB for LARGE. Every rank must see the folder.

The last two checkpoints and the best are kept. Nothing else is deleted but what index.json says this run wrote. A
damaged file is never passed over: the run refuses to start, names it, and says how to go on.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prismer.files import find_damage, take_lock, write_checksums, write_json
from prismer.model import Prismer
from prismer.reading import read_json
from prismer.tensor_files import write_safetensors
from prismer.training import zero as engines
from prismer.training.config import TrainConfig
from prismer.training.progress import read_metrics
from prismer.weights.folder import save_pretrained, write_description
from prismer.weights.locate import ANSWERS, WEIGHTS

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"
SETTINGS = "train_config.json"
INDEX = "index.json"
LOCK = ".lock"
KEPT = 2
"""How many of the newest checkpoints stay, besides the best."""

_STEP = re.compile(r"step-(\d{8,})")
_AFRESH = "restore it from a copy, or set this run aside with --fresh"

# what a resumed run must not change: the data order and the optimizer state would no longer mean the same
FIXED = (
    "task",
    "data",
    "model",
    "seed",
    "batch_size",
    "captions_per_image",
    "questions_per_image",
    "image_size",
    "freeze",
    "decay_norms",
)


class RunFolder:
    """One run on disk. Methods whose docstring says "collective" are called by every rank."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def claim(self, fresh: bool = False) -> Path | None:
        """Keep others out of this folder until the process ends (rank 0).

        Args:
            fresh: set an earlier run of this name aside first; never one that is being trained.

        Returns:
            Where the earlier run went, if there was one to set aside.

        Raises:
            ValueError: if another process trains here, or the folder holds something that is no run.
        """
        moved = lock = None
        if self.path.exists():
            self._check_kind()
            lock = take_lock(self.path / LOCK)
            if fresh and any(path.name != LOCK for path in self.path.iterdir()):
                moved = self.start_afresh()
                lock.close()
                lock = None
        if lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(self.path / LOCK)
        self._lock = lock
        for leftover in self.checkpoints.glob("step-*.partial"):
            # of a save that was cut short; nobody else can be writing it
            shutil.rmtree(leftover)
        return moved

    def _check_kind(self) -> None:
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another --run")
        names = {path.name for path in self.path.iterdir()} - {LOCK}
        if names and not names & {SETTINGS, self.checkpoints.name}:
            raise ValueError(f"{self.path} is no run, and holds {min(names)} and the like; choose another --run")

    def index(self) -> dict:
        """What index.json says; {} before the first checkpoint.

        "last" and "best" are names of checkpoints, "best_score" is a number, "written" names what this run wrote.

        Raises:
            ValueError: if it is damaged or lost.
        """
        file = self.checkpoints / INDEX
        if not file.exists():
            if self._steps():
                raise ValueError(f"{file} is lost; {self._way_on()}")
            return {}
        try:
            return self._checked(read_json(file, dict, ""))
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('; ')}; {self._way_on()}") from None

    def _checked(self, index: dict) -> dict:
        names = [index.get("last"), index.get("best", index.get("last")), *_names(index.get("written", []))]
        score = index.get("best_score", 0)
        if not all(isinstance(name, str) and _STEP.fullmatch(name) for name in names):
            raise ValueError(f"{self.checkpoints / INDEX} names no checkpoint as last or best")
        if type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"{self.checkpoints / INDEX} has the score {score!r}")
        missing = [name for name in names[:2] if not (self.checkpoints / name).is_dir()]
        if missing:
            raise ValueError(f"{self.checkpoints / missing[0]} is missing")
        return index

    def _steps(self) -> list[str]:
        """The names of all checkpoints on disk, in the order of their steps."""
        found = (path.name for path in self.checkpoints.glob("step-*") if path.is_dir())
        return sorted((name for name in found if _STEP.fullmatch(name)), key=_step_of)

    def _way_on(self) -> str:
        """What to do where the index, or the checkpoint that it names last, is of no use."""
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

    def check(self) -> None:
        """Refuse a run whose files are damaged, before anything is built from them (rank 0).

        Raises:
            ValueError: which names the file and says how to go on.
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
                raise ValueError(f"{error}; {self._way_on()}") from None
            if damaged:
                raise ValueError(f"{checkpoint / damaged} is damaged or gone; {self._way_on()}")

    def start_afresh(self) -> Path | None:
        """Move an earlier run out of the way, deleting nothing; returns where it went."""
        if not self.path.exists():
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(target)
        return target

    def settle(self, config: TrainConfig, choose_precision: Callable[[], str]) -> tuple[str, list[str]]:
        """Store the settings at the first start, compare them at a later one (rank 0).

        Args:
            choose_precision: asked only if the run has none yet, so that a resumed run keeps its own.

        Returns:
            The run's precision, and one line per setting that a resumed run changes.

        Raises:
            ValueError: if a resumed run changes what it must not, or its settings are damaged or lost.
        """
        file = self.path / SETTINGS
        now = asdict(config)
        if self.last() is None:
            self.path.mkdir(parents=True, exist_ok=True)
            precision = choose_precision()
            write_json(file, dict(precision=precision, settings=now))
            return precision, []
        stored = read_json(file, dict, _AFRESH)
        before, precision = stored.get("settings"), stored.get("precision")
        if not isinstance(before, dict) or precision not in ("bf16", "fp32") or not set(FIXED) <= set(before):
            raise ValueError(f"{file} is damaged; {_AFRESH}")
        for name in FIXED:
            if before[name] != now[name]:
                raise ValueError(
                    f"{self.path} was trained with {name} {before[name]!r}, not {now[name]!r}; "
                    f"restore it, choose another --run, or set this run aside with --fresh"
                )
        if config.precision not in ("auto", precision):
            raise ValueError(
                f"{self.path} trains in {precision}, not {config.precision}; set precision to auto or {precision}"
            )
        quiet = ("precision", "run")
        changes = [
            f"{name}: {before.get(name)} -> {value}"
            for name, value in now.items()
            if before.get(name) != value and name not in quiet
        ]
        write_json(file, dict(precision=precision, settings=now))
        return precision, changes

    def save(self, engine, state: dict, score: float | None) -> Path:
        """Write a checkpoint aside, rename it, then let go of those it replaces (collective).

        Args:
            state: JSON-like; holds "step".
            score: validation score if this step was evaluated; the best one is kept.

        Raises:
            OSError: on rank 0, if the disk is full or broken; the earlier checkpoints are as they were.
        """
        target = self.checkpoints / f"step-{state['step']:08d}"
        aside = target.with_name(target.name + ".partial")
        first = dist.get_rank() == 0
        try:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            sums = {
                WEIGHTS: write_weights(engine, aside / WEIGHTS),
                OPTIMIZER: write_moments(engine, aside / OPTIMIZER),
            }
            if first:
                write_description(engine.module, aside)
                write_json(aside / STATE, dict(state, score=score))
                write_checksums(aside, sums)
                self._enter(aside, target, score)
        finally:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        return target

    def _enter(self, aside: Path, target: Path, score: float | None) -> None:
        """Rename a whole checkpoint to its place, note it, and delete what is no longer needed."""
        index = self.index()
        written = set(index.get("written") or {index.get("last"), index.get("best")}) - {None}
        if target.exists():
            if target.name in written:
                shutil.rmtree(target)
            else:
                # not noted as this run's own, so it stays
                target.rename(_free_name(target))
        aside.rename(target)
        index["last"] = target.name
        if score is not None and score >= index.get("best_score", float("-inf")):
            index.update(best=target.name, best_score=score)
        here = sorted((name for name in written | {target.name} if (self.checkpoints / name).is_dir()), key=_step_of)
        # a later one is there if somebody went back to an earlier checkpoint
        until = [name for name in here if _step_of(name) <= _step_of(target.name)]
        gone = set(until[:-KEPT]) - {index.get("best")}
        try:
            write_json(self.checkpoints / INDEX, dict(index, written=[name for name in here if name not in gone]))
        except BaseException:
            # the index does not know it
            shutil.rmtree(target)
            raise
        for name in gone:
            shutil.rmtree(self.checkpoints / name)


def _step_of(name: str) -> int:
    return int(_STEP.fullmatch(name)[1])


def _names(value) -> list:
    return value if isinstance(value, list) else [None]


def _free_name(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return found


def read_state(checkpoint: Path) -> dict:
    """The trainer.json of a checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    file = checkpoint / STATE
    state = read_json(file, dict, "it belongs to the checkpoint")
    for name, kinds in (("step", (int,)), ("loss_count", (int,)), ("loss_sum", (int, float))):
        value = state.get(name)
        if type(value) not in kinds or (name != "loss_sum" and value < 0):
            raise ValueError(f"{file} is damaged ({name} is {value!r})")
    return state


def write_weights(engine, path: Path) -> int:
    """Masters of what trains, everything else as it is, by state-dict name; returns the crc32 (collective)."""
    tensors = engines.state_tensors(engine.module)
    header = {}
    for name, tensor in tensors.items():
        trains = getattr(tensor, "requires_grad", False)
        header[name] = (torch.float32 if trains else tensor.dtype, getattr(tensor, "ds_shape", tensor.shape))
    # widest first: readers want every tensor aligned to its item size
    header = dict(sorted(header.items(), key=lambda entry: -entry[1][0].itemsize))
    return _write(path, header, (engines.master(tensors[name]) for name in header))


def write_moments(engine, path: Path) -> int:
    """AdamW's two moments of every trainable parameter; returns the crc32 (collective)."""
    trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    names = [(name, key) for name in trainable for key in engines.MOMENTS]
    header = {f"{name}.{key}": (torch.float32, trainable[name].ds_shape) for name, key in names}
    return _write(path, header, (engines.moment(trainable[name], key) for name, key in names))


def _write(path: Path, header: dict, tensors: Iterator[Tensor]) -> int:
    if dist.get_rank() == 0:
        return write_safetensors(path, header, tensors)
    # gathering needs every rank, writing only one
    for _ in tensors:
        pass
    return 0


def restore_optimizer(engine, checkpoint: Path) -> dict:
    """Fill the masters and moments of an engine whose model was loaded from `checkpoint`; returns its trainer.json.

    Raises:
        ValueError: if the checkpoint was written for other trainable parameters, or a file is broken.
    """
    state = read_state(checkpoint)
    trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    expected = {f"{name}.{key}" for name in trainable for key in engines.MOMENTS}
    try:
        with safe_open(checkpoint / OPTIMIZER, "pt") as moments, safe_open(checkpoint / WEIGHTS, "pt") as weights:
            differing = sorted(expected ^ set(moments.keys()))
            if differing:
                raise ValueError(
                    f"{checkpoint / OPTIMIZER} is for other trainable parameters (first: {differing[0]}); "
                    f"resume with the freeze mode of the run"
                )
            engines.allocate_moments(engine, state["step"])
            for name, parameter in trainable.items():
                engines.set_master(parameter, weights.get_tensor(name))
                for key in engines.MOMENTS:
                    moment = moments.get_tensor(f"{name}.{key}")
                    if moment.shape != parameter.ds_shape or moment.dtype != torch.float32:
                        raise ValueError(
                            f"{checkpoint / OPTIMIZER} is damaged ({name}.{key} is {tuple(moment.shape)}, not "
                            f"{tuple(parameter.ds_shape)}); resume from another checkpoint"
                        )
                    engines.set_moment(parameter, key, moment)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{checkpoint} holds a broken file, or lacks one ({error}); resume from another checkpoint"
        ) from None
    return state


def export_checkpoint(source: str | Path, out: str | Path) -> Path:
    """Turn a run (its best checkpoint) or one checkpoint into a model folder: weights, config, tokenizer, answers.

    Args:
        source: a run folder or one of its checkpoint folders.
        out: the folder to write; `Prismer.from_pretrained` loads it.

    Returns:
        The checkpoint that was exported.

    Raises:
        ValueError: if `source` holds no checkpoint.
    """
    source = Path(source)
    checkpoint = source if (source / STATE).is_file() else RunFolder(source).best()
    if checkpoint is None:
        raise ValueError(f"{source} is neither a run with checkpoints nor a checkpoint; give runs/NAME")
    answers = checkpoint.parent.parent / ANSWERS
    # what the model chooses from when it is asked without a list
    listed = read_answers(answers) if answers.is_file() else None
    save_pretrained(Prismer.from_pretrained(checkpoint), out, answers=listed)
    return checkpoint


def read_answers(file: Path) -> list[str]:
    """The list of answers in `file`.

    Raises:
        ValueError: if it is no list of texts.
    """
    remedy = "restore it from a copy, or delete it"
    answers = read_json(file, list, remedy)
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{file} holds more than texts; {remedy}")
    return answers
