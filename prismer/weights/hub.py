"""Models of the Hugging Face hub: found in its cache, or downloaded into it, and unpacked if they are archives.

`huggingface_hub` keeps the cache. It drops what an interrupted download has received, so large files are downloaded
here: they resume, and the SHA-256 that the hub states is compared before a file enters the cache.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from prismer.errors import InputError, listed
from prismer.files import add_name, check_free_space, is_disk_failure, sync, waiting_lock
from prismer.shipped import cache_folder
from prismer.weights.archives import ARCHIVES, unpack

if TYPE_CHECKING:
    from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling


class _NoBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


@dataclass(frozen=True)
class HubModel:
    """A model on the hub.

    Attributes:
        repository: owner/name.
        inside: the folder in the repository, "" for its root.
        files: names of the files that are fetched if they are there.
        weights: those names of which one must be there.
    """

    repository: str
    inside: str
    files: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of the model's address."""
        return f"{self.repository}/{self.inside}".rstrip("/").rpartition("/")[2]

    @property
    def loose(self) -> list[str]:
        """The paths of its files in the repository, whether they are there or not."""
        return [f"{self.inside}/{file}" if self.inside else file for file in self.files]

    @property
    def packed(self) -> list[str]:
        """The paths of the archives that may hold it."""
        return [self.inside + end for end in ARCHIVES] if self.inside else []

    def has_weights(self, folder: Path) -> bool:
        """Whether `folder` holds a file of its weights."""
        return any((folder / file).is_file() for file in self.weights)


def download(model: HubModel) -> Path:
    """The folder of a model on this machine; what is not here yet is fetched.

    Without a connection, or with HF_HUB_OFFLINE, the copy in the hub's cache is taken.

    Raises:
        ValueError: if it is not here and cannot be fetched; the sentence says why.
        OSError: if the disk is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        paths = _fetch_large_files(model)
        # the large files have shown their progress
        root = Path(snapshot_download(model.repository, allow_patterns=paths, tqdm_class=_NoBar))
    # the base classes are the errors of the transport, httpx or requests, when a connection fails
    except (OSError, HFValidationError, *HfHubHTTPError.__bases__) as error:
        if is_disk_failure(error):
            raise
        if (root := _cached(model)) is None:
            raise InputError(_why(error, model)) from None
    folder, archive = _place(model, root)
    if archive is not None:
        unpack(archive, folder, model.name, model.files, model.weights)
    return folder


def find(model: HubModel) -> Path | None:
    """The folder of a model if all of it is on this machine and unpacked; the hub is not asked."""
    root = _cached(model)
    folder = None if root is None else _place(model, root)[0]
    return folder if folder is not None and model.has_weights(folder) else None


def _cached(model: HubModel) -> Path | None:
    """The snapshot in the hub's cache that holds a model, whole or as an archive."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    for paths in (model.loose, model.packed):
        try:
            # it compares the files with the list of the repository that the last download left
            root = Path(snapshot_download(model.repository, allow_patterns=paths, local_files_only=True))
        except (OSError, HFValidationError):
            continue
        folder, archive = _place(model, root)
        if archive is not None or model.has_weights(folder):
            return root
    return None


def _place(model: HubModel, root: Path) -> tuple[Path, Path | None]:
    """The folder of a model, given the snapshot that holds it; and the archive to unpack into it, if it is packed."""
    folder = root / model.inside
    archive = next((root / path for path in model.packed if (root / path).is_file()), None)
    if archive is None or model.has_weights(folder):
        return folder, None
    # a snapshot is named after its commit, so that an archive of another version gets a folder of its own
    return cache_folder("models") / model.repository.replace("/", "--") / root.name / model.inside, archive


def _fetch_large_files(model: HubModel) -> list[str]:
    """Put the model's large files into the hub's cache, where `snapshot_download` finds them; returns all its paths."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import hf_hub_url, repo_folder_name

    info = HfApi().model_info(model.repository, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    held = {file.rfilename: file for file in info.siblings or ()}
    paths = [path for path in model.loose if path in held]
    if not any(path.endswith(model.weights) for path in paths):
        paths = [path for path in model.packed if path in held][:1]
    if not paths:
        raise InputError(_not_there(model, set(held)))
    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model.repository, repo_type="model")
    for path in paths:
        if held[path].lfs is not None:
            url = hf_hub_url(model.repository, path, revision=info.sha)
            _fetch_blob(url, storage, held[path], held[path].lfs)
    return paths


def _fetch_blob(url: str, storage: Path, file: "RepoSibling", lfs: "BlobLfsInfo") -> None:
    """Download a large file under the name that the hub's cache gives it, its SHA-256."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob = storage / "blobs" / lfs.sha256
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial, name = blob.with_name(f"{blob.name}.partial"), Path(file.rfilename).name
    with waiting_lock(blob.with_name(f"{blob.name}.lock")):
        if blob.exists():
            return
        with open(partial, "ab") as out:
            if out.tell() > lfs.size:
                out.seek(0)
                out.truncate()
            check_free_space(blob.parent, lfs.size - out.tell())
            try:
                http_get(
                    url,
                    out,
                    resume_size=out.tell(),
                    headers=build_hf_headers(),
                    expected_size=lfs.size,
                    displayed_filename=name,
                )
            except HfHubHTTPError:
                raise
            except (OSError, *HfHubHTTPError.__bases__) as error:
                if is_disk_failure(error):
                    add_name(error, partial)
                    raise
                out.flush()
                raise InputError(
                    f"the download of {name} broke off at {_size(out.tell())} of {_size(lfs.size)}; give the command "
                    f"again, and it goes on from there"
                ) from None
        got = _sha256(partial)
        if got != lfs.sha256:
            partial.unlink()
            raise InputError(
                f"{name} arrived damaged: its SHA-256 is {got[:16]}..., the hub states {lfs.sha256[:16]}...; give the "
                f"command again"
            )
        sync(partial)
        os.replace(partial, blob)
    sync(blob.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count:,} bytes"


def _not_there(model: HubModel, held: set[str]) -> str:
    """The sentence for a repository without the model: what it holds instead."""
    folders = {path.rpartition("/")[0] for path in held if path.rpartition("/")[2] in model.weights}
    inside = f"; it holds models in {listed(folders)}" if folders - {""} else ""
    wanted = f"{model.inside}/{model.weights[0]}" if model.inside else model.weights[0]
    return (
        f"{model.repository} on the hub holds no {wanted}{inside}; name the folder of a model in it, as "
        f"owner/name/folder"
    )


def _why(error: Exception, model: HubModel) -> str:
    """The sentence for a model that is not here and cannot be fetched."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    repository = model.repository
    if isinstance(error, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE forbids to download it; unset it, or name a folder"
    elif isinstance(error, GatedRepoError):
        why = (
            f"its owner lets in only who accepts the terms; do so at {constants.ENDPOINT}/{repository}, then run "
            f"`hf auth login`"
        )
    elif isinstance(error, RepositoryNotFoundError):
        why = f"the hub has no {repository} that you may read; check the name, or run `hf auth login` if it is private"
    elif isinstance(error, HfHubHTTPError) and status in (401, 403):
        why = f"the hub refuses {repository} ({status}); run `hf auth login` with an account that may read it"
    elif isinstance(error, HfHubHTTPError):
        why = f"the hub answers with an error ({status}); try again later, or name a folder"
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        why = f"the hub at {constants.ENDPOINT} cannot be reached ({reason}); check the connection, or name a folder"
    where = f"{repository}/{model.inside}".rstrip("/")
    return f"there is no folder {where} on this machine, and {why}"
