"""A picture of samples for people: each image beside its expert maps, in colours, with its texts below."""

import colorsys
import io
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prismer.dataloading.store.schema import meta_problems
from prismer.dataloading.store.shards import Sample, ShardDataset
from prismer.experts import BACKGROUND, EXPERTS
from prismer.files import write_atomically

TITLES = {"image": "image"} | {name: expert.title for name, expert in EXPERTS.items()}
"""The columns that a sheet can have, with what is written above them."""

INK, GREY, RULE, EMPTY = (32, 34, 40), (120, 124, 134), (222, 224, 230), (241, 242, 245)
_MARGIN, _GAP = 24, 8


def draw_sheet(dataset: ShardDataset, path: str | Path, *, count: int = 8, start: int = 0) -> None:
    """Write a contact sheet of `count` samples from position `start` as a PNG, or a JPEG by its name.

    Raises:
        ValueError: if there is no sample at `start`, or one cannot be read.
    """
    if count < 1 or not 0 <= start < len(dataset):
        raise ValueError(
            f"there are no samples {start} to {start + count - 1} in a dataset of {len(dataset)}; choose others"
        )
    samples = [dataset[i] for i in range(start, min(start + count, len(dataset)))]
    path = Path(path)
    file = io.BytesIO()
    sheet = contact_sheet(samples, dataset.classes)
    sheet.save(file, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    write_atomically(path, file.getvalue())


def contact_sheet(
    samples: list[Sample],
    classes: dict[str, list[str]],
    *,
    columns: tuple[str, ...] | None = None,
    tile: int = 208,
    num_captions: int = 2,
    num_questions: int = 2,
) -> Image.Image:
    """One row per sample: its image, its expert maps, and below them key, captions and questions.

    Args:
        samples: what to show, at least one.
        classes: the class tables of their dataset; a class without a name is shown by its number.
        columns: keys of TITLES; without it the image and every expert that one of the samples has.
        tile: side of the square that each picture is fitted into, px.
        num_captions, num_questions: texts shown at most.

    Raises:
        ValueError: if there is no sample, a column is unknown, an image does not decode, or texts or tables do not fit
            the schema.
    """
    if not samples:
        raise ValueError("there are no samples to show; give at least one")
    for sample in samples:
        if problems := meta_problems(sample.meta):
            raise ValueError(f"the sample {sample.key} cannot be shown: {problems[0]}; show others")
    if columns is None:
        have = {expert for sample in samples for expert in sample.labels}
        columns = ("image", *(expert for expert in TITLES if expert in have))
    unknown = [column for column in columns if column not in TITLES]
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; choose from {', '.join(TITLES)}")
    width = 2 * _MARGIN + len(columns) * (tile + _GAP) - _GAP
    texts = [_text_lines(s, width - 2 * _MARGIN, num_captions, num_questions) for s in samples]
    line = font_of(15).size + 7
    heights = [tile + 14 + line * len(lines) + 22 for lines in texts]
    sheet = Image.new("RGB", (width, 44 + sum(heights) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        x = _MARGIN + number * (tile + _GAP)
        font = font_of(15, bold=True)
        draw.text((x, 16), fit_title(column, tile, font), font=font, fill=INK)
    top = 44
    for sample, lines, height in zip(samples, texts, heights, strict=True):
        photo = _decode(sample)
        for number, column in enumerate(columns):
            picture = fit(draw_column(column, sample, photo, classes, tile), tile)
            sheet.paste(picture, (_MARGIN + number * (tile + _GAP), top))
        y = top + tile + 10
        for text, colour in lines:
            draw.text((_MARGIN, y), text, font=font_of(15), fill=colour)
            y += line
        top += height
        if top < sheet.height - 4:
            draw.line((_MARGIN, top - 12, width - _MARGIN, top - 12), fill=RULE)
    return sheet


def colour_map(expert: str, plane: np.ndarray) -> np.ndarray:
    """An expert's map as (h, w, 3) uint8: depth in magma, normals and edges as they are, ids in colours of their own.

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
    """(256, 3) uint8: neighbouring ids far apart in hue; the background is paper."""
    golden = 0.618034
    colours = [colorsys.hls_to_rgb((0.58 + i * golden) % 1, (0.60, 0.48, 0.70)[i % 3], 0.58) for i in range(256)]
    table = (np.array(colours) * 255).round().astype(np.uint8)
    table[BACKGROUND] = EMPTY
    return table


@lru_cache
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The sheet's font at a size in px."""
    # matplotlib brings the font along, so that the sheet looks the same everywhere
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _decode(sample: Sample) -> Image.Image:
    try:
        return Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ValueError(f"the image of {sample.key} does not decode ({error})") from None


def draw_column(
    column: str, sample: Sample, photo: Image.Image, classes: dict[str, list[str]], tile: int
) -> Image.Image | None:
    """One column of a sample in the proportions of the photo, at most `tile` px; None where the sample has no map."""
    scale = tile / max(photo.size)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    photo = photo.resize(size, Image.Resampling.LANCZOS)
    if column == "image":
        return photo
    if column not in sample.labels:
        return None
    plane = sample.labels[column]
    if not EXPERTS[column].is_ids:
        return Image.fromarray(colour_map(column, plane)).resize(size, Image.Resampling.BICUBIC)
    ids = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.NEAREST))
    names = _names(column, sample, classes)
    if EXPERTS[column].kind == "class":
        return _name_regions(Image.fromarray(colour_map(column, ids)), ids, names)
    return _mark_instances(photo, ids, names)


def _names(column: str, sample: Sample, classes: dict[str, list[str]]) -> dict[int, str]:
    expert, names = EXPERTS[column], dict(enumerate(classes.get(column, [])))
    if expert.kind == "class":
        return names
    entries = sample.meta.get(expert.table, {})
    if expert.kind == "word":
        return {int(i): word for i, word in entries.items()}
    return {int(i): names.get(class_id, str(class_id)) for i, class_id in entries.items()}


def _name_regions(picture: Image.Image, ids: np.ndarray, names: dict[int, str]) -> Image.Image:
    """Write each class where most of its name lies on its own region; small regions stay without."""
    draw, font = ImageDraw.Draw(picture), font_of(13, bold=True)
    for i in np.unique(ids).tolist():
        mask = ids == i
        if i == BACKGROUND or mask.mean() < 0.015:
            continue
        name = names.get(i, str(i))
        # a little air around the name keeps it off its neighbours
        width = min(int(draw.textlength(name, font=font)) + 16, mask.shape[1])
        height = min(26, mask.shape[0])
        x, y = _best_spot(mask, width, height)
        centre = x + width / 2, y + height / 2
        style = dict(font=font, fill="white", stroke_width=2, stroke_fill=INK, anchor="mm")
        draw.text(centre, name, **style)
    return picture


def _best_spot(mask: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Top left corner of the width x height box that holds most of `mask`, near its centre of mass."""
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[: inside.shape[0], : inside.shape[1]]
    away = np.hypot(y + height / 2 - rows.mean(), x + width / 2 - columns.mean())
    best = np.argmax(inside / (width * height) - 0.5 * away / sum(mask.shape))
    y, x = np.unravel_index(best, inside.shape)
    return int(x), int(y)


def _mark_instances(photo: Image.Image, ids: np.ndarray, names: dict[int, str]) -> Image.Image:
    """Tint each id's region on the faded photo, outline it, and put its name on a tag at its top left."""
    faded = np.asarray(Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, "white"), 0.55))
    painted = (ids != BACKGROUND)[..., None]
    mixed = np.where(painted, 0.45 * faded + 0.55 * id_colours()[ids], faded)
    mixed[_borders(ids)] = id_colours()[ids[_borders(ids)]] * 0.75
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), font_of(12, bold=True)
    for i in np.unique(ids).tolist():
        if i == BACKGROUND:
            continue
        rows, columns = np.nonzero(ids == i)
        name = names.get(i, str(i))
        length, height = draw.textlength(name, font=font) + 6, 16
        x = min(int(columns.min()), max(0, picture.width - int(length) - 1))
        y = max(0, int(rows.min()) - height) if rows.min() >= height else int(rows.min())
        tag = tuple(int(value * 0.6) for value in id_colours()[i])
        draw.rectangle((x, y, x + length, y + height), fill=tag)
        draw.text((x + 3, y + 1), name, font=font, fill="white")
    return picture


def _borders(ids: np.ndarray) -> np.ndarray:
    """Pixels of an id whose neighbour to the left, right, top or bottom is another."""
    padded = np.pad(ids, 1, mode="edge")
    around = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return (ids != BACKGROUND) & np.logical_or.reduce([ids != other for other in around])


def fit(picture: Image.Image | None, tile: int) -> Image.Image:
    """A picture in the middle of a square cell; "no map" in place of None."""
    cell = Image.new("RGB", (tile, tile), EMPTY)
    if picture is None:
        text, font = "no map", font_of(13)
        draw = ImageDraw.Draw(cell)
        draw.text((tile / 2, tile / 2), text, font=font, fill=GREY, anchor="mm")
    else:
        x, y = (tile - picture.width) // 2, (tile - picture.height) // 2
        cell.paste(picture, (x, y))
        # white edges on white paper need a frame
        ImageDraw.Draw(cell).rectangle((x, y, x + picture.width - 1, y + picture.height - 1), outline=RULE)
    return cell


def fit_title(column: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The title of a column, without the remark in brackets if it is wider than `width` px."""
    title = TITLES[column]
    return title if font.getlength(title) <= width else title.partition(" (")[0]


def _text_lines(
    sample: Sample, width: int, num_captions: int, num_questions: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """(text, colour) of each line, wrapped to `width` px."""
    meta = sample.meta
    texts = [(str(caption), INK) for caption in meta.get("captions", [])[:num_captions]]
    if "class" in meta:
        texts.append((f"class: {meta['class']}", INK))
    for question in meta.get("questions", [])[:num_questions]:
        answers = " / ".join(answer["answer"] for answer in question.get("answers", []))
        texts.append((f"{question['question']}  \N{RIGHTWARDS ARROW}  {answers or 'no answer given'}", GREY))
    texts.append((sample.key, GREY))
    return [(line, colour) for text, colour in texts for line in wrap(text, width, font_of(15))]


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
