"""What people look at: scores as a Markdown table, and some images with their true and predicted texts as a PNG."""

import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

from PIL import Image

from prismer.evaluation.vqa_accuracy import vqa_accuracy

# prefix of a score's name -> how the table calls the scores of that kind
_TITLES = {
    "accuracy/answer_type/": "VQA accuracy, answers of type ",
    "accuracy/question_type/": "VQA accuracy, questions of type ",
    "accuracy/": "VQA accuracy, ",
}
# of the sheet of samples: columns, and sizes in inches
_COLUMNS = 4
_COLUMN_WIDTH, _IMAGE_HEIGHT, _LINE_HEIGHT = 4.2, 3.5, 0.19


def main_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores without those of question types, of which VQA has 65."""
    return {name: score for name, score in scores.items() if not name.startswith("accuracy/question_type/")}


def score_table(columns: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Scores side by side as a Markdown table, without "score", which only compares checkpoints.

    Args:
        columns: heading -> result of `evaluation.scores`; the first column decides the rows.
        title: of the table, in its first cell.
    """
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in next(iter(columns.values())):
        if name != "score":
            cells = [f"{column[name]:.3f}" if name in column else "" for column in columns.values()]
            lines.append(f"| {_title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    if name == "accuracy":
        return "VQA accuracy, all"
    for prefix, title in _TITLES.items():
        if name.startswith(prefix):
            return title + name.removeprefix(prefix)
    return name.replace("/", ", ")


def samples_png(samples: Sequence[tuple[bytes, dict]]) -> bytes:
    """Images with their true and predicted texts.

    Args:
        samples: the JPEG and the row of each image, at least one.

    Returns:
        A PNG, the same bytes for the same samples.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = [_lines(row) for _, row in samples]
    columns = min(_COLUMNS, len(samples))
    # each sample takes two cells: its image, and its texts below
    heights = []
    for start in range(0, len(samples), columns):
        heights += [_IMAGE_HEIGHT, _LINE_HEIGHT * (1 + max(map(len, texts[start : start + columns])))]
    size = _COLUMN_WIDTH * columns, sum(heights)
    figure, axes = plt.subplots(len(heights), columns, figsize=size, height_ratios=heights, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, ((jpeg, _), lines) in enumerate(zip(samples, texts, strict=True)):
        row, column = divmod(i, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        above.imshow(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        above.set_anchor("W")
        for number, (text, colour) in enumerate(lines):
            y = 1 - number * _LINE_HEIGHT / heights[2 * row + 1]
            # a text is drawn as it stands, also between two dollar signs
            below.text(0, y, text, color=colour, fontsize=9, va="top", transform=below.transAxes, parse_math=False)
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            # a box stands for a character that the font lacks
            warnings.filterwarnings("ignore", message="Glyph")
            figure.tight_layout(pad=0.6)
            figure.savefig(file, dpi=110, format="png")
    finally:
        plt.close(figure)
    return file.getvalue()


def _lines(row: dict, width: int = 50, num_questions: int = 4) -> list[tuple[str, str]]:
    """Wrapped lines with their colours: grey for a true text, black for a prediction, green and red for a prediction
    that is known to be right or wrong."""
    lines: list[tuple[str, str]] = []

    def add(text: str, colour: str) -> None:
        lines.extend((part, colour) for part in textwrap.wrap(text, width, subsequent_indent="   "))

    if row.get("captions"):
        add(f"true: {row['captions'][0]}", "dimgray")
    if "caption" in row:
        add(f"generated: {row['caption']}", "black")
    # one question of each kind comes before a second one of any kind
    kinds: dict[str, list[dict]] = {}
    for question in row.get("questions", []):
        kinds.setdefault(question["kind"], []).append(question)
    firsts = [group[0] for group in kinds.values()] + [q for group in kinds.values() for q in group[1:]]
    for question in firsts[:num_questions]:
        text = f"{question['question']} {question['prediction']}"
        if not question["answers"]:
            add(text, "black")
        elif vqa_accuracy(question["prediction"], question["answers"]) > 0.5:
            add(text, "darkgreen")
        else:
            # of ten people's answers the one that most of them gave; else the one of the largest weight
            true = Counter(question["answers"]).most_common(1)[0][0]
            add(f"{text} (true: {true})", "firebrick")
    if "class" in row and row["class"] is None:
        add(row["prediction"], "black")
    elif "class" in row:
        right = row["class"] == row["prediction"]
        add(f"{row['prediction']} (true: {row['class']})", "darkgreen" if right else "firebrick")
    return lines
