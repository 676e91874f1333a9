"""The folder of a run: its settings, and checkpoints that any number of processes can resume from.

    runs/NAME/
      train_config.json     TrainConfig and the precision that was chosen at the first start
      answers.json          the answers of the training split, which evaluation ranks (evaluation.py)
      metrics.jsonl         one line per logged step or evaluation (progress.py)
      checkpoints/
        index.json          which folder is the last, which the best, and the best's score
        step-00000200/      a model folder (config.json, model.safetensors, tokenizer), and beside it
          optimizer.safetensors   AdamW's moments: NAME.exp_avg, NAME.exp_avg_sq, fp32
          trainer.json            step, epoch, samples, precision, world size, seed

There is one format for all: whole tensors, fp32 masters for what trains, streamed parameter by parameter from the
ZeRO-3 shards to rank 0, which writes. Nothing holds more than one gathered tensor, nothing is pickled, a checkpoint
is a loadable model, and each rank reads back its own part whatever the number of ranks. DeepSpeed's own format
(a pickle per rank) resumes at the same number only; its universal conversion loses frozen parameters in silence.
The price is one writer: 12 bytes per trainable parameter, 6 GB for LARGE. Every rank must see the folder.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prismer import engine as engines
from prismer.checkpoint import CONFIG, WEIGHTS, from_pretrained, save_pretrained
from prismer.train_config import TrainConfig

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"
ANSWERS = "answers.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}

# what a resumed run must not change: the data order and the optimizer state would no longer mean the same
FIXED = (
    "task", "data", "model", "seed", "batch_size", "captions_per_image", "questions_per_image", "image_size", "freeze",
    "decay_norms",
)  # fmt: skip


def write_json(path: Path, value) -> None:
    """Replace `path` by `value` as indented JSON, at once."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


def write_safetensors(
    path: Path, header: dict[str, tuple[torch.dtype, torch.Size]], tensors: Iterator[Tensor]
) -> None:
    """Write a safetensors file whose tensors come one after the other, in the order of `header`."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in header.items():
        end = offset + shape.numel() * dtype.itemsize
        entries[name] = dict(dtype=_DTYPES[dtype], shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (dtype, shape), tensor in zip(header.values(), tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == shape
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


class RunFolder:
    """One run on disk. Methods whose docstring says "collective" are called by every rank."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def index(self) -> dict:
        """{"last": folder name, "best": folder name, "best_score": number}; {} before the first checkpoint."""
        file = self.checkpoints / "index.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def last(self) -> Path | None:
        """The newest checkpoint."""
        index = self.index()
        return self.checkpoints / index["last"] if index else None

    def best(self) -> Path | None:
        """The checkpoint with the best validation score; the last one if none was evaluated."""
        index = self.index()
        return self.checkpoints / index.get("best", index["last"]) if index else None

    def start_afresh(self) -> Path | None:
        """Move an earlier run out of the way, deleting nothing; returns where it went."""
        if not self.path.exists():
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(target)
        return target

    def settle(
        self, config: TrainConfig, choose_precision: Callable[[], str]
    ) -> tuple[str, list[str]]:
        """Store the settings at the first start, compare them at a later one (rank 0).

        Args:
            choose_precision: asked only if the run has none yet, so that a resumed run keeps its own.

        Returns:
            The run's precision, and one line per setting that a resumed run changes.

        Raises:
            ValueError: if a resumed run changes what it must not.
        """
        file = self.path / "train_config.json"
        stored = json.loads(file.read_text()) if file.is_file() and self.last() else None
        now = asdict(config)
        if stored is None:
            self.path.mkdir(parents=True, exist_ok=True)
            precision = choose_precision()
            write_json(file, dict(precision=precision, settings=now))
            return precision, []
        before, precision = stored["settings"], stored["precision"]
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
        """
        target = self.checkpoints / f"step-{state['step']:08d}"
        aside = target.with_name(target.name + ".partial")
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        write_weights(engine, aside / WEIGHTS)
        write_moments(engine, aside / OPTIMIZER)
        if first:
            model = engine.module
            (aside / CONFIG).write_text(model.config.to_json())
            if model.tokenizer is not None:
                model.tokenizer.save(aside)
            write_json(aside / STATE, dict(state, score=score))
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            index = self.index()
            index["last"] = target.name
            if score is not None and score >= index.get("best_score", float("-inf")):
                index.update(best=target.name, best_score=score)
            write_json(self.checkpoints / "index.json", index)
            kept = {index["last"], index.get("best")}
            for old in self.checkpoints.glob("step-*"):
                if old.name not in kept:
                    shutil.rmtree(old)
        dist.barrier()
        return target


def write_weights(engine, path: Path) -> None:
    """Masters of what trains, everything else as it is; the keys of the model's state dict (collective)."""
    tensors = engines.state_tensors(engine.module)
    header = {}
    for name, tensor in tensors.items():
        trains = getattr(tensor, "requires_grad", False)
        header[name] = (
            torch.float32 if trains else tensor.dtype,
            getattr(tensor, "ds_shape", tensor.shape),
        )
    # widest first: readers want every tensor aligned to its item size
    header = dict(sorted(header.items(), key=lambda entry: -entry[1][0].itemsize))
    _write(path, header, (engines.master(tensors[name]) for name in header))


def write_moments(engine, path: Path) -> None:
    """AdamW's two moments of every trainable parameter (collective)."""
    trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    names = [(name, key) for name in trainable for key in engines.MOMENTS]
    header = {f"{name}.{key}": (torch.float32, trainable[name].ds_shape) for name, key in names}
    _write(path, header, (engines.moment(trainable[name], key) for name, key in names))


def _write(path: Path, header: dict, tensors: Iterator[Tensor]) -> None:
    if dist.get_rank() == 0:
        write_safetensors(path, header, tensors)
    else:
        # gathering needs every rank, writing only one
        for _ in tensors:
            pass


def restore_optimizer(engine, checkpoint: Path) -> dict:
    """Fill the masters and moments of an engine whose model was loaded from `checkpoint`; returns its trainer.json.

    Raises:
        ValueError: if the checkpoint was written for other trainable parameters, or a file is broken.
    """
    state = json.loads((checkpoint / STATE).read_text())
    trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    expected = {f"{name}.{key}" for name in trainable for key in engines.MOMENTS}
    try:
        with (
            safe_open(checkpoint / OPTIMIZER, "pt") as moments,
            safe_open(checkpoint / WEIGHTS, "pt") as weights,
        ):
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
                    engines.set_moment(parameter, key, moments.get_tensor(f"{name}.{key}"))
    except SafetensorError as error:
        raise ValueError(
            f"{checkpoint} holds a broken file ({error}); delete it and resume from another"
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
        raise ValueError(
            f"{source} is neither a run with checkpoints nor a checkpoint; give runs/NAME"
        )
    save_pretrained(from_pretrained(checkpoint), out)
    answers = checkpoint.parent.parent / ANSWERS
    if answers.is_file():
        # what the model chooses from when it is asked without a list
        write_json(Path(out) / ANSWERS, json.loads(answers.read_text()))
    return checkpoint
