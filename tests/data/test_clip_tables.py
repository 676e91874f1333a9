"""Proves that a table holds (embedding - mean) @ components^T of its texts, that the PCA equals numpy's SVD, and that
only the same tower adds words.

python -m pytest tests/data/test_clip_tables.py
"""

import json
import os
import warnings

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismer.dataloading.semantics import clip_tables
from prismer.dataloading.semantics.clip_tables import add, build, fit_pca
from prismer.dataloading.semantics.clip_tower import TextTower
from prismer.dataloading.semantics.features import Semantics
from tests.data.stand_in_clip import TEXTS, WIDTH, embed, project, save_tower, write_dataset

VOCABULARY = "apple river seventeen mountain zoo".split()


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(clip_tables, "vocabulary_words", lambda: VOCABULARY)


@pytest.fixture
def table(clip, tmp_path):
    build(tmp_path / "table", str(clip), TEXTS, prompt="some {}", vocabulary=False, sources=["first"])
    return tmp_path / "table"


def test_pca_equals_svd():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, WIDTH)) * np.geomspace(5, 0.01, WIDTH) @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[
        0
    ] + rng.normal(size=WIDTH)
    x = x.astype(np.float32)
    pca, kept = fit_pca(torch.from_numpy(x))
    mean = x.astype(np.float64).mean(0)
    _, singular, components = np.linalg.svd(x - mean, full_matrices=False)
    np.testing.assert_allclose(pca.mean, mean, atol=1e-6)
    assert kept == pytest.approx((singular[:64] ** 2).sum() / (singular**2).sum(), abs=1e-9)
    got = pca.components.numpy()
    assert got.shape == (64, WIDTH)
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1))
    np.testing.assert_allclose(got, (components * signs)[:64], atol=2e-5)
    np.testing.assert_allclose(pca(torch.from_numpy(x)), (x - mean) @ got.T, atol=1e-4)


def test_pca_needs_enough_texts():
    with pytest.raises(ValueError, match="64 texts of width 80"):
        fit_pca(torch.randn(64, 80))
    with pytest.raises(ValueError, match="of width 63"):
        fit_pca(torch.randn(200, 63))


def test_build(run_semantics, clip, tmp_path, small_vocabulary):
    """From datasets and a file to features, each recomputed from open_clip's own embeddings."""
    data = tmp_path / "data"
    write_dataset(
        data / "train",
        {"seg": ["Sky", "traffic  Light"], "obj_detection": ["sphere"], "class": ["not an expert's"]},
        [{"0": "STOP", "7": "taxi"}, None, {"0": "stop"}],
    )
    write_dataset(data / "val", {"seg": ["sky"]}, [{"0": "exit"}])
    (tmp_path / "more.txt").write_text("\n".join(["größe", "", " Zoo ", *TEXTS]), "utf-8")
    out = tmp_path / "made" / "table"
    said = run_semantics(
        "build",
        "--clip",
        clip,
        "--out",
        out,
        "--data",
        data,
        "--texts",
        tmp_path / "more.txt",
        "--prompt",
        "a {}",
        "--background",
        "nothing",
        "--device",
        "cpu",
    )
    names = sorted({"sky", "traffic light", "sphere", "stop", "taxi", "exit", "größe", "zoo", *TEXTS})
    assert f"{out}: {len(names)} texts" in said
    assert json.loads((out / "semantics.json").read_text()) == names

    fitted = sorted({*names, *VOCABULARY})
    embeddings = embed(clip, [f"a {text}" for text in ["nothing", *fitted]])
    pca = load_file(out / "pca.safetensors")
    assert {key: tuple(value.shape) for key, value in pca.items()} == {"mean": (WIDTH,), "components": (64, WIDTH)}
    np.testing.assert_allclose(pca["mean"], embeddings[1:].mean(0), atol=1e-5)
    _, singular, components = np.linalg.svd(embeddings[1:] - embeddings[1:].mean(0))
    # of the first components, which rounding of the embeddings does not turn
    overlap = np.abs((pca["components"][:8].numpy() * components[:8]).sum(1))
    np.testing.assert_allclose(overlap, 1, atol=1e-3)

    table = Semantics.from_table(out)
    expected = project(out, embeddings)
    np.testing.assert_allclose(table.background, expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(table.rows(names), expected[1:][[fitted.index(n) for n in names]], rtol=1e-3, atol=1e-4)
    assert np.array_equal(table.rows(["Traffic LIGHT"]), table.rows(["traffic light"]))

    recipe = json.loads((out / "semantics-recipe.json").read_text())
    kept = recipe["pca"].pop("explained_variance")
    assert kept == pytest.approx((singular[:64] ** 2).sum() / (singular**2).sum(), abs=1e-4)
    assert recipe == {
        "format": "prismer-semantics",
        "tower": str(clip),
        "weights_sha256": TextTower(str(clip)).sha256,
        "weights_sha256_is_of": "the text tower's tensors in fp32, by name",
        "open_clip": open_clip.__version__,
        "embedding": "raw fp32 projection, not normalised",
        "feature": "(embedding - mean) @ components^T",
        "prompt": "a {}",
        "background": "nothing",
        "texts": len(names),
        "sources": [str(data), str(tmp_path / "more.txt")],
        "pca": {
            "width": WIDTH,
            "components": 64,
            "texts": len(fitted),
            "corpus": "the table's texts and the whole words of RoBERTa",
        },
    }
    # the folder is whole, nothing lies beside it, and its files have ordinary permissions
    assert [path.name for path in out.parent.iterdir()] == ["table"] and len(os.listdir(out)) == 4
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_the_same_input_gives_the_same_bytes(clip, tmp_path):
    for name in "ab":
        build(tmp_path / name, str(clip), TEXTS if name == "a" else TEXTS[::-1], vocabulary=False)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_add(run_semantics, clip, table, tmp_path):
    before = Semantics.from_table(table)
    (table / "config.json").write_text("a model's")
    data = write_dataset(tmp_path / "new", {"seg": ["zebra"]}, [{"0": "TAXI"}, {"0": TEXTS[0]}])
    assert run_semantics("add", table, "--data", data, "--device", "cpu") == f"{table}: 2 texts added\n"
    after = Semantics.from_table(table)
    assert np.array_equal(before.rows(TEXTS), after.rows(TEXTS))
    assert np.array_equal(before.background, after.background)
    expected = project(table, embed(clip, ["some zebra", "some taxi"]))
    np.testing.assert_allclose(after.rows(["zebra", "taxi"]), expected, rtol=1e-3, atol=1e-4)
    recipe = json.loads((table / "semantics-recipe.json").read_text())
    assert recipe["texts"] == len(TEXTS) + 2 and recipe["sources"] == ["first", str(data)]
    assert (table / "config.json").read_text() == "a model's"
    assert sorted(os.listdir(tmp_path)) == ["new", "table"]
    # without new texts the tower is not loaded
    assert run_semantics("add", table, "--data", data, "--clip", "nowhere").endswith(" 0 texts added\n")
    with pytest.raises(ValueError, match="nothing to add"):
        run_semantics("add", table)


def test_another_tower_is_refused(clip, table, tmp_path):
    other = save_tower(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="has weights .* was made with .* build a new table"):
        add(table, ["zebra"], clip=str(other))
    with pytest.raises(ValueError, match="has weights"):
        build(tmp_path / "out", str(other), TEXTS, pca=table)
    # the same weights with another activation function
    gelu = save_tower(tmp_path / "gelu", quick_gelu=False)
    assert TextTower(str(gelu)).sha256 == TextTower(str(clip)).sha256
    with pytest.raises(ValueError, match="does not reproduce the background features"):
        add(table, ["zebra"], clip=str(gelu))
    assert not (tmp_path / "out").exists()


def test_build_with_the_pca_of_another_table(clip, table, tmp_path):
    recipe = build(tmp_path / "out", str(clip), ["zebra"], pca=table)
    assert recipe["prompt"] == "some {}" and recipe["pca"]["taken_from"] == str(table)
    add(table, ["zebra"])
    got, expected = (Semantics.from_table(f).rows(["zebra"]) for f in (tmp_path / "out", table))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # a PCA from elsewhere, without a recipe
    plain = tmp_path / "plain"
    plain.mkdir()
    arrays = {"mean": torch.zeros(WIDTH), "components": torch.eye(64, WIDTH)}
    save_file(arrays, plain / "pca.safetensors")
    with pytest.warns(UserWarning, match="so nothing shows that its PCA fits this tower"):
        build(tmp_path / "bare", str(clip), ["zebra"], pca=plain)
    row = Semantics.from_table(tmp_path / "bare").rows(["zebra"])
    np.testing.assert_allclose(row, embed(clip, ["zebra"])[:, :64], rtol=1e-3, atol=1e-4)
    save_file({"mean": torch.zeros(96), "components": torch.eye(64, 96)}, plain / "pca.safetensors")
    with pytest.raises(ValueError, match="is of width 96, the tower"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(tmp_path / "wide", str(clip), ["zebra"], pca=plain)
    save_file({"mean": torch.zeros(96)}, plain / "pca.safetensors")
    with pytest.raises(ValueError, match="is damaged: pca.safetensors has"):
        build(tmp_path / "half", str(clip), ["zebra"], pca=plain)


def test_build_refuses_wrong_arguments(clip, table, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("a model's")
    with pytest.raises(ValueError, match="exists; choose another folder, or extend"):
        build(taken, str(clip), TEXTS)
    with pytest.raises(ValueError, match="must hold {} once"):
        build(tmp_path / "out", str(clip), TEXTS, prompt="a photo")
    with pytest.raises(ValueError, match="no texts to embed"):
        build(tmp_path / "out", str(clip), [])
    with pytest.raises(ValueError, match="is a pickle"):
        build(tmp_path / "out", str(clip), TEXTS, pca=tmp_path / "clip_pca.pkl")
    with pytest.raises(ValueError, match="no PCA is known for"):
        build(tmp_path / "out", str(clip), TEXTS, pca=taken)


def test_a_failed_write_leaves_the_old_table(clip, table, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clip_tables, "save_tensors", full)
    before = {path.name: path.read_bytes() for path in table.iterdir()}
    with pytest.raises(OSError):
        add(table, ["zebra"])
    with pytest.raises(OSError):
        build(tmp_path / "out", str(clip), TEXTS, vocabulary=False)
    assert before == {path.name: path.read_bytes() for path in table.iterdir()}
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize(
    "recipe",
    ["[]", "[" * 3000, '{"a": 1, "a": 2}', {"tower": 5}, {"prompt": None}, {"sources": "x"}, {"background": "\ud800"}],
    ids=lambda value: ascii(value)[:24],
)
def test_a_recipe_of_wrong_types_is_refused_in_one_sentence(table, recipe):
    path = table / clip_tables.RECIPE_FILE
    if isinstance(recipe, dict):
        recipe = json.dumps({**json.loads(path.read_text()), **recipe})
    path.write_text(recipe)
    with pytest.raises(ValueError, match="is damaged"):
        add(table, ["zebra"])
