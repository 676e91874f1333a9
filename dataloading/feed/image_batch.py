"""Images and their expert labels, given by a user -> the batch that the vision encoder reads."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prismer.batch import Detections, ImageBatch
from prismer.config import PrismerConfig
from prismer.dataloading.feed.detections import Detection, DetectionFinder
from prismer.dataloading.feed.load_image import ImageSource, load_images
from prismer.dataloading.semantics.features import FeatureTables, Semantics
from prismer.dataloading.store.index import check_classes
from prismer.dataloading.store.label_maps import check_plane, resize_nearest, unpack_labels
from prismer.dataloading.store.sample_json import check_meta
from prismer.errors import InputError
from prismer.experts import EXPERTS, FEATURE_WIDTH
from prismer.reading import parse_json
from prismer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExpertLabels:
    """The label maps of one image and their tables.

    Attributes:
        planes: expert -> uint8 map (h, w), or (h, w, 3) for normals; experts without a map are left out.
        meta: "instances": {object id: class index} and "words": {id: text} of the maps, and their "boxes", as in a
            sample's JSON (store/sample_json.py). A model that reads detections as text takes them without maps, too.
        classes: "seg" and "obj_detection" -> class names.
        name: of the labels, for errors.

    Raises:
        ValueError: if an expert is unknown, or a map has another dtype or shape.
    """

    planes: dict[str, np.ndarray]
    meta: dict = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    name: str = "the expert labels"

    def __post_init__(self):
        for name, table in (("planes", self.planes), ("meta", self.meta), ("classes", self.classes)):
            if not isinstance(table, dict):
                raise InputError(f"the {name} of {self.name} are {type(table).__name__}; give a dictionary")
        check_classes(self.classes)
        for expert, plane in self.planes.items():
            check_plane(expert, plane, self.name)

    @classmethod
    def from_file(cls, path: str | Path) -> "ExpertLabels":
        """Read a packed KEY.labels, and the tables ("instances", "words", "classes") in the KEY.json beside it.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no labels file {path}; `prismer data extract` writes one for a sample of a dataset")
        try:
            planes = unpack_labels(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} cannot be used: {error}") from None
        tables = path.with_suffix(".json")
        meta = {}
        if tables.is_file():
            meta = parse_json(tables.read_bytes(), tables, "write it again")
        elif any(EXPERTS[expert].is_ids for expert in planes):
            raise InputError(f"{path} holds maps of ids, but {tables.name} with their tables is missing; put it there")
        classes = meta.get("classes", {}) if isinstance(meta, dict) else None
        if not isinstance(classes, dict):
            raise InputError(f"{tables} does not hold tables; expected an object with instances, words and classes")
        try:
            check_classes(classes)
        except ValueError as error:
            raise InputError(f"{tables} cannot be used: {error}") from None
        return cls(planes, meta, classes, str(path))


_LABELS = (ExpertLabels, str, os.PathLike, type(None))


def image_batch(
    images: Sequence[ImageSource],
    config: PrismerConfig,
    labels: Sequence[ExpertLabels | str | os.PathLike | None] | None = None,
    semantics: Semantics | None = None,
    tokenizer: Tokenizer | None = None,
) -> ImageBatch:
    """Images and their expert labels as the encoder reads them; arguments as `batch_of_pixels`, but for the images.

    Args:
        images: one or more, see `load_image`.

    Returns:
        Batch on the CPU.

    Raises:
        ValueError: if an image or labels cannot be read, their numbers differ, or a table is needed and not given.
    """
    if labels is not None and not isinstance(labels, list | tuple):
        raise InputError(f"labels are {type(labels).__name__}; give a list with labels, a file or None for each image")
    wrong = next((x for x in labels or () if not isinstance(x, _LABELS)), None)
    if wrong is not None:
        raise InputError(f"labels of an image are {type(wrong).__name__}; give ExpertLabels, a file or None")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"there are {len(images)} images and {len(labels)} labels; give one for each, or None")
    return batch_of_pixels(load_images(images, config.image_size), config, labels, semantics, tokenizer)


def batch_of_pixels(
    rgb: Tensor,
    config: PrismerConfig,
    labels: Sequence[ExpertLabels | str | os.PathLike | None] | None = None,
    semantics: Semantics | None = None,
    tokenizer: Tokenizer | None = None,
) -> ImageBatch:
    """Decoded images and their expert labels as the encoder reads them.

    Args:
        rgb: (B, 3, R, R) uint8 on the CPU, as `load_images` returns it.
        config: gives the experts and the sizes; labels of other experts are not used.
        labels: for each image its labels or a KEY.labels file (`ExpertLabels.from_file`). Missing labels (None) are
            fine: the maps of the model's experts are filled with background.
        semantics: turns class names and words into features; by default the source that `config.semantics` names, if
            it needs no table.
        tokenizer: the model's own; only a model that reads detections as text needs it.

    Returns:
        Batch on the CPU.

    Raises:
        ValueError: if labels cannot be read or used, or a table or the tokenizer is needed and not given.
    """
    L = config.label_size
    batch = ImageBatch.without_labels(rgb, config.experts, L)
    found = [ExpertLabels.from_file(x) if isinstance(x, str | os.PathLike) else x for x in labels or ()]
    ids_are_used = any(EXPERTS[name].is_ids and name in config.experts for x in found if x for name in x.planes)
    if semantics is None and (ids_are_used or config.semantics == "spelling"):
        semantics = Semantics.for_config(config)
    blank = np.zeros(FEATURE_WIDTH, np.float32)
    features, num_rows = [(blank if semantics is None else semantics.background)[None]], 1
    for b, experts in enumerate(found):
        if experts is None:
            continue
        for name in set(config.experts) & set(experts.planes):
            plane = torch.from_numpy(resize_nearest(experts.planes[name], L, L))
            batch.labels[name][b] = plane if plane.ndim == 2 else plane.permute(2, 0, 1)
        if ids_are_used:
            rows, more = _look_up(experts, config, semantics)
            for name, row in rows.items():
                # after the rows of the images before; the background is one row for all
                batch.rows[name][b] = torch.from_numpy(np.where(row > 0, row + num_rows - 1, 0))
            features.append(more)
            num_rows += len(more)
    batch.features = torch.from_numpy(np.concatenate(features))
    if config.expert_text:
        batch.detections = _detections(found, config, tokenizer, len(rgb))
    return batch


def _detections(
    labels: list[ExpertLabels | None], config: PrismerConfig, tokenizer: Tokenizer | None, num_images: int
) -> Detections:
    if all(experts is None for experts in labels):
        return Detections.none(num_images, config.num_detection_tokens, config.pad_id)
    finder = DetectionFinder(config, tokenizer)
    fields = [*(EXPERTS[name].table for name in config.expert_text), "boxes"]

    def find(experts: ExpertLabels | None) -> list[Detection]:
        if experts is None:
            return []
        try:
            check_meta({name: experts.meta[name] for name in fields if name in experts.meta}, experts.classes)
            return finder.find(experts.planes, experts.meta, experts.classes)
        except ValueError as error:
            raise InputError(f"{experts.name} cannot be used: {error}") from None

    return finder.collate(list(map(find, labels)))


def _look_up(
    experts: ExpertLabels, config: PrismerConfig, semantics: Semantics
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Expert -> (256,) row of each id, and the features of rows 1 and up."""
    try:
        # each image has its own class tables
        tables = FeatureTables(config, experts.classes, semantics)
        rows, features = tables.collate([tables.look_up(experts.planes, experts.meta)])
    except ValueError as error:
        raise InputError(f"{experts.name} cannot be used: {error}") from None
    return {name: table[0] for name, table in rows.items()}, features[1:]
