"""Proves that models of the hub load, against a hub on loopback: from folders, sub-folders and archives, whatever
breaks on the way; and that each failure is one sentence that leaves nothing broken behind.

Run: pytest tests/model/test_hub.py
"""

import hashlib
import io
import stat
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from prismer.config import preset
from prismer.model import Prismer
from prismer.training.initial_model import initial_config
from prismer.weights import archives
from prismer.weights import hub as hub_module
from prismer.weights.catalogue import HUB_REPOSITORY, PUBLISHED_MODELS, PublishedModel
from prismer.weights.locate import find_folder
from prismer.weights.model_card import licence_of
from tests.fake_hub import FakeHub, connected
from tests.faults.disk import full_after
from tests.model.plain_published import randomise
from tests.model.published_files import (
    compare,
    small,
    small_preset,  # noqa: F401 - a fixture
    write,
)

NAME = "vqa_prismerz_small"
SOURCE = f"someone/prismer/{NAME}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def plain(hub, tmp_path):
    """A released checkpoint in a sub-folder of someone/prismer, and the plain model that it belongs to."""
    plain = write(tmp_path / "published" / "pytorch_model.bin", small(experts=()))
    hub.add_folder("someone/prismer", tmp_path / "published", f"{NAME}/")
    return plain


def refusal(source, words):
    """The one sentence with which a model is refused, which must have these words."""
    with pytest.raises(ValueError) as caught:
        Prismer.from_pretrained(source)
    text = str(caught.value)
    assert words in text and "\n" not in text, text
    return text


def packed(end, files):
    """An archive of files, path -> content."""
    data = io.BytesIO()
    if end == ".zip":
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    else:
        with tarfile.open(fileobj=data, mode="w" if end == ".tar" else "w:gz") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_a_model_folder_of_the_hub_loads(hub, tmp_path):
    model = randomise(Prismer(small(experts=())))
    model.save_pretrained(tmp_path / "m", answers=["yes", "no"])
    hub.add_folder("someone/prismer", tmp_path / "m")
    hub.repositories["someone/prismer"]["optimizer.bin"] = b"unwanted" * 1000
    loaded = Prismer.from_pretrained("someone/prismer")
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (loaded.folder / "answers.json").is_file() and (loaded.folder / "README.md").is_file()
    assert not any("optimizer" in request for request in hub.requests)


def test_nothing_is_downloaded_twice_and_the_cache_works_without_a_connection(hub, plain, monkeypatch):
    compare(Prismer.from_pretrained(SOURCE), plain)
    assert len(hub.taken("pytorch_model.bin")) == 1
    compare(Prismer.from_pretrained(SOURCE), plain)
    assert len(hub.taken("pytorch_model.bin")) == 1
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    compare(Prismer.from_pretrained(SOURCE), plain)
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.refuse = (503, "")
    compare(Prismer.from_pretrained(SOURCE), plain)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    compare(Prismer.from_pretrained(SOURCE), plain)


def test_a_new_version_is_taken(hub, plain, tmp_path):
    compare(Prismer.from_pretrained(SOURCE), plain)
    plain = write(tmp_path / "published" / "pytorch_model.bin", small(experts=()), seed=5)
    hub.add_folder("someone/prismer", tmp_path / "published", f"{NAME}/")
    compare(Prismer.from_pretrained(SOURCE), plain)


def test_a_model_folder_in_a_repository_loads(hub, tmp_path):
    model = randomise(Prismer(small(experts=("seg",))))
    model.save_pretrained(tmp_path / "m")
    hub.add_folder("someone/models", tmp_path / "m", "deep/inside/")
    loaded = Prismer.from_pretrained("someone/models/deep/inside")
    assert loaded.config == model.config
    refusal("someone/models", "holds no model.safetensors; it holds models in deep/inside; name the folder")


@pytest.mark.parametrize(
    "end, inside", [(".zip", ""), (".tar", f"{NAME}/"), (".tar.gz", f"some/where/{NAME}/"), (".tgz", "./")]
)
def test_an_archive_is_unpacked_once(hub, tmp_path, end, inside, monkeypatch):
    plain = write(tmp_path / "a.bin", small(experts=()))
    files = {f"{inside}pytorch_model.bin": (tmp_path / "a.bin").read_bytes(), f"{inside}notes.exe": b"no"}
    hub.repositories["someone/prismer"] = {NAME + end: packed(end, files)}
    model = Prismer.from_pretrained(SOURCE)
    compare(model, plain)
    assert [path.name for path in model.folder.iterdir()] == ["pytorch_model.bin"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(archives, "_opened", lambda path: pytest.fail("it is unpacked already"))
    again = Prismer.from_pretrained(SOURCE)
    assert again.folder == model.folder == find_folder(SOURCE)


def test_an_archive_of_several_models_gives_the_one_that_is_named(hub, tmp_path):
    plain = write(tmp_path / "a.bin", small(experts=()))
    write(tmp_path / "b.bin", small(experts=()), seed=9)
    right, wrong = ((tmp_path / name).read_bytes() for name in ("a.bin", "b.bin"))
    files = {"other/pytorch_model.bin": wrong, f"{NAME}/pytorch_model.bin": right}
    hub.repositories["someone/prismer"] = {f"{NAME}.zip": packed(".zip", files)}
    compare(Prismer.from_pretrained(SOURCE), plain)
    files = {"a/pytorch_model.bin": wrong, "b/pytorch_model.bin": right}
    hub.repositories["someone/prismer"] = {f"{NAME}.zip": packed(".zip", files)}
    refusal(SOURCE, f"holds no single model {NAME}")


def test_a_folder_comes_before_an_archive_of_its_name(hub, plain, tmp_path):
    write(tmp_path / "b.bin", small(experts=()), seed=9)
    archive = packed(".zip", {"pytorch_model.bin": (tmp_path / "b.bin").read_bytes()})
    hub.repositories["someone/prismer"][f"{NAME}.zip"] = archive
    compare(Prismer.from_pretrained(SOURCE), plain)
    assert hub.taken(f"{NAME}.zip") == []
    # somebody else downloaded all of the repository
    snapshot_download("someone/prismer")
    compare(Prismer.from_pretrained(SOURCE), plain)


def test_a_broken_connection_is_resumed_at_once(hub, plain):
    hub.breaks = 2
    compare(Prismer.from_pretrained(SOURCE), plain)
    starts = [int(request.rpartition("=")[2].strip("-")) for request in hub.taken("pytorch_model.bin")[1:]]
    assert 100_000 < starts[0] < starts[1] and len(starts) == 2


def test_the_next_command_goes_on_where_a_download_broke_off(hub, plain):
    data = hub.repositories["someone/prismer"][f"{NAME}/pytorch_model.bin"]
    hub.breaks = 10**6
    text = refusal(SOURCE, "broke off at ")
    had = int(text.split(" broke off at ")[1].split(" ")[0].replace(",", ""))
    assert len(data) // 2 < had < len(data)
    hub.breaks = 0
    hub.requests.clear()
    compare(Prismer.from_pretrained(SOURCE), plain)
    assert [request.rpartition("=")[2] for request in hub.taken("pytorch_model.bin")] == [f"{had}-"]


def test_a_damaged_download_never_enters_the_cache(hub, plain, tmp_path):
    hub.corrupt = True
    refusal(SOURCE, "pytorch_model.bin arrived damaged: its SHA-256 is ")
    blobs = tmp_path / "cache" / "hub" / "models--someone--prismer" / "blobs"
    assert not [path for path in blobs.iterdir() if path.suffix != ".lock"]
    # nor does a partial file that is longer than the whole
    data = hub.repositories["someone/prismer"][f"{NAME}/pytorch_model.bin"]
    (blobs / f"{hashlib.sha256(data).hexdigest()}.partial").write_bytes(data + b"more")
    hub.corrupt = False
    compare(Prismer.from_pretrained(SOURCE), plain)


def test_a_full_disk_is_named_and_the_download_goes_on_later(hub, plain):
    size = len(hub.repositories["someone/prismer"][f"{NAME}/pytorch_model.bin"])
    with full_after(size // 2), pytest.raises(OSError) as caught:
        Prismer.from_pretrained(SOURCE)
    assert hub_module.is_disk_failure(caught.value) and "models--someone--prismer" in caught.value.filename
    hub.requests.clear()
    compare(Prismer.from_pretrained(SOURCE), plain)
    assert f"bytes={size // 2}-" in hub.taken("pytorch_model.bin")[0]


def test_a_disk_without_room_is_named_before_the_download(hub, plain, monkeypatch):
    monkeypatch.setattr("prismer.files.shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(OSError, match="No space left"):
        Prismer.from_pretrained(SOURCE)
    assert hub.taken("pytorch_model.bin") == []


def test_what_the_hub_refuses_is_one_sentence(hub, plain, monkeypatch):
    refusal(
        "someone/nothing", "the hub has no someone/nothing that you may read; check the name, or run `hf auth login`"
    )
    refusal(
        "someone/prismer/nothing", f"holds no nothing/model.safetensors; it holds models in {NAME}; name the folder"
    )
    hub.refuse_files = (403, "GatedRepo")
    refusal(SOURCE, "its owner lets in only who accepts the terms; do so at http://127.0.0.1")
    hub.refuse_files = (401, "")
    refusal(SOURCE, "run `hf auth login`")
    hub.refuse_files = None
    hub.refuse = (500, "")
    refusal(SOURCE, "the hub answers with an error (500)")
    hub.refuse = None
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refusal(
            SOURCE, f"there is no folder {SOURCE} on this machine, and HF_HUB_OFFLINE forbids to download it; unset it"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        refusal(
            "no/body", "there is no folder no/body on this machine, and the hub at http://127.0.0.1:9 cannot be reached"
        )
    refusal("a--b/c", "a--b/c")


def test_the_hub_is_not_asked_for_anything_that_looks_like_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for source in ("runs/tiny", "runs/tyni", "./no/body", "/no/body", "nobody", "a b/c", tmp_path / "none"):
        with pytest.raises(ValueError, match="has no config.json|no model folder"):
            Prismer.from_pretrained(source)
    assert hub.requests == []


def linked(path):
    info = zipfile.ZipInfo(path)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "files, words",
    [
        ({"../pytorch_model.bin": b"x"}, "'../pytorch_model.bin', a path outside it; do not trust it"),
        ({"a/../../pytorch_model.bin": b"x"}, "a path outside it"),
        ({"/tmp/pytorch_model.bin": b"x"}, "a path outside it"),
        ({"pytorch_model.bin": b"x", "../../answers.json": b"[]"}, "a path outside it"),
        ({linked("pytorch_model.bin"): b"/etc/passwd"}, "as a link or a device"),
        ({"readme.txt": b"x"}, f"holds no single model {NAME} (readme.txt)"),
        ({}, f"holds no single model {NAME} (nothing)"),
    ],
)
def test_an_unsafe_archive_writes_nothing(hub, tmp_path, files, words):
    hub.repositories["someone/prismer"] = {f"{NAME}.zip": packed(".zip", files)}
    refusal(SOURCE, words)
    held = [path for path in (tmp_path / "cache" / "prismer").rglob("*") if path.is_file()]
    assert [path.name for path in held] == [f".{NAME}.lock"]


@pytest.mark.parametrize("end", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("harm", ["cut", "wrong byte"])
def test_a_damaged_archive_is_refused(hub, tmp_path, end, harm):
    """A plain tar has no checksums: a wrong byte in it is found by the reader of the weights."""
    write(tmp_path / "a.bin", small(experts=()))
    data = packed(end, {f"{NAME}/pytorch_model.bin": (tmp_path / "a.bin").read_bytes()})
    middle = len(data) // 2
    data = data[:middle] if harm == "cut" else data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    hub.repositories["someone/prismer"] = {NAME + end: data}
    refusal(SOURCE, "damaged" if end != ".tar" or harm == "cut" else "pytorch_model.bin")
    if end != ".tar":
        assert find_folder(SOURCE) is None


def test_an_interrupted_unpacking_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    model = randomise(Prismer(small(experts=())))
    model.save_pretrained(tmp_path / "m", answers=["yes", "no"])
    files = {f"{NAME}/{path.name}": path.read_bytes() for path in sorted((tmp_path / "m").iterdir())}
    hub.repositories["someone/prismer"] = {f"{NAME}.zip": packed(".zip", files)}
    written, write_member = [], archives._write

    def interrupted(member, path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_member(member, path)

    monkeypatch.setattr(archives, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Prismer.from_pretrained(SOURCE)
    assert find_folder(SOURCE) is None
    first, written[:] = set(written), []
    monkeypatch.setattr(
        archives, "_write", lambda member, path: (written.append(path.name), write_member(member, path))
    )
    loaded = Prismer.from_pretrained(SOURCE)
    assert first.isdisjoint(written) and first | set(written) == {path.name for path in (tmp_path / "m").iterdir()}
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_released_checkpoints_have_names(hub, tmp_path, monkeypatch):
    entry = PublishedModel(name=NAME, task="", preset="small-z", image_size=80, parameters=0, gigabytes=0.0)
    monkeypatch.setitem(PUBLISHED_MODELS, NAME, entry)
    plain = write(tmp_path / "p" / "pytorch_model.bin", small(experts=()))
    hub.add_folder(HUB_REPOSITORY, tmp_path / "p", f"{NAME}/")
    assert find_folder(NAME) is None and licence_of(NAME) == "cc-by-nc-sa-4.0"
    model = Prismer.from_pretrained(NAME)
    compare(model, plain)
    assert find_folder(NAME) == model.folder and initial_config(NAME) == model.config
    model.save_pretrained(tmp_path / "mine")
    assert licence_of(tmp_path / "mine") == "cc-by-nc-sa-4.0"


def test_the_list_of_released_checkpoints_is_right():
    """Twelve names; the parameters are counted on a model without memory."""
    assert len(PUBLISHED_MODELS) == 12 and "caption_prismerz_large" in PUBLISHED_MODELS
    for name, entry in PUBLISHED_MODELS.items():
        assert name.endswith(entry.preset.removesuffix("-z")) and ("prismerz" in name) == entry.preset.endswith("-z")
        # both sides; the sizes of the presets are counted elsewhere
        if name in ("pretrain_prismer_base", "vqa_prismerz_large"):
            with torch.device("meta"):
                model = Prismer(preset(entry.preset, image_size=entry.image_size))
            assert sum(p.numel() for p in model.parameters()) == entry.parameters, name
