"""Pictures of any pixel format as 8-bit RGB: one rule for what is imported and what is asked about."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture in any mode of Pillow as RGB: 16 bits are scaled, transparency is laid on white.

    Args:
        image: decoded or about to be.
        name: of the picture, for errors.

    Raises:
        ValueError: if the pixels are floating-point numbers or have more than 16 bits.
    """
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels; save it with 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray(to_8_bits(np.asarray(image), name)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_8_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    """Integers 0..65535 as uint8, 65535 becoming 255.

    Raises:
        ValueError: if a value is outside.
    """
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"{name} has pixels of more than 16 bits; save it with 8 or 16 bits per channel")
    return (pixels.astype(np.uint32) // 257).astype(np.uint8)
