"""Small evaluations, in this process or in processes that a test kills.

The processes are forked from a server that has all modules imported, so that they start within milliseconds.
"""

import dataclasses
import io
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prismer.config import prismer_tiny
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.evaluation import job
from prismer.evaluation.job import Evaluation
from prismer.evaluation.predict import Predictor
from prismer.evaluation.text_kinds import EVALUATED
from prismer.inference import Candidates
from prismer.model import Prismer
from prismer.tokenizer import Tokenizer
from tests.cli.commands import SMALL_MODEL

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.evaluation.jobs", "nvidia.dali.fn", "matplotlib.pyplot"])

ANSWERS = ["yes", "no", "red", "two"]
CLASSES = ["cube", "sphere", "cone"]
BROKEN = b"\xff\xd8\xff\xe0 this is no image"


def meta_of(i: int) -> dict:
    """The JSON of sample `i`, with texts for every task."""
    people = [ANSWERS[(i + n // 4) % 4] for n in range(10)]
    question = {
        "question": "What colour is it?",
        "question_id": 10 * i,
        "question_type": "what colour",
        "answer_type": "other",
        "answers": [{"answer": people[0], "weight": 0.4}, {"answer": people[9], "weight": 0.2}],
        "raw_answers": people,
    }
    weighted = {"question": "How many?", "question_id": 10 * i + 1, "answers": [{"answer": "two", "weight": 1.0}]}
    texts = {"captions": [f"A cube, number {i}.", "A red cube."], "questions": [question, weighted], "class": i % 3}
    return {"image_id": 1000 + i, "size": [24, 24], **texts}


def write_samples(folder: Path, count: int, broken: tuple[int, ...] = (), side: int = 24) -> Path:
    """A dataset of noise images; the bytes of the `broken` ones are no image."""
    with ShardWriter(folder, classes={"class": CLASSES}, source="noise", samples_per_shard=7) as writer:
        for i in range(count):
            file = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            writer.write(Sample(f"s{i:03d}", BROKEN if i in broken else file.getvalue(), {}, meta_of(i)))
    return folder


def save_model(folder: Path) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    texts = ["A red cube stands on the ground.", "What colour is the cube?", *(f" {a}" for a in ANSWERS)]
    tokenizer = Tokenizer.train(texts, vocab_size=280)
    config = prismer_tiny(**SMALL_MODEL, vocab_size=tokenizer.vocab_size)
    Prismer(config, tokenizer).eval().save_pretrained(folder)
    return folder


def evaluation(model: Prismer, data: Path, task: str = "vqa", *, batch_size: int = 2, **fields) -> Evaluation:
    """The evaluation of a task on the samples above."""
    predictor = Predictor(
        model=model,
        kinds=(EVALUATED[task],),
        answers=Candidates.answers(model.tokenizer, ANSWERS),
        classes=Candidates.classes(model.tokenizer, CLASSES),
        class_names=CLASSES,
        beams=2,
    )
    fields = {"notes": {"weights": "random"}, "about": {"model": "small"}, **fields}
    return Evaluation(
        task=task,
        predictor=predictor,
        dataset=ShardDataset(data),
        semantics=Semantics.for_config(model.config),
        batch_size=batch_size,
        **fields,
    )


class Slow(Predictor):
    """A predictor with a delay, so that a kill happens while it runs."""

    def rows(self, images, keys, metas):
        time.sleep(0.03)
        return super().rows(images, keys, metas)


def run_job(
    model: Path, data: Path, out: Path, rank: int = 0, world: int = 1, kind: type[Predictor] = Predictor
) -> None:
    """One process of an evaluation with a batch in each part."""
    torch.set_num_threads(1)
    job._BATCHES_PER_PART, job._NUM_SAMPLES = 1, 2
    what = evaluation(Prismer.from_pretrained(model), data)
    what = dataclasses.replace(what, predictor=kind(**vars(what.predictor)))
    what.run(out, rank=rank, world=world, threads=1)


def start_job(*arguments: object) -> multiprocessing.Process:
    """`run_job` in a process of its own."""
    process = CONTEXT.Process(target=run_job, args=arguments)
    process.start()
    return process


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
