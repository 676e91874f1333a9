"""Images named one by one: a model reads them and prints a text for each."""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.cli.options import load_labeller, load_model
from prismer.cli.printing import is_watched
from prismer.errors import InputError

if TYPE_CHECKING:
    from prismer.batch import ImageBatch
    from prismer.dataloading.experts.labeller import Labeller
    from prismer.dataloading.semantics.features import Semantics
    from prismer.inference import Answer
    from prismer.model import Prismer

# images that the model reads at a time
_BATCH_SIZES = {"cpu": 8, "cuda": 32}
# no progress bar for this many images or fewer
_FEW_IMAGES = 8


class ImageRequest:
    """Images and the model that reads them; cheap checks come before the model loads."""

    def __init__(self, args: argparse.Namespace):
        self.paths, self.as_json, self.top = args.images, args.json, getattr(args, "top", 0)
        for path in self.paths:
            _check_file(path, args.command)
        if args.labels and len(args.labels) != len(self.paths):
            raise InputError(f"there are {len(self.paths)} images and {len(args.labels)} --labels; give one for each")
        # this imports torch: a mistyped path should not wait for it
        from prismer.dataloading.feed.image_batch import ExpertLabels

        self.trace = args.profile
        if self.trace:
            from prismer.costs.profiling import check_trace

            check_trace(self.trace)
        self.labels = [ExpertLabels.from_file(path) for path in args.labels] or [None] * len(self.paths)
        self.model, self.semantics, self.labeller = open_model(args)

    def print_results(self, task: str, ask: "Callable[[ImageBatch], list[str] | list[Answer]]") -> int:
        """Print the result of `ask` for each image; an unreadable image does not stop the others.

        Args:
            task: "caption", "answer" or "classify".
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
                    bar.write(self._line(task, path, result), file=sys.stdout)
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

    def _line(self, task: str, path: Path, result: "str | Answer") -> str:
        if self.as_json:
            from prismer.asking.items import result_fields

            entry = {"image": str(path), **result_fields(task, result, self.top)}
            line = json.dumps(entry, ensure_ascii=False)
            try:
                line.encode(sys.stdout.encoding or "utf-8")
            except UnicodeEncodeError:
                # escapes stay JSON where the name is not UTF-8 or the terminal is ASCII
                line = json.dumps(entry)
            return line
        text, ranked = (result, []) if isinstance(result, str) else (result.text, result.ranked[: self.top])
        lines = [f"{score:8.3f}  {name}" for name, score in ranked]
        # a question is about one image, so its name is not repeated
        return "\n".join([text if task == "answer" else f"{path}: {text}", *lines])

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
                batch = None
                if paths:
                    batch = image_batch(images, config, labels, self.semantics, self.model.tokenizer)
                yield paths, batch, errors


def open_model(args: argparse.Namespace) -> "tuple[Prismer, Semantics | None, Labeller | None]":
    """The model that the options name, the features of names in maps, and the labeller of --experts."""
    model, semantics = load_model(
        args.model, args.device, precision=args.precision, int8=args.int8, semantics=args.semantics
    )
    if (args.labels or args.experts) and not model.config.label_experts:
        raise InputError(f"the model {args.model} has no experts and reads no labels; leave --labels and --experts out")
    labeller = None
    if args.experts:
        labeller = load_labeller(args.experts, args.device, label_size=model.config.label_size)
    return model, semantics, labeller


def _check_file(path: Path, command: str) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; add --out FILE.jsonl to {command} its images, or name some of them")
    if path.suffix.lower() in (".tar", ".txt"):
        raise InputError(f"{path} is no image; add --out FILE.jsonl to {command} the images that it holds or lists")
    if not path.is_file():
        raise InputError(f"no image file {path}; check the path")
