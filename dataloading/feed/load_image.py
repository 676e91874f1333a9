"""Image files, bytes, arrays and tensors of any format -> square uint8 RGB tensors, as the model reads them."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prismer.dataloading.feed.rgb import to_8_bits, to_rgb
from prismer.errors import InputError

# a file, its bytes, a PIL image, a uint8 or uint16 array (h, w) or (h, w, 1 | 3 | 4), or a uint8 tensor (3, h, w)
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor

# what Pillow's decoders raise on damaged bytes
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def load_image(source: ImageSource, size: int) -> Tensor:
    """One image as the model reads it.

    EXIF rotation is applied, transparency is laid on white, grey and CMYK become RGB, 16 bits become 8, and of several
    frames the first is used (with a warning). The image is resized bicubically with antialias; its aspect ratio is not
    kept (as in training).

    Args:
        source: a file, encoded bytes, a PIL image or an array, see `ImageSource`.
        size: side of the result, px.

    Returns:
        (3, size, size) uint8.

    Raises:
        ValueError: if the file is absent, or is not an image that can be read whole.
    """
    if size < 1:
        raise InputError(f"image size {size} is not positive; give the side in pixels")
    if isinstance(source, Tensor | np.ndarray):
        return _to_square(from_array(source), size, "the array")
    if isinstance(source, Image.Image):
        return _to_square(ImageOps.exif_transpose(source), size, "the image")
    if isinstance(source, bytes):
        name = f"the image of {len(source)} bytes"
        return _to_square(_decode(io.BytesIO(source), name, size), size, name)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"an image is a {type(source).__name__}; give a path, bytes, a PIL image or an array")
    path = Path(source)
    if len(os.fsencode(path.name)) > 255:
        raise InputError(f"an image is named {str(path)[:60]!r}..., longer than a name can be; give a path")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the image files in it, e.g. {path}/*.jpg")
    if not path.is_file():
        raise InputError(f"no image file {path}; check the path")
    try:
        with open(path, "rb") as file:
            return _to_square(_decode(file, str(path), size), size, str(path))
    except PermissionError:
        raise InputError(f"this user may not read {path}; change its permissions") from None


def load_images(sources: Sequence[ImageSource], size: int) -> Tensor:
    """Several images, decoded in threads; see `load_image`.

    Returns:
        (len(sources), 3, size, size) uint8.

    Raises:
        ValueError: if there are none, or for the first that cannot be read.
    """
    if isinstance(sources, str | bytes | os.PathLike | Image.Image) or not len(sources):
        raise InputError(f"images are {str(sources)[:60]!r}; give a list of at least one")
    # Pillow decodes and resizes without the interpreter lock
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(sources))) as pool:
        return torch.stack(list(pool.map(lambda source: load_image(source, size), sources)))


def shrink_on_decode(image: Image.Image, size: int) -> bool:
    """Have a JPEG of many times the model's size decoded at 1/2, 1/4 or 1/8; returns whether it will be.

    A photo of 12 Mpx then takes 85 ms instead of 260, for a mean difference of 0.2 grey levels after the resize.

    Args:
        image: opened and not yet decoded.
        size: side of the square that it is resized to, px.
    """
    before = image.size
    image.draft(None, (2 * size, 2 * size))
    return image.size != before


def from_array(array: np.ndarray | Tensor) -> Image.Image:
    """An array or tensor of `ImageSource` as a PIL image.

    Raises:
        ValueError: if it has another dtype or shape.
    """
    if isinstance(array, Tensor):
        if array.dtype != torch.uint8 or array.ndim != 3 or array.shape[0] != 3:
            raise InputError(
                f"an image tensor is {array.dtype} {tuple(array.shape)}; expected uint8 (3, h, w) with values 0..255"
            )
        if array.is_meta or array.layout != torch.strided:
            kind = "on the meta device" if array.is_meta else "sparse"
            raise InputError(f"an image tensor is {kind}; give a dense one that holds pixels")
        array = array.permute(1, 2, 0).cpu().numpy()
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise InputError(
            f"an image array is {array.dtype} {array.shape}; expected uint8 0..255 or uint16 0..65535 "
            f"of shape (h, w), (h, w, 3) or (h, w, 4)"
        )
    if not array.size:
        raise InputError(f"an image array has no pixels, shape {array.shape}; give another")
    if array.dtype == np.uint16:
        array = to_8_bits(array, "the array")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


def _decode(file: BinaryIO, name: str, size: int) -> Image.Image:
    """The first frame, upright, in the mode it is stored in."""
    if not file.read(1):
        raise InputError(f"{name} is empty (0 bytes); copy or download the image again")
    file.seek(0)
    try:
        with Image.open(file) as image:
            shrink_on_decode(image, size)
            # phones store previews as further frames of an MPO
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                warnings.warn("an image has several frames or pages; only the first is used", stacklevel=4)
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise InputError(
            f"{name} has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels; "
            f"shrink it first, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not an image that can be read here; give a JPEG, PNG, WebP or another format of Pillow"
        ) from None
    except _DAMAGED as error:
        raise InputError(f"{name} is damaged ({error}); copy or download the image again") from None


def _to_square(image: Image.Image, size: int, name: str) -> Tensor:
    if not all(image.size):
        raise InputError(f"{name} has no pixels ({image.width} x {image.height}); give another")
    rgb = to_rgb(image, name)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    # copied by numpy: torch would do it on all cores, and each thread that reads images would keep a team of threads
    # for that, which wait by spinning and take the cores from the model
    return torch.from_numpy(np.ascontiguousarray(np.array(rgb).transpose(2, 0, 1)))
