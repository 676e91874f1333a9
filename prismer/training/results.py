"""The end of a run: the best model is exported, compared with baselines that see no image, and shown on samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from prismer.dataloading.store.shards import CorruptSample, ShardDataset
from prismer.evaluation.report import samples_png, score_table
from prismer.evaluation.scores import scores
from prismer.files import write_atomically, write_json
from prismer.training.evaluation import labelled, most_frequent_replies
from prismer.training.export import export_checkpoint
from prismer.training.progress import plot_metrics
from prismer.training.setup import Run
from prismer.training.skipped import SkippedSamples
from prismer.training.streams import print_on_rank_zero

COLUMNS = ("trained model", "most frequent", "blank images")
_LEGEND = (
    "CIDEr-D is at most 10. *Most frequent* replies with the training split's most frequent caption, and with its "
    "most frequent answer to each kind of question; *blank images* is the trained model without images.\n"
)
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
    best = run.model_class.from_pretrained(checkpoint)
    if run.is_rank_zero:
        export_checkpoint(path, path / "model", model_class=run.model_class)
        plot_metrics(path)
    about = dict(
        steps=step,
        best_checkpoint=checkpoint.name,
        precision=run.precision,
        processes=dist.get_world_size(),
        seconds_since_last_start=round(seconds, 1),
    )
    results, samples = {}, {}
    if run.val_loaders:
        model = run.new_replica()
        model.load_state_dict(best.state_dict())
    for name, loader in run.val_loaders.items():
        records = run.predict(model, loader)
        baseline = most_frequent_replies(records, run.statistics)
        columns = [scores(found) for found in (records, baseline, run.predict(model, loader, blank=True))]
        results[name], samples[name] = (columns, len(records)), records[:_SAMPLES]
    skipped.record(step)
    print_on_rank_zero(skipped.summary())
    if not run.is_rank_zero:
        return
    about["skipped_samples"] = len(skipped.names)
    if results:
        print_on_rank_zero(write_results(path, results, about))
    # a name may hold slashes
    sheets = {name: labelled("samples", name).replace("/", "-") + ".png" for name in samples}
    for name, sheet in sheets.items():
        draw_samples(path / sheet, run.val_loaders[name].dataset, samples[name])
    write_json(path / "finished.json", about)
    print_on_rank_zero(f"finished: {path}/model, results.md, loss.png, {', '.join(sheets.values()) or 'samples.png'}")


def write_results(folder: Path, results: Mapping[str, tuple[Sequence[dict[str, float]], int]], about: dict) -> str:
    """Write results.md and results.json; returns the tables.

    Args:
        results: for each validation split, by the name of its dataset, the result of `evaluation.scores` for each of
            COLUMNS, and how many images were scored; "" is the name of the only dataset.
        about: facts of the run that JSON can hold (steps, precision, time).
    """
    splits = {
        name: dict(images=n, **dict(zip(COLUMNS, columns, strict=True))) for name, (columns, n) in results.items()
    }
    tables = "\n".join(
        score_table(
            {column: split[column] for column in COLUMNS},
            f"validation{name and f' of {name}'}, {split['images']} images",
        )
        for name, split in splits.items()
    )
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    write_atomically(folder / "results.md", f"{tables}\n{_LEGEND}\n{facts}".encode())
    write_json(folder / "results.json", dict(about, **splits.get("", dict(datasets=splits))))
    return tables


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
            shown.append((dataset[dataset.find(row["key"])].jpeg, row))
        except CorruptSample as error:
            print_on_rank_zero(f"{path.name} leaves {row['key']} out: {error}")
    if shown:
        write_atomically(path, samples_png(shown))
