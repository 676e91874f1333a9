"""What a finished run leaves behind for people: results.md, results.json and a picture of samples."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from prismer.files import replacing, write_atomically, write_json
from prismer.training.metrics import vqa_accuracy

COLUMNS = ("trained model", "most frequent", "blank images")


def results_table(columns: Sequence[dict[str, float]], num_images: int) -> str:
    """Scores side by side as a Markdown table.

    Args:
        columns: for each of COLUMNS what `evaluation.scores` returned.
        num_images: how many images they are of.
    """
    names = [name for name in columns[0] if name != "score"]
    titles = {"accuracy": "VQA accuracy, all", "top-1": "top-1"}
    titles |= {name: f"VQA accuracy, {name.partition('/')[2]}" for name in names if "/" in name}
    lines = [f"| validation, {num_images} images | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in names:
        cells = [f"{column[name]:.3f}" if name in column else "" for column in columns]
        lines.append(f"| {titles.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_results(folder: Path, columns: Sequence[dict[str, float]], num_images: int, about: dict) -> str:
    """Write results.md and results.json; returns the table.

    Args:
        about: JSON-like facts of the run (step, precision, time).
    """
    table = results_table(columns, num_images)
    legend = (
        "CIDEr-D is of at most 10. *Most frequent* replies with the training split's most frequent caption, and its "
        "most frequent answer to each kind of question; *blank images* is the trained model when it sees nothing.\n"
    )
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    write_atomically(folder / "results.md", f"{table}\n{legend}\n{facts}".encode())
    write_json(folder / "results.json", dict(about, images=num_images, **dict(zip(COLUMNS, columns, strict=True))))
    return table


def draw_samples(path: Path, pictures: Sequence[Image.Image], records: Sequence[dict]) -> None:
    """Images with true and generated captions, and a few questions with answers, as one picture.

    Args:
        pictures: the images.
        records: of the same images, from `evaluation.describe`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    # each image has a cell of two parts: the picture, and its texts below
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(4.2 * columns, 6.3 * rows), height_ratios=[3, 2.4] * rows, squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (picture, record) in enumerate(zip(pictures, records, strict=True)):
        row, column = divmod(i, columns)
        axes[2 * row, column].imshow(picture)
        axes[2 * row, column].set_anchor("W")
        lines = _lines(record)
        for number, (text, colour) in enumerate(lines):
            axes[2 * row + 1, column].text(
                0,
                1 - number / max(12, len(lines)),
                text,
                color=colour,
                fontsize=9,
                va="top",
                transform=axes[2 * row + 1, column].transAxes,
            )
    figure.tight_layout(pad=0.6)
    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
    finally:
        plt.close(figure)


def _lines(record: dict, width: int = 50, num_questions: int = 4) -> list[tuple[str, str]]:
    """Wrapped lines with their colours: grey is true, black generated (or an answer that nobody can
    judge), green a right answer, red a wrong one."""
    lines: list[tuple[str, str]] = []

    def add(text: str, colour: str) -> None:
        lines.extend((part, colour) for part in textwrap.wrap(text, width, subsequent_indent="   "))

    if record.get("captions"):
        add(f"true: {record['captions'][0]}", "dimgray")
    if "caption" in record:
        add(f"generated: {record['caption']}", "black")
    questions = record.get("questions", [])
    # one of each kind before a second of any
    kinds: dict[str, list[dict]] = {}
    for question in questions:
        kinds.setdefault(question["kind"], []).append(question)
    firsts = [group[0] for group in kinds.values()] + [q for group in kinds.values() for q in group[1:]]
    for question in firsts[:num_questions]:
        text = f"{question['question']} {question['prediction']}"
        if not question["answers"]:
            add(text, "black")
        elif vqa_accuracy(question["prediction"], question["answers"]) > 0.5:
            add(text, "darkgreen")
        else:
            add(f"{text} (true: {next(iter(question['answers']))})", "firebrick")
    if "class" in record and record["class"] is None:
        add(record["prediction"], "black")
    elif "class" in record:
        right = record["class"] == record["prediction"]
        add(f"{record['prediction']} (true: {record['class']})", "darkgreen" if right else "firebrick")
    return lines
