"""What rank 0 shows while a run trains: a progress bar, metrics.jsonl, scalars for TensorBoard and others, loss.png."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from prismer.errors import InputError
from prismer.evaluation.report import main_scores
from prismer.files import add_name, replacing, write_atomically
from prismer.training.streams import tolerant_of_closing
from prismer.training.wandb_run import WandbRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, in order, without a last line that a crash cut short.

    Raises:
        ValueError: if any other line is damaged.
    """
    file = Path(folder) / METRICS
    if not file.exists():
        return []
    if not file.is_file():
        raise InputError(f"{file} is not a file; move it away to go on without the earlier records")
    lines, rows = file.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        row = _read_row(line)
        if row is not None:
            rows.append(row)
        # a crash may cut short only what follows the last line break
        elif number < len(lines):
            raise InputError(
                f"line {number} of {file} is damaged; delete the line, or move the file away to go on without it"
            )
    return rows


def append_metrics(folder: Path, row: dict) -> None:
    """Append one line to metrics.jsonl."""
    try:
        with open(Path(folder) / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        add_name(error, Path(folder) / METRICS)
        raise


def _read_row(line: bytes) -> dict | None:
    """The row of a line; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return None
    values = {name: value for name, value in row.items() if name not in ("step", "kind")}
    if row["kind"] == "skipped":
        fits = all(isinstance(values.get(name), str) for name in ("split", "shard", "key"))
    else:
        fits = all(type(value) in (int, float) for value in values.values())
    return row if fits else None


class Progress:
    """The progress bar and the records of one run.

    Args:
        folder: the run folder.
        start: the step from which the run starts or resumes; records of later steps are removed.
        total: steps in all.
        wandb: what gets the records as well.
    """

    def __init__(self, folder: Path, start: int, total: int, wandb: WandbRun | None = None) -> None:
        self.folder, self._wandb = Path(folder), wandb
        kept = [row for row in read_metrics(folder) if row["step"] <= start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.folder / METRICS, text.encode())
        # the import takes seconds, and only rank 0 needs it
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc="train",
            unit="step",
            dynamic_ncols=on_terminal,
            # a terminal shows a moving bar, a log file gets a line now and then
            mininterval=0.2 if on_terminal else 15,
        )

    def advance(self) -> None:
        """Count one step."""
        with tolerant_of_closing(sys.stderr):
            self._bar.update()

    def record(self, row: dict) -> None:
        """Write numbers, and the "step" and "kind" (train or validation) of them, to metrics.jsonl and TensorBoard."""
        append_metrics(self.folder, row)
        try:
            for key, value in row.items():
                if key not in ("step", "kind") and isinstance(value, (int, float)):
                    self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])
            self._board.flush()
        except OSError as error:
            add_name(error, self.folder / "tensorboard")
            raise
        if self._wandb:
            self._wandb.record(row)
        if row["kind"] == "train":
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['samples_per_s']:.1f} samples/s", refresh=False)

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        with tolerant_of_closing(sys.stderr):
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar and close what gets the records."""
        with tolerant_of_closing(sys.stderr):
            self._bar.close()
        self._board.close()
        if self._wandb:
            self._wandb.close()


def plot_metrics(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl: training loss, learning rate, and the scores of the validation splits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    train = [row for row in rows if row["kind"] == "train" and {"loss", "learning_rate"} <= set(row)]
    # dataset -> its rows; the only dataset of a run has the name ""
    scored: dict[str, list[dict]] = {}
    for row in rows:
        kind, _, dataset = row["kind"].partition("/")
        if kind == "validation":
            scored.setdefault(dataset, []).append(row)
    if not train:
        return
    names = list(dict.fromkeys(name for found in scored.values() for name in main_scores(found[-1])))
    answers = [name for name in names if name.partition("/")[0] in ("accuracy", "top-1")]
    panels = 1 + ("CIDEr-D" in names) + bool(answers)
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.2), squeeze=False)
    _plot_training(axes[0, 0], train)
    axis = axes[0, 1] if panels > 1 else None
    if "CIDEr-D" in names:
        _plot_scores(axis, scored, ["CIDEr-D"], "captions, validation", "CIDEr-D (of 10)")
        axis = axes[0, -1]
    if answers:
        _plot_scores(axis, scored, answers, "answers, validation", "accuracy")
        axis.set_ylim(0, 1)
    figure.tight_layout()
    try:
        with replacing(Path(folder) / "loss.png") as partial:
            figure.savefig(partial, dpi=130, format="png")
    finally:
        plt.close(figure)


def _plot_training(axis: "Axes", rows: list[dict]) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axis.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss as logged")
    axis.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="smoothed")
    axis.set(xlabel="optimizer step", ylabel="loss, summed over a text's tokens", title="training")
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="gray", linestyle=":", label="learning rate")
    rate.set_ylabel("learning rate", color="gray")
    rate.set_ylim(bottom=0)
    lines = [*axis.get_lines(), *rate.get_lines()]
    axis.legend(lines, [line.get_label() for line in lines], loc="upper right")


def _plot_scores(axis: "Axes", scored: dict[str, list[dict]], names: list[str], title: str, ylabel: str) -> None:
    for dataset, name in ((dataset, name) for dataset in scored for name in names):
        points = [(row["step"], row[name]) for row in scored[dataset] if name in row]
        if not points:
            continue
        # "accuracy/KIND" is the accuracy of one kind of question
        kind = name.partition("/")[2]
        width, label = 1.2 if kind else 2.5, kind or name
        label = f"{dataset}: {label}" if dataset else label
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=label)
    axis.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize="small", ncols=2)


def _smooth(values: list[float], window: int = 9) -> list[float]:
    """Centred running means, over shorter windows at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
