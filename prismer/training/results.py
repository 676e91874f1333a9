"""The end of a run: the best model is exported, compared with baselines that see no image, and shown on samples."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.evaluation.report import samples_png, score_table
from prismer.evaluation.scores import scores
from prismer.files import write_atomically, write_json
from prismer.model import Prismer
from prismer.training.evaluation import most_frequent_replies
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


def write_results(folder: Path, columns: Sequence[dict[str, float]], num_images: int, about: dict) -> str:
    """Write results.md and results.json; returns the table.

    Args:
        columns: the result of `evaluation.scores` for each of COLUMNS.
        num_images: how many images were scored.
        about: facts of the run that JSON can hold (steps, precision, time).
    """
    named = dict(zip(COLUMNS, columns, strict=True))
    table = score_table(named, f"validation, {num_images} images")
    legend = (
        "CIDEr-D is at most 10. *Most frequent* replies with the training split's most frequent caption, and with its "
        "most frequent answer to each kind of question; *blank images* is the trained model without images.\n"
    )
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    write_atomically(folder / "results.md", f"{table}\n{legend}\n{facts}".encode())
    write_json(folder / "results.json", dict(about, images=num_images, **named))
    return table


def draw_samples(path: Path, dataset: ShardDataset, rows: Sequence[dict]) -> None:
    """Draw the images of some rows with their true and predicted texts into one PNG.

    Args:
        path: the file to write.
        dataset: holds the images; those that cannot be read again are left out.
        rows: from `prismer.evaluation.predict`.
    """
    shown = []
    for row in rows:
        try:
            shown.append((dataset[_index_of(row["key"], dataset)].jpeg, row))
        except CorruptSample as error:
            print_on_rank_zero(f"{path.name} leaves {row['key']} out: {error}")
    if shown:
        write_atomically(path, samples_png(shown))


def _index_of(key: str, dataset: ShardDataset) -> int:
    for i in range(len(dataset)):
        try:
            if dataset.key(i) == key:
                return i
        # a shard without its index has no keys, and no records
        except CorruptSample:
            continue
    raise AssertionError(f"{key} was read from {dataset.folder} and is not in it")
