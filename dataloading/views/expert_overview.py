"""One image with everything the experts say about it, as a drawing for a slide: 1600 x 900, PNG."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.store.shards import Sample
from prismer.dataloading.views.contact_sheet import (
    GREY,
    INK,
    RULE,
    TITLES,
    draw_column,
    fit,
    fit_title,
    font_of,
    id_colours,
    one_line,
    scale,
    wrap,
)
from prismer.experts import EXPERTS

_SIZE, _MARGIN, _GAP, _CELL = (1600, 900), 44, 14, 274
# width and height that the image is fitted into
_IMAGE = (632, 2 * (_CELL + 36) - 36)


def draw_overview(
    jpeg: bytes,
    labels: ExpertLabels,
    *,
    caption: str = "",
    texts: Sequence[str] = (),
    networks: dict[str, str] | None = None,
) -> bytes:
    """Draw an image with boxes and words, its maps, and a caption.

    Args:
        jpeg: the image, an upright RGB JPEG.
        labels: its expert labels.
        caption: written large below; "" leaves it out.
        texts: the detections that a model reads as text, written below the caption, as many as fit.
        networks: expert (or "caption") -> the network that made it, in small print.

    Returns:
        The bytes of a PNG.
    """
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    sample = Sample("image", jpeg, labels.planes, labels.meta)
    drawing = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(drawing)
    marked = _mark(image, labels)
    drawing.paste(marked, (_MARGIN + (_IMAGE[0] - marked.width) // 2, _MARGIN + 36))
    left = _MARGIN + _IMAGE[0] + 30
    # two rows, of smaller cells if there are more than six experts
    across = max(3, -(-len(EXPERTS) // 2))
    side = 3 * (_CELL + _GAP) // across - _GAP
    for number, expert in enumerate(EXPERTS):
        x = left + number % across * (side + _GAP)
        y = _MARGIN + number // across * (_CELL + 36)
        font = font_of(17, bold=True)
        draw.text((x, y), fit_title(expert, side, font), font=font, fill=INK)
        cell = fit(draw_column(expert, sample, image, labels.classes, side), side)
        drawing.paste(cell, (x, y + 36 - 8))
    y = _MARGIN + 36 + _IMAGE[1] + 34
    draw.line((_MARGIN, y, _SIZE[0] - _MARGIN, y), fill=RULE, width=2)
    width = _SIZE[0] - 2 * _MARGIN
    for line in wrap(caption, width, font_of(34))[:2]:
        draw.text((_MARGIN, y + 22), line, font=font_of(34), fill=INK)
        y += 48
    if texts:
        y += 26
        lines = wrap(f"read as text: {', '.join(map(one_line, texts))}", width, font_of(15))
        for number, line in enumerate(lines[: (_SIZE[1] - 58 - y) // 22]):
            draw.text((_MARGIN, y + 22 * number), line, font=font_of(15), fill=INK)
    credit = " · ".join(f"{TITLES.get(name, name)}: {who}" for name, who in (networks or {}).items())
    for number, line in enumerate(wrap(credit, width, font_of(15))[:2]):
        draw.text((_MARGIN, _SIZE[1] - 58 + 22 * number), line, font=font_of(15), fill=GREY)
    file = io.BytesIO()
    drawing.save(file, "PNG")
    return file.getvalue()


def _mark(image: Image.Image, labels: ExpertLabels) -> Image.Image:
    """The image at its size in the drawing, with the boxes of objects and words."""
    resized = scale(image, *_IMAGE)
    draw = ImageDraw.Draw(resized)
    boxes = labels.meta.get("boxes", {})
    for expert in (name for name in EXPERTS if name in boxes):
        entries, names = labels.meta.get(EXPERTS[expert].table, {}), labels.classes.get(expert, [])
        for i, box in boxes[expert].items():
            if EXPERTS[expert].kind == "word":
                _outline(draw, resized.size, box, one_line(entries.get(i, i)), INK)
            else:
                colour = tuple((id_colours()[int(i)] * 0.75).astype(int).tolist())
                name = one_line(names[entries[i]]) if i in entries else i
                _outline(draw, resized.size, box, f"{name} {box[4]:.2f}", colour)
    return resized


def _outline(draw: ImageDraw.ImageDraw, size: tuple[int, int], box: list[float], text: str, colour: tuple) -> None:
    left, top, right, bottom = (np.array(box[:4]) * [*size, *size]).round().astype(int).tolist()
    draw.rectangle((left, top, max(left + 1, right), max(top + 1, bottom)), outline=colour, width=3)
    font = font_of(15, bold=True)
    width = draw.textlength(text, font=font) + 10
    x = int(max(0, min(left, size[0] - width)))
    y = top - 22 if top >= 22 else top
    draw.rectangle((x, y, x + width, y + 22), fill=colour)
    draw.text((x + 5, y + 2), text, font=font, fill="white")
