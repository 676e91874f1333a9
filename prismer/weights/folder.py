"""Model folders: a config, weights, a tokenizer and their checksums, saved whole and loaded with checks."""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from prismer.config import PrismerConfig
from prismer.dataloading.semantics.features import TABLE_FILES, Semantics, read_table
from prismer.errors import InputError
from prismer.files import CHECKSUMS, find_damage, write_atomically, write_checksums, write_json
from prismer.network import Model, PrismerNetwork
from prismer.precision import inference_dtype
from prismer.reading import is_text, read_bytes, read_json
from prismer.storage.folders import new_place
from prismer.storage.objects import list_objects
from prismer.storage.places import as_place
from prismer.tensor_files import read_shapes, save_tensors
from prismer.tokenizer import ROBERTA_VOCAB_SIZE, Tokenizer
from prismer.weights.backbones import from_preset, is_preset
from prismer.weights.load_report import LoadReport
from prismer.weights.locate import (
    ANSWERS,
    CLASS_NAMES,
    CONFIG,
    MODEL_CARD,
    PUBLISHED_WEIGHTS,
    WEIGHTS,
    has_tokenizer,
    locate,
)
from prismer.weights.model_card import ModelCard, licence_of
from prismer.weights.names import is_published
from prismer.weights.published import published_config, to_ours
from prismer.weights.tensors import (
    POSITIONS,
    check_dtypes,
    check_sizes,
    fit_expert_text,
    load_tensors,
    other_experts,
    read_tensors,
    without_wrappers,
)

_log = logging.getLogger(__name__)


def save_pretrained(
    model: PrismerNetwork,
    folder: str | Path,
    *,
    answers: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    semantics: str | Path | None = None,
    card: ModelCard | None = None,
) -> None:
    """Write `model` so that `from_pretrained` loads it; an interrupted save leaves the old folder as it was.

    In a bucket (s3://bucket/model), where files are replaced one by one, an interrupted save leaves a folder whose
    checksums do not fit, which `from_pretrained` refuses. What is left out is copied from the folder that the model was
    loaded from, if that holds it.

    Args:
        answers: what the model chooses from when it is asked without a list.
        classes: the class names that it chooses from when it is asked without a list.
        semantics: the folder of the table of features that the model was trained with.
        card: licence, training data and scores for README.md.

    Raises:
        ValueError: if the model's towers are int8, `semantics` holds no table, or `folder` is a file, or holds other
            things than a model.
        OSError: with the name of a file, if the disk is full or broken; nothing is left of the attempt.
    """
    state = model.state_dict()
    if any(tensor.dtype == torch.int8 for tensor in state.values()):
        raise InputError(
            "the model's towers are int8, which no model folder holds; keep the folder that it was loaded from"
        )
    if semantics is not None:
        read_table(semantics)
    place, source = as_place(folder), getattr(model, "folder", None)
    _refuse_other_folders(place)
    with new_place(place, last=CHECKSUMS) as aside:
        crc = save_tensors(state, aside / WEIGHTS)
        write_description(model, aside)
        for name, texts in ((ANSWERS, answers), (CLASS_NAMES, classes)):
            if texts is not None:
                write_json(aside / name, list(texts))
            else:
                _copy(source, aside, [name])
        if model.config.semantics != "spelling":
            _copy(semantics or source, aside, TABLE_FILES)
        write_checksums(aside, {WEIGHTS: crc})
        if card is None:
            # the scores of that model are left out: its weights may have changed since it was loaded
            origin = [f"Made from the model {source.name}."] if source else []
            card = ModelCard(licence=licence_of(source) if source else "", training=origin)
        # after the checksums, because the owner may edit it
        write_atomically(aside / MODEL_CARD, card.text(model, Path(place).name).encode())


def copy_companions(source: str | Path | None, folder: Path) -> None:
    """Complete a folder that transformers wrote: copy what lies beside the weights of `source`, and write checksums."""
    for names in ([ANSWERS], [CLASS_NAMES], TABLE_FILES, ["vocab.json", "merges.txt"]):
        if source is not None and Path(source).resolve() != folder.resolve():
            _copy(source, folder, names)
    write_checksums(folder)


def _copy(source: str | Path | None, folder: Path, names: Sequence[str]) -> None:
    """Copy files of the folder `source`, if it has all of them."""
    if source is not None and all((Path(source) / name).is_file() for name in names):
        for name in names:
            write_atomically(folder / name, read_bytes(Path(source) / name))


def stored_texts(folder: str | Path | None, name: str) -> list[str] | None:
    """The answers (ANSWERS) or class names (CLASS_NAMES) that a model folder lists; None if it lists none.

    Raises:
        ValueError: if the file is not a list of texts.
    """
    path = None if folder is None else Path(folder) / name
    if path is None or not path.is_file():
        return None
    texts = read_json(path, list, "restore it from a copy, or delete it")
    if not all(isinstance(text, str) and is_text(text) for text in texts):
        raise InputError(f"{path} holds entries that are not texts; restore it from a copy, or delete it")
    # a model that was trained on captions alone has an empty list
    return texts or None


def stored_semantics(config: PrismerConfig, folder: str | Path | None) -> Semantics | None:
    """The features of names for a model of this config; None if they are in a table and `folder` holds none.

    Raises:
        ValueError: if the table is damaged.
    """
    if config.semantics == "spelling":
        return Semantics.spelling()
    if folder is None or not (Path(folder) / TABLE_FILES[0]).is_file():
        return None
    paths = [Path(folder) / name for name in TABLE_FILES]
    return _read_table(Path(folder), tuple(path.stat().st_mtime_ns for path in paths if path.exists()))


@lru_cache(maxsize=2)
def _read_table(folder: Path, changed: tuple[int, ...]) -> Semantics:
    if damaged := find_damage(folder, TABLE_FILES):
        raise InputError(
            f"{folder / damaged} is damaged: its checksum is not the one in {CHECKSUMS}; copy or export the model "
            f"again, or delete {CHECKSUMS} if you changed it yourself"
        )
    return Semantics.from_table(folder)


def _refuse_other_folders(folder: str | Path) -> None:
    """Raise a ValueError for a folder that holds other things than a model: a save replaces all of its content."""
    if isinstance(folder, Path):
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    else:
        names = set(list_objects(folder))
    if names and not names & {CONFIG, WEIGHTS}:
        raise InputError(
            f"{folder} is no model folder, and holds {min(names)} and the like, which a save would delete; "
            f"give a new folder"
        )


def write_description(model: PrismerNetwork, folder: Path) -> None:
    """Write what a model folder holds besides weights: config and tokenizer."""
    write_atomically(folder / CONFIG, model.config.to_json().encode())
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def from_pretrained(
    model_class: type[Model],
    source: str | Path,
    *,
    image_size: int | None = None,
    experts: Sequence[str] | None = None,
    expert_text: Sequence[str] | None = None,
    config: PrismerConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    on_report: Callable[[LoadReport], object] | None = None,
) -> Model:
    """Load a model, in evaluation mode; `Prismer.from_pretrained` calls this.

    Args:
        model_class: what is built.
        source: one of
            a folder with config.json and model.safetensors, as `save_pretrained` writes it, or the URL of one, such as
            s3://bucket/model, whose files are kept on this machine;
            "tiny", the model that ships with the package;
            a published checkpoint: its name (`prismer models list`), its folder, or its file, pytorch_model.bin;
            "base", "large" or "huge", each also with "-z": a new model around CLIP and RoBERTa, to be trained;
            "owner/name" on the Hugging Face hub, with a folder inside if the model lies in one
            ("owner/name/folder"). The hub is asked only for what is no path here, and only for the files needed.
        image_size: RGB side to use instead of the stored one; the positional table is resized bicubically.
        experts: the experts that the model must have; None accepts any.
        expert_text: experts whose detections the decoder reads as text instead of the stored choice: the parts that
            read them are new, to be trained, where the stored model has none, and left out for ().
        config: of a published checkpoint whose sizes are no preset's; None reads it off the tensors.
        device: where the weights go.
        dtype: dtype of the weights; "auto" for the faster of bf16 and fp32; None for the stored one, except that bf16
            becomes fp32 on a processor that is faster in fp32. A warning names a dtype that was chosen here and is not
            the stored one.
        on_report: called with the loading report; None logs it (level INFO) if there is something to report.

    Raises:
        ValueError: if the files are not there or broken, the tensors do not fit the config (`Misfit`, with a table of
            them), or the experts are others.
    """
    if is_preset(source):
        return _new(model_class, str(source), image_size, experts, expert_text, config, device, dtype)
    folder, weights = locate(source)
    if config is None and folder is not None and (folder / CONFIG).is_file():
        config = PrismerConfig.from_file(folder / CONFIG)
    if config is not None and weights.suffix == ".safetensors":
        # before anything of the config's sizes is built
        check_sizes(config, read_shapes(weights), source=str(weights))
    tokenizer = None
    if folder is not None and has_tokenizer(folder):
        tokenizer = Tokenizer.from_folder(folder)
    check_checksums(weights)
    tensors, ignored = without_wrappers(read_tensors(weights)), []
    if is_published(tensors):
        config = config or published_config(tensors, source=str(weights))
        tensors, ignored = to_ours(tensors, source=str(weights))
        if tokenizer is None and config.vocab_size == ROBERTA_VOCAB_SIZE:
            # published checkpoints come without a tokenizer; theirs is RoBERTa's
            tokenizer = Tokenizer.roberta()
    elif config is None:
        raise InputError(f"{weights.parent} has no {CONFIG}; export the model again with `prismer export`")
    if experts is not None and set(experts) != set(config.experts):
        raise InputError(other_experts(str(weights), config.experts, experts))
    if image_size is not None:
        config = config.replace(image_size=image_size)
    stored_names = set(tensors)
    if expert_text is not None:
        config = config.replace(expert_text=tuple(expert_text))
        tensors, left_out = fit_expert_text(tensors, config)
        ignored += left_out

    check_sizes(config, {key: tensor.shape for key, tensor in tensors.items()}, source=str(weights))
    # memory is filled once, by the loaded tensors
    with torch.device("meta"):
        model = model_class(config, tokenizer)
    # tensors that the model has no place for are listed in the table of a `Misfit`
    check_dtypes({key: tensors[key] for key in model.state_dict() if key in tensors}, source=str(weights))
    stored = tensors[POSITIONS].dtype if POSITIONS in tensors else torch.float32
    dtype, why = inference_dtype(dtype, stored, config, torch.device(device))
    if why:
        warnings.warn(why, stacklevel=3)
    model = model.to(dtype=dtype).to_empty(device=device)
    new = [key for key in tensors if key not in stored_names]
    report = load_tensors(model, tensors, source=str(weights), new=new, ignored=ignored)
    if on_report is not None:
        on_report(report)
    elif not report.plain:
        _log.info("%s", report)
    # what lies beside the weights belongs to them: answers, class names, the table of features, the card
    model.folder = weights.parent if folder is not None or weights.name == PUBLISHED_WEIGHTS else None
    return model.eval()


def _new(
    model_class: type[Model],
    preset: str,
    image_size: int | None,
    experts: Sequence[str] | None,
    expert_text: Sequence[str] | None,
    config: PrismerConfig | None,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
) -> Model:
    """A new model of a preset, for `from_pretrained`."""
    if config is not None:
        raise InputError(f"{preset} has a config of its own; leave config out, or call Prismer.from_backbones")
    model = from_preset(
        model_class, preset, image_size=image_size, experts=experts, expert_text=tuple(expert_text or ())
    )
    warnings.warn(f"{preset} is new: its towers are trained, what joins them is not; train it first", stacklevel=4)
    chosen, why = inference_dtype(dtype, torch.float32, model.config, torch.device(device))
    if why:
        warnings.warn(why, stacklevel=4)
    return model.to(device=device, dtype=chosen)


def source_config(source: str | Path) -> PrismerConfig:
    """The architecture of a model that `from_pretrained` takes, downloaded if it is on the hub alone.

    Raises:
        ValueError: if there is no such model, or its files are damaged.
    """
    folder, weights = locate(source)
    if folder is not None and (folder / CONFIG).is_file():
        return folder_config(folder)
    return published_config(without_wrappers(read_tensors(weights)), source=str(weights))


def folder_config(folder: str | Path) -> PrismerConfig:
    """The architecture of a model folder, checked against the weights if they are there.

    Raises:
        ValueError: if a file is damaged, or config and weights do not fit each other.
    """
    folder = Path(folder)
    config = PrismerConfig.from_file(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        check_sizes(config, read_shapes(folder / WEIGHTS), source=str(folder / WEIGHTS))
    return config


def check_checksums(weights: Path) -> None:
    """Refuse a file of weights that is not the one that was written; warn if the config beside it was edited.

    The tokenizer checks its own files.

    Raises:
        ValueError: if the file is damaged.
    """
    folder = weights.parent
    if not (folder / CHECKSUMS).is_file():
        _log.info("%s holds no checksums; a damaged file in it would not be noticed", folder)
    if find_damage(folder, (weights.name,)):
        raise InputError(
            f"{weights} is damaged: its checksum is not the one in {CHECKSUMS}; copy or export it again, "
            f"or delete {CHECKSUMS} if you changed it yourself"
        )
    if find_damage(folder, (CONFIG,)):
        # people may edit it: the prefix and length of captions, dropout
        warnings.warn(
            f"{folder / CONFIG} was changed since the model was written; if that was not you, restore it", stacklevel=4
        )
