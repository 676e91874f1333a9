"""Make semantics tables: texts through a CLIP text tower, then PCA, to 64 numbers each.

feature(text) = (embedding(prompt with text) - mean) @ components^T, unscaled, where the embedding is the tower's raw
projection, not normalised (Prismer, arXiv:2303.02506, section 3.2). A folder made by `build` holds the table for
`Semantics.from_table`, and `pca.safetensors` (mean (W,), components (64, W)) and `semantics-recipe.json`, with which
`add` extends it.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prismer.dataloading.semantics.clip_tower import TextTower
from prismer.dataloading.semantics.features import normalise, read_table, write_table
from prismer.dataloading.semantics.table_texts import vocabulary_words
from prismer.errors import InputError
from prismer.experts import FEATURE_WIDTH
from prismer.files import new_folder, write_atomically
from prismer.reading import is_text, printable, read_json
from prismer.tensor_files import save_tensors

PCA_FILE = "pca.safetensors"
RECIPE_FILE = "semantics-recipe.json"


@dataclass(frozen=True)
class PcaProjection:
    """A PCA projection of text embeddings.

    Attributes:
        mean: (W,) fp32.
        components: (64, W) fp32, orthonormal rows in order of falling variance.
    """

    mean: Tensor
    components: Tensor

    def __call__(self, embeddings: Tensor) -> np.ndarray:
        """(n, W) -> (n, 64) fp32; the products are summed in fp64."""
        centred = embeddings.double() - self.mean.double()
        return (centred @ self.components.double().T).float().numpy()


def fit_pca(embeddings: Tensor) -> tuple[PcaProjection, float]:
    """Exact PCA to 64 components; the sign of each makes its largest entry positive.

    Args:
        embeddings: (n, W) fp32.

    Returns:
        The projection, and the fraction of the variance that it keeps.

    Raises:
        ValueError: if n or W is too small for 64 components.
    """
    n, width = embeddings.shape
    if n <= FEATURE_WIDTH or width < FEATURE_WIDTH:
        raise InputError(
            f"{n} texts of width {width} do not have {FEATURE_WIDTH} principal components; fit on more than "
            f"{FEATURE_WIDTH} texts (the vocabulary is enough), with a tower at least that wide"
        )
    mean = embeddings.double().mean(0)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    # in parts: an fp64 copy of a million embeddings would not fit into every memory
    for part in embeddings.split(8192):
        centred = part.double() - mean
        covariance += centred.T @ centred
    variances, vectors = torch.linalg.eigh(covariance)
    components = vectors.T[-FEATURE_WIDTH:].flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    kept = (variances[-FEATURE_WIDTH:].sum() / variances.sum()).item()
    return PcaProjection(mean.float(), (components * largest.sign()).float().contiguous()), kept


def build(
    out: str | Path,
    clip: str,
    texts: Iterable[str],
    *,
    sources: Sequence[str] = (),
    prompt: str | None = None,
    background: str | None = None,
    pca: str | Path | None = None,
    vocabulary: bool = True,
    device: str = "cpu",
    progress: bool = False,
) -> dict:
    """Make a semantics folder, which appears whole or not at all.

    Args:
        out: the folder; absent or empty.
        clip: see `TextTower`.
        texts: normalised; read only after `out`, `pca` and the tower are checked.
        sources: of the texts, for the recipe.
        prompt: wording with one {} for the text; default "{}", or that of the folder `pca`.
        background: the text, put into the prompt too, whose features mean "nothing here"; default "background", or
            that of the folder `pca`.
        pca: a semantics folder whose projection is used; None fits one on `texts`.
        vocabulary: also fit on `vocabulary_words`, embedded like the texts.
        device: where the tower runs.
        progress: show bars.

    Returns:
        The recipe.

    Raises:
        ValueError: if `out` is taken, `texts` is empty or too small, or the tower or `pca` cannot be used.
    """
    out = Path(out)
    check_absent(out)
    given, earlier = (None, {}) if pca is None else _read_projection(Path(pca))
    prompt = earlier.get("prompt", "{}") if prompt is None else prompt
    background = earlier.get("background", "background") if background is None else background
    for what, text in (("prompt", prompt), ("background", background)):
        if not is_text(text):
            raise InputError(f"the {what} {ascii(text)} is not Unicode; give it in UTF-8")
    if prompt.count("{}") != 1:
        raise InputError(f"the prompt {prompt!r} must hold {{}} once, where the text goes")
    tower = TextTower(clip, device)
    if given and given.mean.numel() != tower.width:
        raise InputError(
            f"the PCA in {pca} is of width {given.mean.numel()}, the tower {clip} of {tower.width}; "
            f"use the tower that it was fitted with"
        )
    if earlier:
        _check_tower(tower, Path(pca), given, earlier)
    elif given:
        warnings.warn(f"{pca} has no {RECIPE_FILE}, so nothing shows that its PCA fits this tower", stacklevel=2)

    # only now: this may read millions of samples
    texts = sorted(set(texts))
    if not texts:
        raise InputError("there are no texts to embed; name datasets or files that hold some")
    corpus = vocabulary_words() if vocabulary and given is None else []
    more = sorted(set(corpus) - set(texts))
    wordings = [prompt.replace("{}", text) for text in [background, *texts, *more]]
    embeddings = tower.embed(wordings, progress)
    if given is None:
        given, kept = fit_pca(embeddings[1:])
        fit = {
            "texts": len(texts) + len(more),
            "corpus": "the table's texts" + (" and the whole words of RoBERTa" if corpus else ""),
            "explained_variance": kept,
        }
    else:
        fit = earlier.get("pca", {}) | {"taken_from": str(pca)}
    rows = given(embeddings[: 1 + len(texts)])
    recipe = {
        "format": "prismer-semantics",
        "tower": tower.name,
        "weights_sha256": tower.sha256,
        "weights_sha256_is_of": "the text tower's tensors in fp32, by name",
        "open_clip": tower.library,
        "embedding": "raw fp32 projection, not normalised",
        "feature": "(embedding - mean) @ components^T",
        "prompt": prompt,
        "background": background,
        "texts": len(texts),
        "sources": list(sources),
        "pca": {"width": tower.width, "components": FEATURE_WIDTH, **fit},
    }
    write_folder(out, texts, rows[1:], rows[0], given, recipe)
    return recipe


def add(
    folder: str | Path,
    texts: Iterable[str],
    *,
    clip: str | None = None,
    sources: Sequence[str] = (),
    device: str = "cpu",
    progress: bool = False,
) -> int:
    """Add texts to a folder that `build` made, with its PCA, prompt and tower; existing rows do not change.

    Args:
        folder: replaced by its extended copy in one step; other files in it stay.
        texts: normalised.
        clip: the tower, if it is not where the recipe says; see `TextTower`.
        sources, device, progress: as for `build`.

    Returns:
        The number of new texts.

    Raises:
        ValueError: if the folder was not made by `build`, or the tower differs from that of the recipe.
    """
    folder = Path(folder)
    names, features, background = read_table(folder)
    pca, recipe = _read_projection(folder)
    if not recipe:
        raise InputError(
            f"{folder} has no {RECIPE_FILE}, which names the tower; make a table with `prismer semantics build`"
        )
    new = sorted(set(texts) - set(map(normalise, names)))
    if not new:
        return 0
    tower = TextTower(clip or recipe["tower"], device)
    _check_tower(tower, folder, pca, recipe)
    rows = pca(tower.embed([recipe["prompt"].replace("{}", text) for text in new], progress))
    recipe = recipe | {
        "tower": tower.name,
        "texts": len(names) + len(new),
        "sources": recipe["sources"] + [s for s in sources if s not in recipe["sources"]],
    }
    features = np.concatenate([features, rows])
    write_folder(folder, [*names, *new], features, background, pca, recipe)
    return len(new)


def check_absent(out: Path) -> None:
    """Refuse an output folder that is in use.

    Raises:
        ValueError: if `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists; choose another folder, or extend a table with `prismer semantics add {out}`")


def write_folder(
    out: Path, names: list[str], features: np.ndarray, background: np.ndarray, pca: PcaProjection | None, recipe: dict
) -> None:
    """Write a semantics folder beside `out`, with the other files of `out`, and replace `out` by it."""
    out = out.resolve()
    with new_folder(out) as aside:
        if out.exists():
            shutil.copytree(out, aside, symlinks=True, dirs_exist_ok=True)
        write_table(aside, names, features, background)
        # a source may be a folder whose name is not UTF-8
        text = printable(json.dumps(recipe, indent=1, ensure_ascii=False))
        write_atomically(aside / RECIPE_FILE, text.encode())
        if pca is not None:
            save_tensors({"mean": pca.mean, "components": pca.components}, aside / PCA_FILE)


def refuse_pickle(path: str | Path) -> NoReturn:
    """Refuse the published PCA.

    Raises:
        ValueError: always.
    """
    raise InputError(
        f"{path} is a pickle, which can run any code when it is opened, and is never read; leave it out: imported "
        f"tables work without it, and `prismer semantics build` makes features of other words"
    )


def _read_projection(folder: Path) -> tuple[PcaProjection, dict]:
    """The projection in `folder` and its recipe, {} if there is none."""
    if folder.suffix in (".pkl", ".pickle"):
        refuse_pickle(folder)
    recipe = {}
    try:
        if (folder / RECIPE_FILE).is_file():
            recipe = read_json(folder / RECIPE_FILE, dict)
        tensors = load_file(folder / PCA_FILE)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        width = shapes.get("mean", (0,))[0]
        if shapes != {"mean": (width,), "components": (FEATURE_WIDTH, width)}:
            raise InputError(f"{PCA_FILE} has {shapes}, expected mean (W,), components (64, W)")
        missing = {"tower", "weights_sha256", "prompt", "background", "sources"} - recipe.keys()
        if recipe and missing:
            raise InputError(f"{RECIPE_FILE} lacks {', '.join(sorted(missing))}")
        texts = ("tower", "weights_sha256", "prompt", "background") if recipe else ()
        if not all(isinstance(recipe[name], str) and is_text(recipe[name]) for name in texts):
            raise InputError(f"{RECIPE_FILE} has values that are not texts")
        if recipe and not isinstance(recipe["sources"], list):
            raise InputError(f"{RECIPE_FILE} has 'sources' that are not a list")
    except FileNotFoundError:
        raise InputError(
            f"no PCA is known for {folder} (it has no {PCA_FILE}), so no text can be projected; "
            f"make a table with `prismer semantics build`"
        ) from None
    except (SafetensorError, ValueError, AttributeError) as error:
        raise InputError(f"the semantics folder {folder} is damaged: {error}") from None
    return PcaProjection(tensors["mean"].float(), tensors["components"].float()), recipe


def _check_tower(tower: TextTower, folder: Path, pca: PcaProjection, recipe: dict) -> None:
    """Refuse a tower other than the one that the table in `folder` was made with."""
    if tower.sha256 != recipe["weights_sha256"]:
        raise InputError(
            f"the tower {tower.name} has weights {tower.sha256[:12]}..., the table in {folder} was made with "
            f"{recipe['weights_sha256'][:12]}... ({recipe['tower']}); use that tower, or build a new table"
        )
    # equal weights do not make an equal tower: the activation function is not one of them
    embedding = tower.embed([recipe["prompt"].replace("{}", recipe["background"])])
    error = float(np.linalg.norm(pca(embedding)[0] - read_table(folder)[2]))
    if error > 1e-3 * embedding.norm():
        raise InputError(
            f"{tower.name} does not reproduce the background features of {folder} (distance {error:.3g}); "
            f"use the architecture that the table was made with, such as one with -quickgelu"
        )
