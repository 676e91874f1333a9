"""The evaluation of a model on a dataset: a job of any number of processes, which can be killed and resumed.

    predictions.jsonl    a row for each image, in the order of the dataset (predict.py); {"key", "skipped"} for an image
                         that cannot be read
    scores.json          the scores; the model, the dataset, the settings, the versions; what was skipped or not scored
    scores.md            the scores as a table
    submission_*.json    what evaluation servers take (submissions.py)
    samples.png          some images with their predicted and true texts
    job.json, parts/     what a killed job resumes from (prismer/resumable.py)

A part is a few batches, and a batch never holds images of two parts. The files therefore depend neither on the number
of processes nor on kills.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prismer import __version__
from prismer.batch import Batch
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.feed.image_batch import ExpertLabels, batch_of_pixels
from prismer.dataloading.feed.loader import Loader
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.errors import InputError
from prismer.evaluation.predict import Predictor
from prismer.evaluation.report import samples_png, score_table
from prismer.evaluation.scores import score_notes, scores
from prismer.evaluation.submissions import submission_notes, submissions
from prismer.evaluation.toolkit import toolkit_scores
from prismer.files import write_together
from prismer.inference import Candidates
from prismer.resumable import ResumableJob, json_line

PREDICTIONS, SCORES, TABLE, SAMPLES = "predictions.jsonl", "scores.json", "scores.md", "samples.png"
# a killed process loses at most so many batches
_BATCHES_PER_PART = 4
# images in samples.png
_NUM_SAMPLES = 12
# bytes read at a time
_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated on what.

    Attributes:
        task: caption, vqa or classify.
        predictor: the model, and what it chooses from.
        dataset: the split.
        semantics: features of the names in label maps.
        labeller: labels the images; None takes the maps of the dataset, where it has some.
        limit: number of images, the first ones of the dataset; 0 for all.
        batch_size: images that the model reads at a time.
        notes: JSON values that decide the predictions beside the above, such as a digest of the weights: a job is only
            resumed with the same ones.
        about: further facts for scores.json, such as the names of model and dataset.
    """

    task: str
    predictor: Predictor
    dataset: ShardDataset
    semantics: Semantics
    labeller: Labeller | None = None
    limit: int = 0
    batch_size: int = 8
    notes: dict[str, Any]
    about: dict[str, Any]

    @property
    def count(self) -> int:
        """The number of images."""
        return min(self.limit or len(self.dataset), len(self.dataset))

    def settings(self) -> dict[str, Any]:
        """Everything that decides the predictions, as JSON values."""
        predictor = self.predictor
        model = predictor.model
        return {
            "task": self.task,
            **self.notes,
            "config": sha256(model.config.to_json().encode()).hexdigest(),
            "data": self.dataset.index_sha256,
            "answers": _describe(predictor.answers),
            "classes": _describe(predictor.classes),
            "prefix": model.config.caption_prefix if predictor.prefix is None else predictor.prefix,
            "beams": predictor.beams,
            "experts": self.labeller.about["experts"] if self.labeller else None,
            "batch_size": self.batch_size,
            "precision": str(model.decoder.head_weight.dtype).removeprefix("torch."),
            "device": model.device.type,
            "versions": {"prismer": __version__, "torch": torch.__version__},
        }

    def run(self, out: str | Path, *, rank: int = 0, world: int = 1, threads: int = 2, progress: bool = False) -> int:
        """Predict the missing parts of this process, and write the results if no part is missing then.

        Args:
            out: the folder of the results.
            rank, world: the index of this process, and the number of processes.
            threads: CPU threads that decode.
            progress: whether to show a bar.

        Returns:
            The number of parts that other processes have yet to make; 0 if the results are written.

        Raises:
            ValueError: if the dataset is empty, or `out` holds the results of other settings.
        """
        if not self.count:
            raise InputError(f"{self.dataset.place} holds no samples; choose another dataset")
        part_size = _BATCHES_PER_PART * self.batch_size
        job = ResumableJob(out, self.settings(), count=self.count, part_size=part_size, rank=rank, world=world)
        missing = job.missing_parts()
        if missing:
            total = sum(len(job.items_of(number)) for number in missing)
            with tqdm(total=total, desc="evaluate", unit="image", disable=not progress) as bar:
                rows: list[dict] = []
                for positions, found in self._rows_of_batches(job, missing, threads):
                    rows += found
                    bar.update(len(positions))
                    number = positions.start // part_size
                    if positions.stop == job.items_of(number).stop:
                        job.write_part(number, rows)
                        rows = []
        return job.finish(lambda rows: self._write_results(job.folder, list(rows)))

    def _rows_of_batches(
        self, job: ResumableJob, missing: Sequence[int], threads: int
    ) -> Iterator[tuple[range, list[dict]]]:
        """The positions and the rows of each batch of some parts, in order."""
        loader = Loader(
            self.dataset,
            config=self.predictor.model.config,
            batch_size=self.batch_size,
            semantics=self.semantics,
            tokenizer=self.predictor.model.tokenizer,
            training=False,
            threads=threads,
            device=self.predictor.model.device,
        )
        ranges = (
            items[start : start + self.batch_size]
            for items in map(job.items_of, missing)
            for start in range(0, len(items), self.batch_size)
        )
        with closing(loader.batches_of(ranges)) as batches:
            for positions, batch in batches:
                reasons = {i: loader.reasons[i] for i in positions if i in loader.reasons}
                found: dict[int, dict] = {}
                if batch is not None:
                    readable = [i for i in positions if i not in reasons]
                    if self.labeller is not None:
                        readable, batch = self._label(readable, batch, reasons)
                    if batch is not None:
                        rows = self.predictor.rows(batch.images, batch.keys, batch.meta)
                        found = dict(zip(readable, rows, strict=True))
                yield positions, [found[i] if i in found else self._skipped(i, reasons[i]) for i in positions]

    def _label(self, readable: list[int], batch: Batch, reasons: dict[int, str]) -> tuple[list[int], Batch | None]:
        """The images that the labeller can read, with their labels; the others get a reason."""
        jpegs = [self.dataset[i].jpeg for i in readable]
        labels: list[ExpertLabels | None] = []
        try:
            labels += self.labeller(jpegs)
        except InputError:
            for i, jpeg in zip(readable, jpegs, strict=True):
                try:
                    labels += self.labeller([jpeg])
                except InputError as error:
                    labels.append(None)
                    reasons[i] = str(error)
        kept = [b for b, found in enumerate(labels) if found is not None]
        if not kept:
            return [], None
        # the maps are made on the host
        rgb, model = batch.images.rgb[kept].cpu(), self.predictor.model
        images = batch_of_pixels(rgb, model.config, [labels[b] for b in kept], self.semantics, model.tokenizer)
        keys, meta = [batch.keys[b] for b in kept], [batch.meta[b] for b in kept]
        return [readable[b] for b in kept], Batch(images=images, texts=None, keys=keys, meta=meta)

    def _skipped(self, position: int, reason: str) -> dict:
        try:
            key = self.dataset.key(position)
        except CorruptSample:
            # the index of its shard, which holds the keys, is damaged
            shard = self.dataset.shard_of(position)
            key = f"{self.dataset.shards[shard]}#{position - self.dataset.starts[shard]}"
        return {"key": key, "skipped": reason}

    def _write_results(self, out: Path, rows: list[dict]) -> None:
        """Write every file of the results; two processes may do it at the same time, with the same bytes."""
        write_together(out / PREDICTIONS, "".join(f"{json_line(row)}\n" for row in rows).encode())
        toolkit, missing = toolkit_scores(rows)
        found = {**scores(rows), **toolkit}
        notes = [*score_notes(rows), *missing, *submission_notes(rows, self.task)]
        try:
            for name, entries in submissions(rows, self.task).items():
                write_together(out / name, _to_json(entries))
        except InputError as error:
            notes.append(f"there is no submission file: {error}")
        shown = self._shown(rows)
        if shown:
            write_together(out / SAMPLES, samples_png(shown))
        skipped = [row for row in rows if "skipped" in row]
        counts = {"images": len(rows), "predicted": len(rows) - len(skipped)}
        if any("questions" in row for row in rows):
            counts["questions"] = sum(len(row.get("questions", ())) for row in rows)
        facts = {"task": self.task, "scores": found, "notes": notes, **counts, **self.about}
        table = score_table({"score": found}, f"{self.task}, {counts['predicted']} images") if found else ""
        lines = "".join(f"- {note}\n" for note in notes)
        write_together(out / TABLE, "\n".join(filter(None, (table, lines))).encode())
        write_together(out / SCORES, _to_json({**facts, "settings": self.settings(), "skipped": skipped}))

    def _shown(self, rows: list[dict]) -> list[tuple[bytes, dict]]:
        """The images and rows in samples.png: predicted ones, evenly spread over the dataset."""
        predicted = [i for i, row in enumerate(rows) if "skipped" not in row]
        count = min(_NUM_SAMPLES, len(predicted))
        return [(self.dataset[i].jpeg, rows[i]) for i in (predicted[n * len(predicted) // count] for n in range(count))]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _describe(candidates: Candidates | None) -> dict[str, Any] | None:
    """The number of texts to choose from, and the SHA-256 of their list."""
    if candidates is None:
        return None
    return {"count": len(candidates.texts), "sha256": sha256(json.dumps(candidates.texts).encode()).hexdigest()}


def _to_json(value: dict | list) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
