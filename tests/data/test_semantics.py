"""Proves that a table holds (embedding - mean) @ components^T of its texts, that the PCA is that of numpy's SVD, that
words are added by the same tower alone, and that official feature files are read without unpickling anything.

The tower is a stand-in: open_clip's own architecture, tiny and with random weights, saved and loaded as real ones are.
python -m pytest tests/data/test_semantics.py
"""

import argparse
import json
import os
import pickle
import warnings

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from prismer.cli.semantics import add_semantics_commands
from prismer.dataloading.semantics import clip_tables as rooms
from prismer.dataloading.semantics.clip_tables import add, build, fit_pca
from prismer.dataloading.semantics.clip_tower import TextTower
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.semantics.published_tables import import_published
from prismer.dataloading.semantics.table_texts import dataset_texts, file_texts, vocabulary_words
from prismer.dataloading.store.shards import Sample, ShardWriter

CONTEXT, WIDTH = 12, 80
MODEL = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT, "width": 96, "heads": 3, "layers": 2, "vocab_size": 49408},
}
# enough for 64 components, of several lengths
TEXTS = [
    f"{colour} {thing}"
    for colour in "red green blue dark".split()
    for thing in (
        "car bus person tree sky dog cat road sign house window door table chair lamp bottle bicycle traffic light"
    ).split()
]
VOCABULARY = "apple river seventeen mountain zoo".split()


def save_tower(folder, seed: int = 0, **changes):
    """A stand-in for a CLIP model: random weights."""
    torch.manual_seed(seed)
    folder.mkdir()
    config = {"model_cfg": MODEL | changes, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**(MODEL | changes))
    for parameter in (model.positional_embedding, model.text_projection):
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tower(tmp_path_factory.mktemp("towers") / "stand-in")


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(rooms, "vocabulary_words", lambda: VOCABULARY)


@pytest.fixture
def run(capsys):
    """Call `prismer semantics` in this process; what it prints."""

    def call(*args) -> str:
        parser = argparse.ArgumentParser()
        add_semantics_commands(parser.add_subparsers())
        args = parser.parse_args(["semantics", *map(str, args)])
        capsys.readouterr()
        args.run(args)
        return capsys.readouterr().out

    return call


def embed(clip, texts) -> np.ndarray:
    """What open_clip says, with all its positions, in one batch."""
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    with torch.inference_mode():
        return model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip}")(texts)).numpy()


def project(folder, embeddings: np.ndarray) -> np.ndarray:
    pca = {name: tensor.numpy() for name, tensor in load_file(folder / "pca.safetensors").items()}
    return (embeddings - pca["mean"]) @ pca["components"].T


def write_dataset(folder, classes, words_of):
    with ShardWriter(folder, classes=classes, source="test") as writer:
        for i, words in enumerate(words_of):
            meta = {} if words is None else {"words": words}
            writer.write(Sample(f"{i:04d}", b"\xff\xd8image", {}, meta))
    return folder


def test_tower_gives_raw_embeddings(clip):
    texts = ["stop", "", "a much longer text with many words in it", "traffic light", "größe"]
    tower = TextTower(str(clip))
    with pytest.warns(UserWarning, match="1 texts fill the 12 tokens .* 'one two"):
        got = tower.embed([*texts, "one two " * 20]).numpy()
    expected = embed(clip, [*texts, "one two " * 20])
    assert got.dtype == np.float32 and got.shape == (6, WIDTH) == (6, tower.width)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # a normalised embedding would be of length 1
    assert (np.linalg.norm(got, axis=1) > 2).all()
    # alone or among others
    np.testing.assert_allclose(tower.embed(texts[:1]).numpy(), expected[:1], rtol=1e-4, atol=1e-5)


def test_a_file_of_weights_for_a_named_architecture(clip, tmp_path):
    (tmp_path / "stand-in-arch.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(tmp_path / "stand-in-arch.json")
    # another kind of file, the same weights
    torch.save(load_file(clip / "open_clip_model.safetensors"), tmp_path / "weights.pt")
    tower = TextTower(f"stand-in-arch@{tmp_path}/weights.pt")
    assert tower.sha256 == TextTower(str(clip)).sha256
    np.testing.assert_allclose(tower.embed(["stop"]), embed(clip, ["stop"]), rtol=1e-4, atol=1e-5)
    assert tower.name == f"stand-in-arch@{tmp_path}/weights.pt"


def test_pca_is_that_of_svd():
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


def test_pca_wants_enough_texts():
    with pytest.raises(ValueError, match="64 texts of width 80"):
        fit_pca(torch.randn(64, 80))
    with pytest.raises(ValueError, match="of width 63"):
        fit_pca(torch.randn(200, 63))


def test_build(run, clip, tmp_path, small_vocabulary):
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
    said = run(
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
    # the first ones, which no rounding of the embeddings turns
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
    # the whole folder and nothing beside it, readable as any file is
    assert [path.name for path in out.parent.iterdir()] == ["table"] and len(os.listdir(out)) == 4
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_the_same_input_gives_the_same_bytes(clip, tmp_path):
    for name in "ab":
        build(tmp_path / name, str(clip), TEXTS if name == "a" else TEXTS[::-1], vocabulary=False)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_vocabulary_is_whole_words():
    words = vocabulary_words()
    assert 20_000 < len(words) < 30_000 and words == sorted(set(words))
    assert {"person", "the", "paris"} < set(words) and all(map(str.isalpha, words))


def test_unreadable_samples_are_told(tmp_path):
    folder = write_dataset(tmp_path / "d", {}, [{"0": "stop"}, {"0": "exit"}])
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"stop"', b'"st0p"'))
    with pytest.warns(UserWarning, match="words of 1 samples could not be read; the first: .*0000"):
        assert dataset_texts([folder]) == {"exit"}
    with pytest.raises(ValueError, match="index.json"):
        dataset_texts([tmp_path / "nothing"])


@pytest.fixture
def table(clip, tmp_path):
    build(tmp_path / "table", str(clip), TEXTS, prompt="some {}", vocabulary=False, sources=["first"])
    return tmp_path / "table"


def test_add(run, clip, table, tmp_path):
    before = Semantics.from_table(table)
    (table / "config.json").write_text("a model's")
    data = write_dataset(tmp_path / "new", {"seg": ["zebra"]}, [{"0": "TAXI"}, {"0": TEXTS[0]}])
    assert run("add", table, "--data", data, "--device", "cpu") == f"{table}: 2 texts added\n"
    after = Semantics.from_table(table)
    assert np.array_equal(before.rows(TEXTS), after.rows(TEXTS))
    assert np.array_equal(before.background, after.background)
    expected = project(table, embed(clip, ["some zebra", "some taxi"]))
    np.testing.assert_allclose(after.rows(["zebra", "taxi"]), expected, rtol=1e-3, atol=1e-4)
    recipe = json.loads((table / "semantics-recipe.json").read_text())
    assert recipe["texts"] == len(TEXTS) + 2 and recipe["sources"] == ["first", str(data)]
    assert (table / "config.json").read_text() == "a model's"
    assert sorted(os.listdir(tmp_path)) == ["new", "table"]
    # nothing new: not even the tower is needed
    assert run("add", table, "--data", data, "--clip", "nowhere").endswith(" 0 texts added\n")
    with pytest.raises(ValueError, match="nothing to add"):
        run("add", table)


def test_another_tower_is_refused(clip, table, tmp_path):
    other = save_tower(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="has weights .* was made with .* build a new table"):
        add(table, ["zebra"], clip=str(other))
    with pytest.raises(ValueError, match="has weights"):
        build(tmp_path / "out", str(other), TEXTS, pca=table)
    # the same weights with another activation
    gelu = save_tower(tmp_path / "gelu", quick_gelu=False)
    assert TextTower(str(gelu)).sha256 == TextTower(str(clip)).sha256
    with pytest.raises(ValueError, match="does not give the background .* its features again"):
        add(table, ["zebra"], clip=str(gelu))
    assert not (tmp_path / "out").exists()


def test_build_with_the_pca_of_another_table(clip, table, tmp_path):
    recipe = build(tmp_path / "out", str(clip), ["zebra"], pca=table)
    assert recipe["prompt"] == "some {}" and recipe["pca"]["taken_from"] == str(table)
    add(table, ["zebra"])
    got, expected = (Semantics.from_table(f).rows(["zebra"]) for f in (tmp_path / "out", table))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # plain arrays from elsewhere
    plain = tmp_path / "plain"
    plain.mkdir()
    arrays = {"mean": torch.zeros(WIDTH), "components": torch.eye(64, WIDTH)}
    save_file(arrays, plain / "pca.safetensors")
    with pytest.warns(UserWarning, match="nothing tells whether its PCA belongs to this tower"):
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


@pytest.mark.parametrize(
    "source, message",
    [
        ("ViT-L-14-quickgelu", "no CLIP weights are at hand for ViT-L-14-quickgelu; name their file"),
        ("ViT-L-14-quickgelu@{}/none.pt", "no CLIP weights are at .*none.pt"),
        ("ViT-B-32@{}/garbage.pt", r"ViT-B-32@.*garbage.pt cannot be loaded \(.*\); give weights"),
        ("nothing-of-the-kind", "neither a folder nor an architecture"),
        ("{}/empty", "has no open_clip_config.json"),
        ("{}/bare", "has no weights"),
        ("{}/unfit", "cannot be loaded .*state_dict"),
        ("{}/unknown", "cannot be loaded .*"),
    ],
)
def test_missing_weights_cost_a_sentence(clip, tmp_path, source, message):
    (tmp_path / "garbage.pt").write_bytes(b"garbage" * 20)
    for name in ("empty", "bare", "unfit", "unknown"):
        (tmp_path / name).mkdir()
    config = json.loads((clip / "open_clip_config.json").read_text())
    (tmp_path / "bare" / "open_clip_config.json").write_text(json.dumps(config))
    config["model_cfg"]["embed_dim"] = 64
    (tmp_path / "unfit" / "open_clip_config.json").write_text(json.dumps(config))
    config["model_cfg"]["surprise"] = 1
    (tmp_path / "unknown" / "open_clip_config.json").write_text(json.dumps(config))
    for name in ("unfit", "unknown"):
        os.link(clip / "open_clip_model.safetensors", tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path / "out", source.format(tmp_path), TEXTS)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_build_refuses(clip, table, tmp_path):
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


def test_a_failed_write_leaves_what_was_there(clip, table, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rooms, "save_tensors", full)
    before = {path.name: path.read_bytes() for path in table.iterdir()}
    with pytest.raises(OSError):
        add(table, ["zebra"])
    with pytest.raises(OSError):
        build(tmp_path / "out", str(clip), TEXTS, vocabulary=False)
    assert before == {path.name: path.read_bytes() for path in table.iterdir()}
    assert os.listdir(tmp_path) == ["table"]


@pytest.fixture
def official(tmp_path):
    """Files in the form of the official release, with other numbers."""
    rows = torch.randn(6, 64)
    for name, labels, which in (
        ("coco", ["person", "traffic light", "Sky "], [0, 1, 2]),
        ("ade", ["sky", "wall"], [2, 3]),
        ("detection", ["Person", "zebra", "zebra"], [0, 4, 4]),
    ):
        torch.save({"labels": labels, "features": rows[which]}, tmp_path / f"{name}_features.pt")
    torch.save(rows[5].clone(), tmp_path / "background_features.pt")
    return tmp_path, rows.numpy()


def flags(folder, *names) -> list:
    return [part for n in names for part in (f"--{n}", folder / f"{n}_features.pt")]


def test_import_official(run, official, tmp_path):
    folder, rows = official
    out = tmp_path / "out"
    said = run("import", *flags(folder, "coco", "ade", "detection", "background"), "--out", out)
    assert f"{out}: 5 texts, from 8 names" in said and "no PCA is known" in said
    table = Semantics.from_table(out)
    names = ["person", "traffic light", "sky", "wall", "zebra"]
    assert np.array_equal(table.rows(names), rows[:5])
    assert np.array_equal(table.background, rows[5])
    recipe = json.loads((out / "semantics-recipe.json").read_text())
    assert recipe["pca"] is None and len(recipe["imported"]) == 4
    with pytest.raises(ValueError, match="no PCA is known for .* `prismer semantics build`"):
        add(out, ["stop"])


def test_import_refuses(run, official, tmp_path):
    folder, rows = official
    out = tmp_path / "out"
    common = [*flags(folder, "coco", "background"), "--out", out]
    with pytest.raises(ValueError, match="is a pickle, .* is never read"):
        run("import", *common, "--pca", tmp_path / "clip_pca.pkl")
    with pytest.raises(ValueError, match="no names are imported"):
        run("import", *flags(folder, "background"), "--out", out)

    changed = tmp_path / "changed.pt"
    torch.save({"labels": ["SKY"], "features": torch.tensor(rows[2:3]) + 0.01}, changed)
    with pytest.raises(ValueError, match="changed.pt gives 'sky' other features than .*coco"):
        run("import", *common, "--ade", changed)

    for value, message in [
        ({"labels": ["a"], "features": torch.zeros(2, 64)}, r"are \(2, 64\); expected \(1, 64\)"),
        ({"labels": ["a"], "features": torch.full((1, 64), torch.nan)}, "finite"),
        ({"labels": ["a"], "features": [1.0]}, "are list"),
        ({"features": torch.zeros(1, 64)}, "no list 'labels'"),
        (torch.zeros(64), "no list 'labels'"),
    ]:
        torch.save(value, changed)
        with pytest.raises(ValueError, match=message):
            run("import", *common, "--ade", changed)
    with pytest.raises(ValueError, match=r"expected \(64,\)"):
        import_published(out, [folder / "coco_features.pt"], folder / "ade_features.pt")
    assert not out.exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_nothing_is_unpickled(official, tmp_path, monkeypatch):
    folder, _ = official
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"labels": ["a"], "features": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    (tmp_path / "short.pt").write_bytes((folder / "coco_features.pt").read_bytes()[:300])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("trap.pt", "old.pt", "short.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a file of plain tensors"):
            import_published(tmp_path / "out", [tmp_path / name], folder / "background_features.pt")
    assert not (tmp_path / "sprung").exists()


def test_lines_of_texts_end_at_line_ends_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffstop\u2028sign\r\nA\x0cCat\rdog\n\n".encode())
    assert file_texts([tmp_path / "a.txt"]) == {"stop sign", "a cat", "dog"}


@pytest.mark.parametrize("kind", ["pipe", "folder", "bytes", "utf-16", "absent"])
def test_a_text_file_that_is_none_is_one_sentence(tmp_path, kind):
    path = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(b"\xff" if kind == "bytes" else "a".encode("utf-16"))
    with pytest.raises(ValueError, match="a.txt (cannot be read|is not UTF-8)"):
        file_texts([path])


@pytest.mark.parametrize(
    "recipe",
    ["[]", "[" * 3000, '{"a": 1, "a": 2}', {"tower": 5}, {"prompt": None}, {"sources": "x"}, {"background": "\ud800"}],
    ids=lambda value: ascii(value)[:24],
)
def test_a_recipe_of_wrong_types_is_one_sentence(table, recipe):
    path = table / rooms.RECIPE_FILE
    if isinstance(recipe, dict):
        recipe = json.dumps({**json.loads(path.read_text()), **recipe})
    path.write_text(recipe)
    with pytest.raises(ValueError, match="is damaged"):
        add(table, ["zebra"])


@pytest.mark.parametrize("labels", [["a", 5], ["a", "\ud800"], ["a", " "], {"a": 0, "b": 1}, None], ids=ascii)
def test_official_names_of_wrong_types_are_refused(tmp_path, labels):
    torch.save({"labels": labels, "features": torch.zeros(2, 64)}, tmp_path / "t.pt")
    torch.save(torch.zeros(64), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="t.pt (holds no list|gives features to an empty name)"):
        import_published(tmp_path / "out", [tmp_path / "t.pt"], tmp_path / "b.pt")


def test_an_official_file_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "t.pt")
    with pytest.raises(OSError, match="named pipe"):
        import_published(tmp_path / "out", [tmp_path / "t.pt"], tmp_path / "t.pt")
