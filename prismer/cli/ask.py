"""`prismer caption`, `prismer answer` and `prismer classify`: images named one by one, or whole folders into a file."""

import argparse
from pathlib import Path

from prismer.cli.ask_images import ImageRequest
from prismer.cli.choices import read_texts, stored_choices
from prismer.cli.options import add_device_option, add_experts_option, add_semantics_option, positive
from prismer.errors import InputError

_SOURCES = "image, folder of images, tar, dataset, or .txt with one path a line (relative to its folder)"


def add_ask_commands(commands: argparse._SubParsersAction) -> None:
    """Add caption, answer and classify to the commands of `prismer`."""
    caption = commands.add_parser("caption", help="describe each image in a sentence")
    caption.add_argument("images", nargs="+", metavar="IMAGE|SOURCE", type=Path, help=_SOURCES)
    caption.add_argument("--beams", type=positive, default=3, metavar="N", help="beam width (default 3; 1 is greedy)")
    caption.add_argument(
        "--txt",
        action="store_true",
        help="with --out, also write IMAGE.txt beside IMAGE.jpg; for tars and datasets OUT-txt/KEY.txt",
    )
    caption.set_defaults(run=_caption)

    answer = commands.add_parser("answer", help="answer a question about an image, or a file of questions")
    answer.add_argument("images", nargs="?", metavar="IMAGE|SOURCE", type=Path, help=_SOURCES)
    answer.add_argument("question", nargs="?", metavar="QUESTION")
    answer.add_argument(
        "--questions",
        type=Path,
        metavar="FILE.jsonl",
        help="a line for each question: image (relative to the folder of the file), question; other fields, such as "
        "id, are carried through",
    )
    answer.add_argument(
        "--answers", metavar="FILE|A,B", help="answers to choose from (default: the model's own list, or free text)"
    )
    answer.set_defaults(run=_answer)

    classify = commands.add_parser("classify", help="choose a class for each image")
    classify.add_argument("images", nargs="+", metavar="IMAGE|SOURCE", type=Path, help=_SOURCES)
    classify.add_argument(
        "--classes", metavar="FILE|A,B", help="class names to choose from (default: the model's own list)"
    )
    classify.set_defaults(run=_classify)

    for command in (answer, classify):
        command.add_argument("--top", type=positive, default=0, metavar="N", help="show the N best with their scores")
    for name, command in (("caption", caption), ("answer", answer), ("classify", classify)):
        command.set_defaults(command=name)
        command.add_argument(
            "--out",
            type=Path,
            metavar="FILE.jsonl",
            help="write one JSON object for each image, in order; run the command again to resume, or on several "
            "processes with torchrun to share the work",
        )
        command.add_argument(
            "--model", default="tiny", metavar="MODEL", help="model folder, name of `prismer models list`, or hub id"
        )
        add_device_option(command)
        command.add_argument(
            "--labels",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="KEY.labels of each image, in order; with --out, the folder of them. A dataset brings its own",
        )
        command.add_argument(
            "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default auto: the faster one"
        )
        command.add_argument("--int8", action="store_true", help="multiply the frozen towers in int8, on a CPU")
        add_experts_option(command)
        add_semantics_option(command)
        command.add_argument("--json", action="store_true", help="print one JSON object per line")
        command.add_argument(
            "--profile",
            type=Path,
            metavar="TRACE.json.gz",
            help="show where the time of the first images goes, and write a trace",
        )


def _caption(args: argparse.Namespace) -> int:
    _check(args)
    if args.out:
        return _run_job(args, beams=args.beams)
    if args.txt:
        raise InputError("--txt goes with --out, the file of all captions; give --out too")
    request = ImageRequest(args)
    return request.print_results("caption", lambda images: request.model.caption(images, beams=args.beams))


def _answer(args: argparse.Namespace) -> int:
    _check(args)
    if args.questions and (args.images or not args.out):
        raise InputError("--questions names the images itself and goes with --out, where the answers are written")
    if not args.questions and args.question is None:
        raise InputError("give an image and a question, or --questions FILE.jsonl --out FILE.jsonl")
    given = read_texts(args.answers, "--answers") if args.answers else None
    args.images = [args.images] if args.images else []
    if args.out:
        return _run_job(args, given)
    request = ImageRequest(args)
    answers = given or stored_choices(args, request.model)
    return request.print_results("answer", lambda images: request.model.answer(images, [args.question], answers))


def _classify(args: argparse.Namespace) -> int:
    _check(args)
    given = read_texts(args.classes, "--classes") if args.classes else None
    if args.out:
        return _run_job(args, given)
    request = ImageRequest(args)
    names = given or stored_choices(args, request.model)
    return request.print_results("classify", lambda images: request.model.classify(images, names))


def _check(args: argparse.Namespace) -> None:
    if args.labels and args.experts:
        raise InputError("--labels and --experts both give expert maps; choose one of them")
    if args.out and (args.json or args.profile):
        raise InputError("--json and --profile are for images that are printed; leave them out with --out")


def _run_job(args: argparse.Namespace, given: list[str] | None = None, **options: int) -> int:
    # imported here, because it needs what parsing does not
    from prismer.cli.ask_files import run_job

    return run_job(args, given, **options)
