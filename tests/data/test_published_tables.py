"""Proves that the published feature files are imported exactly, and that nothing is unpickled.

python -m pytest tests/data/test_published_tables.py
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from prismer.dataloading.semantics.clip_tables import add
from prismer.dataloading.semantics.features import Semantics
from prismer.dataloading.semantics.published_tables import import_published


@pytest.fixture
def published(tmp_path):
    """Files in the form of the published release, with other numbers."""
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


def test_published_features_are_imported(run_semantics, published, tmp_path):
    folder, rows = published
    out = tmp_path / "out"
    said = run_semantics("import", *flags(folder, "coco", "ade", "detection", "background"), "--out", out)
    assert f"{out}: 5 texts, from 8 names" in said and "no PCA is known" in said
    table = Semantics.from_table(out)
    names = ["person", "traffic light", "sky", "wall", "zebra"]
    assert np.array_equal(table.rows(names), rows[:5])
    assert np.array_equal(table.background, rows[5])
    recipe = json.loads((out / "semantics-recipe.json").read_text())
    assert recipe["pca"] is None and len(recipe["imported"]) == 4
    with pytest.raises(ValueError, match="no PCA is known for .* `prismer semantics build`"):
        add(out, ["stop"])


def test_import_refuses_files_of_another_form(run_semantics, published, tmp_path):
    folder, rows = published
    out = tmp_path / "out"
    common = [*flags(folder, "coco", "background"), "--out", out]
    with pytest.raises(ValueError, match="is a pickle, .* is never read"):
        run_semantics("import", *common, "--pca", tmp_path / "clip_pca.pkl")
    with pytest.raises(ValueError, match="no names are imported"):
        run_semantics("import", *flags(folder, "background"), "--out", out)

    changed = tmp_path / "changed.pt"
    torch.save({"labels": ["SKY"], "features": torch.tensor(rows[2:3]) + 0.01}, changed)
    with pytest.raises(ValueError, match="changed.pt gives 'sky' other features than .*coco"):
        run_semantics("import", *common, "--ade", changed)

    for value, message in [
        ({"labels": ["a"], "features": torch.zeros(2, 64)}, r"are \(2, 64\); expected \(1, 64\)"),
        ({"labels": ["a"], "features": torch.full((1, 64), torch.nan)}, "finite"),
        ({"labels": ["a"], "features": [1.0]}, "are list"),
        ({"features": torch.zeros(1, 64)}, "no list 'labels'"),
        (torch.zeros(64), "no list 'labels'"),
    ]:
        torch.save(value, changed)
        with pytest.raises(ValueError, match=message):
            run_semantics("import", *common, "--ade", changed)
    with pytest.raises(ValueError, match=r"expected \(64,\)"):
        import_published(out, [folder / "coco_features.pt"], folder / "ade_features.pt")
    assert not out.exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_nothing_is_unpickled(published, tmp_path, monkeypatch):
    folder, _ = published
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"labels": ["a"], "features": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    (tmp_path / "short.pt").write_bytes((folder / "coco_features.pt").read_bytes()[:300])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("trap.pt", "old.pt", "short.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a file of plain tensors"):
            import_published(tmp_path / "out", [tmp_path / name], folder / "background_features.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("labels", [["a", 5], ["a", "\ud800"], ["a", " "], {"a": 0, "b": 1}, None], ids=ascii)
def test_names_of_wrong_types_are_refused(tmp_path, labels):
    torch.save({"labels": labels, "features": torch.zeros(2, 64)}, tmp_path / "t.pt")
    torch.save(torch.zeros(64), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="t.pt (holds no list|gives features to an empty name)"):
        import_published(tmp_path / "out", [tmp_path / "t.pt"], tmp_path / "b.pt")


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "t.pt")
    with pytest.raises(OSError, match="named pipe"):
        import_published(tmp_path / "out", [tmp_path / "t.pt"], tmp_path / "t.pt")
