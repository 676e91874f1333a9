"""`prismer caption`, `prismer answer`, `prismer classify`: pictures in, words out."""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from prismer.cli.experts import add_experts_option, make_labeller

_BATCH = {"cpu": 8, "cuda": 32}
# pictures at a time
_QUIET = 8
# up to so many pictures nobody waits long enough for a progress bar


def add_ask_commands(commands) -> None:
    """Add caption, answer and classify to the sub-commands of `prismer`."""
    caption = commands.add_parser("caption", help="describe pictures in a sentence")
    caption.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    caption.add_argument("--beams", type=_positive, default=3, metavar="N", help="default 3; 1 is greedy")
    caption.set_defaults(run=_caption)

    answer = commands.add_parser("answer", help="answer a question about a picture")
    answer.add_argument("images", nargs=1, metavar="IMAGE", type=Path)
    answer.add_argument("question", metavar="QUESTION")
    answer.add_argument(
        "--answers", metavar="FILE|A,B", help="answers to choose from; default: the model's own list, or free text"
    )
    answer.set_defaults(run=_answer)

    classify = commands.add_parser("classify", help="choose a class for pictures")
    classify.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    classify.add_argument("--classes", required=True, metavar="FILE|A,B", help="class names to choose from")
    classify.set_defaults(run=_classify)

    for command in (answer, classify):
        command.add_argument("--top", type=_positive, default=0, metavar="N", help="show the N best with their scores")
    for command in (caption, answer, classify):
        command.add_argument("--model", default="tiny", metavar="FOLDER", help="model folder, or tiny (shipped)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        command.add_argument(
            "--labels", nargs="+", type=Path, default=[], metavar="FILE", help="KEY.labels of each picture, in order"
        )
        command.add_argument(
            "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default auto: the faster one"
        )
        command.add_argument("--int8", action="store_true", help="multiply the frozen towers in int8, on a CPU")
        add_experts_option(command)
        command.add_argument("--json", action="store_true", help="print one JSON object per line")
        command.add_argument(
            "--profile",
            type=Path,
            metavar="TRACE.json.gz",
            help="show where the time of the first pictures goes, and write a trace",
        )


def _caption(args: argparse.Namespace) -> int:
    asked = _Asked(args)
    return asked.print_each("caption", lambda images: asked.model.caption(images, beams=args.beams))


def _answer(args: argparse.Namespace) -> int:
    answers = read_texts(args.answers, "--answers") if args.answers else None
    asked = _Asked(args)
    if answers is None:
        answers = _stored_answers(asked.folder)
    if args.top and answers is None:
        raise ValueError(f"--top ranks a list of answers and the model {args.model} holds none; give --answers too")
    return asked.print_each("answer", lambda images: asked.model.answer(images, [args.question], answers))


def _classify(args: argparse.Namespace) -> int:
    names = read_texts(args.classes, "--classes")
    asked = _Asked(args)
    return asked.print_each("class", lambda images: asked.model.classify(images, names))


class _Asked:
    """Pictures and the model that is asked about them; what is cheap to check is checked before the model loads."""

    def __init__(self, args: argparse.Namespace):
        self.paths, self.as_json, self.top = args.images, args.json, getattr(args, "top", 0)
        for path in self.paths:
            _check_file(path)
        if args.labels and len(args.labels) != len(self.paths):
            raise ValueError(f"there are {len(self.paths)} pictures and {len(args.labels)} --labels; give one for each")
        if args.labels and args.experts:
            raise ValueError("--labels and --experts both give expert maps; choose one of them")
        # torch comes with it: a mistyped path should not wait for that
        from prismer.dataloading.feed.image_batch import ExpertLabels

        self.trace = args.profile
        if self.trace:
            from prismer.costs.profiling import check_trace

            check_trace(self.trace)
        self.labels = [ExpertLabels.from_file(path) for path in args.labels] or [None] * len(self.paths)
        self.folder = model_folder(args.model)
        self.model, self.semantics = load_model(
            args.model, self.folder, args.device, precision=args.precision, int8=args.int8
        )
        if (args.labels or args.experts) and not self.model.config.experts:
            raise ValueError(
                f"the model {args.model} has no experts and reads no labels; leave --labels and --experts out"
            )
        self.labeller = None
        if args.experts:
            self.labeller = make_labeller(args.experts, args.device, label_size=self.model.config.label_size)

    def print_each(self, kind: str, ask: Callable) -> int:
        """Print what `ask(ImageBatch)` finds for each picture; one that cannot be read does not stop the others.

        Args:
            kind: what is asked for, the key of it in JSON.
            ask: gives a str or an `Answer` for each picture.

        Returns:
            The exit code: 2 if some picture could not be read.
        """
        from tqdm import tqdm

        code = 0
        watched = len(self.paths) > _QUIET and sys.stderr.isatty()
        with tqdm(total=len(self.paths), unit="picture", disable=not watched) as bar:
            for paths, images, errors in self._batches():
                for error in errors:
                    code = 2
                    bar.write(f"prismer: {error}", file=sys.stderr)
                found_by_path = self._profiled(ask)(images) if paths else ()
                for path, found in zip(paths, found_by_path, strict=True):
                    bar.write(self._line(kind, path, found), file=sys.stdout)
                sys.stdout.flush()
                bar.update(len(paths) + len(errors))
        return code

    def _profiled(self, ask: Callable) -> Callable:
        """`ask`; the first time, where --profile is given, one that also says where its time went."""
        if not self.trace:
            return ask
        from tqdm import tqdm

        from prismer.costs.profiling import profile_call

        trace, self.trace = self.trace, None
        dtype = self.model.encoder.positional_embedding.dtype

        def ask_and_tell(images):
            found, table = profile_call(lambda: ask(images), trace, device=self.model.device, dtype=dtype)
            tqdm.write(table, file=sys.stderr)
            return found

        return ask_and_tell

    def _line(self, kind: str, path: Path, found) -> str:
        scored = not isinstance(found, str)
        text = found.text if scored else found
        ranked = found.ranked[: self.top] if scored else []
        if self.as_json:
            entry = {"image": str(path), kind: text}
            if scored:
                entry["score"] = found.score
            if ranked:
                entry["ranked"] = [{kind: name, "score": score} for name, score in ranked]
            # a name that is not UTF-8 is JSON too, and so is any text on an ASCII terminal
            line = json.dumps(entry, ensure_ascii=False)
            try:
                line.encode(sys.stdout.encoding or "utf-8")
            except UnicodeEncodeError:
                line = json.dumps(entry)
            return line
        lines = [f"{score:8.3f}  {name}" for name, score in ranked]
        # a question is about one picture, whose name need not be repeated
        return "\n".join([text if kind == "answer" else f"{path}: {text}", *lines])

    def _batches(self) -> Iterator[tuple]:
        """(paths, their ImageBatch, errors of those that cannot be read); pictures are decoded a batch ahead."""
        from concurrent.futures import ThreadPoolExecutor

        from prismer.dataloading.feed.image_batch import image_batch
        from prismer.dataloading.feed.load_image import load_image

        config, size = self.model.config, _BATCH[self.model.device.type]
        waiting: deque = deque()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(self.paths))) as pool:
            for start in range(0, len(self.paths), size):
                until = start + 2 * size
                for path in self.paths[until - size if start else 0 : until]:
                    waiting.append(pool.submit(load_image, path, config.image_size))
                paths, pictures, labels, errors = [], [], [], []
                for i in range(start, min(start + size, len(self.paths))):
                    try:
                        pictures.append(waiting.popleft().result())
                    except ValueError as error:
                        errors.append(error)
                    else:
                        paths.append(self.paths[i])
                        labels.append(self.labels[i])
                if self.labeller is not None and paths:
                    labels = self.labeller(paths)
                yield (paths, image_batch(pictures, config, labels, self.semantics) if paths else None, errors)


def load_model(source: str, folder: Path, device_name: str, *, precision: str = "auto", int8: bool = False):
    """A model ready to be asked, and what turns the names in label maps into features.

    Args:
        source: what `Prismer.from_pretrained` takes.
        folder: where that lies.
        device_name: see `pick_device`.
        precision: "bf16", "fp32" or "auto", which is the faster one.
        int8: whether the frozen towers multiply in int8 (`prismer.quantise`).

    Returns:
        Prismer in evaluation mode; and its Semantics, or None where the folder lacks the table that the config asks
        for.

    Raises:
        ValueError: if there is no such device, the model cannot be loaded, or int8 is asked of a GPU.
    """
    import torch

    from prismer.dataloading.semantics.features import TABLE_FILES, Semantics
    from prismer.model import Prismer
    from prismer.quantise import check_device, quantise

    device = pick_device(device_name)
    if int8:
        check_device(device)
    dtype = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = Prismer.from_pretrained(source, device=device, dtype=dtype)
    if int8:
        quantise(model)
    has_table = (folder / TABLE_FILES[0]).is_file()
    if model.config.semantics != "spelling" and not has_table:
        return model, None
    return model, Semantics.for_config(model.config, folder)


def pick_device(name: str):
    """The torch device called `name`; "auto" is the GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and index) or not (index or "0").isdecimal():
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name}: torch sees {torch.cuda.device_count()} GPUs; choose auto or cpu")
    return torch.device(name)


def read_texts(given: str, what: str) -> list[str]:
    """Texts to choose from: a JSON list of strings, a text file with one per line, or "a,b,c".

    Args:
        given: a path, or the texts separated by commas.
        what: where it was given, for errors.

    Returns:
        At least two different texts, without blanks around them.

    Raises:
        ValueError: if the file is missing or holds something else, or there are fewer than two texts.
    """
    path = Path(given)
    # os.path: many texts make a longer name than a file can have, of which Path says so by an error
    if os.path.isfile(given):
        texts = _read_list(path)
    elif "," not in given and (os.path.isdir(given) or "/" in given or path.suffix):
        raise ValueError(f"{what} names {given}, which is no file; give a JSON list, a file of lines, or a,b,c")
    else:
        texts = given.split(",")
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(texts) < 2:
        raise ValueError(f"{what} {given!r} holds {len(texts)} different texts; give at least two to choose from")
    return texts


def _read_list(path: Path) -> list[str]:
    from prismer.reading import decode_text, lines_of, parse_json, read_bytes

    remedy = "give a JSON list or a file of lines, in UTF-8"
    content = decode_text(read_bytes(path), path, remedy)
    texts = parse_json(content, path, remedy) if path.suffix == ".json" else lines_of(content)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{path} is not a list of strings; write it as ["a", "b"]')
    return texts


def _stored_answers(folder: Path) -> list[str] | None:
    """The answers that a model was trained to choose from, if its folder lists some."""
    path = folder / "answers.json"
    # a model that was trained on captions alone has an empty list
    return _read_list(path) or None if path.is_file() else None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the image files in it, e.g. {path}/*.jpg")
    if not path.is_file():
        raise ValueError(f"no image file {path}; check the path")


def model_folder(source: str) -> Path:
    """The folder of a model: `source` itself, or where a shipped model of that name lies."""
    from prismer.shipped import SHIPPED_MODELS, shipped_folder

    return shipped_folder(source) if source in SHIPPED_MODELS and not Path(source).is_dir() else Path(source)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
