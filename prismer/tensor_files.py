"""Safetensors files: write them tensor by tensor with a checksum, and read tensor shapes without the data."""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prismer.errors import InputError
from prismer.files import add_name

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: str | Path, header: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Iterable[Tensor]
) -> int:
    """Write a safetensors file one tensor at a time, so that only one is in memory; returns its crc32.

    Args:
        path: the file.
        header: name -> dtype and shape of each tensor.
        tensors: the tensors, in the order of `header`.

    Raises:
        OSError: with the name of the file, if the disk is full or broken; the file is removed.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in header.items():
        end = offset + shape.numel() * dtype.itemsize
        entries[name] = dict(dtype=_DTYPES[dtype], shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    crc = zlib.crc32(start)
    try:
        with open(path, "wb") as file:
            file.write(start)
            for (dtype, shape), tensor in zip(header.values(), tensors, strict=True):
                assert tensor.dtype == dtype and tensor.shape == shape
                data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                crc = zlib.crc32(data, crc)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        add_name(error, Path(path))
        Path(path).unlink(missing_ok=True)
        raise
    return crc


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> int:
    """Write tensors by name as one safetensors file; returns its crc32."""
    # widest dtype first: readers need every tensor aligned to its item size
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
    return write_safetensors(path, header, (tensors[name] for name in names))


def read_shapes(path: str | Path) -> dict[str, torch.Size]:
    """The shapes of a safetensors file's tensors, by name, read without the data.

    Raises:
        ValueError: if the file is incomplete or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); export it again") from None
