"""Semantics tables made here: texts through a CLIP text tower, then PCA, to 64 numbers each.

feature(text) = (embedding(prompt with text) - mean) @ components^T, unscaled, where the embedding is the tower's raw
projection, not normalised (Prismer, arXiv:2303.02506). A folder made by `build` holds the table that
`features.Semantics.from_table` reads, `pca.safetensors` (mean (W,), components (64, W)) and `semantics-recipe.json`,
which say how to add words later.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prismer.dataloading.feed.features import normalise, read_table, write_table
from prismer.dataloading.semantics.clip_text import TextTower
from prismer.dataloading.semantics.texts import vocabulary_words
from prismer.experts import FEATURE_WIDTH
from prismer.files import replace_folder, write_atomically
from prismer.reading import is_text, printable, read_json
from prismer.tensor_files import save_tensors

PCA_FILE = "pca.safetensors"
RECIPE_FILE = "semantics-recipe.json"


@dataclass(frozen=True)
class Pca:
    """A projection of text embeddings.

    Attributes:
        mean: (W,) fp32.
        components: (64, W) fp32, orthonormal rows, by falling variance.
    """

    mean: Tensor
    components: Tensor

    def __call__(self, embeddings: Tensor) -> np.ndarray:
        """(n, W) -> (n, 64) fp32; the products are summed in fp64."""
        centred = embeddings.double() - self.mean.double()
        return (centred @ self.components.double().T).float().numpy()


def fit_pca(embeddings: Tensor) -> tuple[Pca, float]:
    """Exact PCA to 64 components; of the two signs of each, the one whose largest entry is positive.

    Args:
        embeddings: (n, W) fp32.

    Returns:
        The projection, and the fraction of the variance that it keeps.

    Raises:
        ValueError: if n or W is too small for 64 components.
    """
    n, width = embeddings.shape
    if n <= FEATURE_WIDTH or width < FEATURE_WIDTH:
        raise ValueError(
            f"{n} texts of width {width} do not have {FEATURE_WIDTH} principal components; fit on more than "
            f"{FEATURE_WIDTH} texts (the vocabulary is enough), with a tower at least that wide"
        )
    mean = embeddings.double().mean(0)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    # in parts: a copy in fp64 of a million embeddings would not fit everywhere
    for part in embeddings.split(8192):
        centred = part.double() - mean
        covariance += centred.T @ centred
    variances, vectors = torch.linalg.eigh(covariance)
    components = vectors.T[-FEATURE_WIDTH:].flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    kept = (variances[-FEATURE_WIDTH:].sum() / variances.sum()).item()
    return Pca(mean.float(), (components * largest.sign()).float().contiguous()), kept


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
        texts: normalised; read once `out`, `pca` and the tower have turned out fit.
        sources: where they come from, for the recipe.
        prompt: wording with one {} for the text; default "{}", or what the folder `pca` used.
        background: the text, put into the prompt too, whose features mean "nothing here"; default "background", or
            what the folder `pca` used.
        pca: a semantics folder whose projection is used; None fits one on `texts`.
        vocabulary: also fit on `vocabulary_words`, embedded as the texts are.
        device: where the tower runs.
        progress: show bars.

    Returns:
        The recipe.

    Raises:
        ValueError: if `out` is taken, `texts` is empty or too small, or the tower or `pca` cannot be used.
    """
    out = Path(out)
    check_absent(out)
    given, earlier = (None, {}) if pca is None else _read_pca(Path(pca))
    prompt = earlier.get("prompt", "{}") if prompt is None else prompt
    background = earlier.get("background", "background") if background is None else background
    for what, text in (("prompt", prompt), ("background", background)):
        if not is_text(text):
            raise ValueError(f"the {what} {ascii(text)} is not Unicode; give it in UTF-8")
    if prompt.count("{}") != 1:
        raise ValueError(f"the prompt {prompt!r} must hold {{}} once, where the text goes")
    tower = TextTower(clip, device)
    if given and given.mean.numel() != tower.width:
        raise ValueError(
            f"the PCA in {pca} is of width {given.mean.numel()}, the tower {clip} of {tower.width}; "
            f"use the tower that it was fitted with"
        )
    if earlier:
        _check_tower(tower, Path(pca), given, earlier)
    elif given:
        warnings.warn(f"{pca} has no {RECIPE_FILE}: nothing tells whether its PCA belongs to this tower", stacklevel=2)

    # only now: finding them may mean to read millions of samples
    texts = sorted(set(texts))
    if not texts:
        raise ValueError("there are no texts to embed; name datasets or files that hold some")
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
    """Add texts to a folder that `build` made, with its PCA, prompt and tower; the rows there stay as they are.

    Args:
        folder: replaced by its extended copy in one step; other files in it stay.
        texts: normalised.
        clip: where the tower is, if not where the recipe says; see `TextTower`.
        sources, device, progress: as for `build`.

    Returns:
        How many texts were new.

    Raises:
        ValueError: if the folder was not made by `build`, or the tower is another one.
    """
    folder = Path(folder)
    names, features, background = read_table(folder)
    pca, recipe = _read_pca(folder)
    if not recipe:
        raise ValueError(
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
    """See to it that nothing is overwritten.

    Raises:
        ValueError: if `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another folder, or extend a table with `prismer semantics add {out}`")


def write_folder(
    out: Path, names: list[str], features: np.ndarray, background: np.ndarray, pca: Pca | None, recipe: dict
) -> None:
    """Write a semantics folder aside, with the other files that `out` holds, and put it in the place of `out`."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        if out.exists():
            shutil.copytree(out, aside, symlinks=True, dirs_exist_ok=True)
        write_table(aside, names, features, background)
        # a source may be a folder whose name is not UTF-8
        text = printable(json.dumps(recipe, indent=1, ensure_ascii=False))
        write_atomically(aside / RECIPE_FILE, text.encode())
        if pca is not None:
            save_tensors({"mean": pca.mean, "components": pca.components}, aside / PCA_FILE)
        # a temporary folder is for its owner alone
        os.chmod(aside, 0o755)
        replace_folder(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_pickle(path: str | Path) -> None:
    """Say that the official PCA is not read.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{path} is a pickle, which can run any code when it is opened, and is never read; leave it out: imported "
        f"tables work without it, and features of other words come from `prismer semantics build`"
    )


def _read_pca(folder: Path) -> tuple[Pca, dict]:
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
            raise ValueError(f"{PCA_FILE} has {shapes}, expected mean (W,), components (64, W)")
        missing = {"tower", "weights_sha256", "prompt", "background", "sources"} - recipe.keys()
        if recipe and missing:
            raise ValueError(f"{RECIPE_FILE} lacks {', '.join(sorted(missing))}")
        texts = ("tower", "weights_sha256", "prompt", "background") if recipe else ()
        if not all(isinstance(recipe[name], str) and is_text(recipe[name]) for name in texts):
            raise ValueError(f"{RECIPE_FILE} has values that are no texts")
        if recipe and not isinstance(recipe["sources"], list):
            raise ValueError(f"{RECIPE_FILE} has 'sources' that are no list")
    except FileNotFoundError:
        raise ValueError(
            f"no PCA is known for {folder} (it has no {PCA_FILE} of ours), so no text can be projected; "
            f"make a table with `prismer semantics build`"
        ) from None
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"the semantics folder {folder} is damaged: {error}") from None
    return Pca(tensors["mean"].float(), tensors["components"].float()), recipe


def _check_tower(tower: TextTower, folder: Path, pca: Pca, recipe: dict) -> None:
    """See to it that `tower` is the one that the table in `folder` was made with."""
    if tower.sha256 != recipe["weights_sha256"]:
        raise ValueError(
            f"the tower {tower.name} has weights {tower.sha256[:12]}..., the table in {folder} was made with "
            f"{recipe['weights_sha256'][:12]}... ({recipe['tower']}); use that tower, or build a new table"
        )
    # equal weights are not yet an equal tower: the activation function is not among them
    embedding = tower.embed([recipe["prompt"].replace("{}", recipe["background"])])
    error = float(np.linalg.norm(pca(embedding)[0] - read_table(folder)[2]))
    if error > 1e-3 * embedding.norm():
        raise ValueError(
            f"{tower.name} does not give the background of {folder} its features again (distance {error:.3g}); "
            f"use the architecture that the table was made with, such as one with -quickgelu"
        )
