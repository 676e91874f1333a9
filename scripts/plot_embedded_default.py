"""Draw docs/embedded-default.png from the logs in docs/curves: the towers, the choices, and the shipped run.

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
    figure, (towers, tried, run) = plt.subplots(1, 3, figsize=(15, 4.2))

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

    metrics = [row for row in rows("run.jsonl") if row["kind"] == "validation"]
    kinds = [name for name in metrics[0] if name.startswith("accuracy/")]
    for name in ("accuracy", *kinds):
        width = 3 if name == "accuracy" else 1
        label = "all" if name == "accuracy" else name.removeprefix("accuracy/")
        run.plot([r["step"] for r in metrics], [r[name] for r in metrics], lw=width, label=label, marker=".")
    run.set(title="the run that ships, validation", xlabel="step", ylabel="VQA accuracy")

    for axis in (towers, tried, run):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "embedded-default.png", dpi=80)


if __name__ == "__main__":
    main()
