"""`prismer caption`, `prismer answer` and `prismer classify`: a model reads images and prints text."""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.options import (
    add_device_option,
    add_experts_option,
    add_semantics_option,
    load_labeller,
    load_model,
    positive,
)
from prismer.cli.printing import is_watched
from prismer.errors import InputError

if TYPE_CHECKING:
    from prismer.batch import ImageBatch
    from prismer.inference import Answer

# images that the model reads at a time
_BATCH_SIZES = {"cpu": 8, "cuda": 32}
# no progress bar for this many images or fewer
_FEW_IMAGES = 8


def add_ask_commands(commands: argparse._SubParsersAction) -> None:
    """Add caption, answer and classify to the commands of `prismer`."""
    caption = commands.add_parser("caption", help="describe each image in a sentence")
    caption.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    caption.add_argument("--beams", type=positive, default=3, metavar="N", help="beam width (default 3; 1 is greedy)")
    caption.set_defaults(run=_caption)

    answer = commands.add_parser("answer", help="answer a question about an image")
    answer.add_argument("images", nargs=1, metavar="IMAGE", type=Path)
    answer.add_argument("question", metavar="QUESTION")
    answer.add_argument(
        "--answers", metavar="FILE|A,B", help="answers to choose from (default: the model's own list, or free text)"
    )
    answer.set_defaults(run=_answer)

    classify = commands.add_parser("classify", help="choose a class for each image")
    classify.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    classify.add_argument(
        "--classes", metavar="FILE|A,B", help="class names to choose from (default: the model's own list)"
    )
    classify.set_defaults(run=_classify)

    for command in (answer, classify):
        command.add_argument("--top", type=positive, default=0, metavar="N", help="show the N best with their scores")
    for command in (caption, answer, classify):
        command.add_argument(
            "--model", default="tiny", metavar="MODEL", help="model folder, name of `prismer models list`, or hub id"
        )
        add_device_option(command)
        command.add_argument(
            "--labels", nargs="+", type=Path, default=[], metavar="FILE", help="KEY.labels of each image, in order"
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
    request = _Request(args)
    return request.print_results("caption", lambda images: request.model.caption(images, beams=args.beams))


def _answer(args: argparse.Namespace) -> int:
    answers = read_texts(args.answers, "--answers") if args.answers else None
    request = _Request(args)
    from prismer.weights.folder import ANSWERS, stored_texts

    if answers is None:
        answers = stored_texts(request.model.folder, ANSWERS)
    if args.top and answers is None:
        raise InputError(f"--top ranks a list of answers and the model {args.model} holds none; give --answers too")
    return request.print_results("answer", lambda images: request.model.answer(images, [args.question], answers))


def _classify(args: argparse.Namespace) -> int:
    names = read_texts(args.classes, "--classes") if args.classes else None
    request = _Request(args)
    from prismer.weights.folder import CLASS_NAMES, stored_texts

    names = names or stored_texts(request.model.folder, CLASS_NAMES)
    if names is None:
        raise InputError(f"the model {args.model} has no class names of its own; give --classes")
    return request.print_results("class", lambda images: request.model.classify(images, names))


class _Request:
    """Images and the model that reads them; cheap checks come before the model loads."""

    def __init__(self, args: argparse.Namespace):
        self.paths, self.as_json, self.top = args.images, args.json, getattr(args, "top", 0)
        for path in self.paths:
            _check_file(path)
        if args.labels and len(args.labels) != len(self.paths):
            raise InputError(f"there are {len(self.paths)} images and {len(args.labels)} --labels; give one for each")
        if args.labels and args.experts:
            raise InputError("--labels and --experts both give expert maps; choose one of them")
        # this imports torch: a mistyped path should not wait for it
        from prismer.dataloading.feed.image_batch import ExpertLabels

        self.trace = args.profile
        if self.trace:
            from prismer.costs.profiling import check_trace

            check_trace(self.trace)
        self.labels = [ExpertLabels.from_file(path) for path in args.labels] or [None] * len(self.paths)
        self.model, self.semantics = load_model(
            args.model, args.device, precision=args.precision, int8=args.int8, semantics=args.semantics
        )
        if (args.labels or args.experts) and not self.model.config.experts:
            raise InputError(
                f"the model {args.model} has no experts and reads no labels; leave --labels and --experts out"
            )
        self.labeller = None
        if args.experts:
            self.labeller = load_labeller(args.experts, args.device, label_size=self.model.config.label_size)

    def print_results(self, kind: str, ask: "Callable[[ImageBatch], list[str] | list[Answer]]") -> int:
        """Print the result of `ask` for each image; an unreadable image does not stop the others.

        Args:
            kind: the key of the result in JSON.
            ask: returns a str or an `Answer` for each image.

        Returns:
            The exit code: 2 if an image could not be read.
        """
        from tqdm import tqdm

        code = 0
        show_bar = len(self.paths) > _FEW_IMAGES and is_watched()
        with tqdm(total=len(self.paths), unit="image", disable=not show_bar) as bar:
            for paths, images, errors in self._batches():
                for error in errors:
                    code = 2
                    bar.write(f"prismer: {error}", file=sys.stderr)
                results = self._profiled(ask)(images) if paths else ()
                for path, result in zip(paths, results, strict=True):
                    bar.write(self._line(kind, path, result), file=sys.stdout)
                sys.stdout.flush()
                bar.update(len(paths) + len(errors))
        return code

    def _profiled(self, ask: Callable) -> Callable:
        """`ask`, which with --profile also prints a profile of its first call."""
        if not self.trace:
            return ask
        from tqdm import tqdm

        from prismer.costs.profiling import profile_call

        trace, self.trace = self.trace, None
        dtype = self.model.encoder.positional_embedding.dtype

        def profiled(images: "ImageBatch") -> "list[str] | list[Answer]":
            results, table = profile_call(lambda: ask(images), trace, device=self.model.device, dtype=dtype)
            tqdm.write(table, file=sys.stderr)
            return results

        return profiled

    def _line(self, kind: str, path: Path, result: "str | Answer") -> str:
        scored = not isinstance(result, str)
        text = result.text if scored else result
        ranked = result.ranked[: self.top] if scored else []
        if self.as_json:
            entry = {"image": str(path), kind: text}
            if scored:
                entry["score"] = result.score
            if ranked:
                entry["ranked"] = [{kind: name, "score": score} for name, score in ranked]
            line = json.dumps(entry, ensure_ascii=False)
            try:
                line.encode(sys.stdout.encoding or "utf-8")
            except UnicodeEncodeError:
                # escapes stay JSON where the name is not UTF-8 or the terminal is ASCII
                line = json.dumps(entry)
            return line
        lines = [f"{score:8.3f}  {name}" for name, score in ranked]
        # a question is about one image, so its name is not repeated
        return "\n".join([text if kind == "answer" else f"{path}: {text}", *lines])

    def _batches(self) -> "Iterator[tuple[list[Path], ImageBatch | None, list[ValueError]]]":
        """(paths, their ImageBatch, errors of unreadable images); images are decoded one batch ahead."""
        from concurrent.futures import ThreadPoolExecutor

        from prismer.dataloading.feed.image_batch import image_batch
        from prismer.dataloading.feed.load_image import load_image

        config, size = self.model.config, _BATCH_SIZES[self.model.device.type]
        waiting: deque = deque()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(self.paths))) as pool:
            for start in range(0, len(self.paths), size):
                until = start + 2 * size
                for path in self.paths[until - size if start else 0 : until]:
                    waiting.append(pool.submit(load_image, path, config.image_size))
                paths, images, labels, errors = [], [], [], []
                for i in range(start, min(start + size, len(self.paths))):
                    try:
                        images.append(waiting.popleft().result())
                    except ValueError as error:
                        errors.append(error)
                    else:
                        paths.append(self.paths[i])
                        labels.append(self.labels[i])
                if self.labeller is not None and paths:
                    labels = self.labeller(paths)
                yield (paths, image_batch(images, config, labels, self.semantics) if paths else None, errors)


def read_texts(given: str, what: str) -> list[str]:
    """Read the texts to choose from: a JSON list of strings, a text file with one per line, or "a,b,c".

    Args:
        given: a path, or the texts separated by commas.
        what: the option that gives them, for errors.

    Returns:
        At least two different texts, without blanks around them.

    Raises:
        ValueError: if the file is missing or holds something else, or there are fewer than two texts.
    """
    path = Path(given)
    # os.path: Path raises where many texts are longer than a file name can be
    if os.path.isfile(given):
        texts = _read_list(path)
    elif "," not in given and (os.path.isdir(given) or "/" in given or path.suffix):
        raise InputError(f"{what} names {given}, which is not a file; give a JSON list, a file of lines, or a,b,c")
    else:
        texts = given.split(",")
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(texts) < 2:
        raise InputError(f"{what} {given!r} holds {len(texts)} different texts; give at least two to choose from")
    return texts


def _read_list(path: Path) -> list[str]:
    from prismer.reading import decode_text, lines_of, parse_json, read_bytes

    remedy = "give a JSON list or a file of lines, in UTF-8"
    content = decode_text(read_bytes(path), path, remedy)
    texts = parse_json(content, path, remedy) if path.suffix == ".json" else lines_of(content)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f'{path} is not a list of strings; write it as ["a", "b"]')
    return texts


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the image files in it, e.g. {path}/*.jpg")
    if not path.is_file():
        raise InputError(f"no image file {path}; check the path")
