"""The end of a run: the best model is exported, compared with baselines that see no image, and shown on samples."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from PIL import Image

from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.evaluation.metrics import vqa_accuracy
from prismer.evaluation.predict import most_frequent_replies
from prismer.evaluation.scores import scores
from prismer.files import replacing, write_atomically, write_json
from prismer.model import Prismer
from prismer.training.export import export_checkpoint
from prismer.training.progress import plot_metrics
from prismer.training.setup import Run
from prismer.training.skipped import SkippedSamples
from prismer.training.streams import print_on_rank_zero

COLUMNS = ("trained model", "most frequent", "blank images")
# validation images in samples.png
_SAMPLES = 8


def finish_run(run: Run, step: int, seconds: float, skipped: SkippedSamples) -> None:
    """Export the best checkpoint, score it beside its baselines, and write the results of the run (collective).

    Args:
        step: optimizer steps done.
        seconds: training time since the last start.
        skipped: samples that the run skipped.
    """
    path, checkpoint = run.folder.path, run.folder.best()
    best = Prismer.from_pretrained(checkpoint)
    if run.is_rank_zero:
        export_checkpoint(path, path / "model")
        plot_metrics(path)
    about = dict(
        steps=step,
        best_checkpoint=checkpoint.name,
        precision=run.precision,
        processes=dist.get_world_size(),
        seconds_since_last_start=round(seconds, 1),
    )
    if run.val_loader:
        model = run.new_replica()
        model.load_state_dict(best.state_dict())
        records = run.predict(model)
        baseline = most_frequent_replies(records, run.statistics)
        columns = [scores(found) for found in (records, baseline, run.predict(model, blank=True))]
    skipped.record(step)
    print_on_rank_zero(skipped.summary())
    if not run.is_rank_zero:
        return
    about["skipped_samples"] = len(skipped.names)
    if run.val_loader:
        print_on_rank_zero(write_results(path, columns, len(records), about))
        draw_samples(path / "samples.png", run.val_loader.dataset, records[:_SAMPLES])
    write_json(path / "finished.json", about)
    print_on_rank_zero(f"finished: {path}/model, results.md, loss.png, samples.png")


def results_table(columns: Sequence[dict[str, float]], num_images: int) -> str:
    """Scores side by side as a Markdown table.

    Args:
        columns: the result of `evaluation.scores` for each of COLUMNS.
        num_images: how many images were scored.
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
        columns, num_images: as for `results_table`.
        about: facts of the run that JSON can hold (steps, precision, time).
    """
    table = results_table(columns, num_images)
    legend = (
        "CIDEr-D is at most 10. *Most frequent* replies with the training split's most frequent caption, and with its "
        "most frequent answer to each kind of question; *blank images* is the trained model without images.\n"
    )
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    write_atomically(folder / "results.md", f"{table}\n{legend}\n{facts}".encode())
    write_json(folder / "results.json", dict(about, images=num_images, **dict(zip(COLUMNS, columns, strict=True))))
    return table


def draw_samples(path: Path, dataset: ShardDataset, records: Sequence[dict]) -> None:
    """Draw the images of some records with their true and predicted texts into one PNG.

    Args:
        path: the file to write.
        dataset: holds the images; those that cannot be read again are left out.
        records: from `evaluation.predict`.
    """
    shown = []
    for record in records:
        try:
            jpeg = dataset[_index_of(record["key"], dataset)].jpeg
            shown.append((Image.open(io.BytesIO(jpeg)).convert("RGB"), record))
        except (CorruptSample, OSError) as error:
            print_on_rank_zero(f"{path.name} leaves {record['key']} out: {error}")
    if not shown:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    # each sample takes two cells: its image, and its texts below
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(4.2 * columns, 6.3 * rows), height_ratios=[3, 2.4] * rows, squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (image, record) in enumerate(shown):
        row, column = divmod(i, columns)
        axes[2 * row, column].imshow(image)
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


def _index_of(key: str, dataset: ShardDataset) -> int:
    for i in range(len(dataset)):
        try:
            if dataset.key(i) == key:
                return i
        # a shard without its index has no keys, and no records
        except CorruptSample:
            continue
    raise AssertionError(f"{key} was read from {dataset.folder} and is not in it")


def _lines(record: dict, width: int = 50, num_questions: int = 4) -> list[tuple[str, str]]:
    """Wrapped lines with their colours: grey for a true text, black for a prediction, green and red for a prediction
    that is known to be right or wrong."""
    lines: list[tuple[str, str]] = []

    def add(text: str, colour: str) -> None:
        lines.extend((part, colour) for part in textwrap.wrap(text, width, subsequent_indent="   "))

    if record.get("captions"):
        add(f"true: {record['captions'][0]}", "dimgray")
    if "caption" in record:
        add(f"generated: {record['caption']}", "black")
    questions = record.get("questions", [])
    # one question of each kind comes before a second one of any kind
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
