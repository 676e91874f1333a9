"""Whole folders, tars, datasets and files of questions: a model reads them and writes one line of JSON for each."""

import argparse
import sys

from prismer.asking.items import Items, image_items, question_items
from prismer.asking.job import AskReport, ask_all, check_result
from prismer.cli.ask_images import open_model
from prismer.cli.choices import stored_choices
from prismer.cli.options import device_of_process, rank_and_world
from prismer.cli.printing import is_watched
from prismer.errors import InputError

# files that are no images, and text files that stayed as they were, that are named
_FEW = 3


def run_job(args: argparse.Namespace, given: list[str] | None, **options: int) -> int:
    """Ask about all images of `args.images`, or the questions of `args.questions`, and write `args.out`.

    Args:
        args: of caption, answer or classify.
        given: answers or classes to choose from; None takes the model's own, if it has some.
        options: of `model.caption`.

    Returns:
        The exit code.
    """
    rank, world = rank_and_world()
    check_result(args.out)
    items = _find_items(args)
    args.device = device_of_process(args.device, world)
    model, semantics, labeller = open_model(args)
    report = ask_all(
        model,
        items,
        args.out,
        args.command,
        choices=given or stored_choices(args, model),
        top=getattr(args, "top", 0),
        labeller=labeller,
        semantics=semantics,
        write_texts=getattr(args, "txt", False),
        rank=rank,
        world=world,
        progress=is_watched(),
        **options,
    )
    _print_report(args, items, report, f"process {rank} of {world}")
    return 0


def _find_items(args: argparse.Namespace) -> Items:
    if len(args.labels) > 1 or not all(folder.is_dir() for folder in args.labels):
        raise InputError("--labels with --out names one folder, with IMAGE.labels for IMAGE.jpg; name that folder")
    labels = args.labels[0] if args.labels else None
    if getattr(args, "questions", None):
        if labels is not None:
            raise InputError("--labels does not go with --questions; label the images with --experts")
        return question_items(args.questions)
    return image_items(args.images, question=getattr(args, "question", None), labels=labels)


def _print_report(args: argparse.Namespace, items: Items, report: AskReport, process: str) -> None:
    for other in items.others[:_FEW]:
        print(f"left alone {other.file}: {other.reason}", file=sys.stderr)
    if len(items.others) > _FEW:
        print(f"... and {len(items.others) - _FEW} more files that are no images", file=sys.stderr)
    for path in report.texts_kept[:_FEW]:
        print(f"left {path} as it is: it holds another text", file=sys.stderr)
    if len(report.texts_kept) > _FEW:
        print(f"... and {len(report.texts_kept) - _FEW} more text files that stay as they are", file=sys.stderr)
    if report.parts_missing:
        print(f"{args.out}: {process} is done, {report.parts_missing} parts are left to other processes")
        return
    for row in report.first_skipped:
        # a line of questions that names no image is named in its reason
        where = f"{row['image']}: " if isinstance(row.get("image"), str) else ""
        print(f"skipped {where}{row['skipped']}", file=sys.stderr)
    if report.skipped > len(report.first_skipped):
        print(f"... and {report.skipped - len(report.first_skipped)} more, all in {args.out}", file=sys.stderr)
    skipped = f", {report.skipped} of them with a reason instead of a result" if report.skipped else ""
    print(f"{args.out}: {report.lines} lines{skipped}")
    if report.skipped == report.lines:
        raise InputError(f"none of the {report.lines} images could be read; see {args.out}")
