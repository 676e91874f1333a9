"""Pictures of any kind -> what the model reads: square uint8 RGB tensors, with expert labels where there are some."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prismer.batch import ImageBatch
from prismer.config import PrismerConfig
from prismer.dataloading.feed.features import FeatureTables, Semantics
from prismer.dataloading.feed.pixels import to_8_bits, to_rgb
from prismer.dataloading.store.index import check_classes
from prismer.dataloading.store.labels import unpack_labels
from prismer.experts import EXPERTS, FEATURE_WIDTH
from prismer.reading import parse_json

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor
"""A file, its bytes, a PIL image, a uint8 or uint16 array (h, w) or (h, w, 1 | 3 | 4), or a uint8 tensor (3, h, w)."""

# what Pillow's decoders raise on bytes that are not what their header promises
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def load_image(source: ImageSource, size: int) -> Tensor:
    """One picture as the model sees it.

    EXIF rotation is applied, transparency is laid on white, grey and CMYK become RGB, 16 bits become 8, of several
    frames the first is used (with a warning), and the picture is resized bicubically with antialias, its aspect ratio
    not kept (as in training).

    Args:
        source: a file, encoded bytes, a PIL image or an array, see `ImageSource`.
        size: side of the result, px.

    Returns:
        (3, size, size) uint8.

    Raises:
        ValueError: if there is no such file, or it is not a picture that can be read whole.
    """
    if size < 1:
        raise ValueError(f"image size {size} is not positive; give the side in pixels")
    if isinstance(source, Tensor | np.ndarray):
        return _to_square(from_array(source), size, "the array")
    if isinstance(source, Image.Image):
        return _to_square(ImageOps.exif_transpose(source), size, "the image")
    if isinstance(source, bytes):
        name = f"the image of {len(source)} bytes"
        return _to_square(_decode(io.BytesIO(source), name, size), size, name)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"an image is a {type(source).__name__}; give a path, bytes, a PIL image or an array")
    path = Path(source)
    if len(os.fsencode(path.name)) > 255:
        raise ValueError(f"an image is named {str(path)[:60]!r}..., longer than a name can be; give a path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the image files in it, e.g. {path}/*.jpg")
    if not path.is_file():
        raise ValueError(f"no image file {path}; check the path")
    try:
        with open(path, "rb") as file:
            return _to_square(_decode(file, str(path), size), size, str(path))
    except PermissionError:
        raise ValueError(f"{path} may not be read by this user; change its permissions") from None


def load_images(sources: Sequence[ImageSource], size: int) -> Tensor:
    """Several pictures, decoded in threads; see `load_image`.

    Returns:
        (len(sources), 3, size, size) uint8.

    Raises:
        ValueError: if there are none, or for the first that cannot be read.
    """
    if isinstance(sources, str | bytes | os.PathLike | Image.Image) or not len(sources):
        raise ValueError(f"images are {str(sources)[:60]!r}; give a list of at least one")
    # Pillow decodes and resizes without the interpreter lock
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(sources))) as pool:
        return torch.stack(list(pool.map(lambda source: load_image(source, size), sources)))


def _decode(file, name: str, size: int) -> Image.Image:
    """The first frame, upright, in whatever mode it was stored."""
    if not file.read(1):
        raise ValueError(f"{name} is empty (0 bytes); copy or download the image again")
    file.seek(0)
    try:
        with Image.open(file) as image:
            # a JPEG of many times the size is decoded at 1/2, 1/4 or 1/8: a 12 Mpx photo takes 85 ms instead of 260,
            # for a mean difference of 0.2 grey levels after the resize
            image.draft(None, (2 * size, 2 * size))
            # phones store previews as further frames of an MPO
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                warnings.warn("an image has several frames or pages; only the first is used", stacklevel=4)
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise ValueError(
            f"{name} has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels; "
            f"shrink it first, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is not an image that can be read here; give a JPEG, PNG, WebP or another format of Pillow"
        ) from None
    except _DAMAGED as error:
        raise ValueError(f"{name} is damaged ({error}); copy or download the image again") from None


def _to_square(image: Image.Image, size: int, name: str) -> Tensor:
    if not all(image.size):
        raise ValueError(f"{name} has no pixels ({image.width} x {image.height}); give another")
    rgb = to_rgb(image, name)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def from_array(array: np.ndarray | Tensor) -> Image.Image:
    """An array or tensor of `ImageSource` as a PIL image.

    Raises:
        ValueError: if it has another dtype or shape.
    """
    if isinstance(array, Tensor):
        if array.dtype != torch.uint8 or array.ndim != 3 or array.shape[0] != 3:
            raise ValueError(
                f"an image tensor is {array.dtype} {tuple(array.shape)}; expected uint8 (3, h, w) with values 0..255"
            )
        if array.is_meta or array.layout != torch.strided:
            kind = "on the meta device" if array.is_meta else "sparse"
            raise ValueError(f"an image tensor is {kind}; give a dense one that holds pixels")
        array = array.permute(1, 2, 0).cpu().numpy()
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f"an image array is {array.dtype} {array.shape}; expected uint8 0..255 or uint16 0..65535 "
            f"of shape (h, w), (h, w, 3) or (h, w, 4)"
        )
    if not array.size:
        raise ValueError(f"an image array has no pixels, shape {array.shape}; give another")
    if array.dtype == np.uint16:
        array = to_8_bits(array, "the array")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


@dataclass(frozen=True)
class ExpertLabels:
    """What the experts say about one image.

    Attributes:
        planes: expert -> uint8 map (h, w), or (h, w, 3) for normals; absent experts are left out.
        meta: "instances": {object id: class index} and "words": {id: text} of the maps, as in a sample's JSON.
        classes: "seg" and "obj_detection" -> class names.
        name: what errors call it.

    Raises:
        ValueError: if an expert is unknown or a map has another dtype or shape.
    """

    planes: dict[str, np.ndarray]
    meta: dict = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    name: str = "the expert labels"

    def __post_init__(self):
        for name, table in (("planes", self.planes), ("meta", self.meta), ("classes", self.classes)):
            if not isinstance(table, dict):
                raise ValueError(f"the {name} of {self.name} are {type(table).__name__}; give a dictionary")
        check_classes(self.classes)
        for expert, plane in self.planes.items():
            if expert not in EXPERTS:
                raise ValueError(f"{self.name} have an unknown expert {expert!r}; choose from {', '.join(EXPERTS)}")
            if not isinstance(plane, np.ndarray) or not plane.size:
                given = "empty" if isinstance(plane, np.ndarray) else type(plane).__name__
                raise ValueError(f"the {expert} map of {self.name} is {given}; give a numpy array with pixels")
            tail = (3,) if EXPERTS[expert].planes == 3 else ()
            if plane.dtype != np.uint8 or plane.ndim != 2 + len(tail) or plane.shape[2:] != tail:
                raise ValueError(
                    f"the {expert} map of {self.name} is {plane.dtype} {plane.shape}; "
                    f"expected uint8 {'(h, w, 3)' if tail else '(h, w)'}"
                )

    @classmethod
    def from_file(cls, path: str | Path) -> "ExpertLabels":
        """Read a packed KEY.labels, and KEY.json beside it for the tables ("instances", "words", "classes").

        Raises:
            ValueError: if a file is missing or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no labels file {path}; `prismer data extract` writes one for a sample of a dataset")
        try:
            planes = unpack_labels(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from None
        tables = path.with_suffix(".json")
        meta = {}
        if tables.is_file():
            meta = parse_json(tables.read_bytes(), tables, "write it again")
        elif any(EXPERTS[expert].is_ids for expert in planes):
            raise ValueError(f"{path} holds maps of ids, but {tables.name} with their tables is missing; put it there")
        classes = meta.get("classes", {}) if isinstance(meta, dict) else None
        if not isinstance(classes, dict):
            raise ValueError(f"{tables} does not hold tables; expected an object with instances, words and classes")
        try:
            check_classes(classes)
        except ValueError as error:
            raise ValueError(f"{tables} cannot be used: {error}") from None
        return cls(planes, meta, classes, str(path))


_LABELS = (ExpertLabels, str, os.PathLike, type(None))


def image_batch(
    images: Sequence[ImageSource],
    config: PrismerConfig,
    labels: Sequence[ExpertLabels | str | os.PathLike | None] | None = None,
    semantics: Semantics | None = None,
) -> ImageBatch:
    """Pictures, and what the experts say about them, as the encoder reads them.

    Args:
        images: one or more, see `load_image`.
        config: gives the experts and the sizes; labels of other experts are not used.
        labels: for each image its labels or a KEY.labels file (`ExpertLabels.from_file`); None where there are none,
            then the experts of the model say "nothing here".
        semantics: turns class names and words into features; by default what `config.semantics` names, if that needs
            no table.

    Returns:
        Batch on the CPU.

    Raises:
        ValueError: if a picture or labels cannot be read, their numbers differ, or a table is needed and not given.
    """
    if labels is not None and not isinstance(labels, list | tuple):
        raise ValueError(f"labels are {type(labels).__name__}; give a list with labels, a file or None for each image")
    wrong = next((x for x in labels or () if not isinstance(x, _LABELS)), None)
    if wrong is not None:
        raise ValueError(f"labels of an image are {type(wrong).__name__}; give ExpertLabels, a file or None")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels; give one for each, or None")
    rgb = load_images(images, config.image_size)
    batch = ImageBatch.without_labels(rgb, config.experts, config.label_size)
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
            plane = torch.from_numpy(resize_nearest(experts.planes[name], config.label_size))
            batch.labels[name][b] = plane if plane.ndim == 2 else plane.permute(2, 0, 1)
        if ids_are_used:
            rows, more = _look_up(experts, config, semantics)
            for name, row in rows.items():
                # behind the rows of the images before; the background is one row for all
                batch.rows[name][b] = torch.from_numpy(np.where(row > 0, row + num_rows - 1, 0))
            features.append(more)
            num_rows += len(more)
    batch.features = torch.from_numpy(np.concatenate(features))
    return batch


def _look_up(
    experts: ExpertLabels, config: PrismerConfig, semantics: Semantics
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Expert -> (256,) row of each id, and the features of rows 1 and up."""
    try:
        # each image brings its own class tables
        tables = FeatureTables(config, experts.classes, semantics)
        rows, features = tables.collate([tables.look_up(experts.planes, experts.meta)])
    except ValueError as error:
        raise ValueError(f"{experts.name} cannot be used: {error}") from None
    return {name: table[0] for name, table in rows.items()}, features[1:]


def resize_nearest(plane: np.ndarray, size: int) -> np.ndarray:
    """(h, w, ...) -> (size, size, ...): pixel i shows the source pixel under its centre."""
    rows, columns = ((2 * np.arange(size) + 1) * side // (2 * size) for side in plane.shape[:2])
    return plane[rows[:, None], columns]
