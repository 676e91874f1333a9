"""`prismer evaluate`: score a model on a dataset, and write its predictions."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.choices import read_texts
from prismer.cli.options import (
    add_device_option,
    add_experts_option,
    add_semantics_option,
    device_of_process,
    load_labeller,
    load_model,
    positive,
    rank_and_world,
)
from prismer.cli.printing import is_watched
from prismer.errors import InputError, listed, shown
from prismer.storage.output import has_file
from prismer.storage.places import as_place, inside

if TYPE_CHECKING:
    from prismer.dataloading.semantics.features import Semantics
    from prismer.dataloading.store.shards import ShardDataset
    from prismer.evaluation.predict import Predictor
    from prismer.model import Prismer
    from prismer.tokenizer import Tokenizer

_TASKS = ("caption", "vqa", "classify")
# option -> the tasks that it changes
_TASKS_OF = {
    "prefix": ("caption",),
    "beams": ("caption", "vqa"),
    "answers": ("vqa",),
    "classes": ("classify",),
}
# images that the model reads at a time
_BATCH_SIZES = {"cpu": 8, "cuda": 32}
# decoding needs few threads beside a model
_MOST_THREADS = 4
_BEAMS = 3


def add_evaluate_command(commands: argparse._SubParsersAction) -> None:
    """Add evaluate to the commands of `prismer`."""
    command = commands.add_parser(
        "evaluate", help="score a model on a dataset and write its predictions; run the command again to resume"
    )
    command.add_argument(
        "--model", default="tiny", metavar="MODEL", help="model folder, name of `prismer models list`, or hub id"
    )
    command.add_argument(
        "--data",
        required=True,
        type=as_place,
        metavar="DIR",
        help="a dataset, or a folder of its splits; also a URL such as s3://bucket/data",
    )
    command.add_argument("--split", metavar="NAME", help="of a folder of splits (default val)")
    command.add_argument("--task", required=True, choices=_TASKS)
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results")
    command.add_argument("--limit", type=positive, default=0, metavar="N", help="only the first N images")
    command.add_argument("--batch-size", type=positive, metavar="N", help="images that the model reads at a time")
    prefix = command.add_mutually_exclusive_group()
    prefix.add_argument("--prefix", metavar="TEXT", help="how captions start (default: the model's own prefix)")
    prefix.add_argument(
        "--no-prefix", dest="prefix", action="store_const", const="", help="zero-shot captions of a pre-trained model"
    )
    command.add_argument(
        "--beams", type=positive, metavar="N", help=f"of captions and free answers (default {_BEAMS}; 1 is greedy)"
    )
    command.add_argument(
        "--answers", metavar="FILE|A,B", help="answers to choose from (default: the model's own list, or free text)"
    )
    command.add_argument(
        "--classes",
        metavar="FILE|A,B",
        help="class names to choose from (default: those of the dataset, or of the model)",
    )
    add_experts_option(command)
    add_semantics_option(command)
    command.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default auto: the faster one"
    )
    add_device_option(command)
    command.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    rank, world = rank_and_world()
    for name, tasks in _TASKS_OF.items():
        if getattr(args, name) is not None and args.task not in tasks:
            raise InputError(f"--{name} changes nothing in task {args.task}; leave it out")
    folder = _dataset_folder(args.data, args.split)
    answers = read_texts(args.answers, "--answers") if args.answers else None
    classes = read_texts(args.classes, "--classes") if args.classes else None
    # a mistyped path should not wait for these, which import torch
    from prismer.dataloading.semantics.features import TABLE_FILES
    from prismer.dataloading.store.shards import ShardDataset
    from prismer.evaluation.job import Evaluation, file_digest
    from prismer.weights.locate import locate

    dataset = ShardDataset(folder)
    if args.task == "vqa":
        _check_questions(dataset, args.limit)
    device = device_of_process(args.device, world)
    model, semantics = load_model(args.model, device, precision=args.precision, semantics=args.semantics)
    if args.experts and not model.config.label_experts:
        raise InputError(f"the model {args.model} has no experts and reads no labels; leave --experts out")
    predictor = _predictor(args, model, dataset, answers, classes)
    labeller = load_labeller(args.experts, device, label_size=model.config.label_size) if args.experts else None
    _, weights = locate(args.model)
    source = args.semantics or weights
    table = (source if source.is_dir() else source.parent) / TABLE_FILES[0]
    evaluation = Evaluation(
        task=args.task,
        predictor=predictor,
        dataset=dataset,
        semantics=_semantics(model, semantics, dataset, labels_made=labeller is not None),
        labeller=labeller,
        limit=args.limit,
        batch_size=args.batch_size or _BATCH_SIZES[model.device.type],
        notes={
            "weights": file_digest(weights),
            "semantics": file_digest(table) if table.is_file() else model.config.semantics,
        },
        about={"model": args.model, "data": str(folder)},
    )
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    left = evaluation.run(args.out, rank=rank, world=world, threads=threads, progress=rank == 0 and is_watched())
    if left:
        print(f"{args.out}: process {rank} of {world} is done, {left} parts are left to other processes")
        return 0
    return _show(args.out)


def _predictor(
    args: argparse.Namespace,
    model: "Prismer",
    dataset: "ShardDataset",
    answers: list[str] | None,
    classes: list[str] | None,
) -> "Predictor":
    """What predicts the texts of the task, from the texts that the options give or else those at hand."""
    from prismer.evaluation.predict import Predictor
    from prismer.evaluation.text_kinds import EVALUATED
    from prismer.inference import Candidates
    from prismer.weights.folder import ANSWERS, CLASS_NAMES, stored_texts

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"the model {args.model} has no tokenizer; put vocab.json and merges.txt into its folder")
    if args.task == "vqa" and answers is None:
        answers = stored_texts(model.folder, ANSWERS)
    if args.task == "classify":
        classes = classes or dataset.classes.get("class") or stored_texts(model.folder, CLASS_NAMES)
        if not classes:
            raise InputError(f"neither {dataset.place} nor the model {args.model} lists class names; give --classes")
    if answers:
        _check_answers(tokenizer, answers, model.config.max_positions)
    if args.prefix:
        _check_prefix(tokenizer, args.prefix, model.config.caption_max_length)
    return Predictor(
        model=model,
        kinds=(EVALUATED[args.task],),
        answers=Candidates.answers(tokenizer, answers) if answers else None,
        classes=Candidates.classes(tokenizer, classes) if classes else None,
        class_names=dataset.classes.get("class", ()),
        prefix=args.prefix,
        beams=args.beams or _BEAMS,
    )


def _dataset_folder(data: str | Path, split: str | None) -> str | Path:
    """The place of the dataset that --data and --split name."""
    if has_file(data, "index.json"):
        if split is not None:
            raise InputError(f"{data} is a dataset without splits; leave --split out, or give the folder above it")
        return data
    folder = inside(data, split or "val")
    if has_file(folder, "index.json"):
        return folder
    # a web server lists nothing
    splits = [path.parent.name for path in data.glob("*/index.json")] if isinstance(data, Path) else []
    if not splits:
        what = "" if isinstance(data, Path) else f" or {folder}"
        raise InputError(f"no dataset at {data}{what}; render or import one, or give another --data")
    raise InputError(f"{data} has no split {split or 'val'}, only {listed(splits)}; choose one with --split")


def _check_questions(dataset: "ShardDataset", limit: int) -> None:
    """Refuse a dataset without questions; only the JSON of samples is read, up to the first question."""
    from prismer.dataloading.store.shards import CorruptSample

    for i in range(min(limit or len(dataset), len(dataset))):
        try:
            if dataset.meta(i).get("questions"):
                return
        except CorruptSample:
            continue
    raise InputError(f"no sample of {dataset.place} has questions, which task vqa needs; choose another task or data")


def _check_prefix(tokenizer: "Tokenizer", prefix: str, most: int) -> None:
    from prismer.texts import encode_prompt

    tokens = len(encode_prompt(tokenizer, prefix))
    if tokens >= most:
        raise InputError(f"--prefix has {tokens} tokens, and a caption of this model at most {most}; shorten it")


def _check_answers(tokenizer: "Tokenizer", answers: list[str], room: int) -> None:
    from prismer.texts import answer_fits

    long = [answer for answer in answers if not answer_fits(tokenizer, answer, room)]
    if long:
        raise InputError(
            f"{len(long)} of the {len(answers)} answers are too long for the model's {room} positions (the first: "
            f"{shown(long[0])}); leave them out"
        )


def _semantics(
    model: "Prismer", semantics: "Semantics | None", dataset: "ShardDataset", *, labels_made: bool
) -> "Semantics":
    """Features of the names in label maps; a model that lacks its table can still read images without such maps."""
    from prismer.dataloading.semantics.features import Semantics
    from prismer.experts import EXPERTS

    if semantics is not None:
        return semantics
    named = [name for name in model.config.experts if EXPERTS[name].is_ids and (labels_made or name in dataset.experts)]
    if named:
        raise InputError(
            f"the model's folder lacks its table of features, which the maps of {listed(named)} need; "
            f"give it with --semantics"
        )
    return Semantics.spelling()


def _show(out: Path) -> int:
    """Print the results in a folder."""
    from prismer.evaluation.job import PREDICTIONS, SCORES
    from prismer.evaluation.report import main_scores, score_table
    from prismer.reading import read_json

    found = read_json(out / SCORES, dict, "delete the folder and give the command again")
    skipped = found["skipped"]
    if len(skipped) == found["images"]:
        raise InputError(
            f"none of the {len(skipped)} images can be read ({skipped[0]['skipped']}); see {out / PREDICTIONS}"
        )
    title = f"{found['task']}, {found['predicted']} images"
    print(score_table({"score": main_scores(found["scores"])}, title) if found["scores"] else f"{title}: no true texts")
    for note in found["notes"]:
        print(f"- {note}")
    if skipped:
        first = f"the first: {skipped[0]['key']}, {skipped[0]['skipped']}"
        print(f"- {len(skipped)} of {found['images']} images were skipped ({first})")
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
    return 0
