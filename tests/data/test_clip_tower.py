"""Proves that a CLIP text tower gives raw embeddings, and that missing weights end in one sentence.

python -m pytest tests/data/test_clip_tower.py
"""

import json
import os

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from prismer.dataloading.semantics.clip_tables import build
from prismer.dataloading.semantics.clip_tower import TextTower
from tests.data.stand_in_clip import MODEL, TEXTS, WIDTH, embed


def test_tower_gives_raw_embeddings(clip):
    texts = ["stop", "", "a much longer text with many words in it", "traffic light", "größe"]
    tower = TextTower(str(clip))
    with pytest.warns(UserWarning, match="1 texts fill the 12 tokens .* 'one two"):
        got = tower.embed([*texts, "one two " * 20]).numpy()
    expected = embed(clip, [*texts, "one two " * 20])
    assert got.dtype == np.float32 and got.shape == (6, WIDTH) == (6, tower.width)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # a normalised embedding would have length 1
    assert (np.linalg.norm(got, axis=1) > 2).all()
    # a text alone has the same embedding as in a batch
    np.testing.assert_allclose(tower.embed(texts[:1]).numpy(), expected[:1], rtol=1e-4, atol=1e-5)


def test_a_file_of_weights_for_a_named_architecture(clip, tmp_path):
    (tmp_path / "stand-in-arch.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(tmp_path / "stand-in-arch.json")
    # the same weights in another kind of file
    torch.save(load_file(clip / "open_clip_model.safetensors"), tmp_path / "weights.pt")
    tower = TextTower(f"stand-in-arch@{tmp_path}/weights.pt")
    assert tower.sha256 == TextTower(str(clip)).sha256
    np.testing.assert_allclose(tower.embed(["stop"]), embed(clip, ["stop"]), rtol=1e-4, atol=1e-5)
    assert tower.name == f"stand-in-arch@{tmp_path}/weights.pt"


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
def test_missing_weights_end_in_one_sentence(clip, tmp_path, source, message):
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
