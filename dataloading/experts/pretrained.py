"""Models of transformers, read from a folder or the hub, with a sentence where the folder holds something else."""

from pathlib import Path

import torch

from prismer.dataloading.experts.network import Card
from prismer.dataloading.experts.weights import file_version, from_hub

_FILES = ("model.safetensors", "pytorch_model.bin")


def load_pretrained(
    auto_class: str, card: Card, source: str | Path | None, kinds: tuple[str, ...]
) -> tuple[torch.nn.Module, str]:
    """An fp32 model in evaluation mode, on the CPU, and the version of its weights.

    Args:
        auto_class: name of the class of transformers whose `from_pretrained` reads it.
        card: of the network that it is for.
        source: a folder or a hub id; None is the card's, looked for on this machine alone.
        kinds: what `model_type` in its configuration may be.

    Raises:
        MissingWeights: if the files are not found.
        ValueError: if it is another kind of model, or lacks weights.
    """
    transformers = quiet_transformers()
    where = str(source or card.weights)
    kind = from_hub(_kind, card, source)
    if kind not in kinds:
        raise ValueError(
            f"{where} holds a model of type {kind}, {card.name} is {' or '.join(kinds)}; name its folder or hub id"
        )

    def load(where: str, **options):
        return getattr(transformers, auto_class).from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, **options
        )

    model, loading = from_hub(load, card, source)
    lacking = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"{where} lacks {len(lacking)} weights of {card.name}, the first is {lacking[0]}; get the folder again"
        )
    return model.eval().requires_grad_(False), from_hub(_version, card, source)


def _kind(where: str, local_files_only: bool) -> str | None:
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(where, local_files_only=local_files_only)
    if not config:
        raise OSError("there is no config.json")
    return config.get("model_type")


def quiet_transformers():
    """The package transformers without its progress bars, which would tear ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _version(where: str, local_files_only: bool) -> str:
    from transformers.utils import cached_file

    for name in _FILES:
        path = cached_file(where, name, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False)
        if path:
            return file_version(Path(path))
    raise ValueError(f"{where} has its weights in several files; save it with a max_shard_size that keeps them in one")
