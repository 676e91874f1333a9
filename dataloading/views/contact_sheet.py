"""Contact sheets: each sample's image beside its coloured expert maps, with its texts below."""

import colorsys
import io
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prismer.dataloading.store.sample_json import meta_problems
from prismer.dataloading.store.shards import Sample, ShardDataset
from prismer.errors import InputError
from prismer.experts import BACKGROUND, EXPERTS
from prismer.files import write_atomically

# column of a sheet -> its heading
TITLES = {"image": "image"} | {name: expert.title for name, expert in EXPERTS.items()}

INK, GREY, RULE, EMPTY = (32, 34, 40), (120, 124, 134), (222, 224, 230), (241, 242, 245)
# px; _TILE is the side of the square that each image is fitted into
_MARGIN, _GAP, _TILE = 24, 8, 208
# most of each kind below a sample
_NUM_TEXTS = 2


def draw_sheet(dataset: ShardDataset, path: str | Path, *, count: int = 8, start: int = 0) -> None:
    """Write a contact sheet of `count` samples from position `start`, as a JPEG if `path` ends in .jpg, else as a PNG.

    Raises:
        ValueError: if there is no sample at `start`, or one cannot be read.
    """
    if count < 1 or not 0 <= start < len(dataset):
        raise InputError(
            f"there are no samples {start} to {start + count - 1} in a dataset of {len(dataset)}; choose others"
        )
    samples = [dataset[i] for i in range(start, min(start + count, len(dataset)))]
    path = Path(path)
    file = io.BytesIO()
    sheet = contact_sheet(samples, dataset.classes)
    sheet.save(file, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    write_atomically(path, file.getvalue())


def contact_sheet(samples: list[Sample], classes: dict[str, list[str]]) -> Image.Image:
    """One row per sample: its image, its expert maps, and below them captions, class, questions and key.

    There is a column for each expert with a map of some sample.

    Args:
        samples: at least one.
        classes: the class tables of their dataset; the number of a class stands for a missing name.

    Raises:
        ValueError: if there is no sample, an image does not decode, or texts or tables do not fit the schema.
    """
    if not samples:
        raise InputError("there are no samples to show; give at least one")
    for sample in samples:
        if problems := meta_problems(sample.meta):
            raise InputError(f"the sample {sample.key} cannot be shown: {problems[0]}; show others")
    columns = [name for name in TITLES if name == "image" or any(name in sample.labels for sample in samples)]
    width = 2 * _MARGIN + len(columns) * (_TILE + _GAP) - _GAP
    texts = [_text_lines(sample, width - 2 * _MARGIN) for sample in samples]
    line = font_of(15).size + 7
    heights = [_TILE + 14 + line * len(lines) + 22 for lines in texts]
    sheet = Image.new("RGB", (width, 44 + sum(heights) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        x, font = _MARGIN + number * (_TILE + _GAP), font_of(15, bold=True)
        draw.text((x, 16), fit_title(column, _TILE, font), font=font, fill=INK)
    top = 44
    for sample, lines, height in zip(samples, texts, heights, strict=True):
        image = _decode(sample)
        for number, column in enumerate(columns):
            cell = fit(draw_column(column, sample, image, classes, _TILE), _TILE)
            sheet.paste(cell, (_MARGIN + number * (_TILE + _GAP), top))
        y = top + _TILE + 10
        for text, colour in lines:
            draw.text((_MARGIN, y), text, font=font_of(15), fill=colour)
            y += line
        top += height
        if top < sheet.height - 4:
            draw.line((_MARGIN, top - 12, width - _MARGIN, top - 12), fill=RULE)
    return sheet


def colour_map(expert: str, plane: np.ndarray) -> np.ndarray:
    """An expert's map as (h, w, 3) uint8: depth in magma, normals and edges as they are, one colour per id.

    Args:
        expert: key of EXPERTS.
        plane: uint8 (h, w), or (h, w, 3) for surface normals.
    """
    if EXPERTS[expert].planes == 3:
        return plane
    return (id_colours() if EXPERTS[expert].is_ids else _intensity_colours(EXPERTS[expert].colours))[plane]


@lru_cache
def _intensity_colours(name: str) -> np.ndarray:
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


@lru_cache
def id_colours() -> np.ndarray:
    """(256, 3) uint8: a colour per id, with neighbouring ids far apart in hue; the background is nearly white."""
    golden = 0.618034
    colours = [colorsys.hls_to_rgb((0.58 + i * golden) % 1, (0.60, 0.48, 0.70)[i % 3], 0.58) for i in range(256)]
    table = (np.array(colours) * 255).round().astype(np.uint8)
    table[BACKGROUND] = EMPTY
    return table


@lru_cache
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of the sheets at a size in px."""
    # matplotlib ships the font, so that sheets look the same on every machine
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _decode(sample: Sample) -> Image.Image:
    try:
        return Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise InputError(f"the image of {sample.key} does not decode ({error})") from None


def draw_column(
    column: str, sample: Sample, image: Image.Image, classes: dict[str, list[str]], tile: int
) -> Image.Image | None:
    """One column of a sample in the proportions of the image, at most `tile` px; None if the sample has no map."""
    image = scale(image, tile, tile)
    size = image.size
    if column == "image":
        return image
    if column not in sample.labels:
        return None
    plane = sample.labels[column]
    if not EXPERTS[column].is_ids:
        return Image.fromarray(colour_map(column, plane)).resize(size, Image.Resampling.BICUBIC)
    ids = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.NEAREST))
    names = _names(column, sample, classes)
    if EXPERTS[column].kind == "class":
        return _name_regions(Image.fromarray(colour_map(column, ids)), ids, names)
    return _mark_instances(image, ids, names)


def _names(column: str, sample: Sample, classes: dict[str, list[str]]) -> dict[int, str]:
    expert, names = EXPERTS[column], dict(enumerate(map(one_line, classes.get(column, []))))
    if expert.kind == "class":
        return names
    entries = sample.meta.get(expert.table, {})
    if expert.kind == "word":
        return {int(i): one_line(word) for i, word in entries.items()}
    return {int(i): names.get(class_id, str(class_id)) for i, class_id in entries.items()}


def _name_regions(drawing: Image.Image, ids: np.ndarray, names: dict[int, str]) -> Image.Image:
    """Write each class name where most of it covers its own region; small regions get none."""
    draw, font = ImageDraw.Draw(drawing), font_of(13, bold=True)
    for i in np.unique(ids).tolist():
        mask = ids == i
        if i == BACKGROUND or mask.mean() < 0.015:
            continue
        name = names.get(i, str(i))
        # a margin around the name keeps it off its neighbours
        width = min(int(draw.textlength(name, font=font)) + 16, mask.shape[1])
        height = min(26, mask.shape[0])
        x, y = _best_spot(mask, width, height)
        centre = x + width / 2, y + height / 2
        style = dict(font=font, fill="white", stroke_width=2, stroke_fill=INK, anchor="mm")
        draw.text(centre, name, **style)
    return drawing


def _best_spot(mask: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Top left corner of the width x height box that covers most of `mask` and lies near its centre of mass."""
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[: inside.shape[0], : inside.shape[1]]
    away = np.hypot(y + height / 2 - rows.mean(), x + width / 2 - columns.mean())
    best = np.argmax(inside / (width * height) - 0.5 * away / sum(mask.shape))
    y, x = np.unravel_index(best, inside.shape)
    return int(x), int(y)


def _mark_instances(image: Image.Image, ids: np.ndarray, names: dict[int, str]) -> Image.Image:
    """Tint each id's region on the faded image, outline it, and tag its top left corner with its name."""
    faded = np.asarray(Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.55))
    painted = (ids != BACKGROUND)[..., None]
    mixed = np.where(painted, 0.45 * faded + 0.55 * id_colours()[ids], faded)
    mixed[_borders(ids)] = id_colours()[ids[_borders(ids)]] * 0.75
    drawing = Image.fromarray(mixed.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(drawing), font_of(12, bold=True)
    for i in np.unique(ids).tolist():
        if i == BACKGROUND:
            continue
        rows, columns = np.nonzero(ids == i)
        name = names.get(i, str(i))
        length, height = draw.textlength(name, font=font) + 6, 16
        x = min(int(columns.min()), max(0, drawing.width - int(length) - 1))
        y = max(0, int(rows.min()) - height) if rows.min() >= height else int(rows.min())
        tag = tuple(int(value * 0.6) for value in id_colours()[i])
        draw.rectangle((x, y, x + length, y + height), fill=tag)
        draw.text((x + 3, y + 1), name, font=font, fill="white")
    return drawing


def _borders(ids: np.ndarray) -> np.ndarray:
    """(h, w) bool: pixels of an id with another value to the left or right, above or below."""
    padded = np.pad(ids, 1, mode="edge")
    around = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return (ids != BACKGROUND) & np.logical_or.reduce([ids != other for other in around])


def scale(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at the largest size that fits into width x height px."""
    factor = min(width / image.width, height / image.height)
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)


def fit(drawing: Image.Image | None, tile: int) -> Image.Image:
    """A drawing in the middle of a square cell; "no map" instead of None."""
    cell = Image.new("RGB", (tile, tile), EMPTY)
    if drawing is None:
        text, font = "no map", font_of(13)
        draw = ImageDraw.Draw(cell)
        draw.text((tile / 2, tile / 2), text, font=font, fill=GREY, anchor="mm")
    else:
        x, y = (tile - drawing.width) // 2, (tile - drawing.height) // 2
        cell.paste(drawing, (x, y))
        # white edges on a white sheet need a frame
        ImageDraw.Draw(cell).rectangle((x, y, x + drawing.width - 1, y + drawing.height - 1), outline=RULE)
    return cell


def fit_title(column: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The title of a column, without the remark in brackets if it is wider than `width` px."""
    title = TITLES[column]
    return title if font.getlength(title) <= width else title.partition(" (")[0]


def _text_lines(sample: Sample, width: int) -> list[tuple[str, tuple[int, int, int]]]:
    """(text, colour) of each line, wrapped to `width` px."""
    meta = sample.meta
    texts = [(str(caption), INK) for caption in meta.get("captions", [])[:_NUM_TEXTS]]
    if "class" in meta:
        texts.append((f"class: {meta['class']}", INK))
    for question in meta.get("questions", [])[:_NUM_TEXTS]:
        answers = " / ".join(answer["answer"] for answer in question.get("answers", []))
        texts.append((f"{question['question']}  \N{RIGHTWARDS ARROW}  {answers or 'no answer given'}", GREY))
    texts.append((sample.key, GREY))
    return [(line, colour) for text, colour in texts for line in wrap(text, width, font_of(15))]


def one_line(text: str) -> str:
    """A text without line ends: Pillow's layout fails on some of them, such as U+0085."""
    return " ".join(text.split())


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines of at most `width` px."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
