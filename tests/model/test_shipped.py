"""Proves that the shipped files are whole and work: hashes of the towers, and a tiny model that looks at its images.

Run: pytest tests/model/test_shipped.py"""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prismer.cli.main import main
from prismer.dataloading.scenes.dataset import render_scene, scene_seed
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.shipped import shipped_folder


@pytest.fixture(scope="module")
def tiny() -> Prismer:
    return Prismer.from_pretrained("tiny")


@pytest.fixture(scope="module")
def scenes():
    """Scenes that no split of the embedded dataset holds."""
    return [render_scene(scene_seed(7, "shipped", i)) for i in range(24)]


def test_towers_have_the_recorded_hash():
    folder = shipped_folder("tiny-towers")
    recipe = json.loads((folder / "recipe.json").read_text())
    data = (folder / "towers.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == recipe["sha256"]
    assert len(data) < 20e6


def test_tiny_still_has_its_towers(tiny):
    """Training left the frozen towers as they are shipped, bit for bit."""
    towers = load_file(shipped_folder("tiny-towers") / "towers.safetensors")
    freeze(tiny, "freeze_lang_vision")
    frozen = {name: p for name, p in tiny.named_parameters() if not p.requires_grad}
    assert len(frozen) > 100
    for name, parameter in frozen.items():
        torch.testing.assert_close(parameter.detach(), towers[name], rtol=0, atol=0, msg=name)


def test_tiny_answers_from_the_image_alone(tiny, scenes):
    """Without expert labels, on new scenes, its accuracy is far above that for blank images."""
    answers = json.loads((shipped_folder("tiny") / "answers.json").read_text())
    images = [Image.fromarray(scene.rgb) for scene in scenes]
    blanks = [Image.fromarray(np.full_like(scene.rgb, 118)) for scene in scenes]
    asked = [[q["question"] for q in scene.meta["questions"]] for scene in scenes]
    truth = [q["answers"][0]["answer"] for scene in scenes for q in scene.meta["questions"]]

    def accuracy(seen) -> float:
        replies = [a.text for group in tiny.answer(seen, asked, answers) for a in group]
        return float(np.mean([a == b for a, b in zip(replies, truth, strict=True)]))

    seeing, blind = accuracy(images), accuracy(blanks)
    assert seeing > blind + 0.15, (seeing, blind)


def test_tiny_captions_name_what_is_there(tiny, scenes):
    captions = tiny.caption([Image.fromarray(scene.rgb) for scene in scenes])
    named = 0
    for caption, scene in zip(captions, scenes, strict=True):
        colours = {thing["colour"] for thing in scene.meta["scene"]["objects"]}
        named += any(colour in caption.lower() for colour in colours)
    assert named >= 18, captions


def test_the_command_line_works_right_after_installation(scenes, tmp_path, capsys):
    path = tmp_path / "scene.png"
    Image.fromarray(scenes[0].rgb).resize((300, 200)).save(path)
    assert main(["caption", str(path)]) == 0
    assert len(capsys.readouterr().out.split()) > 4
    assert main(["answer", str(path), "How many objects are there?"]) == 0
    assert capsys.readouterr().out.strip()[-1] in "012345"
