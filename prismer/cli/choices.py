"""Texts to choose from, as the options --answers and --classes or the model give them."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from prismer.errors import InputError

if TYPE_CHECKING:
    from prismer.model import Prismer


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


def stored_choices(args: argparse.Namespace, model: "Prismer") -> list[str] | None:
    """The answers or classes of the model itself, for a command without --answers or --classes.

    Returns:
        None for captions, and for answers in the model's own words.

    Raises:
        ValueError: if the model has no list and the command needs one.
    """
    from prismer.weights.folder import ANSWERS, CLASS_NAMES, stored_texts

    if args.command == "caption":
        return None
    texts = stored_texts(model.folder, ANSWERS if args.command == "answer" else CLASS_NAMES)
    if texts is None and args.command == "classify":
        raise InputError(f"the model {args.model} has no class names of its own; give --classes")
    if texts is None and args.top:
        raise InputError(f"--top ranks a list of answers and the model {args.model} holds none; give --answers too")
    return texts


def _read_list(path: Path) -> list[str]:
    from prismer.reading import decode_text, lines_of, parse_json, read_bytes

    remedy = "give a JSON list or a file of lines, in UTF-8"
    content = decode_text(read_bytes(path), path, remedy)
    texts = parse_json(content, path, remedy) if path.suffix == ".json" else lines_of(content)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f'{path} is not a list of strings; write it as ["a", "b"]')
    return texts
