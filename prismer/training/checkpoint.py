"""The content of a checkpoint: a loadable model folder that also holds AdamW's moments and the trainer's state.

    config.json, vocab.json, ...   config and tokenizer, as in any model folder
    model.safetensors              fp32 masters of what trains, everything else as it is
    optimizer.safetensors          AdamW's moments: NAME.exp_avg and NAME.exp_avg_sq, fp32
    trainer.json                   step, epoch, samples, score, precision, world size, seed
    checksums.json                 size and crc32 of every file

Tensors are whole. They are gathered one by one from the ZeRO-3 shards to rank 0, which writes them, so that no process
holds more than one gathered tensor. Nothing is pickled, and every rank reads back its own shard whatever the number of
ranks. DeepSpeed's own format (a pickle for each rank) resumes only at the same number of ranks, and its universal
conversion silently loses frozen parameters. The price is a single writer: 12 bytes per trainable parameter, which are
6 GB for LARGE. Every rank must see the folder.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prismer.errors import InputError
from prismer.files import write_checksums, write_json
from prismer.reading import read_json
from prismer.tensor_files import write_safetensors
from prismer.training import zero
from prismer.weights.folder import WEIGHTS, write_description

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"


def write_checkpoint(engine: nn.Module, folder: Path, state: dict) -> None:
    """Fill `folder`, which exists and is empty, with a checkpoint (collective; rank 0 writes).

    Args:
        engine: the DeepSpeed engine.
        state: content of trainer.json.
    """
    checksums = {
        WEIGHTS: _write_weights(engine, folder / WEIGHTS),
        OPTIMIZER: _write_moments(engine, folder / OPTIMIZER),
    }
    if dist.get_rank() == 0:
        write_description(engine.module, folder)
        write_json(folder / STATE, state)
        write_checksums(folder, checksums)


def read_state(checkpoint: Path) -> dict:
    """The trainer.json of a checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    file = checkpoint / STATE
    state = read_json(file, dict, "it belongs to the checkpoint")
    for name, kinds in (("step", (int,)), ("loss_count", (int,)), ("loss_sum", (int, float))):
        value = state.get(name)
        if type(value) not in kinds or (name != "loss_sum" and value < 0):
            raise InputError(f"{file} is damaged ({name} is {value!r})")
    return state


def restore_optimizer(engine: nn.Module, checkpoint: Path) -> dict:
    """Fill the masters and moments of an engine whose model was loaded from `checkpoint`; returns its trainer.json.

    Raises:
        ValueError: if the checkpoint is for other trainable parameters, or a file is damaged.
    """
    state = read_state(checkpoint)
    trainable = _trainable(engine)
    expected = {f"{name}.{key}" for name in trainable for key in zero.MOMENTS}
    try:
        with safe_open(checkpoint / OPTIMIZER, "pt") as moments, safe_open(checkpoint / WEIGHTS, "pt") as weights:
            differing = sorted(expected ^ set(moments.keys()))
            if differing:
                raise InputError(
                    f"{checkpoint / OPTIMIZER} is for other trainable parameters (first: {differing[0]}); "
                    f"resume with the freeze mode of the run"
                )
            zero.allocate_moments(engine, state["step"])
            for name, parameter in trainable.items():
                zero.set_weight(parameter, weights.get_tensor(name))
                for key in zero.MOMENTS:
                    moment = moments.get_tensor(f"{name}.{key}")
                    if moment.shape != parameter.ds_shape or moment.dtype != torch.float32:
                        raise InputError(
                            f"{checkpoint / OPTIMIZER} is damaged ({name}.{key} is {tuple(moment.shape)}, not "
                            f"{tuple(parameter.ds_shape)}); resume from another checkpoint"
                        )
                    zero.set_moment(parameter, key, moment)
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(
            f"{checkpoint} holds a broken file, or lacks one ({error}); resume from another checkpoint"
        ) from None
    return state


def _write_weights(engine: nn.Module, path: Path) -> int:
    """Write every tensor by its state-dict name; returns the crc32 (collective)."""
    # a sharded parameter holds no data here
    tensors = engine.module.state_dict(keep_vars=True)
    header = {}
    for name, tensor in tensors.items():
        trains = getattr(tensor, "requires_grad", False)
        header[name] = (torch.float32 if trains else tensor.dtype, getattr(tensor, "ds_shape", tensor.shape))
    # widest dtype first: readers want every tensor aligned to its item size
    header = dict(sorted(header.items(), key=lambda entry: -entry[1][0].itemsize))
    return _write(path, header, (zero.gather_weight(tensors[name]) for name in header))


def _write_moments(engine: nn.Module, path: Path) -> int:
    """Write the moments of every trainable parameter; returns the crc32 (collective)."""
    trainable = _trainable(engine)
    names = [(name, key) for name in trainable for key in zero.MOMENTS]
    header = {f"{name}.{key}": (torch.float32, trainable[name].ds_shape) for name, key in names}
    return _write(path, header, (zero.gather_moment(trainable[name], key) for name, key in names))


def _trainable(engine: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _write(path: Path, header: dict[str, tuple[torch.dtype, torch.Size]], tensors: Iterator[Tensor]) -> int:
    if dist.get_rank() == 0:
        return write_safetensors(path, header, tensors)
    # every rank takes part in gathering a tensor, but only rank 0 writes it
    for _ in tensors:
        pass
    return 0
