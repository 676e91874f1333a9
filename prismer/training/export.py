"""A checkpoint as a whole model folder: weights, config, tokenizer, and from its run what the model answers with.

These are the answers and class names that evaluation ranks, the table of features, and a card with the run's data and
scores. They come from the run folder, two levels above the checkpoint; a checkpoint that was moved away has none.
"""

from dataclasses import asdict
from pathlib import Path

from prismer.dataloading.mixture.parts import parse_parts
from prismer.errors import InputError
from prismer.model import Prismer
from prismer.reading import read_json
from prismer.training.checkpoint import STATE, read_state
from prismer.training.config import TrainConfig
from prismer.training.initial_model import semantics_folder
from prismer.training.progress import read_metrics
from prismer.training.run_folder import SETTINGS, RunFolder
from prismer.training.text_statistics import read_answers, read_classes
from prismer.weights.folder import save_pretrained
from prismer.weights.locate import ANSWERS
from prismer.weights.model_card import ModelCard, licence_of


def find_checkpoint(source: str | Path) -> Path | None:
    """`source` if it is a checkpoint, the best checkpoint if it is a run folder, None if it is anything else."""
    path = Path(source)
    return path if (path / STATE).is_file() else RunFolder(path).best()


def export_checkpoint(
    source: str | Path, out: str | Path, semantics: Path | None = None, model_class: type[Prismer] = Prismer
) -> Path:
    """Write a checkpoint as a model folder.

    Args:
        source: a run folder, whose best checkpoint is exported, or one of its checkpoint folders.
        out: the folder to write, or a URL such as s3://bucket/model; `Prismer.from_pretrained` loads it.
        semantics: the folder of the table of features; None takes the one that the run read.
        model_class: the class of the checkpoint's model.

    Returns:
        The checkpoint that was exported.

    Raises:
        ValueError: if `source` holds no checkpoint, or the run's table of features is gone.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        raise InputError(f"{source} is neither a run with checkpoints nor a checkpoint; give runs/NAME")
    run = checkpoint.parent.parent
    classes, settings = read_classes(run), _settings(run)
    # no list holds all names that a model of renamed scenes may read: it writes its answers
    listed = (run / ANSWERS).is_file() and not settings.get("rename_kinds")
    answers = read_answers(run / ANSWERS) if listed else None
    model = model_class.from_pretrained(checkpoint)
    if semantics is None and settings and model.config.experts and model.config.semantics != "spelling":
        semantics = semantics_folder(settings["semantics"], settings["model"])
        if semantics is None:
            raise InputError(
                f"the table of features that {run} was trained with lay in {settings['model']}, where it is no more; "
                f"name a copy with --semantics"
            )
    save_pretrained(
        model,
        out,
        answers=answers,
        classes=classes or None,
        semantics=semantics,
        card=_card(run, checkpoint, settings),
    )
    return checkpoint


def _settings(run: Path) -> dict:
    """The settings of a run, complete; {} if `run` holds none."""
    if not (run / SETTINGS).is_file():
        return {}
    stored = read_json(run / SETTINGS, dict).get("settings")
    if not isinstance(stored, dict):
        raise InputError(f"{run / SETTINGS} is damaged; restore it from a copy")
    # a run that was started before a setting existed had its default
    return {**asdict(TrainConfig()), **stored}


def _card(run: Path, checkpoint: Path, settings: dict) -> ModelCard:
    if not settings:
        return ModelCard()
    state = read_state(checkpoint)
    step = state["step"]
    # names alone: paths belong to the machine
    parts, start = parse_parts(settings["data"]), Path(settings["model"]).name
    data = ", ".join(part.name for part in parts)
    training = [
        f"Trained on the dataset{'s' if len(parts) > 1 else ''} {data}, task {settings['task']}, from {start}: "
        f"step {step:,}, {step * settings['batch_size']:,} images, seed {settings['seed']}."
    ]
    rows = {
        row["kind"].partition("/")[2]: row
        for row in read_metrics(run)
        if row["kind"].partition("/")[0] == "validation" and row["step"] == step
    }
    # VQAv2 has 65 types of questions, too many for a card
    left_out = ("step", "kind", "accuracy/question_type")
    found = {
        f"{dataset}: {name}" if dataset else name: value
        for dataset, row in rows.items()
        for name, value in row.items()
        if not name.startswith(left_out)
    }
    most = settings["eval_images"]
    return ModelCard(
        licence=licence_of(settings["model"]),
        training=training,
        scores=found,
        scored_on=f"the validation split of {', '.join(filter(None, rows)) or data}"
        + (f", its first {most:,} images" if most else ""),
    )
