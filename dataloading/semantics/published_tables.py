"""The published feature files of Prismer (torch.save of names and rows) as a semantics folder."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prismer.dataloading.semantics.clip_tables import check_absent, refuse_pickle, write_folder
from prismer.dataloading.semantics.features import normalise
from prismer.errors import InputError
from prismer.experts import FEATURE_WIDTH
from prismer.reading import is_text, read_bytes


def import_published(out: str | Path, tables: Iterable[str | Path], background: str | Path) -> tuple[int, int]:
    """Make a semantics folder from the published feature files; without a PCA, because the published one is a pickle.

    Args:
        out: the folder; absent or empty.
        tables: files of {"labels": n names, "features": (n, 64)}, written by torch.save.
        background: a file with one tensor (64,).

    Returns:
        The number of names read, and of different names in the table.

    Raises:
        ValueError: if a file has another form, or two rows of one name disagree.
    """
    out = Path(out)
    check_absent(out)
    rows: dict[str, np.ndarray] = {}
    origin: dict[str, Path] = {}
    read = 0
    tables = list(map(Path, tables))
    for path in tables:
        table = _load_tensors(path)
        labels, features = (table.get("labels"), table.get("features")) if isinstance(table, dict) else (None, 0)
        is_names = isinstance(labels, list) and all(isinstance(x, str) and is_text(x) for x in labels)
        if not is_names:
            raise InputError(f"{path} holds no list 'labels'; expected a feature file of names")
        for name, row in zip(labels, _rows(features, (len(labels), FEATURE_WIDTH), path), strict=True):
            name = normalise(name)
            if not name:
                raise InputError(f"{path} gives features to an empty name; use a published file")
            if not np.allclose(rows.setdefault(name, row), row, rtol=0, atol=1e-4):
                raise InputError(f"{path} gives {name!r} other features than {origin[name]}; use files of one release")
            origin.setdefault(name, path)
        read += len(labels)
    if not rows:
        raise InputError("no names are imported; name a feature file of classes")
    nothing = _rows(_load_tensors(Path(background)), (FEATURE_WIDTH,), background)
    files = [*tables, Path(background)]
    recipe = {
        "format": "prismer-semantics",
        "imported": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "texts": len(rows),
        "pca": None,
    }
    write_folder(out, list(rows), np.stack(list(rows.values())), nothing, None, recipe)
    return read, len(rows)


def _load_tensors(path: Path) -> Any:
    if path.suffix in (".pkl", ".pickle"):
        refuse_pickle(path)
    data = read_bytes(path)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on damaged files
        reason = (str(error).strip().splitlines() or ["cut short"])[0][:120]
        raise InputError(f"{path} is not a file of plain tensors ({reason}); use a published feature file") from None


def _rows(value: object, shape: tuple[int, ...], path: str | Path) -> np.ndarray:
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != shape or not value.is_floating_point() or not value.isfinite().all():
        raise InputError(f"the features in {path} are {got}; expected {shape} finite numbers")
    return value.float().numpy()
