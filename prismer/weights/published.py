"""The published checkpoints: their architecture is read off the tensors, their names are translated in and out.

A published checkpoint is one flat `pytorch_model.bin` of 635 to 1443 tensors without a config. What shapes cannot tell
(heads, activation) comes from the preset of the same sizes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from prismer.config import PRESETS, PrismerConfig
from prismer.errors import InputError
from prismer.experts import EXPERTS
from prismer.files import replacing
from prismer.network import PrismerNetwork
from prismer.weights.locate import PUBLISHED_WEIGHTS
from prismer.weights.names import IGNORED, from_published, to_published
from prismer.weights.tensors import POSITIONS, SIZE_AXES, stored_sizes, stored_stems

# px, of pre-training, captions and questions, classes; sides that the patch does not divide share a grid with others
_SIDES = (224, 480, 384)


def published_config(tensors: Mapping[str, Tensor], source: str) -> PrismerConfig:
    """The architecture of published tensors: their sizes, and the preset that has the same.

    Raises:
        ValueError: if a tensor that tells a size is missing, or no preset has these sizes.
    """
    shapes = {from_published(name) or name: tensor.shape for name, tensor in tensors.items()}
    sizes, stems = stored_sizes(shapes), stored_stems(shapes)
    unknown = sorted(stems - set(EXPERTS))
    if unknown:
        raise InputError(
            f"{source} has experts this library does not know ({', '.join(unknown)}); known are {', '.join(EXPERTS)}"
        )
    # tables that belong to experts are absent without them
    absent = () if stems else ("resampler_depth", "num_latents")
    absent += () if "obj_detection" in stems else ("num_instances",)
    for key in (POSITIONS, *(key for field, (key, _) in SIZE_AXES.items() if field not in absent)):
        if key not in shapes:
            lacking = to_published(key)[0]
            raise InputError(f"{source} lacks {lacking}, so it is no whole Prismer checkpoint; get it again")
    found = {field: size for field, size in sizes.items() if field not in absent}
    experts = tuple(name for name in EXPERTS if name in stems)
    grid = round(shapes[POSITIONS][0] ** 0.5)
    differing = {}
    for name, make in PRESETS.items():
        config = make(**({} if experts else {"name": f"{name}-z"}), experts=experts)
        differing[name] = [field for field, value in found.items() if getattr(config, field) != value]
        if not differing[name]:
            patch = config.patch_size
            side = next((side for side in _SIDES if side // patch == grid), grid * patch)
            # of the published ones only pre-training has a 224 px table, and its captions have no prefix
            prefix = {"caption_prefix": ""} if side == 224 else {}
            return config.replace(image_size=side, **prefix)
    nearest = min(differing, key=lambda name: len(differing[name]))
    config = PRESETS[nearest]()
    text = ", ".join(f"{f} {found[f]} (not {getattr(config, f)})" for f in differing[nearest])
    raise InputError(
        f"{source} has the sizes of no preset; the nearest is {nearest}, but for {text}; "
        "get the file again if it was cut, or say what it is with config=PrismerConfig(...)"
    )


def to_ours(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Published tensors under our names, and the names of those without meaning here.

    Of a tensor stored twice (the tied matrix of the head, its bias) one copy suffices, under either name. Names that
    are no tensor of Prismer stay as they are, for the loading report.

    Raises:
        ValueError: if two copies of a tied tensor differ.
    """
    ours, ignored = {}, []
    for name, tensor in tensors.items():
        key = from_published(name) or name
        if name == IGNORED:
            ignored.append(name)
        elif key not in ours:
            ours[key] = tensor
        elif not _same(ours[key], tensor):
            raise InputError(
                f"{source} holds two different {' and '.join(to_published(key))}, which are one tensor in Prismer; "
                "delete the one that was not trained"
            )
    return ours, ignored


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def save_published(model: PrismerNetwork, path: str | Path) -> None:
    """Write the weights of `model` in the format of the published checkpoints: one file, their names, fp32.

    Config and tokenizer have no place in that format. An interrupted save leaves an old file as it was.

    Args:
        path: the file; the published ones are called pytorch_model.bin.

    Raises:
        ValueError: if the model reads detections as text, which the format has no names for, or `path` is a folder.
    """
    if model.config.expert_text:
        raise InputError(
            f"the published format has no place for the parts that read {' and '.join(model.config.expert_text)} as "
            f"text; load the model with expert_text=()"
        )
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file, such as {path / PUBLISHED_WEIGHTS}")
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).contiguous()
        # torch.save stores a tensor with two names once
        tensors.update(dict.fromkeys(to_published(key), value))
    # a buffer of the transformers version of the time, which its strict loading expects
    tensors[IGNORED] = torch.arange(model.config.max_positions)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        kept = _Errors(file)
        try:
            torch.save(tensors, kept)
        except RuntimeError:
            # on a full disk torch says "unexpected pos"
            if kept.error is not None:
                raise kept.error from None
            raise


class _Errors:
    """A file to write to. It keeps the first error of the operating system, which torch replaces by one of its own."""

    def __init__(self, file: IO[bytes]):
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()
