"""Ask a model about any number of images: a resumable job of any number of processes, with one line for each item.

    report = ask_all(model, image_items(["photos"]), "captions.jsonl", "caption", beams=3)
    report = ask_all(model, question_items("questions.jsonl"), "answers.jsonl", "answer", choices=["yes", "no"])
    report = ask_all(model, image_items(["shards"]), "classes.jsonl", "classify", choices=["cat", "dog"])

The job lies in `captions.jsonl.job/` beside the result; `job.json` there records the model, the settings and the
versions. Batches never cross the parts of the job, so that a part depends on its items alone; within a part, later
images take the places of those that cannot be used. While the model works on one batch, the next ones are read, and on
a GPU decoded. Memory does not grow with the number of items.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prismer import __version__
from prismer.asking.asker import Asker
from prismer.asking.items import RESULT_KEYS, Item, Items
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.semantics.features import Semantics
from prismer.errors import InputError, check_count
from prismer.files import write_together
from prismer.model import Prismer
from prismer.resumable import JOB_FILE, ResumableJob, json_line

_DOING = {"caption": "captioning", "answer": "answering", "classify": "classifying"}
# images that the model reads at a time
BATCH_SIZES = {"cpu": 8, "cuda": 32}
# skipped items that a report names
_FEW = 5


@dataclass
class AskReport:
    """The outcome of a job, as far as its processes have come.

    Attributes:
        lines: lines of the result, one for each item; 0 while parts are missing.
        skipped: how many of them hold a reason instead of a result.
        first_skipped: the first of these lines.
        parts_missing: parts that other processes have yet to make.
        texts_kept: text files that were there with other content and that this process left as they are.
    """

    lines: int = 0
    skipped: int = 0
    first_skipped: list[dict] = field(default_factory=list)
    parts_missing: int = 0
    texts_kept: list[str] = field(default_factory=list)


def ask_all(
    model: Prismer,
    items: Items,
    out: str | Path,
    task: str,
    *,
    choices: Sequence[str] | None = None,
    top: int = 0,
    labeller: Labeller | None = None,
    semantics: Semantics | None = None,
    write_texts: bool = False,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    **options: Any,
) -> AskReport:
    """Ask a model about every item, and write one JSON object a line, in the order of the items. Call again to resume.

    A line holds the item's row and its result: "caption"; "answer" and "score"; "class" and "score". An item that
    cannot be read has "skipped" with the reason instead. On a CPU, texts are those of single calls, except where the
    rounding of a batch decides between texts of the same score.

    Args:
        model: in evaluation mode.
        items: from `image_items` or `question_items`.
        out: the result, a file that does not exist or that this job wrote.
        task: "caption", "answer" or "classify".
        choices: answers or class names to choose from; None, for "answer" alone, generates freely.
        top: also write the best `top` choices with their scores, as "ranked".
        labeller: experts that label the images; None uses the maps that items bring, if they bring any.
        semantics: features of the names in maps, see `prismer.image_batch`.
        write_texts: also write each caption into a text file: IMAGE.txt beside IMAGE.jpg, and, for images in tars and
            datasets, KEY.txt in the folder `captions-txt` beside `captions.jsonl`. A file with other content stays as
            it is, and the report names it.
        batch_size: images that the model reads at a time; None is 8 on a CPU and 32 on a GPU.
        rank, world: the index of this process, and the number of processes.
        progress: whether to show a bar with the images (or questions) per second, and the remaining time.
        options: further arguments of `model.caption`, `model.answer` or `model.classify`.

    Returns:
        The report.

    Raises:
        ValueError: if `out` is not of this job, was begun with other settings, or an argument is out of range.
    """
    out = Path(out)
    check_result(out)
    if semantics is None and model.config.semantics == "spelling":
        semantics = Semantics.for_config(model.config)
    batch_size = batch_size or BATCH_SIZES[model.device.type]
    check_count("batch_size", batch_size)
    if task not in RESULT_KEYS:
        raise InputError(f"the task is {task!r}; choose {', '.join(RESULT_KEYS)}")
    if choices is None and (task == "classify" or top):
        raise InputError("choices is None; give the texts to choose from")
    if write_texts and task != "caption":
        raise InputError(f"text files are for captions, the task is {task}; leave them out")
    notes = {
        "task": task,
        "model": model_digest(model),
        "sources": items.sources,
        "images": items.digest,
        **options,
        "choices": list(choices) if choices is not None else None,
        "top": top,
        "labels": items.num_labels,
        "experts": labeller.about if labeller is not None else None,
        "semantics": semantics and hashlib.sha256(semantics.background.tobytes()).hexdigest()[:16],
        "text_files": write_texts,
        "batch_size": batch_size,
        "device": model.device.type,
        "versions": {"prismer": __version__, "torch": torch.__version__},
    }
    existed = out.exists()
    folder = _job_folder(out)
    part_size = batch_size * _batches_per_part(model)
    job = ResumableJob(folder, notes, count=len(items), part_size=part_size, rank=rank, world=world)
    if existed and job.count_missing():
        raise InputError(f"{out} exists, but {folder} has not written it yet; move one of them away")
    report = AskReport()
    if missing := job.missing_parts():
        asker = Asker(model, task, choices, top, labeller, semantics, batch_size, options)
        texts = out.with_name(f"{out.stem}-txt") if write_texts else None
        count = sum(len(job.items_of(number)) for number in missing)
        unit = "question" if task == "answer" else "image"
        with tqdm(total=count, desc=_DOING[task], unit=unit, disable=not progress) as bar:
            for number, rows in asker.parts(items, part_size, missing, bar):
                if texts is not None:
                    report.texts_kept += _write_texts(rows, texts)
                job.write_part(number, [row for _, row in rows])
    report.parts_missing = job.finish(
        lambda rows: write_together(out, (f"{json_line(row)}\n".encode() for row in rows))
    )
    if not report.parts_missing:
        _read_result(out, folder, report)
    return report


def check_result(out: str | Path) -> None:
    """Check, before a model is loaded, that a job may write its result to `out`.

    Raises:
        ValueError: if there is a file or a folder that no job wrote.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the file of the result")
    if os.path.lexists(out) and not (_job_folder(out) / JOB_FILE).is_file():
        raise InputError(f"{out} exists and no job has written it; give another name, or move it away")


def model_digest(model: Prismer) -> str:
    """A digest of the config and the weights of a model, as it computes with them."""
    digest = hashlib.sha256(model.config.to_json().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _batches_per_part(model: Prismer) -> int:
    """A killed job loses one part at most, so a model that takes long for a batch has few of them in a part.

    Batches from which images were dropped are made up within a part: many batches leave few of them incomplete.
    """
    return 8 if sum(parameter.numel() for parameter in model.parameters()) > 50e6 else 32


def _job_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.job")


def _write_texts(rows: list[tuple[Item, dict]], folder: Path) -> list[str]:
    """Write the captions of a part as text files; returns those that were there with other content."""
    kept = []
    for item, row in rows:
        if "caption" not in row:
            continue
        path = item.text_path(folder)
        path.parent.mkdir(exist_ok=True)
        text = f"{row['caption']}\n".encode()
        if not os.path.lexists(path):
            partial = path.with_name(f"{path.name}.partial")
            # renamed, so that a killed job leaves no part of a text; not synced, which would take longer than the model
            partial.write_bytes(text)
            os.replace(partial, path)
        elif not path.is_file() or path.read_bytes() != text:
            kept.append(str(path))
    return kept


def _read_result(out: Path, folder: Path, report: AskReport) -> None:
    """Count the lines of a finished result."""
    if not out.is_file():
        raise InputError(f"{folder} is a finished job whose result {out} is gone; delete that folder to make it again")
    with open(out, "rb") as lines:
        for line in lines:
            report.lines += 1
            row = json.loads(line)
            if "skipped" in row:
                report.skipped += 1
                report.first_skipped += itertools.islice([row], _FEW - len(report.first_skipped))
