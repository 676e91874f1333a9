"""Label maps in the layout of Prismer's published labelling code: one PNG per expert, with a .json or .pt table."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prismer.dataloading.feed.rgb import TURNS
from prismer.dataloading.sources.records import FilePart
from prismer.dataloading.store.label_maps import blank_planes
from prismer.dataloading.store.native_ops import values_in_use
from prismer.errors import InputError
from prismer.experts import BACKGROUND, EXPERTS
from prismer.reading import parse_json


def read_published_labels(
    files: dict[str, Path], classes: dict[str, list[str]], size: int, orientation: int = 1
) -> tuple[dict[str, np.ndarray], dict, list[str]]:
    """The label maps of one image, at (size, size) by nearest neighbour.

    An absent or empty file is an empty map (never class 0, "person"). The tables of objects and words are in `.json`
    and `.pt` files beside the PNG; of the latter the text is taken. The axes of the normals are taken as they are.
    Labels turn with an image that its EXIF orientation turns. Normals are then left out, because their vectors would
    have to turn too.

    Args:
        files: expert -> PNG.
        classes: the class tables to check ids against.
        size: side of the maps, px.
        orientation: EXIF orientation that was undone in the image; 1 for none.

    Returns:
        expert -> uint8 map; {"instances": ..., "words": ...} for those experts that are in `files`; the experts whose
        file was absent or empty.

    Raises:
        ValueError: if a file is damaged, or a map holds an id that is not in its table.
    """
    planes, tables, blank = {}, {}, []
    for expert, path in files.items():
        if expert == "normal" and orientation != 1:
            continue
        plane = _read_plane(expert, path, size, orientation)
        table: dict[str, object] = {}
        kind = EXPERTS[expert].kind
        if kind == "object" and plane is not None:
            table = _read_instances(path.with_suffix(".json"), len(classes[expert]))
        if kind == "word" and plane is not None:
            table = _read_words(path.with_suffix(".pt"))
            # as in the published loader: a map without its table holds no words
            plane = plane if table else None
        if plane is None:
            blank.append(expert)
            plane = blank_planes(expert, size)
        if EXPERTS[expert].is_ids:
            known = set(range(len(classes[expert]))) if kind == "class" else {int(i) for i in table}
            unknown = set(values_in_use(plane)) - known - {BACKGROUND}
            if unknown:
                raise InputError(f"{path} holds id {min(unknown)}, which is not in its table of {len(known)}")
        planes[expert] = plane
        if EXPERTS[expert].table:
            tables[EXPERTS[expert].table] = table
    return planes, tables, blank


def _read_plane(expert: str, path: Path, size: int, orientation: int) -> np.ndarray | None:
    """A label PNG as uint8 at (size, size); None if it is absent or has no bytes."""
    mode = "RGB" if EXPERTS[expert].planes == 3 else "L"
    try:
        data = _read_if_any(path)
        if not data:
            return None
        with Image.open(io.BytesIO(data)) as image:
            # converting an id map from another mode would change its ids
            if image.mode != mode and not (image.mode == "P" and EXPERTS[expert].is_ids):
                raise InputError(f"it is {image.mode}, expected {mode}")
            image.load()
            if orientation != 1:
                image = image.transpose(TURNS[orientation])
            return np.asarray(image.resize((size, size), Image.Resampling.NEAREST)).copy()
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(f"the label {path} cannot be read ({error})") from None


def _read_instances(path: Path, num_classes: int) -> dict[str, int]:
    try:
        table = parse_json(FilePart(path).read(), "it")
        if not isinstance(table, dict):
            raise InputError(f"it is a {type(table).__name__}, not an object of id: class")
        for i, class_id in table.items():
            if not (i.isascii() and i.isdecimal()):
                raise InputError(f"it has the id {i!r}, expected a number")
            if not isinstance(class_id, int) or isinstance(class_id, bool):
                raise InputError(f"object {i} is of class {str(class_id)[:40]!r}, expected a number")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the object table {path} cannot be read ({error})") from None
    for class_id in table.values():
        if not 0 <= class_id < num_classes:
            raise InputError(f"{path} names class {class_id}, the class table has {num_classes} names")
    return table


def _read_words(path: Path) -> dict[str, str]:
    """The words of a published `.pt` file {id: {"features", "text"}}; {} if there is none."""
    try:
        data = _read_if_any(path)
        if not data:
            return {}
        table = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for i, word in table.items():
            if isinstance(i, bool) or not isinstance(i, int) or not isinstance(word["text"], str):
                raise InputError(f"word {i!r} is not a text under a number")
        return {str(i): word["text"].lower() for i, word in table.items()}
    except Exception as error:  # torch raises its own exceptions on damaged or unsafe files
        raise InputError(f"the word table {path} cannot be read ({error})") from None


def _read_if_any(path: Path) -> bytes:
    """The bytes of a file; none if it is absent. A folder or a pipe of that name is an error, not an absence."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    return FilePart(path).read()
