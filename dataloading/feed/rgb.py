"""Images of any format and mode as upright 8-bit RGB: the one rule for importing, labelling and asking."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from prismer.errors import InputError

_QUALITY = 95
_ORIENTATION = 0x0112
# EXIF orientation -> what turns the image upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image in any mode of Pillow as RGB: 16 bits are scaled to 8, transparency is laid on white.

    Args:
        image: decoded or about to be.
        name: of the image, for errors.

    Raises:
        ValueError: if the pixels are floating-point numbers or have more than 16 bits.
    """
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels; save it with 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray(to_8_bits(np.asarray(image), name)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_8_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    """Integers 0..65535 as uint8; 65535 becomes 255.

    Raises:
        ValueError: if a value is outside that range.
    """
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name} has pixels of more than 16 bits; save it with 8 or 16 bits per channel")
    return (pixels.astype(np.uint32) // 257).astype(np.uint8)


def to_jpeg(data: bytes, whole: bool = True) -> tuple[bytes, tuple[int, int], int]:
    """Any encoded image as an upright 8-bit RGB JPEG; one that already is comes back byte for byte.

    Transparency is laid on white, 16 bits are scaled to 8, and of several frames the first is taken.

    Args:
        data: the encoded image.
        whole: whether to decode even a JPEG that needs no change, to check that it is whole; False saves the time
            where it is decoded right afterwards.

    Returns:
        The JPEG, its (height, width), and the EXIF orientation that was undone (1: none).

    Raises:
        ValueError: if the image is empty, does not decode to its end, exceeds Pillow's limit of pixels, or has no
            8-bit form.
    """
    if not data:
        raise InputError("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        # before the EXIF: reading it first swallows the error of a damaged PNG, whose last rows then come out black
        if whole or image.format != "JPEG":
            image.load()
        turn = orientation(image)
        if image.format == "JPEG" and image.mode == "RGB" and turn == 1:
            return data, (image.height, image.width), 1
        image = to_rgb(image, "it")
    except UnidentifiedImageError:
        raise InputError("the image is in no known format or damaged at its start") from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(f"the image cannot be decoded ({error or type(error).__name__})") from None
    if turn != 1:
        image = image.transpose(TURNS[turn])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue(), (image.height, image.width), turn


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 (upright) if it has none."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF; the pixels have been decoded by now
        return 1
    return turn if turn in TURNS else 1
