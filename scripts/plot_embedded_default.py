"""Draw docs/embedded-default.png from docs/curves: the towers, the choices, the old default and the new one.

python scripts/plot_embedded_default.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"


def rows(name: str) -> list[dict]:
    """The rows of one JSON-lines log."""
    return [json.loads(line) for line in (DOCS / "curves" / name).read_text().splitlines()]


def main() -> None:
    figure, (towers, tried, before, now) = plt.subplots(1, 4, figsize=(19, 4.2))

    vision = [row for row in rows("towers-vision.jsonl") if "seconds" in row]
    minutes = [row["seconds"] / 60 for row in vision]
    for name, label in (
        ("colour", "colour of a cell"),
        ("seg", "shape of a cell"),
        ("counts", "counts"),
        ("word", "word on a sign"),
    ):
        towers.plot(minutes, [row[name] for row in vision], label=label)
    towers.set(title="vision tower, held-out scenes", xlabel="minutes, two cores", ylabel="accuracy")

    choices: dict[str, list] = {}
    for row in rows("choices.jsonl"):
        choices.setdefault(row["choice"], []).append((row["step"], row["accuracy"]))
    for name, points in choices.items():
        tried.plot(*zip(*points, strict=True), marker="o", label=name)
    tried.set(title="five minutes on one thread each", xlabel="steps of 16 images", ylabel="VQA accuracy")

    for axis, file, title in (
        (before, "run.jsonl", "maps alone, names fixed"),
        (now, "run-text.jsonl", "with experts as text, renamed"),
    ):
        metrics = [row for row in rows(file) if row["kind"].startswith("validation")]
        for split in dict.fromkeys(row["kind"] for row in metrics):
            own = [row for row in metrics if row["kind"] == split]
            style = "--" if split.endswith("unseen") else ":" if split.endswith("original") else "-"
            kinds = [name for name in own[-1] if name.startswith("accuracy/")] if style == "-" else []
            for name in ("accuracy", *kinds):
                label = f"all {split.removeprefix('validation').strip('/')}".strip()
                label = label if name == "accuracy" else name.removeprefix("accuracy/")
                width = 3 if name == "accuracy" else 1
                steps = [row["step"] for row in own]
                axis.plot(steps, [row[name] for row in own], style, lw=width, label=label, marker=".")
        axis.set(title=title, xlabel="step of 16 images, validation", ylabel="VQA accuracy", ylim=(0, 1))

    for axis in (towers, tried, before, now):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "embedded-default.png", dpi=80)


if __name__ == "__main__":
    main()
