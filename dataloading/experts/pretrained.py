"""Models of the transformers library, read from a folder or from the hub, with clear errors for anything else."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from prismer.dataloading.experts.network import NetworkInfo
from prismer.dataloading.experts.weights import MissingWeights, file_version
from prismer.errors import InputError

T = TypeVar("T")


def load_pretrained(
    auto_class: str, info: NetworkInfo, source: str | Path | None, model_types: tuple[str, ...]
) -> tuple[torch.nn.Module, str]:
    """A frozen fp32 model on the CPU, in evaluation mode, and the version of its weights.

    Args:
        auto_class: the class of transformers whose `from_pretrained` reads the model.
        info: describes the network for which the model is.
        source: a folder or a hub id; None is `info.weights`, looked for on this machine only.
        model_types: the allowed values of `model_type` in the model's configuration.

    Raises:
        MissingWeights: if the files are not found.
        ValueError: if the model has another type, or some of its weights are missing.
    """
    transformers = quiet_transformers()
    where = str(source or info.weights)
    model_type = from_hub(_model_type, info, source)
    if model_type not in model_types:
        raise InputError(
            f"{where} holds a model of type {model_type}, {info.name} is {' or '.join(model_types)}; "
            f"name its folder or hub id"
        )

    def load(where: str, **options: bool) -> tuple[torch.nn.Module, dict]:
        return getattr(transformers, auto_class).from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, **options
        )

    model, loading = from_hub(load, info, source)
    missing = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if missing:
        raise InputError(
            f"{where} lacks {len(missing)} weights of {info.name}, the first is {missing[0]}; get the folder again"
        )
    return model.eval().requires_grad_(False), from_hub(_version, info, source)


def from_hub(load: Callable[..., T], info: NetworkInfo, source: str | Path | None) -> T:
    """The result of `load(folder or hub id, local_files_only=...)`, such as a `from_pretrained` of transformers.

    The network is used only if `source` names a hub id: `info.weights` is looked for on this machine only.

    Raises:
        MissingWeights: if the files are not found.
    """
    where = str(source or info.weights)
    try:
        return load(where, local_files_only=source is None or Path(where).is_dir())
    except OSError as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise MissingWeights(
            f"the weights of {info.name} are not at {where} ({reason}); name their folder, or allow a download from "
            f"the hub, with --experts {info.expert}={info.name}@{info.weights}"
        ) from None


def quiet_transformers() -> ModuleType:
    """The package transformers, without its progress bars, which would break ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _model_type(where: str, local_files_only: bool) -> str | None:
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(where, local_files_only=local_files_only)
    if not config:
        raise OSError("there is no config.json")
    return config.get("model_type")


def _version(where: str, local_files_only: bool) -> str:
    from transformers.utils import cached_file

    for name in ("model.safetensors", "pytorch_model.bin"):
        path = cached_file(where, name, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False)
        if path:
            return file_version(Path(path))
    raise InputError(f"{where} has its weights in several files; save it with a max_shard_size that keeps them in one")
